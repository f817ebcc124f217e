"""What the hooks of a cell need of a forward that cells share.

A hook that mixes positions needs all of them, and one inside attention needs a row for each cell.
After the last attention only the positions that the metric reads are computed, and
of the logits those of the metric's tokens, where no hook needs the other ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import Unsupported
from ..hooks.ablation import Ablate
from ..hooks.base import EditHook
from ..hooks.conditions import calls_function
from ..hooks.edits import Edit
from ..models.lm import LM
from ..models.overrides import Overrides
from ..models.sites import QUERY_KEY_SITES, ModuleSite, Site
from ..runs.hook_points import BoundHook, HookPoint

INPUT = -1  # the block number of what is before the first block

# Sites after the attention of their block. They reach other positions through later blocks only.
AFTER_ATTENTION = {"scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in"}
AFTER_ATTENTION |= {"router_logits", "experts", "expert_weights", "mlp_pre", "mlp_post", "mlp_out"}
AFTER_ATTENTION |= {"resid_post", "final_norm", "lm_head", "logits"}

# Inputs of modules of the last block that work on each position by itself.
NARROWED_INPUTS = ("z", "mlp_in")

# Sites inside those modules.
INSIDE_NARROWED = frozenset({"mlp_pre", "mlp_post", "router_logits", "experts", "expert_weights"})


def bound_hooks_of(hook_points: Iterable[HookPoint]) -> list[BoundHook]:
    """Returns the hooks at all hook points."""
    return list(chain.from_iterable(hook_point.actions for hook_point in hook_points))


def block_of_module(lm: LM, path: str) -> int:
    """Returns the block that a module is or is in; `INPUT` for a module outside the blocks."""
    before = lm.family.block.partition("{layer}")[0]
    number = path.removeprefix(before).partition(".")[0]
    if not path.startswith(before) or not number.isdecimal() or int(number) >= lm.n_layers:
        return INPUT
    block = lm.family.block.format(layer=number)
    return int(number) if f"{path}.".startswith(f"{block}.") else INPUT


def needs_all_positions(bound: BoundHook) -> bool:
    """True if what a hook does at a position may depend on other positions."""
    if bound.receive is not None:
        return True  # it may read positions at which nothing is edited
    hook = bound.hook
    mixes_positions = isinstance(hook, EditHook) and (
        hook.mixes_positions or calls_function(hook.when)
    )
    return mixes_positions or weights_later_keys(bound)


def weights_later_keys(bound: BoundHook) -> bool:
    """True if a query may attend to later positions after an edit of its scores or pattern.

    A user's function may change the values of keys that the query does not see, and so does a
    score of zero, since an unseen key's score is -inf. Other edits leave unseen keys unseen.
    """
    if not isinstance(bound.site, Site) or bound.site.name not in QUERY_KEY_SITES:
        return False
    if isinstance(bound.hook, Ablate):
        return bound.hook.to == "zero" and bound.site.name == "scores"
    return isinstance(bound.hook, Edit)


def is_after_blocks(lm: LM, hook_point: HookPoint) -> bool:
    """True for a hook point that is not inside the blocks: where a packed batch has rows."""
    location = hook_point.location
    last_block = lm.family.block.format(layer=lm.n_layers - 1)
    is_output = location.path == last_block and location.side == "output"
    return is_output or block_of_module(lm, location.path) == INPUT


def can_pack(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if the hooks at these points act on each position by itself, in a module's input or
    output, so that rows of different widths may stand side by side."""
    for hook_point in hook_points:
        if hook_point.location.side == "inside" or hook_point.stack:
            return False
        if hook_point.reads_input and is_after_blocks(lm, hook_point):
            return False  # the input of the last block is packed, and its output is not
        for bound in hook_point.actions:
            if not isinstance(bound.site, Site) or bound.site.base_name in QUERY_KEY_SITES:
                return False
            if bound.elsewhere or needs_all_positions(bound):
                return False
    return True


def can_narrow(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if no hook needs the other positions of the last block after its attention."""
    return not any(_needs_last_block(lm, bound) for bound in bound_hooks_of(hook_points))


def _needs_last_block(lm: LM, bound: BoundHook) -> bool:
    site = bound.site
    if not isinstance(site, Site):
        return True
    if site.layer is not None and site.layer < lm.n_layers - 1:
        return False
    needs_more = bound.change is None or needs_all_positions(bound)
    return (needs_more and site.base_name in AFTER_ATTENTION) or site.base_name in INSIDE_NARROWED


@contextmanager
def narrow_last_block(lm: LM, positions: slice | Tensor) -> Iterator[None]:
    """Inside this context those modules compute these positions and return zeros for the other
    ones."""
    with Overrides() as overrides:
        for name in NARROWED_INPUTS:
            location = lm.layout.find(name, lm.n_layers - 1)
            if location is not None and location.side == "input":
                module = lm.submodule(location.path)
                overrides.wrap_method(module, "forward", partial(_compute_positions, positions))
        yield


def _compute_positions(
    positions: slice | Tensor, inner: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if hidden.ndim != 3:
        raise Unsupported(
            "a module of the last block has an input that is not [batch, pos, d]: "
            f"{list(hidden.shape)}"
        )
    crop = partial(_crop, hidden.shape[:2], positions)
    cropped_kwargs = {name: crop(value) for name, value in kwargs.items()}
    cropped = crop(hidden)
    output = inner(cropped, *map(crop, args), **cropped_kwargs)
    fill = partial(_fill_with_zeros, hidden, cropped.shape[:2], positions)
    return (fill(output[0]), *output[1:]) if isinstance(output, tuple) else fill(output)


def _crop(shape: torch.Size, positions: slice | Tensor, value: Any) -> Any:
    """Returns some positions of a tensor with these rows and positions, and other values as they
    are."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return value
    return value[:, positions].contiguous()  # modules may make a view of their input


def _fill_with_zeros(
    hidden: Tensor, cropped: torch.Size, positions: slice | Tensor, values: Any
) -> Tensor:
    """Returns the values of some positions of `hidden`, with zeros at the other positions."""
    if not isinstance(values, Tensor) or values.shape[:2] != cropped:
        raise Unsupported("a module of the last block has an output that is not [batch, pos, d]")
    full = values.new_zeros(*hidden.shape[:2], values.shape[-1])
    full[:, positions] = values
    return full


def can_compute_tokens(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if the head is a plain linear layer, and no hook at these points reads its output."""
    location = lm.layout.find("lm_head", None)
    if location is None or lm.ranks is not None:
        return False
    head = lm.submodule(location.path)
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    return not any(_may_read_logits(lm, bound) for bound in bound_hooks_of(hook_points))


def _may_read_logits(lm: LM, bound: BoundHook) -> bool:
    if isinstance(bound.site, ModuleSite):
        return block_of_module(lm, bound.site.path) == INPUT
    return bound.head


@contextmanager
def compute_tokens(lm: LM, tokens: Sequence[int]) -> Iterator[None]:
    """Inside this context the head computes the logits of these tokens only, in this order."""
    location = lm.layout.find("lm_head", None)
    assert location is not None
    head = lm.submodule(location.path)
    with Overrides() as overrides:
        overrides.wrap_method(head, "forward", partial(_logits_of_tokens, head, list(tokens)))
        yield


def _logits_of_tokens(head: Any, tokens: list[int], inner: Any, /, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias[tokens]
    return functional.linear(hidden, head.weight[tokens], bias)
