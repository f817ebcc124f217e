"""Whether a dictionary belongs to a model: its site, widths and name, and its reconstruction.

A file that is read with a wrong normalization, bias or site gives wrong numbers without an error.
A forward over a short text shows the mistake: most features are active or none is, or the
reconstruction is no better than the mean.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..errors import OtherModel
from ..hooks.capture import capture
from ..hooks.edits import scale
from ..models.dictionaries import site_of_features
from ..models.lm import LM
from ..models.prompts import Prompts, as_rows
from ..runs.forward import forward
from ..runs.run import Run
from .dictionary import Dictionary

MAX_ACTIVE = 0.5  # of the features, on average; trained dictionaries have less than 0.1
MAX_ERROR = 1.0  # the error of a reconstruction that is the mean everywhere
TEXT = (
    "The harbour was quiet in the morning. Two fishing boats had left before dawn, and the gulls "
    "were waiting for them on the wall. In 1912 the town built a second pier, which cost 40,000 "
    'pounds; it was paid for by a tax on salt. "Nobody thanked us," the mayor wrote to his '
    'sister, "but the ships came." Today the old customs house is a library. Its reading room has '
    "large windows, wooden chairs and a map of the coast that children like to touch."
)


@dataclass(frozen=True)
class Fit:
    """How a dictionary describes a model on a text, over all positions but the first.

    active  the mean number of active features at a position
    share   the same as a share of all features
    error   the fraction of variance unexplained: squared error over squared distance to the mean
    """

    active: float
    share: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.active:.1f} features ({self.share:.1%}) are active at a position and the "
            f"fraction of variance unexplained is {self.error:.2f}"
        )


def prepare(dictionary: Dictionary, lm: LM, *, replaces: bool, check: bool) -> Dictionary:
    """Returns a dictionary for an LM. Raises `OtherModel` if it does not fit the model."""
    check_widths(dictionary, lm)
    if check:
        _check_name(dictionary, lm)
        _check_fit(dictionary, measure_fit(dictionary, lm, _text(lm)))
    if not replaces:
        return dictionary
    lm.refuse_engine("replace=True measures the loss, from the logits at every position")
    return dictionary.replacing(_cost(dictionary.replacing(""), lm))


def measure_fit(dictionary: Dictionary, lm: LM, prompts: Prompts) -> Fit:
    """Returns how a dictionary describes a model on some prompts."""
    sites = list(dict.fromkeys([dictionary.reads, dictionary.site]))
    run = forward(lm, prompts, capture(sites, pos=slice(1, None)), logits=False)
    positions = run.captured(dictionary.site).positions
    assert positions is not None
    is_real = positions >= 0
    with torch.no_grad():
        inputs = run[dictionary.reads][is_real].flatten(1)
        values = run[dictionary.site][is_real].flatten(1)
        features = dictionary.encode(inputs)
        errors = values.to(features.dtype) - dictionary.decode(features, inputs=inputs)
        spread = (values - values.mean(0)).to(features.dtype)
        active = float((features != 0).sum(-1).double().mean())
    error = float(errors.square().sum() / spread.square().sum())
    return Fit(active, active / dictionary.n_features, error)


def _text(lm: LM) -> Prompts:
    """Returns a short text, as token ids if the model has no tokenizer."""
    if lm.tokenizer is not None:
        return [as_rows(lm, TEXT)[0][: lm.context]]
    return [tuple(number * 7 % (lm.n_tokens or 1) for number in range(1, 65))]


def check_widths(dictionary: Dictionary, lm: LM) -> None:
    """Raises `OtherModel` if the site has another width in this model."""
    weights = dictionary.weights
    widths = {dictionary.reads: weights["W_enc"].shape[0]}
    if dictionary.site != dictionary.reads:
        widths[dictionary.site] = weights["W_dec"].shape[1]
    for site, width in widths.items():
        model_width = prod(lm.shape(site))
        if width != model_width:
            raise OtherModel(
                f"the dictionary has {width} numbers at {site}, and this model has {model_width}: "
                "it is of another model, or of another site (at=)"
            )


def _check_name(dictionary: Dictionary, lm: LM) -> None:
    """Raises `OtherModel` if both names are known, and neither is a part of the other."""
    name = lm.name or str(getattr(lm.config, "_name_or_path", ""))
    if not dictionary.model_name or not name or os.path.exists(name):
        return
    one, other = map(_short_name, (dictionary.model_name, name))
    if one not in other and other not in one:
        raise OtherModel(
            f"the dictionary was made for {dictionary.model_name!r}, and this model is {name!r}: "
            "load its own model, or leave this check out with check=False"
        )


def _short_name(name: str) -> str:
    """Returns a model's name without its owner, as both the Hub and TransformerLens write it."""
    short = name.split(" ")[0].rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-")
    return "gpt2" if short == "gpt2-small" else short


def _check_fit(dictionary: Dictionary, fit: Fit) -> None:
    fits = 0 < fit.share <= MAX_ACTIVE and fit.error < MAX_ERROR
    if not fits:
        raise OtherModel(
            f"the dictionary does not describe this model: on a short text {fit}. A dictionary "
            f"that fits has fewer than {MAX_ACTIVE:.0%} active and less than {MAX_ERROR:g} "
            "unexplained. Check the model and at=, and in the file's settings the normalization "
            f"({dictionary.normalization}) and whether the bias is subtracted before encoding "
            f"({dictionary.centred}); for a dictionary that is not trained: check=False"
        )


def _cost(replacing: Dictionary, lm: LM) -> str:
    """Returns in words what the reconstruction of a site costs on a short text."""
    text = _text(lm)
    with_features = LM(lm.model, lm.tokenizer, lm.name, lm.row, (replacing,), lm.processor)
    before = _loss(forward(lm, text))
    splice = scale(site_of_features(replacing), 1.0)
    after = _loss(forward(with_features, text, splice))
    return f"replaces the values: loss {before:.3f} to {after:.3f} nats on a short text"


def _loss(run: Run) -> float:
    logits = run.logits[0, :-1].float().cpu()
    return float(nn.functional.cross_entropy(logits, run.tokens[0, 1:].cpu()))
