"""Warped distributions: the effect of temperature, top-k and top-p, with transformers' own rules.

    hk.warped(run, temperature=(0.5, 1, 2), top_p=0.9)

Temperature divides all logits and changes no rank. Top-k keeps the k most likely tokens. Top-p
(nucleus sampling) keeps the fewest tokens that together have the probability p. The other tokens
get probability 0, which is shared among those that are kept.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from ..arguments import as_items, check_arguments, check_integer, check_number
from ..errors import BadHook
from ..models.positions import IndicesLike, PosLike
from ..runs.run import Run
from .distributions import distributions


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
        for setting, warper in [("as it is", None), *warpers]:
            result = distribution
            if warper is not None:  # these three do not read the token ids
                result = replace(distribution, logits=warper(None, distribution.logits[None])[0])
            numbers = result.numbers(ids)
            columns = {
                **result.location,
                "setting": setting,
                **result.names(ids),
                "prob": numbers["prob"],
                "rank": numbers["rank"],
                "kept": (result.logits[ids] > -math.inf).tolist(),
                "tokens_kept": int((result.real > -math.inf).sum()),
                "entropy": result.entropy,
                "perplexity": math.exp(result.entropy),
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _warpers(temperature: Any, top_k: Any, top_p: Any) -> Iterator[tuple[str, Any]]:
    """Returns the name of each setting and the warper that transformers has for it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for item in _items(temperature):
        meaning = "a temperature (greedy is top_k=1),"
        value = check_number(item, "temperature", above=0.0, meaning=meaning)
        yield f"temperature={value:g}", TemperatureLogitsWarper(float(value))
    for item in _items(top_k):
        value = check_integer(item, "top_k", least=1, meaning="how many tokens,", error=BadHook)
        yield f"top_k={value}", TopKLogitsWarper(value)
    for item in _items(top_p):
        value = check_number(item, "top_p", above=0.0, most=1.0, meaning="a probability")
        yield f"top_p={value:g}", TopPLogitsWarper(float(value))


def _items(values: Any) -> list[Any]:
    items = as_items(values)
    return [values] if items is None else items
