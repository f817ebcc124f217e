"""Warped distributions: the effect of temperature, top-k and top-p, with transformers' own rules.

    hk.warped(run, temperature=(0.5, 1, 2), top_p=0.9)

Temperature divides all logits and changes no rank. Top-k keeps the k most likely tokens. Top-p
(nucleus sampling) keeps the fewest tokens that together have the probability p. The other tokens
get probability 0, which is shared among those that are kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..arguments import as_items, check_arguments, check_integer, check_number
from ..errors import BadHook
from ..models.next_token import ranks_for_table
from ..models.positions import IndicesLike, PosLike
from ..runs.run import Run
from .distributions import Distribution, distributions, token_texts

Warper = Callable[[Tensor], Tensor]


@check_arguments
def warped(
    run: Run,
    *,
    pos: PosLike = -1,
    rows: IndicesLike = None,
    temperature: float | Sequence[float] = (),
    top_k: int | Sequence[int] = (),
    top_p: float | Sequence[float] = (),
    top: int = 5,
) -> pd.DataFrame:
    """The distribution of the model, and the one that sampling draws from with each setting alone.

    Columns: row, pos, setting ("as it is", "temperature=0.5", …), token, token_id, prob, rank, kept
    (False if the setting took the token out), and of the whole distribution tokens_kept, entropy
    (nats) and perplexity (e^entropy). Every setting shows the same tokens: the first `top` of the
    distribution as it is. `pos` is the prompt's last position by default.

    The settings are the warpers that `generate` samples with (temperature: Ackley et al. 1985;
    top_k: Fan et al. 2018; top_p: Holtzman et al. 2020). Raises `BadHook` for values that they
    cannot take, or if no setting is given.

    >>> warped(run, temperature=0.5, top_k=1, top=1)[["setting", "prob", "tokens_kept"]].round(3)
               setting   prob  tokens_kept
    0         as it is  0.152        49152
    1  temperature=0.5  0.405        49152
    2          top_k=1  1.000            1
    """
    warpers = list(_warpers(temperature, top_k, top_p))
    if not warpers:
        raise BadHook(
            "no setting was given: say temperature=(0.5, 1, 2), top_k=(5, 50) or top_p=(0.5, 0.9)"
        )
    check_integer(top, "top", least=1, meaning="how many tokens to show,")
    parts = []
    for distribution in distributions(run, pos=pos, rows=rows):
        ids = torch.tensor(distribution.top(top))
        parts.append(_part("as it is", distribution, ids))
        for setting, warper in warpers:
            logits = warper(distribution.logits[None].clone())[0]
            result = Distribution(distribution.lm, distribution.location, logits)
            parts.append(_part(setting, result, ids))
    return pd.concat(parts, ignore_index=True)


def _part(setting: str, distribution: Distribution, ids: Tensor) -> pd.DataFrame:
    return pd.DataFrame(
        {
            **distribution.location,
            "setting": setting,
            "token": token_texts(distribution.lm, ids.tolist()),
            "token_id": ids.tolist(),
            "prob": distribution.probs[ids].double().tolist(),
            "rank": ranks_for_table(distribution.ranks(ids)).tolist(),
            "kept": (distribution.logits[ids] > -math.inf).tolist(),
            "tokens_kept": int((distribution.real > -math.inf).sum()),
            "entropy": distribution.entropy,
            "perplexity": math.exp(distribution.entropy),
        }
    )


def _warpers(temperature: Any, top_k: Any, top_p: Any) -> Iterator[tuple[str, Warper]]:
    """Returns the name of each setting and the function that transformers has for it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for item in _items(temperature):
        meaning = "a temperature (greedy is top_k=1),"
        value = check_number(item, "temperature", above=0.0, meaning=meaning)
        yield f"temperature={value:g}", _as_function(TemperatureLogitsWarper(float(value)))
    for item in _items(top_k):
        value = check_integer(item, "top_k", least=1, meaning="how many tokens,", error=BadHook)
        yield f"top_k={value}", _as_function(TopKLogitsWarper(value))
    for item in _items(top_p):
        value = check_number(item, "top_p", above=0.0, most=1.0, meaning="a probability")
        yield f"top_p={value:g}", _as_function(TopPLogitsWarper(float(value)))


def _as_function(warper: Any) -> Warper:
    return lambda logits: warper(None, logits)  # these three do not read the token ids


def _items(values: Any) -> list[Any]:
    items = as_items(values)
    return [values] if items is None else items
