"""The base classes of all hooks.

A hook is a frozen value: it says what to do at which sites, at which positions of which rows.
`Hook` is the base of captures, `EditHook` the base of hooks that change values. `EditContext` tells
a running edit where its values are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from ..arguments import describe, leave_out_none
from ..display import describe_outcome, render_html
from ..errors import BadEdit, BadHook, Unsupported
from ..models.batch_positions import Selection, expand_mask, pad_rows
from ..models.lm import LM
from ..models.positions import IndicesLike, PosLike, Span, Where, read_indices, read_position
from ..models.sites import LOGIT_SITES, QUERY_KEY_SITES, AnySite, ModuleSite, Sites, as_sites
from . import serialization

if TYPE_CHECKING:
    from .capture import Captured


@dataclass(frozen=True, eq=False, repr=False)
class Constant:
    """A tensor inside a hook. Constants are equal if their dtypes and numbers are equal."""

    tensor: Shaped[Tensor, "..."]

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise BadHook(f"a constant holds a tensor, and was given {describe(self.tensor)}")
        _check_real_and_finite(self.tensor, "a constant")

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


def as_constant(tensor: object, name: str) -> Constant:
    """Returns a copy of a tensor of finite real numbers. Integers become floats, exactly."""
    try:
        copy = torch.as_tensor(tensor).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadHook(
            f"{name} is a {type(tensor).__name__}, and a tensor of numbers is needed"
        ) from error
    if copy.dtype == torch.bool:
        raise BadHook(
            f"{name} is a tensor of True and False, and numbers are needed: convert with .float()"
        )
    is_integer = not copy.is_floating_point() and not copy.is_complex()
    if is_integer or copy.element_size() == 1:  # float8 has no arithmetic
        single = copy.float()
        # float32 represents every integer up to 2**24 only
        is_exact = not is_integer or torch.equal(single.to(copy.dtype), copy)
        copy = single if is_exact else copy.double()
    _check_real_and_finite(copy, name)
    return Constant(copy)


def _check_real_and_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_complex():
        raise BadHook(
            f"{name} has complex numbers, and their imaginary part would be lost: give real numbers"
        )
    if count := int((~torch.isfinite(tensor)).sum()):
        raise BadHook(f"{name} has values that are not finite numbers: {count} of them")


def check_constant(value: object, name: str) -> None:
    """Raises `BadHook` if a hook's field is not a `Constant`."""
    if not isinstance(value, Constant):
        raise BadHook(f"{name} is {describe(value)}, and a tensor of numbers is needed")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns a tuple as it is, and any other value as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def set_field(value: Any, name: str, new: object) -> None:
    """Sets a field of a frozen dataclass during its construction."""
    object.__setattr__(value, name, new)


@dataclass(frozen=True, eq=False)
class EditContext:
    """Says where the values that a running edit receives are: their site, rows and positions."""

    site: AnySite
    where: Where
    selection: Selection | None  # None at a module whose tensor has no axes batch and pos
    module_input: Tensor | None = None  # the same cells of the module's input
    condition_mask: Bool[Tensor, "row pos"] | None = None  # None for an edit without a condition

    def __repr__(self) -> str:
        calls = ("context.rows", "context.positions")
        return describe_outcome(f"EditContext({self.site}, {self.where})", *calls)

    @property
    def cells(self) -> Selection:
        """The rows and positions of the values. Raises `BadEdit` if the tensor has no such axes."""
        if self.selection is None:
            raise BadEdit(
                f"the tensor at {self.site} has no axes batch and pos, which this edit needs"
            )
        return self.selection

    @property
    def rows(self) -> list[int]:
        """The index of each row's prompt in the batch."""
        return self.cells.prompts

    @property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Each position in its row's own text, on the CPU; -1 where a shorter row is padded."""
        return self.cells.positions

    @property
    def steps(self) -> Int[Tensor, "row pos"]:
        """The generated token that each position's logits choose: 0 at the prompt's last token."""
        return self.cells.steps

    @property
    def valid(self) -> Bool[Tensor, "row pos"] | None:
        """False where a shorter row is padded with zeros; None if no row is padded."""
        return self.cells.valid

    def read(self, row: int, position: int, count: int) -> list[int]:
        """Returns the last `count` tokens up to a position; fewer at the row's start."""
        sequences = self.cells.text
        model_row = self.cells.rows[row]
        prompt = sequences.of(model_row)
        start = max(0, position - count + 1)
        prompt_ids = sequences.prompt(prompt)
        if position < len(prompt_ids):
            tokens = list(prompt_ids[start : position + 1])
        elif sequences.history is not None:
            first = sequences.columns[prompt][0]
            tokens = sequences.history[model_row, first + start : first + position + 1].tolist()
        else:
            tokens = [-1]
        if -1 in tokens or len(tokens) <= position - start:
            raise Unsupported(
                f"the tokens before position {position} of row {prompt} are not known: hookkit did "
                "not see them generated (a decoding loop of one's own), or the prompt was given as "
                "embeddings"
            )
        return tokens

    def real_cells(self, mask: Bool[Tensor, "row pos ..."]) -> Bool[Tensor, "row pos ..."]:
        """Returns the mask, False in padding and where the edit's condition does not hold."""
        if self.condition_mask is not None:
            mask = mask & expand_mask(self.condition_mask, mask)
        if self.selection is None or self.valid is None:
            return mask
        return mask & expand_mask(self.valid, mask)

    def order(self) -> Int[Tensor, "row pos"]:
        """Returns each position's index among the positions of the hook in its row."""
        positions_of_prompt = self.cells.text.selected_positions(self.where)
        indices: list[list[int]] = []
        for prompt, positions in zip(self.rows, self.cells.row_positions, strict=True):
            hook_positions = positions_of_prompt[prompt] or ()
            indices.append(list(map(hook_positions.index, positions)))
        return pad_rows(indices, 0)


# The prompt's last position and every generated token: where logit edits act by default.
EVERY_STEP = Span(0, None)


class Condition:
    """Says when an edit acts, for each row and position. Functions of `hk.when` return conditions.

    `a & b`, `a | b` and `~a` are conditions too.
    """

    def __and__(self, other: "When") -> "Condition":
        return _combine("AllOf", self, other)

    def __rand__(self, other: "When") -> "Condition":
        return _combine("AllOf", other, self)

    def __or__(self, other: "When") -> "Condition":
        return _combine("AnyOf", self, other)

    def __ror__(self, other: "When") -> "Condition":
        return _combine("AnyOf", other, self)

    def __invert__(self) -> "Condition":
        from . import when

        return when.Not(self)


When: TypeAlias = Condition | Callable[[Any, Any], Any]


def _combine(name: str, *conditions: When) -> Condition:
    from . import when  # which imports this module

    return getattr(when, name)(conditions)


def check_when(when: object) -> None:
    """Raises `BadHook` for a value that is no condition."""
    if not isinstance(when, Condition | Callable):
        raise BadHook(
            f"when={describe(when)} is no condition: give hk.when.entropy_above(2.0), "
            "hk.when.reads(probe, above=0.5) … or a function"
        )


Change: TypeAlias = Callable[[Tensor, EditContext], Tensor]
"""Maps the values [row, pos, ...] of selected cells to values of the same shape and dtype."""


@dataclass(frozen=True)
class Binding:
    """The model and the site for which an edit is prepared.

    `reference` runs prompts and returns the values that they have at the site. `read_source`
    returns the logits [row, pos, vocab] that the source of an edit has at the cells of the edit;
    None where no source can be read.
    """

    lm: LM
    site: AnySite
    reference: Callable[[tuple[Any, ...]], "Captured"]
    read_source: Callable[[EditContext], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The sizes of the site's axes after batch and pos; None if only a forward can tell."""
        if isinstance(self.site, ModuleSite) or self.site.name in QUERY_KEY_SITES:
            return None
        return self.lm.shape(self.site)


@dataclass(frozen=True)
class Hook:
    """What to do at which sites. Functions such as `capture`, `steer` and `force` return hooks.

    Two hooks are equal if all of their fields are equal.
    """

    sites: Sites
    where: Where

    verb: ClassVar[str]
    bare: ClassVar[tuple[str, ...]] = ()  # the positional arguments of its function
    takes_step: ClassVar[bool] = False  # whether its function has the argument step=

    def __init_subclass__(cls, **constants: Any) -> None:
        """Sets what the hooks of a class have in common: class Force(LogitEdit, verb="force")."""
        super().__init_subclass__()
        for name, value in constants.items():
            setattr(cls, name, value)

    def __post_init__(self) -> None:
        """Normalizes and checks every field, after JSON and `dataclasses.replace` too."""
        set_field(self, "sites", as_sites(self.sites))
        self.check_sites()
        _check_where(self.where, self.sites)
        set_field(self, "where", as_where(self.where.pos, self.where.rows, self.where.step))
        if self.where.step is not None and not self.takes_step:
            raise BadHook(
                f"{self.verb} acts at positions and takes no step={self.where.step!r}: "
                "say pos= instead"
            )
        self.check()

    def check_sites(self) -> None:
        """Raises `BadHook` if the hook cannot act at one of its sites."""

    def check(self) -> None:
        """Normalizes the hook's own fields. Raises `BadHook` for values that cannot work."""

    def placed(self, lm: LM) -> Where:
        """Returns the positions or steps at which the hook acts, for this model's tokens."""
        return self.where

    def settings(self) -> dict[str, Any]:
        """Returns the keywords of the hook's function that differ from their defaults."""
        settings: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("sites", "where", *self.bare) and value != setting.default:
                settings[setting.name] = value
        settings |= self.where_settings()
        if self.bare and self.where.step == EVERY_STEP:
            del settings["step"]
        return settings

    def where_settings(self) -> dict[str, Any]:
        """Returns the keywords that say where the hook acts."""
        values = {"pos": self.where.pos, "rows": self.where.rows, "step": self.where.step}
        return leave_out_none(values)

    def __str__(self) -> str:
        """Returns the call that makes this hook, on one line."""
        arguments = []
        if not self.bare or str(self.sites[0]) != "logits":
            arguments.append(self._sites())
        for name in self.bare:
            arguments += map(argument_text, as_tuple(getattr(self, name)))
        for name, value in self.settings().items():
            arguments.append(f"{name}={argument_text(value)}")
        return f"{self.verb}({', '.join(arguments)})"

    def _repr_html_(self) -> str:
        where = {name: repr(value) for name, value in self.where_settings().items()}
        return render_html(str(self), {"sites": self._sites(), **where})

    def _sites(self) -> str:
        return ", ".join(map(str, self.sites)) if len(self.sites) <= 3 else repr(self.sites)

    def to_json(self, *, tensors: str = "inline") -> str:
        """Returns the hook as JSON, with tensors in full ("inline") or as hashes ("digest")."""
        return serialization.to_json(self, tensors=tensors)

    @staticmethod
    def from_json(text: str) -> "Hook":
        """Returns the hook that `to_json` wrote. `BadHook` for a user's function or a digest."""
        return serialization.from_json(text)


def argument_text(value: object) -> str:
    """Returns a value as it stands in the text of a hook."""
    if isinstance(value, Hook):
        return str(value)
    if callable(value):
        return getattr(value, "__name__", "function")
    return repr(value)


@dataclass(frozen=True)
class EditHook(Hook):
    """A hook that changes the values at its sites, everywhere or where a condition holds."""

    when: When | None = field(default=None, kw_only=True)

    edits_logits: ClassVar[bool] = False  # whether its values are logits, at whatever site
    # whether it inserts values from elsewhere, in which -inf is a mask and not overflow
    puts_in: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.when is not None:
            check_when(self.when)

    @property
    def applies_condition(self) -> bool:
        """True if the edit itself acts where its condition holds: `context.condition_mask`."""
        return False

    @property
    def mixes_positions(self) -> bool:
        """True if the change at one position may depend on values at others (a user's function)."""
        return False

    @property
    def reads_input(self) -> bool:
        """True if the edit needs the module's input besides its output."""
        return False

    @property
    def gives_infinity(self) -> bool:
        """True if the edit writes -inf on purpose, or only moves numbers that exist already."""
        return False

    def change(self, binding: Binding) -> Change:
        """Returns the function that changes the values at one site. Checks the model first.

        It changes all cells. What binds the hook (`runs.hook_points`) applies the condition.
        """
        raise AssertionError(f"{type(self).__name__} does not define change()")


def as_where(pos: PosLike, rows: IndicesLike = None, step: IndicesLike = None) -> Where:
    """Returns positions, rows and steps in their normalized form."""
    return Where(
        read_position(pos),
        read_indices(rows, "row", negative=False),
        read_indices(step, "step", negative=False),
    )


def _check_where(where: object, sites: Sites) -> None:
    """Raises `BadHook` for a step with a position, or away from the logits."""
    if not isinstance(where, Where):
        raise BadHook(f"a hook's `where` is {describe(where)}: it must be a Where(pos, rows, step)")
    if where.step is None:
        return
    if where.pos is not None:
        raise BadHook(f"pos={where.pos!r} and step={where.step!r} were both given: say one of them")
    for site in sites:
        if not isinstance(site, ModuleSite) and site.name not in LOGIT_SITES:
            raise BadHook(
                f"step={where.step!r} at {site}: a step counts generated tokens and exists at "
                "lm_head and logits only; say pos= instead (hk.GENERATED for every generated token)"
            )


def require_vectors(sites: Sites, action: str) -> Sites:
    """Returns the sites. Raises `BadHook` for attention's scores or pattern."""
    for site in sites:
        if not isinstance(site, ModuleSite) and site.name in QUERY_KEY_SITES:
            raise BadHook(
                f"{action} values at each position, and {site} has a number for each query and "
                "key, more with every token: use hk.edit, hk.scale, hk.ablate(to='zero'), hk.patch "
                "or hk.knockout"
            )
    return sites
