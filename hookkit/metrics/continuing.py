"""The loss of a text that follows the prompt."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import as_whole, checks_keywords, described, prompt_rows
from ..errors import BadPrompt, EmptySelection, Unsupported
from ..model import LM
from ..prompts import shortened
from .metric import Measure, Metric, Said


@dataclass(frozen=True)
class Loss(Metric):
    """The loss of a continuation. Made by `loss`."""

    continuation: str | tuple[int, ...] | list[str] | list[str | tuple[int, ...]]

    name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        given = self.continuation
        is_list = isinstance(given, list)
        entries = given if is_list else [given]
        if not entries:
            raise EmptySelection("loss was given an empty list of continuations: a list has one for each prompt")
        kept = [_read(entry) for entry in entries]
        object.__setattr__(self, "continuation", kept if is_list else kept[0])

    def tokens(self, lm: LM, count: int) -> list[tuple[int, ...]]:
        """The tokens of each prompt's continuation."""
        given = self.continuation
        entries = given if isinstance(given, list) else [given] * count
        if len(entries) != count:
            raise BadPrompt(
                f"loss has {len(entries)} continuations, and there are {count} prompts: give one for each, or one"
            )
        return [_tokens_of(lm, entry) for entry in entries]

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


def _read(continuation: object) -> str | tuple[int, ...]:
    """One continuation: a text, or token ids as a tuple."""
    if isinstance(continuation, str):
        if not continuation:
            raise BadPrompt("loss was given an empty continuation: give the text whose loss is meant")
        return str(continuation)
    if as_whole(continuation) is not None:
        raise BadPrompt(f"loss was given {continuation}, one token: a continuation is a text, or ids in a tuple")
    rows = prompt_rows(continuation)
    if len(rows) != 1 or isinstance(rows[0], str):
        raise BadPrompt(
            f"loss was given {described(continuation)} as one continuation: give a text, ids in a tuple, or a list "
            "with one for each prompt"
        )
    return rows[0]


def _tokens_of(lm: LM, continuation: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(continuation, str) and lm.tokenizer is None:
        raise BadPrompt(f"{shortened(continuation)!r} is text, and this model came without a tokenizer: give token ids")
    ids = lm.continuation(continuation) if isinstance(continuation, str) else continuation
    return tuple(lm.token(token_id) for token_id in ids)


@checks_keywords
def loss(continuation: str | list[str] | tuple[int, ...]) -> Loss:
    """The mean loss of a text that follows the prompt, in nats per token; a list has one text for each prompt.

    Edits act at the positions that they name. The continuation comes behind the prompt, so that pos=-1 is still the
    prompt's last token, and an edit without positions acts on the continuation too.
    """
    return Loss(continuation)
