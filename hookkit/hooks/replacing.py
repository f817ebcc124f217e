"""Hooks that put other values in the place of what they find: ablate and patch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..arguments import checks_keywords, choice, described, prompt_rows, seed_of, whole_numbers
from ..captured import Captured
from ..errors import BadHook, BadPrompt, NotCaptured, OutOfRange
from ..positions import PROMPT, CountLike, PosLike, Where
from ..sites import AnySite, Sites, SitesLike, as_sites
from .base import Binding, Change, Constant, EditHook, Here, check_constant, constant, inner, not_square, put
from .fitting import check_shape, fitting
from .stand_ins import Per, check_width, from_run, mean, resample


@runtime_checkable
class HasCaptures(Protocol):
    """A Run, or a HookManager: something that kept values at sites."""

    def captured(self, site: "str | AnySite", name: str | None = None) -> Captured: ...
    @property
    def sites(self) -> Sites: ...


@runtime_checkable
class HasMeans(Protocol):
    """Statistics: something that knows the mean at sites."""

    def mean_of(self, site: "AnySite") -> Tensor: ...
    @property
    def sites(self) -> Sites: ...


@dataclass(frozen=True)
class Means:
    """A tensor for each of the hook's sites: `tensors[i]` for site i."""

    tensors: tuple[Constant, ...]

    def __post_init__(self) -> None:
        for tensor in _several(self.tensors, "means"):
            check_constant(tensor, "a mean")

    def __repr__(self) -> str:
        return "means"


@dataclass(frozen=True)
class FromRun:
    """The values that a run had, each site's own: `sources[i]` for the hook's site i."""

    sources: tuple[Captured, ...]

    def __post_init__(self) -> None:
        for source in _several(self.sources, "the values of a run"):
            _check_captured(source)

    def __repr__(self) -> str:
        return "run"


@dataclass(frozen=True)
class Reference:
    """Values of other prompts: captured already (`sources`), or to be computed from `prompts` before the forward."""

    how: Literal["mean", "resample"]
    per: Per
    seed: int
    sources: tuple[Captured, ...] = ()
    prompts: tuple[tuple[int, ...] | str, ...] = ()

    def __post_init__(self) -> None:
        choice(self.how, "to", ("mean", "resample"))
        choice(self.per, "per", ("position", "all"))
        put(self, "seed", seed_of(self.seed))
        if self.how == "mean" and self.seed:
            raise BadHook("seed= draws for to='resample', and to='mean' draws nothing: leave seed out")
        if bool(self.sources) == bool(self.prompts):
            raise BadHook(f"to={self.how!r} needs a reference: say over=run, or over=[prompts]")
        if self.prompts:
            put(self, "prompts", _reference_prompts(self.prompts))
            return
        for source in _several(self.sources, "a reference"):
            _check_captured(source)

    def __repr__(self) -> str:
        count = len(self.prompts) or len(self.sources[0].rows)
        draws = f", seed={self.seed}" if self.how == "resample" else ""
        return f"{self.how!r}, over={count} prompts, per={self.per!r}{draws}"


def _several(values: object, word: str) -> tuple[Any, ...]:
    if not isinstance(values, tuple) or not values:
        raise BadHook(f"{word}: {described(values)} is no tuple of at least one")
    return values


def _reference_prompts(over: Any) -> tuple[tuple[int, ...] | str, ...]:
    try:
        return tuple(prompt_rows(over))
    except BadPrompt as error:
        raise BadHook(f"over={described(over)} has no prompt to take a reference from: {error}") from error


def _check_captured(source: object) -> None:
    """Raises `BadHook` where values of a run do not have the rows and positions that they name."""
    if not isinstance(source, Captured):
        raise BadHook(f"a hook holds {described(source)} where values of a run are meant")
    if not isinstance(source.values, Tensor) or source.values.ndim < 1 or not isinstance(source.prompts, tuple):
        raise BadHook(f"the values of a run at {source.site} are {described(source.values)}, and no tensor of rows")
    if source.positions is None:
        return
    shape = source.by_place.shape[:2]  # scores and patterns have their heads before the queries
    fits = isinstance(source.positions, Tensor) and source.positions.shape == shape
    if not fits or len(source.rows) != shape[0] or len(source.prompts) < shape[0]:
        raise BadHook(
            f"the values of a run at {source.site} have shape {list(source.values.shape)}, and positions, rows or "
            "prompts of another number: capture them again"
        )


Source: TypeAlias = Literal["zero"] | Constant | Means | FromRun | Reference


@dataclass(frozen=True)
class Ablate(EditHook):
    """Put something else in the place of the values. Made by `ablate`."""

    to: Source = "zero"
    units: tuple[int, ...] | None = None

    verb: ClassVar[str] = "ablate"
    takes_step: ClassVar[bool] = True  # the step at which a run captured what is put in

    def check(self) -> None:
        if self.where.step is not None and not isinstance(self.to, FromRun):
            raise BadHook(f"{self.verb} acts at positions and takes no step={self.where.step!r}: say pos= instead")
        if isinstance(self.to, str):
            choice(self.to, "to", ("zero",))
        elif isinstance(self.to, Means | FromRun):
            count = len(self.to.tensors if isinstance(self.to, Means) else self.to.sources)
            if count != len(self.sites):
                raise BadHook(f"{self.verb} has values for {count} sites, and acts at {len(self.sites)}: give as many")
        elif not isinstance(self.to, Constant | Reference):
            raise BadHook(
                f"to={described(self.to)} is unknown: give 'zero', 'mean', 'resample', a tensor, statistics or a run"
            )
        if isinstance(self.to, Constant | Reference | Means):
            what = "to=tensor" if isinstance(self.to, Constant) else "to='mean' or 'resample'"
            not_square(self.sites, f"{what} puts in")
        if self.units is not None:
            put(self, "units", _units(self.units, self.sites))

    @property
    def puts_in(self) -> bool:
        return True

    @property
    def gives_infinity(self) -> bool:
        return self.to == "zero"

    def change(self, binding: Binding) -> Change:
        replaced = self._replaced(binding)
        units = self.units
        if units is None:
            return replaced
        _check_units(units, binding)

        def apply(values: Tensor, here: Here) -> Tensor:
            new = values.clone()
            new[..., units] = replaced(values, here)[..., units]
            return new

        return apply

    def _replaced(self, binding: Binding) -> Change:
        """What puts all of the values in."""
        if self.to == "zero":
            return lambda values, here: torch.zeros_like(values)
        if isinstance(self.to, Constant | Means):
            tensor = self.to if isinstance(self.to, Constant) else self.to.tensors[self.sites.index(binding.site)]
            check_shape(tensor, binding, "the tensor")
            put = fitting(tensor, "the tensor")
            return lambda values, here: put(values, here).expand_as(values).clone()
        if isinstance(self.to, FromRun):
            return from_run(_of_site(self.to.sources, binding.site), self.where, binding)
        assert isinstance(self.to, Reference)
        source = _of_site(self.to.sources, binding.site) if self.to.sources else binding.reference(self.to.prompts)
        check_width(source, binding)
        return mean(source, self.to.per) if self.to.how == "mean" else resample(source, self.to.per, self.to.seed)


@dataclass(frozen=True)
class Patch(Ablate):
    """Put in what another run had there. Made by `patch`."""

    verb: ClassVar[str] = "patch"
    bare: ClassVar[tuple[str, ...]] = ("to",)

    def check(self) -> None:
        if not isinstance(self.to, FromRun):
            raise BadHook(f"patch puts in the values of a run, and to={described(self.to)}: for others use ablate")
        super().check()


@checks_keywords
def ablate(
    sites: SitesLike,
    *,
    to: Any = "zero",
    over: Any = None,
    per: Per | None = None,
    seed: int | None = None,
    units: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
) -> Ablate:
    """Replace what is at these sites, so that it no longer tells anything about this prompt.

    to="zero"       zeros
    to="mean"       the mean over a reference that you name: `over` is a run with these captures, or a list of prompts
    to="resample"   the value of another prompt of the reference, drawn with `seed` (Chan et al. 2022); the same draw
                    for the same prompt, alone or in a batch
    to=tensor       these values, of the site's axes behind batch and pos, or with [pos, …] or [batch, pos, …]
    to=statistics   each site's own mean over the texts that `hk.statistics` was given
    to=run          what that run had there (as `patch`)

    For mean and resample, per="position", the default, takes the reference's values at the same position, per="all"
    those of all its positions (mind that a model's first position is often an outlier). `units` are the numbers of the
    last axis that are replaced, such as neurons of mlp_post; all of them where it is left out.

    >>> print(ablate("z.9.3"), ablate("mlp_post.12", units=[7, 1001]), sep="; ")
    ablate(z.9.3); ablate(mlp_post.12, units=(7, 1001))
    """
    made = _ablate(as_sites(sites), to, over, per, seed, inner(pos, rows, None, as_sites(sites)))
    return made if units is None else replace(made, units=_units(units, made.sites))


def _ablate(chosen: Sites, to: Any, over: Any, per: Per | None, seed: int | None, where: Where) -> Ablate:
    if seed is not None and not (isinstance(to, str) and to == "resample"):
        raise BadHook(f"seed= draws for to='resample', and to={described(to)} draws nothing: leave seed out")
    if isinstance(to, str) and to in ("mean", "resample"):
        chosen, source = _reference(not_square(chosen, f"to={to!r} puts in"), to, over, per or "position", seed or 0)
        return Ablate(chosen, where, source)
    for name, value in (("over", over), ("per", per)):
        if value is not None:
            raise BadHook(f"{name}= goes with to='mean' or to='resample', and to={described(to)} was given")
    if isinstance(to, HasCaptures):
        return _patched(Ablate, chosen, to, where)
    if isinstance(to, HasMeans):
        named = tuple(each for site in chosen for each in _spread(site, to))
        return Ablate(Sites(named), where, Means(tuple(constant(to.mean_of(site), "the mean") for site in named)))
    if isinstance(to, str):
        if to != "zero":
            raise BadHook(f"to={to!r} is unknown: give 'zero', 'mean', 'resample', a tensor, statistics or a run")
        return Ablate(chosen, where)
    return Ablate(not_square(chosen, "to=tensor puts in"), where, constant(to, "the tensor"))


def _units(units: CountLike, sites: Sites) -> tuple[int, ...]:
    not_square(sites, "units= chooses")
    return tuple(whole_numbers(units, "units", least=0, meaning="numbers of the last axis, counted from 0,"))


def _check_units(units: tuple[int, ...], binding: Binding) -> None:
    size = binding.shape[-1] if binding.shape else None
    if size is not None and max(units) >= size:
        raise OutOfRange(f"unit {max(units)} of {binding.site} was asked for, which has {size}: 0 to {size - 1}")


@checks_keywords
def patch(
    sites: SitesLike, source: HasCaptures, *, units: CountLike = None, pos: PosLike = None, rows: CountLike = None
) -> Patch:
    """Replace what is at these sites by what another run captured there (activation patching, Vig et al. 2020).

    A position means the same place in both texts: `pos=-1` takes the source's own last position. With `pos` left out,
    the source's captured positions are meant, and its prompts must be as long as these. A source of one prompt serves
    every row; else rows go by number. A bare name such as "resid_post" means each layer that the source captured.
    `units` are the numbers of the last axis that are replaced, such as neurons of mlp_post; all where it is left out.
    """
    chosen = as_sites(sites)
    if not isinstance(source, HasCaptures):
        raise BadHook(
            f"patch needs a run as its source, and was given {type(source).__name__}; for a tensor: ablate(to=)"
        )
    made = _patched(Patch, chosen, source, inner(pos, rows, None, chosen))
    return made if units is None else replace(made, units=_units(units, made.sites))


def _patched(kind: "type[Any]", sites: Sites, source: HasCaptures, where: Where) -> Any:
    found = _captures(sites, source)
    if where.pos is None:
        own = {(capture.where.pos, capture.where.step) for capture in found}
        if len(own) > 1:
            raise BadHook("the source captured these sites at different positions: say pos=, or give one hook a site")
        pos, step = own.pop()
        # a source that ends with its prompt says nothing of generated tokens
        where = Where(PROMPT if pos is None and step is None and _ends_with_prompt(found[0]) else pos, where.rows, step)
    return kind(Sites(tuple(capture.site for capture in found)), where, FromRun(found))


def _ends_with_prompt(source: Captured) -> bool:
    return source.positions is not None and int(source.positions.max()) < max(map(len, source.prompts))


def _captures(sites: Sites, source: HasCaptures) -> tuple[Captured, ...]:
    return tuple(source.captured(each) for site in sites for each in _spread(site, source))


def _spread(site: AnySite, source: HasCaptures | HasMeans) -> list[AnySite]:
    """The site, or for a layered name without a layer each of them that the source has."""
    if not site.every_layer:
        return [site]
    each: list[AnySite] = [s for s in source.sites if s.name == site.name]  # pyright: ignore
    if not each:
        raise NotCaptured(f"the source captured no {site}: it has {source.sites}")
    return each


def _reference(sites: Sites, how: Any, over: Any, per: Per, seed: int) -> tuple[Sites, Reference]:
    if over is None:
        raise BadHook(f"to={how!r} needs a reference: say over=run, or over=[prompts]")
    choice(per, "per", ("position", "all"))
    if isinstance(over, HasCaptures):
        found = _captures(sites, over)
        return Sites(tuple(capture.site for capture in found)), Reference(how, per, seed, found)
    return sites, Reference(how, per, seed, (), _reference_prompts(over))


def _of_site(sources: Sequence[Captured], site: AnySite) -> Captured:
    return next(source for source in sources if source.site == site)
