"""Conditions bound to a model: where the condition of a hook holds, and why not elsewhere.

A `BoundCondition` is the condition of one hook. A condition on values elsewhere in the model has a
`StateReader`, which is registered at its site like a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import BadEdit, BadHook, Unsupported
from ..models.batch_positions import SequenceBatch, expand_mask, pad_rows
from ..models.lm import LM
from ..models.next_token import entropy_of, margin_of, rank_among, ranks_for_table, token_logits
from ..models.positions import PositionRange
from ..models.sites import LOGIT_SITES, AnySite, ModuleSite, Site, has_name
from .base import Condition, EditContext, EditHook, When, argument_text
from .capture import swap_head_and_query
from .probe import Probe
from .state_reader import Measure, Numbers, StateReader
from .values import convert_once
from .when import (
    COMPARE,
    AllOf,
    AnyOf,
    LogitCondition,
    Not,
    StateCondition,
    TextCondition,
)

Mask: TypeAlias = Bool[Tensor, "row pos"]
Verdict: TypeAlias = tuple[Mask, Mask]
"""Where a condition holds, and where it does not; neither where it is not decided."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one condition read at the cells of an edit: a number for each, NaN if not decided.

    `numbers` is None for a condition on a text, and for a user's function.
    """

    condition: When
    numbers: Numbers | None
    holds: Mask

    def at(self, row: int, columns: Sequence[int]) -> str:
        """Returns what was read at some cells of a row, in words."""
        name = argument_text(self.condition)
        if self.numbers is None:
            answers = {bool(self.holds[row, column]) for column in columns}
            return f"{name}: {' and '.join(map(str, sorted(answers)))}"
        numbers = self.numbers[row, list(columns)].double()
        numbers = numbers[~numbers.isnan()]
        if not len(numbers):
            return f"{name}: not read yet"
        least, most = f"{float(numbers.min()):.4g}", f"{float(numbers.max()):.4g}"
        return f"{name}: {least if least == most else f'{least} to {most}'}"


@dataclass(frozen=True, eq=False)
class Outcome:
    """Where the condition of an edit held in one forward, by the cells of the edit."""

    holds: Mask
    decided: Mask
    readings: tuple[Reading, ...]

    def held(self, row: int, positions: PositionRange) -> list[int]:
        """Returns the positions, of the first ones in a row, at which the condition held."""
        row_holds = self.holds[row, : len(positions)].tolist()
        return [position for position, holds in zip(positions, row_holds, strict=True) if holds]

    def reason(self, row: int, count: int) -> str:
        """Returns why it did not hold at some of the first `count` cells of a row; "" if it did."""
        columns = (~self.holds[row, :count]).nonzero().flatten().tolist()
        return self._reason(row, columns) if columns else ""

    def reason_at(self, row: int, column: int) -> str:
        """Returns what was read at one cell, in words."""
        return self._reason(row, [column])

    def _reason(self, row: int, columns: Sequence[int]) -> str:
        return "; ".join(reading.at(row, columns) for reading in self.readings)


# ---- what is measured


def _measure_of(condition: LogitCondition | StateCondition, lm: LM) -> Measure:
    """Returns the function that computes what a condition compares; it raises `BadEdit` for NaN."""
    if isinstance(condition, LogitCondition):
        numbers_of = _logit_quantity(condition, lm)
    else:
        numbers_of = _state_quantity(condition)

    def measure(values: Tensor, here: EditContext) -> Numbers:
        numbers = numbers_of(values.detach())
        is_nan = here.real_cells(numbers.isnan())
        if bool(is_nan.any()):
            row = here.rows[int(is_nan.nonzero()[0][0])]
            kind = "logits" if isinstance(condition, LogitCondition) else "values"
            raise BadEdit(
                f"when={condition} has no answer at {here.site}: the {kind} of row {row} are NaN "
                "there"
            )
        return numbers

    return measure


def _logit_quantity(condition: LogitCondition, lm: LM) -> Callable[[Tensor], Numbers]:
    token = None if condition.token is None else lm.token(condition.token)
    return partial(_numbers_of_logits, condition.quantity, lm.n_tokens, token)


def _numbers_of_logits(
    quantity: str, n_tokens: int, token: int | None, logits: Float[Tensor, "row pos vocab"]
) -> Numbers:
    if quantity == "margin":
        return margin_of(logits.float(), n_tokens)
    if quantity == "rank":
        return ranks_for_table(rank_among(token_logits(logits, n_tokens), logits[..., token]))
    logprobs = logits.float().log_softmax(dim=-1)
    if quantity == "entropy":
        return entropy_of(logprobs)
    assert quantity == "prob"
    return logprobs[..., token].exp()


def _state_quantity(condition: StateCondition) -> Callable[[Tensor], Numbers]:
    if isinstance(condition.of, Probe):
        return condition.of.score
    if condition.of is None:
        return lambda values: _as_vectors(values).norm(dim=-1)
    direction = condition.of.tensor.double()
    fit = convert_once((direction / direction.norm()).flatten().float(), "the vector")

    def cosine_with(values: Tensor) -> Numbers:
        wide = _as_vectors(values)
        unit = fit(wide)
        if unit.shape != wide.shape[2:]:
            raise BadHook(
                f"when={condition} has a vector of {len(unit)} numbers, and its site has "
                f"{wide.shape[-1]}"
            )
        return (wide @ unit) / wide.norm(dim=-1).clamp(min=1e-30)

    return cosine_with


def _as_vectors(values: Tensor) -> Tensor:
    """Returns values as [row, pos, number]: heads are one axis, and a feature is one number."""
    return values.float().unsqueeze(-1).flatten(2)


# ---- the condition of one hook

Evaluate: TypeAlias = Callable[[Tensor, EditContext, int, list[Reading]], Verdict]
"""Decides at the cells of an edit in a forward, and appends what was read to the readings."""


class BoundCondition:
    """The condition of one hook on a model, with the readers that it needs.

    Each reader has to be registered at its site, before the hook.
    """

    def __init__(self, hook: EditHook, lm: LM, sites: Sequence[AnySite]) -> None:
        assert hook.when is not None
        self._lm, self._hook, self._sites = lm, hook, sites
        self.readers: list[StateReader] = []
        self._evaluate = self._bind(hook.when)

    def evaluate(self, values: Tensor, here: EditContext, forward: int) -> Outcome:
        """Returns where the condition holds, among the cells that an edit receives."""
        readings: list[Reading] = []
        holds, fails = self._evaluate(values, here, forward, readings)
        return Outcome(holds, holds | fails, tuple(readings))

    def _bind(self, when: When) -> Evaluate:
        match when:
            case Not(condition):
                return _negate(self._bind(condition))
            case AllOf(conditions) | AnyOf(conditions):
                parts = list(map(self._bind, conditions))
                return _combine(parts, is_all=isinstance(when, AllOf))
            case LogitCondition() | StateCondition():
                return self._bind_numbers(when)
            case TextCondition():
                if self._lm.tokenizer is None:
                    raise BadHook(
                        f"when={when} compares text, and this model came without a tokenizer"
                    )
                return _evaluate_directly(when, partial(_holds_for_texts, when, self._lm))
        assert not isinstance(when, Condition), f"{when!r} is a condition of an unknown kind"
        return _evaluate_directly(when, partial(_result_of_function, when))

    def _bind_numbers(self, condition: LogitCondition | StateCondition) -> Evaluate:
        measure = _measure_of(condition, self._lm)
        elsewhere = [site for site in self._sites if not self._reads_here(condition, site)]
        reader = self._add_reader(condition, measure) if elsewhere else None
        compare = COMPARE[condition.compare]

        def evaluate(values: Tensor, here: EditContext, forward: int, readings: Any) -> Verdict:
            if reader is None or here.site not in elsewhere:
                numbers = measure(values, here)
            else:
                numbers = reader.numbers_at(here, forward).to(values.device)
            holds = compare(numbers, condition.limit)
            readings.append(Reading(condition, numbers, holds))
            return holds, ~holds & ~numbers.isnan()

        return evaluate

    def _reads_here(self, condition: LogitCondition | StateCondition, site: AnySite) -> bool:
        """True if a condition is decided by the very values that are edited at a site."""
        if isinstance(condition, LogitCondition):
            return self._hook.edits_logits or has_name(site, *LOGIT_SITES)
        return condition.pos is None and condition.site in (None, site)

    def _add_reader(
        self, condition: LogitCondition | StateCondition, measure: Measure
    ) -> StateReader:
        site = Site("logits") if isinstance(condition, LogitCondition) else condition.site
        if site is None:
            if len(self._sites) > 1:
                raise BadHook(
                    f"when={condition} decides once for each row, and the edit acts at "
                    f"{len(self._sites)} sites: say which of them it reads, site="
                )
            site = self._sites[0]
        _check_texts(condition, site, self._sites)
        if isinstance(condition, StateCondition):
            _check_width(condition, site, self._lm)
        reader = StateReader(condition, site, self._hook.where.rows, measure)
        self.readers.append(reader)
        return reader


def _negate(evaluate: Evaluate) -> Evaluate:
    def negated(values: Tensor, here: EditContext, forward: int, readings: Any) -> Verdict:
        holds, fails = evaluate(values, here, forward, readings)
        return fails, holds

    return negated


def _combine(parts: Sequence[Evaluate], *, is_all: bool) -> Evaluate:
    def combined(values: Tensor, here: EditContext, forward: int, readings: Any) -> Verdict:
        verdicts = [evaluate(values, here, forward, readings) for evaluate in parts]
        holds, fails = map(torch.stack, zip(*verdicts, strict=True))
        if is_all:
            return holds.all(dim=0), fails.any(dim=0)
        return holds.any(dim=0), fails.all(dim=0)

    return combined


def _evaluate_directly(when: When, holds_at: Callable[[Tensor, EditContext], Mask]) -> Evaluate:
    def evaluate(values: Tensor, here: EditContext, forward: int, readings: Any) -> Verdict:
        holds = holds_at(values, here).to(values.device)
        readings.append(Reading(when, None, holds))
        return holds, ~holds

    return evaluate


def conditions_in(when: When) -> Iterator[When]:
    """Yields the conditions that are combined in a condition."""
    match when:
        case Not(condition):
            yield from conditions_in(condition)
        case AllOf(conditions) | AnyOf(conditions):
            for condition in conditions:
                yield from conditions_in(condition)
        case _:
            yield when


def calls_function(when: When | None) -> bool:
    """True if a user's function decides, which receives all positions together."""
    if when is None:
        return False
    values = LogitCondition | StateCondition | TextCondition
    return any(not isinstance(condition, values) for condition in conditions_in(when))


def _check_texts(condition: When, site: AnySite, edited: Sequence[AnySite]) -> None:
    """Raises `Unsupported` if the reader's positions are those of another text than the edit's."""
    for other in (site, *edited):
        if other.position_stack:
            raise Unsupported(
                f"when={argument_text(condition)} reads {site} for an edit at {other}, whose "
                "positions may be those of another text: read and edit the stack that writes "
                "text, or leave site out to read at the edit's own site"
            )


def _check_width(condition: StateCondition, site: AnySite, lm: LM) -> None:
    """Raises `BadHook` if the values at a site do not fit what a condition compares them with."""
    if isinstance(site, ModuleSite) or condition.of is None:
        return
    tensor = (
        condition.of.direction.tensor if isinstance(condition.of, Probe) else condition.of.tensor
    )
    if tuple(tensor.shape) != lm.shape(site):
        raise BadHook(
            f"when={condition} has a vector {list(tensor.shape)}, and {site} has "
            f"{list(lm.shape(site))} in this model"
        )


def _holds_for_texts(condition: TextCondition, lm: LM, values: Tensor, here: EditContext) -> Mask:
    """Returns for each cell whether a condition holds for the text up to it."""
    rows: list[list[bool]] = []
    for index, positions in enumerate(here.cells.row_positions):
        first = 0
        if not condition.prompt:
            first = here.cells.text.lengths[here.rows[index]]
        answers: list[bool] = []
        for position in positions:
            tokens = here.read(index, position, position + 1)
            text = lm.added(tokens[:first], tokens[first:])
            answers.append(condition.holds_for(text))
        rows.append(answers)
    return pad_rows(rows, 0).bool()


def _result_of_function(when: Callable[..., Any], values: Tensor, here: EditContext) -> Mask:
    """Returns the result of a user's function for each cell. Raises `BadEdit` for another one."""
    shape = values.shape[:2]
    result = when(swap_head_and_query(here.site, values).clone(), here)
    if isinstance(result, bool):
        result = torch.as_tensor(result)
    is_tensor = isinstance(result, Tensor)
    if is_tensor and result.dtype == torch.bool and result.shape in ((), shape):
        return result.to(values.device).expand(shape).clone()
    kind = f"{result.dtype} {list(result.shape)}" if is_tensor else type(result).__name__
    raise BadEdit(
        f"when= gave {kind}: return True or False, or a bool tensor {list(shape)} [row, pos]"
    )


def edit_where(holds: Mask, edited: Tensor, values: Tensor) -> Tensor:
    """Returns the edited values where a condition holds, and elsewhere the values as they were."""
    return torch.where(expand_mask(holds, values), edited, values)


# ---- a phrase that begins where a condition holds


def offsets_of_tokens(
    length: int, steps: Sequence[int] | None
) -> Callable[[EditContext], Int[Tensor, "row pos"]]:
    """Returns the function that gives the index of the token to write at each cell; -1 for none.

    The first token is written where the edit's condition holds, at any step or at one of `steps`,
    and the others after it. The function owns the indices for each text, by model row and step. A
    step that is computed again (without a cache) gets the same index.
    """
    offsets_of_text: WeakKeyDictionary[SequenceBatch, dict[tuple[int, int], int]]
    offsets_of_text = WeakKeyDictionary()

    def offsets(here: EditContext) -> Int[Tensor, "row pos"]:
        if here.cells.text.beams > 1:
            raise Unsupported(
                "a word that begins when a condition holds has no place in beam search, which "
                "goes back on itself"
            )
        assert here.condition_mask is not None
        known_offsets = offsets_of_text.setdefault(here.cells.text, {})
        condition_holds = here.condition_mask.tolist()
        offsets = torch.full_like(here.steps, -1)
        for index, row in enumerate(here.cells.rows):
            steps_of_row = here.steps[index, : len(here.cells.row_positions[index])].tolist()
            for column, step in enumerate(steps_of_row):
                offset = known_offsets.get((row, step - 1), -1) + 1
                if offset in (0, length):  # no token was written, or the last one
                    begins = condition_holds[index][column] and (steps is None or step in steps)
                    offset = 0 if begins else -1
                offsets[index, column] = known_offsets.setdefault((row, step), offset)
        return offsets

    return offsets
