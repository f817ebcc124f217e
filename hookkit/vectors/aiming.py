"""What a target is when a vector is added: its value on some prompts, as autograd can follow it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, EmptySelection
from ..hooks.base import Hook, inner, not_square
from ..hooks.edits import edit
from ..manager import HookManager
from ..metrics import Loss, Metric, MetricLike, OfLogits, as_metrics, loss
from ..model import LM
from ..padding import logits_of
from ..positions import PosLike, Where
from ..prompts import Prompts, as_batch
from ..sites import AnySite
from ..sweeps.reading import Reading, read
from ..sweeps.saying import Saying
from ..training import refuse_no_gradient


@dataclass(frozen=True, eq=False)
class Aim:
    """A metric of prompts with a vector added at a site; `places` are the positions of each prompt, None for all."""

    lm: LM
    site: AnySite
    metric: Metric
    reading: Reading
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
    def _saying(self) -> Saying:
        """The metric, with what the model says without the vector where the metric compares."""
        measure, before = self.metric.bound(self.lm, len(self.reading)), None
        if self.metric.compares:
            looks = self.reading.looks
            with torch.no_grad():
                each = {row: self._logits([row], [])[0] for row in range(len(self.reading))}
            before = {row: logits[-looks[row]] for row, logits in each.items()}
        return Saying(self.reading, [measure], before)

    def _logits(self, rows: Sequence[int], hooks: Sequence[Hook]) -> Float[Tensor, "row look vocab"]:
        """What the model says at the last positions of these prompts, as many as count in any of them."""
        lm, looks = self.lm, max(self.reading.looks[row] for row in rows)
        batch = as_batch(lm, [list(self.reading.fed[row]) for row in rows], side="left")
        inputs = batch.inputs(lm) | lm.accepted(use_cache=False, return_dict=True, logits_to_keep=looks)
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
        for number, row in enumerate(rows):
            alike.setdefault(self.places[row], []).append(number)
        return [edit(self.site, added, pos=places, rows=numbers) for places, numbers in alike.items()]


def aim(lm: LM, site: str | AnySite, prompts: Prompts, target: MetricLike | str | list[str], pos: PosLike) -> Aim:
    """The target of a fit, checked against the model and the prompts."""
    texts = isinstance(target, str) or (isinstance(target, list) and all(isinstance(text, str) for text in target))
    found = as_metrics(loss(target) if texts else target)  # pyright: ignore[reportArgumentType]
    chosen = not_square(lm.expand(site), "a vector is added to")
    for several, word in ((found, "targets"), (chosen, "sites")):
        if len(several) != 1:
            raise BadHook(f"{len(several)} {word} were given, and a vector is fitted to one at one place: name it")
    reading = read(lm, prompts, found, -1)
    where = inner(pos, None, None, chosen)
    places = None if where.pos is None else tuple(_places(reading, where, pos))
    return Aim(lm, chosen[0], found[0], reading, places)


def _places(reading: Reading, where: Where, pos: PosLike) -> Iterator[tuple[int, ...]]:
    """The positions of each prompt, those on its continuation too."""
    for number, wanted in enumerate(reading.full.wishes(where)):
        assert wanted is not None
        places = tuple(place for place in range(reading.lengths[number]) if place in wanted)
        if not places:
            raise EmptySelection(f"prompt {number} has no token at pos={pos!r}: give other positions")
        yield places
