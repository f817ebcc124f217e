"""`hk.head_scores`: what each attention head does on repeated random tokens, as a table.

table = hk.head_scores(lm)
table.query("score == 'induction'").nlargest(5, "value")
hk.figures.heat_map(table.query("score == 'induction'"), value="value", x="head")
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_choice, check_integer
from ..data.datasets.tasks import induction
from ..errors import EmptySelection
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.model_end import model_end_of
from ..runs.run import Run
from ..tables.intervals import means
from .head_weights import AttentionWeights, output_directions

CONFIDENCE, RESAMPLES = 0.95, 2000
BATCH = 16
ATTENTION = ("previous_token", "duplicate_token", "induction")
SCORES = (*ATTENTION, "copy_suppression")


@check_arguments
def head_scores(
    lm: LM,
    *,
    scores: Iterable[str] = SCORES,
    prompts: Prompts | None = None,
    n: int = 20,
    length: int = 25,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns what each head does on random tokens that are repeated, a line for each head and
    score.

    Columns: layer, head, score, value, low and high (its 95 % interval over sequences), baseline,
    n (sequences). The scores are

    previous_token    the mean attention to the token before, in both halves
    duplicate_token   in the second half, to the same token in the first
    induction         in the second half, to the token after the same token in the first (Olsson et
                      al. 2022)
    copy_suppression  how far the head lowers the tokens that it attends to (McDougall et al. 2023):
                      minus what it adds, from each key before the last token, to the key's own
                      logit, relative to the logits of the other tokens of the prompt; summed over
                      keys, in logits. Negative for a head that copies

    The baseline of attention is that of a head which attends to all keys alike; that of copy
    suppression is 0. The sequences are those of `hk.datasets.induction(lm, n, length=length)`.
    `prompts` are other ones for copy suppression, at their last token, such as
    `hk.datasets.indirect_object(lm, 20).clean`. One forward of each prompt, in batches.

    Raises `Unsupported` for copy suppression in a family where weights do not say what a head
    writes (see `hk.ov`): leave it out of `scores`.

    >>> table = head_scores(lm, scores=["induction"], n=8, length=10)
    >>> table.columns.tolist()
    ['layer', 'head', 'score', 'value', 'low', 'high', 'baseline', 'n']
    """
    names = [check_choice(name, "scores", SCORES) for name in scores]
    check_integer(n, "n", least=2, meaning="how many sequences,")
    if not names:
        raise EmptySelection(f"scores= is empty: give some of {', '.join(SCORES)}")
    lm.refuse_engine("the scores of heads are read from attention patterns")
    sequences = list(as_batch(lm, list(induction(lm, n, length=length, seed=seed).clean)).rows)
    other = sequences if prompts is None else list(as_batch(lm, prompts).rows)
    layers = lm.layout.layers("pattern") or ()
    values: dict[str, Float[Tensor, "row layer_head"]] = {}
    if set(names) & set(ATTENTION):
        values |= _attention_values(lm, sequences, layers, length)
    if "copy_suppression" in names:
        values["copy_suppression"] = _suppression_values(lm, other, layers)
    tables = []
    for name in names:
        baseline = 0.0
        if name in ATTENTION:
            baseline = _baseline(name, len(sequences[0]), length)
        tables.append(_table(name, values[name].double().numpy(), layers, baseline))
    return pd.concat(tables, ignore_index=True)


def _attention_values(
    lm: LM, rows: list[Row], layers: Sequence[int], length: int
) -> dict[str, Float[Tensor, "row layer_head"]]:
    """Returns each head's mean attention in each sequence, by score."""
    sites = [Site("pattern", layer) for layer in layers]
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for run in _runs(lm, rows, sites):
        for name, scores in _attention(run, sites, length).items():
            parts[name].append(scores)
    return {name: torch.cat(scores) for name, scores in parts.items()}


def _suppression_values(
    lm: LM, rows: list[Row], layers: Sequence[int]
) -> Float[Tensor, "row layer_head"]:
    """Returns how far each head lowers the tokens that it attends to, in each prompt."""
    writers = [Writers.read(lm, layer) for layer in layers]
    sites = [Site("resid_post", lm.n_layers - 1)]
    for layer in layers:
        sites += [Site("pattern", layer), Site("v", layer)]
    return torch.cat([_suppression(run, writers) for run in _runs(lm, rows, sites)])


def _runs(lm: LM, rows: list[Row], sites: list[Site]) -> Iterator[Run]:
    for start in range(0, len(rows), BATCH):
        yield forward(lm, rows[start : start + BATCH], capture(sites), logits=False)


def _pairs(name: str, width: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns the queries and keys of a score in prompts of `width` tokens."""
    first = width - (2 * length - 1)  # after the tokens that the tokenizer adds
    if name == "previous_token":
        queries = torch.arange(first + 1, width)
        return queries, queries - 1
    queries = torch.arange(first + length, width)
    return queries, queries - length + int(name == "induction")


def _baseline(name: str, width: int, length: int) -> float:
    queries, _ = _pairs(name, width, length)
    return float((1 / (queries + 1)).mean())


def _attention(
    run: Run, sites: list[Site], length: int
) -> dict[str, Float[Tensor, "row layer_head"]]:
    """Returns each head's mean attention in each sequence, by score."""
    result = {}
    for name in ATTENTION:
        by_layer = []
        for site in sites:
            pattern = run[site]
            queries, keys = _pairs(name, pattern.shape[-1], length)
            by_layer.append(pattern[:, :, queries, keys].float().mean(-1).cpu())
        result[name] = torch.cat(by_layer, dim=1)
    return result


@dataclass(frozen=True, eq=False)
class Writers:
    """What the heads of a block write: the output projection by heads, and the head of values of
    each."""

    weights: AttentionWeights
    output: Float[Tensor, "head d_model d_head"]
    kv_heads: list[int]

    @staticmethod
    def read(lm: LM, layer: int) -> Writers:
        """Returns the writers of a block. Raises `Unsupported` if its weights cannot be read."""
        weights = AttentionWeights.read(lm, layer)
        heads = range(lm.layout.sizes_of(layer)["head"] or 1)
        for head in heads:
            weights.check_values(head)
        output = torch.stack([weights.output(head) for head in heads])
        return Writers(weights, output, list(map(weights.kv_head, heads)))


@torch.no_grad()
def _suppression(run: Run, writers: list[Writers]) -> Float[Tensor, "row layer_head"]:
    """Returns how far each head lowers the tokens that it attends to at each prompt's end."""
    lm = run.lm
    final_norm, unembedding = output_directions(writers[0].weights)
    head_input = model_end_of(lm, (), run.prompts).head_input
    states = run[Site("resid_post", lm.n_layers - 1)]
    rows = []
    for row, prompt in enumerate(run.prompts):
        ids, end = torch.tensor(list(prompt))[:-1], len(prompt) - 1
        state = states[row, end : end + 1]
        normed = (head_input(state) - head_input(torch.zeros_like(state))).float()
        scale = (state.float() @ final_norm.to(state.device)).norm() / normed.norm()
        directions = final_norm @ unembedding[ids].T.to(final_norm) / scale.to(final_norm)
        is_other = (ids[:, None] != ids).to(directions)
        # minus the key's own token, plus the mean of the others
        weights = is_other / is_other.sum(1, keepdim=True).clamp(min=1) - torch.eye(end).to(
            is_other
        )
        heads = [_effects(run, block, (row, end), directions, weights) for block in writers]
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def _effects(
    run: Run,
    block: Writers,
    query: tuple[int, int],
    directions: Float[Tensor, "d_model key"],
    weights: Float[Tensor, "key key"],
) -> Float[Tensor, " head"]:
    """Returns the weighted sum of what each head adds from each key to each key's logit."""
    (row, end), layer = query, block.weights.layer
    pattern = run[Site("pattern", layer)][row, :, end, :end].float()
    values = run[Site("v", layer)][row, :end, block.kv_heads].float()
    read = torch.einsum("hde,dj->hej", block.output.to(values), directions.to(values))
    effects = torch.einsum("hk,khe,hej->hkj", pattern, values, read)
    return (effects * weights.to(effects)).sum((1, 2)).cpu()


def _table(
    name: str, values: Float[np.ndarray, "row head"], layers: Iterable[int], baseline: float
) -> pd.DataFrame:
    estimates = means(np.ascontiguousarray(values.T), CONFIDENCE, RESAMPLES, 0)
    heads = values.shape[1] // len(list(layers))
    cells = pd.MultiIndex.from_product([list(layers), range(heads)], names=["layer", "head"])
    columns = {"score": name, "value": estimates.mean, "low": estimates.low}
    columns |= {"high": estimates.high, "baseline": baseline, "n": len(values)}
    return pd.DataFrame(columns, index=cells).reset_index()
