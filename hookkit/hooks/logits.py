"""What every hook on logits is: where it acts, the tokens that it names, and when.

They act on the logits that the model returns, after any soft-cap or scaling, and before the
decoding rules of `generate`. Unless told otherwise they act at the prompt's last position and at
every generated step. With `when=` they act at those of them where a condition on the logits holds.

Hooks that say which token is chosen: force, ban, restrict.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import checks_keywords, read_token, read_tokens
from ..errors import BadEdit, BadHook, NotOneToken
from ..models.batch_positions import Decided
from ..models.lm import LM
from ..models.positions import CountLike, PosLike, Span, Where, as_count, as_pos
from ..models.sites import LOGITS, AnySite, ModuleSite, Sites, as_sites
from ..models.tokens import Token
from .base import EVERY_STEP, Binding, Change, EditHook, Here, number, put
from .conditions import Begun, Condition, Phrase, When, checked_when, holds
from .rounding import fitted_number, next_above

Logits: TypeAlias = Float[Tensor, "row pos vocab"]


@dataclass(frozen=True)
class LogitEdit(EditHook):
    """A hook that changes logits, everywhere or where a condition holds."""

    when: When | None = field(default=None, kw_only=True)

    names: ClassVar[tuple[str, ...]] = ()  # the fields that name tokens
    phrases: ClassVar[bool] = False  # whether they may be phrases
    takes_step: ClassVar[bool] = True

    def check_sites(self) -> None:
        for site in self.sites:
            if not isinstance(site, ModuleSite) and site.name not in LOGITS:
                raise BadHook(
                    f"an edit of logits cannot act at {site}, which holds no logits: it acts at 'logits', at 'lm_head' "
                    "(before a soft-cap), or at the module that makes the logits, hk.module(path)"
                )

    def check(self) -> None:
        if self.where.pos is None and self.where.step is None:
            put(self, "where", Where(None, self.where.rows, EVERY_STEP))
        checked_when(self.when)
        for name in self.names:
            put(self, name, self._tokens(getattr(self, name)))

    def _tokens(self, value: object) -> object:
        """The token or tokens of a field, each read; ids as whole numbers."""
        named = read_tokens(value, self.verb, also=(Phrase,))
        if not named:
            raise BadHook(f"{self.verb}() names no token: give at least one, as text or id")
        for one in named:
            if isinstance(one, Phrase) and not self.phrases:
                raise BadHook(
                    f"{one!r} is several tokens, and one is meant: phrases are for force and ban"
                )
        if isinstance(value, tuple):
            return named
        if isinstance(value, Phrase):
            return value
        return read_token(value, self.verb)

    @property
    def together(self) -> bool:
        return self.when is not None and not isinstance(self.when, Condition)

    def named(self, lm: LM) -> list[int]:
        """The tokens that the hook names, in its order."""
        ids: list[int] = []
        for name in self.names:
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                ids += one.ids(lm) if isinstance(one, Phrase) else [lm.token(one)]
        return ids

    def change(self, binding: Binding) -> Change:
        apply = self.edit(binding)
        if self.when is None:
            return apply
        holding = holds(self.when, binding.lm)

        def where_it_holds(logits: Logits, here: Here) -> Logits:
            asked = holding(logits, here)
            return torch.where(asked[..., None], apply(logits, replace(here, asked=asked)), logits)

        return where_it_holds

    def edit(self, binding: Binding) -> Change:
        """The change where the condition holds."""
        raise AssertionError(f"{type(self).__name__} says no edit")


def at_logits(
    site: str | AnySite, pos: PosLike, rows: CountLike, step: CountLike
) -> tuple[Sites, Where]:
    """The sites and the steps of a hook on logits; `BadHook` at a site without logits."""
    sites = as_sites(site)
    if pos is None and step is None:
        return sites, Where(None, as_count(rows, "row", negative=False), EVERY_STEP)
    return sites, Where(
        as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False)
    )


Named = TypeVar("Named", bound=Token | Phrase)


def several(named: Iterable[Named | Iterable[Named]], verb: str) -> tuple[Named, ...]:
    """Tokens that were named one by one or in lists, as one list."""
    flat: list[Named] = []
    for one_or_more in named:
        flat += read_tokens(one_or_more, verb, also=(Phrase,))
    if not flat:
        raise BadHook(f"{verb}() names no token: give at least one, as text or id")
    return tuple(flat)


def ids_of(binding: Binding, *named: Token) -> list[int]:
    """The ids of tokens in the model's vocabulary."""
    return [binding.lm.token(one) for one in named]


def check_inside(logits: Logits, here: Here, *tokens: int) -> None:
    """Raise `BadEdit` for a token that the last axis does not have."""
    wrong = [token for token in tokens if token >= logits.shape[-1]]
    if wrong:
        raise BadEdit(
            f"token {wrong[0]} was asked for, and the last axis of {here.site} has {logits.shape[-1]} numbers"
        )


MARGIN = 10.0  # how far above the largest logit a token stands that is to be chosen


@dataclass(frozen=True)
class Force(LogitEdit):
    """Let a token win, or the tokens of a phrase one after the other. Made by `force`."""

    token: Token | Phrase
    margin: float | None = None

    verb: ClassVar[str] = "force"
    bare: ClassVar[tuple[str, ...]] = ("token",)
    names: ClassVar[tuple[str, ...]] = ("token",)
    phrases: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.margin is not None:
            if self.margin != math.inf and number(self.margin, "margin") <= 0:
                raise BadHook(
                    f"margin={self.margin!r} does not put the token first: give a number above 0"
                )
            put(self, "margin", float(self.margin))
        step = self.where.step
        is_open = isinstance(step, Span) and step != EVERY_STEP
        if isinstance(self.token, Phrase) and (self.where.pos is not None or is_open):
            raise BadHook(
                f"{self.token!r} is written from a step on: say step=3, or the steps at which it begins, step=[3, 20]"
            )

    @property
    def gives_infinity(self) -> bool:
        return self.margin == math.inf

    @property
    def decides(self) -> bool:
        """True where the token is chosen whatever the decoding; a margin is a push that sampling
        may overrule.
        """
        return self.margin is None

    def placed(self, lm: LM) -> Where:
        """A phrase that starts at step 3 acts at step 3, 4 … until it is written."""
        if not isinstance(self.token, Phrase) or (
            self.when is not None and self.where.step == EVERY_STEP
        ):
            return self.where
        steps = self._starts()
        taken = sorted({step + count for step in steps for count in range(len(self.token.ids(lm)))})
        if len(taken) < len(steps) * len(self.token.ids(lm)):
            raise BadHook(
                f"{self} would begin again before it is written: {len(self.token.ids(lm))} tokens are needed"
            )
        return replace(self.where, step=tuple(taken))

    def _starts(self) -> list[int]:
        step = self.where.step
        return [0] if step == EVERY_STEP else [step] if isinstance(step, int) else list(step)  # pyright: ignore

    def change(self, binding: Binding) -> Change:
        if not isinstance(self.token, Phrase):
            return super().change(binding)
        ids = self.token.ids(binding.lm)
        if self.when is not None:
            starts = None if self.where.step == EVERY_STEP else self._starts()
            begun = Begun(len(ids), holds(self.when, binding.lm), starts)
            return lambda logits, here: self._written(
                logits, here, ids, begun.offsets(logits, here)
            )
        starts = torch.tensor(self._starts())

        def apply(logits: Logits, here: Here) -> Logits:
            since = here.steps[..., None] - starts
            offsets = torch.where((since >= 0) & (since < len(ids)), since, -1).amax(dim=-1)
            return self._written(logits, here, ids, offsets)

        return apply

    def edit(self, binding: Binding) -> Change:
        assert not isinstance(self.token, Phrase)
        (token,) = _ids(binding, self.token)

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, token)
            tokens = torch.full(logits.shape[:-1], token, device=logits.device)
            return self._first(logits, here, tokens, torch.ones_like(tokens, dtype=torch.bool))

        return apply

    def _written(
        self, logits: Logits, here: Here, ids: list[int], offsets: Int[Tensor, "row pos"]
    ) -> Logits:
        """The logits with the phrase's next token first, where one is due."""
        check_inside(logits, here, *ids)
        offsets = offsets.to(logits.device)
        tokens = torch.tensor(ids, device=logits.device)[offsets.clamp(min=0)]
        due = offsets >= 0
        return torch.where(due[..., None], self._first(logits, here, tokens, due), logits)

    def _first(
        self,
        logits: Logits,
        here: Here,
        tokens: Int[Tensor, "row pos"],
        due: Bool[Tensor, "row pos"],
    ) -> Logits:
        """The logits with these tokens first, which is checked where they are due."""
        index = tokens[..., None]
        if self.margin == math.inf:
            kept = logits.gather(-1, index).clamp(min=torch.finfo(logits.dtype).min)
            new = torch.full_like(logits, -math.inf).scatter(-1, index, kept)
        else:
            margin = fitted_number(
                MARGIN if self.margin is None else self.margin, logits.dtype, "margin"
            )
            largest = logits.amax(dim=-1, keepdim=True)
            pushed = torch.maximum(
                largest + margin, next_above(largest)
            )  # a small margin may be lost by rounding
            new = logits.scatter(-1, index, pushed)
        due = here.real_cells(due)
        self._check_first(new, here, index, due)
        if self.decides:
            decide(self, here, tokens, due)
        return new

    def _check_first(
        self,
        logits: Logits,
        here: Here,
        index: Int[Tensor, "row pos 1"],
        due: Bool[Tensor, "row pos"],
    ) -> None:
        """Raise `BadEdit` where a token is not first, since the logits are NaN or as large as the
        dtype can say.
        """
        others = logits.scatter(-1, index, -math.inf).amax(dim=-1)
        mine = logits.gather(-1, index)[..., 0]
        failed = due & ~((mine > others) & (mine < math.inf))
        if bool(failed.any()):
            row, column = (int(number) for number in failed.nonzero()[0])
            largest = float(others[row, column])
            what = "NaN" if math.isnan(largest) else f"up to {largest:g}"
            raise BadEdit(
                f"{self} cannot put the token first at {here.site}: the other logits of row {here.rows[row]} are "
                f"{what} there, and {str(logits.dtype).removeprefix('torch.')} has no larger number to give"
            )


@checks_keywords
def force(
    token: Token | Phrase,
    *,
    margin: float | None = None,
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Force:
    """Let a token be chosen: its logit is set to the largest one plus 10, and `generate` takes it.

    In `generate`, also under `attach`, it is chosen in every decoding mode: greedy, sampling at any
    temperature, beams, and against transformers' own rules (`suppress_tokens`, `bad_words_ids`,
    `min_new_tokens` …). Where the caller's own `prefix_allowed_tokens_fn` or `logits_processor`
    rules it out, `BadEdit` says so. A hook that comes after this one and puts another token first
    has the last word. In a forward, or in a decoding loop of one's own, only the logit is written.

    With `margin` it is an exact push: the largest logit plus so much, which sampling may overrule
    (at temperature 1, a margin of 10 leaves the others together at most e⁻¹⁰ times their number).
    `margin=math.inf` sets all other logits to -inf. The token is always strictly first: where the
    dtype rounds the margin away, it is the next larger number.

    A phrase is written one token a step, from `step` on (0 unless said otherwise; at each of
    several steps it begins again), or with `when` from each step (of those named) where the
    condition holds and it is not being written already.

    >>> print(force(" coffee"))
    force(' coffee')
    >>> print(force(phrase(" a cup of tea"), when=entropy_above(3.0)))
    force(phrase(' a cup of tea'), when=entropy_above(3.0))
    """
    return Force(*at_logits(site, pos, rows, step), token, margin, when=when)


@dataclass(frozen=True)
class Ban(LogitEdit):
    """Let tokens never be chosen. Made by `ban`."""

    tokens: tuple[Token | Phrase, ...]

    verb: ClassVar[str] = "ban"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)
    names: ClassVar[tuple[str, ...]] = ("tokens",)
    phrases: ClassVar[bool] = True

    @property
    def gives_infinity(self) -> bool:
        return True

    def edit(self, binding: Binding) -> Change:
        tokens = _ids(binding, *(token for token in self.tokens if not isinstance(token, Phrase)))
        phrases = [token.ids(binding.lm) for token in self.tokens if isinstance(token, Phrase)]

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, *tokens, *(ids[-1] for ids in phrases))
            new = logits.clone()
            new[..., tokens] = -math.inf
            for row, place, last in _completed(phrases, here):
                new[row, place, last] = -math.inf
            if bool(here.real_cells(new.amax(dim=-1) == -math.inf).any()):
                raise BadEdit(f"{self} leaves no token to choose at {here.site}")
            return new

        return apply


@checks_keywords
def ban(
    *tokens: Token | Phrase | Iterable[Token | Phrase],
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Ban:
    """Set the logits of these tokens to -inf: their probability is exactly 0.

    Of a phrase, the last token is banned where the tokens before it, in the prompt or generated,
    are all of the others.

    >>> print(ban(" coffee", " tea"))
    ban(' coffee', ' tea')
    """
    return Ban(*at_logits(site, pos, rows, step), several(tokens, "ban"), when=when)


def decide(
    hook: EditHook, here: Here, tokens: Int[Tensor, "row pos"], due: Bool[Tensor, "row pos"]
) -> None:
    """Note for `generate` which token each row is to take, wherever the hook acts at a position
    that chooses one.
    """
    text = here.cells.text
    if not text.generating:
        return
    asked, chosen = due.tolist(), tokens.tolist()
    for index, (row, places) in enumerate(zip(here.cells.rows, here.cells.places, strict=True)):
        for column, place in enumerate(places):
            if asked[index][column]:
                where = text.columns[text.of(row)][place]
                text.decided[row, where] = Decided(chosen[index][column], str(hook))


def _completed(phrases: list[list[int]], here: Here) -> Iterator[tuple[int, int, int]]:
    """The cells at which one token more would complete a phrase, and that token."""
    if not phrases:
        return
    for row, places in enumerate(here.cells.places):
        for column, position in enumerate(places):
            for ids in phrases:
                before = ids[:-1]
                if not before or here.read(row, position, len(before)) == before:
                    yield row, column, ids[-1]


def _ids(binding: Binding, *tokens: Token) -> list[int]:
    try:
        return ids_of(binding, *tokens)
    except NotOneToken as error:
        raise NotOneToken(f"{error} For several tokens in a row, say hk.phrase(text).") from None


@dataclass(frozen=True)
class Restrict(LogitEdit):
    """Let only these tokens be chosen. Made by `restrict`."""

    tokens: tuple[Token, ...]

    verb: ClassVar[str] = "restrict"
    bare: ClassVar[tuple[str, ...]] = ("tokens",)
    names: ClassVar[tuple[str, ...]] = ("tokens",)

    @property
    def gives_infinity(self) -> bool:
        return True

    def edit(self, binding: Binding) -> Change:
        tokens = ids_of(binding, *self.tokens)

        def apply(logits: Logits, here: Here) -> Logits:
            check_inside(logits, here, *tokens)
            new = torch.full_like(logits, -math.inf)
            new[..., tokens] = logits[..., tokens]
            if bool(here.real_cells(new.amax(dim=-1) == -math.inf).any()):
                raise BadEdit(
                    f"{self} leaves no token to choose at {here.site}: all of these were banned before"
                )
            return new

        return apply


@checks_keywords
def restrict(
    *tokens: Token | Iterable[Token],
    step: CountLike = None,
    when: When | None = None,
    pos: PosLike = None,
    rows: CountLike = None,
    site: str | AnySite = "logits",
) -> Restrict:
    """Set the logits of all other tokens to -inf: one of these is chosen, by its own odds.

    >>> print(restrict(" yes", " no"))
    restrict(' yes', ' no')
    """
    return Restrict(*at_logits(site, pos, rows, step), several(tokens, "restrict"), when=when)
