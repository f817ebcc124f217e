"""Vectors that are learnt: gradient descent on what is added at one site, every weight of the model frozen.

vector = hk.fit_vector(lm, "resid_post.12", prompts, hk.logit_diff(" good", " bad"), dose=0.3)
vector = hk.fit_vector(lm, "resid_post.12", prompts, [" a joy to watch.", " lovely and warm."])
vector.about["curve"]           # what the target was before each step, and after the last

What a target is when a vector is added: its value on some prompts, as autograd can follow it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection
from ..hooks.base import Hook, inner, not_square, number
from ..hooks.edits import edit
from ..hooks.vector import Vector, data_hash, model_words
from ..models.lm import LM
from ..models.padding import logits_of
from ..models.positions import PosLike, Where
from ..models.prompts import Prompts, as_batch
from ..models.sites import AnySite
from ..models.training import frozen, refuse_no_gradient, warn_of_dropout
from ..runs.manager import HookManager
from ..sweeps.cell_metrics import CellMetrics
from ..sweeps.inputs import SweepInputs, read
from ..tables.metrics import Loss, Metric, MetricLike, OfLogits, as_metrics, loss
from .directions import BATCH, streams, typical


@dataclass(frozen=True, eq=False)
class Aim:
    """A metric of prompts with a vector added at a site; `places` are the positions of each prompt, None for all."""

    lm: LM
    site: AnySite
    metric: Metric
    reading: SweepInputs
    places: tuple[tuple[int, ...], ...] | None

    @property
    def falls(self) -> bool:
        """True for a target that is to become small."""
        return isinstance(self.metric, Loss)

    @property
    def words(self) -> str:
        """The target as it is told."""
        return self.metric.name if isinstance(self.metric, OfLogits) else repr(self.metric)

    def values(self, vector: Float[Tensor, " d"], rows: Sequence[int]) -> Float[Tensor, " row"]:
        """The metric of some prompts with the vector added."""
        logits = self._logits(rows, self._hooks(vector, rows))
        return self._saying.measures[0](self._saying.said(rows, logits))

    def gradient(self, vector: Float[Tensor, " d"], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The sum of the metric over some prompts, and its gradient with respect to the vector."""
        refuse_no_gradient(self.lm)
        with torch.enable_grad():
            total = self.values(vector, rows).sum()
            if not total.requires_grad:
                raise BadHook(
                    f"{self.words} has no gradient: a rank, or whether a token is the first, moves in steps; give "
                    "hk.logprob or hk.logit_diff"
                )
            return total.detach(), torch.autograd.grad(total, vector)[0]

    @cached_property
    def _saying(self) -> CellMetrics:
        """The metric, with what the model says without the vector where the metric compares."""
        measure, before = self.metric.bound(self.lm, len(self.reading)), None
        if self.metric.compares:
            looks = self.reading.looks
            with torch.no_grad():
                each = {row: self._logits([row], [])[0] for row in range(len(self.reading))}
            before = {row: logits[-looks[row]] for row, logits in each.items()}
        return CellMetrics(self.reading, [measure], before)

    def _logits(
        self, rows: Sequence[int], hooks: Sequence[Hook]
    ) -> Float[Tensor, "row look vocab"]:
        """What the model says at the last positions of these prompts, as many as count in any of them."""
        lm, looks = self.lm, max(self.reading.looks[row] for row in rows)
        batch = as_batch(lm, [list(self.reading.fed[row]) for row in rows], side="left")
        inputs = batch.inputs(lm) | lm.accepted(
            use_cache=False, return_dict=True, logits_to_keep=looks
        )
        manager = HookManager(lm, hooks)
        manager.refuse_checkpoints()
        with manager:
            manager.expect(batch)
            return logits_of(lm.model(**inputs))[:, -looks:]

    def _hooks(self, vector: Float[Tensor, " d"], rows: Sequence[int]) -> list[Hook]:
        """The vector added in each of these prompts; those with the same positions share a hook."""

        def added(values: Tensor) -> Tensor:
            return values + vector.to(device=values.device, dtype=values.dtype)

        if self.places is None:
            return [edit(self.site, added)]
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault(self.places[row], []).append(place)
        return [
            edit(self.site, added, pos=places, rows=numbers) for places, numbers in alike.items()
        ]


def aim(
    lm: LM,
    site: str | AnySite,
    prompts: Prompts,
    target: MetricLike | str | list[str],
    pos: PosLike,
) -> Aim:
    """The target of a fit, checked against the model and the prompts."""
    texts = isinstance(target, str) or (
        isinstance(target, list) and all(isinstance(text, str) for text in target)
    )
    found = as_metrics(loss(target) if texts else target)  # pyright: ignore[reportArgumentType]
    chosen = not_square(lm.expand(site), "a vector is added to")
    for several, word in ((found, "targets"), (chosen, "sites")):
        if len(several) != 1:
            raise BadHook(
                f"{len(several)} {word} were given, and a vector is fitted to one at one place: name it"
            )
    reading = read(lm, prompts, found, -1)
    where = inner(pos, None, None, chosen)
    places = None if where.pos is None else tuple(_places(reading, where, pos))
    return Aim(lm, chosen[0], found[0], reading, places)


def _places(reading: SweepInputs, where: Where, pos: PosLike) -> Iterator[tuple[int, ...]]:
    """The positions of each prompt, those on its continuation too."""
    for row, wanted in enumerate(reading.full.wishes(where)):
        assert wanted is not None
        places = tuple(place for place in range(reading.lengths[row]) if place in wanted)
        if not places:
            raise EmptySelection(f"prompt {row} has no token at pos={pos!r}: give other positions")
        yield places


@checks_arguments
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
    """The vector that moves a target most when it is added at a site, found by gradient descent with the model's
    weights frozen (Subramani et al. 2022).

    target    a metric whose mean over the prompts is to rise, at their last token (`hk.logit_diff`, `hk.logprob` …, a
              function of the logits); or continuations, one text for all prompts or one for each, whose loss is to fall
    pos       where the vector is added: everywhere, on a continuation too; or at these positions of each prompt
    lr        about how far one of the `steps` of Adam goes, as a fraction of the stream's median length there
    dose      the longest that the vector may become, as such a fraction; without it nothing holds it
    seed      without one, the vector begins at zero; with one, at a random vector as long as a step
    batch     prompts that run together: memory does not grow with the others
    progress  True or False; left out, a bar is shown in a terminal

    The same call gives the same numbers. `about["curve"]` has the target's mean before each step and after the last, in
    its own units. `BadHook` where the target has no slope to follow.

    >>> fitted = fit_vector(lm, "resid_post.20", ["I take my tea with"], logprob(" sugar"), steps=2, progress=False)
    >>> fitted.about["curve"][-1] > fitted.about["curve"][0]
    True
    """
    if steps < 1 or number(lr, "lr") <= 0:
        raise BadHook(
            f"steps={steps!r} and lr={lr!r}: give 1 step or more, and a step longer than 0"
        )
    if dose is not None and number(dose, "dose") <= 0:
        raise BadHook(
            f"dose={dose}: give the longest that the vector may become, as a fraction of the stream's length"
        )
    aimed = aim(lm, site, prompts, target, pos)
    rows = aimed.reading.rows
    stream = streams(lm, rows, [aimed.site], pos, batch)[aimed.site]
    norm, width = typical(stream.lengths), stream.means.shape[1]
    warn_of_dropout(lm)
    with torch.inference_mode(False), frozen(lm.root):
        start = torch.zeros(width)
        if seed is not None:
            start = Vector(aimed.site, torch.ones(width), norm).random(seed=seed).unit().tensor * (
                lr * norm
            )
        descent = Descent(
            aimed, steps, lr * norm / width**0.5, None if dose is None else dose * norm, batch
        )
        vector, curve = descent.run(start, progress)
    about = {
        **model_words(lm),
        "method": "learnt",
        "pos": repr(pos),
        "target": aimed.words,
        "prompts": [len(rows)],
    }
    about |= {
        "data_sha256": data_hash(rows, aimed.reading.fed),
        "steps": steps,
        "lr": lr,
        "dose": dose,
        "seed": seed,
    }
    return Vector(aimed.site, vector, norm, {**about, "curve": curve})


@dataclass(frozen=True, eq=False)
class Descent:
    """Steps of Adam towards an aim: how many, how large in each number, how long the vector may become."""

    aim: Aim
    steps: int
    lr: float
    longest: float | None
    batch: int

    def run(
        self, start: Float[Tensor, " d"], progress: bool | None
    ) -> tuple[Float[Tensor, " d"], list[float]]:
        """The vector after the last step, and the target's mean before each step and at the end."""
        vector = start.to(self.aim.lm.device).clone().requires_grad_()
        adam = torch.optim.Adam([vector], lr=self.lr)
        curve: list[float] = []
        shown = None if progress is None else not progress
        for _ in tqdm(range(self.steps), unit="step", disable=shown):
            value, slope = self._mean(vector)
            curve.append(value)
            if not bool(slope.any()):
                raise BadHook(
                    f"{self.aim.words} does not change with a vector at {self.aim.site}, so that there is no slope to "
                    "follow: add it where the target's position reads it, or (for kl, flat at the start) give seed="
                )
            vector.grad = slope if self.aim.falls else -slope
            adam.step()
            if self.longest is not None:
                with torch.no_grad():
                    vector *= (self.longest / vector.norm().clamp(min=1e-30)).clamp(max=1)
        with torch.no_grad():
            curve.append(
                sum(float(self.aim.values(vector, rows).sum()) for rows in self._batches())
                / self._count
            )
        return vector.detach(), curve

    def _mean(self, vector: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """The target's mean over the prompts, and its gradient."""
        value, slope = 0.0, torch.zeros_like(vector)
        for rows in self._batches():
            part, gradient = self.aim.gradient(vector, rows)
            value, slope = value + float(part), slope + gradient
        return value / self._count, slope / self._count

    @property
    def _count(self) -> int:
        return len(self.aim.reading)

    def _batches(self) -> Sequence[range]:
        return [
            range(at, min(at + self.batch, self._count)) for at in range(0, self._count, self.batch)
        ]
