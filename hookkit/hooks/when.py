"""Conditions, which say when an edit acts, for each row and position.

    hk.force(" coffee", when=hk.when.entropy_above(2.0))          the logits of this step
    hk.steer(site, v, when=hk.when.reads(probe, above=0.5))       the model's state
    hk.steer(site, v, when=hk.when.reads(probe, above=0.5, pos=hk.PROMPT))    decided once
    hk.ban(" tea", when=hk.when.contains("coffee") & ~hk.when.text_ends("\\n"))  the text so far

A user's function is a condition too: it receives the values at the edit's own site [row, pos, ...]
and their `hk.types.EditContext`, and returns True or False, for all or for each row and position.

A state is read at one site, as a capture just before the edit's hook would read it. It switches the
edit in the same forward if the model computes it before the values that are edited. If the model
computes it later, what was read at a position switches the edit at the next one, and so only at
tokens that were generated; the logits are such a state for every edit inside the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import (
    check_bool,
    check_choice,
    check_integer,
    check_keywords,
    check_number,
    describe,
)
from ..errors import BadHook
from ..models.positions import GENERATED, PosLike, read_position
from ..models.sites import AnySite, ModuleSite, Site, SitesLike, as_sites
from ..models.tokens import Token, check_token
from .base import (
    Condition,
    Constant,
    When,
    argument_text,
    as_constant,
    check_when,
    require_vectors,
    set_field,
)
from .probe import Probe
from .vector import Vector

__all__ = [
    "Condition",
    "contains",
    "cosine",
    "entropy_above",
    "entropy_below",
    "margin_above",
    "margin_below",
    "norm_above",
    "prob_of",
    "rank_of",
    "reads",
    "text_ends",
]

COMPARE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "above": torch.gt,
    "below": torch.lt,
    "at_least": torch.ge,
    "at_most": torch.le,
}
LIMITS = {
    "entropy": (0.0, math.inf),
    "margin": (0.0, math.inf),
    "prob": (0.0, 1.0),
    "rank": (1, math.inf),
    "reads": (0.0, 1.0),
    "cosine": (-1.0, 1.0),
    "norm": (0.0, math.inf),
}
UNITS = {"entropy": "nats", "margin": "logits", "norm": "norm"}  # the limit's argument
OF_LOGITS = ("entropy", "margin", "prob", "rank")
OF_STATE = ("reads", "cosine", "norm")
Over: TypeAlias = Literal["mean", "any", "last"]
OVER = ("mean", "any", "last")  # how the positions of `pos` decide together


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class LogitCondition(Condition):
    """A quantity of the logits and its limit. `entropy_above`, `rank_of` … return it."""

    quantity: str
    token: Token | None
    compare: str
    limit: float

    def __post_init__(self) -> None:
        check_choice(self.quantity, "a condition's quantity", OF_LOGITS)
        check_choice(self.compare, f"a condition of {self.quantity}", COMPARE)
        if self.quantity in ("rank", "prob"):
            set_field(self, "token", check_token(self.token))
        elif self.token is not None:
            raise BadHook(
                f"a condition of {self.quantity} is of no token, and names {self.token!r}"
            )
        _check_limit(self)

    def __repr__(self) -> str:
        if self.token is None:
            return f"{self.quantity}_{self.compare}({self.limit!r})"
        return f"{self.quantity}_of({self.token!r}, {self.compare}={self.limit!r})"


def _check_limit(condition: LogitCondition | StateCondition) -> None:
    """Normalizes the limit of a condition. Raises `BadHook` if the condition never holds."""
    quantity, compare = condition.quantity, condition.compare
    limit_name = UNITS.get(quantity, compare)
    limit = check_number(condition.limit, limit_name)
    if quantity == "rank":
        limit = check_integer(condition.limit, limit_name, meaning="a rank", error=BadHook)
    set_field(condition, "limit", limit)
    least, most = LIMITS[quantity]
    never_holds = {
        "above": limit >= most,
        "below": limit <= least,
        "at_least": limit > most,
        "at_most": limit < least,
    }
    if never_holds[compare]:
        raise BadHook(
            f"{condition!r} never holds: {quantity} is from {least:g} to {most:g}, so give a "
            "limit between them"
        )


@dataclass(frozen=True)
class StateCondition(Condition):
    """A quantity of the values at a site and its limit. `reads`, `cosine` and `norm_above` return
    it.

    of    the probe of `reads`, the vector of `cosine`; None for a norm
    site  where it reads; None for the site of the edit itself
    pos   None to decide at each position; positions of the prompt to decide once for each row
    over  how the positions of `pos` decide together
    """

    quantity: str
    of: Probe | Constant | None
    compare: str
    limit: float
    site: AnySite | None = None
    pos: Any = None
    over: Over | None = None

    def __post_init__(self) -> None:
        check_choice(self.quantity, "a condition's quantity", OF_STATE)
        check_choice(self.compare, f"a condition of {self.quantity}", ("above", "below"))
        self._check_subject()
        if isinstance(self.of, Probe):
            set_field(self, "site", self.of.site)
        elif self.site is not None:
            set_field(self, "site", _read_site(self.site))
        set_field(self, "pos", _read_prompt_position(self.pos))
        if self.pos is None and self.over is not None:
            raise BadHook(
                f"over={self.over!r} says how the positions of pos= decide together, and pos= was "
                "not given: say pos=hk.PROMPT to decide once for each row"
            )
        if self.pos is not None:
            set_field(self, "over", "mean" if self.over is None else self.over)
            check_choice(self.over, "over", OVER)
        _check_limit(self)

    def _check_subject(self) -> None:
        kinds: dict[str, type] = {"reads": Probe, "cosine": Constant, "norm": type(None)}
        if not isinstance(self.of, kinds[self.quantity]):
            words = {"reads": "a probe, of hk.fit_probe or hk.load_probe", "cosine": "a vector"}
            raise BadHook(
                f"{self.quantity} has {describe(self.of)}: give {words.get(self.quantity, 'None')}"
            )
        if isinstance(self.of, Constant) and not bool(self.of.tensor.any()):
            raise BadHook("the vector of cosine is zero, and has no direction")

    def __repr__(self) -> str:
        limit = f"{self.compare}={self.limit!r}"
        arguments = [limit] if self.of is None else [repr(self.of), limit]
        if isinstance(self.of, Probe):
            arguments[0] = f"probe of {self.site}"
        elif self.of is None:
            arguments[0] = repr(self.limit)
        name = "norm_above" if self.quantity == "norm" else self.quantity
        if self.site is not None and self.quantity != "reads":
            arguments.append(f"site={str(self.site)!r}")
        if self.pos is not None:
            arguments.append(f"pos={self.pos!r}")
        if self.over not in (None, "mean"):
            arguments.append(f"over={self.over!r}")
        return f"{name}({', '.join(arguments)})"


def _read_site(site: SitesLike) -> AnySite:
    """Returns the one site of a condition."""
    sites = require_vectors(as_sites(site), "a condition reads")
    if len(sites) != 1 or sites[0].every_layer:
        raise BadHook(
            f"a condition reads one site, and site={sites} is several: name one, such as "
            "'resid_post.6'"
        )
    return sites[0]


def _read_prompt_position(pos: PosLike) -> Any:
    position = read_position(pos)
    if position is GENERATED:
        raise BadHook(
            "pos=GENERATED: pos= of a condition says which positions of the prompt decide, once "
            "for each row; leave pos out to decide at each token"
        )
    return position


@dataclass(frozen=True)
class TextCondition(Condition):
    """What the text so far ends with, or contains. `text_ends` and `contains` return it."""

    text: str
    prompt: bool = True

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise BadHook(f"{self.name}({describe(self.text)}): give a text that is not empty")
        set_field(self, "prompt", check_bool(self.prompt, "prompt"))

    def holds_for(self, text: str) -> bool:
        """Returns whether the condition holds for a text so far."""
        raise AssertionError(f"{type(self).__name__} does not define holds_for()")

    def __repr__(self) -> str:
        prompt = "" if self.prompt else ", prompt=False"
        return f"{self.name}({self.text!r}{prompt})"


class TextEnds(TextCondition):
    """True where the text so far ends with a text. `text_ends` returns it."""

    name = "text_ends"

    def holds_for(self, text: str) -> bool:
        return text.endswith(self.text)


class Contains(TextCondition):
    """True where the text so far contains a text. `contains` returns it."""

    name = "contains"

    def holds_for(self, text: str) -> bool:
        return self.text in text


@dataclass(frozen=True)
class AllOf(Condition):
    """True where all of several conditions are: `a & b`."""

    conditions: tuple[When, ...]

    def __post_init__(self) -> None:
        set_field(self, "conditions", _flatten(self.conditions, AllOf))

    def __repr__(self) -> str:
        return " & ".join(map(_in_brackets, self.conditions))


@dataclass(frozen=True)
class AnyOf(Condition):
    """True where one of several conditions is: `a | b`."""

    conditions: tuple[When, ...]

    def __post_init__(self) -> None:
        set_field(self, "conditions", _flatten(self.conditions, AnyOf))

    def __repr__(self) -> str:
        return " | ".join(map(_in_brackets, self.conditions))


@dataclass(frozen=True)
class Not(Condition):
    """True where a condition is False: `~a`. It is False where the condition is not decided."""

    condition: When

    def __post_init__(self) -> None:
        check_when(self.condition)

    def __repr__(self) -> str:
        return f"~{_in_brackets(self.condition)}"


def _flatten(conditions: object, kind: type[AllOf | AnyOf]) -> tuple[When, ...]:
    """Returns the parts, and for each part of the same kind its own parts."""
    if not isinstance(conditions, tuple) or len(conditions) < 2:
        raise BadHook(f"{kind.__name__} combines two conditions or more: {describe(conditions)}")
    flat: list[When] = []
    for condition in conditions:
        check_when(condition)
        flat += condition.conditions if isinstance(condition, kind) else [condition]
    return tuple(flat)


def _in_brackets(condition: When) -> str:
    text = argument_text(condition)
    return f"({text})" if isinstance(condition, AllOf | AnyOf) else text


# ---- on the logits


@check_keywords
def entropy_above(nats: float) -> LogitCondition:
    """True where the entropy of the next-token distribution is above `nats`.

    >>> entropy_above(2.0)
    entropy_above(2.0)
    """
    return LogitCondition("entropy", None, "above", nats)


@check_keywords
def entropy_below(nats: float) -> LogitCondition:
    """True where the entropy of the next-token distribution is below `nats`."""
    return LogitCondition("entropy", None, "below", nats)


@check_keywords
def margin_above(logits: float) -> LogitCondition:
    """True where the largest logit is more than `logits` above the second largest."""
    return LogitCondition("margin", None, "above", logits)


@check_keywords
def margin_below(logits: float) -> LogitCondition:
    """True where the largest logit is less than `logits` above the second largest."""
    return LogitCondition("margin", None, "below", logits)


@check_keywords
def rank_of(
    token: Token, *, at_most: int | None = None, at_least: int | None = None
) -> LogitCondition:
    """True where a token's rank is within the limit; 1 is the most likely token.

    >>> rank_of(" coffee", at_most=10)
    rank_of(' coffee', at_most=10)
    """
    limits = {"at_most": at_most, "at_least": at_least}
    return LogitCondition("rank", token, *_one_limit(f"rank_of({token!r})", limits))


@check_keywords
def prob_of(
    token: Token, *, at_most: float | None = None, at_least: float | None = None
) -> LogitCondition:
    """True where a token's probability (0 to 1) is within the limit.

    >>> prob_of(" coffee", at_least=0.05)
    prob_of(' coffee', at_least=0.05)
    """
    limits = {"at_most": at_most, "at_least": at_least}
    return LogitCondition("prob", token, *_one_limit(f"prob_of({token!r})", limits))


def _one_limit(call: str, limits: Mapping[str, float | None]) -> tuple[str, float]:
    """Returns the name of the limit that was given, and its value."""
    used_limits = [(name, limit) for name, limit in limits.items() if limit is not None]
    if len(used_limits) != 1:
        first, second = limits
        raise BadHook(
            f"{call} needs one limit: {first}= or {second}=; for both, combine two conditions "
            "with &"
        )
    return used_limits[0]


# ---- on the model's state


@check_keywords
def reads(
    probe: Probe,
    *,
    above: float | None = None,
    below: float | None = None,
    pos: PosLike = None,
    over: Over | None = None,
) -> StateCondition:
    """True where a probe's score, from 0 to 1, is above or below a limit, at the probe's own site.

    By default each token is asked for itself. `pos` are positions of the prompt, such as hk.PROMPT,
    -1 or hk.at("store"): then the condition is decided once for each row and holds for the whole
    row, in generation too (conditional steering, Lee et al. 2024, CAST). `over` says how these
    positions decide together: "mean" (the default) compares the mean of their scores with the
    limit, "last" the score of the last one, and "any" holds if one of them is within the limit.

    An edit at a site that is computed before the probe's acts from the next token on, and, decided
    from the prompt, from the first generated token on.

    >>> probe = hk.types.Probe("resid_post.6", torch.ones(576), bias=-1.0, norm=120.0)
    >>> reads(probe, above=0.5, pos=hk.PROMPT)
    reads(probe of resid_post.6, above=0.5, pos=PROMPT)
    """
    compare, limit = _one_limit("reads(probe)", {"above": above, "below": below})
    return StateCondition("reads", probe, compare, limit, pos=pos, over=over)


@check_keywords
def cosine(
    vector: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    site: str | AnySite | None = None,
    pos: PosLike = None,
    over: Over | None = None,
) -> StateCondition:
    """True where the cosine of the values at a site with a vector is above or below a limit.

    `site` is by default that of an `hk.Vector`, and for a tensor the site of the edit. `pos` and
    `over` are those of `reads`. Values of zeros have the cosine 0.

    >>> cosine(torch.ones(576), above=0.3, site="resid_post.6")
    cosine(tensor[576], above=0.3, site='resid_post.6')
    """
    compare, limit = _one_limit("cosine(vector)", {"above": above, "below": below})
    if isinstance(vector, Vector):
        site = vector.site if site is None else site
        vector = vector.tensor
    direction = as_constant(vector, "the vector")
    return StateCondition("cosine", direction, compare, limit, _site(site), pos, over)


@check_keywords
def norm_above(
    norm: float,
    *,
    site: str | AnySite | None = None,
    pos: PosLike = None,
    over: Over | None = None,
) -> StateCondition:
    """True where the L2 norm of the values at a site is above `norm`.

    `site` is by default that of the edit; `pos` and `over` are those of `reads`.

    >>> norm_above(60.0, site="resid_post.6")
    norm_above(60.0, site='resid_post.6')
    """
    return StateCondition("norm", None, "above", norm, _site(site), pos, over)


def _site(site: str | AnySite | None) -> AnySite | None:
    return site if site is None or isinstance(site, Site | ModuleSite) else _read_site(site)


# ---- on the text so far


@check_keywords
def text_ends(text: str, *, prompt: bool = True) -> TextEnds:
    """True where the text so far ends with `text`.

    The text of a position is that of all tokens up to it, decoded, so that it does not matter which
    tokens make it up. With `prompt=False` only generated tokens count.

    >>> text_ends(" oat milk")
    text_ends(' oat milk')
    """
    return TextEnds(text, prompt)


@check_keywords
def contains(text: str, *, prompt: bool = True) -> Contains:
    """True where the text so far contains `text`; the prompt counts unless `prompt=False`.

    >>> contains("coffee", prompt=False)
    contains('coffee', prompt=False)
    """
    return Contains(text, prompt)
