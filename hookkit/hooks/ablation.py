"""Hooks that replace values: `ablate` and `patch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from ..arguments import check_integers, check_keywords, describe
from ..errors import BadHook, NotCaptured, OutOfRange
from ..models.chat import Chat
from ..models.positions import PROMPT, IndicesLike, Pos, PosLike, Where, read_position
from ..models.sites import AnySite, Sites, SitesLike, as_sites, has_name
from .base import (
    Binding,
    Change,
    Constant,
    EditContext,
    EditHook,
    When,
    as_constant,
    as_where,
    require_vectors,
    set_field,
)
from .capture import Captured
from .values import (
    FromPrompt,
    FromRun,
    Means,
    Per,
    Reference,
    Source,
    bind_source,
    check_directions,
    check_width,
    convert_once,
    orthonormal_basis,
    reference_prompts,
)


@runtime_checkable
class HasCaptures(Protocol):
    """An object with captured values: a Run or a HookManager."""

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured: ...
    @property
    def sites(self) -> Sites: ...


def has_captures(value: object) -> TypeGuard[HasCaptures]:
    """The same as `isinstance(value, HasCaptures)`, which takes 20 times as long in Python 3.11."""
    return getattr(value, "captured", None) is not None and hasattr(value, "sites")


@dataclass(frozen=True)
class Ablate(EditHook, verb="ablate", puts_in=True, takes_step=True):
    """Replaces the values. `ablate` returns it. A step is the one at which a run captured them."""

    to: Source = "zero"
    units: tuple[int, ...] | None = None

    def check(self) -> None:
        if self.where.step is not None and not isinstance(self.to, FromRun):
            raise BadHook(
                f"{self.verb} acts at positions and takes no step={self.where.step!r}: "
                "say pos= instead"
            )
        match self.to:
            case Means(values) | FromRun(values) if len(values) != len(self.sites):
                raise BadHook(
                    f"{self.verb} has values for {len(values)} sites, and acts at "
                    f"{len(self.sites)}: give as many"
                )
            case Constant() | Means() | Reference():
                require_vectors(self.sites, f"to={self.to!r} puts in")
            case "zero" | FromRun() | FromPrompt():
                pass
            case _:
                raise BadHook(
                    f"to={describe(self.to)} is unknown: give 'zero', 'mean', 'resample', a "
                    "tensor, statistics or a run"
                )
        set_field(self, "units", _as_units(self.units, self.sites))

    @property
    def gives_infinity(self) -> bool:
        return self.to == "zero"

    @property
    def source_where(self) -> Where:
        """The positions in the source's text whose values are put in."""
        return self.where

    def change(self, binding: Binding) -> Change:
        replacement = bind_source(self.to, self.sites, self.where, binding, self.source_where)
        units = self.units
        if units is None:
            return replacement
        if binding.shape and max(units) >= binding.shape[-1]:
            raise OutOfRange(
                f"unit {max(units)} of {binding.site} was asked for, which has "
                f"{binding.shape[-1]}: 0 to {binding.shape[-1] - 1}"
            )

        def apply(values: Tensor, here: EditContext) -> Tensor:
            new = values.clone()
            new[..., units] = replacement(values, here)[..., units]
            return new

        return apply


@dataclass(frozen=True)
class Patch(Ablate, verb="patch", bare=("to",)):
    """Replaces the values by those of another run. `patch` returns it."""

    subspace: Constant | None = None
    source_pos: Pos = None

    def check(self) -> None:
        if not isinstance(self.to, FromRun | FromPrompt):
            raise BadHook(
                f"patch puts in the values of a run, and to={describe(self.to)}: for others use "
                "ablate"
            )
        super().check()
        set_field(self, "source_pos", read_position(self.source_pos))
        if self.source_pos is not None and self.where.pos is None:
            raise BadHook(
                f"source_pos={self.source_pos!r} names positions of the source, and pos= those "
                "that they are put in at: give both"
            )
        if self.subspace is None:
            return
        require_vectors(self.sites, "patch replaces a subspace of")
        check_directions(self.subspace, "the subspace")
        if self.units is not None:
            raise BadHook(f"units={self.units} and subspace= were both given: one of them selects")

    @property
    def source_where(self) -> Where:
        return self.where if self.source_pos is None else Where(self.source_pos)

    def change(self, binding: Binding) -> Change:
        replacement = super().change(binding)
        if self.subspace is None:
            return replacement
        check_width(self.subspace, binding, "the subspace")
        fit = convert_once(orthonormal_basis(self.subspace.tensor), "the subspace")

        def apply(values: Tensor, here: EditContext) -> Tensor:
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            difference = replacement(values, here).to(wide.dtype) - wide
            basis = fit(wide)
            return (wide + (difference @ basis) @ basis.T).to(values.dtype)

        return apply


@check_keywords
def ablate(
    sites: SitesLike,
    *,
    to: Any = "zero",
    over: Any = None,
    per: Per | None = None,
    seed: int | None = None,
    units: IndicesLike = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> Ablate:
    """Replaces the values at these sites by values that carry no information about the prompt.

    to="zero"       zeros
    to="mean"       the mean over a reference: `over` is a run with these captures, or a list of
                    prompts
    to="resample"   the value of another prompt of the reference, drawn with `seed` (Chan et al.
                    2022); the same draw for the same prompt, alone or in a batch
    to=tensor       these values: the site's axes after batch and pos, or with [pos, …] or
                    [batch, pos, …] before them
    to=statistics   each site's mean over the texts that `hk.stats.activation_statistics` read
    to=run          the values of that run (as `patch`)

    For mean and resample, per="position" (the default) takes the reference's values at the same
    position; per="all" takes those of all positions (a model's first position is often an outlier).
    `units` are the indices of the last axis that are replaced, such as neurons of mlp_post; by
    default all of them.

    >>> print(ablate("z.9.3"), ablate("mlp_post.12", units=[7, 1001]), sep="; ")
    ablate(z.9.3); ablate(mlp_post.12, units=(7, 1001))
    """
    selected, where = as_sites(sites), as_where(pos, rows)
    _check_reference_options(to, over, per, seed)
    source: Any = to
    if isinstance(to, str):
        if to in ("mean", "resample"):
            selected, source = _reference(selected, to, over, per or "position", seed or 0)
    elif has_captures(to):
        selected, where, source = _values_of_run(selected, where, to)
    elif hasattr(to, "mean_of"):
        selected = _expand_layers(selected, to.sites)
        source = Means(tuple(as_constant(to.mean_of(site), "the mean") for site in selected))
    else:
        source = as_constant(to, "the tensor")
    return Ablate(selected, where, source, _as_units(units, selected), when=when)


def _check_reference_options(to: Any, over: Any, per: Per | None, seed: int | None) -> None:
    name = to if isinstance(to, str) else None
    if seed is not None and name != "resample":
        raise BadHook(
            f"seed= draws for to='resample', and to={describe(to)} draws nothing: leave seed out"
        )
    if name in ("mean", "resample") or over is per is None:
        return
    option = "per" if over is None else "over"
    raise BadHook(
        f"{option}= goes with to='mean' or to='resample', and to={describe(to)} was given"
    )


def _reference(sites: Sites, how: Any, over: Any, per: Per, seed: int) -> tuple[Sites, Reference]:
    if has_captures(over):
        sites = _expand_layers(sites, over.sites)
        return sites, Reference(how, per, seed, tuple(map(over.captured, sites)))
    prompts = () if over is None else reference_prompts(over)
    return sites, Reference(how, per, seed, prompts=prompts)


@check_keywords
def patch(
    sites: SitesLike,
    source: HasCaptures | str | Chat,
    *,
    units: IndicesLike = None,
    subspace: Any = None,
    pos: PosLike = None,
    source_pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> Patch:
    """Replaces the values at these sites by those of another run (Vig et al. 2020).

    `source` is a run with captures at these sites, or one prompt, a text or a chat, which is run
    first, without hooks.

    A position means the same place in both texts: `pos=-1` takes the source's own last position.
    By default the source's captured positions are replaced, and its prompts must be as long as
    these. A source of one prompt serves every row; otherwise rows are paired by index. A bare name
    such as "resid_post" means each layer that the source captured. `units` are the indices of the
    last axis that are replaced, such as neurons of mlp_post; by default all of them. With
    `subspace`, directions [k, d_model] that need not be orthogonal, only the component within their
    span is replaced: an interchange intervention (Geiger et al. 2023). `source_pos` are the
    positions in the source's text, paired in order with those of `pos`; by default `pos` too.
    """
    selected = as_sites(sites)
    if isinstance(source, str | Chat):
        where, new_values = as_where(PROMPT if pos is None else pos, rows), FromPrompt(source)
    elif has_captures(source):
        selected, where, new_values = _values_of_run(selected, as_where(pos, rows), source)
    else:
        raise BadHook(
            "patch needs a run or a prompt's text as its source, and was given "
            f"{type(source).__name__}; for a tensor: ablate(to=)"
        )
    basis = None if subspace is None else as_constant(subspace, "the subspace")
    chosen, of_source = _as_units(units, selected), read_position(source_pos)
    return Patch(selected, where, new_values, chosen, basis, of_source, when=when)


def _as_units(units: IndicesLike, sites: Sites) -> tuple[int, ...] | None:
    if units is None:
        return None
    require_vectors(sites, "units= chooses")
    meaning = "numbers of the last axis, counted from 0,"
    return tuple(check_integers(units, "units", least=0, meaning=meaning))


def _values_of_run(sites: Sites, where: Where, source: HasCaptures) -> tuple[Sites, Where, FromRun]:
    """Returns the source's values, and where they act: by default where they were captured."""
    sites = _expand_layers(sites, source.sites)
    captures = tuple(map(source.captured, sites))
    if where.pos is not None:
        return sites, where, FromRun(captures)
    capture_positions = {(capture.where.pos, capture.where.step) for capture in captures}
    if len(capture_positions) > 1:
        raise BadHook(
            "the source captured these sites at different positions: say pos=, or give one hook a "
            "site"
        )
    pos, step = capture_positions.pop()
    positions = captures[0].positions
    if pos is None and step is None and positions is not None:
        longest = max(map(len, captures[0].prompts))
        # a source that ends with its prompt has no values for generated tokens
        if int(positions.max()) < longest:
            pos = PROMPT
    return sites, Where(pos, where.rows, step), FromRun(captures)


def _expand_layers(sites: Sites, available: Sites) -> Sites:
    """Replaces each name without a layer by the layers that are available."""
    expanded: list[AnySite] = []
    for site in sites:
        layers: list[AnySite] = [site]
        if site.every_layer:
            layers = [layer for layer in available if has_name(layer, str(site))]
        if not layers:
            raise NotCaptured(f"the source captured no {site}: it has {available}")
        expanded += layers
    return Sites(tuple(expanded))
