"""Hooks that raise or lower tokens: `ban`, `restrict`, `boost`, `cap`, `swap` and `set_rank`."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_integer, check_keywords, check_number, describe
from ..errors import BadEdit, BadFile, BadHook, OutOfRange
from ..files.untrusted import error_message, read_text
from ..models.lm import LM
from ..models.positions import IndicesLike, PosLike
from ..models.sites import AnySite, as_sites
from ..models.tokens import Token
from ..models.words import Word, WordEnds, WordLike, check_words
from .base import Binding, Change, EditContext, When, as_where, set_field
from .logits import LogitEdit, Logits, fitted_number, next_above
from .rulings import besides_ruling


@dataclass(frozen=True)
class TokensEdit(LogitEdit, bare=("tokens",), takes_words=True):
    """A hook that changes the logits of any number of tokens."""

    tokens: tuple[WordLike, ...]


def flatten_tokens(
    arguments: Iterable[WordLike | Iterable[WordLike]], verb: str
) -> tuple[WordLike, ...]:
    """Returns the tokens of a call, which were given one by one or in lists."""
    tokens = (check_words(argument, verb) for argument in arguments)
    return tuple(itertools.chain.from_iterable(tokens))


@dataclass(frozen=True)
class Ban(TokensEdit, verb="ban", takes_several=True, gives_infinity=True):
    """Makes tokens impossible. `ban` returns it."""

    def ids_of_word(self, target: Word, lm: LM) -> list[int]:
        return target.edited_ids(lm)

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        lm = binding.lm
        words = [token for token in self.tokens if isinstance(token, Word)]
        rows_of_ids = [target.ids(lm) for target in words if not isinstance(target.text, str)]
        word_ends = [WordEnds(lm, target) for target in words if isinstance(target.text, str)]
        banned = [lm.token(token) for token in self.tokens if not isinstance(token, Word)]
        banned += [ids[0] for ids in rows_of_ids if len(ids) == 1]

        def apply(logits: Logits, here: EditContext) -> Logits:
            new = logits.clone()
            new[..., banned] = -math.inf
            for ids in rows_of_ids:
                _ban_last(ids, new, here)
            for ends in word_ends:
                _ban_completing_tokens(new, here, ends)
            if (row := _row_without_token(new, here)) is not None:
                raise BadEdit(
                    f"{self} leaves no token to choose at {here.site}{besides_ruling(here, row)}"
                )
            return new

        return apply


def _ban_completing_tokens(logits: Logits, here: EditContext, ends: WordEnds) -> None:
    """Sets the logits of the tokens that complete a word to -inf, in place."""
    for row, positions in enumerate(here.cells.row_positions):
        for column, position in enumerate(positions):
            tokens = ends.after(here.read(row, position, ends.n_read))
            logits[row, column, tokens] = -math.inf


def _ban_last(ids: list[int], logits: Logits, here: EditContext) -> None:
    """Bans the last of several tokens where the text ends with the others."""
    if len(ids) > 1:
        for row, column in _cells_before_last(ids, here):
            logits[row, column, ids[-1]] = -math.inf


def _row_without_token(logits: Logits, here: EditContext) -> int | None:
    """Returns the first row with a cell where no token is left; None if there is none."""
    is_empty = here.real_cells(logits.amax(dim=-1) == -math.inf)
    return int(is_empty.nonzero()[0, 0]) if bool(is_empty.any()) else None


def _cells_before_last(ids: list[int], here: EditContext) -> list[tuple[int, int]]:
    """Returns the cells whose next token would be the last of these, after the others."""
    start = ids[:-1]
    cells = []
    for row, positions in enumerate(here.cells.row_positions):
        for column, position in enumerate(positions):
            if here.read(row, position, len(start)) == start:
                cells.append((row, column))
    return cells


@check_keywords
def ban(
    *tokens: WordLike | Iterable[WordLike],
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Ban:
    """Sets the logits of these tokens to -inf: their probability is exactly 0.

    Of a word each token is banned that would complete it, in any spelling and with any tokens,
    after the text so far, which begins with the prompt: see `hk.word`.

    >>> print(ban(" coffee", word("tea")))
    ban(' coffee', word('tea'))
    """
    return Ban(as_sites(site), as_where(pos, rows, step), flatten_tokens(tokens, "ban"), when=when)


@dataclass(frozen=True)
class Restrict(TokensEdit, verb="restrict", gives_infinity=True):
    """Makes all other tokens impossible. `restrict` returns it."""

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        def apply(logits: Logits, here: EditContext) -> Logits:
            new = torch.full_like(logits, -math.inf)
            new[..., tokens] = logits[..., tokens]
            if (row := _row_without_token(new, here)) is not None:
                reason = besides_ruling(here, row) or ": all of these were banned before"
                raise BadEdit(f"{self} leaves no token to choose at {here.site}{reason}")
            return new

        return apply


@check_keywords
def restrict(
    *tokens: WordLike | Iterable[WordLike],
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Restrict:
    """Sets the logits of all other tokens to -inf: one of these is chosen, by its own odds.

    >>> print(restrict(" yes", " no"))
    restrict(' yes', ' no')
    """
    selected = flatten_tokens(tokens, "restrict")
    return Restrict(as_sites(site), as_where(pos, rows, step), selected, when=when)


@dataclass(frozen=True)
class Boost(TokensEdit, verb="boost"):
    """Adds to the logits of tokens. `boost` returns it."""

    by: float | tuple[float, ...]

    def check(self) -> None:
        super().check()
        if not isinstance(self.by, tuple):
            set_field(self, "by", check_number(self.by, "by"))
            return
        if len(self.by) != len(self.tokens):
            raise BadHook(
                f"boost has {len(self.by)} amounts for {len(self.tokens)} tokens: give one for each"
            )
        names = [f"by[{token!r}]" for token in self.tokens]
        set_field(self, "by", tuple(map(check_number, self.by, names)))

    def expanded(self, lm: LM) -> LogitEdit:
        tokens: list[int] = []
        for token in self.tokens:
            tokens += self.ids(token, lm)
        by = tuple(self._amounts(lm)) if isinstance(self.by, tuple) else self.by
        return replace(self, tokens=tuple(tokens), by=by)

    def _amounts(self, lm: LM) -> list[float]:
        """Returns the amount for each token id; all spellings of a word have one amount."""
        by = self.by if isinstance(self.by, tuple) else (self.by,) * len(self.tokens)
        amounts: list[float] = []
        for token, amount in zip(self.tokens, by, strict=True):
            amounts += [amount] * len(self.ids(token, lm))
        return amounts

    def __str__(self) -> str:
        if not isinstance(self.by, tuple):
            return super().__str__()
        amounts = dict(zip(self.tokens, self.by, strict=True))
        first = repr(self.tokens[0])
        text = str(replace(self, tokens=self.tokens[:1], by=0.0)).replace(f"{first}, ", "", 1)
        return text.replace("by=0.0", f"by={amounts}", 1)

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        _check_once(tokens, self)
        amounts = self._amounts(binding.lm)

        def apply(logits: Logits, here: EditContext) -> Logits:
            fitted = [fitted_number(amount, logits.dtype, "by") for amount in amounts]
            old, new = logits[..., tokens], logits.clone()
            new[..., tokens] += torch.tensor(fitted, dtype=logits.dtype, device=logits.device)
            if old.element_size() <= 2 and any(amounts):
                self._check_rounding(old, new[..., tokens], here)
            return new

        return apply

    def _check_rounding(self, old: Tensor, new: Tensor, here: EditContext) -> None:
        """Raises `BadEdit` if a small dtype rounded all amounts away."""
        unchanged = old == new
        lost = (torch.isfinite(old) & unchanged).any(dim=-1) & unchanged.all(dim=-1)
        if bool(here.real_cells(lost).any()):
            raise BadEdit(
                f"{self} changes nothing at {here.site}: "
                f"{str(old.dtype).removeprefix('torch.')} has no number so near to these "
                "logits; give a larger amount, or run the model in float32"
            )


@check_keywords
def boost(
    *tokens: WordLike | Iterable[WordLike],
    by: float | Mapping[WordLike, float] | str | PathLike[str],
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Boost:
    """Adds `by` to the logits of these tokens: their odds grow by the factor e^by.

    `by` may also be an amount for each token, {" coffee": 2.0, " tea": -1.0}, or the path of a CSV
    file with the columns `token` (or `token_id`) and `by`; then no other tokens are named.

    >>> print(boost(" coffee", by=2.0))
    boost(' coffee', by=2.0)
    """
    if isinstance(by, str | PathLike):
        by = _read_amounts(by)
    if not isinstance(by, Mapping):
        selected, amounts = flatten_tokens(tokens, "boost"), by
    elif tokens:
        raise BadHook(f"by= names its tokens itself: leave out {', '.join(map(repr, tokens))}")
    else:
        selected, amounts = flatten_tokens([list(by)], "boost"), tuple(by.values())
    return Boost(as_sites(site), as_where(pos, rows, step), selected, amounts, when=when)


def _read_lines(path: str | PathLike[str]) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except (BadFile, csv.Error) as error:
        reason = error_message(error.__cause__ or error)
        raise BadHook(
            f"by={str(path)!r} is no file that can be read ({reason}); by= is a number, "
            "amounts, or a path"
        ) from error


def _read_amounts(path: str | PathLike[str]) -> dict[WordLike, float]:
    """Reads the amount for each token from a CSV file. Leading spaces of tokens are kept."""
    rows = _read_lines(path)
    columns = set(rows[0]) if rows else set()
    if "by" not in columns or columns.isdisjoint(("token", "token_id")):
        raise BadHook(
            f"{path} is no table of amounts: it needs a line for each token, under token (or "
            "token_id) and by"
        )
    try:
        amounts = [float(row["by"]) for row in rows]
        if "token_id" in columns:
            tokens: list[WordLike] = [int(row["token_id"]) for row in rows]
        else:
            tokens = [row["token"] for row in rows]
    except (TypeError, ValueError) as error:
        raise BadHook(f"{path} has a value that is no number: {error}") from error
    _check_once(tokens, path)
    return dict(zip(tokens, amounts, strict=True))


def _check_once(tokens: Sequence[WordLike], source: object) -> None:
    """Raises `BadHook` for a token that is named twice, since its amount would be unclear."""
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise BadHook(f"{source} names token {repeated[0]!r} twice: name each once")


@dataclass(frozen=True)
class Cap(TokensEdit, verb="cap"):
    """Lowers tokens to a limit. `cap` returns it."""

    logit: float | None = None
    prob: float | None = None

    def check(self) -> None:
        super().check()
        if (self.logit is None) == (self.prob is None):
            raise BadHook("cap() needs one limit: logit= or prob=")
        if self.logit is not None:
            set_field(self, "logit", check_number(self.logit, "logit"))
            return
        prob = check_number(self.prob, "prob")
        if not 0 < prob < 1:
            raise BadHook(
                f"prob={self.prob!r} is no limit: give a probability between 0 and 1, or ban the "
                "tokens"
            )
        set_field(self, "prob", prob)

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        _check_once(tokens, self)

        def apply(logits: Logits, here: EditContext) -> Logits:
            new = logits.clone()
            exact = logits[..., tokens].to(torch.promote_types(logits.dtype, torch.float32))
            if self.logit is not None:
                limit = fitted_number(self.logit, logits.dtype, "logit")
                new[..., tokens] = round_down(exact.clamp(max=limit), logits.dtype)
                return new
            assert self.prob is not None
            other_logits = logits.to(exact.dtype, copy=True)
            other_logits[..., tokens] = -math.inf
            other_odds = other_logits.logsumexp(dim=-1, keepdim=True)
            odds = exact.logsumexp(dim=-1, keepdim=True) - other_odds
            shift = (math.log(self.prob / (1 - self.prob)) - odds).clamp(max=0)
            new[..., tokens] = round_down(exact + shift, logits.dtype)
            has_none = here.real_cells(~(new.amax(dim=-1) > -math.inf))
            if bool(has_none.any()):
                row = int(has_none.nonzero()[0, 0])
                raise BadEdit(
                    f"{self} cannot be at {here.site}: no other token can be chosen, so these have "
                    f"all the odds{besides_ruling(here, row)}"
                )
            return new

        return apply


@check_keywords
def cap(
    *tokens: WordLike | Iterable[WordLike],
    logit: float | None = None,
    prob: float | None = None,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Cap:
    """Lowers these tokens to a limit: each to a `logit`, or all together to a `prob` (0 to 1).

    Tokens below the limit stay as they are. With `prob` all are lowered by one number, so that
    their odds among each other do not change.

    >>> print(cap(" coffee", prob=0.1))
    cap(' coffee', prob=0.1)
    """
    selected, where = flatten_tokens(tokens, "cap"), as_where(pos, rows, step)
    return Cap(as_sites(site), where, selected, logit, prob, when=when)


@dataclass(frozen=True)
class Swap(LogitEdit, verb="swap", bare=("a", "b"), gives_infinity=True):
    """Exchanges the logits of two tokens. `swap` returns it."""

    a: Token
    b: Token

    def check(self) -> None:
        super().check()
        if self.a == self.b:
            raise BadHook(f"{self} names one token twice: there is nothing to swap")

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        a, b = tokens
        if a == b:
            raise BadHook(f"{self} names one token twice: there is nothing to swap")

        def apply(logits: Logits, here: EditContext) -> Logits:
            new = logits.clone()
            new[..., [a, b]] = logits[..., [b, a]]
            return new

        return apply


@check_keywords
def swap(
    a: Token,
    b: Token,
    *,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> Swap:
    """Exchanges the logits of two tokens. All other logits, probabilities and ranks stay the same.

    >>> print(swap(" coffee", " tea"))
    swap(' coffee', ' tea')
    """
    return Swap(as_sites(site), as_where(pos, rows, step), a, b, when=when)


@dataclass(frozen=True)
class SetRank(LogitEdit, verb="set_rank", bare=("token", "rank")):
    """Moves a token to a rank. `set_rank` returns it."""

    token: Token
    rank: int

    def check(self) -> None:
        super().check()
        rank = as_integer(self.rank)
        if rank is None or rank < 1:
            raise OutOfRange(
                f"rank={describe(self.rank)}: ranks are whole numbers from 1, the most likely token"
            )
        set_field(self, "rank", rank)

    def edit(self, binding: Binding, tokens: list[int]) -> Change:
        (token,) = tokens
        vocab_size = binding.lm.n_tokens or None
        if vocab_size is not None and token >= vocab_size:
            raise BadHook(
                f"token {token} is a row of the vocabulary without a token (they end at "
                f"{vocab_size - 1}): it has no rank"
            )

        def apply(logits: Logits, here: EditContext) -> Logits:
            other_logits = logits[..., :vocab_size].clone()
            count = other_logits.shape[-1]
            if self.rank > count:
                raise OutOfRange(
                    f"rank {self.rank} was asked for, and the vocabulary has {count} tokens"
                )
            other_logits[..., token] = -math.inf
            logit = _logit_for_rank(other_logits, self.rank)
            new = logits.clone()
            new[..., token] = logit
            n_larger = (other_logits > logit[..., None]).sum(dim=-1)
            if bool(here.real_cells((n_larger != self.rank - 1) | logit.isnan()).any()):
                raise BadEdit(
                    f"{self} cannot be: the tokens that would stand before and after it have the "
                    "same logit, or logits are NaN"
                )
            return new

        return apply


def _logit_for_rank(other_logits: Logits, rank: int) -> Float[Tensor, "row pos"]:
    """Returns a logit below exactly `rank - 1` others, unless two of them are equal there."""
    size = other_logits.shape[-1]
    ordered = other_logits.topk(min(rank, size - 1), dim=-1).values  # without the token itself
    if rank == 1:
        return torch.maximum(ordered[..., 0] + 1, next_above(ordered[..., 0]))
    above = ordered[..., rank - 2]
    if rank == size:
        return torch.minimum(above - 1, next_below(above))
    below = ordered[..., rank - 1]
    middle = (above + below) / 2
    return torch.where(middle < above, middle, below)


@check_keywords
def set_rank(
    token: Token,
    rank: int,
    *,
    step: IndicesLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: IndicesLike = None,
    site: str | AnySite = "logits",
) -> SetRank:
    """Gives a token this rank: its logit is midway between its new neighbours.

    Rank 1 is the most likely token; its logit is one above all others, at the last rank one
    below. All other logits stay the same.

    >>> print(set_rank(" coffee", 3))
    set_rank(' coffee', 3)
    """
    return SetRank(as_sites(site), as_where(pos, rows, step), token, rank, when=when)


def next_below(values: Tensor) -> Tensor:
    """Returns the next smaller numbers of the dtype."""
    return -next_above(-values)


def round_down(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers in another dtype, each at most the exact one."""
    new = exact.to(dtype)
    return torch.where(new.to(exact.dtype) > exact, next_below(new), new)
