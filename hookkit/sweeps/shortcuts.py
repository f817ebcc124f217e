"""Which shortcuts a model allows. A trial of a few tokens decides it, once for each model.

The trial runs a small sweep with each shortcut and compares it with one plain forward. A shortcut
that gives other logits, or that fails, is not used, and the reason is stored.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hooks.base import Hook
from ..hooks.edits import steer
from ..models.lm import LM
from ..models.prompt_row import Row, crop_row, input_names
from ..models.prompts import continue_row
from ..models.sites import ModuleSite, Site
from ..runs.dispatch import HIDDEN_STATES_KEYWORDS
from ..runs.forward import forward
from ..runs.hook_points import build_hook_points
from ..runs.manager import HookBlock
from ..runs.partial import Path, SharedForward
from .forwards import INPUT, CellPrompt, Shortcuts, prefix_cache, run_base, run_cell_prompts
from .inputs import SweepInputs

LENGTHS = (5, 3, 4)  # of the trial's prompts, in tokens
POSITIONS = (-1, -2)  # at which the trial edits

# By how much the values of two forwards may differ, relative to the largest value.
LIMITS = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def shortcuts(lm: LM, rows: Sequence[Row] = ()) -> Shortcuts:
    """Returns what this model allows, with its current settings.

    If the prompts `rows` have images or other inputs, the trial is one of them.
    """
    attention = getattr(lm.config, "_attn_implementation", None)
    key = "shortcuts", attention, lm.root.training, _dtype(lm), input_names(rows)
    return _once(lm, key, lambda: _try_shortcuts(_trial_inputs(lm, rows)))


def reads_ahead(lm: LM, rows: Sequence[Row] = ()) -> bool:
    """True if the logits at a position depend on a later token; then no position can be skipped."""

    def trial() -> bool:
        row = _trial_inputs(lm, rows).rows[0]
        last = (row[-1] + 1) % lm.n_tokens
        changed_row = continue_row(lm, crop_row(row, len(row) - 1), [last])
        first, repeated, changed = forward(lm, [row, row, changed_row]).logits[:, :-1].float()
        limit = LIMITS.get(_dtype(lm), 2e-5) * float(first.abs().max())
        # With dropout the same row gives different logits, and nothing can be concluded.
        is_stable = float((first - repeated).abs().max()) <= limit
        return is_stable and float((first - changed).abs().max()) > limit

    return _once(lm, ("reads_ahead", lm.root.training, input_names(rows)), trial)


def has_rows(lm: LM, site: ModuleSite) -> bool:
    """True if the tensor of a module site is [batch, pos, ...] for every batch size."""

    def trial() -> bool:
        of_two, of_three = _trial_shape(lm, site, 2), _trial_shape(lm, site, 3)
        return of_two[:2] == (2, max(LENGTHS)) and of_three[:2] == (3, max(LENGTHS))

    return _once(lm, ("has_rows", site), trial)


def is_called(lm: LM, site: ModuleSite) -> bool:
    """True if a forward calls the module. Fused code bypasses some modules, and evaluation skips
    some."""
    key = "is_called", site.path, lm.root.training
    return _once(lm, key, lambda: bool(_record_module(lm, site, len(LENGTHS)).kinds))


def _once(lm: LM, key: Any, trial: Callable[[], Any]) -> Any:
    """Returns the result of a trial, which is made once for each model."""
    if key not in lm.trial_results:
        lm.trial_results[key] = trial()
    return lm.trial_results[key]


def _record_module(lm: LM, site: ModuleSite, n_rows: int) -> "_ShapeRecorder":
    recorder = _ShapeRecorder([lm.submodule(site.path)])
    _run_trial(recorder, _trial_inputs(lm), range(n_rows))
    return recorder


def _trial_shape(lm: LM, site: ModuleSite, n_rows: int) -> tuple[int, ...]:
    """Returns the shape of a module site's tensor with `n_rows` rows; () if there is no tensor, or
    if the module does not run."""
    recorder = _record_module(lm, site, n_rows)
    if site.side == "output":
        return recorder.outputs.get((0, site.item), ())
    names = [site.item]
    if site.item == 0:
        names += HIDDEN_STATES_KEYWORDS
    shapes = (recorder.inputs.get((0, (name,))) for name in names)
    return next(filter(None, shapes), ())


def _try_shortcuts(inputs: SweepInputs) -> Shortcuts:
    lm = inputs.lm
    if not lm.n_layers or "resid_pre" not in lm.layout.names:
        return no_shortcuts("the model's blocks are not known")
    try:
        factors, kinds = _inspect_blocks(inputs)
        expected = _expected_logits(inputs)
    except Exception as error:  # noqa: BLE001  whatever fails, cells can still run one by one
        return no_shortcuts(_describe_error(error))
    shared = Shortcuts(True, True, False, True, {}, factors, kinds)
    return _try_each(inputs, shared, expected)


def _try_each(inputs: SweepInputs, shared: Shortcuts, expected: Tensor) -> Shortcuts:
    """Returns the shortcuts of those that `shared` allows with which a trial gives the expected
    logits, and `prefix` if it does so too."""
    why: dict[str, str] = {}
    for grow, last in product((True, False), repeat=2):
        allowed = replace(shared, grow=grow, last=last)
        reason = _difference(inputs, allowed, expected)
        if not reason:
            break
        why["last" if last else "grow"] = reason
    else:
        return no_shortcuts(why["grow"])
    why["prefix"] = "a prompt with more than token ids is read at once"
    if not inputs.has_more_than_tokens:
        why["prefix"] = _difference(inputs, replace(allowed, prefix=True), expected)
    allowed = replace(allowed, prefix=not why["prefix"])
    for name in ("grow", "last", "prefix"):
        if getattr(allowed, name):
            why.pop(name, None)
    return replace(allowed, why=why)


def _dtype(lm: LM) -> Any:
    return getattr(lm.root, "dtype", None)


def no_shortcuts(reason: str) -> Shortcuts:
    """Returns shortcuts none of which is allowed, for this reason."""
    why: dict[str, str] = dict.fromkeys(("batch", "grow", "prefix", "last"), reason)
    return Shortcuts(False, False, False, False, why, {}, [])


def _describe_error(error: Exception) -> str:
    return f"a trial raised {type(error).__name__}: {error}".split("\n")[0]


def _read_length(row: Row) -> int:
    """Returns how many tokens an encoder-decoder's encoder reads, or else the decoder."""
    return len(getattr(row, "source", None) or row)


def _trial_inputs(lm: LM, prompts: Sequence[Row] = ()) -> SweepInputs:
    if input_names(prompts):
        # the sources of an encoder-decoder are padded where they differ in length
        longest, shortest = max(prompts, key=_read_length), min(prompts, key=_read_length)
        own_rows = (longest, shortest, longest)
        return SweepInputs(lm, own_rows, own_rows, (1,) * len(own_rows))
    ids = (number**3 * 7919 % lm.n_tokens for number in count(3))
    rows = tuple(tuple(islice(ids, length)) for length in LENGTHS)
    return SweepInputs(lm, rows, rows, (1,) * len(rows))


class _TrialEdit(NamedTuple):
    """An edit of the trial, which adds a random vector at a block and position of some rows."""

    layer: int
    pos: int
    on_rows: Callable[..., Hook]


def _trial_edits(lm: LM) -> list[_TrialEdit]:
    layers = lm.layout.layers("resid_pre") or []
    edits: list[_TrialEdit] = []
    for layer, pos in product(sorted({layers[0], layers[len(layers) // 2], layers[-1]}), POSITIONS):
        site = Site("resid_pre", layer)
        generator = torch.Generator().manual_seed(layer - pos)
        vector = torch.randn(lm.shape(site), generator=generator)
        edits.append(_TrialEdit(layer, pos, partial(steer, site, vector, pos=pos)))
    return edits


def _expected_logits(inputs: SweepInputs) -> Tensor:
    """Returns the last logits of each cell and prompt [cell row, vocab], from a plain forward."""
    prompts, hooks = [], []
    for edit in _trial_edits(inputs.lm):
        rows = range(len(prompts), len(prompts) + len(inputs))
        hooks.append(edit.on_rows(rows=list(rows)))
        prompts += inputs.rows
    return forward(inputs.lm, prompts, *hooks, logits="last").logits[:, -1]


def _difference(inputs: SweepInputs, allowed: Shortcuts, expected: Tensor) -> str:
    """Returns why these shortcuts do not work for this model; an empty string if they do."""
    try:
        logits = _trial_logits(inputs, allowed)
    except Exception as error:  # noqa: BLE001  a model that cannot run this way raises anything
        return _describe_error(error)
    target = expected.float()
    largest = target.abs().max().clamp(min=1e-9)
    difference = float((logits.float() - target).abs().max() / largest)
    limit = LIMITS.get(expected.dtype, LIMITS[torch.float32])
    if difference <= limit:
        return ""
    return f"a trial gave other logits (by {difference:.1g} of the largest; {limit:.1g} is allowed)"


def _trial_logits(inputs: SweepInputs, allowed: Shortcuts) -> Tensor:
    """Returns the last logits of each cell and prompt [cell row, vocab], with these shortcuts.

    The cells of the first block run by themselves, so that the others skip it.
    """
    lm, edits = inputs.lm, _trial_edits(inputs.lm)
    hook_points = [build_hook_points(lm, [edit.on_rows()], no_reference) for edit in edits]
    cell_prompts: list[CellPrompt] = []
    for (number, edit), row in product(enumerate(edits), range(len(inputs))):
        block = edit.layer if allowed.grow else INPUT
        cell_prompts.append(CellPrompt(block, number, row, inputs.lengths[row] + edit.pos))
    width = -min(POSITIONS) if allowed.prefix else inputs.count_columns(range(len(inputs)))
    layers = [edit.layer for edit in edits]
    base = run_base(inputs, range(len(inputs)), [], layers, width, cache=allowed.prefix)
    first_block = min(cell_prompt.block for cell_prompt in cell_prompts)
    logits: dict[CellPrompt, Tensor] = {}
    for is_first in (True, False):
        group = [cell for cell in sorted(cell_prompts) if (cell.block == first_block) == is_first]
        if group:
            values = run_cell_prompts(base, inputs, group, hook_points, width, allowed)
            logits |= zip(group, values[:, -1], strict=True)
    return torch.stack([logits[cell_prompt] for cell_prompt in cell_prompts])


def no_reference(sites: Any, prompts: Any) -> Any:
    """Stands for the reference values of hooks that need none."""
    raise AssertionError("these hooks need no reference values")


class _ShapeRecorder:
    """Records the shapes of the inputs and outputs of some modules, by their number, and owns them.

    kinds  0 for a module that returns a tensor, or the length of its tuple
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.inputs: dict[tuple[int, Path], tuple[int, ...]] = {}
        self.outputs: dict[tuple[int, int | str], tuple[int, ...]] = {}
        self.kinds: dict[int, int] = {}

    def wrap_modules(self, block: HookBlock) -> None:
        """Wraps the forwards of the modules for the time of a block."""
        for number, module in enumerate(self.modules):
            block.overrides.wrap_method(module, "forward", partial(self._record_forward, number))

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

    def _record_inputs(self, number: int, value: Any, path: Path) -> None:
        if isinstance(value, Tensor):
            self.inputs[number, path] = tuple(value.shape)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                self._record_inputs(number, item, (*path, index))
        elif type(value) is dict:
            for name, item in value.items():
                self._record_inputs(number, item, (*path, name))


def _inspect_blocks(inputs: SweepInputs) -> tuple[dict[tuple[int, Path], int], list[int]]:
    """Returns which inputs of the blocks have rows, and what the blocks return."""
    of_two, _ = _inspect_batch(inputs, 2)
    of_three, kinds = _inspect_batch(inputs, 3)
    factors: dict[tuple[int, Path], int] = {}
    for path in of_two.keys() & of_three.keys():
        factor = _row_factor(of_two[path], of_three[path])
        if factor is not None:
            factors[path] = factor
    return factors, kinds


def _inspect_batch(
    inputs: SweepInputs, n_rows: int
) -> tuple[dict[tuple[int, Path], set[int]], list[int]]:
    """Runs `n_rows` rows with and without a cache. Returns the lengths of axis 0 of each input of
    the blocks, and what the blocks return."""
    lm = inputs.lm
    block_names = [lm.family.block.format(layer=layer) for layer in range(lm.n_layers)]
    blocks = list(map(lm.submodule, block_names))
    plain, cached = _ShapeRecorder(blocks), _ShapeRecorder(blocks)
    _run_trial(plain, inputs, range(n_rows))
    with suppress(Exception):  # a model that takes no cache runs without one
        _run_trial(cached, inputs, range(n_rows), cached=True)
    lengths: dict[tuple[int, Path], set[int]] = defaultdict(set)
    for path, shape in chain(plain.inputs.items(), cached.inputs.items()):
        lengths[path].add(shape[0] if shape else 0)
    return lengths, [plain.kinds[number] for number in range(len(blocks))]


def _row_factor(of_two: set[int], of_three: set[int]) -> int | None:
    """Returns how many entries of axis 0 a row has, from the lengths of axis 0 with two rows and
    with three; 0 if it has no rows, None if it varies."""
    of_two, of_three = of_two - {1}, of_three - {1}  # 1 is one entry for all rows
    if of_two == of_three and len(of_two) <= 1:
        return 0
    factor = max(of_two, default=0) // 2
    return factor if (of_two, of_three) == ({2 * factor}, {3 * factor}) else None


def _run_trial(
    recorder: _ShapeRecorder, inputs: SweepInputs, rows: Sequence[int], *, cached: bool = False
) -> None:
    """Runs some rows of the trial; with `cached` only the last two positions, after a cache."""
    from transformers import DynamicCache

    lm, columns = inputs.lm, inputs.count_columns(rows)
    settings = lm.accepted(use_cache=cached, return_dict=True)
    model_inputs = inputs.model_inputs(rows, columns, columns)
    width = columns
    with torch.no_grad():
        if cached:
            width, whole, indices = 2, DynamicCache(), torch.arange(len(rows))
            lm.model(**model_inputs, **settings, past_key_values=whole)
            settings["past_key_values"] = prefix_cache(whole, columns - width, lambda: indices)
            model_inputs = inputs.model_inputs(rows, columns, width)
        shared_forward = SharedForward(lm, [], rows=len(rows), width=width)
        shared_forward.run({**model_inputs, **settings}, recorder.wrap_modules)
