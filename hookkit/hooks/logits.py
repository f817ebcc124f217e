"""What every hook on logits is: where it acts, the tokens that it names, and when.

They act on the logits that the model returns, after any soft-cap or scaling, and before the decoding rules of
`generate`. Unless told otherwise they act at the prompt's last position and at every generated step. With `when=` they
act at those of them where a condition on the logits holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import read_token, read_tokens
from ..errors import BadEdit, BadHook
from ..model import LM
from ..positions import CountLike, PosLike, Where, as_count, as_pos
from ..sites import LOGITS, AnySite, ModuleSite, Sites, as_sites
from ..vocabulary import Token
from .base import EVERY_STEP, Binding, Change, EditHook, Here, put
from .conditions import Condition, When, checked_when, holds
from .phrases import Phrase

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
                raise BadHook(f"{one!r} is several tokens, and one is meant: phrases are for force and ban")
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


def at_logits(site: str | AnySite, pos: PosLike, rows: CountLike, step: CountLike) -> tuple[Sites, Where]:
    """The sites and the steps of a hook on logits; `BadHook` at a site without logits."""
    sites = as_sites(site)
    if pos is None and step is None:
        return sites, Where(None, as_count(rows, "row", negative=False), EVERY_STEP)
    return sites, Where(as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False))


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
