"""Steering vectors: directions from contrasting prompts, and vectors learned by gradient descent.

    vectors = hk.mean_difference(lm, ["I love this."], ["I hate this."], "resid_post.12")
    vectors["resid_post.12"].steer(dose=0.3)
    sentiment = hk.metrics.logit_diff(" good", " bad")
    vector = hk.fit_vector(lm, prompts, sentiment, "resid_post.12", dose=0.3)
    vector.about["curve"]           # the target before each step, and after the last one

Prompts run a few at a time. Of each site, only each prompt's mean and the lengths of its values are
kept, at the prompt's own positions, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_number
from ..display import progress_bar
from ..errors import BadHook, BadPrompt, EmptySelection
from ..hooks.base import Hook, as_where, require_vectors
from ..hooks.capture import Captured, capture
from ..hooks.edits import edit
from ..hooks.vector import Vector, Vectors, data_hash, describe_model
from ..models.lm import LM, logits_of, refuse_no_gradient
from ..models.model_setup import freeze_weights, warn_of_dropout
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, SitesLike
from ..runs.forward import forward
from ..runs.manager import HookManager
from ..sweeps.inputs import CellMetrics, SweepInputs, read_inputs
from ..tables.metrics.metric import FunctionMetric, Loss, Metric, MetricLike, as_metrics, loss

BATCH = 16  # default number of prompts that run together


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Statistics of a set of prompts at one site, in float64 on the CPU.

    means    [prompt, d]  the mean over each prompt's positions
    counts   [prompt]     how many positions each has
    lengths  [token]      the L2 norm of each value
    """

    means: Float[Tensor, "prompt d"]
    counts: Int[Tensor, " prompt"]
    lengths: Float[Tensor, " token"]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean over all positions of all prompts, each position with the same weight."""
        return (self.means * self.counts[:, None]).sum(0) / self.counts.sum()


def collect_statistics(
    lm: LM, rows: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int
) -> dict[AnySite, SiteStatistics]:
    """Returns the statistics of each of these sites at some positions of each prompt."""
    check_integer(batch, "batch", least=1, meaning="how many prompts run together,", error=BadHook)
    selected = require_vectors(lm.expand(sites), "a steering vector is a mean of")
    prompts: dict[AnySite, list[tuple[Tensor, int, Tensor]]] = {site: [] for site in selected}
    for start in range(0, len(rows), batch):
        texts = list(rows[start : start + batch])
        run = forward(lm, texts, capture(selected, pos=pos), logits=False)
        for site in selected:
            for values in _values_of_prompts(run.captured(site)):
                prompts[site].append((values.mean(0), len(values), values.norm(dim=-1)))
    statistics = {}
    for site in selected:
        means, counts, lengths = zip(*prompts[site], strict=True)
        means, lengths = torch.stack(means), torch.cat(lengths)
        statistics[site] = SiteStatistics(means, torch.tensor(counts), lengths)
    return statistics


def _values_of_prompts(captured: Captured) -> Iterator[Float[Tensor, "pos d"]]:
    """Returns the values of each prompt at its own positions."""
    if captured.positions is None or captured.values.ndim != 3:
        raise BadHook(
            f"{captured.site} has values {list(captured.values.shape)}, and a steering vector is "
            "one for each prompt and position, [prompt, pos, d]: name one head of a site with "
            "heads, such as 'z.9.3'; the neurons of experts are other ones at each token"
        )
    for values, positions in zip(captured.values, captured.positions, strict=True):
        yield values[(positions >= 0).to(values.device)].cpu().double()


def median_length(*lengths: Float[Tensor, " token"]) -> float:
    """Returns the median length.

    The mean would be dominated by the first position, where the stream of many models is a hundred
    times as long.
    """
    return float(torch.cat(lengths).median())


@check_arguments
def mean_difference(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The mean of each site on the positive prompts minus that on the negative ones.

    The numbers of prompts may differ. `pos` is where the sites are read, counted in each prompt
    without padding: the last token, several tokens, or all with pos=None (each token has the same
    weight; a model's first position is often an outlier, and pos=slice(1, None) leaves it out).
    `batch` prompts run at a time and only sums are kept, so that memory does not grow with their
    number. The result has a vector for each site: "resid_post" gives one for every layer.

    Turner et al. 2023; Marks and Tegmark 2023; Rimsky et al. 2024.

    >>> positive, sites = ["I love it", "It is great"], ["resid_post.6", "resid_post.12"]
    >>> vectors = mean_difference(lm, positive, ["I hate it"], sites)
    >>> vectors["resid_post.12"].tensor.shape
    torch.Size([576])
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    about = provenance(lm, "mean difference", pos, toward, away)
    vectors = []
    for site, positives, negatives in _statistics_of_both(lm, toward, away, sites, pos, batch):
        norm = median_length(positives.lengths, negatives.lengths)
        vectors.append(Vector(site, positives.mean - negatives.mean, norm, about))
    return Vectors(tuple(vectors))


def _statistics_of_both(
    lm: LM, toward: Sequence[Row], away: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int
) -> Iterator[tuple[AnySite, SiteStatistics, SiteStatistics]]:
    """Yields each site with the statistics of the positive and of the negative prompts."""
    positive = collect_statistics(lm, toward, sites, pos, batch)
    negative = collect_statistics(lm, away, sites, pos, batch)
    for site, statistics in positive.items():
        yield site, statistics, negative[site]


def provenance(
    lm: LM, method: str, pos: PosLike, toward: Sequence[Row], away: Sequence[Row]
) -> dict[str, Any]:
    """Returns how vectors of these prompts are made, for their `about`."""
    return {
        **describe_model(lm),
        "method": method,
        "pos": repr(pos),
        "prompts": [len(toward), len(away)],
        "data_sha256": data_hash(toward, away),
    }


@check_arguments
def principal_direction(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The first principal direction of the differences between paired prompts, of length 1.

    Prompt n of `positive` is paired with prompt n of `negative`. The differences are not centred,
    since each of them represents both orders of its pair; so their common part counts, and the
    direction is the one along which pairs are furthest apart. Its sign is that in which the
    positive prompts lie on average. If `pos` selects several tokens, their mean in each prompt is
    used. `about["share"]` is the part of the squared differences along it, 0 to 1.

    Zou et al. 2023.

    >>> positive, negative = ["I love it", "It is great"], ["I hate it", "It is bad"]
    >>> vectors = principal_direction(lm, positive, negative, "resid_post.6")
    >>> round(vectors[0].length, 4)
    1.0
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    if len(toward) != len(away):
        raise BadPrompt(
            f"{len(toward)} positive and {len(away)} negative prompts were given, and a principal "
            "direction is of pairs: give as many of each, in pairs; hk.mean_difference needs none"
        )
    about = provenance(lm, "principal direction", pos, toward, away)
    vectors = []
    for site, positives, negatives in _statistics_of_both(lm, toward, away, sites, pos, batch):
        pair_differences = positives.means - negatives.means
        if not bool(pair_differences.any()):
            raise BadHook(
                f"the pairs are the same at {site}, pos={pos!r}: read them where they differ"
            )
        _, sizes, axes = torch.linalg.svd(pair_differences, full_matrices=False)
        direction = axes[0] * torch.where((pair_differences @ axes[0]).mean() < 0, -1, 1)
        share = float(sizes[0] ** 2 / (sizes**2).sum())
        norm = median_length(positives.lengths, negatives.lengths)
        vectors.append(Vector(site, direction, norm, {**about, "share": share}))
    return Vectors(tuple(vectors))


# ---- vectors learned by gradient descent


@dataclass(frozen=True, eq=False)
class Aim:
    """A metric of prompts with a vector added at a site.

    `positions` are the positions of each prompt at which it is added; None for all.
    """

    lm: LM
    site: AnySite
    metric: Metric
    inputs: SweepInputs
    positions: tuple[tuple[int, ...], ...] | None
    batch: int  # prompts that run together

    @property
    def words(self) -> str:
        """The target in words."""
        if isinstance(self.metric, FunctionMetric):
            return self.metric.name
        return repr(self.metric)

    def mean(self, vector: Float[Tensor, " d"]) -> float:
        """Returns the metric's mean over the prompts, with the vector added."""
        total = 0.0
        with torch.no_grad():
            for rows in self._batches:
                total += float(self._total(vector, rows))
        return total / len(self.inputs)

    def mean_and_gradient(self, vector: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """Returns the metric's mean over the prompts, and its gradient for the vector."""
        refuse_no_gradient(self.lm)
        total, gradient = 0.0, torch.zeros_like(vector)
        for rows in self._batches:
            with torch.enable_grad():
                part = self._total(vector, rows)
                if not part.requires_grad:
                    raise BadHook(
                        f"{self.words} has no gradient: a rank, or whether a token is the first, "
                        "moves in steps; give hk.metrics.logprob or hk.metrics.logit_diff"
                    )
                gradient += torch.autograd.grad(part, vector)[0]
            total += float(part.detach())
        return total / len(self.inputs), gradient / len(self.inputs)

    @property
    def _batches(self) -> list[range]:
        rows = range(len(self.inputs))
        return [rows[start : start + self.batch] for start in rows[:: self.batch]]

    def _total(self, vector: Float[Tensor, " d"], rows: range) -> Float[Tensor, ""]:
        logits = self._logits(rows, self._hooks(vector, rows))
        return self._metrics.measures[0](self._metrics.metric_input(rows, logits)).sum()

    @cached_property
    def _metrics(self) -> CellMetrics:
        """The metric, with the logits without the vector if the metric compares with them."""
        measure, before = self.metric.bind(self.lm, len(self.inputs)), None
        if self.metric.compares:
            before = {}
            with torch.no_grad():
                for row in range(len(self.inputs)):
                    before[row] = self._logits([row], [])[0, -self.inputs.read_counts[row]]
        return CellMetrics(self.inputs, [measure], before)

    def _logits(
        self, rows: Sequence[int], hooks: Sequence[Hook]
    ) -> Float[Tensor, "row look vocab"]:
        """Returns the logits at the last positions of these prompts, as many as are read."""
        lm, count = self.lm, max(self.inputs.read_counts[row] for row in rows)
        batch = as_batch(lm, [self.inputs.run_rows[row] for row in rows], side="left")
        settings = lm.accepted(use_cache=False, return_dict=True, logits_to_keep=count)
        arguments = batch.inputs(lm) | settings
        manager = HookManager(lm, hooks)
        manager.refuse_checkpoints()
        with manager:
            manager.expect(batch)
            return logits_of(lm.model(**arguments))[:, -count:]

    def _hooks(self, vector: Float[Tensor, " d"], rows: Sequence[int]) -> list[Hook]:
        """Returns the hooks that add the vector; prompts with the same positions share one."""

        def add(values: Tensor) -> Tensor:
            return values + vector.to(device=values.device, dtype=values.dtype)

        if self.positions is None:
            return [edit(self.site, add)]
        rows_at: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            rows_at.setdefault(self.positions[row], []).append(index)
        return [edit(self.site, add, pos=pos, rows=indices) for pos, indices in rows_at.items()]


def aim(
    lm: LM,
    site: str | AnySite,
    prompts: Prompts,
    target: MetricLike | str | list[str],
    pos: PosLike,
    batch: int,
) -> Aim:
    """Returns the target of a fit, checked against the model and the prompts."""
    is_list = isinstance(target, list) and all(isinstance(text, str) for text in target)
    if isinstance(target, str) or is_list:
        target = loss(target)  # pyright: ignore[reportArgumentType]
    metrics = as_metrics(target)  # pyright: ignore[reportArgumentType]
    sites = require_vectors(lm.expand(site), "a vector is added to")
    if len(metrics) != 1 or len(sites) != 1:
        raise BadHook(
            f"{len(metrics)} targets and {len(sites)} sites were given, and a vector is fitted to "
            "one target at one site: name it"
        )
    inputs = read_inputs(lm, prompts, metrics, -1)
    return Aim(lm, sites[0], metrics[0], inputs, _positions_of(inputs, pos), batch)


def _positions_of(inputs: SweepInputs, pos: PosLike) -> tuple[tuple[int, ...], ...] | None:
    """Returns the positions of each prompt, on its continuation too; None for all positions."""
    where = as_where(pos)
    if where.pos is None:
        return None
    positions = []
    for row, selected in enumerate(inputs.full.selected_positions(where)):
        assert selected is not None
        positions.append(tuple(filter(selected.__contains__, range(inputs.lengths[row]))))
        if not positions[-1]:
            raise EmptySelection(f"prompt {row} has no token at pos={pos!r}: give other positions")
    return tuple(positions)


@check_arguments
def fit_vector(
    lm: LM,
    prompts: Prompts,
    target: MetricLike | str | list[str],
    site: str | AnySite,
    *,
    pos: PosLike = None,
    steps: int = 50,
    lr: float = 0.02,
    dose: float | None = None,
    seed: int | None = None,
    batch: int = BATCH,
    progress: bool | None = None,
) -> Vector:
    """The vector that changes a target most when it is added at a site.

    It is found by gradient descent with the model's weights frozen (Subramani et al. 2022).

    target    a metric whose mean over the prompts is to rise, at their last token
              (`hk.metrics.logit_diff`, `hk.metrics.logprob` …, a function of the logits); or
              continuations, one text for all prompts or one for each, whose loss is to fall
    pos       where the vector is added: everywhere, on a continuation too; or at these positions of
              each prompt
    lr        the approximate length of one of the `steps` of Adam, as a fraction of the stream's
              median length there
    dose      the maximal length of the vector, as such a fraction; by default there is none
    seed      by default the vector starts at zero; with a seed, at a random vector as long as a
              step
    batch     prompts that run together: memory does not grow with the number of prompts
    progress  True or False; the default is to show a bar in a terminal

    The same call gives the same numbers. `about["curve"]` has the target's mean before each step
    and after the last, in its own units. Raises `BadHook` if the target has no gradient.

    >>> prompts, target = ["I take my tea with"], logprob(" sugar")
    >>> fitted = fit_vector(lm, prompts, target, "resid_post.20", steps=2, progress=False)
    >>> fitted.about["curve"][-1] > fitted.about["curve"][0]
    True
    """
    check_integer(steps, "steps", least=1, error=BadHook)
    check_number(lr, "lr", above=0, meaning="the length of a step,")
    longest = math.inf
    if dose is not None:
        meaning = "the largest length of the vector, as a fraction of the stream's,"
        longest = check_number(dose, "dose", above=0, meaning=meaning)
    fit_aim = aim(lm, site, prompts, target, pos, batch)
    rows = fit_aim.inputs.rows
    stream = collect_statistics(lm, rows, [fit_aim.site], pos, batch)[fit_aim.site]
    norm, width = median_length(stream.lengths), stream.means.shape[1]
    warn_of_dropout(lm.root)
    with torch.inference_mode(False), freeze_weights(lm.root):
        start = torch.zeros(width)
        if seed is not None:
            random = Vector(fit_aim.site, torch.ones(width), norm).random(seed=seed)
            start = random.unit().tensor * (lr * norm)
        bar = progress_bar(progress, iterable=range(steps), unit="step")
        vector, curve = _descend(fit_aim, start, lr * norm / width**0.5, longest * norm, bar)
    about = {
        **provenance(lm, "learnt", pos, rows, fit_aim.inputs.run_rows),
        "prompts": [len(rows)],
        "target": fit_aim.words,
        "steps": steps,
        "lr": lr,
        "dose": dose,
        "seed": seed,
        "curve": curve,
    }
    return Vector(fit_aim.site, vector, norm, about)


def _descend(
    aim: Aim, start: Float[Tensor, " d"], lr: float, longest: float, steps: Iterable[int]
) -> tuple[Float[Tensor, " d"], list[float]]:
    """Takes steps of Adam towards an aim; `longest` is the maximal length of the vector.

    Returns the vector after the last step, and the target's mean before each step and at the end.
    """
    vector = start.to(aim.lm.device).clone().requires_grad_()
    adam = torch.optim.Adam([vector], lr=lr, maximize=not isinstance(aim.metric, Loss))
    curve: list[float] = []
    for _ in steps:
        mean, gradient = aim.mean_and_gradient(vector)
        curve.append(mean)
        if not bool(gradient.any()):
            raise BadHook(
                f"{aim.words} does not change with a vector at {aim.site}, so that "
                "there is no slope to follow: add it where the target's position reads it, or "
                "(for kl, flat at the start) give seed="
            )
        vector.grad = gradient
        adam.step()
        with torch.no_grad():
            vector *= (longest / vector.norm().clamp(min=1e-30)).clamp(max=1)
    return vector.detach(), [*curve, aim.mean(vector)]
