"""Statistics of activations over a corpus, in float64 and in constant memory.

`activation_statistics` reads texts once and adds up each batch: the moments and norms of each site,
and on request its covariance and the tokens at which each unit is largest. Each batch is summed by
itself and merged into the total by the formulas of Chan, Golub and LeVeque (1979), which lose no
digits where a mean is large and a variance small. Of equal values the earlier token comes first, so
that the result does not depend on batches.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...arguments import as_items, check_arguments, check_integer
from ...display import count_of, describe_outcome, first_rows, render_html
from ...errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange, Unsupported
from ...files.atomic import save_tensors
from ...files.untrusted import check_file, check_mapping, is_count, parse_json, read_tensors
from ...models.lm import LM
from ...models.positions import PosLike
from ...models.provenance import about_model
from ...models.sites import AnySite, Site, Sites, SitesLike, parse_site
from .stored_values import Progress, compute_values, probe_sites
from .texts import COLUMNS, Long, OnError, TextReader, TextsLike, read_rules, token_columns

TOKEN_COLUMNS = ("text", "piece", "pos", "token_id")  # of `SiteStatistics.top`
REQUIRED = ("mean", "spread", "norm_mean", "norm_spread", "norm_min", "norm_max")


# ---- moments and norms


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` rows.

    `spread` is the sum of squared deviations from the mean. `products` is the sum of the products
    of deviations, or None.
    """

    count: int
    mean: Float[Tensor, ...]
    spread: Float[Tensor, ...]
    products: Float[Tensor, "... n n"] | None = None


def to_float64(values: Tensor) -> Float[Tensor, ...]:
    """Returns the values in float64, on the CPU if the device has no float64."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()


def compute_moments(values: Float[Tensor, "row ..."], *, covariance: bool = False) -> Moments:
    """Returns the moments of float64 rows. Products are of the last axis."""
    mean = values.mean(0)
    deviations = values - mean
    products = None
    if covariance:
        products = torch.einsum("r...i,r...j->...ij", deviations, deviations)
    return Moments(len(values), mean, (deviations * deviations).sum(0), products)


def merge_moments(first: Moments | None, second: Moments) -> Moments:
    """Returns the moments of two sets of rows together."""
    if first is None:
        return second
    count = first.count + second.count
    shift = second.mean - first.mean
    weight = first.count * second.count / count
    products = None
    if first.products is not None and second.products is not None:
        shift_products = weight * shift[..., :, None] * shift[..., None, :]
        products = first.products + second.products + shift_products
    mean = first.mean + shift * (second.count / count)
    spread = first.spread + second.spread + weight * shift * shift
    return Moments(count, mean, spread, products)


# ---- statistics of sites

# Of the largest values of each unit, the largest first: the values, rows, and `TOKEN_COLUMNS`.
TOP = ("top_values", "top_rows", "top_places")


@dataclass(frozen=True, eq=False)
class Norms:
    """The lengths of a site's vectors along its last axis: one number, or one for each head."""

    mean: Float[Tensor, ...]
    std: Float[Tensor, ...]
    min: Float[Tensor, ...]
    max: Float[Tensor, ...]


@dataclass(frozen=True, eq=False, repr=False)
class SiteStatistics:
    """The statistics of one site, in float64, over `count` tokens.

    mean        [...]       of each number; the axes are the site's axes after batch and pos
    variance    [...]       the mean of squared deviations; `std` is its square root
    covariance  [..., n, n] of the last axis, for each head where there are heads; only on request
    norm        [...]       the lengths along the last axis: `norm.mean`, `.std`, `.min`, `.max`
    """

    site: AnySite
    count: int
    tensors: Mapping[str, Tensor]  # by their names in the file

    @property
    def mean(self) -> Float[Tensor, ...]:
        return self.tensors["mean"]

    @property
    def variance(self) -> Float[Tensor, ...]:
        return self.tensors["spread"] / self.count

    @property
    def std(self) -> Float[Tensor, ...]:
        return self.variance.sqrt()

    @property
    def norm(self) -> Norms:
        std = (self.tensors["norm_spread"] / self.count).sqrt()
        low, high = self.tensors["norm_min"], self.tensors["norm_max"]
        return Norms(self.tensors["norm_mean"], std, low, high)

    @property
    def covariance(self) -> Float[Tensor, "... n n"]:
        """The covariance. Raises `NotCaptured` if it was not computed."""
        if "products" not in self.tensors:
            raise NotCaptured(
                f"no covariance of {self.site} was taken: ask for it with covariance=True"
            )
        return self.tensors["products"] / self.count

    def top(self, unit: int | tuple[int, ...], lm: LM | None = None) -> pd.DataFrame:
        """Returns the tokens at which a unit is largest, the largest first.

        A unit of a site with heads is (head, number). Columns: text, piece, pos, token_id, value;
        and token, its text, if a model is given.
        """
        if "top_values" not in self.tensors:
            raise NotCaptured(
                f"the strongest tokens of {self.site} were not kept: ask for them with top=10"
            )
        index = (slice(None), *self._unit_index(unit))
        tokens = self.tensors["top_places"][index].tolist()
        table = pd.DataFrame(tokens, columns=list(TOKEN_COLUMNS))
        if lm is not None:
            table.insert(4, "token", table["token_id"].map(lm.string))
        return table.assign(value=self.tensors["top_values"][index].tolist())

    def _unit_index(self, unit: int | tuple[int, ...]) -> tuple[int, ...]:
        meaning = "which unit it is (with heads: a head and a number),"
        check = partial(check_integer, name="unit", least=0, meaning=meaning)
        index = tuple(map(check, as_items(unit) or (unit,)))
        sizes = list(self.mean.shape)
        if len(index) != len(sizes) or any(map(operator.ge, index, sizes)):
            raise OutOfRange(
                f"unit {unit} of {self.site} was asked for, and its units are counted {sizes} "
                "from 0"
            )
        return index

    def head(self, head: int) -> SiteStatistics:
        """Returns the statistics of one head of a site that has all heads."""
        n_heads = self.mean.shape[0] if self.mean.ndim > 1 else 0
        if not isinstance(self.site, Site) or head >= n_heads:
            raise NotCaptured(
                f"head {head} of {self.site} was asked for, which has {n_heads} heads"
            )
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            tensors[name] = tensor[:, head] if name in TOP else tensor[head]
        return SiteStatistics(Site(self.site.name, self.site.layer, head), self.count, tensors)

    def __repr__(self) -> str:
        return f"SiteStatistics({self.site}, {list(self.mean.shape)}, {self.count} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Statistics of several sites: `statistics["resid_post.6"].mean`, `statistics["z.9.3"]` for a
    head.

    `activation_statistics` and `Harvest.statistics` return it. `hk.ablate(sites, to=statistics)`
    writes each site's mean. `about` has the model, the positions, the number of texts and their
    sha256.
    """

    of_site: Mapping[AnySite, SiteStatistics]
    about: Mapping[str, Any]

    @property
    def sites(self) -> Sites:
        """The sites that have statistics."""
        return Sites(tuple(self.of_site))

    def __getitem__(self, site: str | AnySite) -> SiteStatistics:
        site = parse_site(site) if isinstance(site, str) else site
        if site in self.of_site:
            return self.of_site[site]
        match site:
            case Site(name, layer, int(head)) if Site(name, layer) in self.of_site:
                return self.of_site[Site(name, layer)].head(head)
        raise NotCaptured(f"there are no statistics of {site}: there are those of {self.sites}")

    def mean_of(self, site: AnySite) -> Float[Tensor, ...]:
        """Returns the mean at a site, for `hk.ablate`."""
        return self[site].mean

    def table(self) -> pd.DataFrame:
        """Returns one row for each site, or for each head where there are heads.

        Columns: site, head (None where there is none), count, norm_mean, norm_std, norm_min,
        norm_max, and mean_norm, the length of the mean.
        """
        rows: list[dict[str, Any]] = []
        for site, statistics in self.of_site.items():
            parts: dict[int | None, SiteStatistics] = {None: statistics}
            if statistics.mean.ndim > 1:
                parts = {head: statistics.head(head) for head in range(len(statistics.mean))}
            for head, part in parts.items():
                row = {"site": str(site), "head": head, "count": part.count}
                for name in ("mean", "std", "min", "max"):
                    row[f"norm_{name}"] = getattr(part.norm, name).item()
                rows.append(row | {"mean_norm": part.mean.norm(dim=-1).item()})
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file for `load_statistics`, and returns its path."""
        tensors: dict[str, Tensor] = {}
        for site, statistics in self.of_site.items():
            tensors[f"{site}/count"] = torch.tensor(statistics.count)
            for name, tensor in statistics.tensors.items():
                tensors[f"{site}/{name}"] = tensor
        return save_tensors(tensors, path, about={"statistics": json.dumps(dict(self.about))})

    def _ipython_key_completions_(self) -> list[str]:
        return list(map(str, self.sites))

    def _repr_html_(self) -> str:
        rows = first_rows(self.table(), "site", "head", "count", "norm_mean", "norm_std")
        return render_html("Statistics", rows=rows)

    def __repr__(self) -> str:
        count, texts = next(iter(self.of_site.values())).count, self.about["texts"]
        text = f"Statistics({count} tokens of {count_of(texts, 'text')}; {self.sites})"
        first = f"statistics[{str(self.sites[0])!r}].mean"
        return describe_outcome(text, "statistics.table()", first, "statistics.save(path)")


@check_arguments
def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Returns the statistics that `Statistics.save` wrote.

    Raises `DamagedHarvest` for another file.

    >>> texts = ["Tea with milk"]
    >>> found = hk.stats.activation_statistics(lm, texts, "resid_post.6", progress=False)
    >>> load_statistics(found.save("means.safetensors"))["resid_post.6"].mean.shape
    torch.Size([576])
    """
    tensors, texts = read_tensors(check_file(path), error=DamagedHarvest)
    name = repr(Path(path).name)
    if "statistics" not in texts:
        raise DamagedHarvest(f"{name} has no statistics: give a file that Statistics.save wrote")
    value = parse_json(texts["statistics"], name, error=DamagedHarvest, finite=False)
    about = check_mapping(value, name, error=DamagedHarvest)
    tensors_of_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        site, _, tensor_name = key.rpartition("/")
        tensors_of_site.setdefault(site, {})[tensor_name] = tensor
    sites: Any = about.get("sites")
    has_sites = isinstance(sites, list) and set(map(str, sites)) == set(tensors_of_site)
    if not has_sites or not is_count(about.get("texts")):
        raise DamagedHarvest(f"{name} has other sites than it says: it was changed; make it again")
    of_site: dict[AnySite, SiteStatistics] = {}
    try:
        for site in sites:
            of_site[parse_site(site)] = _site_statistics(site, tensors_of_site[site])
    except (KeyError, ValueError, RuntimeError) as error:
        raise DamagedHarvest(
            f"{name} lacks tensors of its statistics: it was changed; make it again"
        ) from error
    return Statistics(of_site, about)


def _site_statistics(site: str, tensors: dict[str, Tensor]) -> SiteStatistics:
    """Returns the statistics that a file has of a site. Raises `KeyError` for a missing tensor."""
    count = int(tensors.pop("count"))
    shape = tensors["mean"].shape
    for name in REQUIRED:
        expected = shape[:-1] if name.startswith("norm_") else shape
        if tensors[name].shape != expected:
            raise ValueError("the tensors do not fit one another")
    return SiteStatistics(parse_site(site), count, tensors)


# ---- computing statistics


@dataclass(eq=False)
class StatisticsSum:
    """The statistics of the rows that were added so far. One pass over a corpus owns it."""

    covariance: bool
    top: int
    of_site: dict[AnySite, SiteStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        meaning = "how many tokens are kept for each unit,"
        check_integer(self.top, "top", least=0, meaning=meaning, error=BadHook)

    def add(
        self, values_of_site: Mapping[AnySite, Tensor], rows: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        """Adds some rows: the values at each site, the rows' numbers, and their token columns."""
        tokens = torch.stack([columns[name].long() for name in COLUMNS[:4]], dim=1)
        for site, values in values_of_site.items():
            _check_values(site, values, tokens)
            statistics = self._statistics_of_batch(site, values, rows, tokens)
            if site in self.of_site:
                statistics = self._merge(self.of_site[site], statistics)
            self.of_site[site] = statistics

    def _statistics_of_batch(
        self, site: AnySite, values: Tensor, rows: Tensor, tokens: Tensor
    ) -> SiteStatistics:
        numbers = to_float64(values)
        lengths = numbers.norm(dim=-1)
        tensors = {
            **_as_tensors(compute_moments(numbers, covariance=self.covariance)),
            **_as_tensors(compute_moments(lengths), "norm_"),
            "norm_min": lengths.amin(0),
            "norm_max": lengths.amax(0),
        }
        if self.top:
            values, axes = values.to(numbers.device), [1] * (values.ndim - 1)
            rows, tokens = rows.to(values.device), tokens.to(values.device)
            rows_of_values = rows.reshape(-1, *axes).expand_as(values)
            tokens_of_values = tokens.reshape(-1, *axes, 4).expand(*values.shape, 4)
            tensors |= largest_values(values, rows_of_values, tokens_of_values, self.top)
        return SiteStatistics(site, len(values), tensors)

    def _merge(self, first: SiteStatistics, second: SiteStatistics) -> SiteStatistics:
        before, after = first.tensors, second.tensors
        moments = merge_moments(_moments(first), _moments(second))
        lengths = merge_moments(_moments(first, "norm_"), _moments(second, "norm_"))
        tensors = {
            **_as_tensors(moments),
            **_as_tensors(lengths, "norm_"),
            "norm_min": torch.minimum(before["norm_min"], after["norm_min"]),
            "norm_max": torch.maximum(before["norm_max"], after["norm_max"]),
        }
        if self.top:
            values, rows, tokens = (torch.cat([before[name], after[name]]) for name in TOP)
            tensors |= largest_values(values, rows, tokens, self.top)
        return SiteStatistics(first.site, moments.count, tensors)

    def statistics(self, about: Mapping[str, Any]) -> Statistics:
        """Returns the statistics on the CPU."""
        of_site: dict[AnySite, SiteStatistics] = {}
        for site, statistics in self.of_site.items():
            tensors = {name: tensor.cpu() for name, tensor in statistics.tensors.items()}
            of_site[site] = SiteStatistics(site, statistics.count, tensors)
        return Statistics(of_site, {**about, "sites": list(map(str, of_site))})


def _as_tensors(moments: Moments, prefix: str = "") -> dict[str, Tensor]:
    tensors = {f"{prefix}mean": moments.mean, f"{prefix}spread": moments.spread}
    if moments.products is not None:
        tensors[f"{prefix}products"] = moments.products
    return tensors


def _moments(statistics: SiteStatistics, prefix: str = "") -> Moments:
    tensors = statistics.tensors
    mean, spread = tensors[f"{prefix}mean"], tensors[f"{prefix}spread"]
    return Moments(statistics.count, mean, spread, tensors.get(f"{prefix}products"))


def largest_values(
    values: Float[Tensor, "row ..."],
    rows: Int[Tensor, "row ..."],
    tokens: Int[Tensor, "row ... 4"],
    top: int,
) -> dict[str, Tensor]:
    """Returns the `top` largest values of each unit with their rows and tokens, the largest first.

    Of equal values those of the earliest rows are taken, the earliest first.
    """
    top = min(top, len(values))
    flat, numbers = values.flatten(1), rows.flatten(1)
    least = flat.topk(top, dim=0).values[-1]
    is_tied = flat == least
    n_tied = top - (flat > least).sum(0)  # how many of the tied values are taken
    earliest = numbers.masked_fill(~is_tied, torch.iinfo(torch.int64).max)
    cutoff = earliest.topk(top, dim=0, largest=False).values.gather(0, n_tied[None] - 1)
    is_taken = (flat > least) | (earliest <= cutoff) & is_tied
    index = is_taken.T.nonzero()[:, 1].reshape(flat.shape[1], top).T
    index = index.gather(0, numbers.gather(0, index).argsort(dim=0))
    by_value = flat.gather(0, index).argsort(dim=0, descending=True, stable=True)
    index = index.gather(0, by_value).reshape(top, *values.shape[1:])
    token_index = index[..., None].expand(*index.shape, 4)
    largest = (values.gather(0, index), rows.gather(0, index), tokens.gather(0, token_index))
    return dict(zip(TOP, largest, strict=True))


def _check_values(site: AnySite, values: Tensor, tokens: Tensor) -> None:
    if not values.dtype.is_floating_point:
        raise BadHook(f"{site} holds ids or indices, whose mean has no meaning: leave it out")
    if values.ndim not in (2, 3):
        raise BadHook(
            f"{site} has the axes {list(values.shape[1:])} at each token, and statistics are of "
            "vectors, one or one a head: leave it out"
        )
    is_finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(is_finite.all()):
        text, _, pos, _ = tokens[int((~is_finite).nonzero()[0])].tolist()
        raise Unsupported(
            f"{site} is not a finite number at position {pos} of text {text}, so its mean would "
            "not be finite: leave that text out, or run the model in float32"
        )


@check_arguments
def activation_statistics(
    lm: LM,
    texts: TextsLike,
    sites: SitesLike,
    *,
    pos: PosLike = None,
    covariance: bool = False,
    top: int = 0,
    context: int | None = None,
    long: Long = "error",
    on_error: OnError = "error",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Statistics:
    """Returns the mean, variance and norms of these sites over all texts, in float64 and in one
    pass.

    `covariance` adds the covariance of each site's last axis. `top` adds that many tokens at which
    each number of a site (a neuron, or a feature) is largest; of equal values the earlier. `pos`
    selects the positions that count. A model's first position is often an outlier: pos=slice(1,
    None) leaves it out. The other arguments are those of `harvest`; for statistics of a harvest,
    without the model, use `Harvest.statistics`.

    >>> texts, sites = ["Tea with milk", "Coffee with milk"], ["z.9", "mlp_post.3"]
    >>> found = activation_statistics(lm, texts, sites, top=2, progress=False)
    >>> found["z.9.3"].mean.shape, found["mlp_post.3"].top(7)["text"].tolist()
    (torch.Size([64]), [...])
    >>> print(ablate("z.9.3", to=found))
    ablate(z.9.3, to=means)
    """
    rules = read_rules(lm, pos, context, long, on_error, batch_tokens)
    expanded = Sites(tuple(probe_sites(lm, sites, "a statistic")))
    reader, total = TextReader(lm, texts, rules), StatisticsSum(covariance, top)
    rows = left_out = 0
    with Progress(reader, progress) as bar:
        while window := reader.read_window():
            for batch in window.batches(rules):
                values = compute_values(lm, batch.sequences, expanded, rules.where)
                total.add(values, rows + batch.rows, token_columns(batch.sequences))
                bar.add(batch)
            bar.advance_to(window.sequences[-1].text)
            rows += window.rows
            left_out += window.left_out
    if not rows:
        raise EmptySelection(
            f"none of the {reader.text + 1} texts has a position at pos={pos!r}: give others"
        )
    return total.statistics(
        {
            "model": about_model(lm),
            "pos": repr(rules.where.pos),
            "context": rules.context,
            "long": long,
            "texts": reader.text + 1,
            "left_out": left_out + reader.left_out,
            "stream": reader.digest,
        }
    )
