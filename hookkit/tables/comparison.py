"""An edited generation beside the unedited one, and a generation that takes another turn.

both = hk.compare(lm, "I like oat milk in my", hk.ban(" coffee"), max_new_tokens=20)
both.texts                     # both texts, and where they part
both.shifts, both.summary      # how far the distributions are apart, step by step along one text
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments, read_tokens
from ..display import records, shown
from ..errors import BadHook, OutOfRange, Unsupported
from ..hooks.base import EVERY_STEP, Hook
from ..hooks.capture import Capture
from ..hooks.captured_values import Captured
from ..hooks.conditions import Phrase
from ..hooks.logits import Force, LogitEdit
from ..models.lm import LM
from ..models.positions import Where, chosen
from ..models.prompts import Prompts, as_batch
from ..models.sites import Site, Sites
from ..models.tokens import Token
from ..runs.generate import generate, traced
from ..runs.random_state import Draws
from ..runs.run import Run
from ..runs.trace import Trace, Tracer
from .distributions import Distribution
from .rank_tables import Pair, shift_of, summary_of

ALONG = Sites((Site("logits"),))


@dataclass(frozen=True, eq=False)
class Comparison:
    """An edited generation beside the unedited one. Made by `compare`.

    run      both, in one batch with a trace: the edited rows first, then the unedited ones
    along    whose text `shifts` and `summary` go along: "edited" or "baseline"
    """

    run: Run
    along: Literal["edited", "baseline"]
    asked: Trace
    _hooks: tuple[Hook, ...]

    @property
    def count(self) -> int:
        """How many prompts were compared."""
        return len(self.run.lengths) // 2

    def tokens(self, row: int, which: Literal["edited", "baseline"]) -> list[int]:
        """The generated tokens of a prompt, in one of the two texts."""
        row = row if which == "edited" else row + self.count
        return self.run.tokens[row, self.run.prompt_lengths[row] : self.run.lengths[row]].tolist()

    @cached_property
    def texts(self) -> pd.DataFrame:
        """Columns: row, baseline, edited (what was generated, as text), parts_at (the first step at which the tokens
        differ; empty where they never do)."""
        found = []
        for row in range(self.count):
            one, two = self.tokens(row, "edited"), self.tokens(row, "baseline")
            differ = [n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
            parts = None if one == two else (differ or [min(len(one), len(two))])[0]
            baseline, edited = self.run.generated[row + self.count], self.run.generated[row]
            found.append({"row": row, "baseline": baseline, "edited": edited, "parts_at": parts})
        return pd.DataFrame(found).astype({"parts_at": "Int64"})

    @cached_property
    def shifts(self) -> pd.DataFrame:
        """`rank_shift` of every step, before the edits and after them, where both read the same text. Columns as in
        `rank_shift`, with `step`."""
        named = [i for h in self._hooks if isinstance(h, LogitEdit) for i in h.named(self.run.lm)]
        watched = [self.run.lm.token(token) for token in self.asked.watch]
        return shift_of(self._pairs, self.asked.top, 3, watched, list(dict.fromkeys(named)))

    @cached_property
    def summary(self) -> pd.DataFrame:
        """`shift_summary` of every step where both read the same text. Columns as in `shift_summary`, with `step`."""
        return summary_of(self._pairs)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """What the unedited and the edited model say at each step of the same text."""
        texts = [self.tokens(row, self.along) for row in range(self.count)]
        rows = range(2 * self.count)
        look = Capture(ALONG, Where(step=EVERY_STEP), name="hookkit.compare")
        wait = max(map(len, texts))
        follow = [_written(texts[row % self.count], row) for row in rows]
        prompts = [self.run.tokens[row, : self.run.prompt_lengths[row]].tolist() for row in rows]
        again = generate(
            self.run.lm, prompts, *self._hooks, look, *follow, logits=False,
            max_new_tokens=wait, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        said = again.captured("logits", look.name)
        return [
            (_at(said, row + self.count, step, self.run), _at(said, row, step, self.run))
            for row, text in enumerate(texts)
            for step in range(len(text))
        ]

    def _repr_html_(self) -> str:
        return shown(f"Comparison along the {self.along} text", rows=records(self.texts))


def _at(said: Captured, row: int, step: int, run: Run) -> Distribution:
    count = len(run.lengths) // 2
    place = {"row": row % count, "pos": run.prompt_lengths[row] - 1 + step, "step": step}
    return Distribution(run.lm, place, said.values[row, step].float().cpu())


def _written(tokens: list[int], row: int) -> Force:
    """A hook that lets a row say these tokens from step 0 on."""
    where = Where(rows=(row,), step=EVERY_STEP)
    return Force(ALONG, where, Phrase(tuple(tokens)), math.inf)


class Paired(Tracer):
    """Lets the two halves of a batch draw with the same random numbers, by the Gumbel-max trick: the token with the
    largest sum of logit and noise is distributed as softmax says (Maddison et al., 2014)."""

    def processed(self, scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        scores = super().processed(scores)
        if self.generation.mode != "sample":
            return scores
        noise = -torch.empty_like(scores[: len(scores) // 2]).exponential_().log()
        drawn = (scores + torch.cat([noise, noise])).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


@checks_arguments
def compare(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    along: Literal["edited", "baseline"] = "baseline",
    top: int = 5,
    watch: Iterable[Token] | Token = (),
    seed: int | None = None,
    **arguments: Any,
) -> Comparison:
    """Generate with the hooks and without them, in one batch and with the same random numbers.

    Both halves draw with the same noise, so that the texts part only where the edits part them. A logits processor, a
    stopping criterion and `prefix_allowed_tokens_fn` see each half by itself, with its prompts numbered from 0; the
    unedited half has a copy of them. `shifts` and `summary`
    compare what both say at each step along one text, `along` the "baseline" or the "edited" one: there the steps can
    be compared after the texts have parted too.

    >>> both = compare(lm, "I like oat milk in my", ban(" coffee"), max_new_tokens=3, do_sample=False)
    >>> both.texts["parts_at"].tolist()
    [0]
    """
    if along not in ("edited", "baseline"):
        raise BadHook(f"along={along!r} is unknown: say 'edited' or 'baseline'")
    if not hooks:
        raise BadHook(
            "compare() was given no hook: there is nothing to compare the unedited text with"
        )
    _refuse_several(lm, arguments)
    rows = as_batch(lm, prompts, side="left").rows
    arguments = _for_both_halves(lm, arguments, len(rows))
    mine = tuple(_for_rows(hook, len(rows)) for hook in hooks)
    asked = Trace(top, read_tokens(watch, "watch"))
    run = traced(
        lm, [*rows, *rows], mine, False, Draws(lm, seed), Paired(lm, asked, mine), arguments
    )
    return Comparison(run, along, asked, mine)


def _for_rows(hook: Hook, count: int) -> Hook:
    """The same hook, for the first rows of a larger batch."""
    return replace(hook, where=replace(hook.where, rows=tuple(chosen(hook.where.rows, count))))


def _refuse_several(lm: LM, arguments: Mapping[str, Any]) -> None:
    config: Any = arguments.get("generation_config") or getattr(lm.root, "generation_config", None)
    for name in ("num_beams", "num_return_sequences"):
        count = arguments.get(name)
        count = getattr(config, name, None) if count is None else count
        if (count or 1) > 1:
            raise Unsupported(
                f"one text for each prompt is needed here, and {name} is {count}: leave it out, or set it to 1"
            )


def _for_both_halves(lm: LM, arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments of generate for a batch that has each of `count` prompts twice."""
    changed = dict(arguments)
    for name, value in arguments.items():
        for_rows = isinstance(value, Tensor) and value.ndim > 0 and name in lm.takes
        if value is not None and (
            for_rows or name in ("past_key_values", "encoder_outputs", "streamer")
        ):
            raise Unsupported(
                f"{name}= was given to compare, which runs each prompt twice in one batch, so that its rows would be "
                "others than yours: leave it out, or call generate twice, with the hooks and without them"
            )
    allowed = arguments.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        changed["prefix_allowed_tokens_fn"] = lambda number, ids: allowed(number % count, ids)
    for name in ("logits_processor", "stopping_criteria"):
        given = arguments.get(name)
        if given:
            changed[name] = [_Halves(given, name, count)]
    return changed


class _Halves:
    """Logits processors, or stopping criteria, for the two halves of a batch. What they remember is of one half."""

    def __init__(self, given: Sequence[Any], name: str, count: int) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        kind: Any = LogitsProcessorList if name == "logits_processor" else StoppingCriteriaList
        self.count = count
        self.edited: Any = kind(given)
        try:
            self.baseline: Any = kind(copy.deepcopy(list(given)))
        except Exception as error:
            raise Unsupported(
                f"{name}= has one that cannot be copied ({type(error).__name__}: {error}), and compare needs one for "
                "each half of its batch: call generate twice, with the hooks and without them"
            ) from error

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        first, second = input_ids[: self.count], input_ids[self.count :]
        some, others = scores, scores
        if isinstance(scores, Tensor):
            some, others = scores[: self.count], scores[self.count :]
        elif scores is not None:  # of a stopping criterion: those of each step so far
            some = tuple(step[: self.count] for step in scores)
            others = tuple(step[self.count :] for step in scores)
        return torch.cat([self.edited(first, some), self.baseline(second, others)])


@checks_arguments
def fork(run: Run, *, step: int, token: Token, row: int = 0) -> Run:
    """The generation again, with another token at one step of a row, and whatever follows from it.

    The row says again what it said before that step; hooks, settings and, where the run had one, the seed are those of
    the run, so that steps and draws keep their meaning. The other rows run on as before.

    >>> run = generate(lm, "I like oat milk in my", max_new_tokens=4, do_sample=False)
    >>> fork(run, step=0, token=" tea").generated[0].startswith(" tea")
    True
    """
    if run.settings["verb"] != "generate":
        raise Unsupported(
            "this run is of one forward: only what was generated can take another turn"
        )
    _refuse_several(run.lm, run.arguments)
    chosen(row, len(run.lengths))
    start, end = run.prompt_lengths[row], run.lengths[row]
    if not 0 <= step < end - start:
        raise OutOfRange(
            f"step={step!r} was asked for, and row {row} has steps 0 to {end - start - 1}"
        )
    tokens = [*run.tokens[row, start : start + step].tolist(), run.lm.token(token)]
    prompts = [run.tokens[n, :length].tolist() for n, length in enumerate(run.prompt_lengths)]
    asked = None if run.recorded is None else run.recorded.asked
    return generate(
        run.lm, prompts, *run.hooks, _written(tokens, row), logits=run.settings["logits"], trace=asked,
        seed=run.settings.get("seed"), **run.arguments,
    )  # fmt: skip
