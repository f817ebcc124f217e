"""Hooks that change inner values by a rule: edit, steer, scale, project_out … and knockout."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_keywords, check_number
from ..errors import BadEdit, BadHook, EmptySelection, OutOfRange
from ..models.positions import IndicesLike, Pos, PosLike, Where, read_position, resolve_positions
from ..models.sites import Site, SitesLike, as_sites, has_name
from ..models.views import is_hidden, unseen_value
from .base import (
    Binding,
    Change,
    Constant,
    EditContext,
    EditHook,
    When,
    argument_text,
    as_constant,
    as_where,
    check_constant,
    require_vectors,
    set_field,
)
from .capture import swap_head_and_query
from .values import (
    check_directions,
    check_result,
    check_shape,
    check_width,
    convert_once,
    fit_to_values,
    orthonormal_basis,
    scale_tensor,
)


@dataclass(frozen=True)
class Edit(
    EditHook, verb="edit", bare=("fn",), puts_in=True, takes_step=True, mixes_positions=True
):
    """Passes the values through a user's function. `edit` returns it."""

    fn: Callable[..., Any]

    def check(self) -> None:
        if not callable(self.fn):
            raise BadHook(
                f"edit needs a function of the values, and was given {type(self.fn).__name__}"
            )
        _takes_context(self.fn)

    def change(self, binding: Binding) -> Change:
        takes_here = _takes_context(self.fn)
        function_name = f"the function of {self}"

        def apply(values: Tensor, here: EditContext) -> Tensor:
            old = swap_head_and_query(here.site, values)
            argument = old.clone()  # the function may write into its argument
            new = self.fn(argument, here) if takes_here else self.fn(argument)
            return swap_head_and_query(here.site, check_result(new, old, function_name))

        return apply


def _takes_context(fn: Callable[..., Any]) -> bool:
    """Returns False for a function that is called as `fn(values)`, True for `fn(values, here)`."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # functions written in C may have no signature
        return False
    for arguments in ("values",), ("values", "here"):
        with suppress(TypeError):
            signature.bind(*arguments)
            return "here" in arguments
    name = getattr(fn, "__name__", "the function")
    raise BadHook(
        f"edit calls its function as fn(values) or fn(values, here), and {name}{signature} needs "
        "other arguments"
    )


@check_keywords
def edit(
    site: SitesLike,
    fn: Callable[..., Any],
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    step: IndicesLike = None,
    when: When | None = None,
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
    return Edit(as_sites(site), as_where(pos, rows, step), fn, when=when)


@dataclass(frozen=True)
class Steer(EditHook, verb="steer", bare=("vector",)):
    """Adds a vector. `steer` returns it."""

    vector: Constant
    scale: float = 1.0

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
    when: When | None = None,
) -> Steer:
    """Adds `scale` times a vector to the values at a site (Turner et al. 2023).

    The vector has the site's axes after batch and pos (often [d_model]); [pos, ...] holds one
    vector for each selected position, [batch, pos, ...] one for each row and position.

    >>> print(steer("resid_post.6", torch.ones(576), scale=2.0))
    steer(resid_post.6, tensor[576], scale=2.0)
    """
    addend = as_constant(vector, "the vector")
    return Steer(as_sites(site), as_where(pos, rows), addend, scale, when=when)


@dataclass(frozen=True)
class Scale(EditHook, verb="scale", bare=("factor",)):
    """Multiplies by a number. `scale` returns it."""

    factor: float

    def check(self) -> None:
        set_field(self, "factor", check_number(self.factor, "factor"))

    def change(self, binding: Binding) -> Change:
        return lambda values, here: values * self.factor


@check_keywords
def scale(
    site: SitesLike,
    factor: float,
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> Scale:
    """Multiplies the values at a site by a number.

    >>> print(scale("z.9.3", 0.5))
    scale(z.9.3, 0.5)
    """
    return Scale(as_sites(site), as_where(pos, rows), factor, when=when)


@dataclass(frozen=True)
class ProjectOut(EditHook, verb="project_out", bare=("direction",)):
    """Removes a direction. `project_out` returns it."""

    direction: Constant

    def check(self) -> None:
        require_vectors(self.sites, "project_out takes a direction out of")
        check_directions(self.direction, "the direction")

    def change(self, binding: Binding) -> Change:
        check_width(self.direction, binding, "the direction")
        fit = convert_once(orthonormal_basis(self.direction.tensor), "the direction")

        def apply(values: Tensor, here: EditContext) -> Tensor:
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            basis = fit(wide)
            return (wide - (wide @ basis) @ basis.T).to(values.dtype)

        return apply


@check_keywords
def project_out(
    site: SitesLike,
    direction: Any,
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> ProjectOut:
    """Removes the part along a direction: x - (x·d) d / |d|² (Ravfogel et al. 2020).

    `direction` is [d_model], or [k, d_model] for a subspace of k independent directions, which need
    not be orthogonal.

    >>> print(project_out("resid_post.6", torch.ones(576)))
    project_out(resid_post.6, tensor[576])
    """
    removed = as_constant(direction, "the direction")
    return ProjectOut(as_sites(site), as_where(pos, rows), removed, when=when)


@dataclass(frozen=True)
class SkipBlock(EditHook, verb="skip_block", reads_input=True, gives_infinity=True):
    """Makes a block return its input. `skip_block` returns it."""

    def check(self) -> None:
        for site in self.sites:
            if not has_name(site, "resid_post") or site.layer is None:
                raise BadHook(
                    f"skip_block skips whole blocks, and {site} is none: name the blocks, "
                    "skip_block([7, 8])"
                )

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: EditContext) -> Tensor:
            assert here.module_input is not None
            return here.module_input.clone()

        return apply


@check_keywords
def skip_block(
    layer: int | Iterable[int],
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> SkipBlock:
    """Makes blocks leave the residual stream unchanged: `resid_post.L` becomes `resid_pre.L`.

    The block still runs, so that its keys and values are in the cache; only its additions to the
    stream are dropped.

    >>> print(skip_block(7))
    skip_block(resid_post.7)
    """
    layers = check_integers(layer, "layer", least=0, meaning="the blocks, counted from 0,")
    sites = as_sites([Site("resid_post", number) for number in layers])
    return SkipBlock(sites, as_where(pos, rows), when=when)


@dataclass(frozen=True)
class Knockout(EditHook, verb="knockout"):
    """Cuts attention from the queries, `where.pos`, to the keys. `knockout` returns it."""

    key: Pos = None

    def check(self) -> None:
        for site in self.sites:
            if not has_name(site, "scores") or site.layer is None:
                raise BadHook(
                    f"knockout cuts attention's scores in layers, and {site} is none of them"
                )
        if self.key is None:
            raise EmptySelection(
                "knockout needs the keys that are not to be seen: key=0, key=hk.at('Mary')"
            )
        set_field(self, "key", read_position(self.key))
        _check_visible(self.key, self.where.pos)

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: EditContext) -> Tensor:
            masked = unseen_value(values.dtype, scores=True)
            new = values.clone()
            for index, row in enumerate(here.rows):
                new[index, ..., self._keys(here, row, values.shape[-1])] = masked
            blind = here.real_cells(is_hidden(new).all(-1) & ~is_hidden(values).all(-1))
            if bool(blind.any()):
                index, column = blind.nonzero()[0][:2].tolist()
                raise BadEdit(
                    f"{self} leaves the query at position {int(here.positions[index, column])} of "
                    f"row {here.rows[index]} nothing to see: name the queries, such as "
                    "query=slice(1, None), or fewer keys"
                )
            return new

        return apply

    def _keys(self, here: EditContext, row: int, n_keys: int) -> list[int]:
        """Returns the positions of a row's keys that are cut, among the first `n_keys`."""
        sequences = here.cells.text
        length = sequences.lengths[row]
        prompt = sequences.prompt(row)
        positions = resolve_positions(
            Where(self.key), length, lambda at: sequences.find(prompt, at)
        )
        if isinstance(positions, range):
            return list(range(positions.start, min(positions.stop, n_keys), positions.step))
        if sequences.final and positions[-1] >= length:
            raise OutOfRange(
                f"{self} means the key at position {positions[-1]} of row {row}, which has "
                f"{length} tokens"
            )
        return [position for position in positions if position < n_keys]

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if "pos" in settings:
            settings["query"] = settings.pop("pos")
        return settings

    def __str__(self) -> str:
        arguments = []
        for name in ("layer", "head"):
            indices = list(dict.fromkeys(getattr(site, name) for site in self.sites))
            if len(indices) > 1:
                arguments.append(str(indices))
            elif indices != [None]:
                arguments.append(str(indices[0]))
        settings = self.settings()
        for name in ("query", "key", "rows", "when"):
            if name in settings:
                arguments.append(f"{name}={argument_text(settings[name])}")
        return f"knockout({', '.join(arguments)})"


def _check_visible(key: Pos, query: Pos) -> None:
    """Raises `BadHook` if all keys come after all queries, where this is known without the text."""
    keys, queries = _bounds(key), _bounds(query)
    if keys is None or queries is None or (keys[0] < 0) != (queries[1] < 0):
        return
    if keys[0] > queries[1]:
        raise BadHook(
            f"key={key!r} comes after query={query!r}, which never sees it: a token sees itself "
            "and those before it, so there is nothing to cut; name keys that are not after the "
            "query"
        )


def _bounds(positions: Pos) -> tuple[int, int] | None:
    """Returns the first and the last of positions that are numbers of one sign; None for others."""
    numbers = (positions,) if isinstance(positions, int) else positions
    if not isinstance(numbers, tuple) or (min(numbers) < 0) != (max(numbers) < 0):
        return None
    return min(numbers), max(numbers)


@check_keywords
def knockout(
    layer: int | Iterable[int],
    head: int | Iterable[int] | None = None,
    *,
    key: PosLike,
    query: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> Knockout:
    """Cuts attention from the tokens `query` to the tokens `key` (Geva et al. 2023).

    The scores of these pairs become the smallest number of the dtype, so that the softmax gives
    them no weight and renormalizes the rest. `head` is one head or several; by default all of them.
    Positions are a number, a slice, a list, `hk.at("store")`, `hk.PROMPT` or `hk.GENERATED`. A
    query that can attend to nothing raises `BadEdit`.

    >>> print(knockout(9, 3, query=-1, key=at("Mary")))
    knockout(9, 3, query=-1, key=at('Mary'))
    """
    layers = check_integers(layer, "layer", least=0, meaning="the layers, counted from 0,")
    heads: list[int | None] = [None]
    if head is not None:
        heads = [*check_integers(head, "head", least=0, meaning="the heads, counted from 0,")]
    scores = [Site("scores", *indices) for indices in itertools.product(layers, heads)]
    return Knockout(as_sites(scores), as_where(query, rows), read_position(key), when=when)
