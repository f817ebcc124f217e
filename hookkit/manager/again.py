"""A checkpointed block runs again in the backward pass: with the hooks, in the forward in which it ran first."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..errors import Unsupported
from ..lent import Work
from ..taps import Tap
from ..training import in_checkpointed_block


def refuse_checkpoints(root: nn.Module, taps: Iterable[Tap]) -> None:
    """Raise `Unsupported` if a hook stands in a block that would run again after the hooks are gone."""
    if not root.training:
        return
    for tap in taps:
        if in_checkpointed_block(root, tap.place.path):
            raise Unsupported(
                f"{tap.actions[0].hook} stands in a block with gradient checkpointing, which runs again in "
                "backward(), without the hook: call model.gradient_checkpointing_disable() or model.eval(), or run "
                "the model and backward() inside a block of hk.attach"
            )


def run_again_within(here: Callable[[], Callable[[], AbstractContextManager[None]]]) -> Work:
    """A model's way to run a function again in the backward pass, within what `here` gave when it first ran."""

    def checkpoint(inner: Callable[..., Any], /, function: Any, *args: Any, **kwargs: Any) -> Any:
        back_here, ran = here(), False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return function(*args, **kwargs)
            with back_here():
                return function(*args, **kwargs)

        return inner(run, *args, **kwargs)

    return checkpoint
