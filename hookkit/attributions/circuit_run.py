"""hk.run_circuit: the model with all edges ablated but those of a circuit.

A receiver (a head's query, key or value, an MLP, the logits) reads the residual stream minus what
senders whose edge to it is not in the circuit have written, plus what they write when ablated:

1. A sender without any edge in the circuit has its ablated value itself.
2. For each other sender, the difference between its output in this run and its ablated output is
   kept. A receiver's stream is the run's own minus the differences of the edges that it lacks.
3. The family's own norm and projection turn that stream into the query, key, value or MLP input.

Each row of a batch may have a circuit of its own. A receiver that lacks no such edge keeps the
model's own value, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadPrompt, Unsupported
from ..hooks.base import EditHook, Hook
from ..hooks.capture import capture
from ..hooks.edits import edit
from ..models.lm import LM
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, Site
from ..runs.forward import LogitsOption, forward
from ..runs.run import Run
from ..sweeps.grids import check_pairs
from .backward import CAPTURE_NAME, read_captures
from .block_maps import BlockMaps, find_block_maps
from .circuit import Circuit
from .edge_graph import EMBEDDING, LOGITS, EdgeGraph, graph_of_model
from .edges import HEAD_INPUTS, TOLERANCES, required_sites

Ablate: TypeAlias = Literal["counterfactual", "mean", "zero"]
EMBED_SITE = Site("resid_pre", 0)


@check_arguments
def run_circuit(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    circuit: Circuit | Sequence[Circuit],
    *captures: Hook,
    ablate: Ablate = "counterfactual",
    logits: LogitsOption = "all",
) -> Run:
    """Runs the clean prompts with all edges ablated but those of the circuit (Wang et al. 2022;
    Conmy et al. 2023; Hanna et al. 2024), and returns the run.

    circuit   one, or a list with one for each prompt: they share the batch
    captures  captures, which see what the circuit computes. (At a stream, they see all of it: each
              receiver reads a stream of its own.)
    ablate    what an ablated sender writes: "counterfactual", its value on the corrupted prompt;
              "mean", the mean of that over all corrupted prompts and positions; "zero", nothing

    The circuit of all edges is the clean run, and that of none the corrupted run ("counterfactual")
    bit for bit. It takes one forward of the clean prompts, one of the corrupted ones, and two of
    one prompt, which check that nothing else in this model reads the stream. Raises `Unsupported`
    for models without edges (see `hk.edge_attribution`), and where another part reads the stream.

    >>> scores = edge_attribution(lm, clean, corrupted, logit_diff(" Mary", " John"))
    >>> run = run_circuit(lm, clean, corrupted, circuit(scores, share=0.02), capture("pattern.9"))
    >>> run.logits.shape == forward(lm, clean).logits.shape
    True
    """
    for hook in captures:
        if isinstance(hook, EditHook):
            raise Unsupported(
                f"{hook} changes values between the senders and receivers of edges: give captures"
            )
    check_pairs(lm, corrupted, clean)
    rows, corrupted_rows = as_batch(lm, clean).rows, as_batch(lm, corrupted).rows
    circuits = [circuit] * len(rows) if isinstance(circuit, Circuit) else list(circuit)
    if len(circuits) != len(rows):
        raise BadPrompt(
            f"{len(circuits)} circuits for {len(rows)} prompts: give one for each, or one"
        )
    model = CircuitModel.of(lm, rows, corrupted_rows)
    masks = {id(member): member.mask(model.graph) for member in circuits}
    kept_edges = np.stack([masks[id(member)] for member in circuits])
    ablated = model.ablated_values([corrupted_rows], ablate)(corrupted_rows)
    return model.run(rows, kept_edges, ablated, *captures, logits=logits)


Values: TypeAlias = Mapping[AnySite, Tensor]


@dataclass(frozen=True, eq=False)
class CircuitModel:
    """A model with its graph and the functions of its blocks, ready to run circuits."""

    lm: LM
    graph: EdgeGraph
    maps: list[BlockMaps]

    @classmethod
    def of(cls, lm: LM, clean: Sequence[Row], corrupted: Sequence[Row]) -> CircuitModel:
        """Returns the model, checked on the first pair of prompts that differ."""
        required_sites(lm)
        pairs = zip(clean, corrupted, strict=True)
        differing = [pair for pair in pairs if tuple(pair[0]) != tuple(pair[1])]
        if not differing:
            raise BadPrompt(
                "every corrupted prompt is its clean prompt, so that nothing is ablated: give "
                "prompts that differ"
            )
        model = cls(lm, graph_of_model(lm), find_block_maps(lm, differing[0][0]))
        model._check_readers(*differing[0])
        return model

    @property
    def sender_sites(self) -> list[AnySite]:
        """The sites of the senders, all heads of a block at once."""
        sites: list[AnySite] = [EMBED_SITE]
        for layer in range(self.lm.n_layers):
            sites += [Site("z", layer), Site("mlp_out", layer)]
        return sites

    def run(
        self,
        rows: Sequence[Row],
        kept_edges: Bool[np.ndarray, "row sender receiver"],
        ablated: Values,
        *captures: Hook,
        logits: LogitsOption = "last",
        keep_senders: bool = False,
    ) -> Run:
        """Runs prompts with a circuit for each row."""
        plan = _CircuitPass(self, kept_edges, ablated, keep_senders)
        return forward(self.lm, list(rows), *plan.hooks(), *captures, logits=logits)

    def hooks_of_mask(self, mask: Float[Tensor, "sender receiver"], ablated: Values) -> list[Hook]:
        """Returns the edits of a run in which each edge carries a mix of its sender's value and
        the ablated one, with weights mask and 1 - mask, through which gradients flow."""
        rows = len(ablated[EMBED_SITE])
        kept_edges = np.broadcast_to(self.graph.allowed, (rows, *self.graph.allowed.shape))
        plan = _CircuitPass(self, kept_edges, ablated, keep_senders=True)
        plan.slots = np.arange(len(self.graph.senders))
        missing = torch.from_numpy(self.graph.allowed).to(mask) - mask
        plan.missing = missing.expand(rows, -1, -1)
        return plan.hooks()

    def corrupted_run(self, rows: Sequence[Row], logits: LogitsOption = "none") -> Run:
        """Returns a run with the senders' values."""
        senders = capture(self.sender_sites, name=CAPTURE_NAME)
        return forward(self.lm, list(rows), senders, logits=logits)

    def ablated_values(
        self, batches: Sequence[Sequence[Row]], ablate: Ablate
    ) -> Callable[[Sequence[Row]], Values]:
        """Returns the function that gives the senders' ablated values for corrupted prompts.

        `batches` are all of these prompts, over which means are taken.
        """
        if ablate == "counterfactual":
            return lambda rows: captured_tensors(self.corrupted_run(rows), self.sender_sites)
        sums: dict[AnySite, Tensor] = {}
        for rows in batches if ablate == "mean" else [batches[0][:1]]:
            values = captured_tensors(self.corrupted_run(rows), self.sender_sites)
            for site, tensor in values.items():  # zero in the padding of shorter rows
                sums[site] = sums.get(site, 0) + tensor.double().sum((0, 1), keepdim=True)
        count = sum(map(len, itertools.chain.from_iterable(batches)))
        factor = 1 / count if ablate == "mean" else 0.0
        constants = {site: total * factor for site, total in sums.items()}
        return lambda rows: constants

    def _check_readers(self, clean: Row, corrupted: Row) -> None:
        """Raises `Unsupported` if another part than the receivers reads the embedding.

        Without the embedding's edges, and with all others, the run has to be the corrupted one.
        """
        run = self.corrupted_run([corrupted], logits="all")
        kept_edges = self.graph.allowed & ~self.graph.is_sender(EMBEDDING)[:, None]
        ablated = captured_tensors(run, self.sender_sites)
        logits = self.run(
            [clean], kept_edges[None], ablated, logits="all", keep_senders=True
        ).logits
        error = float((logits - run.logits).abs().max())
        spread = float(run.logits.std())
        if not error <= TOLERANCES.get(logits.dtype, 1e-3) * spread:
            raise Unsupported(
                f"in this {self.lm.family.name} model something else than queries, keys, values, "
                "MLPs and the logits reads the stream: a run whose receivers all read the "
                f"corrupted embedding differs from the corrupted run by {error:.2g}, where logits "
                f"vary by {spread:.2g}"
            )


def captured_tensors(run: Run, sites: Sequence[AnySite]) -> dict[AnySite, Tensor]:
    """Returns the captured tensors [row, pos, ...] at some sites."""
    return {site: captured.values for site, captured in read_captures(run, sites).items()}


@dataclass(eq=False)
class _CircuitPass:
    """One forward of prompts with a circuit for each row. It owns the values of the forward.

    missing      [row, sender, receiver]  edges that a receiver has to leave out of its stream
    slots        the index of each sender among those with differences, or -1
    differences  [row, slot, pos, d_model]  what each has written, minus its ablated output; of
                 heads with a norm after them, before that norm
    """

    model: CircuitModel
    kept_edges: Bool[np.ndarray, "row sender receiver"]
    ablated: Values
    keep_senders: bool
    n_filled: int = 0
    streams: dict[AnySite, Tensor] = field(default_factory=dict)
    projected: dict[int, Tensor] = field(default_factory=dict)
    differences: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        graph = self.model.graph
        live = (self.kept_edges.sum(axis=2) > 0) | self.keep_senders  # [row, sender]
        missing = live[:, :, None] & graph.feeds(live)[:, None] & graph.allowed & ~self.kept_edges
        needed = missing.sum(axis=(0, 2)) > 0
        self.slots = np.where(needed, needed.cumsum() - 1, -1)
        self.missing = torch.from_numpy(missing[:, needed])
        self.dead = torch.from_numpy(~live)

    def hooks(self) -> list[Hook]:
        """Returns the edits of the forward, in the order of the model."""
        hooks: list[Hook] = []
        graph, last = self.model.graph, Site("resid_post", self.model.lm.n_layers - 1)
        recorded: set[Site] = set()

        def send(site: Site, names: Sequence[str], function: Callable[..., Tensor]) -> None:
            indices = graph.find_senders(names)
            if self.dead[:, indices].any() or (self.slots[indices] >= 0).any():
                hooks.append(edit(site, partial(function, site, torch.from_numpy(indices))))

        def receive(
            site: Site, names: Sequence[str], stream: Site, function: Callable[..., Tensor]
        ) -> None:
            indices = torch.from_numpy(graph.find_receivers(names))
            if not self.missing[:, :, indices].any():
                return
            if stream not in recorded and stream != site:
                recorded.add(stream)
                hooks.append(edit(stream, partial(self._record, stream)))
            hooks.append(edit(site, partial(function, site, stream, indices)))

        send(EMBED_SITE, [EMBEDDING], self._send)
        for maps in self.model.maps:
            layer = maps.layer
            for name in HEAD_INPUTS:
                site = Site(name, layer)
                names = _names_of(graph.receivers, site)
                receive(site, names, Site("resid_pre", layer), self._receive_heads)
            z, mlp_in, mlp_out = Site("z", layer), Site("mlp_in", layer), Site("mlp_out", layer)
            send(z, _names_of(graph.senders, z), self._send_heads)
            receive(mlp_in, [str(mlp_in)], maps.mlp_stream, self._receive_mlp)
            send(mlp_out, [str(mlp_out)], self._send)
        receive(last, [LOGITS], last, self._receive_logits)
        return hooks

    # ---- senders

    def _send(self, site: Site, sender: Tensor, values: Tensor) -> Tensor:
        """The embedding, or an MLP."""
        ablated = self.ablated[site].to(values)
        dead = self.dead[:, sender[0]].to(values.device)
        values = torch.where(dead[:, None, None], ablated, values)
        if self.slots[sender[0]] >= 0:
            self._keep((values - ablated)[:, None])
        return values.clone()

    def _send_heads(self, site: Site, senders: Tensor, values: Tensor) -> Tensor:
        maps = self.model.maps[site.layer or 0]
        ablated = self.ablated[site].to(values)
        dead = self.dead[:, senders].to(values.device)
        values = torch.where(dead[:, None, :, None], ablated, values)
        heads = np.flatnonzero(self.slots[senders] >= 0)
        if len(heads):
            difference = (values - ablated)[:, :, heads]
            weights = maps.output_weights()[heads] * (1.0 if maps.after else maps.factor)
            if maps.after:
                self.projected[maps.layer] = maps.project(values)
            self._keep(torch.einsum("nphk,hkd->nhpd", difference, weights))
        return values.clone()

    def _keep(self, new: Float[Tensor, "row slot pos d_model"]) -> None:
        """Keeps the differences of the next senders. Nothing is written in place, since a gradient
        may need the earlier ones."""
        new = new.to(torch.promote_types(new.dtype, torch.float32))
        if self.n_filled:
            new = torch.cat([self.differences, new.to(self.differences.device)], dim=1)
        self.differences = new
        self.n_filled = new.shape[1]

    # ---- receivers

    def _record(self, site: Site, values: Tensor) -> Tensor:
        self.streams[site] = values
        return values.clone()

    def _streams_of(self, stream: Tensor, receivers: Tensor) -> _Streams:
        """Returns what some receivers read, for the rows in which one of them lacks an edge."""
        missing = self.missing[:, : self.n_filled, receivers]  # [row, slot, receiver]
        active = (missing != 0).any(dim=1)
        rows, columns = active.any(1).nonzero()[:, 0], active.any(0).nonzero()[:, 0]
        differences = self.differences[:, : self.n_filled]
        if len(rows) < len(missing):
            differences = differences[rows]
        weights = missing[rows][:, :, columns].transpose(1, 2).to(differences)
        removed = self._removed(differences, weights, rows).to(stream.device)
        read = (stream[rows][:, None] - removed).to(stream.dtype)
        return _Streams(rows, columns, active[rows][:, columns].to(stream.device), read)

    def _removed(
        self, differences: Tensor, weights: Float[Tensor, "row receiver slot"], rows: Tensor
    ) -> Float[Tensor, "row receiver pos d_model"]:
        """Returns the sum of the differences that each receiver lacks."""
        parts = []
        for layer, projected in self.projected.items():  # with a norm after attention
            maps = self.model.maps[layer]
            heads = _names_of(self.model.graph.senders, Site("z", layer))
            filled = self.slots[self.model.graph.find_senders(heads)]
            filled = filled[filled >= 0]
            slots = slice(int(filled[0]), int(filled[-1]) + 1)
            if not weights[:, :, slots].any():
                continue
            model_values = projected[rows][:, None]
            lacking = _weighted_sum(weights[:, :, slots], differences[:, slots])
            assert maps.after is not None
            parts.append(
                maps.after(model_values)
                - maps.after((model_values - lacking).to(model_values.dtype))
            )
            weights = weights.clone()
            weights[:, :, slots] = 0
        total = _weighted_sum(weights, differences)
        for part in parts:
            total = total + part
        return total

    def _receive_heads(self, site: Site, stream: Site, receivers: Tensor, values: Tensor) -> Tensor:
        maps = self.model.maps[site.layer or 0]
        streams = self._streams_of(self.streams[stream], receivers)
        read = maps.read(streams.read.flatten(0, 1)).unflatten(0, streams.read.shape[:2])
        weight, bias = maps.head_weights(site.name)
        columns = streams.columns.to(values.device)
        new = torch.einsum("nhpd,dhk->nphk", read, weight[:, columns]) + bias[columns]
        model_values = values[streams.rows]
        new = torch.where(streams.active[:, None, :, None], new, model_values[:, :, columns])
        return values.index_put((streams.rows,), model_values.index_copy(2, columns, new))

    def _receive_mlp(self, site: Site, stream: Site, receivers: Tensor, values: Tensor) -> Tensor:
        streams = self._streams_of(self.streams[stream], receivers)
        new = self.model.maps[site.layer or 0].read_mlp(streams.read[:, 0])
        return values.index_put((streams.rows,), new)

    def _receive_logits(
        self, site: Site, stream: Site, receivers: Tensor, values: Tensor
    ) -> Tensor:
        streams = self._streams_of(values, receivers)
        return values.index_put((streams.rows,), streams.read[:, 0])


@dataclass(frozen=True, eq=False)
class _Streams:
    """What receivers read: `read` is of `rows` and of `columns` among them; where `active` is
    False, a receiver lacks no edge."""

    rows: Tensor
    columns: Tensor
    active: Bool[Tensor, "row receiver"]
    read: Float[Tensor, "row receiver pos d_model"]


def _names_of(names: Sequence[str], site: Site) -> list[str]:
    """Returns the heads of a site among names."""
    return [name for name in names if name.startswith(f"{site}.")]


def _weighted_sum(
    weights: Float[Tensor, "row receiver slot"], values: Float[Tensor, "row slot pos d_model"]
) -> Float[Tensor, "row receiver pos d_model"]:
    return torch.bmm(weights, values.flatten(2)).unflatten(2, values.shape[2:])
