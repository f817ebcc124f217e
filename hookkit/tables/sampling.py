"""Warping: what temperature, top-k and top-p make of one distribution, with transformers' own rules.

    hk.warped(run, temperature=(0.5, 1, 2), top_p=0.9)

Temperature divides all logits, and changes no rank. Top-k keeps the k most likely tokens, top-p (nucleus sampling) the
fewest that together have the probability p; the rest get probability 0, and those kept share what they had.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..arguments import checks_arguments, finite_number, items_of, whole_number
from ..errors import BadHook
from ..models.positions import CountLike, PosLike
from ..models.tokens import shown_ranks
from ..runs.run import Run
from .distributions import Distribution, distributions

Warper = Callable[[Tensor], Tensor]


@checks_arguments
def warped(
    run: Run,
    *,
    pos: PosLike = -1,
    rows: CountLike = None,
    temperature: float | Sequence[float] = (),
    top_k: int | Sequence[int] = (),
    top_p: float | Sequence[float] = (),
    top: int = 5,
) -> pd.DataFrame:
    """One distribution as the model gives it, and under each of these settings, each alone: what sampling draws from.

    Columns: row, pos, setting ("as it is", "temperature=0.5", …), token, token_id, prob, rank, kept (False where the
    setting took the token out), and of the whole distribution tokens_kept, entropy (nats) and perplexity (e^entropy).
    The tokens are the first `top` of the distribution as it is, so that every setting shows the same. `pos` is the
    prompt's last position unless said otherwise.

    They are the warpers that `generate` samples with (temperature: Ackley et al. 1985; top_k: Fan et al. 2018; top_p:
    Holtzman et al. 2020). Raises `BadHook` for values that they cannot take, or where no setting is given.

    >>> warped(run, temperature=0.5, top_k=1, top=1)[["setting", "prob", "tokens_kept"]].round(3)
               setting   prob  tokens_kept
    0         as it is  0.152        49152
    1  temperature=0.5  0.405        49152
    2          top_k=1  1.000            1
    """
    rules = list(_rules(temperature, top_k, top_p))
    if not rules:
        raise BadHook(
            "no setting was given: say temperature=(0.5, 1, 2), top_k=(5, 50) or top_p=(0.5, 0.9)"
        )
    whole_number(top, "top", least=1, meaning="how many tokens to show,")
    parts = []
    for said in distributions(run, pos=pos, rows=rows):
        ids = torch.tensor(said.top(top))
        parts.append(_shown("as it is", said, ids))
        for name, warper in rules:
            logits = warper(said.logits[None].clone())[0]
            parts.append(_shown(name, Distribution(said.lm, said.place, logits), ids))
    return pd.concat(parts, ignore_index=True)


def _shown(setting: str, said: Distribution, ids: Tensor) -> pd.DataFrame:
    return pd.DataFrame(
        {
            **said.place,
            "setting": setting,
            "token": [repr(said.lm.string(token)) for token in ids.tolist()],
            "token_id": ids.tolist(),
            "prob": said.probs[ids].double().tolist(),
            "rank": shown_ranks(said.ranks(ids)).tolist(),
            "kept": (said.logits[ids] > -math.inf).tolist(),
            "tokens_kept": int((said.real > -math.inf).sum()),
            "entropy": said.entropy,
            "perplexity": math.exp(said.entropy),
        }
    )


def _rules(temperature: Any, top_k: Any, top_p: Any) -> Iterator[tuple[str, Warper]]:
    """The name of each setting and the function that transformers has for it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for given in _several(temperature):
        value = finite_number(
            given, "temperature", above=0.0, meaning="a temperature (greedy is top_k=1),"
        )
        yield f"temperature={value:g}", _called(TemperatureLogitsWarper(float(value)))
    for given in _several(top_k):
        value = whole_number(given, "top_k", least=1, meaning="how many tokens,", error=BadHook)
        yield f"top_k={value}", _called(TopKLogitsWarper(value))
    for given in _several(top_p):
        value = finite_number(given, "top_p", above=0.0, most=1.0, meaning="a probability")
        yield f"top_p={value:g}", _called(TopPLogitsWarper(float(value)))


def _called(warper: Any) -> Warper:
    return lambda logits: warper(None, logits)  # these three do not look at the tokens before


def _several(values: Any) -> list[Any]:
    items = items_of(values)
    return [values] if items is None else items


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(fits: bool, word: str, value: object, wanted: str) -> None:
    if not fits:
        raise BadHook(f"{word}={value!r}: give {wanted}")
