"""Hooks that change what the model says: force, ban, boost, swap, set_rank.

They act on the logits that the model returns, after any soft-cap or scaling, and before the decoding rules of
`generate`. Unless told otherwise they act at the prompt's last position and at every generated step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, BadHook, OutOfRange, checks_keywords
from ..model import Token
from ..positions import CountLike, PosLike, Where, as_count, as_pos
from ..sites import LOGITS, AnySite, ModuleSite, Sites, as_sites
from .base import EVERY_STEP, Binding, Change, EditHook, Here, number

Logits = Float[Tensor, "row pos vocab"]


@dataclass(frozen=True)
class Force(EditHook):
    """Let a token win. Made by `force`."""

    token: Token
    margin: float = 10.0

    verb: ClassVar[str] = "force"
    bare: ClassVar[tuple[str, ...]] = ("token",)

    def change(self, binding: Binding) -> Change:
        (token,) = _ids(binding, self.token)

        def apply(logits: Logits, here: Here) -> Logits:
            _inside(logits, here, token)
            if self.margin == math.inf:
                new = torch.full_like(logits, -math.inf)
                new[..., token] = logits[..., token].clamp(min=torch.finfo(logits.dtype).min)
                return new
            new = logits.clone()
            new[..., token] = logits.amax(dim=-1) + self.margin
            return new

        return apply


@checks_keywords
def force(
    token: Token,
    *,
    margin: float = 10.0,
    step: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Force:
    """Set a token's logit to the largest one plus `margin`, so that it is chosen.

    The margin is in logits: at temperature 1, 10 leaves the others together at most e⁻¹⁰ times their number.
    `margin=math.inf` takes every other token out, which holds at any temperature.

    >>> print(force(" coffee"))
    force(' coffee')
    """
    if margin != math.inf and number(margin, "margin") <= 0:
        raise BadHook(f"margin={margin!r} does not put the token first: give a number above 0")
    return Force(*_at_logits(site, pos, rows, step), token, float(margin))


@dataclass(frozen=True)
class Ban(EditHook):
    """Let tokens never be chosen. Made by `ban`."""

    tokens: tuple[Token, ...]

    verb: ClassVar[str] = "ban"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)

    def change(self, binding: Binding) -> Change:
        tokens = _ids(binding, *self.tokens)

        def apply(logits: Logits, here: Here) -> Logits:
            _inside(logits, here, *tokens)
            new = logits.clone()
            new[..., tokens] = -math.inf
            if bool((new.amax(dim=-1) == -math.inf).any()):
                raise BadEdit(f"{self} leaves no token to choose at {here.site}")
            return new

        return apply


@checks_keywords
def ban(
    *tokens: Token | Iterable[Token],
    step: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Ban:
    """Set the logits of these tokens to -inf: their probability is exactly 0.

    >>> print(ban(" coffee", " tea"))
    ban(' coffee', ' tea')
    """
    return Ban(*_at_logits(site, pos, rows, step), _several(tokens, "ban"))


@dataclass(frozen=True)
class Boost(EditHook):
    """Add to the logits of tokens. Made by `boost`."""

    tokens: tuple[Token, ...]
    by: float

    verb: ClassVar[str] = "boost"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)

    def change(self, binding: Binding) -> Change:
        tokens = _ids(binding, *self.tokens)

        def apply(logits: Logits, here: Here) -> Logits:
            _inside(logits, here, *tokens)
            new = logits.clone()
            new[..., tokens] += self.by
            return new

        return apply


@checks_keywords
def boost(
    *tokens: Token | Iterable[Token],
    by: float,
    step: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Boost:
    """Add `by` to the logits of these tokens: their odds against any other token grow by the factor e^by.

    >>> print(boost(" coffee", by=2.0))
    boost(' coffee', by=2.0)
    """
    return Boost(*_at_logits(site, pos, rows, step), _several(tokens, "boost"), number(by, "by"))


@dataclass(frozen=True)
class Swap(EditHook):
    """Exchange the logits of two tokens. Made by `swap`."""

    a: Token
    b: Token

    verb: ClassVar[str] = "swap"
    bare: ClassVar[tuple[str, ...]] = ("a", "b")

    def change(self, binding: Binding) -> Change:
        a, b = _ids(binding, self.a, self.b)
        if a == b:
            raise BadHook(f"{self} names one token twice: there is nothing to swap")

        def apply(logits: Logits, here: Here) -> Logits:
            _inside(logits, here, a, b)
            new = logits.clone()
            new[..., [a, b]] = logits[..., [b, a]]
            return new

        return apply


@checks_keywords
def swap(
    a: Token,
    b: Token,
    *,
    step: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Swap:
    """Exchange the logits of two tokens; every other token keeps its logit, its probability and its rank.

    >>> print(swap(" coffee", " tea"))
    swap(' coffee', ' tea')
    """
    return Swap(*_at_logits(site, pos, rows, step), a, b)


@dataclass(frozen=True)
class SetRank(EditHook):
    """Move a token to a rank. Made by `set_rank`."""

    token: Token
    rank: int

    verb: ClassVar[str] = "set_rank"
    bare: ClassVar[tuple[str, ...]] = ("token", "rank")

    def change(self, binding: Binding) -> Change:
        (token,) = _ids(binding, self.token)
        real = binding.lm.n_tokens or None
        if real is not None and token >= real:
            raise BadHook(
                f"token {token} is a row of the vocabulary without a token (they end at {real - 1}): it has no rank"
            )

        def apply(logits: Logits, here: Here) -> Logits:
            _inside(logits, here, token)
            others = logits[..., :real].clone()
            count = others.shape[-1]
            if self.rank > count:
                raise OutOfRange(f"rank {self.rank} was asked for, and the vocabulary has {count} tokens")
            others[..., token] = -math.inf
            new = logits.clone()
            new[..., token] = between = _between(others, self.rank)
            larger = (others > between[..., None]).sum(dim=-1)
            if bool(here.real_cells(larger != self.rank - 1).any()):
                raise BadEdit(f"{self} cannot be: the tokens that would stand before and after it have the same logit")
            return new

        return apply


def _between(others: Logits, rank: int) -> Float[Tensor, "row pos"]:
    """A logit that rank - 1 of the others are larger than, unless two of them are equal just there."""
    ordered = others.topk(min(rank, others.shape[-1] - 1), dim=-1).values  # the token itself is not among the others
    if rank == 1:
        return ordered[..., 0] + 1
    above = ordered[..., rank - 2]
    if rank == others.shape[-1]:
        return above - 1
    below = ordered[..., rank - 1]
    middle = (above + below) / 2
    return torch.where(middle < above, middle, below)


@checks_keywords
def set_rank(
    token: Token,
    rank: int,
    *,
    step: CountLike = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> SetRank:
    """Give a token the logit midway between its new neighbours, so that it has this rank; 1 is the most likely token.

    At rank 1 it is one logit above the rest, at the last rank one below. Every other token keeps its logit.

    >>> print(set_rank(" coffee", 3))
    set_rank(' coffee', 3)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise OutOfRange(f"rank={rank!r}: ranks are whole numbers from 1, the most likely token")
    return SetRank(*_at_logits(site, pos, rows, step), token, rank)


def _at_logits(site: str | AnySite, pos: PosLike, rows: CountLike, step: CountLike) -> tuple[Sites, Where]:
    sites = as_sites(site)
    for each in sites:
        if not isinstance(each, ModuleSite) and each.name not in LOGITS:
            raise BadHook(
                f"an edit of logits cannot act at {each}, which holds no logits: it acts at 'logits', at 'lm_head' "
                "(before a soft-cap), or at the module that makes the logits, hk.module(path)"
            )
    if pos is not None and step is not None:
        raise BadHook(f"pos={pos!r} and step={step!r} were both given: say one of them")
    if pos is None and step is None:
        return sites, Where(None, as_count(rows, "row", negative=False), EVERY_STEP)
    return sites, Where(as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False))


def _several(tokens: Iterable[Token | Iterable[Token]], verb: str) -> tuple[Token, ...]:
    flat = [t for token in tokens for t in ([token] if isinstance(token, str | int) else token)]
    if not flat:
        raise BadHook(f"{verb}() names no token: give at least one, as text or id")
    return tuple(flat)


def _ids(binding: Binding, *tokens: Token) -> list[int]:
    return [binding.lm.token(token) for token in tokens]


def _inside(logits: Logits, here: Here, *tokens: int) -> None:
    wrong = [token for token in tokens if token >= logits.shape[-1]]
    if wrong:
        raise BadEdit(
            f"token {wrong[0]} was asked for, and the last axis of {here.site} has {logits.shape[-1]} numbers"
        )
