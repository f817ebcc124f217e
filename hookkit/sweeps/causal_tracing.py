"""Causal tracing: the subject is blurred by noise, and one clean state at a time is put back (Meng et al. 2022)."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import pandas as pd
import torch
from torch import Tensor

from ..arguments import checks_arguments, described, finite_number, items_of
from ..errors import BadHook, BadPrompt
from ..hooks.ablation import patch
from ..hooks.base import Hook, number
from ..hooks.capture import capture
from ..hooks.edits import steer
from ..models.lm import LM
from ..models.positions import At, CountLike, at
from ..models.prompts import Prompts, Row, as_batch, as_rows, cover
from ..models.sites import WHOLE_MODEL, Site
from ..runs.forward import forward
from .cells import as_hooks, listed
from .grids import Metrics, Positions, positions_of
from .sweep import Settings, sweep

TOGETHER, WIDTH = 64, 64  # rows of one forward, and tokens of a row, while embeddings are read


@checks_arguments
def causal_tracing(
    lm: LM,
    prompts: Prompts,
    subject: str | At | Sequence[str | At],
    metrics: Metrics,
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    pos: Positions = None,
    window: int = 1,
    noise: float = 3.0,
    noise_over: Prompts | None = None,
    samples: int = 10,
    seed: int = 0,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """How much of what noise on the subject destroys comes back when one clean state is restored (Meng et al. 2022).

    Normal noise is added to the embeddings of the subject's tokens, `noise` times as large as the standard deviation of
    embeddings, drawn `samples` times for each prompt. The standard deviation is one number for a model: that of the
    embeddings of the whole vocabulary, or of the tokens of `noise_over` (texts or ids; the paper takes the subjects of
    a thousand facts). Then the clean value of `site` is put back at each layer and position, in `window` layers around
    it (the paper takes 1 for the stream and 10 for attn_out and mlp_out; at the ends there are fewer). The effect is 0
    where the noise stands and 1 where the clean value came back. A prompt has the same noise alone and among others.

    `subject` is the text of the subject, or one for each prompt. Columns: layer, pos, row, those of `sweep`, prompt and
    sample: `row` counts prompts times samples, and `prompt` and `sample` say which it is. `attrs["noise_std"]` is the
    standard deviation of the noise.
    """
    batch = as_batch(lm, prompts)
    items = items_of(subject)
    names: list[Any] = [subject] * len(batch.rows) if items is None else items
    for name in names:
        if not isinstance(name, str | At):
            raise BadPrompt(
                f"subject={described(name)}: give its text, hk.at(text), or a list with one for each prompt"
            )
    if len(names) != len(batch.rows):
        raise BadPrompt(
            f"{len(names)} subjects were given, and there are {len(batch.rows)} prompts: give as many, or one"
        )
    if samples < 1 or window < 1:
        raise BadHook(f"samples={samples} and window={window}: both count from 1")
    finite_number(noise, "noise", above=0.0, meaning="how many standard deviations are added,")
    if site in WHOLE_MODEL:
        raise BadHook(f"{site!r} is there once, and causal tracing restores a site layer by layer")
    chosen = list(
        lm.sites(site) if layers is None else lm.sites(site, layers=listed(layers, "layers"))
    )
    there = {each.layer: each for each in lm.sites(site) if isinstance(each, Site)}
    rows = [list(row) for row in batch.rows for _ in range(samples)]
    spans = [
        cover(lm, row, at(name) if isinstance(name, str) else name)
        for row, name in zip(batch.rows, names, strict=True)
    ]
    found = positions_of(batch.lengths, [site], pos)
    if found is None:
        raise BadHook(
            f"{site!r} has heads, all of which are restored together: say at which positions, with pos="
        )
    places = {
        name: [(where, _each(some, samples)) for where, some in given]
        for name, given in found.items()
    }
    under = as_hooks(settings.get("under", ()))
    clean = forward(lm, rows, *under, capture(lm.sites(site)))

    def hooks(layer: int, pos: object) -> list[Hook]:
        first = layer - window // 2
        around = [there[each] for each in range(first, first + window) if each in there]
        return [patch(around, clean, pos=where, rows=some) for where, some in places[pos]]

    size = number(noise, "noise") * embedding_std(lm, noise_over)
    settings["under"] = [*under, *_noise(lm, batch.rows, spans, samples, size, seed)]
    table = sweep(
        lm,
        rows,
        {"layer": [each.layer for each in chosen if isinstance(each, Site)], "pos": list(places)},
        hooks,
        metrics,
        target=clean,
        **settings,
    )
    table["prompt"], table["sample"] = table["row"] // samples, table["row"] % samples
    table.attrs["noise_std"] = size
    return table


def embedding_std(lm: LM, over: Prompts | None = None) -> float:
    """The standard deviation of all numbers of the embeddings: of the whole vocabulary, or of the tokens of `over`."""
    rows = _vocabulary_in_rows(lm) if over is None else as_rows(lm, over)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(rows), TOGETHER):
        group = rows[start : start + TOGETHER]
        embeddings = forward(lm, [list(row) for row in group], capture("embed"), logits=False)[
            "embed"
        ]
        for row, values in zip(group, embeddings, strict=True):
            numbers = values[: len(row)].double()
            count += numbers.numel()
            total += float(numbers.sum())
            squares += float((numbers * numbers).sum())
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1))


def _vocabulary_in_rows(lm: LM) -> list[Row]:
    """Every token of the vocabulary once, in rows of which the last may be shorter."""
    if not lm.n_tokens:
        raise BadHook(
            "the size of this model's vocabulary is not known: give texts or ids, over whose embeddings the standard "
            "deviation is taken, as noise_over="
        )
    width = min(WIDTH, lm.context or WIDTH)
    starts = range(0, lm.n_tokens, width)
    return [tuple(range(start, min(start + width, lm.n_tokens))) for start in starts]


def _each(prompts: CountLike, samples: int) -> CountLike:
    """The rows of some prompts, of which there is one for each sample."""
    if not isinstance(prompts, list):
        return prompts
    return [prompt * samples + sample for prompt in prompts for sample in range(samples)]


def _noise(
    lm: LM, prompts: Sequence[Row], spans: Sequence[Row], samples: int, size: float, seed: int
) -> list[Hook]:
    """The hooks that add noise to the subject's embeddings, one for the rows whose subject stands at one place."""
    width = lm.shape(Site("embed"))[-1]
    by_place: dict[Row, dict[int, Tensor]] = {}
    for index, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        for sample in range(samples):
            drawn = torch.randn(len(span), width, generator=_draws(seed, prompt, sample))
            by_place.setdefault(span, {})[index * samples + sample] = size * drawn
    hooks: list[Hook] = []
    for span, drawn in by_place.items():
        vectors = torch.zeros(len(prompts) * samples, len(span), width)
        vectors[list(drawn)] = torch.stack(list(drawn.values()))
        hooks.append(steer("embed", vectors, pos=list(span), rows=list(drawn)))
    return hooks


def _draws(seed: int, prompt: Row, sample: int) -> torch.Generator:
    """A generator that depends on the seed, the prompt's tokens and the sample's number alone."""
    words = hashlib.sha256(repr((seed, prompt, sample)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)
