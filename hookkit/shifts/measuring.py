"""The forwards of a report, one for each edit over all prompts, and what they say of every prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..captured import Captured, Kept
from ..distributions import Distribution, expected
from ..hooks.base import Hook
from ..hooks.looking import capture
from ..model import LM
from ..prompts import Row
from ..ranking import rank_among, shown_ranks
from ..runs import Run, forward
from ..sites import Site
from .naming import Edit, literal
from .resuming import seen_from, with_those_below

FIRST = "what was first"  # the token that led before the edit, which is another for each prompt
COMPARED = ("logit", "logprob", "prob", "rank")
Logits = Float[Tensor, "row vocab"]


@dataclass(frozen=True, eq=False)
class Answers:
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
    unedited: Kept | None = None,
) -> Answers:
    """One forward over all prompts with these hooks, which keeps the looked-at sites of the first `shown` of them.

    Where it begins with the block `start`, those below that are taken from what was kept `unedited`.
    """
    whole = [_look(looks, shown)] if looks else []
    passed = seen_from(looks, start)
    run = forward(lm, [list(row) for row in rows], *hooks, *([_look(passed, shown)] if passed else []), logits="last")
    kept = run.captured_logits()
    logits = kept.values[:, 0].detach().float().cpu()
    run = replace(run, hooks=(*hooks, *whole), output=None, kept_logits=_first(kept, shown))
    if unedited is not None and looks:
        run = replace(run, kept=with_those_below(run.kept, unedited))
    return Answers(edit, run, logits)


def _look(sites: Sequence[Site], shown: int) -> Hook:
    return capture(list(sites), pos=-1, rows=range(shown), name="hookkit.shifts")


def _first(kept: Captured, shown: int) -> Captured:
    assert kept.positions is not None
    return replace(kept, values=kept.values[:shown].clone(), positions=kept.positions[:shown], rows=kept.rows[:shown],
                   prompts=kept.prompts[:shown])  # fmt: skip


def watched_of(was: Answers, now: Answers, watch: Sequence[int]) -> pd.DataFrame:
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
        found: dict[str, object] = {"row": range(count), "edit": now.edit.name, "control": now.edit.control}
        found |= {
            "draw": now.edit.draw,
            "watched": name,
            "token": [literal(now.lm, token) for token in tokens],
            "token_id": tokens,
        }
        for when, each in (("before", was), ("after", now)):
            logprob = each.logprobs.gather(1, ids[:, None])[:, 0]
            numbers = {"logit": each.logits.gather(1, ids[:, None])[:, 0], "logprob": logprob, "prob": logprob.exp()}
            found |= {f"{key}_{when}": values.double().numpy() for key, values in numbers.items()}
            found[f"rank_{when}"] = shown_ranks(each.ranks(ids)).numpy()
        parts.append(pd.DataFrame(found))
    return with_deltas(pd.concat(parts, ignore_index=True)).sort_values("row", kind="stable", ignore_index=True)


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


def distances_of(was: Answers, now: Answers) -> pd.DataFrame:
    """How far each prompt's whole distribution moved.

    Columns: row, edit, control, draw, kl (KL(before‖after), nats), entropy_before, _after, _delta (nats), top1_before,
    top1_after, top1_changed.
    """
    assert now.edit is not None
    kl = expected(was.exact, was.exact - now.exact).clamp(min=0.0)
    entropy = {"entropy_before": was.entropy, "entropy_after": now.entropy, "entropy_delta": now.entropy - was.entropy}
    return pd.DataFrame(
        {"row": range(len(kl)), "edit": now.edit.name, "control": now.edit.control, "draw": now.edit.draw}
        | {"kl": kl.tolist()}
        | {name: values.tolist() for name, values in entropy.items()}
        | {name: each.named_first for name, each in (("top1_before", was), ("top1_after", now))}
        | {"top1_changed": _changed(was, now)}
    )


def _changed(was: Answers, now: Answers) -> list[bool | None]:
    """Whether each prompt's most likely token is another; None where logits are NaN."""
    pairs = zip(was.named_first, now.named_first, strict=True)
    return [None if one is None or other is None else one != other for one, other in pairs]
