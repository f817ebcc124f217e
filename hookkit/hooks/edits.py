"""Hooks that change inner values by a rule: edit, steer, scale, project_out, skip_block."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import checks_keywords, whole_numbers
from ..errors import BadHook
from ..models.positions import CountLike, PosLike
from ..models.sites import Site, SitesLike, as_sites
from .base import (
    Binding,
    Change,
    Constant,
    EditHook,
    Here,
    as_constant,
    check_constant,
    inner,
    not_square,
    number,
    put,
)
from .captured_values import in_order
from .rounding import scaled
from .values import check_shape, checked_result, fitting, moved


@dataclass(frozen=True)
class Edit(EditHook):
    """Pass the values through a user's function. Made by `edit`."""

    fn: Callable[..., Any]

    verb: ClassVar[str] = "edit"
    bare: ClassVar[tuple[str, ...]] = ("fn",)
    takes_step: ClassVar[bool] = True

    def check(self) -> None:
        if not callable(self.fn):
            raise BadHook(
                f"edit needs a function of the values, and was given {type(self.fn).__name__}"
            )
        _positional(self.fn)

    @property
    def together(self) -> bool:
        return True

    @property
    def puts_in(self) -> bool:
        return True

    def change(self, binding: Binding) -> Change:
        takes_here = _positional(self.fn) >= 2
        words = f"the function of {self}"

        def apply(values: Tensor, here: Here) -> Tensor:
            given = in_order(here.site, values)
            mine = given.clone()  # the function may write into what it is given
            new = self.fn(mine, here) if takes_here else self.fn(mine)
            return in_order(here.site, checked_result(new, given, words))

        return apply


def _positional(fn: Callable[..., Any]) -> int:
    """How many values a function needs: one, the values; or two, the values and where they are."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # functions written in C say nothing of theirs
        return 1
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in by_place if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(needed) > 2 or (not by_place and not takes_any) or by_name:
        takes = (
            ", ".join([*(p.name for p in needed), *(f"{name}=" for name in by_name)]) or "nothing"
        )
        name = getattr(fn, "__name__", "the function")
        raise BadHook(
            f"edit calls its function as fn(values) or fn(values, here), and {name} needs {takes}"
        )
    return len(needed)


@checks_keywords
def edit(
    site: SitesLike,
    fn: Callable[..., Any],
    *,
    pos: PosLike = None,
    rows: CountLike = None,
    step: CountLike = None,
) -> Edit:
    """Replace the values at a site by `fn(values)`, or by `fn(values, here)` if it takes two.

    `fn` is given the chosen cells [row, pos, ...] (at scores and pattern [row, head, query, key],
    or [row, query, key] of one head), which it may write into, and returns a tensor of the same
    shape and dtype. Rows are in their own positions: a shorter one is filled up with zeros, which
    are not written back. `here.positions`, `here.rows`, `here.steps`, `here.valid` and `here.site`
    say what the values are. Returning None, another shape or dtype, or NaN or an infinite number
    where there was none raises `BadEdit`; -inf is a mask at the logits and at scores, and may be
    returned there.

    >>> print(edit("mlp_out.3", torch.relu, pos=-1))
    edit(mlp_out.3, relu, pos=-1)
    """
    sites = as_sites(site)
    return Edit(sites, inner(pos, rows, step, sites), fn)


@dataclass(frozen=True)
class Steer(EditHook):
    """Add a vector. Made by `steer`."""

    vector: Constant
    scale: float = 1.0

    verb: ClassVar[str] = "steer"
    bare: ClassVar[tuple[str, ...]] = ("vector",)

    def check(self) -> None:
        not_square(self.sites, "steer adds a vector to")
        check_constant(self.vector, "the vector")
        put(self, "scale", number(self.scale, "scale"))

    def change(self, binding: Binding) -> Change:
        check_shape(self.vector, binding, "the vector")
        vector = fitting(
            Constant(scaled(self.vector.tensor, self.scale, "the vector")), "scale times the vector"
        )
        return lambda values, here: values + vector(values, here)


@checks_keywords
def steer(
    site: SitesLike, vector: Any, *, scale: float = 1.0, pos: PosLike = None, rows: CountLike = None
) -> Steer:
    """Add `scale` times a vector to what is at a site (activation addition, Turner et al. 2023).

    The vector has the site's axes behind batch and pos ([d_model], say); [pos, ...] gives one to
    each chosen position, [batch, pos, ...] to each row and position.

    >>> print(steer("resid_post.6", torch.ones(576), scale=2.0))
    steer(resid_post.6, tensor[576], scale=2.0)
    """
    sites = not_square(as_sites(site), "steer adds a vector to")
    return Steer(
        sites,
        inner(pos, rows, None, sites),
        as_constant(vector, "the vector"),
        number(scale, "scale"),
    )


@dataclass(frozen=True)
class Scale(EditHook):
    """Multiply by a number. Made by `scale`."""

    factor: float

    verb: ClassVar[str] = "scale"
    bare: ClassVar[tuple[str, ...]] = ("factor",)

    def check(self) -> None:
        put(self, "factor", number(self.factor, "factor"))

    def change(self, binding: Binding) -> Change:
        return lambda values, here: values * self.factor


@checks_keywords
def scale(site: SitesLike, factor: float, *, pos: PosLike = None, rows: CountLike = None) -> Scale:
    """Multiply what is at a site by a number.

    >>> print(scale("z.9.3", 0.5))
    scale(z.9.3, 0.5)
    """
    sites = as_sites(site)
    return Scale(sites, inner(pos, rows, None, sites), number(factor, "factor"))


@dataclass(frozen=True)
class ProjectOut(EditHook):
    """Take a direction out. Made by `project_out`."""

    direction: Constant

    verb: ClassVar[str] = "project_out"
    bare: ClassVar[tuple[str, ...]] = ("direction",)

    def check(self) -> None:
        not_square(self.sites, "project_out takes a direction out of")
        check_constant(self.direction, "the direction")
        tensor = self.direction.tensor
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise BadHook(
                f"the direction has shape {list(tensor.shape)}: give [d_model], or [k, d_model] for several"
            )
        if tensor.ndim == 2 and len(tensor) > tensor.shape[1]:
            raise BadHook(
                f"{len(tensor)} directions of {tensor.shape[1]} numbers cannot be independent: give at most "
                f"{tensor.shape[1]}, [k, d_model]"
            )

    def change(self, binding: Binding) -> Change:
        width = self.direction.tensor.shape[-1]
        if binding.shape is not None and binding.shape[-1] != width:
            raise BadHook(
                f"the direction has {width} numbers, and the last axis of {binding.site} has {binding.shape[-1]}"
            )
        directions = torch.atleast_2d(self.direction.tensor).double()
        directions = directions / directions.abs().amax(dim=1, keepdim=True).clamp(
            min=1e-300
        )  # squares stay finite
        basis, weights = torch.linalg.qr(directions.T)
        if bool((weights.diagonal().abs() < 1e-9 * directions.norm(dim=1).clamp(min=1e-30)).any()):
            raise BadHook(
                "the directions are zero, or one of them is made of the others: give independent ones"
            )

        like = moved(basis, "the direction")

        def apply(values: Tensor, here: Here) -> Tensor:
            kept = values.to(torch.promote_types(values.dtype, torch.float32))
            axes = like(kept)
            return (kept - (kept @ axes) @ axes.T).to(values.dtype)

        return apply


@checks_keywords
def project_out(
    site: SitesLike, direction: Any, *, pos: PosLike = None, rows: CountLike = None
) -> ProjectOut:
    """Take the part along a direction out of what is at a site: x - (x·d) d / |d|² (Ravfogel et al.
    2020).

    `direction` is [d_model], or [k, d_model] for a subspace of k independent directions, which need
    not be orthogonal.

    >>> print(project_out("resid_post.6", torch.ones(576)))
    project_out(resid_post.6, tensor[576])
    """
    sites = not_square(as_sites(site), "project_out takes a direction out of")
    return ProjectOut(sites, inner(pos, rows, None, sites), as_constant(direction, "the direction"))


@dataclass(frozen=True)
class SkipBlock(EditHook):
    """Let a block give out what it was given. Made by `skip_block`."""

    verb: ClassVar[str] = "skip_block"

    def check(self) -> None:
        for site in self.sites:
            if not isinstance(site, Site) or site.name != "resid_post" or site.layer is None:
                raise BadHook(
                    f"skip_block skips whole blocks, and {site} is none: name the blocks, skip_block([7, 8])"
                )

    @property
    def reads_input(self) -> bool:
        return True

    @property
    def gives_infinity(self) -> bool:
        return True

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: Here) -> Tensor:
            assert here.before is not None
            return here.before.clone()

        return apply


@checks_keywords
def skip_block(
    layer: int | Iterable[int], *, pos: PosLike = None, rows: CountLike = None
) -> SkipBlock:
    """Let one or more blocks leave the residual stream as it was: `resid_post.L` becomes
    `resid_pre.L`.

    The block still runs, so that its keys and values are in the cache; only what it adds is
    dropped.

    >>> print(skip_block(7))
    skip_block(resid_post.7)
    """
    layers = whole_numbers(layer, "layer", least=0, meaning="the blocks, counted from 0,")
    sites = as_sites([Site("resid_post", number) for number in layers])
    return SkipBlock(sites, inner(pos, rows, None, sites))
