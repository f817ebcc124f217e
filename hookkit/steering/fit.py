"""Learned vectors: gradient descent on what is added at one site, with the model's weights frozen.

sentiment = hk.metrics.logit_diff(" good", " bad")
vector = hk.fit_vector(lm, "resid_post.12", prompts, sentiment, dose=0.3)
vector = hk.fit_vector(lm, "resid_post.12", prompts, [" a joy to watch.", " lovely and warm."])
vector.about["curve"]           # the target before each step, and after the last one

`Aim` computes the target of a fit and its gradient, and `_descend` takes the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import check_arguments, check_number
from ..errors import BadHook, EmptySelection
from ..hooks.base import Hook, as_where, require_vectors
from ..hooks.edits import edit
from ..hooks.vector import Vector
from ..models.lm import LM, logits_of, refuse_no_gradient
from ..models.model_setup import freeze_weights, warn_of_dropout
from ..models.positions import PosLike
from ..models.prompts import Prompts, as_batch
from ..models.sites import AnySite
from ..runs.manager import HookManager
from ..sweeps.cell_metrics import CellMetrics
from ..sweeps.inputs import SweepInputs, read_inputs
from ..tables.metrics.metric import FunctionMetric, Loss, Metric, MetricLike, as_metrics, loss
from .directions import BATCH, collect_statistics, median_length, provenance


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
        return self.metric.name if isinstance(self.metric, FunctionMetric) else repr(self.metric)

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
        every = range(len(self.inputs))
        return [every[start : start + self.batch] for start in every[:: self.batch]]

    def _total(self, vector: Float[Tensor, " d"], rows: range) -> Float[Tensor, ""]:
        logits = self._logits(rows, self._hooks(vector, rows))
        return self._metrics.measures[0](self._metrics.said(rows, logits)).sum()

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
        batch = as_batch(lm, [list(self.inputs.run_rows[row]) for row in rows], side="left")
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
    for items, word in ((metrics, "targets"), (sites, "sites")):
        if len(items) != 1:
            raise BadHook(
                f"{len(items)} {word} were given, and a vector is fitted to one target at one "
                "site: name it"
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
        length = inputs.lengths[row]
        positions.append(tuple([position for position in range(length) if position in selected]))
        if not positions[-1]:
            raise EmptySelection(f"prompt {row} has no token at pos={pos!r}: give other positions")
    return tuple(positions)


@check_arguments
def fit_vector(
    lm: LM,
    site: str | AnySite,
    prompts: Prompts,
    target: MetricLike | str | list[str],
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
    >>> fitted = fit_vector(lm, "resid_post.20", prompts, target, steps=2, progress=False)
    >>> fitted.about["curve"][-1] > fitted.about["curve"][0]
    True
    """
    if steps < 1 or check_number(lr, "lr") <= 0:
        raise BadHook(
            f"steps={steps!r} and lr={lr!r}: give 1 step or more, and a step longer than 0"
        )
    if dose is not None and check_number(dose, "dose") <= 0:
        raise BadHook(
            f"dose={dose}: give the longest that the vector may become, as a fraction of the "
            "stream's length"
        )
    fit_aim = aim(lm, site, prompts, target, pos, batch)
    rows = fit_aim.inputs.rows
    stream = collect_statistics(lm, rows, [fit_aim.site], pos, batch)[fit_aim.site]
    norm, width = median_length(stream.lengths), stream.means.shape[1]
    longest = None if dose is None else dose * norm
    warn_of_dropout(lm.root)
    with torch.inference_mode(False), freeze_weights(lm.root):
        start = torch.zeros(width)
        if seed is not None:
            random = Vector(fit_aim.site, torch.ones(width), norm).random(seed=seed)
            start = random.unit().tensor * (lr * norm)
        hidden = None if progress is None else not progress
        bar = tqdm(range(steps), unit="step", disable=hidden)
        vector, curve = _descend(fit_aim, start, lr * norm / width**0.5, longest, bar)
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
    aim: Aim, start: Float[Tensor, " d"], lr: float, longest: float | None, steps: Iterable[int]
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
        if longest is not None:
            with torch.no_grad():
                vector *= (longest / vector.norm().clamp(min=1e-30)).clamp(max=1)
    return vector.detach(), [*curve, aim.mean(vector)]
