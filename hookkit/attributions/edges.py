"""hk.edge_attribution: what each direct connection of one component to another carries, estimated for all at once.

1. Two forwards: the prompts that are run (the clean ones, unless `direction` says otherwise), with a graph of the
   computation, and the other ones.
2. For each sender (the embedding, each head, each MLP): by how much what it writes into the stream is another.
3. For each receiver (each head's query, key and value, each MLP, the logits): the gradient at what it reads.
4. An edge's score is their product, summed over the positions (Syed et al. 2023).

Who writes into the residual stream and who reads it, each in the stream's own numbers.

What a sender would write otherwise is pushed forward through the family's own output projection, and a norm or
a factor behind it; the gradient at what a receiver reads is pulled back through the family's own norm and projection.
Both are products of a vector with the Jacobian that autograd has of the run, so that nothing of the family has to be
known but its sites.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import AnySite, Site
from ..sweeps.cells import as_hooks
from ..sweeps.grids import check_pairs
from ..tables.metrics import MetricLike
from .attribution_patching import Pair
from .backward import OWN, Derived, derived, one_of, question
from .interpolation import EMBED, Points, along, check_end, parts

PARTS = ("q", "k", "v")  # of what a head reads


@dataclass(frozen=True, eq=False)
class End:
    """One end of an edge. `stage` counts along the stream: a sender reaches the receivers of later stages."""

    name: str
    stage: int
    vector: Float[Tensor, "row pos d_model"]


def needed(lm: LM) -> list[Site]:
    """The sites of which edges are made. `Unsupported` or `MissingSite` where the model lacks one."""
    found = [Site("resid_post", lm.n_layers - 1)]
    for layer in range(lm.n_layers):
        names = ("resid_pre", *PARTS, "z", "attn_out", "mlp_in", "mlp_out")
        found += [Site(name, layer) for name in names]
        found += [Site("resid_mid", layer)] if lm.layout.find("resid_mid", layer) else []
    for site in found:
        lm.place(site)
    return found


def _read_by_mlp(lm: LM, layer: int) -> Site:
    """The stream as the MLP finds it: behind attention, or where they run in parallel, before it."""
    return Site("resid_mid" if lm.layout.find("resid_mid", layer) else "resid_pre", layer)


def check_sum(lm: LM, here: Derived) -> None:
    """Raise `Unsupported` where the stream is more than the sum of what embedding, attention and MLPs write."""
    found = here.values[Site("resid_pre", 0)].values
    for layer in range(lm.n_layers):
        for name in ("attn_out", "mlp_out"):  # blocks may be on several devices
            found = found + here.values[Site(name, layer)].values.to(found.device)
    last = here.values[Site("resid_post", lm.n_layers - 1)].values
    if not _alike(found, last):
        reason = lm.family.exceptions.get("sum", "something else writes into it, or scales it")
        raise Unsupported(
            f"the stream of this {lm.family.name} model is not the sum of its embedding and of what attention and MLPs "
            f"add, so that it has no edges between them: {reason}. hk.attribution and hk.path_patching need no sum"
        )


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return float((found.to(wanted.device) - wanted).detach().abs().max()) <= 2e-2 * _precision(
        wanted
    ) * float(wanted.detach().abs().max())


def _precision(like: Tensor) -> float:
    """0.1 for the narrow dtypes, whose sums round; 1 in 1,000 for those of 32 bits and more."""
    return 5.0 if like.dtype in (torch.float16, torch.bfloat16) else 0.05


def senders(lm: LM, here: Derived, other: Mapping[AnySite, Captured]) -> list[End]:
    """By how much each sender's part of the stream is another on the other prompts."""
    change = {
        site: other[site].values - found.values.detach() for site, found in here.values.items()
    }
    found = [End("embed", -1, change[Site("resid_pre", 0)])]
    for layer in range(lm.n_layers):
        z, out = Site("z", layer), Site("attn_out", layer)
        for head, vector in enumerate(_pushed(here.leaves[z], here.leaves[out], change[z])):
            found.append(End(f"z.{layer}.{head}", 2 * layer, vector))
        found.append(End(f"mlp_out.{layer}", 2 * layer + 1, change[Site("mlp_out", layer)]))
    return found


def _pushed(z: Tensor, out: Tensor, change: Tensor) -> Iterator[Tensor]:
    """What each head's change comes to behind the projection: forward through the Jacobian, as the gradient of a
    gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        seed = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, z, seed, create_graph=True)
        for head in range(z.shape[2]):
            (forth,) = torch.autograd.grad(back, seed, _only(change, head), retain_graph=True)
            yield forth


def _only(values: Tensor, head: int) -> Tensor:
    """The same with zeros at all heads but one."""
    kept = torch.zeros_like(values)
    kept[:, :, head] = values[:, :, head]
    return kept


def receivers(lm: LM, here: Derived) -> Iterator[list[End]]:
    """The gradient at what each receiver reads, block by block. `Unsupported` at the end where these are not all who
    read the stream: together they have to make the gradient of the embedding."""
    last = Site("resid_post", lm.n_layers - 1)
    total = here.gradient[last].clone()
    yield [End("logits", 2 * lm.n_layers, here.gradient[last])]
    for layer in reversed(range(lm.n_layers)):
        found = [*_heads(here, layer), _mlp(lm, here, layer)]
        for end in found:
            total += end.vector.to(total.device)
        yield found
    if not _alike(total, here.gradient[Site("resid_pre", 0)]):
        raise Unsupported(
            f"the blocks of this {lm.family.name} model read the stream by another way than queries, keys, values and "
            "the MLP's input, so that edges would leave some of it out: use hk.attribution or hk.path_patching"
        )


def _heads(here: Derived, layer: int) -> Iterator[End]:
    stream = here.leaves[Site("resid_pre", layer)]
    for name in PARTS:
        site = Site(name, layer)
        for head in range(here.leaves[site].shape[2]):
            (back,) = torch.autograd.grad(
                here.leaves[site], stream, _only(here.gradient[site], head), retain_graph=True
            )
            yield End(f"{name}.{layer}.{head}", 2 * layer, back)


def _mlp(lm: LM, here: Derived, layer: int) -> End:
    site, read = Site("mlp_in", layer), _read_by_mlp(lm, layer)
    (back,) = torch.autograd.grad(
        here.leaves[site], here.leaves[read], here.gradient[site], retain_graph=True
    )
    return End(str(site), 2 * layer + (read.name == "resid_mid"), back)


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


def _table(
    name: str, ends: tuple[list[End], list[End]], scores: Tensor, count: int
) -> pd.DataFrame:
    sending, receiving = ends
    receiving_first = sorted(range(len(receiving)), key=lambda number: receiving[number].stage)
    rows = [
        (sender.name, receiving[column].name, float(scores[row, column]), count)
        for row, sender in enumerate(sending)
        for column in receiving_first
        if sender.stage < receiving[column].stage
    ]
    return pd.DataFrame(rows, columns=["sender", "receiver", name, "n"])
