"""The base of all hooks on logits, and `force`, whose token `generate` takes.

Logit edits act on the logits that the model returns, after any soft-cap or scaling, and before the
decoding rules of `generate`. By default they act at the prompt's last position and at every
generated step; a masked language model writes nothing, and needs `pos=`. With `when=`, they act
where a condition on the logits holds too.

`Decisions` makes `generate` take the forced tokens in every decoding mode. Rules of transformers
(temperature, top_p, suppress_tokens …) are overruled. A constraint of the caller
(`prefix_allowed_tokens_fn`, `logits_processor`) that rules the token out raises an error. So does a
rule that forbids every token that a grammar allows, or allows one that the grammar forbids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import check_keywords, check_number
from ..errors import BadEdit, BadHook, NotOneToken
from ..models.batch_positions import DecidedToken, SequenceBatch
from ..models.lm import LM
from ..models.positions import IndicesLike, PosLike, Span, Where
from ..models.sites import LOGIT_SITES, AnySite, ModuleSite, as_sites
from ..models.tokens import check_token
from ..models.words import Word, WordLike, check_words
from .base import (
    EVERY_STEP,
    Binding,
    Change,
    EditContext,
    EditHook,
    When,
    as_tuple,
    as_where,
    set_field,
)
from .conditions import offsets_of_tokens
from .rulings import check_ruling
from .values import overflow_message

Logits: TypeAlias = Float[Tensor, "row pos vocab"]
Scores: TypeAlias = Float[Tensor, "row vocab"]

MARGIN = 10.0  # by default, how far a forced token's logit is above the largest one
ALLOWED_TOKENS = "prefix_allowed_tokens_fn"  # the argument of `generate` with a caller's constraint


@dataclass(frozen=True)
class LogitEdit(EditHook):
    """A hook that changes logits, everywhere or where a condition holds."""

    edits_logits: ClassVar[bool] = True
    takes_words: ClassVar[bool] = False
    takes_several: ClassVar[bool] = False  # tokens in a row
    takes_step: ClassVar[bool] = True

    def placed(self, lm: LM) -> Where:
        """Returns the hook's positions or steps. `Unsupported` for a step of a masked model."""
        if self.where.step is not None:
            lm.refuse_next_token()
        return self.where

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that hold tokens."""
        return tuple(name for name in self.bare if name != "rank")

    def check_sites(self) -> None:
        for site in self.sites:
            if not isinstance(site, ModuleSite) and site.name not in LOGIT_SITES:
                raise BadHook(
                    f"an edit of logits cannot act at {site}, which holds no logits: it acts at "
                    "'logits', at 'lm_head' (before a soft-cap), or at the module that makes the "
                    "logits, hk.module(path)"
                )

    def check(self) -> None:
        if self.where.pos is None and self.where.step is None:
            set_field(self, "where", replace(self.where, step=EVERY_STEP))
        for name in self.names:
            set_field(self, name, self._read_tokens(getattr(self, name)))

    def _read_tokens(self, value: object) -> object:
        """Returns the token or the tuple of tokens of a field, normalized."""
        tokens = check_words(value, self.verb)
        if not tokens:
            raise BadHook(f"{self.verb}() names no token: give at least one, as text or id")
        for token in tokens:
            if isinstance(token, Word):
                self._check_word(token)
        if isinstance(value, tuple):
            return tokens
        return value if isinstance(value, Word) else check_token(value, self.verb)

    def _check_word(self, target: Word) -> None:
        is_row = not isinstance(target.text, str) and len(target.text) > 1
        if is_row and not self.takes_several:
            raise BadHook(
                f"{target!r} is several tokens in a row, and {self.verb} means single ones: only "
                "force and ban take several in a row"
            )
        if not self.takes_words:
            raise BadHook(
                f"{target!r} has several spellings, and {self.verb} means one token: give the "
                "token itself, such as ' coffee'"
            )

    def named(self, lm: LM) -> list[int]:
        """Returns the ids of the tokens that the hook names, in its order."""
        ids: list[int] = []
        for name in self.names:
            for token in as_tuple(getattr(self, name)):
                ids += self.ids(token, lm)
        return ids

    def ids(self, token: WordLike, lm: LM) -> list[int]:
        """Returns the id of a token, or the ids by which the hook means a word."""
        if isinstance(token, Word):
            return self.ids_of_word(token, lm)
        try:
            return [lm.token(token)]
        except NotOneToken as error:
            if not self.takes_several:
                raise
            advice = "For several tokens in a row, say hk.word(text, exact=True)."
            raise NotOneToken(f"{error} {advice}") from None

    def ids_of_word(self, target: Word, lm: LM) -> list[int]:
        """Returns the ids of the spellings that are one token."""
        return target.token_ids(lm)

    def expanded(self, lm: LM) -> LogitEdit:
        """Returns the edit with each word as the tokens by which tables show it.

        Several tokens in a row, which `force` writes, are a `Word` of ids.
        """
        changes: dict[str, Any] = {}
        for name in self.names:
            value, tokens = getattr(self, name), []
            for token in as_tuple(value):
                tokens += self._tokens_of(token, lm)
            changes[name] = tuple(tokens) if isinstance(value, tuple) else tokens[0]
        return replace(self, **changes)

    def _tokens_of(self, token: WordLike, lm: LM) -> list[WordLike]:
        if not isinstance(token, Word):
            return [token]
        ids = self.ids_of_word(token, lm)
        if len(ids) > 1 and ids == token.ids(lm):
            return [Word(tuple(ids))]
        return [*ids]

    def change(self, binding: Binding) -> Change:
        tokens = self.named(binding.lm)
        edit = self.edit(binding, tokens)

        def apply(logits: Logits, here: EditContext) -> Logits:
            check_inside(logits, here, tokens)
            return edit(logits, here)

        return apply

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        """Returns the change that is made where the condition holds, for the ids of its tokens."""
        raise AssertionError(f"{type(self).__name__} does not define edit()")


def check_inside(logits: Logits, here: EditContext, tokens: Sequence[int]) -> None:
    """Raises `BadEdit` for a token that the last axis does not have."""
    largest, size = max(tokens, default=0), logits.shape[-1]
    if largest >= size:
        raise BadEdit(
            f"token {largest} was asked for, and the last axis of {here.site} has {size} numbers"
        )


@dataclass(frozen=True)
class Force(LogitEdit, verb="force", bare=("token",), takes_words=True, takes_several=True):
    """Makes a token win, or the tokens of a word one after the other. `force` returns it."""

    token: WordLike
    margin: float | None = None

    def check(self) -> None:
        super().check()
        if self.margin is not None:
            set_field(self, "margin", _check_margin(self.margin))
        step = self.where.step
        is_span = isinstance(step, Span) and step != EVERY_STEP
        if isinstance(self.token, Word) and (self.where.pos is not None or is_span):
            raise BadHook(
                f"{self.token!r} is written from a step on: say step=3, or the steps at which it "
                "begins, step=[3, 20]"
            )

    @property
    def gives_infinity(self) -> bool:
        return self.margin == math.inf

    @property
    def decides(self) -> bool:
        """True if the token is chosen in every decoding mode; sampling may overrule a margin."""
        return self.margin is None

    def placed(self, lm: LM) -> Where:
        """A word that begins at step 3 acts at steps 3, 4 … until its last token."""
        super().placed(lm)
        waits_for_condition = self.when is not None and self.where.step == EVERY_STEP
        if not isinstance(self.token, Word) or waits_for_condition:
            return self.where
        starts, length = self._starts(), len(self.token.ids(lm))
        steps: set[int] = set()
        for start in starts:
            steps.update(range(start, start + length))
        if len(steps) < len(starts) * length:
            raise BadHook(
                f"{self} would begin again before it is written: {length} tokens are needed"
            )
        return replace(self.where, step=tuple(sorted(steps)))

    def ids_of_word(self, target: Word, lm: LM) -> list[int]:
        return target.ids(lm)

    def _starts(self) -> list[int]:
        """Returns the steps at which the phrase begins."""
        step = self.where.step
        if step is None or isinstance(step, Span):
            return [0]
        return list(as_tuple(step))

    @property
    def applies_condition(self) -> bool:
        return self.when is not None and isinstance(self.token, Word)

    def change(self, binding: Binding) -> Change:
        if not self.applies_condition:
            return super().change(binding)
        # where the condition holds, the word begins; it continues where it no longer holds
        assert isinstance(self.token, Word)
        ids = self.token.ids(binding.lm)
        steps = None if self.where.step == EVERY_STEP else self._starts()
        offsets = offsets_of_tokens(len(ids), steps)

        def apply(logits: Logits, here: EditContext) -> Logits:
            return self._write(logits, replace(here, condition_mask=None), ids, offsets(here))

        return apply

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        starts = torch.tensor(self._starts())

        def apply(logits: Logits, here: EditContext) -> Logits:
            if isinstance(self.token, Word):
                since = here.steps[..., None] - starts
                offsets = torch.where((since >= 0) & (since < len(tokens)), since, -1).amax(dim=-1)
            else:
                offsets = torch.zeros(logits.shape[:-1], dtype=torch.long)
            return self._write(logits, here, tokens, offsets)

        return apply

    def _write(
        self, logits: Logits, here: EditContext, ids: list[int], offsets: Int[Tensor, "row pos"]
    ) -> Logits:
        """Puts the token at each offset first; leaves the logits where it is negative."""
        check_inside(logits, here, ids)
        offsets = offsets.to(logits.device)
        tokens = torch.tensor(ids, device=logits.device)[offsets.clamp(min=0)]
        index = tokens[..., None]
        if self.margin == math.inf:
            unchanged = logits.gather(-1, index).clamp(min=torch.finfo(logits.dtype).min)
            new = torch.full_like(logits, -math.inf).scatter(-1, index, unchanged)
        else:
            margin = fitted_number(self.margin or MARGIN, logits.dtype, "margin")
            largest = logits.amax(dim=-1, keepdim=True)
            # rounding may lose a small margin
            forced = torch.maximum(largest + margin, next_above(largest))
            new = logits.scatter(-1, index, forced)
        is_due = offsets >= 0
        due_cells = here.real_cells(is_due)
        self._check_first(new, here, index, due_cells)
        self._note_first(here, tokens, due_cells)
        return torch.where(is_due[..., None], new, logits)

    def _check_first(
        self,
        logits: Logits,
        here: EditContext,
        index: Int[Tensor, "row pos 1"],
        due: Bool[Tensor, "row pos"],
    ) -> None:
        """Raises `BadEdit` if a token is not first, since logits are NaN or the dtype's largest."""
        largest_other = logits.scatter(-1, index, -math.inf).amax(dim=-1)
        forced = logits.gather(-1, index)[..., 0]
        failed = due & ~((forced > largest_other) & (forced < math.inf))
        if bool(failed.any()):
            row, column = failed.nonzero()[0].tolist()
            largest = float(largest_other[row, column])
            size = "NaN" if math.isnan(largest) else f"up to {largest:g}"
            raise BadEdit(
                f"{self} cannot put the token first at {here.site}: the other logits of row "
                f"{here.rows[row]} are {size} there, and "
                f"{str(logits.dtype).removeprefix('torch.')} has no larger number to give"
            )

    def _note_first(
        self, here: EditContext, tokens: Int[Tensor, "row pos"], due: Bool[Tensor, "row pos"]
    ) -> None:
        """Records for `generate` which token is put first in each row, where `due` is True."""
        sequences = here.cells.text
        if not sequences.generating:
            return
        token_at = tokens.tolist()
        for index, cell in due.nonzero().tolist():
            row, position = here.cells.rows[index], here.cells.row_positions[index][cell]
            column = sequences.columns[sequences.of(row)][position]
            token = DecidedToken(token_at[index][cell], str(self), self.decides)
            sequences.decided[row, column] = token


@check_keywords
def force(
    token: WordLike,
    *,
    margin: float | None = None,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Force:
    """Makes `generate` choose a token: its logit becomes the largest one plus 10.

    In `generate`, also under `attach`, the token is chosen in every decoding mode: greedy, sampling
    at any temperature, beams, and against transformers' own rules (`suppress_tokens`,
    `bad_words_ids`, `min_new_tokens` …). If the caller's `prefix_allowed_tokens_fn` or
    `logits_processor` rules it out, `BadEdit` is raised. A later hook that puts another token first
    takes precedence. In a forward, or in a custom decoding loop, only the logit is written.

    `margin` is an exact distance from the largest logit, which sampling may overrule (at
    temperature 1, a margin of 10 leaves the other tokens together at most e⁻¹⁰ times their number).
    `margin=math.inf` sets all other logits to -inf. The token is always strictly first: where the
    dtype rounds the margin away, its logit is the next larger number.

    A word is written one token a step, beginning at `step` (0 by default; at each of several
    steps it begins again): hk.word(" a cup of tea", exact=True), or hk.word("tea"), which writes
    " tea". With `when` it begins at each step (of `step`, if given) where the
    condition holds and it is not being written already.

    >>> print(force(" coffee"))
    force(' coffee')
    >>> print(force(word(" a cup", exact=True), when=entropy_above(3.0)))
    force(word(' a cup', exact=True), when=entropy_above(3.0))
    """
    return Force(as_sites(site), as_where(pos, rows, step), token, margin, when=when)


def named_tokens(lm: LM, hooks: Iterable[object]) -> list[int]:
    """Returns the tokens that the logit edits among these hooks name, each once."""
    tokens: list[int] = []
    for hook in hooks:
        if isinstance(hook, LogitEdit):
            tokens += hook.named(lm)
    return list(dict.fromkeys(tokens))


def _check_margin(margin: float) -> float:
    if margin != math.inf and check_number(margin, "margin") <= 0:
        raise BadHook(f"margin={margin!r} does not put the token first: give a number above 0")
    return float(margin)


def fitted_number(value: float, dtype: torch.dtype, name: str) -> float:
    """Returns the number. Raises `BadEdit` if it is finite and the dtype cannot hold it."""
    if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        raise BadEdit(overflow_message(1, f"{name}={value:g}", dtype))
    return value


def next_above(values: Tensor) -> Tensor:
    """Returns the next larger numbers of the dtype; around 0, the smallest normal number."""
    info = torch.finfo(values.dtype)
    if values.dtype in (torch.float32, torch.float64):
        above = torch.nextafter(values, torch.full_like(values, math.inf))
    else:
        # torch.nextafter lacks 16-bit dtypes on some devices. Numbers of one sign have the order of
        # their bits
        bits = values.contiguous().view(torch.int16)
        above = torch.where(values > 0, bits + 1, bits - 1).view(values.dtype)
    return torch.where(values.abs() < info.tiny, info.tiny, above)


class Decisions:
    """Applies the decisions of one call of `generate`.

    `text` owns the decisions; each is removed when it is read. `offset` is the number of columns
    before the tokens that `generate` itself counts.
    """

    def __init__(self, text: SequenceBatch, offset: int) -> None:
        self.text, self.offset = text, offset

    def apply(
        self,
        rules: Any,
        constraints: Set[int],
        input_ids: Int[Tensor, "row column"],
        scores: Scores,
        settings: Mapping[str, Any],
    ) -> Scores:
        """Applies the rules to the scores, then leaves only the decided token in rows with one.

        `constraints` are the ids of the rules that are the caller's.
        """
        decided = self._current(input_ids, scores)
        if not decided and not self.text.rulings:
            return rules(input_ids, scores, **settings)
        if type(rules).__name__ == "LogitsProcessorList":
            for rule in rules:
                before, scores = scores, type(rules)([rule])(input_ids, scores, **settings)
                self._check_rule(rule, before, scores, decided, of_caller=id(rule) in constraints)
        else:  # the rules of an enclosing `attach`, which act as a whole
            scores = rules(input_ids, scores, **settings)
            if not constraints.isdisjoint(map(id, rules)):
                name = f"{ALLOWED_TOKENS} or logits_processor"
                self._check_possible(None, scores, decided, name)
            for ruling in self.text.rulings:
                check_ruling(ruling, scores, "a rule of generate", excused=decided)
        if not decided:
            return scores
        # an impossible decided token has the score 0
        rows, tokens = _rows_and_tokens(decided, scores.device)
        new = scores.clone()
        new[rows] = -math.inf
        new[rows, tokens] = scores[rows, tokens].nan_to_num(0, 0, 0)
        return new

    def _check_rule(
        self,
        rule: Any,
        before: Scores,
        after: Scores,
        decided: Mapping[int, DecidedToken],
        *,
        of_caller: bool,
    ) -> None:
        """Raises if a rule, of the caller or of generate, forbids what a hook decided."""
        name = f"generate's {type(rule).__name__}"
        if of_caller:
            name = _name(rule)
            self._check_possible(before, after, decided, name)
        for ruling in self.text.rulings:
            check_ruling(ruling, after, name, excused=decided)

    def _current(
        self, input_ids: Int[Tensor, "row column"], scores: Scores
    ) -> dict[int, DecidedToken]:
        """Returns the decision for each row, unless a later hook has put another token first."""
        current_column = self.offset + input_ids.shape[1] - 1
        decided = {}
        for (row, column), decision in self.text.decided.items():
            if column == current_column and decision.certain:
                decided[row] = decision
        self.text.decided.clear()
        if not decided:
            return {}
        rows, tokens = _rows_and_tokens(decided, scores.device)
        is_first = (scores[rows, tokens] >= scores[rows].amax(dim=-1)).tolist()
        return dict(itertools.compress(decided.items(), is_first))

    def _check_possible(
        self, before: Scores | None, after: Scores, decided: Mapping[int, DecidedToken], name: str
    ) -> None:
        """Raises `BadEdit` for a decided token that the caller's rule makes impossible.

        A token that was impossible before the rule is not the rule's fault.
        """
        for row, decision in decided.items():
            token = decision.token
            was_possible = before is None or before[row, token] > -math.inf
            if was_possible and not after[row, token] > -math.inf:
                raise BadEdit(
                    f"{decision.hook} decides on token {token} in row {self.text.of(row)}, and "
                    f"{name} leaves it out: change one of the two, or give force a margin=, which "
                    "decoding may overrule"
                )


def follow_decisions(
    rules: Any, keywords: Mapping[str, Any], decisions: Decisions | None, listener: Any
) -> Any:
    """Returns the rules of a call of `generate`, changed so that they follow decisions.

    They also report the resulting scores to a listener. `keywords` are those with which
    transformers asked the model for the rules.
    """
    from transformers import LogitsProcessorList

    class Rules(LogitsProcessorList):
        constraints: set[int]

        def __call__(self, input_ids: Any, scores: Any, **settings: Any) -> Any:
            if decisions is None:
                new = rules(input_ids, scores, **settings)
            else:
                new = decisions.apply(rules, self.constraints, input_ids, scores, settings)
            return new if listener is None else listener.processed(new)

    following = Rules(rules)
    processors = keywords.get("logits_processor") or ()
    following.constraints = {*map(id, processors), *getattr(rules, "constraints", ())}
    following.constraints.update(id(rule) for rule in rules if _name(rule) == ALLOWED_TOKENS)
    return following


def _name(rule: Any) -> str:
    """Returns a rule of `generate` as the argument with which the caller gives it."""
    from transformers import PrefixConstrainedLogitsProcessor

    if isinstance(rule, PrefixConstrainedLogitsProcessor):
        return ALLOWED_TOKENS
    return f"the logits_processor {type(rule).__name__}"


def _rows_and_tokens(
    decided: Mapping[int, DecidedToken], device: torch.device
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    tokens = [decision.token for decision in decided.values()]
    return torch.tensor(list(decided), device=device), torch.tensor(tokens, device=device)
