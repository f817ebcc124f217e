"""Which shortcuts a model allows. A trial of a few tokens decides it, once for each model.

The trial runs a small sweep with all shortcuts and compares it with one plain forward. If that
gives other logits, or fails, each shortcut is tried by itself. One that gives other logits is not
used, and the reason is stored. The results are kept on disk (see `kept_trials`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count, groupby, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hooks.base import Hook
from ..hooks.edits import steer
from ..models.lm import LM
from ..models.prompt_row import Row, crop_row, input_names
from ..models.prompts import continue_row
from ..models.sites import ModuleSite, Site
from ..runs.dispatch import HIDDEN_STATES_KEYWORDS
from ..runs.forward import forward
from ..runs.growing_batch import Factors, Path
from ..runs.hook_points import build_hook_points
from ..runs.manager import find_user_hooks
from .block_inputs import (
    ShapeRecorder,
    blocks_of,
    cached_inputs,
    inspect_blocks,
    row_factors,
    run_recorded,
    watch_masks,
)
from .cell_batches import BaseForward, CellPrompt, Job, Shortcuts
from .forwards import run_base, run_cell_prompts
from .hook_needs import INPUT, can_compute_tokens
from .inputs import SweepInputs
from .kept_trials import add_result, file_of_model, read_results

LENGTHS = (5, 3, 4)  # of the trial's prompts, in tokens
POSITIONS = (-1, -2)  # at which the trial edits
READS_AHEAD = "the model reads ahead: what it says at a position depends on later tokens too"
NO_PREFIX = "a prompt with more than token ids is read at once"
BY_PATH = ("factors", "token_axes")  # of `Shortcuts`, which JSON holds as lists
PACKED_ATTENTION = ("sdpa", "eager")  # which follow the mask that they are given
N_TOKENS = 512  # of which a trial compares the logits where only some are computed

# By how much the values of two forwards may differ, relative to the largest value.
LIMITS = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def shortcuts(lm: LM, rows: Sequence[Row] = ()) -> Shortcuts:
    """Returns what this model allows, with its current settings.

    If the prompts `rows` have images or other inputs, the trial is one of them. If they have one
    length, the prompts of the trial do too, and nothing is padded.
    """
    trial = partial(_try_shortcuts, lm, rows, is_padded=_is_padded(rows))
    return _once(lm, _key(lm, rows), trial, rows)


def _key(lm: LM, rows: Sequence[Row]) -> str:
    attention = getattr(lm.config, "_attn_implementation", None)
    about = lm.root.training, _dtype(lm), input_names(rows), _is_padded(rows)
    return f"shortcuts {attention} {about}"


def _is_padded(rows: Sequence[Row]) -> bool:
    return len(set(map(len, rows))) != 1


def reads_ahead(lm: LM, rows: Sequence[Row] = ()) -> bool:
    """True if the logits at a position depend on a later token; then no position can be skipped."""
    if _key(lm, rows) in lm.trial_results or not find_user_hooks(lm.model):
        return shortcuts(lm, rows).reads_ahead
    first, *_, changed = _trial_inputs(lm, rows).rows
    key = f"reads_ahead {lm.root.training} {input_names(rows)}"
    return _once(lm, key, lambda: _reads_ahead(lm, first, changed), rows)


def _reads_ahead(lm: LM, row: Row, changed_row: Row, logits: Tensor | None = None) -> bool:
    """`reads_ahead`, from a row and the same with another last token, whose logits may be known."""
    if logits is not None and _has_equal_logits(lm, *logits):
        return False
    first, repeated, changed = forward(lm, [row, row, changed_row]).logits
    # With dropout the same row gives different logits, and nothing can be concluded.
    return _has_equal_logits(lm, first, repeated) and not _has_equal_logits(lm, first, changed)


def _has_equal_logits(lm: LM, one: Tensor, other: Tensor) -> bool:
    """True if the logits [pos, token] of two rows are the same at all positions but the last."""
    one, other = one[:-1].float(), other[:-1].float()
    limit = LIMITS.get(_dtype(lm), 2e-5) * float(one.abs().max())
    return float((one - other).abs().max()) <= limit


def has_rows(lm: LM, site: ModuleSite) -> bool:
    """True if the tensor of a module site is [batch, pos, ...] for every batch size."""

    def trial() -> bool:
        of_two, of_three = _trial_shape(lm, site, 2), _trial_shape(lm, site, 3)
        return of_two[:2] == (2, max(LENGTHS)) and of_three[:2] == (3, max(LENGTHS))

    return _once(lm, f"has_rows {site!r}", trial)


def is_called(lm: LM, site: ModuleSite) -> bool:
    """True if a forward calls the module. Fused code bypasses some modules, and evaluation skips
    some."""
    key = f"is_called {site.path} {lm.root.training}"
    return _once(lm, key, lambda: bool(_record_module(lm, site, len(LENGTHS)).kinds))


def _once(lm: LM, key: str, trial: Callable[[], Any], rows: Sequence[Row] = ()) -> Any:
    """Returns the result of a trial, which is made once for each model.

    Trials of a user's images and other inputs are not kept on disk.
    """
    results = lm.trial_results
    if key in results:
        return results[key]
    if input_names(rows):
        results[key] = trial()
        return results[key]
    file = file_of_model(lm)
    for name, value in read_results(file).items():
        results.setdefault(name, _from_json(value))
    if key not in results:
        results[key] = trial()
        add_result(file, key, _as_json(results[key]))
    return results[key]


def _as_json(result: Any) -> Any:
    """Returns the result of a trial as JSON holds it."""
    if not isinstance(result, Shortcuts):
        return result
    values = vars(result)
    return values | {name: _as_list(values[name]) for name in BY_PATH}


def _as_list(by_path: Mapping[tuple[int, Path], int]) -> list[Any]:
    return [[layer, path, number] for (layer, path), number in by_path.items()]


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    by_path: dict[str, Any] = {name: _from_list(value[name]) for name in BY_PATH}
    return Shortcuts(**value | by_path)


def _from_list(items: Sequence[Any]) -> dict[tuple[int, Path], int]:
    return {(layer, tuple(path)): number for layer, path, number in items}


def _record_module(lm: LM, site: ModuleSite, n_rows: int) -> ShapeRecorder:
    recorder = ShapeRecorder([lm.submodule(site.path)])
    run_recorded(recorder, _trial_inputs(lm), range(n_rows))
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


def _try_shortcuts(lm: LM, rows: Sequence[Row], *, is_padded: bool) -> Shortcuts:
    inputs = _trial_inputs(lm, rows, is_padded=is_padded)
    first, *_, changed = inputs.rows
    if not lm.n_layers or "resid_pre" not in lm.layout.names:
        reason = "the model's blocks are not known"
        return no_shortcuts(reason, reads_ahead=_reads_ahead(lm, first, changed))
    base, recorder = None, ShapeRecorder(blocks_of(lm))
    with suppress(Exception), recorder.wrap_modules():  # a model that takes no cache raises
        base = _run_trial_base(inputs, cache=not inputs.has_more_than_tokens)
    if _reads_ahead(lm, first, changed, None if base is None else base.logits[[0, -1]]):
        return no_shortcuts(READS_AHEAD, reads_ahead=True)
    try:
        expected_recorder = ShapeRecorder(recorder.modules)
        with expected_recorder.wrap_modules():
            expected = _expected_logits(inputs)
        counts = len(expected), len(inputs)
        if base is not None and can_compute_tokens(lm, ()) and counts[0] != counts[1]:
            factors = row_factors(expected_recorder.lengths, recorder.lengths, *counts)
            allowed = _try_all(inputs, base, expected, factors, recorder)
            if allowed.batch:
                return allowed
        factors, kinds = inspect_blocks(inputs)
    except Exception as error:  # noqa: BLE001  whatever fails, cells can still run one by one
        return no_shortcuts(_describe_error(error))
    shared = Shortcuts(True, True, False, True, False, {}, factors, kinds)
    return _try_each(inputs, shared, expected)


def _run_trial_base(inputs: SweepInputs, *, cache: bool) -> BaseForward:
    """Runs the trial's prompts, with the logits of all positions."""
    rows = range(len(inputs))
    layers = [edit.layer for edit in _trial_edits(inputs.lm)]
    with_logits = replace(inputs, read_counts=tuple(inputs.lengths))
    return run_base(with_logits, rows, [], layers, inputs.count_columns(rows), cache=cache)


def _try_all(
    inputs: SweepInputs,
    base: BaseForward,
    expected: Tensor,
    factors: Factors,
    recorder: ShapeRecorder,
) -> Shortcuts:
    """Returns all shortcuts, if a trial with all but `pack` gives the expected logits, and one with
    all but the prefix does too; else none. `pack` is allowed if a trial with it does so as well.

    A prompt with more than token ids has no prefix.
    """
    kinds = [recorder.kinds[number] for number in range(inputs.lm.n_layers)]
    allowed = Shortcuts(True, True, False, True, True, {}, factors, kinds)
    reason = _difference(inputs, allowed, expected, base)
    if reason:
        return no_shortcuts(reason)
    if base.cache is None:
        return replace(allowed, why={"prefix": NO_PREFIX, "pack": NO_PREFIX})
    cached, axes = cached_inputs(inputs, base, kinds)
    allowed = replace(allowed, prefix=True, factors={**cached, **factors})
    reason = _difference(inputs, allowed, expected, base)
    if reason:
        return no_shortcuts(reason)
    packed = replace(allowed, pack=True, token_axes=axes)
    reason = _reason_unpacked(inputs.lm)
    if not reason:
        with watch_masks(inputs.lm):
            reason = _difference(inputs, packed, expected, base)
    return replace(allowed, why={"pack": reason}) if reason else packed


def _reason_unpacked(lm: LM) -> str:
    """Returns why this model cannot run packed rows; an empty string if a trial decides it."""
    implementation = getattr(lm.config, "_attn_implementation", None)
    if lm.ranks is not None:
        return "the model is split over several processes"
    if lm.family.attention != "interface" or implementation not in PACKED_ATTENTION:
        return "the model's attention is not transformers' own with sdpa or eager"
    if lm.layout.layers("pattern") != list(range(lm.n_layers)):
        return "some blocks have no attention"
    return ""


def _try_each(inputs: SweepInputs, shared: Shortcuts, expected: Tensor) -> Shortcuts:
    """Returns the shortcuts of those that `shared` allows with which a trial gives the expected
    logits, and `prefix` and `tokens` if it does so too."""
    why: dict[str, str] = {}
    for grow, last in product((True, False), repeat=2):
        allowed = replace(shared, grow=grow, last=last)
        reason = _difference(inputs, allowed, expected)
        if not reason:
            break
        why["last" if last else "grow"] = reason
    else:
        return no_shortcuts(why["grow"])
    why["prefix"] = NO_PREFIX
    if not inputs.has_more_than_tokens:
        why["prefix"] = _difference(inputs, replace(allowed, prefix=True), expected)
    allowed = replace(allowed, prefix=not why["prefix"])
    why["pack"] = why["prefix"] or "a trial with all other shortcuts at once failed"
    why["tokens"] = "the model's head is no plain linear layer"
    if can_compute_tokens(inputs.lm, ()):
        why["tokens"] = _difference(inputs, replace(allowed, tokens=True), expected)
    allowed = replace(allowed, tokens=not why["tokens"])
    for name in ("grow", "last", "prefix", "tokens"):
        if getattr(allowed, name):
            why.pop(name, None)
    return replace(allowed, why=why)


def _dtype(lm: LM) -> Any:
    return getattr(lm.root, "dtype", None)


def no_shortcuts(reason: str, *, reads_ahead: bool = False) -> Shortcuts:
    """Returns shortcuts none of which is allowed, for this reason."""
    names = "batch", "grow", "prefix", "pack", "last", "tokens"
    why: dict[str, str] = dict.fromkeys(names, reason)
    return Shortcuts(False, False, False, False, False, why, {}, [], reads_ahead=reads_ahead)


def _describe_error(error: Exception) -> str:
    return f"a trial raised {type(error).__name__}: {error}".split("\n")[0]


def _read_length(row: Row) -> int:
    """Returns how many tokens an encoder-decoder's encoder reads, or else the decoder."""
    return len(getattr(row, "source", None) or row)


def _trial_inputs(lm: LM, prompts: Sequence[Row] = (), *, is_padded: bool = True) -> SweepInputs:
    """Returns the prompts of a trial. The last one is the first with another last token."""
    if input_names(prompts):
        # the sources of an encoder-decoder are padded where they differ in length
        longest, shortest = max(prompts, key=_read_length), min(prompts, key=_read_length)
        rows = [longest, shortest, longest]
    else:
        ids = (number**3 * 7919 % lm.n_tokens for number in count(3))
        lengths = LENGTHS if is_padded else (max(LENGTHS),) * len(LENGTHS)
        rows = [tuple(islice(ids, length)) for length in lengths]
    first = rows[0]
    other_token = (first[-1] + 1) % lm.n_tokens
    rows.append(continue_row(lm, crop_row(first, len(first) - 1), [other_token]))
    return SweepInputs(lm, tuple(rows), tuple(rows), (1,) * len(rows))


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


def _row_of_edit(inputs: SweepInputs, number: int) -> int:
    """Returns the row in which an edit of the trial acts; neighbours act in different rows."""
    return (1 - number) % len(inputs)


def _expected_logits(inputs: SweepInputs) -> Tensor:
    """Returns the last logits of each edit's row [edit, vocab], from a plain forward."""
    prompts, hooks = [], []
    for number, edit in enumerate(_trial_edits(inputs.lm)):
        hooks.append(edit.on_rows(rows=[number]))
        prompts.append(inputs.rows[_row_of_edit(inputs, number)])
    return forward(inputs.lm, prompts, *hooks, logits="last").logits[:, -1]


def _difference(
    inputs: SweepInputs, allowed: Shortcuts, expected: Tensor, base: BaseForward | None = None
) -> str:
    """Returns why these shortcuts do not work for this model; an empty string if they do."""
    largest = expected.float().abs().max().clamp(min=1e-9)
    limit = LIMITS.get(expected.dtype, LIMITS[torch.float32])
    try:
        for edits, tokens, logits in _trial_logits(inputs, allowed, base):
            target = expected[edits][:, tokens].float()
            difference = float((logits.float() - target).abs().max() / largest)
            if not difference <= limit:
                return (
                    f"a trial gave other logits (by {difference:.1g} of the largest; {limit:.1g} "
                    "is allowed)"
                )
    except Exception as error:  # noqa: BLE001  a model that cannot run this way raises anything
        return _describe_error(error)
    return ""


def _trial_logits(
    inputs: SweepInputs, allowed: Shortcuts, base: BaseForward | None
) -> Iterator[tuple[list[int], Any, Tensor]]:
    """Yields the last logits [edit, token] of some edits' rows, with these shortcuts.

    Of the logits only some are computed, where that is allowed.
    """
    lm, edits = inputs.lm, _trial_edits(inputs.lm)
    hook_points = [build_hook_points(lm, [edit.on_rows()], no_reference) for edit in edits]
    base = base or _run_trial_base(inputs, cache=allowed.prefix)
    some_tokens = range(0, lm.n_tokens, max(1, lm.n_tokens // N_TOKENS))
    jobs = _trial_jobs(inputs, allowed)
    for job in jobs:
        tokens = some_tokens if allowed.tokens and job is jobs[-1] else None
        logits = run_cell_prompts(base, inputs, job, hook_points, allowed, (), tokens)
        cells = [cell_prompt.cell for cell_prompt in job.cell_prompts]
        yield cells, tokens or slice(None), logits[:, -1]


def _trial_jobs(inputs: SweepInputs, allowed: Shortcuts) -> list[Job]:
    """Returns the forwards of a trial's edits.

    The cells of the first block run by themselves, so that the others skip it. Packed cells run
    together.
    """
    cell_prompts: list[CellPrompt] = []
    for number, edit in enumerate(_trial_edits(inputs.lm)):
        row = _row_of_edit(inputs, number)
        block = edit.layer if allowed.grow else INPUT
        cell_prompts.append(CellPrompt(block, number, row, inputs.lengths[row] + edit.pos))
    width = -min(POSITIONS) if allowed.prefix else inputs.count_columns(range(len(inputs)))
    cell_prompts.sort()
    if allowed.pack:
        return [Job(width, tuple(cell_prompts), packed=True)]
    groups = groupby(
        cell_prompts, key=lambda cell_prompt: cell_prompt.block > cell_prompts[0].block
    )
    return [Job(width, tuple(group)) for _, group in groups]


def no_reference(sites: Any, prompts: Any) -> Any:
    """Stands for the reference values of hooks that need none."""
    raise AssertionError("these hooks need no reference values")
