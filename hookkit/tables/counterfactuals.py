"""Comparisons of generations: an edited one beside an unedited one, and one with another token.

both = hk.compare_generations(lm, "I like oat milk in my", hk.ban(" coffee"), max_new_tokens=20)
both.texts                     # both texts, and the step from which on they differ
both.shifts, both.summary      # how far the distributions are apart, step by step along one text
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments
from ..display import count_of, describe_outcome, first_rows, render_html
from ..errors import BadHook, OutOfRange, Unsupported
from ..hooks.base import EVERY_STEP, Hook
from ..hooks.capture import Capture
from ..hooks.grammar import Grammar
from ..hooks.logits import Force, named_tokens
from ..models.lm import LM
from ..models.positions import Where, resolve_rows
from ..models.prompts import Prompts, as_batch
from ..models.sites import Site, Sites
from ..models.tokens import Token
from ..models.words import Word, WordLike, check_words
from ..runs.generate import Draws, generate, generate_with_tracer
from ..runs.run import Run
from ..runs.trace import Trace, Tracer
from .distributions import Distribution
from .rank_tables import Pair, shift_table, summary_table, watched_ids

LOGITS = Sites((Site("logits"),))


@dataclass(frozen=True, eq=False)
class Comparison:
    """An edited generation beside the unedited one. Made by `compare_generations`.

    run      both, in one batch with a trace: the edited rows first, then the unedited ones
    along    the text along which `shifts` and `summary` compare: "edited" or "baseline"
    """

    run: Run
    along: Literal["edited", "baseline"]
    _trace: Trace
    _hooks: tuple[Hook, ...]

    @property
    def count(self) -> int:
        """The number of prompts."""
        return len(self.run.lengths) // 2

    def tokens(self, row: int, which: Literal["edited", "baseline"]) -> list[int]:
        """Returns the generated tokens of a prompt, in one of the two texts."""
        row = row if which == "edited" else row + self.count
        return self.run.tokens[row, self.run.prompt_lengths[row] : self.run.lengths[row]].tolist()

    @cached_property
    def texts(self) -> pd.DataFrame:
        """Columns: row, baseline, edited (the generated texts), first_difference (the first step at
        which the tokens differ; empty if they are the same)."""
        steps: list[int | None] = []
        for row in range(self.count):
            tokens = self.tokens(row, "baseline"), self.tokens(row, "edited")
            steps.append(first_difference(*tokens))
        generated = self.run.generated
        edited, baseline = generated[: self.count], generated[self.count :]
        table = pd.DataFrame({"row": range(self.count), "baseline": baseline, "edited": edited})
        return table.assign(first_difference=pd.array(steps, dtype="Int64"))

    @cached_property
    def shifts(self) -> pd.DataFrame:
        """`rank_shift` at every step, before the edits and after them, along the same text.

        Columns as in `rank_shift`, with `step`.
        """
        lm = self.run.lm
        watched = watched_ids(lm, self._trace.watch)
        named = named_tokens(lm, self._hooks)
        return shift_table(self._pairs, self._trace.top, 3, watched, named)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """`shift_summary` at every step, along the same text.

        Columns as in `shift_summary`, with `step`.
        """
        return summary_table(self._pairs)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """The unedited and the edited model's distributions at each step of the same text."""
        if self.along == "baseline" and any(isinstance(hook, Grammar) for hook in self._hooks):
            raise Unsupported(
                "the baseline text need not be one that the grammar allows, and has no numbers "
                'under it: compare along="edited"'
            )
        texts = [self.tokens(row, self.along) for row in range(self.count)]
        rows = range(2 * self.count)
        capture = Capture(LOGITS, Where(step=EVERY_STEP), name="hookkit.compare")
        forces = [_force_tokens(texts[row % self.count], row) for row in rows]
        run = generate(
            self.run.lm, list(self.run.prompts), *self._hooks, capture, *forces, logits=False,
            max_new_tokens=max(map(len, texts)), do_sample=False, eos_token_id=None,
        )  # fmt: skip
        logits = run.captured("logits", capture.name).values
        pairs = []
        for row, text in enumerate(texts):
            for step in range(len(text)):
                pos = self.run.prompt_lengths[row] - 1 + step
                location = {"row": row, "pos": pos, "step": step}
                after, before = logits[row :: self.count, step].float().cpu()
                distribution_at = partial(Distribution, self.run.lm, location)
                pairs.append((distribution_at(before), distribution_at(after)))
        return pairs

    def __repr__(self) -> str:
        steps: Any = self.texts["first_difference"]
        different = len(steps.dropna())
        text = (
            f"Comparison({count_of(self.count, 'prompt')}, {different} with another text; "
            f"along the {self.along} text)"
        )
        calls = ("comparison.texts", "comparison.shifts", "comparison.summary")
        return describe_outcome(text, *calls)

    def _repr_html_(self) -> str:
        return render_html(f"Comparison along the {self.along} text", rows=first_rows(self.texts))


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Returns the index of the first token that differs; None if the sequences are equal."""
    for index, (one, other) in enumerate(zip_longest(first, second)):
        if one != other:
            return index
    return None


def _force_tokens(tokens: list[int], row: int) -> Force:
    """Returns a hook that makes a row generate these tokens from step 0 on."""
    where = Where(rows=(row,), step=EVERY_STEP)
    return Force(LOGITS, where, Word(tuple(tokens)), math.inf)


class Paired(Tracer):
    """A tracer that lets the two halves of a batch draw with the same random numbers.

    It uses the Gumbel-max trick: the token with the largest sum of logit and noise is distributed
    as the softmax of the logits (Maddison et al., 2014).
    """

    def processed(self, scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        scores = super().processed(scores)
        if self.generation.mode != "sample":
            return scores
        noise = -torch.empty_like(scores[: len(scores) // 2]).exponential_().log()
        drawn = (scores + torch.cat([noise, noise])).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


@check_arguments
def compare_generations(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    along: Literal["edited", "baseline"] = "baseline",
    top: int = 5,
    watch: Iterable[WordLike] | WordLike = (),
    seed: int | None = None,
    **arguments: Any,
) -> Comparison:
    """Generates with the hooks and without them, in one batch and with the same random numbers.

    Both halves draw with the same noise, so that the texts differ only because of the edits. A
    logits processor, a stopping criterion and `prefix_allowed_tokens_fn` see each half by itself,
    with its prompts numbered from 0; the unedited half has a copy of them. `shifts` and `summary`
    compare both distributions at each step along one text, `along` the "baseline" or the "edited"
    one, so that steps can be compared even after the texts differ.

    >>> prompt, settings = "I like oat milk in my", {"max_new_tokens": 3, "do_sample": False}
    >>> both = compare_generations(lm, prompt, ban(" coffee"), **settings)
    >>> both.texts["first_difference"].tolist()
    [0]
    """
    if along not in ("edited", "baseline"):
        raise BadHook(f"along={along!r} is unknown: say 'edited' or 'baseline'")
    if not hooks:
        raise BadHook(
            "compare_generations() was given no hook: there is nothing to compare the unedited "
            "text with"
        )
    _refuse_several_texts(lm, arguments)
    rows = as_batch(lm, prompts, side="left").rows
    arguments = _for_both_halves(lm, arguments, len(rows))
    edits = tuple([_for_first_rows(hook, len(rows)) for hook in hooks])
    trace = Trace(top, check_words(watch, "watch"))
    tracer = Paired(lm, trace, edits)
    run = generate_with_tracer(lm, [*rows, *rows], edits, False, Draws(lm, seed), tracer, arguments)
    return Comparison(run, along, trace, edits)


def _for_first_rows(hook: Hook, count: int) -> Hook:
    """Returns the same hook, for the first `count` rows of a larger batch."""
    rows = tuple(resolve_rows(hook.where.rows, count))
    return replace(hook, where=replace(hook.where, rows=rows))


def _refuse_several_texts(lm: LM, arguments: Mapping[str, Any]) -> None:
    config: Any = arguments.get("generation_config") or getattr(lm.root, "generation_config", None)
    for name in ("num_beams", "num_return_sequences"):
        count = arguments.get(name) or getattr(config, name, None) or 1
        if count > 1:
            raise Unsupported(
                f"one text for each prompt is needed here, and {name} is {count}: "
                "leave it out, or set it to 1"
            )


def _for_both_halves(lm: LM, arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns generate's arguments for a batch that has each of `count` prompts twice."""
    _refuse_per_row(lm, arguments)
    batch_arguments = dict(arguments)
    allowed = arguments.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        batch_arguments["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row % count, ids)
    for name in ("logits_processor", "stopping_criteria"):
        if arguments.get(name):
            batch_arguments[name] = [_Halves(arguments[name], name, count)]
    return batch_arguments


def _refuse_per_row(lm: LM, arguments: Mapping[str, Any]) -> None:
    """Raises `Unsupported` for an argument that has a value for each row of the batch."""
    for name, value in arguments.items():
        is_per_row = isinstance(value, Tensor) and value.ndim > 0 and name in lm.takes
        is_state = name in ("past_key_values", "encoder_outputs", "streamer") and value is not None
        if is_per_row or is_state:
            raise Unsupported(
                f"{name}= was given to compare, which runs each prompt twice in one batch, so that "
                "its rows would be others than yours: leave it out, or call generate twice, with "
                "the hooks and without them"
            )


class _Halves:
    """Logits processors or stopping criteria for both halves of a batch. Each has its own copy."""

    def __init__(self, functions: Sequence[Any], name: str, count: int) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        kind: Any = LogitsProcessorList if name == "logits_processor" else StoppingCriteriaList
        self.count = count
        self.edited: Any = kind(functions)
        try:
            self.baseline: Any = kind(copy.deepcopy(list(functions)))
        except Exception as error:
            raise Unsupported(
                f"{name}= has one that cannot be copied ({type(error).__name__}: {error}), and "
                "compare needs one for each half of its batch: call generate twice, with the hooks "
                "and without them"
            ) from error

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        results = []
        halves = slice(None, self.count), slice(self.count, None)
        for functions, half in zip((self.edited, self.baseline), halves, strict=True):
            half_scores = scores
            if isinstance(scores, Tensor):
                half_scores = scores[half]
            elif scores is not None:  # a stopping criterion is given the scores of each step so far
                half_scores = tuple([step[half] for step in scores])
            results.append(functions(input_ids[half], half_scores))
        return torch.cat(results)


@check_arguments
def fork(run: Run, *, step: int, token: Token, row: int = 0) -> Run:
    """Generates again, with another token at one step of a row and new tokens after it.

    The row repeats its tokens before that step. Hooks, settings and, if the run had one, the seed
    are those of the run, so that steps and draws keep their meaning. The other rows are generated
    as before.

    >>> run = generate(lm, "I like oat milk in my", max_new_tokens=4, do_sample=False)
    >>> fork(run, step=0, token=" tea").generated[0].startswith(" tea")
    True
    """
    if run.settings["verb"] != "generate":
        raise Unsupported(
            "this run is of one forward: only what was generated can take another turn"
        )
    _refuse_several_texts(run.lm, run.arguments)
    resolve_rows(row, len(run.lengths))
    start, end = run.prompt_lengths[row], run.lengths[row]
    if not 0 <= step < end - start:
        raise OutOfRange(
            f"step={step!r} was asked for, and row {row} has steps 0 to {end - start - 1}"
        )
    tokens = [*run.tokens[row, start : start + step].tolist(), run.lm.token(token)]
    trace = None if run.recorded is None else run.recorded.settings
    return generate(
        run.lm, list(run.prompts), *run.hooks, _force_tokens(tokens, row),
        logits=run.settings["logits"], trace=trace, seed=run.settings.get("seed"), **run.arguments,
    )  # fmt: skip
