"""Moments: count, mean, variance and covariance of a stream of values, in float64 and in memory that does not grow.

Each batch is summed up by itself and merged into what came before, by the formulas of Chan, Golub and LeVeque (1979),
which lose no digits where a mean is large and a variance small.

Strongest: for each unit of a site the tokens at which it is largest, found in one pass.

Of equal values the earlier token comes first, so that what comes out depends on the texts and not on the batches.

Statistics: what a stream of values was like at each site, as a value that can be kept, read and ablated with.

hk.statistics: what the values at some sites are like over any number of texts, in one pass that keeps none.
"""

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

from ...arguments import as_whole, checks_arguments, file_of, items_of, whole_number
from ...display import records, shown
from ...errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange, Unsupported
from ...files.tensors import save_tensors
from ...files.untrusted import json_of, mapping_of, plain_whole, tensors_in
from ...models.lm import LM
from ...models.positions import PosLike, Where, as_pos
from ...models.provenance import about_model
from ...models.sites import AnySite, Site, Sites, SitesLike, parse
from .stored_values import Progress, at_sites, probed, row_numbers
from .texts import (
    LOOK_AHEAD,
    Cursor,
    Long,
    Read,
    Rules,
    TextsLike,
    Unfit,
    Window,
    batches,
    context_of,
    how_many,
    next_window,
)


@dataclass(frozen=True, eq=False)
class Moments:
    """Of `count` rows: their mean, the sum of squared deviations from it, and on request that of products [n, n]."""

    count: int
    mean: Float[Tensor, "..."]
    spread: Float[Tensor, "..."]
    products: Float[Tensor, "... n n"] | None = None

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """The mean of squared deviations (divided by the count)."""
        return self.spread / self.count

    def head(self, head: int) -> "Moments":
        """Those of one head, where the first axis is heads."""
        products = None if self.products is None else self.products[head]
        return Moments(self.count, self.mean[head], self.spread[head], products)


def exact(values: Tensor) -> Float[Tensor, "..."]:
    """The same numbers in float64, on the CPU where the device has no such numbers."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def moments(values: Float[Tensor, "row ..."], *, covariance: bool = False) -> Moments:
    """The moments of some rows in float64; covariances are of the last axis."""
    mean = values.mean(0)
    away = values - mean
    products = torch.einsum("r...i,r...j->...ij", away, away) if covariance else None
    return Moments(len(values), mean, (away * away).sum(0), products)


def merged(first: Moments | None, second: Moments) -> Moments:
    """The moments of two sets of rows together."""
    if first is None:
        return second
    count = first.count + second.count
    shift = second.mean - first.mean
    weight = first.count * second.count / count
    products = None
    if first.products is not None and second.products is not None:
        products = (
            first.products + second.products + weight * shift[..., :, None] * shift[..., None, :]
        )
    return Moments(
        count,
        first.mean + shift * (second.count / count),
        first.spread + second.spread + weight * shift * shift,
        products,
    )


@dataclass(frozen=True, eq=False)
class Norms:
    """How long the vectors of a site are, along its last axis: one number, or one a head."""

    moments: Moments
    min: Float[Tensor, "..."]
    max: Float[Tensor, "..."]

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """The mean of the lengths."""
        return self.moments.mean

    @property
    def std(self) -> Float[Tensor, "..."]:
        """Their standard deviation."""
        return self.moments.variance.sqrt()

    def head(self, head: int) -> "Norms":
        """Those of one head."""
        return Norms(self.moments.head(head), self.min[head], self.max[head])


def norms(values: Float[Tensor, "row ..."]) -> Norms:
    """The norms of some rows in float64."""
    lengths = values.norm(dim=-1)
    return Norms(moments(lengths), lengths.amin(0), lengths.amax(0))


def merged_norms(first: Norms | None, second: Norms) -> Norms:
    """The norms of two sets of rows together."""
    if first is None:
        return second
    low, high = torch.minimum(first.min, second.min), torch.maximum(first.max, second.max)
    return Norms(merged(first.moments, second.moments), low, high)


PLACE = ("text", "piece", "pos", "token_id")  # what is known of each token
LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Strongest:
    """The largest values of each unit, the largest first, the numbers of their rows, and which token each is at."""

    values: Float[Tensor, "top ..."]
    rows: Int[Tensor, "top ..."]
    places: Int[Tensor, "top ... 4"]

    def head(self, head: int) -> "Strongest":
        """Those of one head, where the first axis behind `top` is heads."""
        return Strongest(self.values[:, head], self.rows[:, head], self.places[:, head])


def strongest(
    values: Float[Tensor, "row ..."],
    rows: Int[Tensor, " row"],
    places: Int[Tensor, "row 4"],
    top: int,
) -> Strongest:
    """The largest values of some rows, `top` of them or as many as there are rows."""
    flat = values.flatten(1)
    numbers = rows.to(flat.device)[:, None].expand_as(flat)
    index = _largest(flat, numbers, min(top, len(flat)))
    shape = (len(index), *values.shape[1:])
    return Strongest(
        flat.gather(0, index).reshape(shape),
        numbers.gather(0, index).reshape(shape),
        places.to(flat.device)[index].reshape(*shape, len(PLACE)),
    )


def merged_strongest(first: Strongest | None, second: Strongest, top: int) -> Strongest:
    """The largest values of two sets of rows together."""
    if first is None:
        return second
    values = torch.cat([first.values, second.values])
    rows = torch.cat([first.rows, second.rows])
    places = torch.cat([first.places, second.places]).flatten(1, -2)
    index = _largest(values.flatten(1), rows.flatten(1), min(top, len(values)))
    shape = (len(index), *values.shape[1:])
    return Strongest(
        values.flatten(1).gather(0, index).reshape(shape),
        rows.flatten(1).gather(0, index).reshape(shape),
        places.gather(0, index[..., None].expand(-1, -1, len(PLACE))).reshape(*shape, len(PLACE)),
    )


def _largest(
    values: Float[Tensor, "row unit"], numbers: Int[Tensor, "row unit"], top: int
) -> Int[Tensor, "top unit"]:
    """Where the largest values of each column are, in order; of equal ones those of the smallest numbers, in order."""
    least = values.topk(top, dim=0).values[-1]
    tied = values == least
    needed = top - (values > least).sum(0)
    earliest = numbers.masked_fill(~tied, LAST)
    cutoff = earliest.topk(top, dim=0, largest=False).values.gather(0, needed[None] - 1)
    chosen = (values > least) | (earliest <= cutoff) & tied
    index = chosen.T.nonzero()[:, 1].reshape(values.shape[1], top).T
    by_number = numbers.gather(0, index).argsort(dim=0)
    index = index.gather(0, by_number)
    by_value = values.gather(0, index).argsort(dim=0, descending=True, stable=True)
    return index.gather(0, by_value)


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
            raise NotCaptured(
                f"no covariance of {self.site} was taken: ask for it with covariance=True"
            )
        return self.moments.products / self.count

    def top(self, unit: int | tuple[int, ...], lm: LM | None = None) -> pd.DataFrame:
        """The tokens at which one unit was largest, the largest first; of a site with heads the unit is (head, number).

        Columns: text, piece, pos, token_id, value; and token, its text, if a model is given.
        """
        if self.strongest is None:
            raise NotCaptured(
                f"the strongest tokens of {self.site} were not kept: ask for them with top=10"
            )
        meaning = "the number of a unit; with heads, (head, number);"
        whole = as_whole(unit)
        index = (
            (whole,)
            if whole is not None
            else tuple(
                [
                    whole_number(one, "unit", least=0, meaning=meaning)
                    for one in items_of(unit) or (unit,)
                ]
            )
        )
        sizes = tuple(self.mean.shape)
        if len(index) != len(sizes) or not all(
            0 <= i < size for i, size in zip(index, sizes, strict=True)
        ):
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
                numbers = (
                    each.norm.mean,
                    each.norm.std,
                    each.norm.min,
                    each.norm.max,
                    each.mean.norm(dim=-1),
                )
                rows.append([str(site), head, each.count, *(number.item() for number in numbers)])
        names = [
            "site",
            "head",
            "count",
            "norm_mean",
            "norm_std",
            "norm_min",
            "norm_max",
            "mean_norm",
        ]
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
        return shown(
            "Statistics",
            rows=records(self.table(), "site", "head", "count", "norm_mean", "norm_std"),
        )

    def __repr__(self) -> str:
        count, texts = next(iter(self.of_site.values())).count, self.about["texts"]
        return (
            f"Statistics({count} tokens of {texts} text{'' if texts == 1 else 's'}; {self.sites})"
        )


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
        json_of(words["statistics"], name, error=DamagedHarvest, finite=False),
        name,
        error=DamagedHarvest,
    )
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, word = key.rpartition("/")
        by_site.setdefault(site, {})[word] = tensor
    sites = about.get("sites")
    if (
        not isinstance(sites, list)
        or set(map(str, sites)) != set(by_site)
        or not plain_whole(about.get("texts"))
    ):
        raise DamagedHarvest(f"{name} has other sites than it says: it was changed; make it again")
    try:
        return Statistics(
            {parse(site): _site_statistics(parse(site), by_site[site]) for site in sites}, about
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise DamagedHarvest(
            f"{name} lacks tensors of its statistics: it was changed; make it again"
        ) from error


def _site_statistics(site: AnySite, t: Mapping[str, Tensor]) -> SiteStatistics:
    count = int(t["count"])
    if t["mean"].shape != t["spread"].shape or t["norm_mean"].shape != t["mean"].shape[:-1]:
        raise ValueError("the tensors do not fit one another")
    lengths = Norms(Moments(count, t["norm_mean"], t["norm_spread"]), t["norm_min"], t["norm_max"])
    top = Strongest(t["top_values"], t["top_rows"], t["top_places"]) if "top_values" in t else None
    return SiteStatistics(
        site, Moments(count, t["mean"], t["spread"], t.get("products")), lengths, top
    )


@dataclass(eq=False)
class Summing:
    """Statistics while values come in."""

    covariance: bool
    top: int
    of_site: dict[AnySite, SiteStatistics]

    def add(
        self,
        values: Mapping[AnySite, Tensor],
        rows: Int[Tensor, " row"],
        places: Int[Tensor, "row 4"],
    ) -> None:
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
            site: _site_statistics(
                site, {name: tensor.cpu() for name, tensor in _tensors(each).items()}
            )
            for site, each in self.of_site.items()
        }
        return Statistics(found, {**about, "sites": [str(site) for site in found]})


def summing(covariance: bool, top: int) -> Summing:
    """Statistics of nothing yet."""
    whole_number(
        top, "top", least=0, meaning="how many tokens are kept for each unit,", error=BadHook
    )
    return Summing(covariance, top, {})


def _check(site: AnySite, values: Tensor, places: Tensor) -> None:
    """Refuse numbers of which a mean would say nothing."""
    if not values.dtype.is_floating_point:
        raise BadHook(
            f"{site} holds whole numbers that name something, of which a mean says nothing: leave it out"
        )
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


@checks_arguments
def statistics(
    lm: LM,
    texts: TextsLike,
    sites: SitesLike,
    *,
    pos: PosLike = None,
    covariance: bool = False,
    top: int = 0,
    context: int | None = None,
    long: Long = "error",
    unfit: Unfit = "error",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Statistics:
    """The mean, variance and norms of what is at these sites over all texts, in float64 and in one pass.

    `covariance` adds the covariance of each site's last axis, and `top` the tokens at which each number of a site (a
    neuron, or a feature) is largest, so many of them; of equal ones the earlier. Every position that is wanted counts
    once. Mind that a model's first position is often an outlier: pos=slice(1, None) leaves it out. The other words are
    those of `harvest`; statistics of a harvest, without the model, are `Harvest.statistics`.

    >>> found = statistics(lm, ["Tea with milk", "Coffee with milk"], ["z.9", "mlp_post.3"], top=2, progress=False)
    >>> found["z.9.3"].mean.shape, found["mlp_post.3"].top(7)["text"].tolist()
    (torch.Size([64]), [...])
    >>> print(ablate("z.9.3", to=found))
    ablate(z.9.3, to=means)
    """
    rules = Rules(Where(as_pos(pos)), context_of(lm, context), long, unfit)
    kinds = probed(lm, sites, "a statistic")
    if batch_tokens < 1:
        raise BadHook(f"batch_tokens={batch_tokens!r}: give 1 or more")
    cursor, total = Cursor(lm, texts, rules), summing(covariance, top)
    rows = left_out = 0
    with Progress(how_many(texts) if progress else None, progress) as shown:
        while (
            window := next_window(cursor, room=float("inf"), tokens=LOOK_AHEAD * batch_tokens)
        ) is not None:
            for batch in batches(window, batch_tokens, one_length=lm.config is None):
                _add(total, lm, window, batch, Sites(tuple(kinds)), rules.where, rows)
                shown.computed(window, batch)
            shown.reached(window.reads[-1].text)
            rows, left_out = rows + window.rows, left_out + window.left_out
    if not rows:
        raise EmptySelection(
            f"none of the {cursor.text + 1} texts has a position at pos={pos!r}: give others"
        )
    about = {
        "model": about_model(lm),
        "pos": repr(rules.where.pos),
        "context": rules.context,
        "long": long,
    }
    about |= {
        "texts": cursor.text + 1,
        "left_out": left_out + cursor.left_out,
        "stream": cursor.digest,
    }
    return total.statistics(about)


def _add(
    total: Summing,
    lm: LM,
    window: Window,
    batch: list[int],
    sites: Sites,
    where: Where,
    before: int,
) -> None:
    """Take in a batch of a window, whose first row is number `before`."""
    starts = window.starts
    reads = [window.reads[number] for number in batch]
    rows = row_numbers(reads, [before + starts[number] for number in batch])
    total.add(at_sites(lm, reads, sites, where), rows, _places(reads))


def _places(reads: list[Read]) -> torch.Tensor:
    """Text, piece, position and token id of each row."""
    return torch.tensor(
        [(r.text, r.piece, place, r.ids[place]) for r in reads for place in r.places]
    )
