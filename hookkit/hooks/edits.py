"""Hooks that change inner values by a rule: edit, steer, scale, project_out and skip_block."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import check_integers, check_keywords, check_number
from ..errors import BadHook
from ..models.positions import IndicesLike, PosLike
from ..models.sites import Site, SitesLike, as_sites
from .base import (
    Binding,
    Change,
    Constant,
    EditHook,
    Here,
    as_constant,
    as_where,
    check_constant,
    require_vectors,
    set_field,
)
from .captured_values import swap_head_and_query
from .rounding import scale_tensor
from .values import check_result, check_shape, convert_once, fit_to_values


@dataclass(frozen=True)
class Edit(EditHook):
    """Passes the values through a user's function. `edit` returns it."""

    fn: Callable[..., Any]

    verb: ClassVar[str] = "edit"
    bare: ClassVar[tuple[str, ...]] = ("fn",)
    takes_step: ClassVar[bool] = True

    def check(self) -> None:
        if not callable(self.fn):
            raise BadHook(
                f"edit needs a function of the values, and was given {type(self.fn).__name__}"
            )
        _count_arguments(self.fn)

    @property
    def together(self) -> bool:
        return True

    @property
    def puts_in(self) -> bool:
        return True

    def change(self, binding: Binding) -> Change:
        takes_here = _count_arguments(self.fn) >= 2
        function_name = f"the function of {self}"

        def apply(values: Tensor, here: Here) -> Tensor:
            old = swap_head_and_query(here.site, values)
            argument = old.clone()  # the function may write into its argument
            new = self.fn(argument, here) if takes_here else self.fn(argument)
            return swap_head_and_query(here.site, check_result(new, old, function_name))

        return apply


def _count_arguments(fn: Callable[..., Any]) -> int:
    """Returns how many arguments a function requires: `fn(values)` or `fn(values, here)`."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # functions written in C may have no signature
        return 1
    takes_positional = False
    required, required_keywords = [], []
    for parameter in parameters:
        is_required = parameter.default is parameter.empty
        if parameter.kind is parameter.KEYWORD_ONLY:
            if is_required:
                required_keywords.append(f"{parameter.name}=")
        elif parameter.kind is not parameter.VAR_KEYWORD:
            takes_positional = True
            if is_required and parameter.kind is not parameter.VAR_POSITIONAL:
                required.append(parameter.name)
    if len(required) > 2 or not takes_positional or required_keywords:
        needs = ", ".join(required + required_keywords) or "nothing"
        name = getattr(fn, "__name__", "the function")
        raise BadHook(
            f"edit calls its function as fn(values) or fn(values, here), and {name} needs {needs}"
        )
    return len(required)


@check_keywords
def edit(
    site: SitesLike,
    fn: Callable[..., Any],
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    step: IndicesLike = None,
) -> Edit:
    """Replaces the values at a site by `fn(values)`, or by `fn(values, here)` if it takes two.

    `fn` receives the selected cells [row, pos, ...] (at scores and pattern [row, head, query, key],
    or [row, query, key] of one head), which it may write into, and returns a tensor of the same
    shape and dtype. Each row holds its own positions; shorter rows are padded with zeros, which are
    not written back. `here.positions`, `here.rows`, `here.steps`, `here.valid` and `here.site` say
    what the values are. Returning None, another shape or dtype, or a NaN or infinite number where
    there was none raises `BadEdit`; -inf may be returned at the logits and at scores, as a mask.

    >>> print(edit("mlp_out.3", torch.relu, pos=-1))
    edit(mlp_out.3, relu, pos=-1)
    """
    return Edit(as_sites(site), as_where(pos, rows, step), fn)


@dataclass(frozen=True)
class Steer(EditHook):
    """Adds a vector. `steer` returns it."""

    vector: Constant
    scale: float = 1.0

    verb: ClassVar[str] = "steer"
    bare: ClassVar[tuple[str, ...]] = ("vector",)

    def check(self) -> None:
        require_vectors(self.sites, "steer adds a vector to")
        check_constant(self.vector, "the vector")
        set_field(self, "scale", check_number(self.scale, "scale"))

    def change(self, binding: Binding) -> Change:
        check_shape(self.vector, binding, "the vector")
        product = Constant(scale_tensor(self.vector.tensor, self.scale, "the vector"))
        vector = fit_to_values(product, "scale times the vector")
        return lambda values, here: values + vector(values, here)


@check_keywords
def steer(
    site: SitesLike,
    vector: Any,
    *,
    scale: float = 1.0,
    pos: PosLike = None,
    rows: IndicesLike = None,
) -> Steer:
    """Adds `scale` times a vector to the values at a site (Turner et al. 2023).

    The vector has the site's axes after batch and pos (often [d_model]); [pos, ...] holds one
    vector for each selected position, [batch, pos, ...] one for each row and position.

    >>> print(steer("resid_post.6", torch.ones(576), scale=2.0))
    steer(resid_post.6, tensor[576], scale=2.0)
    """
    addend = as_constant(vector, "the vector")
    return Steer(as_sites(site), as_where(pos, rows), addend, scale)


@dataclass(frozen=True)
class Scale(EditHook):
    """Multiplies by a number. `scale` returns it."""

    factor: float

    verb: ClassVar[str] = "scale"
    bare: ClassVar[tuple[str, ...]] = ("factor",)

    def check(self) -> None:
        set_field(self, "factor", check_number(self.factor, "factor"))

    def change(self, binding: Binding) -> Change:
        return lambda values, here: values * self.factor


@check_keywords
def scale(
    site: SitesLike, factor: float, *, pos: PosLike = None, rows: IndicesLike = None
) -> Scale:
    """Multiplies the values at a site by a number.

    >>> print(scale("z.9.3", 0.5))
    scale(z.9.3, 0.5)
    """
    return Scale(as_sites(site), as_where(pos, rows), factor)


@dataclass(frozen=True)
class ProjectOut(EditHook):
    """Removes a direction. `project_out` returns it."""

    direction: Constant

    verb: ClassVar[str] = "project_out"
    bare: ClassVar[tuple[str, ...]] = ("direction",)

    def check(self) -> None:
        require_vectors(self.sites, "project_out takes a direction out of")
        check_constant(self.direction, "the direction")
        tensor = self.direction.tensor
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise BadHook(
                f"the direction has shape {list(tensor.shape)}: give [d_model], or [k, d_model] "
                "for several"
            )
        if tensor.ndim == 2 and len(tensor) > tensor.shape[1]:
            raise BadHook(
                f"{len(tensor)} directions of {tensor.shape[1]} numbers cannot be independent: "
                f"give at most {tensor.shape[1]}, [k, d_model]"
            )

    def change(self, binding: Binding) -> Change:
        width = self.direction.tensor.shape[-1]
        if binding.shape is not None and binding.shape[-1] != width:
            raise BadHook(
                f"the direction has {width} numbers, and the last axis of {binding.site} has "
                f"{binding.shape[-1]}"
            )
        fit = convert_once(_orthonormal_basis(self.direction.tensor), "the direction")

        def apply(values: Tensor, here: Here) -> Tensor:
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            basis = fit(wide)
            return (wide - (wide @ basis) @ basis.T).to(values.dtype)

        return apply


def _orthonormal_basis(directions: Tensor) -> Tensor:
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


@check_keywords
def project_out(
    site: SitesLike, direction: Any, *, pos: PosLike = None, rows: IndicesLike = None
) -> ProjectOut:
    """Removes the part along a direction: x - (x·d) d / |d|² (Ravfogel et al. 2020).

    `direction` is [d_model], or [k, d_model] for a subspace of k independent directions, which need
    not be orthogonal.

    >>> print(project_out("resid_post.6", torch.ones(576)))
    project_out(resid_post.6, tensor[576])
    """
    removed = as_constant(direction, "the direction")
    return ProjectOut(as_sites(site), as_where(pos, rows), removed)


@dataclass(frozen=True)
class SkipBlock(EditHook):
    """Makes a block return its input. `skip_block` returns it."""

    verb: ClassVar[str] = "skip_block"

    def check(self) -> None:
        for site in self.sites:
            if not isinstance(site, Site) or site.name != "resid_post" or site.layer is None:
                raise BadHook(
                    f"skip_block skips whole blocks, and {site} is none: name the blocks, "
                    "skip_block([7, 8])"
                )

    @property
    def reads_input(self) -> bool:
        return True

    @property
    def gives_infinity(self) -> bool:
        return True

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: Here) -> Tensor:
            assert here.module_input is not None
            return here.module_input.clone()

        return apply


@check_keywords
def skip_block(
    layer: int | Iterable[int], *, pos: PosLike = None, rows: IndicesLike = None
) -> SkipBlock:
    """Makes blocks leave the residual stream unchanged: `resid_post.L` becomes `resid_pre.L`.

    The block still runs, so that its keys and values are in the cache; only its additions to the
    stream are dropped.

    >>> print(skip_block(7))
    skip_block(resid_post.7)
    """
    layers = check_integers(layer, "layer", least=0, meaning="the blocks, counted from 0,")
    sites = as_sites([Site("resid_post", number) for number in layers])
    return SkipBlock(sites, as_where(pos, rows))
