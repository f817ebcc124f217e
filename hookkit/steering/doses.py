"""Dose responses: what each dose of a vector does, and what it damages, beside random vectors.

The random vectors have the same length and are the control. The damage is measured on neutral text:
how much worse the model predicts it, and how far its predictions moved.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_items, check_arguments, check_integer, check_number, describe
from ..display import progress_bar
from ..errors import BadHook, BadPrompt
from ..hooks.base import Hook
from ..hooks.vector import Vector
from ..models.lm import LM
from ..models.next_token import kl_divergence, values_at
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite
from ..runs.forward import forward
from ..sweeps.cells import as_hooks, list_values
from ..sweeps.sweep import sweep
from ..tables.metrics.metric import MetricLike
from .directions import BATCH, collect_statistics, median_length

VectorLike: TypeAlias = Vector | Tensor
Named: TypeAlias = Mapping[str, VectorLike | Sequence[VectorLike]]
DOSES = (-0.4, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.4)


def _neutral_rows(lm: LM, texts: Prompts) -> tuple[Row, ...]:
    """Returns the tokens of neutral texts; raises if a text has no token to predict."""
    rows = as_batch(lm, texts).rows
    lengths = list(map(len, rows))
    if 1 in lengths:
        raise BadPrompt(
            f"neutral text {lengths.index(1)} has one token, and nothing in it is predicted: "
            "give longer texts"
        )
    return rows


def _damages(
    lm: LM,
    rows: Sequence[Row],
    edits: Sequence[Hook],
    base_hooks: Sequence[Hook],
    batch: int,
    progress: bool | None,
) -> Float[np.ndarray, "3 edit"]:
    """Returns the mean loss with each edit, the loss without it, and KL(without ‖ with).

    All are in nats per token of the texts. `base_hooks` act with and without the edits. The
    predictions of `batch` texts are in memory at a time.
    """
    totals = torch.zeros(len(edits), 3, dtype=torch.float64)
    total = len(edits) * len(rows)
    with progress_bar(progress, total=total, unit="text", desc="neutral text") as bar:
        for start in range(0, len(rows), batch):
            texts = rows[start : start + batch]
            before = _logprobs(lm, texts, base_hooks)
            for index, hook in enumerate(edits):
                after = _logprobs(lm, texts, [*base_hooks, hook])
                totals[index] += sum(map(_damage_sums, texts, before, after))
                bar.update(len(texts))
    tokens = sum(map(len, rows)) - len(rows)
    return (totals / tokens).T.numpy()


def _logprobs(
    lm: LM, rows: Sequence[Row], hooks: Sequence[Hook]
) -> list[Float[Tensor, "pos vocab"]]:
    """Returns the log-probabilities at each token of each row but its last."""
    logits = forward(lm, list(rows), *hooks).logits
    logprobs = []
    for row, logits_of_row in zip(rows, logits, strict=True):
        logprobs.append(logits_of_row[: len(row) - 1].float().log_softmax(-1))
    return logprobs


def _damage_sums(
    row: Row, before: Float[Tensor, "pos vocab"], after: Float[Tensor, "pos vocab"]
) -> Float[Tensor, " 3"]:
    """Returns the sums over a row's tokens of the loss, the loss before, and KL(before ‖ after)."""
    tokens = torch.tensor(row[1:])
    loss = -values_at(after, tokens).sum(dtype=torch.float64)
    loss_before = -values_at(before, tokens).sum(dtype=torch.float64)
    kl = kl_divergence(before, after, dtype=torch.float64).clamp(min=0)
    return torch.stack([loss, loss_before, kl.sum()]).cpu()


@check_arguments
def dose_response(
    lm: LM,
    prompts: Prompts,
    vectors: VectorLike | Sequence[VectorLike] | Named,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    doses: Iterable[float] = DOSES,
    samples: int = 20,
    neutral: Prompts | None = None,
    pos: PosLike = None,
    site: str | AnySite | None = None,
    seed: int = 0,
    base_hooks: Hook | Sequence[Hook] = (),
    batch: int = BATCH,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The metrics of each prompt under each dose of each vector, and of random vectors as control.

    vectors  one, several (of several layers, for example), or each with a name: {"learnt": vector}
    doses    lengths of what is added, as fractions of the stream's length at the site; a negative
             dose adds the opposite
    samples  random vectors for each: sample n is `vector.random(seed=seed + n)` for every dose. All
             doses and samples share forwards, which cost about `samples` + 1 times those of the
             vector alone; 0 for none
    neutral  unrelated texts, of two tokens or more. The vector is added at all their positions
    pos      where the vector is added in the prompts, by default at all positions
    site     with plain tensors [d_model] as `vectors`: where they are added. The stream's length is
             then the median length at this site over `pos` of the prompts, without hooks

    Columns: vector (its name, else its method), site, layer (if sites have one), dose, length,
    control, sample, row, prompt (the same), those of `sweep` for each metric, and with neutral
    texts the damage of the dose over all their tokens: damage_kl (KL(without ‖ with), nats per
    token), damage_loss (loss with minus without, nats per token) and perplexity (exp of the loss
    with). `mean_over_doses` returns the means and intervals.

    >>> steered = hk.Vector("resid_post.20", direction, norm=120.0)
    >>> settings = {"doses": [0.5], "samples": 1, "neutral": "The sky is blue."}
    >>> table = dose_response(lm, prompt, steered, prob(" coffee"), **settings)
    >>> table[["dose", "control", "sample", "row"]].values.tolist()
    [[0.5, False, 0, 0], [0.5, True, 0, 0]]
    """
    as_vector = _require_vector
    if site is not None:
        as_vector = _tensors_at(lm, prompts, site, pos, batch)
    named = _named_vectors(vectors, as_vector)
    meaning = "how many random vectors are to be the control,"
    check_integer(samples, "samples", least=0, meaning=meaning, error=BadHook)
    texts = None if neutral is None else _neutral_rows(lm, neutral)
    numbers = [check_number(dose, "a dose") for dose in list_values(doses, "doses")]
    grid = {"vector": range(len(named)), "dose": numbers, "sample": range(samples + 1)}

    def added(vector: int, sample: int) -> Vector:
        """Sample 0 is the vector itself."""
        if sample == 0:
            return named[vector][1]
        return named[vector][1].random(seed=seed + sample - 1)

    def hooks(vector: int, dose: float, sample: int) -> Hook:
        return added(vector, sample).steer(dose=dose, pos=pos)

    table = sweep(lm, prompts, grid, hooks, metrics, base_hooks=base_hooks, progress=progress)
    attrs = table.attrs
    if texts is not None:
        cells = list(itertools.product(*grid.values()))
        edits = [added(vector, sample).steer(dose=dose) for vector, dose, sample in cells]
        loss, before, kl = _damages(lm, texts, edits, as_hooks(base_hooks), batch, progress)
        damage = pd.DataFrame(cells, columns=list(grid))
        damage = damage.assign(damage_kl=kl, damage_loss=loss - before, perplexity=np.exp(loss))
        table = table.merge(damage, on=list(grid), how="left")
    table = _with_names(table, named)
    table.attrs |= attrs
    return table


def _named_vectors(vectors: Any, as_vector: Callable[[Any], Vector]) -> list[tuple[str, Vector]]:
    """Returns each vector with its name; names and sites together are unique."""
    groups = vectors
    if not isinstance(vectors, Mapping):
        groups = {None: vectors}
    named: list[tuple[str, Vector]] = []
    for name, group in groups.items():
        for vector in map(as_vector, _members(group)):
            named.append((vector.method if name is None else str(name), vector))
    if not named:
        raise BadHook("there is no vector: give at least one")
    _check_names(named)
    return named


def _check_names(named: list[tuple[str, Vector]]) -> None:
    """Raises `BadHook` if two vectors have the same name and site."""
    counts = Counter((name, vector.site) for name, vector in named)
    (name, site), count = counts.most_common(1)[0]
    if count > 1:
        raise BadHook(
            f'two vectors are {name!r} at {site}: give them names, {{"one": …, "other": …}}'
        )


def _members(group: Any) -> list[Any]:
    """Returns the vectors of one name, which may be one vector or several in a list."""
    if isinstance(group, Tensor):
        return [group]
    items = as_items(group)
    return [group] if items is None else items


def _require_vector(vector: Any) -> Vector:
    if not isinstance(vector, Vector):
        raise BadHook(
            f"{type(vector).__name__} is no steering vector with a length of the stream: make one "
            "with hk.mean_difference, hk.fit_vector …, or hk.Vector(site, tensor, norm); or say "
            "where a plain tensor is added, site='resid_post.12'"
        )
    return vector


def _tensors_at(
    lm: LM, prompts: Prompts, site: str | AnySite, pos: PosLike, batch: int
) -> Callable[[Any], Vector]:
    """Returns the function that makes vectors of tensors at a site.

    Their norm is the median length of the stream there, as in the vectors of `mean_difference`.
    """
    sites = lm.expand(site)
    if len(sites) != 1:
        raise BadHook(
            f"site={str(site)!r} stands for {len(sites)} sites, and a tensor is added at one: name "
            f"it, such as {str(sites[0])!r}"
        )
    stream = collect_statistics(lm, as_batch(lm, prompts).rows, sites, pos, batch)[sites[0]]
    norm, width = median_length(stream.lengths), stream.means.shape[1]

    def as_vector(tensor: Any) -> Vector:
        if not isinstance(tensor, Tensor):
            raise BadHook(
                f"site={str(sites[0])!r} says where plain tensors are added, and "
                f"{describe(tensor)} was given: leave site= out for hk.Vector, which has its own "
                "site, or give its tensor"
            )
        if tensor.shape != (width,):
            raise BadHook(
                f"the tensor has shape {list(tensor.shape)}, and {sites[0]} has {width} numbers at "
                f"each position: give a tensor [{width}]"
            )
        return Vector(sites[0], tensor, norm)

    return as_vector


def _with_names(table: pd.DataFrame, named: Sequence[tuple[str, Vector]]) -> pd.DataFrame:
    """Returns the table with the vectors' names and sites, and the random vectors as control."""
    numbers = table["vector"]
    names, vectors = zip(*named, strict=True)
    sites = [vector.site for vector in vectors]
    table = table.assign(
        vector=numbers.map(names.__getitem__),
        site=numbers.map(lambda number: str(sites[number])),
        layer=numbers.map(lambda number: getattr(sites[number], "layer", None)),
        length=table["dose"].abs() * numbers.map(lambda number: vectors[number].norm),
        control=table["sample"] > 0,
        sample=(table["sample"] - 1).clip(lower=0),
        prompt=table["row"],
    )
    first = ["vector", "site", "layer", "dose", "length", "control", "sample", "row", "prompt"]
    if bool(table["layer"].isna().any()):
        first.remove("layer")
        table = table.drop(columns="layer")
    return table.loc[:, [*first, *table.columns.difference(first, sort=False)]]
