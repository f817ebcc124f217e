"""TextHooks: applies the hooks of a run in each forward, to the whole batch.

It knows to which text each forward belongs, and checks that the positions of the hooks exist there.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor

from ..errors import EmptySelection, OutOfRange, Unsupported
from ..hooks.capture import CapturedChunk
from ..hooks.grammar import Grammar, check_sequences
from ..hooks.logits import Decisions, Force
from ..hooks.rulings import LogitJournal
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.overrides import CURRENT_SCOPES, Scope
from ..models.positions import PositionRange, resolve_rows
from ..models.sites import LOGIT_SITES, Site, has_name
from ..models.tower_images import find_images
from .applied_hooks import apply_hook, forget, settle
from .generation import (
    Generation,
    GenerationWatch,
    end_of_rows,
    plan_generation,
    watch_generate,
    without_compilation,
)
from .hook_points import BoundHook, HookPoint
from .kept_tensors import KeptTensors
from .run import CaptureStore, first_to_last, one_per_selection
from .trace import Tracer
from .tracking import PositionTracker


class Stop(BaseException):
    """Ends a forward after the last hook has acted, where no output is needed.

    It is no `Exception`, so that code which handles errors does not catch it.
    """


class TextHooks:
    """The strategy of runs: each hook sees the whole batch, whose rows are followed as texts.

    It owns the records of the texts that have run since a block was entered. With `stop_early`, a
    forward ends once the last of the hooks has acted.
    """

    def __init__(
        self,
        lm: LM,
        bound_hooks: Sequence[BoundHook],
        tracer: Tracer | None = None,
        traced_point: HookPoint | None = None,
        *,
        stop_early: bool = False,
        keeps_tensors: bool = False,
    ) -> None:
        self.lm, self.bound_hooks = lm, bound_hooks
        self.kept = KeptTensors(lm) if keeps_tensors else None
        self.tracer, self._traced_point, self._stop_early = tracer, traced_point, stop_early
        self.tracker = PositionTracker(
            partial(find_positions, lm),
            "logits_to_keep" in lm.takes,
            lm.two_texts,
            partial(find_images, lm),
            frozenset(bound_hook.stack for bound_hook in bound_hooks).intersection(lm.towers),
        )
        self.captures = CaptureStore(bound_hooks)
        self.rows: list[list[int]] = []  # the tokens of each sequence of the last `generate`
        self.watch = GenerationWatch()
        self._generate_thread = 0  # the thread in which a `generate` runs
        self._pending: set[BoundHook] = set()  # the hooks that a forward has not reached yet
        hooks = [bound_hook.hook for bound_hook in bound_hooks]
        self._journal = LogitJournal() if any(isinstance(hook, Grammar) for hook in hooks) else None

    @property
    def generating(self) -> bool:
        """True while a `generate` runs."""
        return self.tracker.generation is not None

    def accepts_forward(self) -> bool:
        if not self.generating:
            return True
        return self._generate_thread == get_ident() and self.watch.begins_step()

    def begin_forward(self, arguments: Mapping[str, Any]) -> ForwardPass:
        forward_pass, is_new_text = self.tracker.begin_forward(arguments)
        self.captures.turn_to(forward_pass.text)
        if is_new_text:
            _check_text(self.bound_hooks, forward_pass, self.tracker.generation)
        if self.tracker.generation is not None:
            self.watch.begin_forward(forward_pass, self.tracker.generation.width)
            forward_pass.text.forget_step()
        if self._journal is not None:
            self._journal.begin()
        forget(self.bound_hooks)
        if self._stop_early:
            self._pending = set(self.bound_hooks)
        return forward_pass

    def begin_stack(self, stack: str, arguments: Mapping[str, Any]) -> ForwardPass | None:
        if self.tracker.generation is None or self._generate_thread != get_ident():
            return None
        forward_pass = self.tracker.begin_stack(stack, arguments)
        if stack in self.tracker.towers:
            _check_stack(stack, self.bound_hooks, forward_pass)
        return forward_pass

    def end_forward(self, forward_pass: ForwardPass, output: Any) -> None:
        self.tracker.end_forward(forward_pass, output)
        settle(self.bound_hooks)

    def finish(self) -> None:
        self.captures.finish_all()
        self.captures.check_fired(self.tracker.forwards)

    # ---- the work at a hook point

    def apply(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
        *,
        recomputing: bool,
    ) -> Tensor:
        forward_pass = _pass_of_stack(hook_point, forward_pass, tensor)
        hook_point.begin(forward_pass)
        if recomputing:
            tensor = _apply_again(hook_point, forward_pass, tensor, module_input)
            hook_point.end(forward_pass, tensor)
            return tensor
        if hook_point is self._traced_point:
            tensor = self._apply_traced(hook_point, forward_pass, tensor, module_input)
        elif not self._copy_whole(hook_point, forward_pass, tensor):
            for bound_hook in hook_point.actions:
                tensor = self._apply_hook(
                    bound_hook, hook_point, forward_pass, tensor, module_input
                )
        hook_point.end(forward_pass, tensor)
        if self._stop_early:
            self._pending.difference_update(hook_point.actions)
            if not self._pending:  # the hooks at this hook point were the last ones
                settle(self.bound_hooks)
                raise Stop
        return tensor

    def _apply_traced(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
    ) -> Tensor:
        """Applies the hooks at the logits of a generate, and records what each of them changes."""
        tracer = self.tracer
        assert tracer is not None
        tracer.before(forward_pass.number, tensor)
        for bound_hook in hook_point.actions:
            before, reader = tensor, bound_hook.reader
            if reader is not None:
                reader.last = None
            tensor = self._apply_hook(bound_hook, hook_point, forward_pass, before, module_input)
            if reader is not None and reader.last is not None:
                tracer.source(*reader.last)
            if tensor is not before:
                tracer.changed(bound_hook.hook, before, tensor)
        tracer.after(tensor)
        return tensor

    def _apply_hook(
        self,
        bound_hook: BoundHook,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
    ) -> Tensor:
        """Applies one hook and notes that it fired."""
        before = tensor
        try:
            firing, tensor = apply_hook(
                bound_hook, hook_point, forward_pass, tensor, module_input, count_changes=True
            )
        except Exception as error:
            number = forward_pass.number
            error.add_note(f"in {bound_hook.hook} at {bound_hook.site}, forward {number}")
            raise
        if firing is not None:
            self.captures.firings.append(firing)
            if self.tracer is not None and firing[-1] is not None:
                self.tracer.note_condition(firing)
        is_new = tensor is not before and has_name(bound_hook.site, *LOGIT_SITES)
        if self._journal is not None and self.generating and is_new:
            self._journal.note(bound_hook.hook, forward_pass.text, tensor)
        return tensor

    def _copy_whole(self, hook_point: HookPoint, forward_pass: ForwardPass, tensor: Tensor) -> bool:
        """Captures a whole tensor, the most common work. False if more is needed."""
        if not hook_point.copies_output or forward_pass.inference:
            return False
        bound_hook = hook_point.actions[0]
        selection = forward_pass.whole(bound_hook.where)
        if selection is None or bound_hook.last_pass is forward_pass:
            return False
        is_plain = type(tensor) is Tensor and not tensor.requires_grad
        if not is_plain or tensor.shape[:2] != forward_pass.shape:
            return False
        bound_hook.last_pass = forward_pass
        bound_hook.fired += 1
        number = forward_pass.number
        if self.kept is None:
            values = tensor.clone()
        else:
            values = self.kept.keep(bound_hook.site, hook_point.location, tensor)
        bound_hook.pieces.append(CapturedChunk(number, selection, values))
        self.captures.firings.append((bound_hook, number, selection, tensor.shape[2:], None, None))
        return True

    # ---- generate

    def generate(
        self, inner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], scope: Scope
    ) -> Any:
        """Runs transformers' `generate` and follows each row from its prompt to its end.

        To it belong the calls of the model's own methods that this thread makes in `scope`.
        """
        if self.lm.two_texts and not self.lm.family.stacks:
            raise Unsupported(
                f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two "
                "parts by themselves: call the model with input_ids and decoder_input_ids in the "
                "block"
            )
        plan = plan_generation(self.lm.root, args, kwargs)
        text = self.tracker.begin_generation(plan, kwargs)
        self.captures.turn_to(text)
        if self.tracer is not None:
            self.tracer.begin(plan)
        thread = self._generate_thread = get_ident()

        def acts() -> bool:
            return get_ident() == thread and scope in CURRENT_SCOPES.get()

        decisions = self._decisions(plan, text)
        try:
            with watch_generate(self.lm.root, self.tracer, decisions, acts) as self.watch:
                keywords = without_compilation(args, self._with_every_position(kwargs))
                output = inner(*args, **keywords)
            self._end_generation(plan, text, getattr(output, "sequences", output))
        except BaseException:
            self.captures.forget(text)
            raise
        finally:
            self.tracker.generation = None
        return output

    def _decisions(self, plan: Generation, text: SequenceBatch) -> Decisions | None:
        """What keeps the decisions of `force` and of grammars; None if no hook makes any."""
        hooks = (bound_hook.hook for bound_hook in self.bound_hooks)
        forces = any(isinstance(hook, Force) and hook.decides for hook in hooks)
        if forces or self._journal is not None:
            return Decisions(text, plan.width if plan.embeddings else 0)
        return None

    def _with_every_position(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds logits_to_keep where the model needs it to run its blocks at every position."""
        keep = self.lm.logits_to_keep(1)
        if keep == 1 or all(bound_hook.head for bound_hook in self.bound_hooks):
            return kwargs
        return {"logits_to_keep": keep, **kwargs}

    def _end_generation(self, plan: Generation, text: SequenceBatch, sequences: Tensor) -> None:
        """Ends the text of a `generate` that has returned these sequences."""
        self.rows, ending = end_of_rows(plan, text, sequences, self.watch)
        hooks = (bound_hook.hook for bound_hook in self.bound_hooks)
        check_sequences(hooks, self.lm, text, self.rows, ending.prompts)
        self.captures.finish(text, ending)
        if self.tracer is not None:
            prompt_lengths = [text.lengths[prompt] for prompt in ending.prompts]
            self.tracer.finish(self.rows, prompt_lengths, ending.sources)


def _pass_of_stack(hook_point: HookPoint, forward_pass: ForwardPass, tensor: Tensor) -> ForwardPass:
    """Returns the forward pass of the stack to which a hook point's tensor belongs."""
    if not forward_pass.stacks:  # the most common case
        return forward_pass
    forward_pass = forward_pass.stacks.get(hook_point.stack, forward_pass)
    location = hook_point.location
    is_piece = forward_pass.images is not None and location.flat and location.side == "inside"
    if not is_piece:
        return forward_pass
    return forward_pass.next_piece(location, tensor.shape[2])


def _apply_again(
    hook_point: HookPoint,
    forward_pass: ForwardPass,
    tensor: Tensor,
    module_input: Tensor | None,
) -> Tensor:
    """Does the work of a forward again in a backward pass; nothing of it is stored."""
    for bound_hook in hook_point.actions:
        if bound_hook.condition is not None and bound_hook.condition.readers:
            raise Unsupported(
                f"{bound_hook.hook} asks in a block with gradient checkpointing, which runs again "
                "in backward(), out of order: call model.gradient_checkpointing_disable()"
            )
        unstored = replace(bound_hook, pieces=[], last_pass=None)
        _, tensor = apply_hook(unstored, hook_point, forward_pass, tensor, module_input)
    return tensor


# ---- checks of positions before a forward


def _check_text(
    bound_hooks: Sequence[BoundHook], forward_pass: ForwardPass, generation: Generation | None
) -> None:
    """Raises if a hook names a position that the text of its first forward cannot have."""
    text = forward_pass.text
    for stack in forward_pass.stacks.keys() | {bound_hook.stack for bound_hook in bound_hooks}:
        if stack:
            _check_stack(stack, bound_hooks, forward_pass)
    if text.start:
        _check_cached(bound_hooks, text)
    if text.final or generation is not None:
        check_positions(bound_hooks, forward_pass, generation)
        return
    for bound_hook in one_per_selection(bound_hooks):
        # raises for a phrase that is not in the text, or a position below 0
        text.selected_positions(bound_hook.where)


def _check_stack(stack: str, bound_hooks: Sequence[BoundHook], forward_pass: ForwardPass) -> None:
    """Raises if a hook names a position that a stack cannot have, or a row without any."""
    of_stack = [bound_hook for bound_hook in bound_hooks if bound_hook.stack == stack]
    stack_pass = forward_pass.stacks.get(stack)
    if stack_pass is None:
        text = forward_pass.text
        if stack not in text.stacks and (text.final or text.generating):
            raise EmptySelection(
                f"{of_stack[0].hook} acts in the {stack} tower, and no prompt has anything for "
                "it: give what the model's processor returns"
            )
        return
    lengths = stack_pass.text.lengths
    for bound_hook in one_per_selection(of_stack):
        rows = bound_hook.where.rows
        empty = [row for row in resolve_rows(rows, len(lengths)) if not lengths[row]]
        if empty and rows is not None:
            raise EmptySelection(
                f"{bound_hook.hook} selects row {empty[0]}, which has no input for the {stack} "
                "tower"
            )
    check_positions(of_stack, stack_pass, None)


def check_positions(
    bound_hooks: Iterable[BoundHook], forward_pass: ForwardPass, generation: Generation | None
) -> None:
    """Raises if a hook names a position that the text cannot have, or selects nothing in a row.

    Only for a text whose length is known: one forward of prompts, or a `generate`.
    """
    text = forward_pass.text
    for bound_hook in one_per_selection(bound_hooks):
        if bound_hook.stack in forward_pass.stacks:
            continue
        first, end = _possible_columns(bound_hook, forward_pass, generation)
        for row, positions in enumerate(text.selected_positions(bound_hook.where)):
            if positions is not None:
                possible = _positions_between(text, row, first, end)
                check_row(bound_hook, text, row, positions, possible, generation)


def check_row(
    bound_hook: BoundHook,
    text: SequenceBatch,
    row: int,
    positions: PositionRange,
    possible: range,
    generation: Generation | None,
) -> None:
    """Raises if the positions of a hook in one row are not possible."""
    if isinstance(positions, tuple):
        missing = next((position for position in positions if position not in possible), None)
        if missing is not None:
            raise OutOfRange(
                _out_of_range_message(bound_hook, text, row, missing, possible, generation)
            )
    elif bisect_left(positions, possible.start) >= bisect_left(positions, possible.stop):
        at_logits = " at the logits" if bound_hook.head else ""
        raise EmptySelection(
            f"{bound_hook.hook} selects nothing in row {row}, which has positions "
            f"{first_to_last(possible)}{at_logits}: choose others, or leave the row out with rows="
        )


def _possible_columns(
    bound_hook: BoundHook, forward_pass: ForwardPass, generation: Generation | None
) -> tuple[int, int]:
    """The first column at which a hook can act, and the end of the columns that are read."""
    first = 0
    if forward_pass.images is not None:
        return first, max(forward_pass.text.lengths)
    if generation is not None:
        if bound_hook.head:
            first = forward_pass.text.head or 0
        return first, generation.max_width - 1  # the last token is never read
    if bound_hook.head:
        first = forward_pass.past + forward_pass.head.start
    return first, forward_pass.past + forward_pass.width


def _positions_between(text: SequenceBatch, row: int, first: int, end: int) -> range:
    """The positions of a row from column `first` to before column `end`."""
    columns = text.columns[row]
    last = bisect_left(columns, end)
    if not text.generating:
        last = min(last, text.lengths[row])
    return range(bisect_left(columns, first), last)


def _out_of_range_message(
    bound_hook: BoundHook,
    text: SequenceBatch,
    row: int,
    position: int,
    possible: range,
    generation: Generation | None,
) -> str:
    length, new_tokens = text.lengths[row], 0
    if generation is not None:
        new_tokens = generation.max_width - generation.width
    if bound_hook.where.step is not None:
        meaning = f"{bound_hook.hook} means step {position - length + 1} of row {row}"
        if generation is not None:
            return f"{meaning}, and at most {new_tokens} tokens are generated: steps count from 0"
        return (
            f"{meaning}, and a forward of the prompt has step 0 only: use generate for later steps"
        )
    meaning = f"{bound_hook.hook} means position {position} of row {row}"
    if bound_hook.head and position < possible.start:
        return (
            f"{meaning}, where no logits are computed; they are at positions "
            f"{first_to_last(possible)} (forward with logits='all')"
        )
    if generation is None:
        return f"{meaning}, which has {length} {text.unit}: positions 0 to {length - 1}"
    return (
        f"{meaning}, and with {new_tokens} new tokens the model reads positions "
        f"{first_to_last(possible)}"
    )


def _check_cached(bound_hooks: Iterable[BoundHook], text: SequenceBatch) -> None:
    """Raises for a hook at positions that are in a cache already, at which it did not act.

    A capture of all positions is allowed: it holds the positions that it has.
    """
    for bound_hook in bound_hooks:
        everywhere = bound_hook.where.pos is bound_hook.where.step is None
        if bound_hook.receive is not None:  # it sees what the edit that it reads for needs
            continue
        if bound_hook.head or (everywhere and bound_hook.change is None):
            continue
        for row in range(len(text.lengths)):
            position = text.first_missed_position(bound_hook.where, row)
            if position is not None:
                error = Unsupported if everywhere else OutOfRange
                raise error(_cached_message(bound_hook, text, row, position))


def _cached_message(bound_hook: BoundHook, text: SequenceBatch, row: int, position: int) -> str:
    return (
        f"{bound_hook.hook} at {bound_hook.site} means position {position} of row {row}, and the "
        f"forward continues a cache that has columns 0 to {text.start - 1}: they are not read "
        "again, and the hook did not act there when the cache was filled. Run the whole text, say "
        f"pos=slice({text.start}, None), or fill the cache inside the same block"
    )


# ---- the logits that a trace reads


def logits_hook_point(lm: LM, hook_points: list[HookPoint]) -> HookPoint:
    """Returns the hook point at the logits that the model returns; adds it if no hook acts there.

    Raises `Unsupported` if an edit changes the logits before a trace can read them.
    """
    for hook_point in hook_points:
        for bound_hook in hook_point.actions:
            if bound_hook.head and bound_hook.change is not None:
                _check_at_logits(bound_hook)
    location = lm.location(Site("logits"))
    for hook_point in hook_points:
        if hook_point.location == location:
            return hook_point
    hook_points.append(HookPoint(lm.submodule(location.path), location, []))
    return hook_points[-1]


def _check_at_logits(bound_hook: BoundHook) -> None:
    if bound_hook.site != Site("logits"):
        raise Unsupported(
            f"{bound_hook.hook} acts at {bound_hook.site}, before the logits that a trace reads as "
            "the model's own: let it act at 'logits', or leave trace= out"
        )
