"""The hook that copies values: `capture`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import as_bool, check_keywords, check_text, describe
from ..errors import BadHook
from ..models.positions import IndicesLike, PosLike
from ..models.sites import Site, Sites, SitesLike, as_sites
from .base import Hook, as_where, set_field

INTEGER_SITES = frozenset({"experts"})  # the sites whose values are integers


@dataclass(frozen=True)
class Capture(Hook, verb="capture", takes_step=True):
    """Keeps a copy of the values at the sites. `capture` returns it."""

    name: str | None = None
    grad: bool = False
    dtype: str | None = None
    device: str | None = None

    def check(self) -> None:
        if self.name is not None:
            meaning = "a name that tells two captures of one site apart"
            check_text(self.name, "name", meaning)
        grad = as_bool(self.grad)
        if grad is None:
            raise BadHook(f"grad={describe(self.grad)}: give True or False")
        set_field(self, "grad", grad)
        if grad and (self.dtype is not None or self.device is not None):
            raise BadHook(
                "capture(grad=True) keeps the very tensor of the computation: leave dtype and "
                "device out"
            )
        if self.dtype is not None:
            set_field(self, "dtype", _dtype_name(self.dtype, self.sites))
        if self.device is not None:
            set_field(self, "device", _device_name(self.device))


def _dtype_name(dtype: object, sites: Sites) -> str:
    """Returns the name of a dtype. Raises `BadHook` if it cannot hold the values of the sites."""
    name = str(dtype).removeprefix("torch.")
    torch_dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype | str) or not isinstance(torch_dtype, torch.dtype):
        raise BadHook(
            f"dtype={describe(dtype)} is no dtype of torch: say torch.float16, or 'float16'"
        )
    has_real_numbers = all(
        isinstance(site, Site) and site.name not in INTEGER_SITES for site in sites
    )
    if torch_dtype.is_complex or (has_real_numbers and not torch_dtype.is_floating_point):
        raise BadHook(
            f"dtype={name!r} cannot hold the real numbers at {sites[0]}: say a floating dtype, "
            "such as 'float16'"
        )
    return name


def _device_name(device: object) -> str:
    """Returns the name of a device. Raises `BadHook` if it cannot hold captured values."""
    try:
        torch_device = torch.device(str(device))
    except RuntimeError as error:
        raise BadHook(
            f"device={describe(device)} is no device of torch: say 'cpu' or 'cuda:0'"
        ) from error
    if torch_device.type == "meta":
        raise BadHook(
            "device='meta' holds no numbers, so nothing would be kept: say 'cpu' or 'cuda:0'"
        )
    return str(torch_device)


@dataclass(frozen=True)
class CaptureLast(Capture):
    """A capture of each row's last position, which frees earlier positions during generation.

    `generate` uses it for logits="last".
    """


@check_keywords
def capture(
    sites: SitesLike,
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    step: IndicesLike = None,
    name: str | None = None,
    grad: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Capture:
    """Keeps a copy of the values at these sites: `run["resid_post.6"]`, of shape [row, pos, ...].

    A capture before an edit of the same site keeps the original values, one after it the changed
    values; `name` tells two captures of one site apart: `run["resid_post.6", "before"]`. Only the
    selected positions and rows are kept, in the order of the text. `dtype` and `device` are those
    of the copy. With `grad=True` the copy takes part in the computation, so that
    `torch.autograd.grad(f(run.logits), run["resid_post.6"])` works; a forward then runs with
    gradients.

    >>> print(capture("resid_post.6", pos=-1))
    capture(resid_post.6, pos=-1)
    """
    dtype_text = None if dtype is None else str(dtype)
    device_text = None if device is None else str(device)
    where = as_where(pos, rows, step)
    return Capture(as_sites(sites), where, name, grad, dtype_text, device_text)
