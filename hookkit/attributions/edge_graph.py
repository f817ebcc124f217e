"""The graph of a model's edges: its senders, its receivers, and which may reach which.

Names are those of `hk.edge_attribution`. A node is a sender: the embedding, a head or an MLP. What
a head reads are three receivers (its query, key and value), of which heads that share keys share
two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool

from ..models.lm import LM
from ..models.sites import Site

LOGITS = "logits"
EMBEDDING = "embed"


@dataclass(frozen=True, eq=False)
class EdgeGraph:
    """Senders and receivers in the order of the model, and the edges between them.

    allowed  [sender, receiver]  True if there is such an edge
    """

    senders: pd.Index
    receivers: pd.Index
    allowed: Bool[np.ndarray, "sender receiver"]

    @cached_property
    def readers(self) -> Bool[np.ndarray, "receiver sender"]:
        """True if a receiver belongs to a node; nothing belongs to the logits."""
        readers = np.zeros((len(self.receivers), len(self.senders)), bool)
        for index, name in enumerate(self.receivers):
            readers[index, self.senders.get_indexer(self.nodes_of(name))] = True
        return readers

    @cached_property
    def _heads(self) -> pd.Series:
        """The number of receivers, or of heads, by the name without the head."""
        names = pd.Series([*self.senders, *self.receivers])
        return names.str.rpartition(".")[0].value_counts()

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

    def feeds(self, nodes: Bool[np.ndarray, " sender"]) -> Bool[np.ndarray, " receiver"]:
        """Returns which receivers belong to one of some nodes, or are the logits."""
        return (self.readers & nodes).any(axis=1) | (self.receivers == LOGITS)

    def prune(self, kept: Bool[np.ndarray, "sender receiver"]) -> Bool[np.ndarray, "..."]:
        """Returns the edges that are on a path from the embedding to the logits."""
        before = -1
        while kept.sum() != before:
            before = kept.sum()
            has_input = (kept.any(axis=0)[:, None] & self.readers).any(axis=0)
            nodes = kept.any(axis=1) & (has_input | (self.senders == EMBEDDING))
            kept = kept & nodes[:, None] & self.feeds(nodes)[None]
        return kept

    def between(self, nodes: Bool[np.ndarray, " sender"]) -> Bool[np.ndarray, "sender receiver"]:
        """Returns all edges between some nodes, and from them to the logits."""
        return self.allowed & nodes[:, None] & self.feeds(nodes)[None]


def graph_of_model(lm: LM) -> EdgeGraph:
    """Returns the graph of a model, whose blocks have all sites of edges."""
    senders, receivers = {EMBEDDING: -1}, {}
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
    return EdgeGraph(pd.Index(senders), pd.Index(receivers), sent[:, None] < read[None])


def _heads_at(lm: LM, name: str, layer: int) -> list[str]:
    return [f"{name}.{layer}.{head}" for head in range(lm.shape(Site(name, layer))[0])]


def graph_of_names(senders: Sequence[str], receivers: Sequence[str]) -> EdgeGraph:
    """Returns the graph of a table of edges."""
    sender_codes, sender_names = pd.factorize(np.asarray(senders, object))
    receiver_codes, receiver_names = pd.factorize(np.asarray(receivers, object))
    allowed = np.zeros((len(sender_names), len(receiver_names)), bool)
    allowed[sender_codes, receiver_codes] = True
    return EdgeGraph(pd.Index(sender_names), pd.Index(receiver_names), allowed)
