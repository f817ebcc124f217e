"""The values that edits put in: constants that fit a site, and the sources of `ablate` and `patch`.

A source is zeros, a tensor, the values of another run, or the mean or a sample of the values of
reference prompts.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..arguments import check_choice, check_seed, describe
from ..errors import BadEdit, BadHook, BadPrompt
from ..models.batch_positions import pad_rows
from ..models.chat import Chat
from ..models.experts import NEURONS
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.positions import PositionRange, Where, is_named, resolve_positions
from ..models.prompts import check_prompts
from ..models.sites import QUERY_KEY_SITES, AnySite, ModuleSite, Sites, has_name
from ..models.views import unseen_value
from .base import Binding, Change, Constant, EditContext, check_constant, set_field
from .capture import Captured, positions_of

Per: TypeAlias = Literal["position", "all"]


@dataclass(frozen=True)
class Means:
    """One tensor for each of the hook's sites: `tensors[i]` for site i."""

    tensors: tuple[Constant, ...]

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            check_constant(tensor, "a mean")

    def __repr__(self) -> str:
        return "means"


@dataclass(frozen=True)
class FromRun:
    """The values of a run: `sources[i]` for the hook's site i."""

    sources: tuple[Captured, ...]

    def __post_init__(self) -> None:
        _check_captured(self.sources)

    def __repr__(self) -> str:
        return "run"


@dataclass(frozen=True)
class FromPrompt:
    """The values that the model has on a prompt (a text, a chat or ids), which is run first."""

    prompt: str | Chat | tuple[int, ...]

    def __post_init__(self) -> None:
        set_field(self, "prompt", reference_prompts([self.prompt])[0])

    def __repr__(self) -> str:
        return repr(self.prompt)


@dataclass(frozen=True)
class Reference:
    """Values of other prompts: captured ones (`sources`), or `prompts` that are run first."""

    how: Literal["mean", "resample"]
    per: Per
    seed: int
    sources: tuple[Captured, ...] = ()
    prompts: tuple[tuple[int, ...] | str | Chat, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self.how, "to", ("mean", "resample"))
        check_choice(self.per, "per", ("position", "all"))
        set_field(self, "seed", check_seed(self.seed))
        if self.how == "mean" and self.seed:
            raise BadHook(
                "seed= draws for to='resample', and to='mean' draws nothing: leave seed out"
            )
        if bool(self.sources) == bool(self.prompts):
            raise BadHook(f"to={self.how!r} needs a reference: say over=run, or over=[prompts]")
        if self.prompts:
            set_field(self, "prompts", reference_prompts(self.prompts))
        _check_captured(self.sources)

    def __repr__(self) -> str:
        count = len(self.prompts) or len(self.sources[0].rows)
        seed = f", seed={self.seed}" if self.how == "resample" else ""
        return f"{self.how!r}, over={count} prompts, per={self.per!r}{seed}"


def reference_prompts(over: Any) -> tuple[tuple[int, ...] | str | Chat, ...]:
    """Returns the prompts of a reference. Raises `BadHook` if there is none."""
    try:
        return tuple(check_prompts(over))
    except BadPrompt as error:
        raise BadHook(
            f"over={describe(over)} has no prompt to take a reference from: {error}"
        ) from error


def _check_captured(sources: tuple[Any, ...]) -> None:
    """Raises `BadHook` if captured values do not have the rows and positions that they name."""
    for source in sources:
        if not isinstance(source, Captured):
            raise BadHook(f"a hook holds {describe(source)} where values of a run are meant")
        problem = _problem_of(source)
        if problem is not None:
            raise BadHook(f"the values of a run at {source.site} {problem}")


def _problem_of(source: Captured) -> str | None:
    values, positions, prompts = source.values, source.positions, source.prompts
    if not isinstance(values, Tensor) or values.ndim < 1 or not isinstance(prompts, tuple):
        return f"are {describe(values)}, and no tensor of rows"
    if positions is None:
        return None
    shape = source.by_position.shape[:2]  # scores and patterns have their heads before the queries
    has_rows = len(source.rows) == shape[0] <= len(prompts)
    if has_rows and isinstance(positions, Tensor) and positions.shape == shape:
        return None
    return (
        f"have shape {list(values.shape)}, and positions, rows or prompts of another number: "
        "capture them again"
    )


Source: TypeAlias = Literal["zero"] | Constant | Means | FromRun | FromPrompt | Reference


def bind_source(
    source: Source, sites: Sites, where: Where, binding: Binding, source_where: Where
) -> Change:
    """Returns the change of the values at one of a hook's sites to those of its source.

    `where` says which positions change, `source_where` which of the source's text they are from.
    """
    match source:
        case "zero":
            return lambda values, here: torch.zeros_like(values)
        case Constant():
            return _replace_by(source, binding)
        case Means():
            return _replace_by(source.tensors[sites.index(binding.site)], binding)
    captured = _captured(source, binding)
    shape = binding.shape
    if shape is not None:
        _check_sizes(captured, captured.values.shape[2:], shape)
    if not isinstance(source, Reference):
        return _patch(captured, where, source_where, binding.lm)
    if source.how == "mean":
        return _mean(captured, source.per)
    return _resample(captured, source.per, source.seed)


def _replace_by(tensor: Constant, binding: Binding) -> Change:
    check_shape(tensor, binding, "the tensor")
    fit = fit_to_values(tensor, "the tensor")
    return lambda values, here: fit(values, here).expand_as(values).clone()


def _captured(source: FromRun | FromPrompt | Reference, binding: Binding) -> Captured:
    """Returns the source's values at one site. Prompts are run first."""
    if isinstance(source, FromPrompt):
        captured = binding.reference((source.prompt,))
    elif isinstance(source, Reference) and source.prompts:
        captured = binding.reference(source.prompts)
    else:
        captured = next(part for part in source.sources if part.site == binding.site)
    positions_of(captured)  # raises if there are none
    if captured.values.is_sparse:
        captured = replace(captured, values=captured.values.to_dense())
    return captured


def _patch(source: Captured, where: Where, source_where: Where, lm: LM) -> Change:
    """Returns the change to the source's values, position by position of `source_where` in it."""

    def apply(values: Tensor, here: EditContext) -> Tensor:
        rows = list(map(source.row, here.rows))
        columns = _source_columns(source, (where, source_where), rows, here, lm)
        new = _copy_cells(source.by_position, rows, columns)
        new = convert_like(new, values, f"what the source has at {source.site}")
        if isinstance(source.site, ModuleSite) or source.site.name not in QUERY_KEY_SITES:
            _check_sizes(source, new.shape[2:], values.shape[2:])
            return new
        _check_sizes(source, new.shape[2:-1], values.shape[2:-1])
        masked = unseen_value(new.dtype, source.site.name == "scores")
        return _with_key_count(new, values.shape[-1], masked)

    return apply


def _copy_cells(
    values: Shaped[Tensor, "row pos ..."], rows: list[int], columns: list[list[int]]
) -> Shaped[Tensor, "cell_row cell_pos ..."]:
    """Returns a copy of some cells, which are those of column 0 where a row has too few."""
    row, first, last = rows[0], columns[0][0], columns[0][-1]
    if len(rows) == 1 and columns[0] == [*range(first, last + 1)]:  # slices are fast
        return values[row : row + 1, first : last + 1].clone()
    return values[torch.tensor(rows)[:, None], pad_rows(columns, 0)]


def _with_key_count(values: Tensor, count: int, masked: float) -> Tensor:
    """Returns scores or a pattern with `count` keys; no query of a text sees keys after its end."""
    n_missing_keys = count - values.shape[-1]
    if n_missing_keys <= 0:
        return values[..., :count]
    return nn.functional.pad(values, (0, n_missing_keys), value=masked)


def _check_sizes(source: Captured, sizes: Sequence[int], model_sizes: Sequence[int]) -> None:
    """Raises `BadHook` if another model's values cannot fit a site of this one."""
    if tuple(sizes) != tuple(model_sizes):
        raise BadHook(
            f"the source of {source.site} has values of shape {list(sizes)} after row and pos, and "
            f"this model has {list(model_sizes)}: give a run of a model of the same size"
        )


def _source_columns(
    source: Captured, wheres: tuple[Where, Where], rows: list[int], here: EditContext, lm: LM
) -> list[list[int]]:
    """Returns the column of the source's values for each cell.

    `wheres` are the positions in the text that changes and in the source's. Each text resolves its
    own, and they are paired in order.
    """
    where, source_where = wheres
    lengths, columns = here.cells.text.lengths, []
    counts_tokens = source_where is where and not is_named(where.pos)
    for row, prompt, positions in zip(rows, here.rows, here.cells.row_positions, strict=True):
        # Numbers mean the same positions in texts of one length.
        if not counts_tokens or lengths[prompt] != len(source.prompts[row]):
            positions = _paired_positions(source, wheres, row, prompt, positions, here, lm)
        columns.append([source.column(row, position) for position in positions])
    return columns


def _paired_positions(
    source: Captured,
    wheres: tuple[Where, Where],
    row: int,
    prompt: int,
    positions: PositionRange,
    here: EditContext,
    lm: LM,
) -> list[int]:
    """Returns the positions in the source's text for some positions of a prompt."""
    where, source_where = wheres
    ids, length = source.prompts[row], here.cells.text.lengths[prompt]
    all_positions = here.cells.text.selected_positions(where)[prompt] or ()
    source_positions = resolve_positions(source_where, len(ids), partial(find_positions, lm, ids))
    is_unpaired = where.pos is None and length != len(ids)
    if is_unpaired or len(all_positions) != len(source_positions):
        raise BadHook(
            f"row {prompt} has {length} tokens and the source of {source.site} has {len(ids)}, "
            f"so pos={where.pos!r} does not pair their positions: say which are meant, with "
            "pos= (and source_pos=)"
        )
    return [source_positions[all_positions.index(position)] for position in positions]


def _mean(source: Captured, per: Per) -> Change:
    """Returns the change to the reference's mean, at the same position or over all positions."""
    name, positions = f"the reference's mean at {source.site}", positions_of(source)
    if per == "all":
        overall = convert_once(source.values[positions >= 0].double().mean(0), name)
        return lambda values, here: overall(values).expand_as(values).clone()
    available = positions[positions >= 0].unique()
    table = torch.stack([source.values[positions == p].double().mean(0) for p in available])

    def apply(values: Tensor, here: EditContext) -> Tensor:
        _check_available(available, here, source)
        index = torch.searchsorted(available, here.positions.clamp(min=int(available[0])))
        return convert_like(table[index], values, name)

    return apply


def _check_available(available: Tensor, here: EditContext, source: Captured) -> None:
    missing = here.positions[~torch.isin(here.positions, available) & (here.positions >= 0)]
    if len(missing):
        raise BadHook(
            f"position {int(missing[0])} of {source.site} is to be replaced, and no prompt of the "
            f"reference is that long (its positions: {int(available.min())} to "
            f"{int(available.max())}): give longer ones, fewer positions, or per='all'"
        )


def _resample(source: Captured, per: Per, seed: int) -> Change:
    """Returns the change to values of other prompts, drawn at random.

    A draw depends on the seed, the prompt's own tokens and the position only, so that it is the
    same alone and in a batch.
    """
    positions = positions_of(source)
    available = positions[positions >= 0].unique()
    cells: list[tuple[int, int]] = (positions >= 0).nonzero().tolist()
    name = f"what the reference has at {source.site}"

    def draw(prompt: tuple[int, ...], position: int) -> tuple[int, int]:
        digest = hashlib.sha256(repr((seed, prompt)).encode()).hexdigest()
        if per == "all":
            return random.Random(f"{digest}{position}").choice(cells)
        # one donor serves all positions of a row for which it is long enough
        donors = random.Random(digest).sample(range(len(source.rows)), len(source.rows))
        donor = next(row for row in donors if position in source.columns[row])
        return donor, source.columns[donor][position]

    def apply(values: Tensor, here: EditContext) -> Tensor:
        if per == "position":
            _check_available(available, here, source)
        new = torch.zeros_like(values)
        for row, prompt in enumerate(here.rows):
            ids, row_positions = here.cells.text.prompt(prompt), here.cells.row_positions[row]
            index = torch.tensor([draw(ids, position) for position in row_positions])
            drawn = source.values[index[:, 0], index[:, 1]]
            new[row, : len(row_positions)] = convert_like(drawn, values, name)
        return new

    return apply


def convert_once(tensor: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """Returns a function that gives the tensor in the dtype and on the device of some values.

    The function owns the converted tensor and keeps it for the next forward. It raises `BadEdit` if
    the dtype cannot hold the numbers.
    """
    cached = tensor

    def convert(values: Tensor) -> Tensor:
        nonlocal cached
        if cached.device != values.device or cached.dtype != values.dtype:
            with torch.inference_mode(False):  # a later forward may need gradients
                cached = convert_like(tensor, values, name)
        return cached

    return convert


def fit_to_values(value: Constant, name: str) -> Callable[[Tensor, EditContext], Tensor]:
    """Returns a function that gives a constant in a shape that broadcasts over some values.

    The constant may have the axes of the site, or [pos, ...] for the hook's positions, or
    [row, pos, ...]. At the neurons of experts, [d_mlp] serves every choice. The result has the
    dtype and the device of the values.
    """
    convert = convert_once(value.tensor, name)

    def fit(values: Float[Tensor, "row pos ..."], here: EditContext) -> Tensor:
        tensor, shape = convert(values), values.shape[2:]
        if tensor.shape == shape or _serves_every_choice(tensor, here.site, shape):
            return tensor
        selected = _at_positions(tensor, shape, here)
        if selected is not None:
            return selected
        raise BadEdit(
            f"{name} has shape {list(tensor.shape)}, and the values at {here.site} have "
            f"{list(values.shape)} [row, pos, ...]: give {list(shape)}, or one for each position, "
            "or one for each row and position"
        )

    return fit


def _at_positions(tensor: Tensor, shape: tuple[int, ...], here: EditContext) -> Tensor | None:
    """Returns the values of a tensor [pos, *shape] or [row, pos, *shape] at the edited cells.

    Returns None if the tensor has another shape, or too few rows or positions.
    """
    n_leading = tensor.ndim - len(shape)
    if n_leading not in (1, 2) or tensor.shape[n_leading:] != shape:
        return None
    order = here.order().to(tensor.device)
    if int(order.max()) >= tensor.shape[n_leading - 1]:
        return None
    if n_leading == 1:
        return tensor[order]
    if max(here.rows) >= len(tensor):
        return None
    return tensor[torch.tensor(here.rows, device=tensor.device)[:, None], order]


def _serves_every_choice(tensor: Tensor, site: AnySite, shape: tuple[int, ...]) -> bool:
    """True for a tensor [d_mlp] at the neurons of experts, [choice, d_mlp]."""
    return has_name(site, *NEURONS) and len(shape) == 2 and tensor.shape == shape[1:]


def check_shape(value: Constant, binding: Binding, name: str) -> None:
    """Raises `BadHook` if a tensor can never fit its site, before anything runs."""
    tensor, shape = value.tensor, binding.shape
    if shape is None or _serves_every_choice(tensor, binding.site, shape):
        return
    n_leading = tensor.ndim - len(shape)
    if n_leading not in (0, 1, 2) or tensor.shape[n_leading:] != shape:
        axes = ", ".join(map(str, shape))
        raise BadHook(
            f"{name} has shape {list(tensor.shape)}, and {binding.site} is [batch, pos, {axes}]: "
            f"give {list(shape)}, or [pos, …] or [batch, pos, …] with it"
        )


def check_result(new: Any, old: Tensor, name: str) -> Tensor:
    """Returns the result of a user's function. Raises `BadEdit` if it cannot replace `old`."""
    shape = list(old.shape)
    if new is None:
        raise BadEdit(f"{name} returned None: end it with `return`, with a tensor of shape {shape}")
    if not isinstance(new, Tensor):
        raise BadEdit(f"{name} returned a {type(new).__name__}: return a tensor of shape {shape}")
    if new.shape != old.shape:
        raise BadEdit(
            f"{name} was given shape {shape} and returned {list(new.shape)}: return the same shape"
        )
    if new.dtype != old.dtype:
        raise BadEdit(
            f"{name} was given {old.dtype} and returned {new.dtype}: return .to({old.dtype})"
        )
    if new.device != old.device:
        raise BadEdit(
            f"{name} was given a tensor on {old.device} and returned one on {new.device}: move it "
            "back"
        )
    return new


def convert_like(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """Returns the tensor in the dtype and on the device of `like`, as `convert_dtype` does."""
    return convert_dtype(tensor, like.dtype, name).to(like.device)


def convert_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns the tensor in another dtype. Raises `BadEdit` for numbers that it cannot hold."""
    if tensor.dtype == dtype:
        return tensor
    new = tensor.to(dtype=dtype)
    largest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else math.inf
    if dtype.is_floating_point and torch.finfo(dtype).max < largest:
        lost = int((torch.isfinite(tensor) & ~torch.isfinite(new)).sum())
        if lost:
            raise BadEdit(overflow_message(lost, name, dtype))
    return new


def scale_tensor(tensor: Tensor, scale: float, name: str) -> Tensor:
    """Returns `scale` times the tensor. Raises `BadHook` if its dtype cannot hold a product."""
    product = scale * tensor
    if count := int((~torch.isfinite(product)).sum()):
        raise BadHook(overflow_message(count, f"{scale:g} times {name}", tensor.dtype))
    return product


def overflow_message(count: int, name: str, dtype: torch.dtype) -> str:
    """Returns the message for numbers that a dtype cannot hold."""
    numbers = "a number" if count == 1 else f"{count} numbers"
    return (
        f"{name} has {numbers} that {str(dtype).removeprefix('torch.')} cannot hold: its largest "
        f"is {torch.finfo(dtype).max:g}; give smaller ones"
    )


def check_directions(directions: Constant, name: str) -> None:
    """Raises `BadHook` unless a tensor is one direction, [d], or several, [k, d]."""
    check_constant(directions, name)
    tensor = directions.tensor
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise BadHook(
            f"{name} has shape {list(tensor.shape)}: give [d_model], or [k, d_model] for several"
        )
    if tensor.ndim == 2 and len(tensor) > tensor.shape[1]:
        raise BadHook(
            f"{len(tensor)} directions of {tensor.shape[1]} numbers cannot be independent: "
            f"give at most {tensor.shape[1]}, [k, d_model]"
        )


def check_width(directions: Constant, binding: Binding, name: str) -> None:
    """Raises `BadHook` if the last axis of a site is not as wide as the directions."""
    width = directions.tensor.shape[-1]
    if binding.shape == ():
        raise BadHook(
            f"{binding.site} is one number at each position, which has no direction: use "
            "hk.ablate, or name all features together"
        )
    if binding.shape is not None and binding.shape[-1] != width:
        raise BadHook(
            f"{name} has {width} numbers, and the last axis of {binding.site} has "
            f"{binding.shape[-1]}"
        )


def orthonormal_basis(directions: Tensor) -> Tensor:
    """Returns a basis [d_model, k] of the directions. Raises `BadHook` for dependent ones."""
    directions = torch.atleast_2d(directions).double()
    largest = directions.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
    directions = directions / largest  # squares stay finite
    basis, weights = torch.linalg.qr(directions.T)
    smallest_weight = 1e-9 * directions.norm(dim=1).clamp(min=1e-30)
    if bool((weights.diagonal().abs() < smallest_weight).any()):
        raise BadHook(
            "the directions are zero, or one of them is made of the others: give independent ones"
        )
    return basis
