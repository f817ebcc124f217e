"""Hooks that put other values in the place of what they find: ablate and patch.

Values of other texts, put in the place of what a site has: another run's, a mean of them, one that is drawn.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import checks_keywords, choice, described, prompt_rows, seed_of, whole_numbers
from ..errors import BadHook, BadPrompt, NotCaptured, OutOfRange
from ..models.positions import PROMPT, CountLike, PosLike, Where, wish
from ..models.prompts import cover
from ..models.sites import SQUARE, AnySite, ModuleSite, Sites, SitesLike, as_sites
from ..models.views import unseen_value
from .base import (
    Binding,
    Change,
    Constant,
    EditHook,
    Here,
    check_constant,
    constant,
    inner,
    not_square,
    put,
)
from .captured_values import Captured
from .rounding import converted
from .values import check_shape, fitting, moved

Per: TypeAlias = Literal["position", "all"]


def from_run(source: Captured, where: Where, binding: Binding) -> Change:
    """Put in what another run had at the positions that the same words mean in its text."""
    if source.positions is None:
        raise BadHook(
            f"the tensor at {source.site} has no rows and positions of its own: it cannot be patched by place"
        )

    check_width(source, binding)

    def apply(values: Tensor, here: Here) -> Tensor:
        rows = [source.row(prompt) for prompt in here.rows]
        columns = _columns(source, where, rows, here, binding)
        found = source.by_place[torch.tensor(rows)[:, None], columns]
        found = converted(found, values, f"what the source has at {source.site}")
        if isinstance(source.site, ModuleSite) or source.site.name not in SQUARE:
            _check_sizes(source, found.shape[2:], values.shape[2:])
            return found
        _check_sizes(source, found.shape[2:-1], values.shape[2:-1])
        missing = (
            values.shape[-1] - found.shape[-1]
        )  # keys that come behind the source's last are not looked at
        closed = unseen_value(found.dtype, source.site.name == "scores")
        return (
            nn.functional.pad(found, (0, missing), value=closed)
            if missing > 0
            else found[..., : values.shape[-1]]
        )

    return apply


def check_width(source: Captured, binding: Binding) -> None:
    """Raises `BadHook` where another model's values can never stand at a site of this one."""
    if binding.shape is not None:
        _check_sizes(source, source.values.shape[2:], binding.shape)


def _check_sizes(source: Captured, sizes: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(sizes) != tuple(wanted):
        raise BadHook(
            f"the source of {source.site} has values of shape {list(sizes)} behind row and pos, and this model has "
            f"{list(wanted)} there: give a run of a model of the same size"
        )


def _columns(
    source: Captured, where: Where, rows: list[int], here: Here, binding: Binding
) -> Tensor:
    """The column of the source's values for each cell: the place in the source's text that the same words mean."""
    wishes = here.cells.text.wishes(where)
    columns = torch.zeros_like(here.positions)
    for number, (row, prompt) in enumerate(zip(rows, here.rows, strict=True)):
        ids = source.prompts[row]
        mine, theirs = (
            wishes[prompt],
            wish(where, len(ids), lambda at, ids=ids: cover(binding.lm, ids, at)),
        )
        assert mine is not None
        length = here.cells.text.lengths[prompt]
        if len(mine) != len(theirs) or (where.pos is None and length != len(ids)):
            raise BadHook(
                f"row {prompt} has {length} tokens and the source of {source.site} has {len(ids)}, "
                f"so pos={where.pos!r} does not pair their positions: say which are meant, with pos="
            )
        places = [theirs[mine.index(place)] for place in here.cells.places[number]]
        columns[number, : len(places)] = torch.tensor(
            [source.column(row, place) for place in places]
        )
    return columns


def mean(source: Captured, per: Per) -> Change:
    """Put in the mean of other prompts, at the same position or over all of theirs."""
    assert source.positions is not None
    there = source.positions >= 0
    if per == "all":
        overall = moved(
            source.values[there].double().mean(0), f"the reference's mean at {source.site}"
        )
        return lambda values, here: overall(values).expand_as(values).clone()
    means = _by_position(source, lambda cells: cells.double().mean(0))

    def apply(values: Tensor, here: Here) -> Tensor:
        found = torch.stack([means(here, row) for row in range(len(here.rows))])
        return converted(found, values, f"the reference's mean at {source.site}")

    return apply


def _by_position(
    source: Captured, reduce: Callable[[Tensor], Tensor]
) -> Callable[[Here, int], Tensor]:
    """For each position of a row of cells, the reference's values there, reduced over its rows."""
    assert source.positions is not None
    places = sorted({place for place in source.positions.flatten().tolist() if place >= 0})
    table = {place: reduce(source.values[source.positions == place]) for place in places}
    nothing = torch.zeros_like(table[places[0]])

    def look_up(here: Here, row: int) -> Tensor:
        width = here.positions.shape[1]
        wanted = list(here.cells.places[row])
        _need(table, wanted, source)
        return torch.stack([table[place] for place in wanted] + [nothing] * (width - len(wanted)))

    return look_up


def _need(table: Any, wanted: list[int], source: Captured) -> None:
    missing = [place for place in wanted if place not in table]
    if missing:
        raise BadHook(
            f"position {missing[0]} of {source.site} is to be replaced, and no prompt of the reference is that long "
            f"(its positions: {min(table)} to {max(table)}): give longer ones, fewer positions, or per='all'"
        )


def resample(source: Captured, per: Per, seed: int) -> Change:
    """Put in what one of other prompts has, drawn by the seed, the prompt's own tokens and the position.

    The draws are the same alone and in a batch.
    """
    assert source.positions is not None
    cells = [(row, column) for row, column in (source.positions >= 0).nonzero().tolist()]
    columns: dict[int, list[tuple[int, int]]] = {}
    for row, column in cells:
        columns.setdefault(int(source.positions[row, column]), []).append((row, column))

    def draw(prompt: tuple[int, ...], place: int) -> tuple[int, int]:
        digest = hashlib.sha256(repr((seed, prompt)).encode()).hexdigest()
        if per == "all":
            return random.Random(f"{digest}{place}").choice(cells)
        donors = random.Random(digest).sample(range(len(source.rows)), len(source.rows))
        return min(
            columns[place], key=lambda cell: donors.index(cell[0])
        )  # one donor for a row, where it is long enough

    def apply(values: Tensor, here: Here) -> Tensor:
        new = torch.zeros_like(values)
        for row, (prompt, places) in enumerate(zip(here.rows, here.cells.places, strict=True)):
            if per == "position":
                _need(columns, list(places), source)
            drawn = [draw(here.cells.text.prompt(prompt), place) for place in places]
            picked = torch.tensor([d[0] for d in drawn]), torch.tensor([d[1] for d in drawn])
            drawn_values = source.values[picked]
            new[row, : len(places)] = converted(
                drawn_values, values, f"what the reference has at {source.site}"
            )
        return new

    return apply


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
class FromPrompt:
    """The values that the model has on a prompt, which is run before the forward: a text, or its tokens."""

    prompt: str | tuple[int, ...]

    def __post_init__(self) -> None:
        prompts = _reference_prompts(
            [self.prompt if isinstance(self.prompt, str) else list(self.prompt)]
        )
        put(self, "prompt", prompts[0])

    def __repr__(self) -> str:
        return repr(self.prompt)


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
            raise BadHook(
                "seed= draws for to='resample', and to='mean' draws nothing: leave seed out"
            )
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
        raise BadHook(
            f"over={described(over)} has no prompt to take a reference from: {error}"
        ) from error


def _check_captured(source: object) -> None:
    """Raises `BadHook` where values of a run do not have the rows and positions that they name."""
    if not isinstance(source, Captured):
        raise BadHook(f"a hook holds {described(source)} where values of a run are meant")
    if (
        not isinstance(source.values, Tensor)
        or source.values.ndim < 1
        or not isinstance(source.prompts, tuple)
    ):
        raise BadHook(
            f"the values of a run at {source.site} are {described(source.values)}, and no tensor of rows"
        )
    if source.positions is None:
        return
    shape = source.by_place.shape[:2]  # scores and patterns have their heads before the queries
    fits = isinstance(source.positions, Tensor) and source.positions.shape == shape
    if not fits or len(source.rows) != shape[0] or len(source.prompts) < shape[0]:
        raise BadHook(
            f"the values of a run at {source.site} have shape {list(source.values.shape)}, and positions, rows or "
            "prompts of another number: capture them again"
        )


Source: TypeAlias = Literal["zero"] | Constant | Means | FromRun | FromPrompt | Reference


@dataclass(frozen=True)
class Ablate(EditHook):
    """Put something else in the place of the values. Made by `ablate`."""

    to: Source = "zero"
    units: tuple[int, ...] | None = None

    verb: ClassVar[str] = "ablate"
    takes_step: ClassVar[bool] = True  # the step at which a run captured what is put in

    def check(self) -> None:
        if self.where.step is not None and not isinstance(self.to, FromRun):
            raise BadHook(
                f"{self.verb} acts at positions and takes no step={self.where.step!r}: say pos= instead"
            )
        if isinstance(self.to, str):
            choice(self.to, "to", ("zero",))
        elif isinstance(self.to, Means | FromRun):
            count = len(self.to.tensors if isinstance(self.to, Means) else self.to.sources)
            if count != len(self.sites):
                raise BadHook(
                    f"{self.verb} has values for {count} sites, and acts at {len(self.sites)}: give as many"
                )
        elif not isinstance(self.to, Constant | FromPrompt | Reference):
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
            tensor = (
                self.to
                if isinstance(self.to, Constant)
                else self.to.tensors[self.sites.index(binding.site)]
            )
            check_shape(tensor, binding, "the tensor")
            put = fitting(tensor, "the tensor")
            return lambda values, here: put(values, here).expand_as(values).clone()
        if isinstance(self.to, FromRun):
            return from_run(_of_site(self.to.sources, binding.site), self.where, binding)
        if isinstance(self.to, FromPrompt):
            return from_run(binding.reference((self.to.prompt,)), self.where, binding)
        assert isinstance(self.to, Reference)
        source = (
            _of_site(self.to.sources, binding.site)
            if self.to.sources
            else binding.reference(self.to.prompts)
        )
        check_width(source, binding)
        return (
            mean(source, self.to.per)
            if self.to.how == "mean"
            else resample(source, self.to.per, self.to.seed)
        )


@dataclass(frozen=True)
class Patch(Ablate):
    """Put in what another run had there. Made by `patch`."""

    verb: ClassVar[str] = "patch"
    bare: ClassVar[tuple[str, ...]] = ("to",)

    def check(self) -> None:
        if not isinstance(self.to, FromRun | FromPrompt):
            raise BadHook(
                f"patch puts in the values of a run, and to={described(self.to)}: for others use ablate"
            )
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


def _ablate(
    chosen: Sites, to: Any, over: Any, per: Per | None, seed: int | None, where: Where
) -> Ablate:
    if seed is not None and not (isinstance(to, str) and to == "resample"):
        raise BadHook(
            f"seed= draws for to='resample', and to={described(to)} draws nothing: leave seed out"
        )
    if isinstance(to, str) and to in ("mean", "resample"):
        chosen, source = _reference(
            not_square(chosen, f"to={to!r} puts in"), to, over, per or "position", seed or 0
        )
        return Ablate(chosen, where, source)
    for name, value in (("over", over), ("per", per)):
        if value is not None:
            raise BadHook(
                f"{name}= goes with to='mean' or to='resample', and to={described(to)} was given"
            )
    if isinstance(to, HasCaptures):
        return _patched(Ablate, chosen, to, where)
    if isinstance(to, HasMeans):
        named = tuple(each for site in chosen for each in _spread(site, to))
        return Ablate(
            Sites(named),
            where,
            Means(tuple(constant(to.mean_of(site), "the mean") for site in named)),
        )
    if isinstance(to, str):
        if to != "zero":
            raise BadHook(
                f"to={to!r} is unknown: give 'zero', 'mean', 'resample', a tensor, statistics or a run"
            )
        return Ablate(chosen, where)
    return Ablate(not_square(chosen, "to=tensor puts in"), where, constant(to, "the tensor"))


def _units(units: CountLike, sites: Sites) -> tuple[int, ...]:
    not_square(sites, "units= chooses")
    return tuple(
        whole_numbers(units, "units", least=0, meaning="numbers of the last axis, counted from 0,")
    )


def _check_units(units: tuple[int, ...], binding: Binding) -> None:
    size = binding.shape[-1] if binding.shape else None
    if size is not None and max(units) >= size:
        raise OutOfRange(
            f"unit {max(units)} of {binding.site} was asked for, which has {size}: 0 to {size - 1}"
        )


@checks_keywords
def patch(
    sites: SitesLike,
    source: HasCaptures | str,
    *,
    units: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
) -> Patch:
    """Replaces the values at these sites by those that another run captured (activation patching, Vig et al. 2020).

    `source` is a run with captures at these sites, or the text of one prompt, which is run first, without hooks.

    A position means the same place in both texts: `pos=-1` takes the source's own last position. With `pos` left out,
    the source's captured positions are meant, and its prompts must be as long as these. A source of one prompt serves
    every row; else rows go by number. A bare name such as "resid_post" means each layer that the source captured.
    `units` are the numbers of the last axis that are replaced, such as neurons of mlp_post; all where it is left out.
    """
    chosen = as_sites(sites)
    if isinstance(source, str):
        where = inner(pos, rows, None, chosen)
        where = replace(where, pos=PROMPT) if where.pos is None else where
        made = Patch(chosen, where, FromPrompt(source))
        return made if units is None else replace(made, units=_units(units, made.sites))
    if not isinstance(source, HasCaptures):
        raise BadHook(
            f"patch needs a run or a prompt's text as its source, and was given {type(source).__name__}; "
            "for a tensor: ablate(to=)"
        )
    made = _patched(Patch, chosen, source, inner(pos, rows, None, chosen))
    return made if units is None else replace(made, units=_units(units, made.sites))


def _patched(kind: "type[Any]", sites: Sites, source: HasCaptures, where: Where) -> Any:
    found = _captures(sites, source)
    if where.pos is None:
        own = {(capture.where.pos, capture.where.step) for capture in found}
        if len(own) > 1:
            raise BadHook(
                "the source captured these sites at different positions: say pos=, or give one hook a site"
            )
        pos, step = own.pop()
        # a source that ends with its prompt says nothing of generated tokens
        where = Where(
            PROMPT if pos is None and step is None and _ends_with_prompt(found[0]) else pos,
            where.rows,
            step,
        )
    return kind(Sites(tuple(capture.site for capture in found)), where, FromRun(found))


def _ends_with_prompt(source: Captured) -> bool:
    return source.positions is not None and int(source.positions.max()) < max(
        map(len, source.prompts)
    )


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
