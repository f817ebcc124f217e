"""hk.edge_attribution: estimates of the effect of every edge from one component to another.

1. Two forwards: of the prompts that are run (the clean ones by default), with the graph of the
   computation, and of the other prompts.
2. For each sender (the embedding, each head, each MLP), the difference between the two in what it
   writes into the residual stream.
3. For each receiver (each head's query, key and value, each MLP, the logits), the gradient at the
   residual stream through what it reads.
4. An edge's score is the product of the two, summed over the positions (Syed et al. 2023).

A difference is pushed forward through the family's own output projection, and through a norm or a
factor after it. A gradient is pulled back through the family's own norm and projection. Both are
products of a vector with a Jacobian, which autograd computes from the run, so that nothing about
the family has to be known except its sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ..arguments import check_arguments
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import Captured, capture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import AnySite, Site, as_site
from ..tables.metrics.metric import MetricLike
from .backward import (
    CAPTURE_NAME,
    EMBED,
    Points,
    PromptMetric,
    SiteGradients,
    bind_pair,
    check_path_end,
    compute_gradients,
    path_gradients,
    points_of_method,
    read_captures,
)
from .exact_edges import EdgePatching

HEAD_INPUTS = ("q", "k", "v")

TOLERANCES = {torch.float16: 0.1, torch.bfloat16: 0.1}  # of sums, relative to the largest value
BATCH = 8  # prompts whose graph and vectors are in memory at once


@dataclass(frozen=True, eq=False)
class EdgeEnd:
    """One end of an edge: a sender with its difference, or a receiver with its gradient.

    `stage` counts along the residual stream: a sender reaches the receivers of later stages.
    """

    name: str
    stage: int
    vector: Float[Tensor, "row pos d_model"]


@check_arguments
def edge_attribution(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metric: MetricLike,
    *,
    direction: Literal["noise", "denoise"] = "noise",
    method: Literal["gradient", "integrated", "integrated_activations", "exact"] = "gradient",
    steps: int | None = None,
    points: Points | None = None,
    edges: pd.DataFrame | None = None,
    base_hooks: Hook | Sequence[Hook] = (),
) -> pd.DataFrame:
    """Returns by how much the metric would change if one sender's value of the other prompt reached
    one receiver alone: edge attribution patching, to first order; the mean over the prompts.

    direction  "noise", as in the papers: the clean prompts run, and an edge carries the corrupted
               prompt's value, so that an edge that the metric needs has a score below 0. "denoise":
               the corrupted prompts run, and an edge carries the clean prompt's value. The papers
               rank edges by the absolute value, which the table leaves to its reader
    method     whose gradients the receivers have. "gradient": those of the prompts that are run
               (EAP: Syed et al. 2023). "integrated": their mean over runs with embeddings between
               the two prompts' (EAP-IG-inputs: Hanna et al. 2024). "integrated_activations": for
               the edges of each sender, their mean over runs in which what it writes, with the
               other heads of its layer, is between its values on the two prompts (EAP-IG-
               activations in the code of Hanna et al.; integrated gradients of a node: Marks et al.
               2024), so that the edges of a layer add up to the effect of patching it, if
               no norm follows its heads. "exact": no gradient; every edge is patched, with a row
               of a forward each (ACDC: Conmy et al. 2023): for small models, or few `edges`
    steps      for the integrated methods: how many runs (of each layer), 5 by default
    points     for the integrated methods: where on the path. "start" (the default), the paper's own
               points: `steps` equal parts, each at its start, the first of which is the prompt that
               is run. "middle": their middles, which are closer to the integral
    edges      a table with columns sender and receiver, such as the first rows of another method's:
               only these; by default all
    base_hooks      hooks that act in every run

    Senders are "embed", the heads "z.9.3" and the MLPs "mlp_out.9". Receivers are what heads read,
    "q.9.3", "k.9.1", "v.9.1", the MLPs "mlp_in.9" and "logits". Columns: sender, receiver, the
    metric's name with `_delta`, and n (the prompts). Raises `Unsupported` for a model whose
    residual stream is not the sum of what its senders write, or that reads it in another way, and
    `MissingSite` for one whose blocks have no heads.

    Heads that share a key and value (grouped queries) have one receiver for it, where the authors'
    code has one for each query. Where a norm follows attention (Gemma 2), a head's difference
    passes it to first order, which their code leaves out. With "integrated" their code starts at
    the other prompt, unlike the paper; with "integrated_activations" it gives every edge the mean
    over the runs of all layers, those of other senders too.

    >>> table = edge_attribution(lm, clean, corrupted, logit_diff(" Mary", " John"))
    >>> len(table), list(table.columns)
    (70651, ['sender', 'receiver', 'logit_diff_delta', 'n'])
    """
    path = points_of_method(method, steps, points)
    target, source = bind_pair(lm, clean, corrupted, metric, direction, base_hooks)
    sites = required_sites(lm)
    count = len(target.rows)
    batch_scores: list[Float[Tensor, "sender receiver"]] = []
    senders: list[EdgeEnd] = []
    receivers: list[EdgeEnd] = []
    for batches in zip(target.batches(BATCH), source.batches(BATCH), strict=True):
        senders, receivers, scores = _score_edges(*batches, sites, method, path, edges)
        batch_scores.append(scores)
    means = torch.stack(batch_scores).sum(0) / count
    records = []
    for sender, receiver in select_edges(senders, receivers, edges):
        mean = float(means[sender, receiver])
        records.append((senders[sender].name, receivers[receiver].name, mean, count))
    names = ["sender", "receiver", f"{target.metric.name}_delta", "n"]
    table = pd.DataFrame(records, columns=names)
    table.attrs["direction"] = direction
    table.attrs["method"] = method
    if path:
        table.attrs["steps"] = len(path)
        table.attrs["points"] = points or "start"
    return table


def select_edges(
    senders: Sequence[EdgeEnd], receivers: Sequence[EdgeEnd], edges: pd.DataFrame | None
) -> list[tuple[int, int]]:
    """Returns the numbers of the sender and the receiver of each edge, or of each of `edges`."""
    numbers = _edge_numbers(senders, receivers)
    if edges is None:
        return list(numbers.values())
    missing = {"sender", "receiver"}.difference(edges.columns)
    if missing or edges.empty:
        raise BadHook(
            f"edges= has {len(edges)} rows and columns {', '.join(map(str, edges.columns))}: give "
            "a table with columns sender and receiver, such as one of hk.edge_attribution"
        )
    pairs = list(dict.fromkeys(zip(edges["sender"], edges["receiver"], strict=True)))
    for pair in pairs:
        if pair not in numbers:
            raise BadHook(
                f"edges= has {pair[0]} to {pair[1]}, which is no edge of this model: its "
                f"{len(numbers)} edges are those of hk.edge_attribution without edges="
            )
    return [numbers[pair] for pair in pairs]


def _edge_numbers(
    senders: Sequence[EdgeEnd], receivers: Sequence[EdgeEnd]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns the numbers of the two ends of every edge by their names: of each sender to each
    receiver of a later stage."""
    numbers: dict[tuple[str, str], tuple[int, int]] = {}
    order = sorted(range(len(receivers)), key=lambda number: receivers[number].stage)
    for number, sender in enumerate(senders):
        for receiver in order:
            if sender.stage < receivers[receiver].stage:
                numbers[sender.name, receivers[receiver].name] = (number, receiver)
    return numbers


def _score_edges(
    target: PromptMetric,
    source: PromptMetric,
    sites: Sequence[Site],
    method: str,
    path: Sequence[float],
    edges: pd.DataFrame | None,
) -> tuple[list[EdgeEnd], list[EdgeEnd], Float[Tensor, "sender receiver"]]:
    """Returns the senders, the receivers, and the score of each edge, summed over the prompts."""
    lm = target.lm
    captured_sites = [*sites, EMBED] if method == "integrated" else sites
    source_run = source.run(capture(captured_sites, name=CAPTURE_NAME))
    source_values = read_captures(source_run, captured_sites)
    result = compute_gradients(target, captured_sites, keep_graph=True)
    check_stream_is_sum(lm, result.values)
    senders = compute_senders(lm, result, source_values)

    def results_between(site: Site) -> Iterator[SiteGradients]:
        start, end = result.values[site].values.detach(), source_values[site].values
        return path_gradients(target, sites, start, end, path, site=site, keep_graph=True)

    if method == "integrated":
        end = source_values[EMBED].values
        check_path_end(target, end, source.of_run(source_run))
        return senders, *_score_receivers(lm, senders, results_between(EMBED))
    if method == "gradient":
        return senders, *_score_receivers(lm, senders, [result])
    if method == "exact":
        receivers, scores = _score_receivers(lm, senders, [result])
        patching = EdgePatching(target, _detached(result.values), _detached(source_values))
        _patch_edges(patching, senders, receivers, select_edges(senders, receivers, edges), scores)
        return senders, receivers, scores
    receivers: list[EdgeEnd] = []
    scores = []
    for stage, stage_senders in groupby(senders, key=attrgetter("stage")):
        results = results_between(_site_of_stage(stage))
        later, stage_scores = _score_receivers(lm, list(stage_senders), results, after=stage)
        receivers = receivers or later  # the embedding's are all
        scores.append(pad(stage_scores, (0, len(receivers) - len(later))))
    return senders, receivers, torch.cat(scores)


def _detached(captures: Mapping[AnySite, Captured]) -> dict[AnySite, Tensor]:
    return {site: captured.values.detach() for site, captured in captures.items()}


def _patch_edges(
    patching: EdgePatching,
    senders: Sequence[EdgeEnd],
    receivers: Sequence[EdgeEnd],
    edges: Iterable[tuple[int, int]],
    scores: Float[Tensor, "sender receiver"],
) -> None:
    """Replaces the scores of some edges by their exact effects, summed over the prompts."""
    lm = patching.target.lm
    before = patching.target.of_run(patching.target.run()).sum()
    by_receiver: dict[int, list[int]] = {}
    for sender, receiver in edges:
        by_receiver.setdefault(receiver, []).append(sender)
    differences: dict[int, Tensor] = {}
    for receiver, numbers in by_receiver.items():
        for number in numbers:
            if number not in differences:
                differences[number] = patching.difference(_site_of_sender(senders[number].name))
        stream, site = _read_sites(lm, receivers[receiver])
        metrics = patching.metrics(stream, site, [differences[number] for number in numbers])
        for number, metric in zip(numbers, metrics, strict=True):
            scores[number, receiver] = (metric.sum() - before).double()


def _site_of_sender(name: str) -> Site:
    return Site("resid_pre", 0) if name == "embed" else _site_of_end(name)


def _site_of_end(name: str) -> Site:
    """Returns the site of an end such as "q.9.3"."""
    site = as_site(name)
    assert isinstance(site, Site)
    return site


def _read_sites(lm: LM, receiver: EdgeEnd) -> tuple[Site, Site]:
    """Returns the site of the stream that a receiver reads, and the site of its input."""
    if receiver.name == "logits":
        last = Site("resid_post", lm.n_layers - 1)
        return last, last
    site = _site_of_end(receiver.name)
    return _stream_before(lm, site), site


def _stream_before(lm: LM, site: Site) -> Site:
    """Returns the stream that a block's site reads. A block that runs attention and MLP in parallel
    has no stream between them."""
    if site.name == "mlp_in" and lm.layout.find("resid_mid", site.layer):
        return Site("resid_mid", site.layer)
    return Site("resid_pre", site.layer)


def _site_of_stage(stage: int) -> Site:
    """Returns the site of what the senders of a stage write."""
    if stage < 0:
        return Site("resid_pre", 0)
    return Site(("z", "mlp_out")[stage % 2], stage // 2)


def _score_receivers(
    lm: LM, senders: Sequence[EdgeEnd], results: Iterable[SiteGradients], after: int = -1
) -> tuple[list[EdgeEnd], Float[Tensor, "sender receiver"]]:
    """Returns the receivers in blocks with one after a stage, and the mean over the results of the
    senders' differences times the receivers' gradients."""
    differences = _flatten(senders, lm.device)
    receivers: list[EdgeEnd] = []
    scores = []
    for result in results:
        receivers, columns = [], []
        for group in compute_receivers(lm, result):
            if max(end.stage for end in group) <= after:
                break
            columns.append(differences @ _flatten(group, lm.device).T)
            for end in group:  # without its vector, whose memory is freed
                receivers.append(replace(end, vector=end.vector.new_zeros(())))
        scores.append(torch.cat(columns, dim=1).double().cpu())
    return receivers, torch.stack(scores).mean(0)


def _flatten(ends: Sequence[EdgeEnd], device: torch.device) -> Float[Tensor, "end numbers"]:
    """Returns the vectors of some ends on one device; blocks may be on several."""
    return torch.stack([end.vector.flatten().to(device) for end in ends])


def required_sites(lm: LM) -> list[Site]:
    """Returns the sites of the ends of edges. Raises if the model lacks one."""
    sites = [Site("resid_post", lm.n_layers - 1)]
    for layer in range(lm.n_layers):
        names = ["resid_pre", *HEAD_INPUTS, "z", "attn_out", "mlp_in", "mlp_out"]
        if lm.layout.find("resid_mid", layer):
            names.append("resid_mid")
        sites += [Site(name, layer) for name in names]
    for site in sites:
        lm.location(site)
    return sites


def check_stream_is_sum(lm: LM, values: Mapping[AnySite, Captured]) -> None:
    """Raises `Unsupported` if the residual stream is more than the sum of what the embedding,
    attention and the MLPs write."""
    total = values[Site("resid_pre", 0)].values
    for layer in range(lm.n_layers):
        for name in ("attn_out", "mlp_out"):  # blocks may be on several devices
            total = total + values[Site(name, layer)].values.to(total.device)
    last = values[Site("resid_post", lm.n_layers - 1)].values
    if not _is_close(total, last):
        reason = lm.family.exceptions.get("sum", "something else writes into it, or scales it")
        if lm.family.stream_norms:
            reason = "its blocks normalise the stream itself"
        raise Unsupported(
            f"the stream of this {lm.family.name} model is not the sum of its embedding and of "
            "what attention and MLPs add, so that it has no edges between them: "
            f"{reason}. hk.attribution and hk.path_patching need no sum"
        )


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """True up to the rounding of sums."""
    difference = float((actual.to(expected.device) - expected).detach().abs().max())
    return difference <= TOLERANCES.get(expected.dtype, 1e-3) * float(expected.detach().abs().max())


def compute_senders(
    lm: LM, result: SiteGradients, source: Mapping[AnySite, Captured]
) -> list[EdgeEnd]:
    """Returns the senders with the difference of what they write, source minus target."""

    def difference(site: Site) -> Tensor:
        return source[site].values - result.values[site].values.detach()

    senders = [EdgeEnd("embed", -1, difference(Site("resid_pre", 0)))]
    for layer in range(lm.n_layers):
        z, attn_out = Site("z", layer), Site("attn_out", layer)
        z_values, output = result.values[z].values, result.values[attn_out].values
        # The product of the output projection's Jacobian with a head's difference, computed as the
        # gradient of a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            seed = torch.zeros_like(output, requires_grad=True)
            (backward,) = torch.autograd.grad(output, z_values, seed, create_graph=True)
            for head, vector in enumerate(_by_head(difference(z))):
                (written,) = torch.autograd.grad(backward, seed, vector, retain_graph=True)
                senders.append(EdgeEnd(f"z.{layer}.{head}", 2 * layer, written))
        mlp_out = difference(Site("mlp_out", layer))
        senders.append(EdgeEnd(f"mlp_out.{layer}", 2 * layer + 1, mlp_out))
    return senders


def _by_head(values: Tensor) -> Iterator[Tensor]:
    """Yields for each head the values with zeros at all other heads."""
    for head in range(values.shape[2]):
        selected = torch.zeros_like(values)
        selected[:, :, head] = values[:, :, head]
        yield selected


def compute_receivers(lm: LM, result: SiteGradients) -> Iterator[list[EdgeEnd]]:
    """Yields the receivers of each block, from the last to the first, with their gradients.

    Raises `Unsupported` at the end if something else reads the residual stream: together the
    gradients have to be the gradient of the embedding.
    """
    last = Site("resid_post", lm.n_layers - 1)
    total = result.gradient[last].clone()
    yield [EdgeEnd("logits", 2 * lm.n_layers, result.gradient[last])]
    for layer in reversed(range(lm.n_layers)):
        mlp_in = Site("mlp_in", layer)
        ends = _head_inputs(result, layer)
        stream = _stream_before(lm, mlp_in)
        stage = 2 * layer + (stream.name == "resid_mid")
        vector = _pull_back(result, mlp_in, stream, result.gradient[mlp_in])
        ends.append(EdgeEnd(str(mlp_in), stage, vector))
        for end in ends:
            total += end.vector.to(total.device)
        yield ends
    if not _is_close(total, result.gradient[Site("resid_pre", 0)]):
        raise Unsupported(
            f"the blocks of this {lm.family.name} model read the stream by another way than "
            "queries, keys, values and the MLP's input, so that edges would leave some of it out: "
            "use hk.attribution or hk.path_patching"
        )


def _head_inputs(result: SiteGradients, layer: int) -> list[EdgeEnd]:
    """Returns the receivers of a block's attention: each head's query, key and value."""
    ends = []
    for name in HEAD_INPUTS:
        site = Site(name, layer)
        for head, gradient in enumerate(_by_head(result.gradient[site])):
            vector = _pull_back(result, site, Site("resid_pre", layer), gradient)
            ends.append(EdgeEnd(f"{site}.{head}", 2 * layer, vector))
    return ends


def _pull_back(result: SiteGradients, site: Site, stream: Site, gradient: Tensor) -> Tensor:
    """Returns the gradient at the residual stream that comes through a site that reads it."""
    values, stream_values = result.values[site].values, result.values[stream].values
    (vector,) = torch.autograd.grad(values, stream_values, gradient, retain_graph=True)
    return vector
