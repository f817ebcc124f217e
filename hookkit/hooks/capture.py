"""Hooks that look: capture."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..arguments import checks_keywords, described, flag, text_of
from ..errors import BadHook
from ..models.positions import CountLike, PosLike
from ..models.sites import Site, Sites, SitesLike, as_sites
from .base import Hook, inner, put

WHOLE_NUMBERS = frozenset({"experts"})  # the sites whose values are whole numbers


@dataclass(frozen=True)
class Capture(Hook):
    """Keep a copy of what is at the sites. Made by `capture`."""

    name: str | None = None
    grad: bool = False
    dtype: str | None = None
    device: str | None = None

    verb: ClassVar[str] = "capture"
    takes_step: ClassVar[bool] = True

    def check(self) -> None:
        if self.name is not None:
            text_of(
                self.name,
                "name",
                meaning="a name that tells two captures of one site apart",
                error=BadHook,
            )
        put(self, "grad", flag(self.grad, "grad", error=BadHook))
        if self.grad and (self.dtype is not None or self.device is not None):
            raise BadHook(
                "capture(grad=True) keeps the very tensor of the computation: leave dtype and device out"
            )
        if self.dtype is not None:
            put(self, "dtype", dtype_name(self.dtype, self.sites))
        if self.device is not None:
            put(self, "device", device_name(self.device))


def dtype_name(dtype: object, sites: Sites) -> str:
    """The name of a dtype in which the values of these sites can be kept, or `BadHook`."""
    name = str(dtype).removeprefix("torch.")
    kind = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype | str) or not isinstance(kind, torch.dtype):
        raise BadHook(
            f"dtype={described(dtype)} is no dtype of torch: say torch.float16, or 'float16'"
        )
    holds_real_numbers = all(
        isinstance(site, Site) and site.name not in WHOLE_NUMBERS for site in sites
    )
    if kind.is_complex or (holds_real_numbers and not kind.is_floating_point):
        raise BadHook(
            f"dtype={name!r} cannot hold the real numbers at {sites[0]}: say a floating dtype, such as 'float16'"
        )
    return name


def device_name(device: object) -> str:
    """The name of a device that can hold captured values, or `BadHook`."""
    try:
        kind = torch.device(str(device))
    except RuntimeError as error:
        raise BadHook(
            f"device={described(device)} is no device of torch: say 'cpu' or 'cuda:0'"
        ) from error
    if kind.type == "meta":
        raise BadHook(
            "device='meta' holds no numbers, so nothing would be kept: say 'cpu' or 'cuda:0'"
        )
    return str(kind)


@dataclass(frozen=True)
class CaptureLast(Capture):
    """A capture that keeps what is at the last position of each row, and lets go of those before it
    while generating. `generate` uses it for logits="last".
    """


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

    Given before an edit at the same site it keeps the original, after it the change; `name` tells
    two captures of one site apart: `run["resid_post.6", "before"]`. Only the chosen positions and
    rows are kept, in the order of the text. `dtype` and `device` say how they are kept. With
    `grad=True` the copy takes part in the computation, so that `torch.autograd.grad(f(run.logits),
    run["resid_post.6"])` works; a forward then runs with gradients.

    >>> print(capture("resid_post.6", pos=-1))
    capture(resid_post.6, pos=-1)
    """
    chosen = as_sites(sites)
    kept_as = None if dtype is None else str(dtype)
    kept_on = None if device is None else str(device)
    return Capture(chosen, inner(pos, rows, step, chosen), name, grad, kept_as, kept_on)
