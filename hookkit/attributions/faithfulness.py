"""hk.faithfulness: how much of the model's behaviour a circuit has, beside its controls.

    scores = hk.edge_attribution(lm, clean, corrupted, metric)
    result = hk.faithfulness(lm, clean, corrupted, scores, metric)
    result.table          # a curve over sizes, with random circuits and the complements beside it
    result.areas          # CPR and CMD of each curve, as in the MIB benchmark
    hk.figures.faithfulness_curve(result.table)

The faithfulness of a circuit is (m(circuit) - m(none)) / (m(model) - m(none)), a ratio of means
over the prompts, where m(none) is the metric with everything ablated: that of the corrupted
prompts, if those are what ablated parts write (MIB: Mueller et al. 2025).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from ..arguments import as_items, check_arguments, check_integer, describe
from ..display import describe_outcome, first_rows, render_html
from ..errors import BadHook, EmptySelection
from ..models.lm import LM
from ..models.prompts import Prompts, Row
from ..runs.forward import forward
from ..runs.run import Run
from ..tables import intervals
from ..tables.metrics.metric import MetricInput, MetricLike
from .backward import PromptMetric, as_float, bind_pair
from .circuit import Circuit, choose, count_of_share, score_table
from .circuit_run import Ablate, CircuitModel, Values
from .edge_graph import Mask

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CONFIDENCE, RESAMPLES = 0.95, 2000
NUMBERS_AT_ONCE = 100_000_000  # of the differences of one forward
ARMS = ("circuit", "random", "complement", "model", "none")
ARM = ["circuit", "draw"]


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """The faithfulness of circuits, from `hk.faithfulness`.

    table      a row for each circuit: `circuit` ("circuit", "random", "complement", "model",
               "none"), draw, size, n_edges, the metric's mean, faithfulness with `_low` and `_high`
               (95 %), n (the prompts)
    areas      for each curve CPR, the area under it (higher is better), with its interval; and CMD,
               the area between it and 1 (lower is better), with that of a bootstrap over 10 prompts
               or more; by trapezoids over the sizes
    n_forwards, n_rows, seconds   what it cost: rows are prompts in forwards
    """

    table: pd.DataFrame
    areas: pd.DataFrame
    n_forwards: int
    n_rows: int
    seconds: float

    def __repr__(self) -> str:
        of_circuit = self.table[self.table["circuit"] == "circuit"]
        pairs = zip(of_circuit["size"], of_circuit["faithfulness"], strict=True)
        values = [f"{size:g}: {value:.2f}" for size, value in pairs]
        text = (
            f"Faithfulness({', '.join(values)}; {self.n_rows} rows in {self.n_forwards} forwards)"
        )
        return describe_outcome(text, "result.table", "result.areas")

    def _repr_html_(self) -> str:
        numbers = {"forwards": self.n_forwards, "rows": self.n_rows}
        names = ("circuit", "draw", "size", "n_edges", "faithfulness")
        return render_html("Faithfulness", numbers, first_rows(self.table, *names))


@dataclass(frozen=True, eq=False)
class _Arm:
    """A circuit to measure, and its name in the table."""

    name: str
    draw: int
    size: float
    circuit: Circuit


@check_arguments
def faithfulness(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    scores: pd.DataFrame | Circuit | Sequence[Circuit],
    metric: MetricLike,
    *,
    sizes: Sequence[float] | None = None,
    ablate: Ablate = "counterfactual",
    draws: int = 3,
) -> Faithfulness:
    """Returns the faithfulness of circuits of several sizes, beside that of random circuits of as
    many edges, of their complements, and of the whole model (Wang et al. 2022; Mueller et al.
    2025).

    scores  a table of scores, of edges or nodes, from which `hk.circuit` makes a circuit of each
            size; or a circuit, or a list of circuits
    sizes   shares of all edges, with a table of scores; by default the ten of MIB, 0.001 to 1
    ablate  what ablated senders write, as in `hk.run_circuit`
    draws   how many random circuits of each size (`Circuit.random`); 0 for none

    Each circuit costs one row of a batch for each prompt, and equal circuits are run once: MIB's
    ten sizes take 12 forwards of the prompts, the random circuits 10 for each draw, and the
    complements 10. Three more forwards, of one prompt, check the model. A row takes about twice as
    long as in a plain forward, since receivers compute their own inputs.

    >>> metric = logit_diff(" Mary", " John")
    >>> scores = edge_attribution(lm, clean, corrupted, metric)
    >>> result = faithfulness(lm, clean, corrupted, scores, metric, sizes=[0.1, 1.0], draws=1)
    >>> result.table["circuit"].tolist()
    ['circuit', 'circuit', 'random', 'random', 'complement', 'complement', 'model', 'none']
    """
    check_integer(draws, "draws", least=0, meaning="how many random circuits of each size,")
    tops = _circuits_of(scores, sizes)
    arms = list(_arms_of(tops, draws))
    values = CircuitValues.of(lm, clean, corrupted, metric, ablate)
    numbers = values.measure([arm.circuit for arm in arms])
    table = _describe(arms, numbers, values.name)
    areas = _areas(arms, numbers)
    seconds = time.perf_counter() - values.started
    return Faithfulness(table, areas, values.n_forwards, values.n_rows, seconds)


def _circuits_of(
    scores: pd.DataFrame | Circuit | Sequence[Circuit], sizes: Sequence[float] | None
) -> list[tuple[float, Circuit]]:
    """Returns the circuits to measure, each with its share of all edges."""
    if isinstance(scores, pd.DataFrame):
        return _largest_scores(scores, MIB_SIZES if sizes is None else sizes)
    if sizes is not None:
        raise BadHook(
            "sizes= is for a table of scores, and circuits have their sizes: leave it out"
        )
    circuits = [scores] if isinstance(scores, Circuit) else as_items(scores)
    if not circuits or not all(isinstance(circuit, Circuit) for circuit in circuits):
        raise EmptySelection(
            f"scores={describe(scores)} has no circuit: give a table of scores, a circuit, or a "
            "list of circuits"
        )
    return [(circuit.share, circuit) for circuit in circuits]


def _largest_scores(scores: pd.DataFrame, sizes: Sequence[float]) -> list[tuple[float, Circuit]]:
    """Returns the circuit of the largest scores, for each share of all edges."""
    table = score_table(scores)
    shares = list(sizes)
    counts = [count_of_share(len(table.table), share) for share in shares]
    if not shares or shares != sorted(set(shares)):
        raise BadHook(f"sizes={shares}: give shares of all edges, each larger than the last")
    return [(share, choose(table, n)) for share, n in zip(shares, counts, strict=True)]


def _arms_of(tops: Sequence[tuple[float, Circuit]], draws: int) -> Iterator[_Arm]:
    for size, circuit in tops:
        yield _Arm("circuit", 0, size, circuit)
    for draw in range(draws):
        for number, (size, circuit) in enumerate(tops):
            yield _Arm("random", draw, size, circuit.random(seed=draw * len(tops) + number))
    for size, circuit in tops:
        yield _Arm("complement", 0, size, circuit.complement())
    any_circuit = tops[0][1]
    rows = len(any_circuit.table)
    yield _Arm("model", 0, 1.0, any_circuit.with_only(np.ones(rows, bool)))
    yield _Arm("none", 0, 0.0, any_circuit.with_only(np.zeros(rows, bool)))


def _describe(
    arms: Sequence[_Arm], numbers: Float[np.ndarray, "arm prompt"], metric: str
) -> pd.DataFrame:
    model, none = numbers[-2], numbers[-1]
    ratios = ratios_of(numbers - none, model - none)
    records = [(arm.name, arm.draw, arm.size, len(arm.circuit)) for arm in arms]
    table = pd.DataFrame(records, columns=[*ARM, "size", "n_edges"])
    table[metric] = numbers.mean(axis=1)
    table["faithfulness"] = ratios.mean
    table["faithfulness_low"], table["faithfulness_high"] = ratios.low, ratios.high
    table["n"] = numbers.shape[1]
    return table


def ratios_of(
    over: Float[np.ndarray, "arm prompt"], under: Float[np.ndarray, " prompt"]
) -> intervals.Estimates:
    """Returns the ratios of means with their intervals. Raises `EmptySelection` without a
    difference to divide by."""
    if not under.mean():
        raise EmptySelection(
            "the metric is the same for the model and with everything ablated, on average over "
            "the prompts: there is nothing that a circuit could explain"
        )
    denominators = np.broadcast_to(under, over.shape)
    return intervals.ratios(over, denominators, CONFIDENCE, RESAMPLES, 0)


def _areas(arms: Sequence[_Arm], numbers: Float[np.ndarray, "arm prompt"]) -> pd.DataFrame:
    model, none = numbers[-2], numbers[-1]
    rows_of_curve: dict[tuple[str, int], list[int]] = {}
    for row, arm in enumerate(arms[:-2]):
        rows_of_curve.setdefault((arm.name, arm.draw), []).append(row)
    records = []
    for key, index in rows_of_curve.items():
        sizes = np.array([arms[row].size for row in index])
        if len(sizes) < 2 or (np.diff(sizes) <= 0).any():
            continue
        weights = np.zeros(len(sizes))
        weights[:-1] += np.diff(sizes) / 2
        weights[1:] += np.diff(sizes) / 2
        area = ratios_of(weights[None] @ (numbers[index] - none), model - none)
        curve = ratios_of(numbers[index] - none, model - none).mean
        cmd = float(weights @ np.abs(1 - curve))
        limits = _cmd_limits(weights, numbers[index] - none, model - none)
        records.append((*key, area.mean[0], area.low[0], area.high[0], cmd, *limits))
    columns = ["cpr", "cpr_low", "cpr_high", "cmd", "cmd_low", "cmd_high"]
    return pd.DataFrame(records, columns=[*ARM, *columns])


def _cmd_limits(
    weights: Float[np.ndarray, " size"],
    kept_edges: Float[np.ndarray, "size prompt"],
    whole: Float[np.ndarray, " prompt"],
) -> tuple[float, float]:
    """Returns the limits of CMD by a bootstrap over the prompts; NaN for fewer than 10."""
    if len(whole) < intervals.MIN_FOR_INTERVAL:
        return float("nan"), float("nan")
    draws = intervals.resampling_weights(len(whole), RESAMPLES, 0)
    curves = (kept_edges @ draws.T) / (whole @ draws.T)
    low, high = np.quantile(weights @ np.abs(1 - curves), [0.025, 0.975])
    return float(low), float(high)


# ---- the metric of many circuits


@dataclass(eq=False)
class CircuitValues:
    """Measures a metric of many circuits on the same prompts. It owns the counts of forwards."""

    model: CircuitModel
    clean: PromptMetric
    corrupted: PromptMetric
    ablate: Ablate
    n_forwards: int = 0
    n_rows: int = 0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(
        cls, lm: LM, clean: Prompts, corrupted: Prompts, metric: MetricLike, ablate: Ablate
    ) -> CircuitValues:
        """Returns the values of a metric. Checks prompts and model first."""
        started = time.perf_counter()
        target, source = bind_pair(lm, clean, corrupted, metric, "noise", ())
        model = CircuitModel.of(lm, target.inputs.rows, source.inputs.rows)
        return cls(model, target, source, ablate, n_forwards=3, n_rows=3, started=started)

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.clean.metric.name

    def measure(self, circuits: Iterable[Circuit]) -> Float[np.ndarray, "circuit prompt"]:
        """Returns the metric of every circuit and prompt; equal circuits run once."""
        masks: dict[bytes, Mask] = {}
        keys = []
        for circuit in circuits:
            self._check_complete(circuit)
            mask = circuit.mask(self.model.graph)
            keys.append(np.packbits(mask).tobytes())
            masks[keys[-1]] = mask
        n_prompts = len(self.clean.inputs.rows)
        at_once = self._rows_at_once()
        parts = [
            range(n_prompts)[start : start + at_once] for start in range(0, n_prompts, at_once)
        ]
        batches = list(map(self._corrupted_rows, parts))
        ablated_values = self.model.ablated_values(batches, self.ablate)
        values = np.zeros((len(masks), n_prompts))
        stacked = np.stack(list(masks.values()))
        for part, batch in zip(parts, batches, strict=True):
            self._count(len(batch))
            ablated, before = ablated_values(batch), self._clean_logits(part)
            step = max(1, at_once // len(part))
            for start in range(0, len(stacked), step):
                some_masks = stacked[start : start + step]
                measured = self._measure_part(part, some_masks, ablated, before)
                values[start : start + len(some_masks), part] = measured
        index = {key: number for number, key in enumerate(masks)}
        return values[[index[key] for key in keys]]

    def _rows_at_once(self) -> int:
        """Returns how many rows of a forward may have the differences of all senders in memory."""
        width = max(map(len, self.clean.inputs.rows))
        d_model = self.model.lm.sizes["d_model"] or 1
        return max(1, NUMBERS_AT_ONCE // (len(self.model.graph.senders) * width * d_model))

    def _corrupted_rows(self, part: range) -> list[Row]:
        return [self.corrupted.inputs.rows[row] for row in part]

    def _measure_part(
        self,
        part: range,
        masks: Bool[np.ndarray, "circuit sender receiver"],
        ablated: Values,
        before: Tensor | None,
    ) -> Float[np.ndarray, "circuit prompt"]:
        """Returns the metric of some circuits and prompts, from one forward."""
        count = len(masks)
        prompts = list(part) * count
        rows = [self.clean.inputs.rows[row] for row in prompts]
        repeated = {site: _repeat(value, count) for site, value in ablated.items()}
        self._count(len(prompts))
        run = self.model.run(rows, np.repeat(masks, len(part), axis=0), repeated)
        if before is not None:
            before = before.repeat(count, 1)
        inputs = MetricInput(_last_logits(run), prompts, before)
        measured = self.clean.measure(inputs).double().cpu().numpy()
        return measured.reshape(count, len(part))

    def _check_complete(self, circuit: Circuit) -> None:
        """Raises `BadHook` for a circuit from a table of some edges, whose complement and random
        circuits would leave the others out."""
        n_edges = int(self.model.graph.allowed.sum())
        if circuit.kind == "edges" and len(circuit.table) != n_edges:
            raise BadHook(
                f"the scores are of {len(circuit.table)} edges, and the model has {n_edges}: "
                "controls need all of them: give every edge a score, such as 0"
            )

    def _clean_logits(self, part: Sequence[int]) -> Tensor | None:
        if not self.clean.metric.compares:
            return None
        self._count(len(part))
        rows = self.clean.inputs.rows
        return _last_logits(forward(self.model.lm, [rows[row] for row in part], logits="last"))

    def _count(self, rows: int) -> None:
        self.n_forwards += 1
        self.n_rows += rows


def _repeat(values: Tensor, count: int) -> Tensor:
    """Returns the values of some rows `count` times; one value for all rows as it is."""
    if len(values) == 1:
        return values
    return values.repeat(count, *[1] * (values.ndim - 1))


def _last_logits(run: Run) -> Float[Tensor, "row vocab"]:
    return as_float(run.captured_logits().values[:, 0])


# ---- single edges, and two circuits


@check_arguments
def minimality(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    circuit: Circuit,
    metric: MetricLike,
    *,
    ablate: Ablate = "counterfactual",
) -> pd.DataFrame:
    """Returns the faithfulness of a circuit without each of its edges, or nodes: which can go.

    Columns: sender and receiver (or node), score, the metric's mean, faithfulness without it, and
    `change`, that minus the circuit's own, with `_low` and `_high` (95 %, over the prompts); n. An
    edge whose change is about 0 can go alone, which does not say that two such edges can. It costs
    a row for each edge and prompt. Sorted by the change, the edges that can go last.
    """
    chosen = np.flatnonzero(circuit.is_inside)
    everything = np.ones(len(circuit.table), bool)
    circuits = [circuit, circuit.with_only(everything), circuit.with_only(~everything)]
    for row in chosen:
        kept_edges = circuit.is_inside.copy()
        kept_edges[row] = False
        circuits.append(circuit.with_only(kept_edges))
    values = CircuitValues.of(lm, clean, corrupted, metric, ablate)
    of_circuit, model, none, *without = values.measure(circuits)
    if not without:
        raise EmptySelection("the circuit is empty, so that nothing can be taken out of it")
    without = np.array(without)
    changes = ratios_of(without - of_circuit, model - none)
    table = circuit.table.iloc[chosen].drop(columns="in_circuit").reset_index(drop=True)
    table[values.name] = without.mean(axis=1)
    table["faithfulness"] = ratios_of(without - none, model - none).mean
    table["change"], table["change_low"] = changes.mean, changes.low
    table["change_high"], table["n"] = changes.high, without.shape[1]
    return table.sort_values("change", ignore_index=True)


@check_arguments
def compare_circuits(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    first: Circuit,
    second: Circuit,
    metric: MetricLike,
    *,
    ablate: Ablate = "counterfactual",
) -> pd.DataFrame:
    """Returns how much two circuits overlap, and how faithful they are: each alone, what they
    share, and both together.

    Two faithful circuits may share little: a faithful circuit need not be the only one.

    Columns: circuit ("first", "second", "shared", "both"), n_edges, the metric's mean,
    faithfulness with its interval, n; jaccard, the share of their edges that both have;
    weighted_jaccard, the same with absolute scores, scaled to a sum of 1 in each circuit, as
    weights; and jaccard_by_chance, that of random sets of as many edges.

    >>> metric = logit_diff(" Mary", " John")
    >>> scores = edge_attribution(lm, clean, corrupted, metric)
    >>> one, two = circuit(scores, n=1000), circuit(scores, n=1000, signed="negative")
    >>> compare_circuits(lm, clean, corrupted, one, two, metric)["circuit"].tolist()
    ['first', 'second', 'shared', 'both']
    """
    if first.kind != second.kind:
        raise BadHook("one circuit is of edges, the other of nodes: compare two of a kind")
    tables = [member.table.set_index(member.names) for member in (first, second)]
    if set(tables[0].index) != set(tables[1].index):
        raise BadHook("the two circuits are of tables with other edges, so of two models")
    one, two = tables[0], tables[1].loc[tables[0].index]
    a, b = one["in_circuit"].to_numpy(bool), two["in_circuit"].to_numpy(bool)
    total = len(a)
    weights = list(map(_weights, (one, two)))
    by_chance = a.sum() * b.sum() / total
    overlap = {
        "jaccard": (a & b).sum() / max(1, (a | b).sum()),
        "weighted_jaccard": np.minimum(*weights).sum() / max(1e-300, np.maximum(*weights).sum()),
        "jaccard_by_chance": by_chance / max(1e-300, a.sum() + b.sum() - by_chance),
    }
    masks = {"first": a, "second": b, "shared": a & b, "both": a | b}
    full = np.ones(total, bool)
    arms = [
        _Arm(name, 0, kept_edges.mean(), first.with_only(kept_edges))
        for name, kept_edges in masks.items()
    ]
    arms += [_Arm("model", 0, 1.0, first.with_only(full))]
    arms += [_Arm("none", 0, 0.0, first.with_only(~full))]
    values = CircuitValues.of(lm, clean, corrupted, metric, ablate)
    table = _describe(arms, values.measure([arm.circuit for arm in arms]), values.name)
    return table.drop(columns=["draw", "size"]).head(len(masks)).assign(**overlap)


def _weights(table: pd.DataFrame) -> Float[np.ndarray, " edge"]:
    """Returns the absolute scores of a circuit's edges, scaled to a sum of 1."""
    weights = table["score"].abs().to_numpy() * table["in_circuit"].to_numpy(bool)
    return weights / max(1e-300, weights.sum())
