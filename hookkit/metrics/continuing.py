"""The loss of a text that follows the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadPrompt, Unsupported
from ..model import LM
from ..prompts import shortened
from .metric import Measure, Metric, Said


@dataclass(frozen=True)
class Loss(Metric):
    """The loss of a continuation. Made by `loss`."""

    continuation: str | list[str] | tuple[int, ...]

    name: ClassVar[str] = "loss"

    def tokens(self, lm: LM, count: int) -> list[tuple[int, ...]]:
        """The tokens of each prompt's continuation."""
        given = self.continuation
        each = list(given) if isinstance(given, list) else [given] * count
        if len(each) != count:
            raise BadPrompt(
                f"loss has {len(each)} continuations, and there are {count} prompts: give one for each, or one"
            )
        rows = [_continuation(lm, text) for text in each]
        if not all(rows):
            raise BadPrompt("loss was given an empty continuation: give the text whose loss is meant")
        return rows

    def bound(self, lm: LM, count: int) -> Measure:
        wanted = self.tokens(lm, count)

        def measure(said: Said) -> Tensor:
            if said.after is None:
                raise Unsupported(
                    "loss reads a continuation, which a sweep feeds to the model; a run has none: see surprisal"
                )
            found = []
            for row, logits in zip(said.rows, said.after, strict=True):
                ids = torch.tensor(wanted[row], device=logits.device)
                found.append(-logits.log_softmax(-1).gather(1, ids[:, None]).mean())
            return torch.stack(found)

        return measure


def _continuation(lm: LM, given: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(given, int):
        raise BadPrompt(f"loss was given {given}, one token: a continuation is a text, or ids in a tuple")
    if isinstance(given, str) and given and lm.tokenizer is None:
        raise BadPrompt(f"{shortened(given)!r} is text, and this model came without a tokenizer: give token ids")
    return tuple(lm.token(token) for token in (lm.continuation(given) if isinstance(given, str) and given else given))


def loss(continuation: str | list[str] | tuple[int, ...]) -> Loss:
    """The mean loss of a text that follows the prompt, in nats per token; a list has one text for each prompt.

    Edits act at the positions that they name. The continuation comes behind the prompt, so that pos=-1 is still the
    prompt's last token, and an edit without positions acts on the continuation too.
    """
    return Loss(continuation)
