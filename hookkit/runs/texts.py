"""The texts that run in a block: what the hooks do in each of their forwards, and the results.

`TextHooks` applies the hooks, and knows to which text each forward belongs. Its `CaptureStore`
holds the captures and the firings of each text, raises for a hook that never fired, and gives the
log.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any

import pandas as pd
from torch import Tensor

from ..errors import NeverFired, Unsupported
from ..hooks.capture import (
    Capture,
    Captured,
    CapturedChunk,
    Captures,
    LazyCapture,
    SequenceEnd,
    join_chunks,
    swap_head_and_query,
)
from ..hooks.logits import Decisions, Force
from ..models.batch_positions import ForwardPass, Selection, SequenceBatch
from ..models.layout import unseen_value
from ..models.lm import LM
from ..models.overrides import CURRENT_SCOPES, Scope
from ..models.positions import PositionRange
from ..models.prompts import positions_of_text
from ..models.sites import AnySite, Site
from .acting import Firing, apply_hook, forget, settle
from .generation import (
    GenerationWatch,
    end_of_rows,
    plan_generation,
    watch_generate,
    without_compilation,
)
from .taps import BoundHook, HookPoint, check_text, first_to_last, one_per_selection
from .trace import Tracer
from .tracking import PositionTracker

LOG_COLUMNS = ["hook", "do", "site", "forward", "row", "positions", "numbers", "changed"]


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
    ) -> None:
        self.lm, self.bound_hooks = lm, bound_hooks
        self.tracer, self._traced_point, self._stop_early = tracer, traced_point, stop_early
        self.tracker = PositionTracker(
            partial(positions_of_text, lm), "logits_to_keep" in lm.takes, lm.two_texts
        )
        self.captures = CaptureStore(bound_hooks)
        self.rows: list[list[int]] = []  # the tokens of each sequence of the last `generate`
        self.watch = GenerationWatch()
        self._generate_thread = 0  # the thread in which a `generate` runs
        self._pending: set[BoundHook] = set()  # the hooks that a forward has not reached yet

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
            check_text(self.bound_hooks, forward_pass, self.tracker.generation)
        if self.tracker.generation is not None:
            self.watch.begin_forward(forward_pass, self.tracker.generation.width)
        forget(self.bound_hooks)
        if self._stop_early:
            self._pending = set(self.bound_hooks)
        return forward_pass

    def end_forward(self, forward_pass: ForwardPass, output: Any) -> None:
        self.tracker.end_forward(forward_pass, output)
        settle(self.bound_hooks)

    def apply(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
        *,
        recomputing: bool,
    ) -> Tensor:
        is_done = False
        if hook_point.copies_output and not recomputing:
            is_done = self._copy_whole(hook_point.actions[0], forward_pass, tensor)
        if not is_done:
            tensor = self._apply_in_order(
                hook_point, forward_pass, tensor, module_input, recomputing
            )
        if self._stop_early:
            self._pending.difference_update(hook_point.actions)
            if not self._pending:  # the hooks at this hook point were the last ones
                settle(self.bound_hooks)
                raise Stop
        return tensor

    def _apply_in_order(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
        recomputing: bool,
    ) -> Tensor:
        tracer = self.tracer if hook_point is self._traced_point else None
        if tracer is not None:
            tracer.before(forward_pass.number, tensor)
        for bound_hook in hook_point.actions:
            if recomputing:  # the same work, but nothing of it is stored
                bound_hook = replace(bound_hook, pieces=[], last_pass=None)
            before = tensor
            try:
                firing, tensor = apply_hook(
                    bound_hook, hook_point, forward_pass, before, module_input
                )
            except Exception as error:
                number = forward_pass.number
                error.add_note(f"in {bound_hook.hook} at {bound_hook.site}, forward {number}")
                raise
            if firing is not None and not recomputing:
                self.captures.firings.append(firing)
            if tracer is not None and tensor is not before:
                tracer.changed(bound_hook.hook, before, tensor)
        if tracer is not None:
            tracer.after(tensor)
        return tensor

    def _copy_whole(self, bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor) -> bool:
        """Captures a whole tensor by a copy, the most common work. False if more is needed."""
        selection = forward_pass.whole(bound_hook.where)
        if (
            selection is None
            or type(tensor) is not Tensor
            or tensor.requires_grad
            or forward_pass.inference
            or tensor.shape[:2] != forward_pass.shape
            or bound_hook.last_pass is forward_pass
        ):
            return False
        bound_hook.last_pass = forward_pass
        bound_hook.fired += 1
        number = forward_pass.number
        bound_hook.pieces.append(CapturedChunk(number, selection, tensor.clone()))
        self.captures.firings.append((bound_hook, number, selection, tensor.shape[2:], None))
        return True

    def finish(self) -> None:
        self.captures.finish_all()
        self.captures.check_fired(self.tracker.forwards)

    def generate(
        self, inner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], scope: Scope
    ) -> Any:
        """Runs transformers' `generate` and follows each row from its prompt to its end.

        To it belong the calls of the model's own methods that this thread makes in `scope`.
        """
        if self.lm.two_texts:
            raise Unsupported(
                f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two "
                "parts by themselves: call the model with input_ids and decoder_input_ids in the "
                "block"
            )
        plan = plan_generation(self.lm.root, args, kwargs)
        text = self.tracker.begin_generation(plan)
        self.captures.turn_to(text)
        if self.tracer is not None:
            self.tracer.begin(plan)
        decisions = None
        if any(isinstance(bound.hook, Force) and bound.hook.decides for bound in self.bound_hooks):
            decisions = Decisions(text, plan.width if plan.embeddings else 0)
        thread = self._generate_thread = get_ident()

        def acts() -> bool:
            return get_ident() == thread and scope in CURRENT_SCOPES.get()

        try:
            with watch_generate(self.lm.root, self.tracer, decisions, acts) as self.watch:
                keywords = without_compilation(args, self._with_every_position(kwargs))
                output = inner(*args, **keywords)
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.rows, ending = end_of_rows(plan, text, sequences, self.watch)
            self.captures.finish(text, ending)
            if self.tracer is not None:
                prompt_lengths = [text.lengths[prompt] for prompt in ending.prompts]
                self.tracer.finish(self.rows, prompt_lengths, ending.sources)
        except BaseException:
            self.captures.forget(text)
            raise
        finally:
            self.tracker.generation = None
        return output

    def _with_every_position(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds logits_to_keep where the model needs it to run its blocks at every position."""
        keep = self.lm.logits_to_keep(1)
        if keep == 1 or all(bound_hook.head for bound_hook in self.bound_hooks):
            return kwargs
        return {"logits_to_keep": keep, **kwargs}


class CaptureStore:
    """The captures and firings of the bound hooks of one block, by text.

    Owned by the manager of the block. It also owns the state in the bound hooks: their `pieces`
    are those of the current text.
    """

    def __init__(self, bound_hooks: Sequence[BoundHook]) -> None:
        self.bound_hooks = bound_hooks
        self.current_text: SequenceBatch | None = None  # the text of the last forward
        self.firings: list[Firing] = []
        # of each text in the order in which the texts began: a list for each bound hook
        self._chunks: dict[SequenceBatch, list[list[CapturedChunk]]] = {}
        self._endings: dict[SequenceBatch, SequenceEnd] = {}  # of the texts that have ended
        self._finished: dict[SequenceBatch, Captures] = {}
        self._problem: str | None = None
        for bound_hook in bound_hooks:
            bound_hook.pieces, bound_hook.fired, bound_hook.last_pass = [], 0, None

    def turn_to(self, text: SequenceBatch) -> None:
        """Makes this text the one to which captures are added."""
        if text is self.current_text:
            return
        self.current_text = text
        if text not in self._chunks:
            self._chunks[text] = [[] for _ in self.bound_hooks]
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            bound_hook.pieces = chunks

    def finish(self, text: SequenceBatch, ending: SequenceEnd) -> None:
        """Ends a text. Its captures are joined when they are first asked for."""
        if text not in self._chunks or text in self._finished:
            return
        self._endings[text] = ending
        self._finished[text] = self._captures(text, ending)
        if self._problem is None:
            self._problem = _unreached_message(self.bound_hooks, text, ending)
        if text is self.current_text:
            self._leave_text()

    def finish_all(self) -> None:
        """Ends each text that no `generate` has ended."""
        for text in list(self._chunks):
            self.finish(text, _plain_ending(text))

    def forget(self, text: SequenceBatch) -> None:
        """Drops a text that was interrupted."""
        self._chunks.pop(text, None)
        self._leave_text()

    def _leave_text(self) -> None:
        self.current_text = None
        for bound_hook in self.bound_hooks:
            bound_hook.pieces = []

    def texts(self) -> list[Captures]:
        """Returns the captures of the user's hooks by text; open texts as if they ended now."""
        texts = []
        for text in self._chunks:
            if text in self._finished:
                texts.append(self._finished[text])
            elif not text.generating:
                texts.append(self._captures(text, _plain_ending(text)))
        return texts

    def observed(self) -> Captures:
        """Returns the captures of the observers in the first text, after its end."""
        text = next(iter(self._chunks))
        return self._captures(text, self._endings[text], observers=True)

    def _captures(
        self, text: SequenceBatch, ending: SequenceEnd, *, observers: bool = False
    ) -> Captures:
        slots, ended = [], []
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            hook, site = bound_hook.hook, bound_hook.site
            if bound_hook.observer is not observers or not isinstance(hook, Capture) or not chunks:
                continue
            if not any(_acts_before_end(chunk.cells, ending) for chunk in chunks):
                ended.append(site)  # all that was captured is the padding of rows that had ended
                continue
            join = partial(_join_chunks, hook, site, list(chunks), text, ending)
            slots.append(LazyCapture(site, hook.name, join))
        return Captures(tuple(slots), tuple(dict.fromkeys(ended)))

    def check_fired(self, forwards: int) -> None:
        """Raises `NeverFired` for the first hook that did nothing, or not all that it was to do."""
        fired: set[BoundHook] = set()  # before the end of some row
        for bound_hook, _, selection, _, _ in self.firings:
            ending = None if selection is None else self._endings.get(selection.text)
            if bound_hook not in fired and _acts_before_end(selection, ending):
                fired.add(bound_hook)
        for bound_hook in self.bound_hooks:
            if bound_hook not in fired:
                raise NeverFired(_never_fired_message(bound_hook, forwards))
        if self._problem is not None:
            raise NeverFired(self._problem)

    def log(self) -> pd.DataFrame:
        """Returns one row for each hook, site, forward and row of the batch where a hook fired.

        Columns: hook (its number, in the order in which the hooks were passed), do, site, forward,
        row, positions ("0-14"), numbers (how many the hook read or wrote) and changed (how many of
        those an edit changed; 0 for a capture). Observers are left out.
        """
        table: list[list[object]] = []
        for bound_hook, forward, selection, shape, changed in self.firings:
            if bound_hook.observer:
                continue
            subject = [bound_hook.number, str(bound_hook.hook), str(bound_hook.site), forward]
            if selection is None:
                total = 0 if changed is None else int(changed)
                table.append([*subject, -1, "", shape.numel(), total])
                continue
            ending = self._endings.get(selection.text)
            counts = [[0]] * len(selection.rows) if changed is None else changed.tolist()
            rows = zip(
                selection.rows, selection.prompts, selection.row_positions, counts, strict=True
            )
            for row, prompt, all_positions, row_counts in rows:
                positions = _before_end(all_positions, row, ending)
                if positions:
                    count = len(positions)
                    numbers = [count * shape.numel(), sum(row_counts[:count])]
                    table.append([*subject, prompt, _positions_text(positions), *numbers])
        return pd.DataFrame(table, columns=LOG_COLUMNS)


def _plain_ending(text: SequenceBatch) -> SequenceEnd:
    return SequenceEnd(range(len(text.lengths) * text.expand))


def _join_chunks(
    hook: Capture,
    site: AnySite,
    chunks: list[CapturedChunk],
    text: SequenceBatch,
    ending: SequenceEnd,
) -> Captured:
    first = chunks[0]
    if first.cells is None:
        return Captured(site, hook.where, first.values, None, (), (), hook.name)
    is_scores = isinstance(site, Site) and site.name == "scores"
    fill = unseen_value(first.values.dtype, is_scores)
    values, positions, final_rows = join_chunks(chunks, ending, fill)
    values = swap_head_and_query(site, values) if first.leaf is None else first.leaf
    rows_per_prompt = text.expand if ending.limits is None else 1
    rows = tuple(ending.prompts[row] // rows_per_prompt for row in final_rows)
    prompts = tuple(map(text.prompt, rows))
    return Captured(site, hook.where, values, positions, rows, prompts, hook.name)


def _before_end(positions: PositionRange, row: int, ending: SequenceEnd | None) -> PositionRange:
    """The positions before the end of a model row.

    A row that has ended is given padding while the other rows continue.
    """
    limit = None if ending is None else ending.limit(row)
    if limit is None:
        return positions
    return positions[: bisect_left(positions, limit)]


def _acts_before_end(selection: Selection | None, ending: SequenceEnd | None) -> bool:
    if selection is None or ending is None or ending.limits is None:
        return True
    for row, positions in zip(selection.rows, selection.row_positions, strict=True):
        if _before_end(positions, row, ending):
            return True
    return False


def _positions_text(positions: PositionRange) -> str:
    """Positions as text: "3", "0-14", "2,5,7"."""
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
        return f"{positions[0]}-{positions[-1]}"
    return ",".join(map(str, positions))


# ---- hooks that did not fire


def _unreached_message(
    bound_hooks: Iterable[BoundHook], text: SequenceBatch, ending: SequenceEnd
) -> str | None:
    """The message for the first position of a hook that the text did not reach; None if none."""
    for bound_hook in one_per_selection(bound_hooks):
        positions_by_prompt = text.selected_positions(bound_hook.where)
        for number, row in enumerate(ending.prompts):
            if ending.limits is None:
                positions = positions_by_prompt[row // text.expand]
                reached = text.reached(row, head=bound_hook.head)
            else:
                positions = positions_by_prompt[row]
                reached = range(ending.limits[number])
            if isinstance(positions, tuple) and positions[-1] not in reached:
                return (
                    f"{bound_hook.hook} at {bound_hook.site} means position {positions[-1]} of row "
                    f"{row}, and the text ended before it came there (positions "
                    f"{first_to_last(reached)})"
                )
    return None


def _never_fired_message(bound_hook: BoundHook, forwards: int) -> str:
    subject = f"{bound_hook.hook} never fired at {bound_hook.site}"
    if not forwards:
        return f"{subject}: no forward of the model ran inside the block"
    ran = "1 forward ran" if forwards == 1 else f"{forwards} forwards ran"
    if bound_hook.fired:
        return (
            f"{subject} before a row's end, though {ran}: the rows that it means had ended before "
            "they came to its positions or steps. Look at run.log, and at the lengths of the rows; "
            "leave those rows out with rows="
        )
    return (
        f"{subject}, though {ran}: either its positions, rows or steps did not come, or the model "
        "never calls this module (some are bypassed by fused code). Look at run.log, and at "
        "lm.describe() for the sites"
    )
