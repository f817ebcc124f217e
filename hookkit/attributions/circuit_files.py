"""The JSON of a circuit in the Mechanistic Interpretability Benchmark (MIB: Mueller et al. 2025).

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {"input": {"in_graph"}, "a0.h1": …, "m0": …, "logits": …},
     "edges": {"input->a0.h1<q>": {"score", "in_graph"}, "a0.h1->m0": …, "m0->logits": …}}

There every head has its own key and value. Where heads share them, `cfg` also has n_kv_heads here,
and an edge to a shared key is written once for each head, with an equal part of its score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from ..errors import BadFile
from ..models.lm import LM
from .edge_graph import EDGE, EMBEDDING, LOGITS, NODE, EdgeGraph


def circuit_document(
    lm: LM, graph: EdgeGraph, table: pd.DataFrame, mask: Bool[np.ndarray, "sender receiver"]
) -> dict[str, Any]:
    """Returns the document of a circuit: its table of scores, and the edges that it has."""
    scores, node_scores = np.zeros(mask.shape), {}
    if "node" in table.columns:
        node_scores = dict(zip(table["node"], table["score"], strict=True))
    else:
        senders, receivers = graph.find_senders(table["sender"]), table["receiver"]
        scores[senders, graph.find_receivers(receivers)] = table["score"]
    nodes: dict[str, dict[str, Any]] = {}
    for name, is_inside in zip(graph.senders, mask.sum(axis=1) > 0, strict=True):
        nodes[_mib_node(name)] = {"in_graph": bool(is_inside)}
        if name in node_scores:
            nodes[_mib_node(name)]["score"] = float(node_scores[name])
    nodes[LOGITS] = {"in_graph": True}
    edges: dict[str, dict[str, Any]] = {}
    for sender, receiver in np.argwhere(graph.allowed):
        ends = _mib_receivers(graph, graph.receivers[receiver])
        score, is_inside = float(scores[sender, receiver]), bool(mask[sender, receiver])
        fields = {"score": score / len(ends), "in_graph": is_inside}
        start = _mib_node(graph.senders[sender])
        edges |= {f"{start}->{end}": fields for end in ends}
    config = {
        "n_layers": lm.n_layers,
        "n_heads": lm.sizes["head"],
        "n_kv_heads": lm.sizes["kv_head"],
        "parallel_attn_mlp": lm.layout.find("resid_mid", 0) is None,
        "d_model": lm.sizes["d_model"],
    }
    return {"cfg": config, "nodes": nodes, "edges": edges}


def read_circuit_document(document: Mapping[str, Any], kv_heads: int | None) -> pd.DataFrame:
    """Returns the table of a circuit: of nodes if they have scores, and edges have none."""
    config, nodes = document["cfg"], document["nodes"]
    if any("neurons" in fields for fields in nodes.values()):
        raise BadFile("the circuit is of neurons, which hookkit's circuits do not have")
    share = config["n_heads"] // (kv_heads or config.get("n_kv_heads") or config["n_heads"])
    edges = _read_edges(document["edges"], share)
    scored = {name: fields for name, fields in nodes.items() if "score" in fields}
    if scored and not edges["score"].to_numpy().any():
        return _read_nodes(scored)
    groups = edges.groupby(EDGE, sort=False)
    if (groups["in_circuit"].nunique() > 1).to_numpy().any():
        raise BadFile(
            "heads that share a key or a value have different edges to it there, which this model "
            "cannot separate: it is one key"
        )
    return groups.agg({"score": "sum", "in_circuit": "first"}).reset_index()


def _read_edges(edges: Mapping[str, Mapping[str, Any]], share: int) -> pd.DataFrame:
    """Returns a row for each edge of the file. `share` heads have one key and one value."""
    rows: list[tuple[Any, ...]] = []
    for name, fields in edges.items():
        start, end = name.split("->")
        score, is_inside = float(fields["score"]), bool(fields["in_graph"])
        rows.append((_sender_of(start), _receiver_of(end, share), score, is_inside))
    return pd.DataFrame(rows, columns=[*EDGE, "score", "in_circuit"])


def _read_nodes(nodes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    rows: list[tuple[Any, ...]] = []
    for name, fields in nodes.items():
        if np.isfinite(fields["score"]):  # NaN where a node has no score
            rows.append((_sender_of(name), float(fields["score"]), bool(fields["in_graph"])))
    return pd.DataFrame(rows, columns=[*NODE, "score", "in_circuit"])


def _mib_node(sender: str) -> str:
    name, *numbers = sender.split(".")
    if name == EMBEDDING:
        return "input"
    return f"a{numbers[0]}.h{numbers[1]}" if name == "z" else f"m{numbers[0]}"


def _mib_receivers(graph: EdgeGraph, receiver: str) -> list[str]:
    nodes = list(map(_mib_node, graph.nodes_of(receiver)))
    if not nodes:
        return [LOGITS]
    return nodes if receiver.startswith("mlp_in") else [f"{node}<{receiver[0]}>" for node in nodes]


def _sender_of(node: str) -> str:
    if node == "input":
        return EMBEDDING
    head = re.fullmatch(r"a(\d+)\.h(\d+)", node)
    if head:
        return f"z.{int(head[1])}.{int(head[2])}"
    return f"mlp_out.{int(node.removeprefix('m'))}"


def _receiver_of(end: str, share: int) -> str:
    if end == LOGITS:
        return end
    node, _, letter = end.removesuffix(">").partition("<")
    name, layer, *head = _sender_of(node).split(".")
    if name != "z":
        return f"mlp_in.{layer}"
    number = int(head[0]) if letter == "q" else int(head[0]) // share
    return f"{letter}.{layer}.{number}"
