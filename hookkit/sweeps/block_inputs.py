"""Which inputs of the blocks have rows, and what the blocks return, as forwards of a trial show.

An input has rows if its first axis grows with the number of rows. Where rows join a batch at a
block, such inputs need an entry for each of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..models.attention import intercept_tensors
from ..models.lm import LM
from ..models.overrides import Overrides
from ..models.sites import Site
from ..runs.growing_batch import Factors, NotByRow, Path, TokenAxes, key_of_mask
from ..runs.partial import SharedForward, skip_block
from .cell_batches import BaseForward, cache_of_rows
from .forwards import run_base
from .inputs import SweepInputs

Lengths: TypeAlias = Mapping[tuple[int, Path], set[int]]
"""By block and path: the lengths that axis 0 of an argument had."""


class ShapeRecorder:
    """Records the shapes of the inputs and outputs of some modules, by their number, and owns them.

    kinds  0 for a module that returns a tensor, or the length of its tuple
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.inputs: dict[tuple[int, Path], tuple[int, ...]] = {}
        self.outputs: dict[tuple[int, int | str], tuple[int, ...]] = {}
        self.kinds: dict[int, int] = {}

    @contextmanager
    def wrap_modules(self) -> Iterator[None]:
        """Inside this context the forwards of the modules are recorded."""
        with Overrides() as overrides:
            for number, module in enumerate(self.modules):
                overrides.wrap_method(module, "forward", partial(self._record_forward, number))
            yield

    def _record_forward(self, number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._record_inputs(number, args, ())
        self._record_inputs(number, kwargs, ())
        output = inner(*args, **kwargs)
        items: Any = [(0, output)]
        if isinstance(output, dict):
            items = output.items()
        elif isinstance(output, tuple | list):
            items = enumerate(output)
        for item, value in items:
            if isinstance(value, Tensor):
                self.outputs[number, item] = tuple(value.shape)
        self.kinds[number] = len(output) if isinstance(output, tuple) else 0
        return output

    @property
    def lengths(self) -> dict[tuple[int, Path], set[int]]:
        """The lengths of axis 0 of the inputs; 0 for a tensor without axes."""
        return {path: {(*shape, 0)[0]} for path, shape in self.inputs.items()}

    def _record_inputs(self, number: int, value: Any, path: Path) -> None:
        if isinstance(value, Tensor):
            self.inputs[number, path] = tuple(value.shape)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                self._record_inputs(number, item, (*path, index))
        elif type(value) is dict:
            for name, item in value.items():
                self._record_inputs(number, item, (*path, name))


def blocks_of(lm: LM) -> list[nn.Module]:
    """Returns the blocks of a model."""
    return [lm.submodule(lm.family.block.format(layer=layer)) for layer in range(lm.n_layers)]


def inspect_blocks(inputs: SweepInputs) -> tuple[Factors, list[int]]:
    """Returns which inputs of the blocks have rows, and what the blocks return."""
    of_two, _ = _inspect_batch(inputs, 2)
    of_three, kinds = _inspect_batch(inputs, 3)
    return row_factors(of_two, of_three, 2, 3), kinds


def row_factors(of_some: Lengths, of_others: Lengths, some: int, others: int) -> Factors:
    """Returns how many entries a row has on axis 0 of each input of the blocks, from the lengths
    with `some` rows and with `others`."""
    factors: dict[tuple[int, Path], int] = {}
    for path in of_some.keys() & of_others.keys():
        factor = _row_factor(of_some[path], of_others[path], some, others)
        if factor is not None:
            factors[path] = factor
    return factors


def cached_inputs(
    inputs: SweepInputs, base: BaseForward, kinds: Sequence[int]
) -> tuple[Factors, TokenAxes]:
    """Returns which inputs of the blocks have rows after a cache, and which have positions, from
    forwards that skip all blocks."""
    modules, recorders = blocks_of(inputs.lm), []
    with Overrides() as overrides:
        for module, kind in zip(modules, kinds, strict=True):
            overrides.wrap_method(module, "forward", partial(skip_block, kind))
        for n_rows, width in ((2, 2), (3, 2), (2, 3)):
            recorder = ShapeRecorder(modules)
            run_recorded(recorder, inputs, range(n_rows), base.cache, width)
            recorders.append(recorder)
    first, more_rows, wider = recorders
    axes: dict[tuple[int, Path], int] = {}
    for path in first.inputs.keys() & wider.inputs.keys():
        lengths = list(zip(first.inputs[path], wider.inputs[path], strict=False))
        axes[path] = lengths.index((2, 3)) if (2, 3) in lengths else -1
    return row_factors(first.lengths, more_rows.lengths, 2, 3), axes


@contextmanager
def watch_masks(lm: LM) -> Iterator[None]:
    """Inside this context a block whose attention has another mask than the block is given raises
    `NotByRow`.

    An attention that looks at all its keys to choose some of them, for example, would confuse those
    of different cells where their tokens are packed, and may do so in long batches only.
    """
    given: dict[int, Any] = {}

    def note_mask(number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        key = key_of_mask(modules[number], args, kwargs)
        given[number] = kwargs[key] if isinstance(key, str) else args[key]
        return inner(*args, **kwargs)

    def check_mask(number: int, name: str, mask: Tensor) -> Tensor:
        if not torch.equal(mask, given.get(number, mask[..., :0])):
            raise NotByRow(f"the attention of block {number} changes the mask")
        return mask

    modules = blocks_of(lm)
    with Overrides() as overrides:
        for number, module in enumerate(modules):
            overrides.wrap_method(module, "forward", partial(note_mask, number))
            attention = lm.submodule(lm.location(Site("pattern", number)).path)
            check = partial(check_mask, number)
            intercept_tensors(overrides, attention, "interface", frozenset({"mask"}), check)
        yield


def _inspect_batch(inputs: SweepInputs, n_rows: int) -> tuple[Lengths, list[int]]:
    """Runs `n_rows` rows with and without a cache. Returns the lengths of axis 0 of each input of
    the blocks, and what the blocks return."""
    blocks = blocks_of(inputs.lm)
    plain, cached = ShapeRecorder(blocks), ShapeRecorder(blocks)
    run_recorded(plain, inputs, range(n_rows))
    with suppress(Exception):  # a model that takes no cache runs without one
        base = run_base(inputs, range(n_rows), [], cache=True)
        run_recorded(cached, inputs, range(n_rows), base.cache)
    lengths: dict[tuple[int, Path], set[int]] = defaultdict(set)
    for path, length in chain(plain.lengths.items(), cached.lengths.items()):
        lengths[path] |= length
    return lengths, [plain.kinds[number] for number in range(len(blocks))]


def _row_factor(of_some: set[int], of_others: set[int], some: int, others: int) -> int | None:
    """Returns how many entries of axis 0 a row has, from the lengths of axis 0 with `some` rows and
    with `others`; 0 if it has no rows, None if it varies."""
    of_some, of_others = of_some - {1}, of_others - {1}  # 1 is one entry for all rows
    if of_some == of_others and len(of_some) <= 1:
        return 0
    factor = max(of_some, default=0) // some
    return factor if (of_some, of_others) == ({some * factor}, {others * factor}) else None


def run_recorded(
    recorder: ShapeRecorder,
    inputs: SweepInputs,
    rows: Sequence[int],
    cache: Any = None,
    width: int = 2,
) -> None:
    """Runs some rows of the trial; with a cache of them only the last `width` positions."""
    lm, columns = inputs.lm, inputs.count_columns(rows)
    settings = lm.accepted(use_cache=cache is not None, return_dict=True)
    if cache is None:
        width = columns
    else:
        indices = torch.arange(len(rows))
        settings["past_key_values"] = cache_of_rows(cache, columns - width, lambda: indices)
    model_inputs = inputs.model_inputs(rows, columns, width)
    shared_forward = SharedForward(lm, [], rows=len(rows), width=width)
    with torch.no_grad(), recorder.wrap_modules():
        shared_forward.run({**model_inputs, **settings})
