"""Whose hooks act first at a module, and which of those on it are not hookkit's."""

import functools
from typing import Any

from torch import nn

from ..errors import Unsupported


class Work(functools.partial):
    """What a block does at one place, told apart by its kind from the hooks of users and libraries."""

    @property
    def manager(self) -> Any:
        """The block that it is of."""
        return self.func.__self__  # pyright: ignore[reportFunctionMemberAccess]


class Border(Work):
    """Where a block notes that a forward begins or ends."""


def let_outer_blocks_go_first(hooks: Any) -> None:
    """Move the hooks of outer blocks in front of the one that was just put first."""
    if len(hooks) == 1:
        return
    outer = [key for key, hook in list(hooks.items())[1:] if type(hook) is Work]
    for key in reversed(outer):
        hooks.move_to_end(key, last=False)


def hooks_of_others(root: nn.Module) -> list[str]:
    """The paths of the modules that carry hooks of the user's, and not of libraries. `Unsupported` inside a block."""
    found = []
    for path, module in root.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, Work):
                if hook.manager.acts_here():
                    raise Unsupported(
                        "a sweep inside a block of hk.attach: leave the block, and give its hooks as under=[…]"
                    )
                continue  # a block of another thread, which does not act here
            maker = getattr(hook, "__module__", None) or type(hook).__module__
            if maker.partition(".")[0] not in ("transformers", "accelerate", "peft", "torch"):
                found.append(path)
    return found
