"""Statistics: what a stream of values was like at each site, as a value that can be kept, read and ablated with."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import as_whole, checks_arguments, file_of, items_of, whole_number
from ..checked_files import json_of, mapping_of, plain_whole, tensors_in
from ..displaying import records, shown
from ..errors import BadHook, DamagedHarvest, NotCaptured, OutOfRange, Unsupported
from ..files import save_tensors
from ..model import LM
from ..sites import AnySite, Site, Sites, parse
from .moments import Moments, Norms, exact, merged, merged_norms, moments, norms
from .strongest import PLACE, Strongest, merged_strongest, strongest


@dataclass(frozen=True, eq=False, repr=False)
class SiteStatistics:
    """The statistics of one site, in float64, over `count` tokens.

    mean        [...]       of each number, the axes being the site's behind batch and pos
    variance    [...]       the mean of squared deviations; `std` is its root
    covariance  [..., n, n] of the last axis with itself, for each head where there are heads; where it was asked for
    norm        [...]       the lengths along the last axis: `norm.mean`, `.std`, `.min`, `.max`
    """

    site: AnySite
    moments: Moments
    norm: Norms
    strongest: Strongest | None = None

    @property
    def count(self) -> int:
        """How many tokens there were."""
        return self.moments.count

    @property
    def mean(self) -> Float[Tensor, "..."]:
        return self.moments.mean

    @property
    def variance(self) -> Float[Tensor, "..."]:
        return self.moments.variance

    @property
    def std(self) -> Float[Tensor, "..."]:
        return self.variance.sqrt()

    @property
    def covariance(self) -> Float[Tensor, "... n n"]:
        """`NotCaptured` where it was not asked for."""
        if self.moments.products is None:
            raise NotCaptured(f"no covariance of {self.site} was taken: ask for it with covariance=True")
        return self.moments.products / self.count

    def top(self, unit: int | tuple[int, ...], lm: LM | None = None) -> pd.DataFrame:
        """The tokens at which one unit was largest, the largest first; of a site with heads the unit is (head, number).

        Columns: text, piece, pos, token_id, value; and token, its text, if a model is given.
        """
        if self.strongest is None:
            raise NotCaptured(f"the strongest tokens of {self.site} were not kept: ask for them with top=10")
        meaning = "the number of a unit; with heads, (head, number);"
        whole = as_whole(unit)
        index = (
            (whole,)
            if whole is not None
            else tuple([whole_number(one, "unit", least=0, meaning=meaning) for one in items_of(unit) or (unit,)])
        )
        sizes = tuple(self.mean.shape)
        if len(index) != len(sizes) or not all(0 <= i < size for i, size in zip(index, sizes, strict=True)):
            raise OutOfRange(
                f"unit {unit} of {self.site} was asked for, and its units are counted {list(sizes)} from 0"
            )
        places = self.strongest.places[(slice(None), *index)].tolist()
        table = pd.DataFrame(places, columns=list(PLACE))
        if lm is not None:
            table.insert(4, "token", [lm.string(token) for token in table["token_id"]])
        return table.assign(value=self.strongest.values[(slice(None), *index)].tolist())

    def head(self, head: int) -> "SiteStatistics":
        """The statistics of one head of a site that has all of them."""
        heads = self.mean.shape[0] if self.mean.ndim > 1 else 0
        if not isinstance(self.site, Site) or self.site.head is not None or head >= heads:
            raise NotCaptured(f"head {head} of {self.site} was asked for, which has {heads} heads")
        of_head = None if self.strongest is None else self.strongest.head(head)
        site = Site(self.site.name, self.site.layer, head)
        return SiteStatistics(site, self.moments.head(head), self.norm.head(head), of_head)

    def __repr__(self) -> str:
        return f"SiteStatistics({self.site}, {list(self.mean.shape)}, {self.count} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Statistics of several sites: `statistics["resid_post.6"].mean`, `statistics["z.9.3"]` for one head of `z.9`.

    Made by `statistics` and by `Harvest.statistics`. `hk.ablate(sites, to=statistics)` puts in each site's own mean.
    `about` says of what: the model, the positions, how many texts, and their sha256.
    """

    of_site: Mapping[AnySite, SiteStatistics]
    about: Mapping[str, Any]

    @property
    def sites(self) -> Sites:
        """The sites that have statistics."""
        return Sites(tuple(self.of_site))

    def __getitem__(self, site: str | AnySite) -> SiteStatistics:
        wanted = parse(site) if isinstance(site, str) else site
        if wanted in self.of_site:
            return self.of_site[wanted]
        if isinstance(wanted, Site) and wanted.head is not None:
            whole = self.of_site.get(Site(wanted.name, wanted.layer))
            if whole is not None:
                return whole.head(wanted.head)
        raise NotCaptured(f"there are no statistics of {wanted}: there are those of {self.sites}")

    def mean_of(self, site: AnySite) -> Float[Tensor, "..."]:
        """The mean at a site, for `hk.ablate`."""
        return self[site].mean

    def table(self) -> pd.DataFrame:
        """One row a site, and a head where there are heads. Columns: site, head (None where there is none), count,
        norm_mean, norm_std, norm_min, norm_max, and mean_norm, the length of the mean."""
        rows = []
        for site, found in self.of_site.items():
            heads = range(found.mean.shape[0]) if found.mean.ndim > 1 else [None]
            for head in heads:
                each = found if head is None else found.head(head)
                numbers = (each.norm.mean, each.norm.std, each.norm.min, each.norm.max, each.mean.norm(dim=-1))
                rows.append([str(site), head, each.count, *(number.item() for number in numbers)])
        names = ["site", "head", "count", "norm_mean", "norm_std", "norm_min", "norm_max", "mean_norm"]
        return pd.DataFrame(rows, columns=names)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all to a safetensors file, to be read by `load_statistics`; the file's path."""
        tensors: dict[str, Tensor] = {}
        for site, found in self.of_site.items():
            tensors |= {f"{site}/{name}": tensor for name, tensor in _tensors(found).items()}
        return save_tensors(tensors, path, about={"statistics": json.dumps(dict(self.about))})

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        return shown("Statistics", rows=records(self.table(), "site", "head", "count", "norm_mean", "norm_std"))

    def __repr__(self) -> str:
        count, texts = next(iter(self.of_site.values())).count, self.about["texts"]
        return f"Statistics({count} tokens of {texts} text{'' if texts == 1 else 's'}; {self.sites})"


def _tensors(found: SiteStatistics) -> dict[str, Tensor]:
    lengths = found.norm.moments
    made = {"count": torch.tensor(found.count), "mean": found.mean, "spread": found.moments.spread}
    made |= {"norm_mean": lengths.mean, "norm_spread": lengths.spread, "norm_min": found.norm.min}
    made |= {"norm_max": found.norm.max}
    if found.moments.products is not None:
        made["products"] = found.moments.products
    if found.strongest is not None:
        made |= {"top_values": found.strongest.values, "top_rows": found.strongest.rows}
        made |= {"top_places": found.strongest.places}
    return made


@checks_arguments
def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """The statistics that `Statistics.save` wrote. `DamagedHarvest` for another file.

    >>> path = hk.statistics(lm, ["Tea with milk"], "resid_post.6", progress=False).save("means.safetensors")
    >>> load_statistics(path)["resid_post.6"].mean.shape
    torch.Size([576])
    """
    tensors, words = tensors_in(file_of(path), error=DamagedHarvest)
    name = repr(Path(path).name)
    if "statistics" not in words:
        raise DamagedHarvest(f"{name} has no statistics: give a file that Statistics.save wrote")
    about = mapping_of(
        json_of(words["statistics"], name, error=DamagedHarvest, finite=False), name, error=DamagedHarvest
    )
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, word = key.rpartition("/")
        by_site.setdefault(site, {})[word] = tensor
    sites = about.get("sites")
    if not isinstance(sites, list) or set(map(str, sites)) != set(by_site) or not plain_whole(about.get("texts")):
        raise DamagedHarvest(f"{name} has other sites than it says: it was changed; make it again")
    try:
        return Statistics({parse(site): _site_statistics(parse(site), by_site[site]) for site in sites}, about)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DamagedHarvest(f"{name} lacks tensors of its statistics: it was changed; make it again") from error


def _site_statistics(site: AnySite, t: Mapping[str, Tensor]) -> SiteStatistics:
    count = int(t["count"])
    if t["mean"].shape != t["spread"].shape or t["norm_mean"].shape != t["mean"].shape[:-1]:
        raise ValueError("the tensors do not fit one another")
    lengths = Norms(Moments(count, t["norm_mean"], t["norm_spread"]), t["norm_min"], t["norm_max"])
    top = Strongest(t["top_values"], t["top_rows"], t["top_places"]) if "top_values" in t else None
    return SiteStatistics(site, Moments(count, t["mean"], t["spread"], t.get("products")), lengths, top)


@dataclass(eq=False)
class Summing:
    """Statistics while values come in."""

    covariance: bool
    top: int
    of_site: dict[AnySite, SiteStatistics]

    def add(self, values: Mapping[AnySite, Tensor], rows: Int[Tensor, " row"], places: Int[Tensor, "row 4"]) -> None:
        """Take in some rows: the values at each site, the rows' numbers, and which token each is of."""
        for site, found in values.items():
            _check(site, found, places)
            numbers, before = exact(found), self.of_site.get(site)
            own = moments(numbers, covariance=self.covariance)
            top = strongest(found.to(numbers.device), rows, places, self.top) if self.top else None
            if before is not None and top is not None:
                top = merged_strongest(before.strongest, top, self.top)
            self.of_site[site] = SiteStatistics(
                site,
                merged(before and before.moments, own),
                merged_norms(before and before.norm, norms(numbers)),
                top,
            )

    def statistics(self, about: Mapping[str, Any]) -> Statistics:
        """What all that came in was like, on the CPU."""
        found = {
            site: _site_statistics(site, {name: tensor.cpu() for name, tensor in _tensors(each).items()})
            for site, each in self.of_site.items()
        }
        return Statistics(found, {**about, "sites": [str(site) for site in found]})


def summing(covariance: bool, top: int) -> Summing:
    """Statistics of nothing yet."""
    whole_number(top, "top", least=0, meaning="how many tokens are kept for each unit,", error=BadHook)
    return Summing(covariance, top, {})


def _check(site: AnySite, values: Tensor, places: Tensor) -> None:
    """Refuse numbers of which a mean would say nothing."""
    if not values.dtype.is_floating_point:
        raise BadHook(f"{site} holds whole numbers that name something, of which a mean says nothing: leave it out")
    if values.ndim not in (2, 3):
        raise BadHook(
            f"{site} has the axes {list(values.shape[1:])} at each token, and statistics are of vectors, one or one a "
            "head: leave it out"
        )
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        text, _, pos, _ = places[int((~finite).nonzero()[0])].tolist()
        raise Unsupported(
            f"{site} is not a finite number at position {pos} of text {text}, and a mean would not be either: leave "
            "that text out, or run the model in float32"
        )
