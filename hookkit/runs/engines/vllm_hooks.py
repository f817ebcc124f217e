"""The hooks of one run inside vLLM's engine: from its flat batches to rows and positions.

An engine computes one step after another. In each, some requests read a part of their prompt, and
others their last token. A module's tensor has the tokens of all of them on one axis. `EngineHooks`
cuts it into the forwards that hooks know: all requests that read one token are one forward, and
each part of a prompt is one. What a hook selects, changes and captures is computed by the same code
as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...errors import BadEdit, Unsupported
from ...hooks.capture import Capture, Captured, SequenceEnd
from ...models.batch_positions import (
    DecidedToken,
    SequenceBatch,
)
from ...models.lm import LM
from ...models.named_positions import find_positions
from ...models.positions import PositionRange
from ...models.sites import AnySite
from ..applied_hooks import forget, settle
from ..dispatch import find_input, pick_output, replace_input, replace_output
from ..generation import Generation
from ..hook_points import BoundHook, HookPoint, build_hook_points, sort_bound_hooks
from ..run import one_per_selection
from ..text_hooks import TextHooks, check_row
from .chunk_passes import EVERY_COLUMN, Chunk, ChunkPass, index_of
from .vllm_run import ServedResult, ServedRun
from .vllm_sites import STREAM


class EngineHooks:
    """Applies the hooks of one run in the steps of an engine. Its process owns the object.

    `read_batch` returns the chunks of the step that begins, and `tokens_of_row` the tokens of a row
    from one position to another. An error in a hook is kept in `error`, and ends the run after the
    step: vLLM would wait for ever for a step that raises.
    """

    def __init__(
        self,
        lm: LM,
        run: ServedRun,
        read_batch: Callable[[], list[Chunk]],
        tokens_of_row: Callable[[int, int, int], list[int]],
    ) -> None:
        self.lm, self.run = lm, run
        self.error: BaseException | None = None
        self.steps = 0
        self._read_batch, self._tokens_of_row = read_batch, tokens_of_row
        points = build_hook_points(lm, run.hooks, self._reference, run.observers)
        self.hook_points = points
        bound_hooks = sort_bound_hooks(points)
        order = {hook_at_site: index for index, hook_at_site in enumerate(run.order)}
        bound_hooks.sort(key=lambda hook: (hook.number, order.get((hook.number, hook.site), 0)))
        self.strategy = TextHooks(lm, bound_hooks)
        self.text = SequenceBatch(
            [EVERY_COLUMN] * len(run.prompts),
            list(map(len, run.prompts)),
            run.prompts.__getitem__,
            partial(find_positions, lm),
            generating=not run.is_forward,
            expand=run.returned,
            eos=run.eos,
            begun=True,
        )
        self.text.history = _History(tokens_of_row)  # pyright: ignore[reportAttributeAccessIssue]
        self.strategy.captures.turn_to(self.text)
        self._n_read = [0] * len(run.rows)  # how many tokens of each row have been read
        self._chunks: list[Chunk] = []
        self._passes: dict[bool, list[ChunkPass]] = {}
        self._decided: dict[int, tuple[int, DecidedToken]] = {}
        self._handles: list[Any] = []
        self._block_inputs: dict[HookPoint, Tensor] = {}  # of the blocks that are being computed
        self._check_positions()

    def _reference(
        self, sites: Sequence[AnySite], prompts: tuple[Any, ...]
    ) -> dict[AnySite, Captured]:
        for known_prompts, values in self.run.references:
            if known_prompts == prompts and all(site in values for site in sites):
                return {site: values[site] for site in sites}
        raise AssertionError(f"no values of {sites} on {prompts} were sent")

    def _check_positions(self) -> None:
        """Raises if a hook names a position that no step can read."""
        plan = None if self.run.is_forward else self._plan()
        for bound_hook in one_per_selection(self.strategy.bound_hooks):
            selected = self.text.selected_positions(bound_hook.where)
            for prompt, positions in enumerate(selected):
                if positions is not None:
                    length = self.text.lengths[prompt]
                    first = length - 1 if bound_hook.head else 0
                    possible = range(first, length + self.run.most - 1)
                    check_row(bound_hook, self.text, prompt, positions, possible, plan)
                    if self.run.is_forward and bound_hook.head:
                        _refuse_earlier_logits(bound_hook, positions, length)

    def _plan(self) -> Generation:
        return Generation(
            columns=self.text.columns,
            lengths=self.text.lengths,
            prompt=self.text.prompt,
            width=0,
            max_width=self.run.most,
            eos=self.run.eos,
            pad=None,
            beams=1,
            returned=self.run.returned,
            other_stops=True,
            embeddings=False,
            mode="",
            rules="",
        )

    # ---- hooks on modules

    def register(self, root: nn.Module) -> None:
        """Registers the hooks on the engine's model."""
        self._handles.append(root.register_forward_pre_hook(self._begin_step, with_kwargs=True))
        for point in self.hook_points:
            if point.location.side == "input":
                hook = partial(self._at_input, point)
                handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = partial(self._at_output, point)
                handle = point.module.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        for point in self.hook_points:
            if point.reads_input and point.location.item == STREAM:
                keep = partial(self._keep_stream_input, point)
                handle = point.module.register_forward_pre_hook(keep, with_kwargs=True)
                self._handles.append(handle)

    def remove(self) -> None:
        """Removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin_step(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.error is not None:
            return
        try:
            self._chunks = self._read_batch()
            self._check_taken()
            self.text.forget_step()
            forget(self.strategy.bound_hooks)
            self._passes = {False: self._passes_of_blocks(), True: self._passes_of_head()}
            sampling = {chunk.row for chunk in self._chunks if chunk.samples}
            others = [row for row in self.run.rows if row not in sampling]
            self.text.ended_rows = others.copy  # whose last values are kept
            for chunk in self._chunks:
                end = chunk.past + chunk.count
                self._n_read[chunk.row] = max(self._n_read[chunk.row], end)
            self.steps += 1
        except Exception as error:  # noqa: BLE001  raised once the step is over
            self.error = error

    def _passes_of_blocks(self) -> list[ChunkPass]:
        """The forwards of a step: the rows that read one token together, and each longer chunk."""
        single = [chunk for chunk in self._chunks if chunk.count == 1]
        longer = [[chunk] for chunk in self._chunks if chunk.count > 1]
        groups = [single, *longer] if single else longer
        passes: list[ChunkPass] = []
        for chunks in groups:
            firsts = [chunk.past for chunk in chunks]
            new_from = [self._n_read[chunk.row] for chunk in chunks]
            passes.append(self._pass(chunks, firsts, new_from, chunks[0].count))
        return passes

    def _passes_of_head(self) -> list[ChunkPass]:
        """The one forward whose logits choose a token in each row that has read all of its own."""
        chunks = [chunk for chunk in self._chunks if chunk.samples]
        if not chunks:
            return []
        firsts = [chunk.past + chunk.count - 1 for chunk in chunks]
        return [self._pass(chunks, firsts, [0] * len(chunks), 1)]

    def _pass(
        self, chunks: list[Chunk], firsts: list[int], new_from: list[int], width: int
    ) -> ChunkPass:
        return ChunkPass(
            self.text, self.steps, 0, len(chunks), width, range(width), 0,
            chunks=chunks, firsts=firsts, new_from=new_from,
        )  # fmt: skip

    def _at_input(
        self, point: HookPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.error is not None:
            return None
        try:
            if point.location.item == STREAM:
                return self._at_stream_input(point, args, kwargs)
            tensor, key = find_input(args, kwargs, point.location.item, point.location.path)
            new = self._apply(point, tensor, None)
        except Exception as error:  # noqa: BLE001  raised once the step is over
            self.error = error
            return None
        return None if new is tensor else replace_input(args, kwargs, key, new)

    def _at_stream_input(
        self, point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Applies hooks to the stream that a module is given as two tensors, its last arguments."""
        stream = _stream_in(point, args, kwargs)
        new = self._apply(point, stream, None)
        if new is stream:
            return None
        *others, _, residual = args
        return (*others, *_as_two(new, residual)), kwargs

    def _keep_stream_input(
        self, point: HookPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keeps a block's input for the hooks at its output: the block writes into it."""
        if self.error is not None:
            return
        try:
            self._block_inputs[point] = _stream_in(point, args, kwargs).clone()
        except Exception as error:  # noqa: BLE001  raised once the step is over
            self.error = error

    def _at_output(
        self,
        point: HookPoint,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if self.error is not None:
            return None
        try:
            if point.location.item == STREAM:
                hidden, residual = output
                stream = hidden + residual
                new = self._apply(point, stream, self._block_inputs.pop(point, None))
                return None if new is stream else _as_two(new, residual)
            if point.location.item == "logits":
                return self._apply_to_logits(point, output)
            tensor = pick_output(output, point.location)
            module_input = None
            if point.reads_input:
                module_input, _ = find_input(args, kwargs, 0, point.location.path)
            new = self._apply(point, tensor, module_input)
        except Exception as error:  # noqa: BLE001  raised once the step is over
            self.error = error
            return None
        return None if new is tensor else replace_output(output, point.location.item, new)

    # ---- the tensors of a step

    def _apply(self, point: HookPoint, tensor: Tensor, module_input: Tensor | None) -> Tensor:
        """Applies the hooks to a tensor with the tokens of all requests on one axis."""
        count = sum(chunk.count for chunk in self._chunks)
        flat = _on_one_axis(tensor, count, point)
        flat_input = None
        if module_input is not None:
            flat_input = _on_one_axis(module_input, count, point)
        new_flat = flat
        for forward in self._passes[False]:
            index = index_of(forward.chunks)
            shape = (len(forward.chunks), forward.width)
            part = flat[index].unflatten(0, shape)
            part_input = None
            if flat_input is not None:
                part_input = flat_input[index].unflatten(0, shape)
            new = self.strategy.apply(point, forward, part, part_input, recomputing=False)
            if point.location.shared:
                flat[index] = new.flatten(0, 1)  # the block reads this tensor again
            elif new is not part:
                if new_flat is flat:
                    new_flat = flat.clone()
                new_flat[index] = new.flatten(0, 1)
        settle(point.actions)
        return tensor if new_flat is flat else new_flat.reshape(tensor.shape)

    def _apply_to_logits(self, point: HookPoint, logits: Tensor) -> Tensor | None:
        """Applies the hooks to the logits [request, vocab] of the rows that choose a token."""
        if not self._passes[True]:
            return None
        if len(logits) != len(self._chunks):
            raise Unsupported(
                f"the engine computed {len(logits)} rows of logits for {len(self._chunks)} "
                "requests, and hooks need one for each"
            )
        [forward] = self._passes[True]
        chosen = [index for index, chunk in enumerate(self._chunks) if chunk.samples]
        part = logits
        if len(chosen) < len(logits):
            part = logits[chosen]
        new = self.strategy.apply(point, forward, part[:, None], None, recomputing=False)
        settle(point.actions)
        new_logits = self._decide(forward, new[:, 0])
        if len(chosen) == len(logits):
            return new_logits
        whole = logits.clone()
        whole[chosen] = new_logits
        return whole

    def _decide(self, forward: ChunkPass, logits: Tensor) -> Tensor:
        """Leaves only the token that a hook has decided on, unless a later hook overruled it."""
        index_of_row = {chunk.row: index for index, chunk in enumerate(forward.chunks)}
        new = logits
        for (row, position), decision in self.text.decided.items():
            index, token = index_of_row[row], decision.token
            if not decision.certain or logits[index, token] < logits[index].amax():
                continue
            if new is logits:
                new = logits.clone()
            new[index] = -torch.inf
            new[index, token] = logits[index, token]
            self._decided[row] = position + 1, decision
        return new

    def _check_taken(self) -> None:
        """Raises `BadEdit` if a row took another token than a hook had decided on."""
        for row in list(self._decided):
            position, decision = self._decided[row]
            tokens = self._tokens_of_row(row, position, position + 1)
            if not tokens:
                continue
            del self._decided[row]
            self._check_decision(row, tokens, decision)

    def _check_decision(self, row: int, taken: Sequence[int], decision: DecidedToken) -> None:
        if taken and taken[0] != decision.token:
            raise BadEdit(
                f"{decision.hook} decides on token {decision.token} in row {self.text.of(row)}, "
                f"and vLLM took token {taken[0]}: a rule of its own leaves it out"
            )

    # ---- the end of a run

    def finish(self, rows: Sequence[Sequence[int]]) -> ServedResult:
        """Ends the run with the tokens of each row; raises for a hook that never fired."""
        for row, (position, decision) in self._decided.items():
            taken = list(rows[row][position : position + 1])
            self._check_decision(row, taken, decision)
        captures: list[Captured] = []
        observed: list[Captured] = []
        for bound_hook in self.strategy.bound_hooks:
            if isinstance(bound_hook.hook, Capture) and bound_hook.pieces:
                of_user = observed if bound_hook.observer else captures
                of_user.append(self._join(bound_hook, rows))
        store = self.strategy.captures
        prompts = [row // self.run.returned for row in self.run.rows]
        limits = [len(row) - 1 for row in rows]
        store.finish(self.text, SequenceEnd(prompts, limits, None, self.run.returned))
        store.check_fired(self.steps)
        return ServedResult([list(row) for row in rows], captures, observed, store.log())

    def _join(self, bound_hook: BoundHook, rows: Sequence[Sequence[int]]) -> Captured:
        """Joins what each step captured to one tensor with a row for each row of the run."""
        hook, site = bound_hook.hook, bound_hook.site
        assert isinstance(hook, Capture)
        values: dict[int, list[Tensor]] = {}
        positions: dict[int, list[Tensor]] = {}
        for chunk in bound_hook.pieces:
            if chunk.cells is None:
                return Captured(site, hook.where, chunk.values.cpu(), None, (), (), hook.name)
            chunk_values = chunk.values.to_dense().cpu()
            for index, row in enumerate(chunk.cells.rows):
                row_positions = chunk.cells.positions[index]
                is_kept = (row_positions >= 0) & (row_positions < len(rows[row]) - 1)
                values.setdefault(row, []).append(chunk_values[index, is_kept])
                positions.setdefault(row, []).append(row_positions[is_kept])
        kept_rows = [row for row in sorted(values) if any(map(len, positions[row]))]
        joined = pad_sequence([torch.cat(values[row]) for row in kept_rows], batch_first=True)
        joined_positions = [torch.cat(positions[row]) for row in kept_rows]
        prompts = tuple(row // self.run.returned for row in kept_rows)
        return Captured(
            site,
            hook.where,
            joined.to_sparse() if hook.sparse else joined,
            pad_sequence(joined_positions, batch_first=True, padding_value=-1),
            prompts,
            tuple(map(self.text.prompt, prompts)),
            hook.name,
        )


@dataclass(eq=False)
class _History:
    """The tokens of the rows, by row and columns, as the tensor of a batch gives them."""

    tokens_of_row: Callable[[int, int, int], list[int]]

    def __getitem__(self, key: tuple[int, slice]) -> Tensor:
        row, columns = key
        return torch.tensor(self.tokens_of_row(row, columns.start, columns.stop))


def _refuse_earlier_logits(bound_hook: BoundHook, positions: PositionRange, length: int) -> None:
    """Raises for a capture of logits in a forward that means more than the last position."""
    if isinstance(bound_hook.hook, Capture) and positions[0] < length - 1:
        raise Unsupported(
            f"{bound_hook.hook} means position {positions[0]} of {length}, and vLLM computes "
            "logits only where a token is chosen: say pos=-1"
        )


def _stream_in(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that a module is given as two tensors, its last arguments."""
    names = [name for name in ("hidden_states", "residual") if name in kwargs]
    if names:
        raise Unsupported(f"{point.location.path} was called with the keywords {names}")
    *_, hidden, residual = args
    return hidden if residual is None else hidden + residual


def _as_two(stream: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The stream as the two tensors whose sum it is, without rounding."""
    if residual is None:
        return stream, None
    return torch.zeros_like(stream), stream


def _on_one_axis(tensor: Tensor, count: int, point: HookPoint) -> Tensor:
    """Returns a view [token, ...] of a tensor [token, ...] or [1, token, ...] of a step."""
    flat = tensor
    if tensor.ndim > 2 and tensor.shape[0] == 1:
        flat = tensor[0]
    if len(flat) != count:
        raise Unsupported(
            f"{point.location.path} has the shape {list(tensor.shape)} in a step of {count} "
            "tokens, so that its rows and positions are unknown"
        )
    return flat
