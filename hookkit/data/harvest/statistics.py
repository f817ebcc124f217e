"""Statistics of activations over a corpus, in float64 and in constant memory.

`statistics` reads texts once and adds up each batch: the moments and norms of each site, and on
request its covariance and the tokens at which each unit is largest. Each batch is summed by itself
and merged into the total by the formulas of Chan, Golub and LeVeque (1979), which lose no digits
where a mean is large and a variance small. Of equal values the earlier token comes first, so that
the result does not depend on batches.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...arguments import as_integer, as_items, check_arguments, check_integer
from ...display import count_of, first_rows, render_html
from ...errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange, Unsupported
from ...files.tensors import save_tensors
from ...files.untrusted import check_file, check_mapping, is_count, parse_json, read_tensors
from ...models.lm import LM
from ...models.positions import PosLike, Where, read_position
from ...models.provenance import about_model
from ...models.sites import AnySite, Site, Sites, SitesLike, parse_site
from .stored_values import Progress, compute_values, probe_sites, row_numbers
from .texts import (
    LOOK_AHEAD,
    Long,
    Rules,
    TextReader,
    TextsLike,
    TokenSequence,
    Unfit,
    batches,
    count_texts,
    read_window,
    resolve_context,
)

TOKEN_COLUMNS = ("text", "piece", "pos", "token_id")
LARGEST_INT = torch.iinfo(torch.int64).max


# ---- moments and norms


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` rows.

    `spread` is the sum of squared deviations from the mean. `products` is the sum of the products
    of deviations, or None.
    """

    count: int
    mean: Float[Tensor, "..."]
    spread: Float[Tensor, "..."]
    products: Float[Tensor, "... n n"] | None = None

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """The mean of squared deviations (divided by the count)."""
        return self.spread / self.count

    def head(self, head: int) -> "Moments":
        """Returns the moments of one head, where the first axis is heads."""
        products = None if self.products is None else self.products[head]
        return Moments(self.count, self.mean[head], self.spread[head], products)


def to_float64(values: Tensor) -> Float[Tensor, "..."]:
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


@dataclass(frozen=True, eq=False)
class Norms:
    """The lengths of a site's vectors along its last axis: one number, or one for each head."""

    moments: Moments
    min: Float[Tensor, "..."]
    max: Float[Tensor, "..."]

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """The mean of the lengths."""
        return self.moments.mean

    @property
    def std(self) -> Float[Tensor, "..."]:
        """The standard deviation of the lengths."""
        return self.moments.variance.sqrt()

    def head(self, head: int) -> "Norms":
        """Returns the norms of one head."""
        return Norms(self.moments.head(head), self.min[head], self.max[head])


def compute_norms(values: Float[Tensor, "row ..."]) -> Norms:
    """Returns the norms of float64 rows."""
    lengths = values.norm(dim=-1)
    return Norms(compute_moments(lengths), lengths.amin(0), lengths.amax(0))


def merge_norms(first: Norms | None, second: Norms) -> Norms:
    """Returns the norms of two sets of rows together."""
    if first is None:
        return second
    low, high = torch.minimum(first.min, second.min), torch.maximum(first.max, second.max)
    return Norms(merge_moments(first.moments, second.moments), low, high)


# ---- largest values


@dataclass(frozen=True, eq=False)
class Strongest:
    """The largest values of each unit, the largest first, with their row numbers and tokens.

    The last axis of `tokens` has text, piece, position and token id.
    """

    values: Float[Tensor, "top ..."]
    rows: Int[Tensor, "top ..."]
    tokens: Int[Tensor, "top ... 4"]

    def head(self, head: int) -> "Strongest":
        """Returns the values of one head, where the axis after `top` is heads."""
        return Strongest(self.values[:, head], self.rows[:, head], self.tokens[:, head])


def find_strongest(
    values: Float[Tensor, "row ..."],
    rows: Int[Tensor, " row"],
    tokens: Int[Tensor, "row 4"],
    top: int,
) -> Strongest:
    """Returns the `top` largest values of some rows, or all if there are fewer rows."""
    flat = values.flatten(1)
    numbers = rows.to(flat.device)[:, None].expand_as(flat)
    index = _largest(flat, numbers, min(top, len(flat)))
    shape = (len(index), *values.shape[1:])
    return Strongest(
        flat.gather(0, index).reshape(shape),
        numbers.gather(0, index).reshape(shape),
        tokens.to(flat.device)[index].reshape(*shape, len(TOKEN_COLUMNS)),
    )


def merge_strongest(first: Strongest, second: Strongest, top: int) -> Strongest:
    """Returns the `top` largest values of two sets of rows together."""
    values = torch.cat([first.values, second.values])
    rows = torch.cat([first.rows, second.rows])
    tokens = torch.cat([first.tokens, second.tokens]).flatten(1, -2)
    index = _largest(values.flatten(1), rows.flatten(1), min(top, len(values)))
    shape = (len(index), *values.shape[1:])
    columns = len(TOKEN_COLUMNS)
    token_index = index[..., None].expand(-1, -1, columns)
    return Strongest(
        values.flatten(1).gather(0, index).reshape(shape),
        rows.flatten(1).gather(0, index).reshape(shape),
        tokens.gather(0, token_index).reshape(*shape, columns),
    )


def _largest(
    values: Float[Tensor, "row unit"], numbers: Int[Tensor, "row unit"], top: int
) -> Int[Tensor, "top unit"]:
    """Returns the indices of each column's largest values, in descending order of values.

    Of equal values those with the smallest numbers are taken, in ascending order of numbers.
    """
    least = values.topk(top, dim=0).values[-1]
    is_tied = values == least
    n_tied = top - (values > least).sum(0)  # how many of the tied values are taken
    earliest = numbers.masked_fill(~is_tied, LARGEST_INT)
    cutoff = earliest.topk(top, dim=0, largest=False).values.gather(0, n_tied[None] - 1)
    is_taken = (values > least) | (earliest <= cutoff) & is_tied
    index = is_taken.T.nonzero()[:, 1].reshape(values.shape[1], top).T
    by_number = numbers.gather(0, index).argsort(dim=0)
    index = index.gather(0, by_number)
    by_value = values.gather(0, index).argsort(dim=0, descending=True, stable=True)
    return index.gather(0, by_value)


# ---- statistics of sites


@dataclass(frozen=True, eq=False, repr=False)
class SiteStatistics:
    """The statistics of one site, in float64, over `count` tokens.

    mean        [...]       of each number; the axes are the site's axes after batch and pos
    variance    [...]       the mean of squared deviations; `std` is its square root
    covariance  [..., n, n] of the last axis, for each head where there are heads; only on request
    norm        [...]       the lengths along the last axis: `norm.mean`, `.std`, `.min`, `.max`
    """

    site: AnySite
    moments: Moments
    norm: Norms
    strongest: Strongest | None = None

    @property
    def count(self) -> int:
        """The number of tokens."""
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
        """The covariance. Raises `NotCaptured` if it was not computed."""
        if self.moments.products is None:
            raise NotCaptured(
                f"no covariance of {self.site} was taken: ask for it with covariance=True"
            )
        return self.moments.products / self.count

    def top(self, unit: int | tuple[int, ...], lm: LM | None = None) -> pd.DataFrame:
        """Returns the tokens at which a unit is largest, the largest first.

        A unit of a site with heads is (head, number). Columns: text, piece, pos, token_id, value;
        and token, its text, if a model is given.
        """
        if self.strongest is None:
            raise NotCaptured(
                f"the strongest tokens of {self.site} were not kept: ask for them with top=10"
            )
        index = (slice(None), *self._unit_index(unit))
        table = pd.DataFrame(self.strongest.tokens[index].tolist(), columns=list(TOKEN_COLUMNS))
        if lm is not None:
            table.insert(4, "token", [lm.string(token_id) for token_id in table["token_id"]])
        return table.assign(value=self.strongest.values[index].tolist())

    def _unit_index(self, unit: int | tuple[int, ...]) -> tuple[int, ...]:
        meaning = "the number of a unit; with heads, (head, number);"
        index: list[int] = []
        number = as_integer(unit)
        if number is not None:
            index.append(number)
        else:
            for item in as_items(unit) or (unit,):
                index.append(check_integer(item, "unit", least=0, meaning=meaning))
        sizes = list(self.mean.shape)
        is_unit = len(index) == len(sizes)
        if is_unit:
            is_unit = all(0 <= number < size for number, size in zip(index, sizes, strict=True))
        if not is_unit:
            raise OutOfRange(
                f"unit {unit} of {self.site} was asked for, and its units are counted {sizes} "
                "from 0"
            )
        return tuple(index)

    def head(self, head: int) -> "SiteStatistics":
        """Returns the statistics of one head of a site that has all heads."""
        heads = self.mean.shape[0] if self.mean.ndim > 1 else 0
        if not isinstance(self.site, Site) or self.site.head is not None or head >= heads:
            raise NotCaptured(f"head {head} of {self.site} was asked for, which has {heads} heads")
        strongest = None if self.strongest is None else self.strongest.head(head)
        site = Site(self.site.name, self.site.layer, head)
        return SiteStatistics(site, self.moments.head(head), self.norm.head(head), strongest)

    def __repr__(self) -> str:
        return f"SiteStatistics({self.site}, {list(self.mean.shape)}, {self.count} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Statistics of several sites: `statistics["resid_post.6"].mean`, `statistics["z.9.3"]` for a
    head.

    Made by `statistics` and by `Harvest.statistics`. `hk.ablate(sites, to=statistics)` writes each
    site's mean. `about` has the model, the positions, the number of texts and their sha256.
    """

    of_site: Mapping[AnySite, SiteStatistics]
    about: Mapping[str, Any]

    @property
    def sites(self) -> Sites:
        """The sites that have statistics."""
        return Sites(tuple(self.of_site))

    def __getitem__(self, site: str | AnySite) -> SiteStatistics:
        if isinstance(site, str):
            site = parse_site(site)
        if site in self.of_site:
            return self.of_site[site]
        if isinstance(site, Site) and site.head is not None:
            all_heads = self.of_site.get(Site(site.name, site.layer))
            if all_heads is not None:
                return all_heads.head(site.head)
        raise NotCaptured(f"there are no statistics of {site}: there are those of {self.sites}")

    def mean_of(self, site: AnySite) -> Float[Tensor, "..."]:
        """Returns the mean at a site, for `hk.ablate`."""
        return self[site].mean

    def table(self) -> pd.DataFrame:
        """Returns one row for each site, or for each head where there are heads.

        Columns: site, head (None where there is none), count, norm_mean, norm_std, norm_min,
        norm_max, and mean_norm, the length of the mean.
        """
        rows: list[dict[str, Any]] = []
        for site, statistics in self.of_site.items():
            if statistics.mean.ndim == 1:
                rows.append(_table_row(site, None, statistics))
                continue
            for head in range(statistics.mean.shape[0]):
                rows.append(_table_row(site, head, statistics.head(head)))
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file for `load_statistics`, and returns its path."""
        tensors: dict[str, Tensor] = {}
        for site, statistics in self.of_site.items():
            for name, tensor in _to_tensors(statistics).items():
                tensors[f"{site}/{name}"] = tensor
        return save_tensors(tensors, path, about={"statistics": json.dumps(dict(self.about))})

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        rows = first_rows(self.table(), "site", "head", "count", "norm_mean", "norm_std")
        return render_html("Statistics", rows=rows)

    def __repr__(self) -> str:
        count, texts = next(iter(self.of_site.values())).count, self.about["texts"]
        return f"Statistics({count} tokens of {count_of(texts, 'text')}; {self.sites})"


def _table_row(site: AnySite, head: int | None, statistics: SiteStatistics) -> dict[str, Any]:
    norm = statistics.norm
    return {
        "site": str(site),
        "head": head,
        "count": statistics.count,
        "norm_mean": norm.mean.item(),
        "norm_std": norm.std.item(),
        "norm_min": norm.min.item(),
        "norm_max": norm.max.item(),
        "mean_norm": statistics.mean.norm(dim=-1).item(),
    }


# ---- files of statistics


def _to_tensors(statistics: SiteStatistics) -> dict[str, Tensor]:
    lengths = statistics.norm.moments
    tensors = {
        "count": torch.tensor(statistics.count),
        "mean": statistics.mean,
        "spread": statistics.moments.spread,
        "norm_mean": lengths.mean,
        "norm_spread": lengths.spread,
        "norm_min": statistics.norm.min,
        "norm_max": statistics.norm.max,
    }
    if statistics.moments.products is not None:
        tensors["products"] = statistics.moments.products
    if statistics.strongest is not None:
        tensors["top_values"] = statistics.strongest.values
        tensors["top_rows"] = statistics.strongest.rows
        tensors["top_places"] = statistics.strongest.tokens
    return tensors


def _from_tensors(site: AnySite, tensors: Mapping[str, Tensor]) -> SiteStatistics:
    count = int(tensors["count"])
    mean, spread, norm_mean = tensors["mean"], tensors["spread"], tensors["norm_mean"]
    if mean.shape != spread.shape or norm_mean.shape != mean.shape[:-1]:
        raise ValueError("the tensors do not fit one another")
    lengths = Moments(count, norm_mean, tensors["norm_spread"])
    norm = Norms(lengths, tensors["norm_min"], tensors["norm_max"])
    strongest = None
    if "top_values" in tensors:
        strongest = Strongest(tensors["top_values"], tensors["top_rows"], tensors["top_places"])
    site_moments = Moments(count, mean, spread, tensors.get("products"))
    return SiteStatistics(site, site_moments, norm, strongest)


@check_arguments
def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Returns the statistics that `Statistics.save` wrote.

    Raises `DamagedHarvest` for another file.

    >>> found = hk.statistics(lm, ["Tea with milk"], "resid_post.6", progress=False)
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
            of_site[parse_site(site)] = _from_tensors(parse_site(site), tensors_of_site[site])
        return Statistics(of_site, about)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DamagedHarvest(
            f"{name} lacks tensors of its statistics: it was changed; make it again"
        ) from error


# ---- computing statistics


@dataclass(eq=False)
class StatisticsSum:
    """The statistics of the rows that were added so far. `statistics` or a harvest owns it."""

    covariance: bool
    top: int
    of_site: dict[AnySite, SiteStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        meaning = "how many tokens are kept for each unit,"
        check_integer(self.top, "top", least=0, meaning=meaning, error=BadHook)

    def add(
        self,
        values_of_site: Mapping[AnySite, Tensor],
        rows: Int[Tensor, " row"],
        tokens: Int[Tensor, "row 4"],
    ) -> None:
        """Adds some rows: the values at each site, the rows' numbers, and the token of each."""
        for site, values in values_of_site.items():
            _check_values(site, values, tokens)
            batch = self._statistics_of_batch(site, values, rows, tokens)
            before = self.of_site.get(site)
            self.of_site[site] = batch if before is None else self._merge(before, batch)

    def _statistics_of_batch(
        self, site: AnySite, values: Tensor, rows: Tensor, tokens: Tensor
    ) -> SiteStatistics:
        numbers = to_float64(values)
        strongest = None
        if self.top:
            strongest = find_strongest(values.to(numbers.device), rows, tokens, self.top)
        batch_moments = compute_moments(numbers, covariance=self.covariance)
        return SiteStatistics(site, batch_moments, compute_norms(numbers), strongest)

    def _merge(self, first: SiteStatistics, second: SiteStatistics) -> SiteStatistics:
        strongest = None
        if first.strongest is not None and second.strongest is not None:
            strongest = merge_strongest(first.strongest, second.strongest, self.top)
        return SiteStatistics(
            first.site,
            merge_moments(first.moments, second.moments),
            merge_norms(first.norm, second.norm),
            strongest,
        )

    def statistics(self, about: Mapping[str, Any]) -> Statistics:
        """Returns the statistics on the CPU."""
        of_site: dict[AnySite, SiteStatistics] = {}
        for site, statistics in self.of_site.items():
            tensors = {name: tensor.cpu() for name, tensor in _to_tensors(statistics).items()}
            of_site[site] = _from_tensors(site, tensors)
        return Statistics(of_site, {**about, "sites": [str(site) for site in of_site]})


def _check_values(site: AnySite, values: Tensor, tokens: Tensor) -> None:
    """Raises an error for values that have no useful mean."""
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
    """Returns the mean, variance and norms of these sites over all texts, in float64 and in one
    pass.

    `covariance` adds the covariance of each site's last axis. `top` adds that many tokens at which
    each number of a site (a neuron, or a feature) is largest; of equal values the earlier. `pos`
    selects the positions that count. A model's first position is often an outlier: pos=slice(1,
    None) leaves it out. The other arguments are those of `harvest`; for statistics of a harvest,
    without the model, use `Harvest.statistics`.

    >>> texts, sites = ["Tea with milk", "Coffee with milk"], ["z.9", "mlp_post.3"]
    >>> found = statistics(lm, texts, sites, top=2, progress=False)
    >>> found["z.9.3"].mean.shape, found["mlp_post.3"].top(7)["text"].tolist()
    (torch.Size([64]), [...])
    >>> print(ablate("z.9.3", to=found))
    ablate(z.9.3, to=means)
    """
    rules = Rules(Where(read_position(pos)), resolve_context(lm, context), long, unfit)
    expanded = Sites(tuple(probe_sites(lm, sites, "a statistic")))
    if batch_tokens < 1:
        raise BadHook(f"batch_tokens={batch_tokens!r}: give 1 or more")
    reader, total = TextReader(lm, texts, rules), StatisticsSum(covariance, top)
    max_tokens = LOOK_AHEAD * batch_tokens
    rows = left_out = 0
    with Progress(count_texts(texts) if progress else None, progress) as bar:
        while window := read_window(reader, max_rows=float("inf"), max_tokens=max_tokens):
            starts = window.starts
            for batch in batches(window, batch_tokens, one_length=lm.config is None):
                sequences = [window.sequences[index] for index in batch]
                numbers = row_numbers(sequences, [rows + starts[index] for index in batch])
                values = compute_values(lm, sequences, expanded, rules.where)
                total.add(values, numbers, _tokens_of_rows(sequences))
                bar.add(window, batch)
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


def _tokens_of_rows(sequences: list[TokenSequence]) -> Int[Tensor, "row 4"]:
    """Returns the text, piece, position and token id of each row."""
    rows: list[tuple[int, ...]] = []
    for sequence in sequences:
        for position in sequence.positions:
            token_id = sequence.ids[position]
            rows.append((sequence.text, sequence.piece, position, token_id))
    return torch.tensor(rows)
