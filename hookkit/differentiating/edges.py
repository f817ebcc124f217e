"""hk.edge_attribution: what each direct connection of one component to another carries, estimated for all at once.

1. Two forwards: the prompts that are run (the clean ones, unless `direction` says otherwise), with a graph of the
   computation, and the other ones.
2. For each sender (the embedding, each head, each MLP): by how much what it writes into the stream is another.
3. For each receiver (each head's query, key and value, each MLP, the logits): the gradient at what it reads.
4. An edge's score is their product, summed over the positions (Syed et al. 2023).
"""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments
from ..captured import Captured
from ..errors import BadHook
from ..hooks.base import Hook
from ..hooks.looking import capture
from ..metrics import MetricLike
from ..model import LM
from ..prompts import Prompts
from ..sites import AnySite, Site
from ..sweeps.cells import as_hooks
from ..sweeps.grids import check_pairs
from .attribution import Pair
from .backward import OWN, derived, one_of, question
from .between import EMBED, Points, along, check_end, parts
from .stream import End, check_sum, needed, receivers, senders

TOGETHER = 8  # prompts whose graph and vectors are held at once


@checks_arguments
def edge_attribution(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metric: MetricLike,
    *,
    direction: Literal["noise", "denoise"] = "noise",
    steps: int = 1,
    points: Points | None = None,
    under: Hook | Sequence[Hook] = (),
) -> pd.DataFrame:
    """By how much the metric would move, to first order, if one sender's value of the other prompt reached one receiver
    alone: edge attribution patching (EAP: Syed et al. 2023), the mean over the prompts.

    direction  "noise", as in the papers: the clean prompts run, and an edge carries the corrupted prompt's value, so
               that an edge on which the metric rests has a score below 0. "denoise": the corrupted prompts run, and an
               edge carries the clean prompt's value. The papers rank edges by the absolute value, which is left to the
               reader of the table
    steps      above 1 the receivers' gradients are the mean over so many runs with embeddings between the two
               prompts' (EAP-IG: Hanna et al. 2024)
    points     where on that way, with `steps` above 1: "start" (what None means), the paper's own points: `steps`
               equal parts, each at its start, the first of which is the prompt that is run; "middle", their middles,
               which are nearer to the integral
    under      hooks that act in every run

    Senders are "embed", the heads "z.9.3" and the MLPs "mlp_out.9"; receivers what heads read, "q.9.3", "k.9.1",
    "v.9.1", the MLPs "mlp_in.9" and "logits". Columns: sender, receiver, the metric's name with `_delta`, and n (the
    prompts). `Unsupported` for a model whose stream is no sum of what its senders write, or which reads it by another
    way; `MissingSite` for one whose blocks have no heads.

    >>> table = edge_attribution(lm, clean, corrupted, logit_diff(" Mary", " John"))
    >>> len(table), list(table.columns)
    (70651, ['sender', 'receiver', 'logit_diff_delta', 'n'])
    """
    one_of("direction", direction, "noise", "denoise")
    if points is not None and steps == 1:
        raise BadHook(
            f"points={points!r} has no effect with steps=1, the plain gradient: give more steps, or leave it out"
        )
    points = points or "start"
    parts(steps, points)  # raises
    to, of = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    check_pairs(lm, of, to)
    pair = Pair(question(lm, to, metric), question(lm, of, metric), tuple(as_hooks(under)))
    sites, count = needed(lm), len(pair.to)
    found: list[Float[Tensor, "sender receiver"]] = []
    ends: tuple[list[End], list[End]] = ([], [])
    for rows in pair.batches(TOGETHER):
        ends, scores = _scored(pair, rows, sites, steps, points)
        found.append(scores)
    total = torch.stack(found).sum(0) / count
    return _table(f"{pair.to.metric.name}_delta", ends, total, count)


def _scored(
    pair: Pair, rows: range, sites: Sequence[Site], steps: int, points: Points
) -> tuple[tuple[list[End], list[End]], Float[Tensor, "sender receiver"]]:
    """The ends of all edges, and the score of each, summed over these prompts."""
    lm, under = pair.to.lm, pair.under
    read = [*sites, EMBED] if steps > 1 else sites
    other = pair.of.run(rows, *under, capture(read, name=OWN))
    source: dict[AnySite, Captured] = {site: other.captured(site, OWN) for site in read}
    here = derived(pair.to, rows, read, under, keep_graph=True)
    check_sum(lm, here)
    sending = senders(lm, here, source)
    sent = _flat(sending, lm.device)
    runs = iter([here])
    if steps > 1:
        start, end = here.values[EMBED].values.detach(), source[EMBED].values
        check_end(pair.to, rows, under, end, pair.of.asked_of(other, rows))
        runs = along(pair.to, rows, sites, under, start, end, steps, points, keep_graph=True)
    receiving: list[End] = []
    scores = torch.zeros(())
    for run in runs:
        receiving, columns = [], []
        for group in receivers(lm, run):
            columns.append(sent @ _flat(group, lm.device).T)
            receiving += [End(end.name, end.stage, end.vector.new_zeros(())) for end in group]
        scores = scores + torch.cat(columns, dim=1).double().cpu() / steps
    return (sending, receiving), scores


def _flat(ends: Sequence[End], device: torch.device) -> Float[Tensor, "end numbers"]:
    """The vectors of some ends, whose blocks may be on several devices, on one."""
    return torch.stack([end.vector.flatten().to(device) for end in ends])


def _table(name: str, ends: tuple[list[End], list[End]], scores: Tensor, count: int) -> pd.DataFrame:
    sending, receiving = ends
    receiving_first = sorted(range(len(receiving)), key=lambda number: receiving[number].stage)
    rows = [
        (sender.name, receiving[column].name, float(scores[row, column]), count)
        for row, sender in enumerate(sending)
        for column in receiving_first
        if sender.stage < receiving[column].stage
    ]
    return pd.DataFrame(rows, columns=["sender", "receiver", name, "n"])
