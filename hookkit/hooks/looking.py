"""Hooks that look: capture."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import BadHook, checks_keywords
from ..positions import CountLike, PosLike
from ..sites import SitesLike, as_sites
from .base import Hook, inner


@dataclass(frozen=True)
class Capture(Hook):
    """Keep a copy of what is at the sites. Made by `capture`."""

    name: str | None = None
    grad: bool = False
    dtype: str | None = None
    device: str | None = None

    verb: ClassVar[str] = "capture"


@checks_keywords
def capture(
    sites: SitesLike,
    *,
    pos: PosLike = None,
    rows: CountLike = None,
    step: CountLike = None,
    name: str | None = None,
    grad: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Capture:
    """Keep a copy of the values at these sites: `run["resid_post.6"]`, of shape [row, pos, ...].

    Given before an edit at the same site it keeps the original, after it the change; `name` tells two captures of one
    site apart: `run["resid_post.6", "before"]`. Only the chosen positions and rows are kept, in the order of the text.
    `dtype` and `device` say how they are kept. With `grad=True` the copy takes part in the computation, so that
    `torch.autograd.grad(f(run.logits), run["resid_post.6"])` works; a forward then runs with gradients.

    >>> print(capture("resid_post.6", pos=-1))
    capture(resid_post.6, pos=-1)
    """
    chosen = as_sites(sites)
    if grad and (dtype is not None or device is not None):
        raise BadHook("capture(grad=True) keeps the very tensor of the computation: leave dtype and device out")
    kind = str(dtype).removeprefix("torch.") if dtype is not None else None
    if kind is not None and not isinstance(getattr(torch, kind, None), torch.dtype):
        raise BadHook(f"dtype={dtype!r} is no dtype of torch: say torch.float16, or 'float16'")
    return Capture(
        chosen, inner(pos, rows, step, chosen), name, grad, kind, str(device) if device is not None else None
    )
