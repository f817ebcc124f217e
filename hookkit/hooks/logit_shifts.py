"""Hooks that move tokens up or down: boost, cap, swap, set_rank."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_whole, checks_keywords, described
from ..errors import BadEdit, BadFile, BadHook, OutOfRange
from ..files.untrusted import reason, text_of
from ..models.positions import CountLike, PosLike
from ..models.sites import AnySite
from ..models.tokens import Token
from .base import Binding, Change, Here, number, put
from .conditions import When
from .logits import LogitEdit, Logits, at_logits, check_inside, ids_of, several
from .rounding import fitted_number, next_above, next_below, rounded_down


@dataclass(frozen=True)
class Boost(LogitEdit):
    """Add to the logits of tokens. Made by `boost`."""

    tokens: tuple[Token, ...]
    by: float | tuple[float, ...]

    verb: ClassVar[str] = "boost"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)
    names: ClassVar[tuple[str, ...]] = ("tokens",)

    def check(self) -> None:
        super().check()
        if not isinstance(self.by, tuple):
            put(self, "by", number(self.by, "by"))
            return
        if len(self.by) != len(self.tokens):
            raise BadHook(
                f"boost has {len(self.by)} amounts for {len(self.tokens)} tokens: give one for each"
            )
        amounts = zip(self.tokens, self.by, strict=True)
        put(self, "by", tuple(number(amount, f"by[{token!r}]") for token, amount in amounts))

    def __str__(self) -> str:
        if not isinstance(self.by, tuple):
            return super().__str__()
        first = repr(self.tokens[0])
        rest = str(replace(self, tokens=self.tokens[:1], by=0.0)).replace(f"{first}, ", "", 1)
        return rest.replace("by=0.0", f"by={dict(zip(self.tokens, self.by, strict=True))}", 1)

    def _amounts(self) -> tuple[float, ...]:
        return self.by if isinstance(self.by, tuple) else (self.by,) * len(self.tokens)

    def _check_moved(self, was: Logits, now: Logits, here: Here) -> None:
        """Raise `BadEdit` where no token moves at all, since the amounts are lost by the rounding
        of a small dtype.
        """
        if was.element_size() > 2 or not any(self._amounts()):
            return
        lost = (torch.isfinite(was) & (was == now)).any(dim=-1) & (was == now).all(dim=-1)
        if bool(here.real_cells(lost).any()):
            raise BadEdit(
                f"{self} changes nothing at {here.site}: {str(was.dtype).removeprefix('torch.')} has no number so near "
                "to these logits; give a larger amount, or run the model in float32"
            )

    def edit(self, binding: Binding) -> Change:
        tokens = ids_of(binding, *self.tokens)
        _check_once(tokens, self)

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, *tokens)
            amounts = [fitted_number(by, logits.dtype, "by") for by in self._amounts()]
            new = logits.clone()
            new[..., tokens] += torch.tensor(amounts, dtype=logits.dtype, device=logits.device)
            self._check_moved(logits[..., tokens], new[..., tokens], here)
            return new

        return apply


@checks_keywords
def boost(
    *tokens: Token | Iterable[Token],
    by: float | Mapping[Token, float] | str | PathLike[str],
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Boost:
    """Add `by` to the logits of these tokens: their odds against any other token grow by the factor
    e^by.

    `by` may also be an amount for each token, {" coffee": 2.0, " tea": -1.0}, or the path of a CSV
    file with the columns `token` (or `token_id`) and `by`; then no tokens are named beside it.

    >>> print(boost(" coffee", by=2.0))
    boost(' coffee', by=2.0)
    """
    if isinstance(by, str | PathLike):
        by = _amounts(by)
    if not isinstance(by, Mapping):
        chosen, amounts = several(tokens, "boost"), by
    elif tokens:
        raise BadHook(f"by= names its tokens itself: leave out {', '.join(map(repr, tokens))}")
    else:
        chosen, amounts = several([list(by)], "boost"), tuple(by.values())
    return Boost(*at_logits(site, pos, rows, step), chosen, amounts, when=when)


def _amounts(path: str | PathLike[str]) -> dict[Token, float]:
    """The amount for each token in a CSV file. A token stands as it is, its leading space kept, or
    as its id.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text_of(path), newline="")))
    except (BadFile, csv.Error) as error:
        raise BadHook(
            f"by={str(path)!r} is no file that can be read ({reason(error.__cause__ or error)}); by= is a number, "
            "amounts, or a path"
        ) from error
    name = next((name for name in ("token_id", "token") if rows and name in rows[0]), None)
    if name is None or "by" not in rows[0]:
        raise BadHook(
            f"{path} is no table of amounts: it needs a line for each token, under token (or token_id) and by"
        )
    try:
        amounts = [
            (int(row[name]) if name == "token_id" else row[name], float(row["by"])) for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise BadHook(f"{path} has a value that is no number: {error}") from error
    _check_once([token for token, _ in amounts], path)
    return dict(amounts)


def _check_once(tokens: Sequence[Token], who: object) -> None:
    """Raise `BadHook` where a token is named twice: it is not clear what is meant."""
    twice = [token for token, times in Counter(tokens).items() if times > 1]
    if twice:
        raise BadHook(f"{who} names token {twice[0]!r} twice: name each once")


@dataclass(frozen=True)
class Cap(LogitEdit):
    """Keep tokens from standing higher than a limit. Made by `cap`."""

    tokens: tuple[Token, ...]
    logit: float | None = None
    prob: float | None = None

    verb: ClassVar[str] = "cap"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)
    names: ClassVar[tuple[str, ...]] = ("tokens",)

    def check(self) -> None:
        super().check()
        if (self.logit is None) == (self.prob is None):
            raise BadHook("cap() needs one limit: logit= or prob=")
        if self.logit is not None:
            put(self, "logit", number(self.logit, "logit"))
            return
        if not 0 < number(self.prob, "prob") < 1:
            raise BadHook(
                f"prob={self.prob!r} is no limit: give a probability between 0 and 1, or ban the tokens"
            )
        put(self, "prob", number(self.prob, "prob"))

    def edit(self, binding: Binding) -> Change:
        tokens = ids_of(binding, *self.tokens)
        _check_once(tokens, self)

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, *tokens)
            new = logits.clone()
            found = logits[..., tokens]
            exact = found.to(torch.promote_types(found.dtype, torch.float32))
            if self.logit is not None:
                limit = fitted_number(self.logit, logits.dtype, "logit")
                new[..., tokens] = rounded_down(exact.clamp(max=limit), logits.dtype)
                return new
            new[..., tokens] = rounded_down(exact + self._shift(logits, tokens), logits.dtype)
            if bool(here.real_cells(~(new.amax(dim=-1) > -math.inf)).any()):
                raise BadEdit(
                    f"{self} cannot be at {here.site}: no other token can be chosen, so these have all the odds"
                )
            return new

        return apply

    def _shift(self, logits: Logits, tokens: list[int]) -> Float[Tensor, "row pos _"]:
        assert self.prob is not None
        others = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        found = others[..., tokens]
        others[..., tokens] = -math.inf
        odds = found.logsumexp(dim=-1, keepdim=True) - others.logsumexp(dim=-1, keepdim=True)
        return (math.log(self.prob / (1 - self.prob)) - odds).clamp(max=0)


@checks_keywords
def cap(
    *tokens: Token | Iterable[Token],
    logit: float | None = None,
    prob: float | None = None,
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Cap:
    """Lower these tokens to a limit where they stand above it: each to a `logit`, or all together
    to a `prob` (0 to 1).

    With `prob` they are all lowered by one number, so that their odds among each other stay as they
    were.

    >>> print(cap(" coffee", prob=0.1))
    cap(' coffee', prob=0.1)
    """
    return Cap(*at_logits(site, pos, rows, step), several(tokens, "cap"), logit, prob, when=when)


@dataclass(frozen=True)
class Swap(LogitEdit):
    """Exchange the logits of two tokens. Made by `swap`."""

    a: Token
    b: Token

    verb: ClassVar[str] = "swap"
    bare: ClassVar[tuple[str, ...]] = ("a", "b")
    names: ClassVar[tuple[str, ...]] = ("a", "b")

    def check(self) -> None:
        super().check()
        if self.a == self.b:
            raise BadHook(f"{self} names one token twice: there is nothing to swap")

    @property
    def gives_infinity(self) -> bool:
        return True

    def edit(self, binding: Binding) -> Change:
        a, b = ids_of(binding, self.a, self.b)
        if a == b:
            raise BadHook(f"{self} names one token twice: there is nothing to swap")

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, a, b)
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
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Swap:
    """Exchange the logits of two tokens; every other token keeps its logit, its probability and its
    rank.

    >>> print(swap(" coffee", " tea"))
    swap(' coffee', ' tea')
    """
    return Swap(*at_logits(site, pos, rows, step), a, b, when=when)


@dataclass(frozen=True)
class SetRank(LogitEdit):
    """Move a token to a rank. Made by `set_rank`."""

    token: Token
    rank: int

    verb: ClassVar[str] = "set_rank"
    bare: ClassVar[tuple[str, ...]] = ("token", "rank")
    names: ClassVar[tuple[str, ...]] = ("token",)

    def check(self) -> None:
        super().check()
        rank = as_whole(self.rank)
        if rank is None or rank < 1:
            raise OutOfRange(
                f"rank={described(self.rank)}: ranks are whole numbers from 1, the most likely token"
            )
        put(self, "rank", rank)

    def edit(self, binding: Binding) -> Change:
        (token,) = ids_of(binding, self.token)
        real = binding.lm.n_tokens or None
        if real is not None and token >= real:
            raise BadHook(
                f"token {token} is a row of the vocabulary without a token (they end at {real - 1}): it has no rank"
            )

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, token)
            others = logits[..., :real].clone()
            count = others.shape[-1]
            if self.rank > count:
                raise OutOfRange(
                    f"rank {self.rank} was asked for, and the vocabulary has {count} tokens"
                )
            others[..., token] = -math.inf
            new = logits.clone()
            new[..., token] = between = _between(others, self.rank)
            larger = (others > between[..., None]).sum(dim=-1)
            if bool(here.real_cells((larger != self.rank - 1) | between.isnan()).any()):
                raise BadEdit(
                    f"{self} cannot be: the tokens that would stand before and after it have the same logit, or logits "
                    "are NaN"
                )
            return new

        return apply


def _between(others: Logits, rank: int) -> Float[Tensor, "row pos"]:
    """A logit that rank - 1 of the others are larger than, unless two of them are equal just there."""
    ordered = others.topk(
        min(rank, others.shape[-1] - 1), dim=-1
    ).values  # the token itself is not among the others
    if rank == 1:
        return torch.maximum(ordered[..., 0] + 1, next_above(ordered[..., 0]))
    above = ordered[..., rank - 2]
    if rank == others.shape[-1]:
        return torch.minimum(above - 1, next_below(above))
    below = ordered[..., rank - 1]
    middle = (above + below) / 2
    return torch.where(middle < above, middle, below)


@checks_keywords
def set_rank(
    token: Token,
    rank: int,
    *,
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> SetRank:
    """Give a token the logit midway between its new neighbours, so that it has this rank; 1 is the
    most likely token.

    At rank 1 it is one logit above the rest, at the last rank one below. Every other token keeps
    its logit.

    >>> print(set_rank(" coffee", 3))
    set_rank(' coffee', 3)
    """
    return SetRank(*at_logits(site, pos, rows, step), token, rank, when=when)
