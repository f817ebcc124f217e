"""The quality of a dictionary on texts: FVU, L0, dead features, and the loss that is recovered.

The measures are those of SAEBench (Karvonen et al. 2025): the reconstruction, the mean or zeros are
put in place of the site's values, and the model's loss is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..arguments import check_arguments
from ..data.harvest.texts import Batch, Rules, TextReader, TextsLike, read_rules
from ..errors import EmptySelection, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import edit
from ..models.lm import LM
from ..runs.forward import forward
from ..runs.run import Run
from ..tables.intervals import Estimates, ratios
from .dictionary import Dictionary
from .fit_to_model import check_widths

AFTER_FIRST = slice(1, None)
OUTLIER = 10.0  # times the median norm: values beyond it are left out
CHUNK = 1024  # tokens whose features are computed at once
CONFIDENCE, RESAMPLES = 0.95, 2000


def are_no_outliers(norms: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
    """Returns which values have at most ten times the median norm.

    The others are attention sinks: a few tokens with huge norms, which do not depend on the text.
    """
    return norms <= OUTLIER * norms.median()


@dataclass(frozen=True, eq=False)
class TextValues:
    """The values of one batch of texts at the sites, without their first position.

    `measured` is True where a token is measured; `values` are those of the dictionary's site, and
    `inputs` those that it encodes [row, pos, ...]. `losses` are each text's sum over its tokens.
    """

    texts: list[tuple[int, ...]]
    values: Float[Tensor, "row pos ..."]
    inputs: Float[Tensor, "row pos ..."]
    measured: Bool[Tensor, "row pos"]
    losses: list[float]


@check_arguments
def measure_quality(
    dictionary: Dictionary, lm: LM, texts: TextsLike, *, context: int | None, batch_tokens: int
) -> pd.DataFrame:
    """Returns the table of `Dictionary.quality`."""
    if lm.is_masked:
        raise Unsupported("a masked language model has no loss of the next token to recover")
    check_widths(dictionary, lm)
    rules = read_rules(lm, AFTER_FIRST, context, "truncate", "skip", batch_tokens)
    batches: list[TextValues] = []
    for batch in _batches(lm, texts, rules):
        batches.append(_clean_values(dictionary, lm, batch))
    if not batches:
        raise EmptySelection("no text has a second token: give texts with at least two")
    _leave_out_outliers(batches)
    return _table(dictionary, lm, batches)


def _batches(lm: LM, texts: TextsLike, rules: Rules) -> Iterator[Batch]:
    reader = TextReader(lm, texts, rules)
    while window := reader.read_window():
        yield from window.batches(rules)


def _clean_values(dictionary: Dictionary, lm: LM, batch: Batch) -> TextValues:
    texts = [tuple(sequence.ids) for sequence in batch.sequences]
    sites = list(dict.fromkeys([dictionary.reads, dictionary.site]))
    run = forward(lm, texts, capture(sites, pos=AFTER_FIRST))
    positions = run.captured(dictionary.site).positions
    assert positions is not None
    values, inputs = run[dictionary.site], run[dictionary.reads]
    return TextValues(texts, values, inputs, (positions >= 0).to(values.device), _losses(run))


def _losses(run: Run) -> list[float]:
    """Returns the sum of the losses of each text's tokens, all but the first."""
    losses: list[float] = []
    for row, length in enumerate(run.lengths):
        logits = run.logits[row, : length - 1].float()
        targets = run.tokens[row, 1:length].to(logits.device)
        losses.append(float(cross_entropy(logits, targets, reduction="sum")))
    return losses


def _leave_out_outliers(batches: list[TextValues]) -> None:
    """Marks outliers as not measured, in place."""
    norms: list[Tensor] = []
    for batch in batches:
        norms.append(batch.values[batch.measured].flatten(1).float().norm(dim=-1))
    are_measured = are_no_outliers(torch.cat(norms)).split(list(map(len, norms)))
    for batch, is_measured in zip(batches, are_measured, strict=True):
        batch.measured[batch.measured.clone()] = is_measured


def _table(dictionary: Dictionary, lm: LM, batches: list[TextValues]) -> pd.DataFrame:
    total = sum(batch.values[batch.measured].double().sum(0) for batch in batches)
    count = sum(int(batch.measured.sum()) for batch in batches)
    assert isinstance(total, Tensor)
    mean = total / count
    sums: dict[str, list[float]] = {name: [] for name in ("tokens", "error", "spread", "active")}
    losses: dict[str, list[float]] = {name: [] for name in ("clean", "reconstruction")}
    losses |= {"mean": [], "zero": []}
    predicted: list[int] = []
    fired = torch.zeros(dictionary.n_features, dtype=torch.bool, device=mean.device)
    for batch in batches:
        decoded = torch.zeros_like(batch.values)
        for row in range(len(batch.texts)):
            measured = batch.measured[row]
            values = batch.values[row, measured]
            features, written = _reconstruct(dictionary, batch.inputs[row, measured])
            decoded[row, measured] = written.reshape(values.shape).to(values.dtype)
            error = (values.double() - decoded[row, measured].double()).square().sum()
            sums["tokens"].append(float(len(values)))
            sums["error"].append(float(error))
            sums["spread"].append(float((values.double() - mean).square().sum()))
            sums["active"].append(float((features != 0).sum()))
            fired |= (features != 0).any(0)
        losses["clean"] += batch.losses
        replaced = {"reconstruction": decoded, "mean": mean.to(decoded.dtype), "zero": 0.0}
        for name, replacement in replaced.items():
            losses[name] += _losses(
                forward(lm, batch.texts, _replace(dictionary, batch, replacement))
            )
        predicted += [len(text) - 1 for text in batch.texts]
    return _quality_table(sums, losses, predicted, float((~fired).double().mean()))


def _reconstruct(dictionary: Dictionary, inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        flat = inputs.flatten(1)
        features = dictionary.encode(flat)
        return features, dictionary.decode(features, inputs=flat)


def _replace(dictionary: Dictionary, batch: TextValues, replacement: Tensor | float) -> Hook:
    """Returns a hook that replaces the measured values of a batch."""
    measured = batch.measured.reshape(*batch.measured.shape, *[1] * (batch.values.ndim - 2))

    def replace(values: Tensor) -> Tensor:
        new = torch.as_tensor(replacement, dtype=values.dtype, device=values.device)
        return torch.where(measured, new, values)

    return edit(dictionary.site, replace, pos=AFTER_FIRST)


def _quality_table(
    sums: dict[str, list[float]],
    losses: dict[str, list[float]],
    predicted: list[int],
    dead_share: float,
) -> pd.DataFrame:
    """Returns the table. Every measure but the share of dead features is a ratio of two sums."""
    loss = {name: np.array(values) for name, values in losses.items()}
    pairs: dict[str, tuple[Any, Any]] = {}
    pairs["fvu"] = sums["error"], sums["spread"]
    pairs["l0"] = sums["active"], sums["tokens"]
    for name, values in loss.items():
        pairs[f"loss_{name}"] = (values, predicted)
    for ending, name in (("", "zero"), ("_from_mean", "mean")):
        recovered, lost = loss[name] - loss["reconstruction"], loss[name] - loss["clean"]
        pairs[f"loss_recovered{ending}"] = (recovered, lost)
    rows = []
    for name, pair in pairs.items():
        numerators, denominators = (np.asarray(values, dtype=float)[None] for values in pair)
        estimate: Estimates = ratios(numerators, denominators, CONFIDENCE, RESAMPLES, 0)
        limits = float(estimate.mean[0]), float(estimate.low[0]), float(estimate.high[0])
        rows.append((name, *limits))
    rows.insert(2, ("dead_share", dead_share, float("nan"), float("nan")))
    table = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
    return table.assign(texts=len(predicted), tokens=int(sum(sums["tokens"])))
