"""What every hook is: a frozen value that says what to do at which sites, at which positions of which rows."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from ..arguments import described, finite_number
from ..display import shown
from ..errors import BadEdit, BadHook, Unsupported
from ..models.batch_positions import Selection
from ..models.lm import LM
from ..models.positions import CountLike, PosLike, Span, Where, as_count, as_pos
from ..models.sites import LOGITS, SQUARE, AnySite, ModuleSite, Sites, as_sites
from . import serialization as codec
from .captured_values import Captured


@dataclass(frozen=True, eq=False, repr=False)
class Constant:
    """A tensor inside a hook: a copy of its own, equal where its numbers are equal."""

    tensor: Shaped[Tensor, "..."]

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise BadHook(f"a constant holds a tensor, and was given {described(self.tensor)}")
        if self.tensor.is_complex():
            raise BadHook(
                "a constant has complex numbers, of which the imaginary part would be lost: give real ones"
            )
        finite = torch.isfinite(self.tensor)
        if not finite.all():
            raise BadHook(
                f"a tensor has values that are not finite numbers: {int((~finite).sum())} of them"
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Constant)
            and self.tensor.dtype == other.tensor.dtype
            and torch.equal(self.tensor, other.tensor)
        )

    def __hash__(self) -> int:
        return hash((tuple(self.tensor.shape), self.tensor.double().sum().item()))

    def __repr__(self) -> str:
        return f"tensor{list(self.tensor.shape)}"


def constant(tensor: object, word: str) -> Constant:
    """A copy of a tensor of finite numbers, or `BadHook`. Whole numbers become floating-point ones, exactly."""
    try:
        copy = torch.as_tensor(tensor).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadHook(
            f"{word} is a {type(tensor).__name__}, and a tensor of numbers is needed"
        ) from error
    if copy.is_complex():
        raise BadHook(
            f"{word} has complex numbers, of which the imaginary part would be lost: give real ones"
        )
    if copy.dtype == torch.bool:
        raise BadHook(
            f"{word} is a tensor of True and False, and numbers are needed: say what is meant, with .float()"
        )
    if not copy.is_floating_point():
        whole, copy = copy, copy.float()
        if not torch.equal(copy.to(whole.dtype), whole):
            copy = whole.double()  # float32 has whole numbers up to 2**24 only
    elif copy.element_size() == 1:
        copy = copy.float()  # float8 has no arithmetic
    if not torch.isfinite(copy).all():
        raise BadHook(
            f"{word} has values that are not finite numbers: {int((~torch.isfinite(copy)).sum())} of them"
        )
    return Constant(copy)


def check_constant(value: object, word: str) -> None:
    """Raises `BadHook` where a hook's field is no tensor of its own."""
    if not isinstance(value, Constant):
        raise BadHook(f"{word} is {described(value)}, and a tensor of numbers is needed")


def number(value: object, word: str) -> float:
    """A finite number, or `BadHook`."""
    return finite_number(value, word)


def put(value: Any, name: str, new: object) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(value, name, new)


@dataclass(frozen=True, eq=False)
class Here:
    """Where an edit stands while it runs: the rows and positions of the values that it was given."""

    site: AnySite
    where: Where
    found: Selection | None  # None at a module whose tensor has no axes batch and pos
    before: Tensor | None = None  # the same cells of what the block was given, at a block's output
    asked: Bool[Tensor, "row pos"] | None = (
        None  # where the edit's condition holds; None where it has none
    )

    @property
    def cells(self) -> Selection:
        if self.found is None:
            raise BadEdit(
                f"the tensor at {self.site} has no axes batch and pos, which this edit needs"
            )
        return self.found

    @property
    def rows(self) -> list[int]:
        """The prompt that each row is of."""
        return self.cells.prompts

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Each position in its row's own text, on the CPU; -1 where a shorter row was filled up."""
        return self.cells.positions

    @property
    def steps(self) -> Int[Tensor, "row pos"]:
        """The generated token that each position's logits choose: 0 at the prompt's last token."""
        return self.cells.steps

    @property
    def valid(self) -> Bool[Tensor, "row pos"] | None:
        """False where a shorter row was filled up with zeros; None where no row was."""
        return self.cells.valid

    def read(self, row: int, position: int, count: int) -> list[int]:
        """The last `count` tokens up to a position in a row of the values; fewer at the row's start."""
        text, model_row = self.cells.text, self.cells.rows[row]
        prompt, start = text.of(model_row), max(0, position - count + 1)
        ids = text.prompt(prompt)
        if position < len(ids):
            found = list(ids[start : position + 1])
        elif text.history is not None:
            first = text.columns[prompt][0]
            found = text.history[model_row, first + start : first + position + 1].tolist()
        else:
            found = [-1]
        if -1 in found or len(found) <= position - start:
            raise Unsupported(
                f"the tokens before position {position} of row {prompt} are not known: hookkit did not see them "
                "generated (a decoding loop of one's own), or the prompt was given as embeddings"
            )
        return found

    def real_cells(self, mask: Bool[Tensor, "row pos ..."]) -> Bool[Tensor, "row pos ..."]:
        """The same mask, false where a shorter row was filled up, or where the edit's condition does not hold."""
        if self.asked is not None:
            mask = mask & self.asked.reshape(
                *self.asked.shape, *[1] * (mask.ndim - self.asked.ndim)
            )
        if self.found is None or self.valid is None:
            return mask
        return mask & self.valid.to(mask.device).reshape(*self.valid.shape, *[1] * (mask.ndim - 2))

    def order(self) -> Int[Tensor, "row pos"]:
        """Which of the positions wanted each one is: 0 for the first that the hook wants in its row."""
        wishes = self.cells.text.wishes(self.where)
        counted = torch.zeros_like(self.positions)
        for row, (prompt, places) in enumerate(zip(self.rows, self.cells.places, strict=True)):
            wanted = wishes[prompt]
            assert wanted is not None
            counted[row, : len(places)] = torch.tensor([wanted.index(place) for place in places])
        return counted


EVERY_STEP = Span(
    0, None
)  # the prompt's last position and every generated token: where logit edits act by default

Change: TypeAlias = Callable[[Tensor, Here], Tensor]
"""What an edit does to the chosen cells: values [row, pos, ...] to values of the same shape and dtype."""


@dataclass(frozen=True)
class Binding:
    """What an edit may ask when it is checked against a model. `reference` runs prompts and captures the site."""

    lm: LM
    site: AnySite
    reference: Callable[[tuple[tuple[int, ...] | str, ...]], Captured]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The sizes of the site's axes behind batch and pos; None where only a forward can tell."""
        if isinstance(self.site, ModuleSite) or self.site.name in SQUARE:
            return None
        return self.lm.shape(self.site)


@dataclass(frozen=True)
class Hook:
    """What to do at which sites. Made by `capture`, `steer`, `force` …; equal where everything in it is equal."""

    sites: Sites
    where: Where

    verb: ClassVar[str]
    bare: ClassVar[tuple[str, ...]] = ()  # the fields that the call takes by place
    takes_step: ClassVar[bool] = False  # whether its function has step=

    def __post_init__(self) -> None:
        """Reads every field, however the hook is made: by its function, from JSON, or with `dataclasses.replace`."""
        put(self, "sites", as_sites(self.sites))
        self.check_sites()
        put(self, "where", checked_where(self.where, self.sites))
        if self.where.step is not None and not self.takes_step:
            raise BadHook(
                f"{self.verb} acts at positions and takes no step={self.where.step!r}: say pos= instead"
            )
        self.check()

    def check_sites(self) -> None:
        """Raises `BadHook` where the hook cannot act at one of its sites."""

    def check(self) -> None:
        """Raises `BadHook` where the hook's own fields cannot work, and puts each into the form that it is kept in."""

    def placed(self, lm: LM) -> Where:
        """The positions or steps at which it acts, for this model's tokens."""
        return self.where

    def __str__(self) -> str:
        """The call that would make it, on one line."""
        at_logits = self.bare and self.where.step == EVERY_STEP
        shown = [] if str(self.sites[0]) == "logits" and self.bare else [self._sites()]
        for name in self.bare:
            value = getattr(self, name)
            shown += map(_word, value) if isinstance(value, tuple) else [_word(value)]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("sites", "where", *self.bare) and value != each.default:
                shown.append(f"{each.name}={_word(value)}")
        for name in ("pos", "rows", "step"):
            value = getattr(self.where, name)
            if value is not None and not (name == "step" and at_logits):
                shown.append(f"{name}={value!r}")
        return f"{self.verb}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        place = {"pos": self.where.pos, "rows": self.where.rows, "step": self.where.step}
        facts = {"sites": self._sites()} | {
            name: repr(value) for name, value in place.items() if value is not None
        }
        return shown(str(self), facts)

    def _sites(self) -> str:
        return ", ".join(map(str, self.sites)) if len(self.sites) <= 3 else repr(self.sites)

    def to_json(self, *, tensors: str = "inline") -> str:
        """The hook as JSON. `tensors` is "inline", or "digest" for their shapes and hashes alone."""
        return codec.to_json(self, tensors=tensors)

    @staticmethod
    def from_json(text: str) -> "Hook":
        """The hook that `to_json` wrote. One with a user's function, or with digests only, raises `BadHook`."""
        return codec.from_json(text)


@dataclass(frozen=True)
class EditHook(Hook):
    """A hook that changes what it finds."""

    @property
    def together(self) -> bool:
        """True where what it does at a position may depend on the others that it is given: a user's function."""
        return False

    @property
    def reads_input(self) -> bool:
        """True where it needs what the module was given, beside what it gives."""
        return False

    @property
    def puts_in(self) -> bool:
        """True where it gives values of another origin, among which -inf is a mask; arithmetic gives -inf by overflow
        only."""
        return False

    @property
    def gives_infinity(self) -> bool:
        """True where -inf is what it is to write, or where it can give no number that was not there before."""
        return False

    def change(self, binding: Binding) -> Change:
        """The function that makes the change at one site, after everything was checked against the model."""
        raise AssertionError(f"{type(self).__name__} says no change")


def _word(value: object) -> str:
    if isinstance(value, Hook):
        return str(value)
    return getattr(value, "__name__", "function") if callable(value) else repr(value)


def inner(pos: PosLike, rows: CountLike, step: CountLike, sites: Sites) -> Where:
    """Where a hook acts that means all positions unless told otherwise. A step is refused away from the logits."""
    where = Where(
        as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False)
    )
    return checked_where(where, sites)


def checked_where(where: Where, sites: Sites) -> Where:
    """The same positions, rows and steps, each read anew; `BadHook` for a step away from the logits."""
    if not isinstance(where, Where):
        raise BadHook(f"a hook's `where` is {described(where)}: it says pos, rows and step")
    pos, rows, step = where.pos, where.rows, where.step
    if step is not None:
        if pos is not None:
            raise BadHook(f"pos={pos!r} and step={step!r} were both given: say one of them")
        for site in sites:
            is_module = isinstance(site, ModuleSite)
            if not is_module and site.name not in LOGITS:
                raise BadHook(
                    f"step={step!r} at {site}: a step counts generated tokens and is there at lm_head and logits only; "
                    "say pos= instead (hk.GENERATED for every generated token)"
                )
    return Where(
        as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False)
    )


def not_square(sites: Sites, does: str) -> Sites:
    """The same sites, or `BadHook` where one is attention's scores or pattern, which are no vectors."""
    for site in sites:
        if not isinstance(site, ModuleSite) and site.name in SQUARE:
            raise BadHook(
                f"{does} values at each position, and {site} has a number for each query and key, more with every "
                "token: use hk.edit, hk.scale, hk.ablate(to='zero'), hk.patch or hk.knockout"
            )
    return sites
