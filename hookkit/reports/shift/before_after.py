"""The forwards of a report, one for each edit over all prompts, and what they say of every prompt.

Forwards that begin where an edit does: what is below the edited block is what it was without the edit.

What is written before and after the edits, and where the texts part.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import HookkitError
from ...hooks.base import Hook
from ...hooks.capture import capture
from ...hooks.captured_values import Captured, Captures, LazyCapture
from ...lenses.model_end import ending
from ...models.lm import LM
from ...models.overrides import Lent
from ...models.prompts import Row
from ...models.sites import Site
from ...models.tokens import rank_among, shown_ranks
from ...runs.forward import forward
from ...runs.generate import generate
from ...runs.manager import HookManager
from ...runs.partial import passed_by
from ...runs.run import Run
from ...runs.taps import HookPoint, planned
from ...sweeps.shortcuts import shortcuts
from ...tables.distributions import Distribution, expected
from .named_edits import Edit, literal

WORTH = 512  # tokens that edits would pass through the model, below which a trial of the shortcut costs more


@dataclass(frozen=True, eq=False)
class Resuming:
    """What the blocks before edited ones gave in the unedited forward, by their numbers."""

    lm: LM
    starts: dict[int, int]  # of each edit, by its place, the first block that it touches
    given: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A block in which what is needed of a forward is kept."""
        with Lent() as lent:
            for number in {start - 1 for start in self.starts.values()}:
                lent.around(self._block(number), "forward", partial(self._noted, number))
            yield

    def _noted(self, number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.given[number] = inner(*args, **kwargs)
        return self.given[number]

    @contextmanager
    def resumed(self, start: int) -> Iterator[None]:
        """A block in which forwards of the same prompts begin with this block; with 0 they are whole."""
        with Lent() as lent:
            for number in range(start - 1):
                kind = ending(self.lm).kinds[number]
                lent.around(self._block(number), "forward", passed_by(kind))
            if start:
                given = self.given[start - 1]
                lent.around(self._block(start - 1), "forward", lambda *_, **__: _copy(given))
            yield

    def _block(self, number: int) -> Any:
        return self.lm.submodule(self.lm.family.block.format(layer=number))


def _copy(given: Any) -> Any:
    return given.clone() if isinstance(given, Tensor) else (given[0].clone(), *given[1:])


def resuming(lm: LM, rows: Sequence[Row], edits: Sequence[tuple[Hook, ...]]) -> Resuming:
    """Which edits' forwards can begin at the block that they touch first. The model is seen to allow it in a trial; one
    that does not, or that carries hooks already, which would see blocks passed by, runs whole forwards."""
    none = Resuming(lm, {})
    if sum(map(len, rows)) * len(edits) < WORTH or lm.root.training or _carries_hooks(lm):
        return none
    try:
        starts = {place: _first_block(lm, hooks) for place, hooks in enumerate(edits)}
    except HookkitError:
        return none
    starts = {place: start for place, start in starts.items() if start > 0}
    return Resuming(lm, starts) if starts and shortcuts(lm).grow else none


def _carries_hooks(lm: LM) -> bool:
    """True where a forward is seen by others: hooks of the user's, or those of an outer block of hookkit's."""
    return any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (*lm.wrapping, *lm.root.modules())
    )


def _first_block(lm: LM, hooks: tuple[Hook, ...]) -> int:
    """The first block that hooks touch: the number of blocks for those that act behind them, 0 for others."""
    known = ending(lm)
    blocks = {lm.family.block.format(layer=number): number for number in range(lm.n_layers)}

    def first(tap: HookPoint) -> int:
        parts = tap.place.path.split(".")
        inside = (blocks.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
        return next(
            (number for number in inside if number is not None),
            lm.n_layers if known.has(tap) else 0,
        )

    return min(
        (first(tap) for tap in planned(lm, list(hooks), HookManager(lm, ()).reference)), default=0
    )


def seen_from(sites: Sequence[Site], start: int) -> list[Site]:
    """The sites that a forward from this block on passes."""
    return [site for site in sites if site.layer is None or site.layer >= start]


def with_those_below(kept: Captures, unedited: Captures) -> Captures:
    """What a resumed forward kept, and below it what the unedited one did, in its order."""
    mine = {slot.site: slot for slot in kept.slots}
    slots: list[LazyCapture] = [mine.pop(slot.site, slot) for slot in unedited.slots]
    return Captures((*slots, *mine.values()))


FIRST = "what was first"  # the token that led before the edit, which is another for each prompt
COMPARED = ("logit", "logprob", "prob", "rank")
Logits = Float[Tensor, "row vocab"]


@dataclass(frozen=True, eq=False)
class NextTokenLogits:
    """What the model says after each prompt, and the run, which keeps no more than the shown rows."""

    edit: Edit | None
    run: Run
    logits: Logits  # float32, on the CPU

    @property
    def lm(self) -> LM:
        return self.run.lm

    @cached_property
    def logprobs(self) -> Logits:
        return self.logits.log_softmax(-1)

    @cached_property
    def exact(self) -> Logits:
        """In float64, for sums over the vocabulary."""
        return self.logits.double().log_softmax(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, " row"]:
        return 0.0 - expected(self.exact, self.exact)

    @cached_property
    def first(self) -> list[int]:
        """The most likely token of each prompt."""
        return self.logits[:, : self.lm.n_tokens or None].argmax(-1).tolist()

    @property
    def named_first(self) -> list[str | None]:
        """The most likely tokens by name; None where logits are NaN and no token is."""
        unknown = self.logits.isnan().any(-1).tolist()
        names = [literal(self.lm, token) for token in self.first]
        return [None if nan else name for name, nan in zip(names, unknown, strict=True)]

    def ranks(self, ids: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """1 + the number of strictly larger logits, of one token for each prompt."""
        real = self.logits[:, : self.lm.n_tokens or None]
        return rank_among(real, self.logits.gather(1, ids[:, None])[:, 0])

    def said(self, row: int) -> Distribution:
        """What it says after one prompt."""
        place = {"row": row, "pos": self.run.prompt_lengths[row] - 1}
        return Distribution(self.lm, place, self.logits[row])


def answered(
    lm: LM,
    rows: Sequence[Row],
    hooks: tuple[Hook, ...],
    edit: Edit | None,
    looks: Sequence[Site],
    shown: int,
    start: int = 0,
    unedited: Captures | None = None,
) -> NextTokenLogits:
    """One forward over all prompts with these hooks, which keeps the looked-at sites of the first `shown` of them.

    Where it begins with the block `start`, those below that are taken from what was kept `unedited`.
    """
    whole = [_look(looks, shown)] if looks else []
    passed = seen_from(looks, start)
    run = forward(
        lm,
        [list(row) for row in rows],
        *hooks,
        *([_look(passed, shown)] if passed else []),
        logits="last",
    )
    kept = run.captured_logits()
    logits = kept.values[:, 0].detach().float().cpu()
    run = replace(run, hooks=(*hooks, *whole), output=None, kept_logits=_first(kept, shown))
    if unedited is not None and looks:
        run = replace(run, kept=with_those_below(run.kept, unedited))
    return NextTokenLogits(edit, run, logits)


def _look(sites: Sequence[Site], shown: int) -> Hook:
    return capture(list(sites), pos=-1, rows=range(shown), name="hookkit.shifts")


def _first(kept: Captured, shown: int) -> Captured:
    assert kept.positions is not None
    return replace(kept, values=kept.values[:shown].clone(), positions=kept.positions[:shown], rows=kept.rows[:shown],
                   prompts=kept.prompts[:shown])  # fmt: skip


def watched_of(was: NextTokenLogits, now: NextTokenLogits, watch: Sequence[int]) -> pd.DataFrame:
    """Every prompt's watched tokens, and the token that was first, before and after one edit.

    Columns: row, edit, control, draw (of a random control), watched, token, token_id; logit, logprob, prob and rank,
    each with _before, _after and _delta; shift; decades (log10 of rank before over rank after: 1 for a rise from 100 to
    10).
    """
    assert now.edit is not None
    count, parts = len(now.logits), []
    names = {literal(now.lm, token): [token] * count for token in watch} | {FIRST: was.first}
    for name, tokens in names.items():
        ids = torch.tensor(tokens)
        found: dict[str, object] = {
            "row": range(count),
            "edit": now.edit.name,
            "control": now.edit.control,
        }
        found |= {
            "draw": now.edit.draw,
            "watched": name,
            "token": [literal(now.lm, token) for token in tokens],
            "token_id": tokens,
        }
        for when, each in (("before", was), ("after", now)):
            logprob = each.logprobs.gather(1, ids[:, None])[:, 0]
            numbers = {
                "logit": each.logits.gather(1, ids[:, None])[:, 0],
                "logprob": logprob,
                "prob": logprob.exp(),
            }
            found |= {f"{key}_{when}": values.double().numpy() for key, values in numbers.items()}
            found[f"rank_{when}"] = shown_ranks(each.ranks(ids)).numpy()
        parts.append(pd.DataFrame(found))
    return with_deltas(pd.concat(parts, ignore_index=True)).sort_values(
        "row", kind="stable", ignore_index=True
    )


def with_deltas(table: pd.DataFrame) -> pd.DataFrame:
    """The table with after minus before of what is compared, in the order of the other tables."""
    for name in COMPARED:
        was, now = table[f"{name}_before"], table[f"{name}_after"]
        table[f"{name}_delta"] = (now - was).where(now != was, 0)  # -inf minus -inf is no change
    table["shift"] = -table["rank_delta"]
    table["decades"] = np.log10(table["rank_before"] / table["rank_after"])
    order = [f"{name}_{when}" for name in COMPARED for when in ("before", "after", "delta")]
    places = [name for name in table.columns if name not in (*order, "shift", "decades")]
    return pd.DataFrame(table[[*places, *order, "shift", "decades"]])


def distances_of(was: NextTokenLogits, now: NextTokenLogits) -> pd.DataFrame:
    """How far each prompt's whole distribution moved.

    Columns: row, edit, control, draw, kl (KL(before‖after), nats), entropy_before, _after, _delta (nats), top1_before,
    top1_after, top1_changed.
    """
    assert now.edit is not None
    kl = expected(was.exact, was.exact - now.exact).clamp(min=0.0)
    entropy = {
        "entropy_before": was.entropy,
        "entropy_after": now.entropy,
        "entropy_delta": now.entropy - was.entropy,
    }
    return pd.DataFrame(
        {
            "row": range(len(kl)),
            "edit": now.edit.name,
            "control": now.edit.control,
            "draw": now.edit.draw,
        }
        | {"kl": kl.tolist()}
        | {name: values.tolist() for name, values in entropy.items()}
        | {name: each.named_first for name, each in (("top1_before", was), ("top1_after", now))}
        | {"top1_changed": _changed(was, now)}
    )


def _changed(was: NextTokenLogits, now: NextTokenLogits) -> list[bool | None]:
    """Whether each prompt's most likely token is another; None where logits are NaN."""
    pairs = zip(was.named_first, now.named_first, strict=True)
    return [None if one is None or other is None else one != other for one, other in pairs]


def texts_of(
    lm: LM, rows: Sequence[Row], baseline: tuple[Hook, ...], edits: Sequence[Edit], count: int
) -> pd.DataFrame:
    """Greedy texts of `count` tokens after every prompt, without and with each edit.

    Columns: row, edit, before, after (what was written), parts_at (the first token that differs, counted from 0; empty
    where none does), both (the text up to there), then_before, then_after (the texts from there on).
    """
    prompts = [list(row) for row in rows]
    settings = {"max_new_tokens": count, "do_sample": False, "logits": False}
    was = generate(lm, prompts, *baseline, **settings)
    parts = []
    for edit in edits:
        now = generate(lm, prompts, *edit.hooks, **settings)
        parts += [
            {"row": row, "edit": edit.name, **_parted(lm, was, now, row)}
            for row in range(len(prompts))
        ]
    return pd.DataFrame(parts).astype({"parts_at": "Int64"})


def _parted(lm: LM, was: Run, now: Run, row: int) -> dict[str, object]:
    one, two = _written(was, row), _written(now, row)
    differ = [place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    at = None if one == two else (differ or [min(len(one), len(two))])[0]
    both = lm.text(one[:at])
    rests = [lm.added(one[:at], tokens[at:]) if at is not None else "" for tokens in (one, two)]
    return {"before": was.generated[row], "after": now.generated[row], "parts_at": at, "both": both,
            "then_before": rests[0], "then_after": rests[1]}  # fmt: skip


def _written(run: Run, row: int) -> list[int]:
    return run.tokens[row, run.prompt_lengths[row] : run.lengths[row]].tolist()
