"""Compiled code runs as it is written while a block is open: what was compiled before would not see the hooks.

torch keeps one stance for the whole process. It is put back when the last block is left, in whatever order.
"""

import functools
import threading
from typing import Any

import torch

from ..lent import Lent

_LOCK = threading.RLock()
_BLOCKS: set[object] = set()
_STANCES: list[Any] = []  # the one that the first block set; it knows what was before


def run_as_written(lent: Lent) -> None:
    """Let compiled code run as it is written until this, and all else that asked for it, is given back."""
    block = object()
    lent.later(functools.partial(_leave, block))
    with _LOCK:
        _BLOCKS.add(block)
        if not _STANCES:
            _STANCES.append(torch.compiler.set_stance("force_eager"))


def _leave(block: object) -> None:
    with _LOCK:
        _BLOCKS.discard(block)
        while _STANCES and not _BLOCKS:
            _STANCES[-1].__exit__(None, None, None)
            _STANCES.pop()
