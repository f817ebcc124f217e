"""The graph of a model's edges: its senders, its receivers, and which may reach which.

Names are those of `hk.edge_attribution`. A node is a sender: the embedding, a head or an MLP. A
head reads by three receivers: its query, key and value. Heads that share keys have the receivers of
keys and values in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from ..errors import OtherModel
from ..models.lm import LM
from ..models.sites import Site

LOGITS = "logits"
EMBEDDING = "embed"
EDGE, NODE = ["sender", "receiver"], ["node"]  # the columns that name an edge, or a node
NO_EDGE = np.zeros((0, 0), bool)

Mask: TypeAlias = Bool[np.ndarray, "sender receiver"]
Indices: TypeAlias = Int[np.ndarray, " name"]


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Senders and receivers in the order of the model, and the edges between them.

    allowed  [sender, receiver]  True if there is such an edge
    """

    senders: list[str]
    receivers: list[str]
    allowed: Mask

    @cached_property
    def readers(self) -> Bool[np.ndarray, "receiver sender"]:
        """True if a receiver belongs to a node; nothing belongs to the logits."""
        readers = np.zeros((len(self.receivers), len(self.senders)), bool)
        for index, name in enumerate(self.receivers):
            readers[index, self.find_senders(self.nodes_of(name))] = True
        return readers

    def find_senders(self, names: Iterable[str]) -> Indices:
        """Returns the indices of senders. Raises `OtherModel` for one that is not there."""
        return _find(self._sender_index, names)

    def find_receivers(self, names: Iterable[str]) -> Indices:
        """Returns the indices of receivers. Raises `OtherModel` for one that is not there."""
        return _find(self._receiver_index, names)

    def is_sender(self, name: str) -> Bool[np.ndarray, " sender"]:
        """Returns True for the sender of this name."""
        return np.array(self.senders, object) == name

    @cached_property
    def _sender_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.senders)}

    @cached_property
    def _receiver_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.receivers)}

    @cached_property
    def _is_logits(self) -> Bool[np.ndarray, " receiver"]:
        return np.array(self.receivers, object) == LOGITS

    @cached_property
    def _heads(self) -> Counter[str]:
        """The number of heads, by the name without the head."""
        return Counter(name.rpartition(".")[0] for name in (*self.senders, *self.receivers))

    @property
    def is_complete(self) -> bool:
        """True if the edges are all that a model with these names has."""
        before, total = 1, {False: 0, True: 0}  # by whether attention and MLPs run in parallel
        for layer in range(self._heads["mlp_out"]):
            names = [f"{name}.{layer}" for name in ("z", "q", "k", "v")]
            n_heads, n_queries, n_keys, n_values = map(self._heads.__getitem__, names)
            if n_queries != n_heads or n_keys != n_values or n_heads % max(1, n_keys):
                return False
            n_inputs = n_queries + n_keys + n_values
            for is_parallel in total:
                mlp_reads = before if is_parallel else before + n_heads
                total[is_parallel] += before * n_inputs + mlp_reads
            before += n_heads + 1
        return int(self.allowed.sum()) - before in total.values()

    def nodes_of(self, receiver: str) -> list[str]:
        """Returns the nodes that read what a receiver reads."""
        name, *numbers = receiver.split(".")
        if name == LOGITS:
            return []
        if name == "mlp_in":
            return [f"mlp_out.{numbers[0]}"]
        layer, head = map(int, numbers)
        share = self._heads[f"z.{layer}"] // self._heads[f"{name}.{layer}"]
        return [f"z.{layer}.{number}" for number in range(head * share, (head + 1) * share)]

    def feeds(self, nodes: Bool[np.ndarray, "*row sender"]) -> Bool[np.ndarray, "*row receiver"]:
        """Returns which receivers belong to one of some nodes, or are the logits."""
        counts = nodes.astype(np.float32) @ self.readers.T.astype(np.float32)
        return (counts > 0) | self._is_logits

    def prune(self, kept_edges: Mask) -> Mask:
        """Returns the edges that are on a path from the embedding to the logits."""
        before = -1
        while int(kept_edges.sum()) != before:
            before = int(kept_edges.sum())
            has_input = (kept_edges.sum(axis=0) > 0) @ self.readers
            nodes = (kept_edges.sum(axis=1) > 0) & (has_input | self.is_sender(EMBEDDING))
            kept_edges = kept_edges & nodes[:, None] & self.feeds(nodes)[None]
        return kept_edges

    def between(self, nodes: Bool[np.ndarray, " sender"]) -> Mask:
        """Returns all edges between some nodes, and from them to the logits."""
        return self.allowed & nodes[:, None] & self.feeds(nodes)[None]


def _find(index: Mapping[str, int], names: Iterable[str]) -> Indices:
    try:
        return np.array([index[name] for name in names], int)
    except KeyError as error:
        raise OtherModel(
            f"the circuit has {error}, which this model lacks: it is of another model, or was "
            "read from a file without the number of key-value heads (kv_heads=)"
        ) from error


def graph_of_model(lm: LM) -> EdgeGraph:
    """Returns the graph of a model, whose blocks have all sites of edges."""
    senders: dict[str, int] = {EMBEDDING: -1}
    receivers: dict[str, int] = {}
    for layer in range(lm.n_layers):
        attention, mlp = 2 * layer, 2 * layer + 1
        senders |= dict.fromkeys(_heads_at(lm, "z", layer), attention)
        senders[f"mlp_out.{layer}"] = mlp
        for name in ("q", "k", "v"):
            receivers |= dict.fromkeys(_heads_at(lm, name, layer), attention)
        # A block that runs attention and MLP in parallel has no stream between them.
        is_parallel = lm.layout.find("resid_mid", layer) is None
        receivers[f"mlp_in.{layer}"] = attention if is_parallel else mlp
    receivers[LOGITS] = 2 * lm.n_layers
    sent, read = np.array(list(senders.values())), np.array(list(receivers.values()))
    return EdgeGraph(list(senders), list(receivers), sent[:, None] < read[None])


def _heads_at(lm: LM, name: str, layer: int) -> list[str]:
    return [f"{name}.{layer}.{head}" for head in range(lm.shape(Site(name, layer))[0])]


def graph_of_names(senders: Sequence[str], receivers: Sequence[str]) -> EdgeGraph:
    """Returns the graph of a table of edges."""
    graph = EdgeGraph(list(dict.fromkeys(senders)), list(dict.fromkeys(receivers)), NO_EDGE)
    allowed = np.zeros((len(graph.senders), len(graph.receivers)), bool)
    allowed[graph.find_senders(senders), graph.find_receivers(receivers)] = True
    return replace(graph, allowed=allowed)
