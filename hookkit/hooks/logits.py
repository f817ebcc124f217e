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

from ..errors import BadEdit, BadHook
from ..model import LM
from ..positions import CountLike, PosLike, Where, as_count, as_pos
from ..sites import LOGITS, AnySite, ModuleSite, Sites, as_sites
from ..vocabulary import Token
from .base import EVERY_STEP, Binding, Change, EditHook, Here
from .conditions import Condition, When, holds
from .phrases import Phrase

Logits: TypeAlias = Float[Tensor, "row pos vocab"]


@dataclass(frozen=True)
class LogitEdit(EditHook):
    """A hook that changes logits, everywhere or where a condition holds."""

    when: When | None = field(default=None, kw_only=True)

    names: ClassVar[tuple[str, ...]] = ()  # the fields that name tokens

    @property
    def together(self) -> bool:
        return self.when is not None and not isinstance(self.when, Condition)

    def named(self, lm: LM) -> list[int]:
        """The tokens that the hook names, in its order."""
        given = [getattr(self, name) for name in self.names]
        tokens = [each for value in given for each in (value if isinstance(value, tuple) else (value,))]
        return [i for token in tokens for i in (token.ids(lm) if isinstance(token, Phrase) else [lm.token(token)])]

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


Named = TypeVar("Named", bound=Token | Phrase)


def several(tokens: Iterable[Named | Iterable[Named]], verb: str) -> tuple[Named, ...]:
    """Tokens that were named one by one or in lists, as one list."""
    flat: list[Named] = []
    for token in tokens:
        flat += [token] if isinstance(token, str | int | Phrase) else token  # pyright: ignore
    if not flat:
        raise BadHook(f"{verb}() names no token: give at least one, as text or id")
    return tuple(flat)


def ids_of(binding: Binding, *tokens: Token) -> list[int]:
    """The ids of tokens in the model's vocabulary."""
    for token in tokens:
        if isinstance(token, Phrase):
            raise BadHook(f"{token!r} is several tokens, and one is meant: phrases are for force and ban")
    return [binding.lm.token(token) for token in tokens]


def check_inside(logits: Logits, here: Here, *tokens: int) -> None:
    """Raise `BadEdit` for a token that the last axis does not have."""
    wrong = [token for token in tokens if token >= logits.shape[-1]]
    if wrong:
        raise BadEdit(
            f"token {wrong[0]} was asked for, and the last axis of {here.site} has {logits.shape[-1]} numbers"
        )
