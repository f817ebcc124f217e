"""hk.attribution: what activation patching would give, estimated for all places at once.

    estimate = hk.attribution(lm, clean, corrupted, "z", metric)
    truth = hk.patching(lm, clean, corrupted, "z", metric)
    hk.agreement(estimate, truth)

Patching puts another prompt's value into a place and runs the model once for each place. To first order the metric then
moves by (that value - the value there) · (the metric's gradient there), and one backward has the gradient everywhere.

hk.agreement: how far an estimate of patching tells what patching tells.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, Unsupported, did_you_mean
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, in_order
from ..models.lm import LM
from ..models.positions import PositionRange, Where, as_count
from ..models.prompts import Prompts
from ..models.sites import HEADED, AnySite, Site
from ..sweeps.cells import as_hooks
from ..sweeps.grids import Places, Positions, check_pairs, grid_of, positions_of
from ..tables.metrics import MetricLike
from .backward import OWN, Question, derived, one_of, question
from .interpolation import EMBED, Points, along, average, check_end, parts
from .qk import check_fixed, softmaxed

TOGETHER = 16  # prompts of one backward: the graph of each is kept until then


@checks_arguments
def attribution(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    sites: str | Sequence[str],
    metric: MetricLike,
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    pos: Positions = None,
    by: Literal["neuron"] | None = None,
    method: Literal["gradient", "integrated", "qk_fix"] = "gradient",
    steps: int | None = None,
    points: Points | None = None,
    under: Hook | Sequence[Hook] = (),
) -> pd.DataFrame:
    """What `patching` with the same arguments would give, to first order: (the other prompt's value - the value there)
    times the metric's gradient there, summed over the cell (attribution patching: Nanda 2023; Kramár et al. 2024).

    method   "gradient": the gradient on the prompts patched into, two forwards and a backward in all. "integrated":
             its mean over runs with embeddings between the two prompts' (Hanna et al. 2024), which is nearer where the
             metric bends. "qk_fix": of queries and keys, the gradient at the pattern times what the pattern would be
             with the other prompt's (AtP*: Kramár et al. 2024, 3.1.1), which is right where a softmax is saturated;
             the keys of a cell are put in together
    steps    of "integrated": how many runs, 5 if left out
    points   of "integrated": where on the way. "start" (what None means), the paper's own points: `steps` equal parts,
             each at its start, the first of which is the prompt patched into; "middle", their middles, which are nearer
             to the integral
    by       "neuron": each number of a site without heads for itself (column unit), at all positions at once or at
             each of `pos`; left out, the cells of `patching`
    under    hooks that act in every run

    Columns are those of `patching`: the cells', row, and the metric's own with `_before`, `_delta` (the estimate),
    `_target`, `_effect`; the value is `_before` plus `_delta`. Where the gradient vanishes and the effect does not (a
    saturated pattern), or the value put in is far away (early in the stream), the estimate is off: `agreement` says how
    far. Of AtP*'s two corrections "qk_fix" is the one of queries and keys. The other, GradDrop (effects that cancel
    between a direct and an indirect path), is not made: it takes a backward for each layer.

    >>> table = attribution(lm, clean, corrupted, "attn_out", logit_diff(" Mary", " John"), layers=[9], pos=[-1])
    >>> list(table.columns)[3:]
    ['logit_diff', 'logit_diff_before', 'logit_diff_delta', 'logit_diff_target', 'logit_diff_effect']
    """
    one_of("direction", direction, "denoise", "noise")
    one_of("method", method, "gradient", "integrated", "qk_fix")
    if method != "integrated" and (steps is not None or points is not None):
        raise BadHook(
            f"steps and points are of method='integrated', and have no effect with {method!r}: leave them out"
        )
    steps, points = 5 if steps is None else steps, points or "start"
    parts(steps, points)  # raises
    names = [sites] if isinstance(sites, str) else list(sites)
    to, of = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    lengths = check_pairs(lm, of, to)
    if by is not None:
        _check_neurons(by, names)
    if method == "qk_fix":
        check_fixed(names)
    summed = by is not None and pos is None
    places = None if summed else positions_of(lengths, names, pos)
    grid, at_point = grid_of(lm, names, layers, heads, places)
    wanted = [Site(name, layer) for name in names for layer in grid.get("layer", [None])]
    wanted = [site for site in wanted if lm.layout.find(site.name, site.layer)]
    pair = Pair(question(lm, to, metric), question(lm, of, metric), tuple(as_hooks(under)))
    masks = masks_of(pair.to, places)
    found = (
        pair.fixed(wanted, masks)
        if method == "qk_fix"
        else pair.found(wanted, steps * (method == "integrated"), points)
    )
    sums = found.products
    if method != "qk_fix":
        sums = {site: _summed(each, masks, by is not None) for site, each in sums.items()}
    table = _table(
        pair.to.metric.name, grid, at_point, list(places or [None]), sums, found, by is not None
    )
    table.attrs |= {"method": method, "direction": direction} | (
        {"steps": steps, "points": points} if method == "integrated" else {}
    )
    return table


def _check_neurons(by: str, names: Sequence[str]) -> None:
    one_of("by", by, "neuron")
    headed = [name for name in names if name in HEADED]
    if headed:
        raise BadHook(
            f"by='neuron' takes sites without heads, and {headed[0]} has them: leave by= out"
        )


@dataclass(frozen=True, eq=False)
class SiteScores:
    """For each prompt the metric without and with all of the other prompt, and at each site the estimate of every
    number [row, pos, ...], or of each place [place, row, head]."""

    before: Float[Tensor, " row"]
    target: Float[Tensor, " row"]
    products: Mapping[AnySite, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """The prompts that are patched into, and those patched from, with hooks that act in both."""

    to: Question
    of: Question
    under: tuple[Hook, ...]

    def __post_init__(self) -> None:
        if self.to.reads_on:
            raise Unsupported(
                "loss reads a continuation, and attribution is of prompts in pairs: take hk.logprob of its first token"
            )

    def batches(self, together: int) -> list[range]:
        """The prompts that run together: all of them where hooks may name rows."""
        size = len(self.to) if self.under else together
        return [
            range(start, min(start + size, len(self.to))) for start in range(0, len(self.to), size)
        ]

    def found(self, sites: Sequence[Site], steps: int, points: Points) -> SiteScores:
        """The estimate at these sites; with `steps`, integrated over so many."""
        found = [self._of(rows, sites, steps, points) for rows in self.batches(TOGETHER)]
        products: dict[AnySite, Tensor] = {
            site: _joined([each.products[site] for each in found]) for site in sites
        }
        return SiteScores(
            torch.cat([each.before for each in found]),
            torch.cat([each.target for each in found]),
            products,
        )

    def fixed(self, sites: Sequence[Site], masks: Tensor) -> SiteScores:
        """The estimate for queries and keys, of each place [place, row, head]."""
        found = [
            softmaxed(self.to, self.of, rows, sites, self.under, masks)
            for rows in self.batches(TOGETHER)
        ]
        before, target, sums = zip(*found, strict=True)
        joined: dict[AnySite, Tensor] = {
            site: torch.cat([each[site] for each in sums], 1) for site in sites
        }
        return SiteScores(torch.cat(before), torch.cat(target), joined)

    def _of(self, rows: range, sites: Sequence[Site], steps: int, points: Points) -> SiteScores:
        read = [*sites, EMBED] if steps and EMBED not in sites else sites
        other = self.of.run(rows, *self.under, capture(read, name=OWN))
        target = self.of.asked_of(other, rows)
        source: dict[AnySite, Captured] = {site: other.captured(site, OWN) for site in read}
        if not steps:
            here = derived(self.to, rows, sites, self.under)
            before, values, gradient = here.metric, here.values, here.gradient
        else:
            run = self.to.run(rows, *self.under, capture(read, name=OWN))
            before, values = (
                self.to.asked_of(run, rows),
                {site: run.captured(site, OWN) for site in read},
            )
            start, end = values[EMBED].values, source[EMBED].values
            check_end(self.to, rows, self.under, end, target)
            gradient = average(along(self.to, rows, sites, self.under, start, end, steps, points))
        return SiteScores(
            before,
            target,
            {site: _product(source[site], values[site], gradient[site]) for site in sites},
        )


def _product(source: Captured, here: Captured, gradient: Tensor) -> Tensor:
    """[row, pos, ...] (at scores and pattern [row, query, head, key]), on the CPU."""
    by = source.by_place - here.by_place.detach()
    return (by * in_order(here.site, gradient)).to(device="cpu", dtype=torch.float64)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches of several widths as one, filled up with zeros at the end of each row."""
    widest = [max(part.shape[axis] for part in parts) for axis in range(parts[0].ndim)]
    made = parts[0].new_zeros(sum(len(part) for part in parts), *widest[1:])
    start = 0
    for part in parts:
        made[(slice(start, start + len(part)), *[slice(size) for size in part.shape[1:]])] = part
        start += len(part)
    return made


def masks_of(asked: Question, places: Places | None) -> Float[Tensor, "place row pos"]:
    """Which positions of each prompt each of the places means, as ones and zeros."""
    lengths = [len(row) for row in asked.reading.rows]
    named = places or {None: [(None, None)]}
    masks = torch.zeros(len(named), len(lengths), max(lengths), dtype=torch.float64)
    for number, (name, wheres) in enumerate(named.items()):
        for pos, rows in wheres:
            for row, wish in enumerate(
                asked.reading.full.wishes(Where(pos, as_count(rows, "row")))
            ):
                if wish is not None:
                    masks[number, row, _within(wish, lengths[row], row, name)] = 1
    return masks


def _within(wish: PositionRange, length: int, row: int, name: Any) -> list[int]:
    """The positions of a wish; those of an open slice end with the prompt."""
    if isinstance(wish, range):
        return list(range(wish.start, min(wish.stop, length), wish.step))
    if wish[-1] >= length:
        raise OutOfRange(
            f"position {wish[-1]} of row {row} was asked for (pos={name!r}), and it has {length} tokens, 0 to "
            f"{length - 1}"
        )
    return list(wish)


def _summed(product: Tensor, masks: Tensor, neurons: bool) -> Float[Tensor, "place row ..."]:
    """The estimates of each place: [place, row], with a last axis for heads, or for neurons."""
    product = product if neurons or product.ndim < 3 else product.sum(-1)
    return torch.einsum("nrp,rp...->nr...", masks, product)


def _table(
    name: str,
    grid: Mapping[str, list[Any]],
    at_point: Any,
    places: list[Any],
    sums: Mapping[AnySite, Tensor],
    found: SiteScores,
    neurons: bool,
) -> pd.DataFrame:
    """The table of `patching`: the cells in its order, a row for each prompt."""
    before, way = (
        found.before.double().numpy(force=True),
        (found.target - found.before).double().numpy(force=True),
    )
    numbers = {
        site: each.movedim(1, -1).numpy() for site, each in sums.items()
    }  # [place, head or neuron, row]
    index, count = {place: number for number, place in enumerate(places)}, len(before)
    cells, deltas = [], []
    for point in itertools.product(*grid.values()):
        cell = dict(zip(grid, point, strict=True))
        chosen = at_point(cell)
        if chosen is None:
            continue
        site: Site = chosen[0]
        delta = numbers[Site(site.name, site.layer)][index[cell.get("pos")]]
        cells.append(point)
        deltas.append((delta if site.head is None else delta[site.head]).ravel())
    widths = [len(delta) for delta in deltas]
    each = zip(*cells, strict=True) if grid else []
    at = {name: _spread(values, widths) for name, values in zip(grid, each, strict=True)}
    units = [np.repeat(np.arange(width // count), count) for width in widths] if neurons else []
    by = np.concatenate(deltas)
    rows = np.tile(np.arange(count), len(by) // count)
    effect = np.divide(by, way[rows], out=np.full(len(by), np.nan), where=way[rows] != 0)
    values = {name: before[rows] + by, f"{name}_before": before[rows], f"{name}_delta": by}
    values |= {f"{name}_target": (before + way)[rows], f"{name}_effect": effect}
    return pd.DataFrame(
        {**at, **({"unit": np.concatenate(units)} if neurons else {}), "row": rows, **values}
    )


def _spread(values: Sequence[Any], widths: Sequence[int]) -> list[Any]:
    """Each cell's value as often as it has rows; a list, since places may be tuples."""
    return [value for value, width in zip(values, widths, strict=True) for _ in range(width)]


COUNTS = ("row", "prompt", "sample", "n", "control", "interval")


@checks_arguments
def agreement(
    estimate: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    value: str | None = None,
    by: str | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """How alike two tables of the same cells are: of `attribution` and `patching`, say, or of `over_prompts` of each.

    Cells are put together by all columns that both have beside the metric's. `value` is the column that is compared
    (the first `_delta` that both have); `by` is one with a row of the result for each of its values, such as "site".

    Columns: `by`, value, n (cells in both), pearson, spearman (-1 to 1), same_sign (share of the cells that are zero in
    neither), top (how many of the largest were compared, by size) and overlap (the share of them that both have).
    Cells that are zero in both, such as those before the token that differs, count in all but same_sign and overlap.

    >>> agreement(table, table)["pearson"].round(3).tolist()
    [1.0]
    """
    value = _value(estimate, truth, value)
    cells = _cells(estimate, truth)
    pair = estimate[[*cells, value]].merge(truth[[*cells, value]], on=cells, suffixes=("", "_true"))
    if pair.empty:
        raise EmptySelection(
            f"the tables have no cell in common by {', '.join(cells)}: make them of one grid"
        )
    if any(table.duplicated(cells).any() for table in (estimate, truth)):
        raise BadHook(
            f"a cell of {', '.join(cells)} stands several times in a table: leave one of each, or average"
        )
    if by is not None and by not in cells:
        raise BadHook(
            f"by={by!r} is no column of both tables{did_you_mean(by, cells)} They share {', '.join(cells)}."
        )
    groups = [(None, pair)] if by is None else list(pair.groupby(by, sort=False))
    rows = []
    for name, found in groups:
        rows.append(
            ({} if by is None else {by: name}) | {"value": value} | _alike(found, value, top)
        )
    return pd.DataFrame(rows)


def _value(estimate: pd.DataFrame, truth: pd.DataFrame, value: str | None) -> str:
    both = [name for name in estimate.columns if name in truth.columns]
    found = value or next((name for name in both if name.endswith("_delta")), None)
    if found is None or found not in both:
        raise BadHook(
            f"the tables share {', '.join(both) or 'no column'}, and not {found or 'a _delta'}: say value="
        )
    return found


def _cells(estimate: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    metrics = [
        name.removesuffix(end)
        for table in (estimate, truth)
        for name in table.columns
        for end in ("_before", "_delta")
        if name.endswith(end)
    ]
    own = [
        name
        for name in estimate.columns
        if any(name == m or name.startswith(f"{m}_") for m in metrics)
    ]
    own += ["n", "interval"]
    cells = [name for name in estimate.columns if name in truth.columns and name not in own]
    if not [name for name in cells if name not in COUNTS]:
        raise BadHook(
            f"the tables share no column that says which cell a row is of: {', '.join(estimate.columns)}"
        )
    return cells


def _alike(pair: pd.DataFrame, value: str, top: int) -> dict[str, Any]:
    mine: Any = pair[value]
    true: Any = pair[f"{value}_true"]
    neither = (mine != 0) & (true != 0)
    count = min(top, int(neither.sum()))
    largest: Sequence[set[object]] = [
        set(each[neither].abs().nlargest(count).index) for each in (mine, true)
    ]
    return {
        "n": len(pair),
        "pearson": mine.corr(true),
        "spearman": mine.rank().corr(true.rank()),
        "same_sign": float(((mine > 0) == (true > 0))[neither].mean()),
        "top": count,
        "overlap": len(largest[0] & largest[1]) / count if count else float("nan"),
    }
