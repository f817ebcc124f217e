"""Hooks that replace values: `ablate` and `patch`.

The new values are zeros, a tensor, the values of another run, or the mean or a sample of the values
of reference prompts.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_integers, check_keywords, check_seed, describe
from ..errors import BadHook, BadPrompt, NotCaptured, OutOfRange
from ..models.positions import PROMPT, IndicesLike, PosLike, Where, resolve_positions
from ..models.prompts import check_prompts, positions_of_text
from ..models.sites import QUERY_KEY_SITES, AnySite, ModuleSite, Site, Sites, SitesLike, as_sites
from ..models.views import unseen_value
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
from .captured_values import Captured
from .rounding import convert_like
from .values import check_shape, convert_once, fit_to_values

Per: TypeAlias = Literal["position", "all"]
TO = "give 'zero', 'mean', 'resample', a tensor, statistics or a run"


def _patch_from(source: Captured, where: Where, binding: Binding) -> Change:
    """Returns the change to the source's values at the positions that `where` means in its text."""
    if source.positions is None:
        raise BadHook(
            f"the tensor at {source.site} has no rows and positions of its own: it cannot be "
            "patched by position"
        )
    _check_width(source, binding)

    def apply(values: Tensor, here: Here) -> Tensor:
        rows = [source.row(prompt) for prompt in here.rows]
        columns = _source_columns(source, where, rows, here, binding)
        new = source.by_place[torch.tensor(rows)[:, None], columns]
        new = convert_like(new, values, f"what the source has at {source.site}")
        if isinstance(source.site, ModuleSite) or source.site.name not in QUERY_KEY_SITES:
            _check_sizes(source, new.shape[2:], values.shape[2:])
            return new
        _check_sizes(source, new.shape[2:-1], values.shape[2:-1])
        # no query of the source's text sees keys after its last one
        n_missing_keys = values.shape[-1] - new.shape[-1]
        if n_missing_keys <= 0:
            return new[..., : values.shape[-1]]
        masked = unseen_value(new.dtype, source.site.name == "scores")
        return nn.functional.pad(new, (0, n_missing_keys), value=masked)

    return apply


def _check_width(source: Captured, binding: Binding) -> None:
    """Raises `BadHook` if another model's values cannot fit a site of this one."""
    if binding.shape is not None:
        _check_sizes(source, source.values.shape[2:], binding.shape)


def _check_sizes(source: Captured, sizes: Sequence[int], model_sizes: Sequence[int]) -> None:
    if tuple(sizes) != tuple(model_sizes):
        raise BadHook(
            f"the source of {source.site} has values of shape {list(sizes)} after row and pos, and "
            f"this model has {list(model_sizes)}: give a run of a model of the same size"
        )


def _source_columns(
    source: Captured, where: Where, rows: list[int], here: Here, binding: Binding
) -> Tensor:
    """Returns the column of the source's values for each cell.

    Both texts resolve `where` for themselves, and their positions are paired in order.
    """
    positions_of_prompt = here.cells.text.selected_positions(where)
    columns = torch.zeros_like(here.positions)
    for number, (row, prompt) in enumerate(zip(rows, here.rows, strict=True)):
        ids = source.prompts[row]
        positions = positions_of_prompt[prompt]
        assert positions is not None
        source_positions = resolve_positions(
            where, len(ids), lambda at, ids=ids: positions_of_text(binding.lm, ids, at)
        )
        length = here.cells.text.lengths[prompt]
        is_unpaired = where.pos is None and length != len(ids)
        if is_unpaired or len(positions) != len(source_positions):
            raise BadHook(
                f"row {prompt} has {length} tokens and the source of {source.site} has {len(ids)}, "
                f"so pos={where.pos!r} does not pair their positions: say which are meant, with "
                "pos="
            )
        row_columns = []
        for position in here.cells.places[number]:
            source_position = source_positions[positions.index(position)]
            row_columns.append(source.column(row, source_position))
        columns[number, : len(row_columns)] = torch.tensor(row_columns)
    return columns


def _mean(source: Captured, per: Per) -> Change:
    """Returns the change to the reference's mean, at the same position or over all positions."""
    assert source.positions is not None
    name = f"the reference's mean at {source.site}"
    if per == "all":
        overall = convert_once(source.values[source.positions >= 0].double().mean(0), name)
        return lambda values, here: overall(values).expand_as(values).clone()
    means = {}
    for position in sorted(set(source.positions.flatten().tolist()) - {-1}):
        means[position] = source.values[source.positions == position].double().mean(0)
    zero = torch.zeros_like(next(iter(means.values())))

    def apply(values: Tensor, here: Here) -> Tensor:
        width = here.positions.shape[1]
        rows = []
        for positions in here.cells.places:
            _check_reference_length(means, positions, source)
            cells = [means[position] for position in positions]
            rows.append(torch.stack(cells + [zero] * (width - len(cells))))
        return convert_like(torch.stack(rows), values, name)

    return apply


def _check_reference_length(table: Any, positions: Sequence[int], source: Captured) -> None:
    missing = [position for position in positions if position not in table]
    if missing:
        raise BadHook(
            f"position {missing[0]} of {source.site} is to be replaced, and no prompt of the "
            f"reference is that long (its positions: {min(table)} to {max(table)}): give longer "
            "ones, fewer positions, or per='all'"
        )


def _resample(source: Captured, per: Per, seed: int) -> Change:
    """Returns the change to values of other prompts, drawn at random.

    A draw depends on the seed, the prompt's own tokens and the position only, so that it is the
    same alone and in a batch.
    """
    assert source.positions is not None
    cells = [(row, column) for row, column in (source.positions >= 0).nonzero().tolist()]
    cells_at: dict[int, list[tuple[int, int]]] = {}
    for row, column in cells:
        cells_at.setdefault(int(source.positions[row, column]), []).append((row, column))

    def draw(prompt: tuple[int, ...], position: int) -> tuple[int, int]:
        digest = hashlib.sha256(repr((seed, prompt)).encode()).hexdigest()
        if per == "all":
            return random.Random(f"{digest}{position}").choice(cells)
        # one donor serves all positions of a row for which it is long enough
        donors = random.Random(digest).sample(range(len(source.rows)), len(source.rows))
        return min(cells_at[position], key=lambda cell: donors.index(cell[0]))

    def apply(values: Tensor, here: Here) -> Tensor:
        new = torch.zeros_like(values)
        for row, (prompt, positions) in enumerate(zip(here.rows, here.cells.places, strict=True)):
            if per == "position":
                _check_reference_length(cells_at, positions, source)
            ids = here.cells.text.prompt(prompt)
            index = torch.tensor([draw(ids, position) for position in positions])
            drawn = source.values[index[:, 0], index[:, 1]]
            name = f"what the reference has at {source.site}"
            new[row, : len(positions)] = convert_like(drawn, values, name)
        return new

    return apply


@runtime_checkable
class HasCaptures(Protocol):
    """An object with captured values: a Run or a HookManager."""

    def captured(self, site: "str | AnySite", name: str | None = None) -> Captured: ...
    @property
    def sites(self) -> Sites: ...


@runtime_checkable
class HasMeans(Protocol):
    """An object that knows the mean at sites: Statistics."""

    def mean_of(self, site: "AnySite") -> Tensor: ...
    @property
    def sites(self) -> Sites: ...


@dataclass(frozen=True)
class Means:
    """One tensor for each of the hook's sites: `tensors[i]` for site i."""

    tensors: tuple[Constant, ...]

    def __post_init__(self) -> None:
        for tensor in _nonempty_tuple(self.tensors, "means"):
            check_constant(tensor, "a mean")

    def __repr__(self) -> str:
        return "means"


@dataclass(frozen=True)
class FromRun:
    """The values of a run: `sources[i]` for the hook's site i."""

    sources: tuple[Captured, ...]

    def __post_init__(self) -> None:
        for source in _nonempty_tuple(self.sources, "the values of a run"):
            _check_captured(source)

    def __repr__(self) -> str:
        return "run"


@dataclass(frozen=True)
class FromPrompt:
    """The values that the model has on a prompt (a text or token ids), which is run first."""

    prompt: str | tuple[int, ...]

    def __post_init__(self) -> None:
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        set_field(self, "prompt", _reference_prompts([prompt])[0])

    def __repr__(self) -> str:
        return repr(self.prompt)


@dataclass(frozen=True)
class Reference:
    """Values of other prompts: captured ones (`sources`), or `prompts` that are run first."""

    how: Literal["mean", "resample"]
    per: Per
    seed: int
    sources: tuple[Captured, ...] = ()
    prompts: tuple[tuple[int, ...] | str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self.how, "to", ("mean", "resample"))
        check_choice(self.per, "per", ("position", "all"))
        set_field(self, "seed", check_seed(self.seed))
        if self.how == "mean" and self.seed:
            raise BadHook(
                "seed= draws for to='resample', and to='mean' draws nothing: leave seed out"
            )
        if bool(self.sources) == bool(self.prompts):
            raise BadHook(f"to={self.how!r} needs a reference: say over=run, or over=[prompts]")
        if self.prompts:
            set_field(self, "prompts", _reference_prompts(self.prompts))
            return
        for source in _nonempty_tuple(self.sources, "a reference"):
            _check_captured(source)

    def __repr__(self) -> str:
        count = len(self.prompts) or len(self.sources[0].rows)
        seed = f", seed={self.seed}" if self.how == "resample" else ""
        return f"{self.how!r}, over={count} prompts, per={self.per!r}{seed}"


def _nonempty_tuple(values: object, name: str) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or not values:
        raise BadHook(f"{name}: {describe(values)} is no tuple of at least one")
    return values


def _reference_prompts(over: Any) -> tuple[tuple[int, ...] | str, ...]:
    try:
        return tuple(check_prompts(over))
    except BadPrompt as error:
        raise BadHook(
            f"over={describe(over)} has no prompt to take a reference from: {error}"
        ) from error


def _check_captured(source: object) -> None:
    """Raises `BadHook` if captured values do not have the rows and positions that they name."""
    if not isinstance(source, Captured):
        raise BadHook(f"a hook holds {describe(source)} where values of a run are meant")
    values = source.values
    if not isinstance(values, Tensor) or values.ndim < 1 or not isinstance(source.prompts, tuple):
        raise BadHook(
            f"the values of a run at {source.site} are {describe(values)}, and no tensor of rows"
        )
    if source.positions is None:
        return
    shape = source.by_place.shape[:2]  # scores and patterns have their heads before the queries
    fits = isinstance(source.positions, Tensor) and source.positions.shape == shape
    if not fits or len(source.rows) != shape[0] or len(source.prompts) < shape[0]:
        raise BadHook(
            f"the values of a run at {source.site} have shape {list(values.shape)}, and positions, "
            "rows or prompts of another number: capture them again"
        )


Source: TypeAlias = Literal["zero"] | Constant | Means | FromRun | FromPrompt | Reference


@dataclass(frozen=True)
class Ablate(EditHook):
    """Replaces the values. `ablate` returns it."""

    to: Source = "zero"
    units: tuple[int, ...] | None = None

    verb: ClassVar[str] = "ablate"
    takes_step: ClassVar[bool] = True  # the step at which a run captured the new values

    def check(self) -> None:
        if self.where.step is not None and not isinstance(self.to, FromRun):
            raise BadHook(
                f"{self.verb} acts at positions and takes no step={self.where.step!r}: "
                "say pos= instead"
            )
        if isinstance(self.to, str):
            check_choice(self.to, "to", ("zero",))
        elif isinstance(self.to, Means | FromRun):
            count = len(self.to.tensors if isinstance(self.to, Means) else self.to.sources)
            if count != len(self.sites):
                raise BadHook(
                    f"{self.verb} has values for {count} sites, and acts at {len(self.sites)}: "
                    "give as many"
                )
        elif not isinstance(self.to, Constant | FromPrompt | Reference):
            raise BadHook(f"to={describe(self.to)} is unknown: {TO}")
        if isinstance(self.to, Constant):
            require_vectors(self.sites, "to=tensor puts in")
        elif isinstance(self.to, Reference | Means):
            require_vectors(self.sites, "to='mean' or 'resample' puts in")
        if self.units is not None:
            set_field(self, "units", _as_units(self.units, self.sites))

    @property
    def puts_in(self) -> bool:
        return True

    @property
    def gives_infinity(self) -> bool:
        return self.to == "zero"

    def change(self, binding: Binding) -> Change:
        replacement = self._replacement(binding)
        units = self.units
        if units is None:
            return replacement
        size = binding.shape[-1] if binding.shape else None
        if size is not None and max(units) >= size:
            raise OutOfRange(
                f"unit {max(units)} of {binding.site} was asked for, which has {size}: "
                f"0 to {size - 1}"
            )

        def apply(values: Tensor, here: Here) -> Tensor:
            new = values.clone()
            new[..., units] = replacement(values, here)[..., units]
            return new

        return apply

    def _replacement(self, binding: Binding) -> Change:
        """Returns the change of all units."""
        match self.to:
            case Constant():
                return _replace_by(self.to, binding)
            case Means():
                return _replace_by(self.to.tensors[self.sites.index(binding.site)], binding)
            case FromRun():
                return _patch_from(_of_site(self.to.sources, binding.site), self.where, binding)
            case FromPrompt():
                return _patch_from(binding.reference((self.to.prompt,)), self.where, binding)
            case Reference():
                return _replace_by_reference(self.to, binding)
            case _:
                return lambda values, here: torch.zeros_like(values)


def _replace_by(tensor: Constant, binding: Binding) -> Change:
    check_shape(tensor, binding, "the tensor")
    fit = fit_to_values(tensor, "the tensor")
    return lambda values, here: fit(values, here).expand_as(values).clone()


def _replace_by_reference(reference: Reference, binding: Binding) -> Change:
    if reference.sources:
        source = _of_site(reference.sources, binding.site)
    else:
        source = binding.reference(reference.prompts)
    _check_width(source, binding)
    if reference.how == "mean":
        return _mean(source, reference.per)
    return _resample(source, reference.per, reference.seed)


def _of_site(sources: Sequence[Captured], site: AnySite) -> Captured:
    return next(source for source in sources if source.site == site)


@dataclass(frozen=True)
class Patch(Ablate):
    """Replaces the values by those of another run. `patch` returns it."""

    verb: ClassVar[str] = "patch"
    bare: ClassVar[tuple[str, ...]] = ("to",)

    def check(self) -> None:
        if not isinstance(self.to, FromRun | FromPrompt):
            raise BadHook(
                f"patch puts in the values of a run, and to={describe(self.to)}: for others use "
                "ablate"
            )
        super().check()


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
) -> Ablate:
    """Replaces the values at these sites by values that carry no information about the prompt.

    to="zero"       zeros
    to="mean"       the mean over a reference: `over` is a run with these captures, or a list of
                    prompts
    to="resample"   the value of another prompt of the reference, drawn with `seed` (Chan et al.
                    2022); the same draw for the same prompt, alone or in a batch
    to=tensor       these values: the site's axes after batch and pos, or with [pos, …] or
                    [batch, pos, …] before them
    to=statistics   each site's mean over the texts that `hk.statistics` read
    to=run          the values of that run (as `patch`)

    For mean and resample, per="position" (the default) takes the reference's values at the same
    position; per="all" takes those of all positions (a model's first position is often an outlier).
    `units` are the indices of the last axis that are replaced, such as neurons of mlp_post; by
    default all of them.

    >>> print(ablate("z.9.3"), ablate("mlp_post.12", units=[7, 1001]), sep="; ")
    ablate(z.9.3); ablate(mlp_post.12, units=(7, 1001))
    """
    hook = _ablation(as_sites(sites), as_where(pos, rows), to, over, per, seed)
    return _with_units(hook, units)


def _ablation(
    sites: Sites, where: Where, to: Any, over: Any, per: Per | None, seed: int | None
) -> Ablate:
    _check_reference_options(to, over, per, seed)
    if isinstance(to, str) and to in ("mean", "resample"):
        require_vectors(sites, f"to={to!r} puts in")
        return _reference_ablation(sites, where, to, over, per or "position", seed or 0)
    if isinstance(to, HasCaptures):
        return _from_captures(Ablate, sites, to, where)
    if isinstance(to, HasMeans):
        sites_with_means = _expand_layers(sites, to)
        means = tuple(as_constant(to.mean_of(site), "the mean") for site in sites_with_means)
        return Ablate(Sites(sites_with_means), where, Means(means))
    if isinstance(to, str):
        if to != "zero":
            raise BadHook(f"to={to!r} is unknown: {TO}")
        return Ablate(sites, where)
    require_vectors(sites, "to=tensor puts in")
    return Ablate(sites, where, as_constant(to, "the tensor"))


def _check_reference_options(to: Any, over: Any, per: Per | None, seed: int | None) -> None:
    name = to if isinstance(to, str) else None
    if seed is not None and name != "resample":
        raise BadHook(
            f"seed= draws for to='resample', and to={describe(to)} draws nothing: leave seed out"
        )
    for option, value in (("over", over), ("per", per)):
        if value is not None and name not in ("mean", "resample"):
            raise BadHook(
                f"{option}= goes with to='mean' or to='resample', and to={describe(to)} was given"
            )


def _reference_ablation(
    sites: Sites, where: Where, how: Any, over: Any, per: Per, seed: int
) -> Ablate:
    if over is None:
        raise BadHook(f"to={how!r} needs a reference: say over=run, or over=[prompts]")
    check_choice(per, "per", ("position", "all"))
    if not isinstance(over, HasCaptures):
        prompts = _reference_prompts(over)
        return Ablate(sites, where, Reference(how, per, seed, prompts=prompts))
    sources = _captured_by(over, sites)
    return Ablate(_sites_of(sources), where, Reference(how, per, seed, sources))


@check_keywords
def patch(
    sites: SitesLike,
    source: HasCaptures | str,
    *,
    units: IndicesLike = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
) -> Patch:
    """Replaces the values at these sites by those of another run (Vig et al. 2020).

    `source` is a run with captures at these sites, or the text of one prompt, which is run first,
    without hooks.

    A position means the same place in both texts: `pos=-1` takes the source's own last position.
    By default the source's captured positions are replaced, and its prompts must be as long as
    these. A source of one prompt serves every row; otherwise rows are paired by index. A bare name
    such as "resid_post" means each layer that the source captured. `units` are the indices of the
    last axis that are replaced, such as neurons of mlp_post; by default all of them.
    """
    selected = as_sites(sites)
    where = as_where(pos, rows)
    if isinstance(source, str):
        if where.pos is None:
            where = replace(where, pos=PROMPT)
        return _with_units(Patch(selected, where, FromPrompt(source)), units)
    if not isinstance(source, HasCaptures):
        raise BadHook(
            "patch needs a run or a prompt's text as its source, and was given "
            f"{type(source).__name__}; for a tensor: ablate(to=)"
        )
    return _with_units(_from_captures(Patch, selected, source, where), units)


def _with_units(hook: Any, units: IndicesLike) -> Any:
    if units is None:
        return hook
    return replace(hook, units=_as_units(units, hook.sites))


def _as_units(units: IndicesLike, sites: Sites) -> tuple[int, ...]:
    require_vectors(sites, "units= chooses")
    meaning = "numbers of the last axis, counted from 0,"
    return tuple(check_integers(units, "units", least=0, meaning=meaning))


def _from_captures(hook_type: type[Any], sites: Sites, source: HasCaptures, where: Where) -> Any:
    """Returns a hook with the source's values. By default it acts where they were captured."""
    captures = _captured_by(source, sites)
    if where.pos is None:
        capture_positions = {(capture.where.pos, capture.where.step) for capture in captures}
        if len(capture_positions) > 1:
            raise BadHook(
                "the source captured these sites at different positions: say pos=, or give one "
                "hook a site"
            )
        pos, step = capture_positions.pop()
        # a source that ends with its prompt has no values for generated tokens
        if pos is None and step is None and _ends_with_prompt(captures[0]):
            pos = PROMPT
        where = Where(pos, where.rows, step)
    return hook_type(_sites_of(captures), where, FromRun(captures))


def _ends_with_prompt(source: Captured) -> bool:
    if source.positions is None:
        return False
    return int(source.positions.max()) < max(map(len, source.prompts))


def _captured_by(source: HasCaptures, sites: Sites) -> tuple[Captured, ...]:
    return tuple(source.captured(site) for site in _expand_layers(sites, source))


def _sites_of(captures: Sequence[Captured]) -> Sites:
    return Sites(tuple(capture.site for capture in captures))


def _expand_layers(sites: Sites, source: HasCaptures | HasMeans) -> tuple[AnySite, ...]:
    """Replaces each name without a layer by the layers that the source has."""
    expanded: list[AnySite] = []
    for site in sites:
        if not site.every_layer:
            expanded.append(site)
            continue
        layers = [s for s in source.sites if isinstance(s, Site) and s.name == str(site)]
        if not layers:
            raise NotCaptured(f"the source captured no {site}: it has {source.sites}")
        expanded += layers
    return tuple(expanded)
