"""What a dose of a vector does, and what it damages, beside random vectors of equal length.

What steering damages: how much worse the model predicts neutral text, and how far its predictions moved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import checks_arguments, whole_number
from ..errors import BadHook, BadPrompt
from ..hooks.base import Hook, number
from ..hooks.vector import Vector
from ..models.lm import LM
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import Site
from ..runs.forward import forward
from ..sweeps.cells import as_hooks, listed
from ..sweeps.sweep import sweep
from ..tables.metrics import MetricLike
from .directions import BATCH


@dataclass(frozen=True)
class Damage:
    """What hooks do to neutral text: the mean loss of its tokens, that without the hooks, and the KL; nats a token."""

    loss: float
    before: float
    kl: float


def neutral_rows(lm: LM, texts: Prompts) -> tuple[Row, ...]:
    """The tokens of neutral texts, each of two or more, so that one of them can be predicted."""
    rows = as_batch(lm, texts).rows
    short = [number for number, row in enumerate(rows) if len(row) < 2]
    if short:
        raise BadPrompt(
            f"neutral text {short[0]} has one token, and nothing in it is predicted: give longer texts"
        )
    return rows


def damages(
    lm: LM,
    rows: Sequence[Row],
    hooks: Sequence[Sequence[Hook]],
    *,
    under: Sequence[Hook] = (),
    batch: int,
    progress: bool | None = None,
) -> list[Damage]:
    """The damage of each list of hooks; `under` act with and without them. Only `batch` texts' predictions are held."""
    totals = torch.zeros(len(hooks), 3, dtype=torch.float64)  # loss, loss before, kl
    shown = None if progress is None else not progress
    with tqdm(total=len(hooks) * len(rows), unit="text", desc="neutral text", disable=shown) as bar:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            was = _predictions(lm, some, under)
            for number, each in enumerate(hooks):
                now = _predictions(lm, some, [*under, *each])
                totals[number] += sum(_apart(*three) for three in zip(some, was, now, strict=True))
                bar.update(len(some))
    tokens = sum(len(row) - 1 for row in rows)
    return [Damage(*values) for values in (totals / tokens).tolist()]


def _predictions(
    lm: LM, rows: Sequence[Row], hooks: Sequence[Hook]
) -> list[Float[Tensor, "pos vocab"]]:
    """The log-probabilities at each token of each row but its last."""
    logits = forward(lm, [list(row) for row in rows], *hooks).logits
    return [
        found[: len(row) - 1].float().log_softmax(-1)
        for found, row in zip(logits, rows, strict=True)
    ]


def _apart(
    row: Row, was: Float[Tensor, "pos vocab"], now: Float[Tensor, "pos vocab"]
) -> Float[Tensor, " 3"]:
    """The sums over a row's tokens of the loss, the loss before, and KL(before ‖ now)."""
    tokens = torch.tensor(row[1:], device=now.device)[:, None]
    prob = was.exp()
    kl = (
        torch.where(prob > 0, prob * (was - now), 0.0).sum(dim=-1, dtype=torch.float64).clamp(min=0)
    )
    losses = [-each.gather(1, tokens).sum(dtype=torch.float64) for each in (now, was)]
    return torch.stack([*losses, kl.sum()]).cpu()


Named: TypeAlias = Mapping[str, Vector | Sequence[Vector]]

DOSES = (-0.4, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.4)


@checks_arguments
def dose_response(
    lm: LM,
    prompts: Prompts,
    vectors: Vector | Sequence[Vector] | Named,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    doses: Iterable[float] = DOSES,
    samples: int = 3,
    neutral: Prompts | None = None,
    pos: PosLike = None,
    seed: int = 0,
    under: Hook | Sequence[Hook] = (),
    batch: int = BATCH,
    progress: bool | None = None,
) -> pd.DataFrame:
    """The metrics of each prompt under each dose of each vector, and of random vectors of equal length as a control.

    vectors  one, several (of several layers, say), or each with a name of its own: {"learnt": vector}
    doses    lengths of what is added, as fractions of the stream's at the site; a negative one adds the opposite
    samples  random vectors for each: sample n is `vector.random(seed=seed + n)`, the same for every dose
    neutral  texts that have nothing to do with it, of two tokens or more. The vector is added at all their positions
    pos      where it is added in the prompts, all positions if left out

    Columns: vector (its name, else how it was made), site, layer (where sites have one), dose, length, control, sample,
    row, prompt (the same), those of `sweep` for each metric, and with neutral texts what the dose damages there, over
    all their tokens: damage_kl (KL(without ‖ with), nats a token), damage_loss (loss with minus without, nats a token)
    and perplexity (exp of the loss with). `over_doses` has the means and intervals.

    >>> steered = hk.Vector("resid_post.20", direction, norm=120.0)
    >>> found = dose_response(lm, prompt, steered, prob(" coffee"), doses=[0.5], samples=1, neutral="The sky is blue.")
    >>> found[["dose", "control", "sample", "row"]].values.tolist()
    [[0.5, False, 0, 0], [0.5, True, 0, 0]]
    """
    named = _named(vectors)
    whole_number(
        samples,
        "samples",
        least=0,
        meaning="how many random vectors are to be the control,",
        error=BadHook,
    )
    texts = None if neutral is None else neutral_rows(lm, neutral)
    wanted = [number(dose, "a dose") for dose in listed(doses, "doses")]
    each = {
        (n, s): _sample(vector, s, seed)
        for n, (_, vector) in enumerate(named)
        for s in range(samples + 1)
    }
    grid = {"vector": range(len(named)), "dose": wanted, "sample": range(samples + 1)}

    def hooks(vector: int, dose: float, sample: int) -> Hook:
        return each[vector, sample].steer(dose=dose, pos=pos)

    table = sweep(lm, prompts, grid, hooks, metrics, under=under, progress=progress)
    attrs = table.attrs
    if texts is not None:
        cells = [(v, d, s) for v in range(len(named)) for d in wanted for s in range(samples + 1)]
        steers = [[each[v, s].steer(dose=d)] for v, d, s in cells]
        hurt = damages(lm, texts, steers, under=as_hooks(under), batch=batch, progress=progress)
        table = table.merge(_damage_table(cells, hurt), on=["vector", "dose", "sample"], how="left")
    table = _told(table, named)
    table.attrs |= attrs
    return table


def _damage_table(cells: Sequence[tuple[int, float, int]], hurt: Sequence[Any]) -> pd.DataFrame:
    table = pd.DataFrame(cells, columns=["vector", "dose", "sample"])
    table["damage_kl"] = [each.kl for each in hurt]
    table["damage_loss"] = [each.loss - each.before for each in hurt]
    table["perplexity"] = np.exp([each.loss for each in hurt])
    return table


def _sample(vector: Vector, sample: int, seed: int) -> Vector:
    """The vector itself, or one of the random ones that are its control."""
    return vector if sample == 0 else vector.random(seed=seed + sample - 1)


def _named(vectors: Vector | Sequence[Vector] | Named) -> list[tuple[str, Vector]]:
    """Each vector with its name, by which and by its site it can be told."""
    if isinstance(vectors, Mapping):
        given: list[tuple[str, Any]] = [
            (str(name), one) for name, some in vectors.items() for one in _listed(some)
        ]
    else:
        given = [(getattr(one, "method", ""), one) for one in _listed(vectors)]
    if not given:
        raise BadHook("there is no vector: give at least one")
    for _, one in given:
        if not isinstance(one, Vector):
            raise BadHook(
                f"{type(one).__name__} is no steering vector with a length of the stream: make one with "
                "hk.mean_difference, hk.fit_vector …, or hk.Vector(site, tensor, norm)"
            )
    seen = [(name, one.site) for name, one in given]
    twice = next((each for each in seen if seen.count(each) > 1), None)
    if twice is not None:
        raise BadHook(
            f'two vectors are {twice[0]!r} at {twice[1]}: give them names, {{"one": …, "other": …}}'
        )
    return given


def _listed(some: Any) -> list[Any]:
    return [some] if isinstance(some, Vector) or not isinstance(some, Iterable) else list(some)


def _told(table: pd.DataFrame, named: Sequence[tuple[str, Vector]]) -> pd.DataFrame:
    """The table with its vectors by name and place, and its random ones as control."""
    names, vectors = zip(*named, strict=True)
    number = table["vector"]
    table = table.assign(
        vector=[names[n] for n in number],
        site=[str(vectors[n].site) for n in number],
        length=[abs(dose) * vectors[n].norm for n, dose in zip(number, table["dose"], strict=True)],
        control=table["sample"] > 0,
        sample=(table["sample"] - 1).clip(lower=0),
        prompt=table["row"],
    )
    places = ["vector", "site", "dose", "length", "control", "sample", "row", "prompt"]
    if all(isinstance(vector.site, Site) and vector.site.layer is not None for vector in vectors):
        table["layer"] = [vectors[n].site.layer for n in number]  # pyright: ignore
        places.insert(2, "layer")
    return table.loc[:, [*places, *(name for name in table.columns if name not in places)]]
