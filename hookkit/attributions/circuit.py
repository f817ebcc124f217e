"""Circuits: the edges, or the nodes, of a model that are kept, with the scores that chose them.

    scores = hk.edge_attribution(lm, clean, corrupted, hk.metrics.logit_diff(" Mary", " John"))
    circuit = hk.circuit(scores, share=0.01)        # the best hundredth of all edges
    hk.run_circuit(lm, clean, corrupted, circuit)   # the model with all other edges ablated
    circuit.save("ioi.json", lm)                    # the JSON of the MIB benchmark
"""

from __future__ import annotations

import heapq
import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ..arguments import check_arguments, check_integer, check_number, check_seed
from ..display import describe_outcome, render_html
from ..errors import BadFile, BadHook, EmptySelection, OtherModel
from ..files.atomic import write_text
from ..files.untrusted import check_file, check_mapping, check_path, read_json
from ..models.lm import LM
from .edge_graph import EMBEDDING, LOGITS, EdgeGraph, graph_of_model, graph_of_names

Mask = Bool[np.ndarray, "sender receiver"]
EDGE, NODE = ["sender", "receiver"], ["node"]
NODE_SITES = ("z", "mlp_out")
DEFAULT_SHARE = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Edges, or nodes, of a model, and which of them are in the circuit. From `hk.circuit`.

    table      a row for each edge (sender, receiver) or node (node) of the model, with its score
               and `in_circuit`
    metric     the metric that the scores are about
    direction  "noise" or "denoise", as in `hk.edge_attribution`; "" if it is not known

    A circuit of nodes has all edges between them, and from them to the logits. Nodes without a
    score, such as the embedding, are always in it.
    """

    table: pd.DataFrame
    metric: str = ""
    direction: str = ""

    def __post_init__(self) -> None:
        names = NODE if "node" in self.table.columns else EDGE
        missing = {*names, "score", "in_circuit"} - set(self.table.columns)
        if missing or self.table.empty or self.table.duplicated(names).any():
            raise BadHook(
                "a circuit is a table with a row for each edge (sender, receiver) or node (node), "
                f"with score and in_circuit, and this one lacks {sorted(missing) or 'rows'} or "
                "names one twice: make it by hk.circuit(scores)"
            )

    @property
    def kind(self) -> Literal["edges", "nodes"]:
        """What the circuit is made of."""
        return "nodes" if "node" in self.table.columns else "edges"

    @property
    def names(self) -> list[str]:
        """The columns that name an edge or a node."""
        return NODE if self.kind == "nodes" else EDGE

    @property
    def chosen(self) -> pd.DataFrame:
        """The edges or nodes in the circuit, by the absolute value of their scores."""
        kept = self.table[self.table["in_circuit"]].drop(columns="in_circuit")
        return kept.sort_values("score", key=abs, ascending=False, ignore_index=True)

    def __len__(self) -> int:
        return int(self.table["in_circuit"].sum())

    @property
    def share(self) -> float:
        """How many of all edges, or nodes, are in the circuit."""
        return len(self) / len(self.table)

    @cached_property
    def _graph(self) -> EdgeGraph:
        return graph_of_names(list(self.table["sender"]), list(self.table["receiver"]))

    def with_only(self, kept: Bool[np.ndarray, " edge"]) -> Circuit:
        """Returns the circuit of these rows of the table."""
        return replace(self, table=self.table.assign(in_circuit=np.asarray(kept, bool)))

    def complement(self) -> Circuit:
        """Returns the circuit of all edges, or scored nodes, that are not in this one."""
        return self.with_only(~self.table["in_circuit"].to_numpy(bool))

    def random(self, *, seed: int = 0) -> Circuit:
        """Returns a random circuit of as many edges or nodes.

        Edges are those of random walks from the logits back to the embedding, so that each is on a
        path between the two, and at last random edges between the nodes of these walks.
        """
        draws = random.Random(check_seed(seed))
        if self.kind == "nodes" or self.share in (0.0, 1.0):
            kept = self.table["in_circuit"].tolist()
            draws.shuffle(kept)
            return self.with_only(np.array(kept))
        return self._of_mask(self._graph, _random_edges(self._graph, len(self), draws))

    def _of_mask(self, graph: EdgeGraph, kept: Mask) -> Circuit:
        senders = graph.senders.get_indexer(self.table["sender"])
        receivers = graph.receivers.get_indexer(self.table["receiver"])
        return self.with_only(kept[senders, receivers])

    def mask(self, graph: EdgeGraph) -> Mask:
        """Returns which edges of a model's graph are in the circuit.

        Raises `OtherModel` if the model lacks one.
        """
        kept = self.table[self.table["in_circuit"]]
        if self.kind == "nodes":
            nodes = ~graph.senders.isin(self.table["node"])
            nodes[_find(graph.senders, kept["node"])] = True
            return graph.between(nodes)
        mask = np.zeros_like(graph.allowed)
        senders = _find(graph.senders, kept["sender"])
        mask[senders, _find(graph.receivers, kept["receiver"])] = True
        if (mask & ~graph.allowed).any():
            raise OtherModel("the circuit has edges that this model lacks: it is of another model")
        return mask

    # ---- the JSON of the benchmark MIB

    @check_arguments
    def save(self, path: str | os.PathLike[str], lm: LM) -> Path:
        """Writes the circuit of a model as the JSON of the Mechanistic Interpretability Benchmark
        (MIB: Mueller et al. 2025), and returns its path.

        There every head has its own key and value: an edge to those that several heads share is
        written once for each, with an equal part of its score.
        """
        graph, mask = graph_of_model(lm), self.mask(graph_of_model(lm))
        scores, node_scores = np.zeros(mask.shape), {}
        if self.kind == "nodes":
            node_scores = dict(zip(self.table["node"], self.table["score"], strict=True))
        else:
            senders = _find(graph.senders, self.table["sender"])
            scores[senders, _find(graph.receivers, self.table["receiver"])] = self.table["score"]
        nodes: dict[str, dict[str, Any]] = {}
        for name, is_inside in zip(graph.senders, mask.any(axis=1), strict=True):
            nodes[_mib_node(name)] = {"in_graph": bool(is_inside)}
            if name in node_scores:
                nodes[_mib_node(name)]["score"] = float(node_scores[name])
        nodes[LOGITS] = {"in_graph": True}
        edges: dict[str, dict[str, Any]] = {}
        for sender, receiver in np.argwhere(graph.allowed):
            ends = _mib_receivers(graph, graph.receivers[receiver])
            fields = {
                "score": float(scores[sender, receiver]) / len(ends),
                "in_graph": bool(mask[sender, receiver]),
            }
            start = _mib_node(graph.senders[sender])
            edges |= {f"{start}->{end}": fields for end in ends}
        sizes = lm.sizes
        config = {
            "n_layers": lm.n_layers,
            "n_heads": sizes["head"],
            "n_kv_heads": sizes["kv_head"],
            "parallel_attn_mlp": lm.layout.find("resid_mid", 0) is None,
            "d_model": sizes["d_model"],
        }
        about = {"metric": self.metric, "direction": self.direction, "kind": self.kind}
        document = {"cfg": config, "nodes": nodes, "edges": edges, "hookkit": about}
        file = check_path(path)
        write_text(file, json.dumps(document))
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, kv_heads: int | None = None) -> Circuit:
        """Returns the circuit of a JSON file of MIB, written by `save` or by its own tools.

        kv_heads  how many keys and values a block has, if it is fewer than heads and the file does
                  not say so: lm.sizes["kv_head"]. The scores of heads that share them are added
        """
        document = check_mapping(read_json(check_file(path), finite=False), repr(str(path)))
        try:
            return _read_document(document, kv_heads)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFile(
                f"{str(path)!r} is no circuit in MIB's JSON, which has cfg, nodes and edges "
                f"({type(error).__name__}: {error})"
            ) from error

    def __repr__(self) -> str:
        best = self.chosen.head(3)[self.names].agg("->".join, axis=1).tolist()
        text = (
            f"Circuit({len(self)} of {len(self.table)} {self.kind} by {self.metric or 'score'}: "
            f"{', '.join([*best, '…'])})"
        )
        return describe_outcome(text, "circuit.chosen", "hk.run_circuit(lm, clean, corrupted, …)")

    def _repr_html_(self) -> str:
        numbers = {self.kind: len(self), "of": len(self.table), "metric": self.metric}
        best = self.chosen.head(5)[self.names].agg("->".join, axis=1).tolist()
        return render_html("Circuit", numbers | {"best": ", ".join(best)})


def _find(index: pd.Index, names: pd.Series) -> np.ndarray:
    codes = index.get_indexer(names)
    if (codes < 0).any():
        unknown = names[codes < 0].iloc[0]
        raise OtherModel(
            f"the circuit has {unknown!r}, which this model lacks: it is of another model, or was "
            "read from a file without the number of key-value heads (kv_heads=)"
        )
    return codes


# ---- choosing


@check_arguments
def circuit(
    scores: pd.DataFrame,
    *,
    share: float | None = None,
    n: int | None = None,
    signed: Literal["negative", "positive"] | None = None,
    greedy: bool = False,
) -> Circuit:
    """Returns the circuit of the edges, or nodes, with the best scores.

    scores  the table of `hk.edge_attribution`; for nodes that of `hk.attribution` at the sites
            ["z", "mlp_out"], whose rows are averaged
    share   how many of all edges or nodes are taken (0.01 if `n` is not given either)
    n       the same as a number
    signed  by default the largest absolute values are the best; "negative" takes the lowest scores
            (with direction="noise", what the metric needs), "positive" the highest
    greedy  False: the best edges of all. True: the best edge into what is in the circuit already,
            from the logits on, so that more of them are connected (edges only)

    Then edges that are on no path from the embedding to the logits are left out, as in MIB, so that
    there may be fewer. Raises `EmptySelection` if none remains.

    >>> table = hk.edge_attribution(lm, clean, corrupted, hk.metrics.logit_diff(5, 7))
    >>> len(hk.circuit(table, n=20, greedy=True)) <= 20
    True
    """
    table = score_table(scores)
    if share is not None and n is not None:
        raise BadHook(f"share={share} and n={n} both say how many: give one of the two")
    count = n
    if count is None:
        count = count_of_share(len(table.table), DEFAULT_SHARE if share is None else share)
    check_integer(count, "n", least=0, most=len(table.table), meaning="how many are taken,")
    result = choose(table, count, signed, greedy=greedy)
    if not len(result):
        raise EmptySelection(
            f"none of the best {count} of {len(table.table)} {table.kind} is on a path from the "
            "embedding to the logits: take more (share=, n=), or greedy=True"
        )
    return result


def count_of_share(total: int, share: float) -> int:
    """Returns how many edges are a share of all, as MIB counts them: rounded down."""
    check_number(share, "share", least=0.0, most=1.0)
    return int(share * total + 1e-9)


def score_table(scores: pd.DataFrame) -> Circuit:
    """Returns the circuit of no edge with these scores."""
    columns = [name for name in scores.columns if str(name).endswith("_delta")]
    is_edges, is_nodes = set(EDGE) <= set(scores.columns), {"site", "layer"} <= set(scores.columns)
    if len(columns) != 1 or not (is_edges or is_nodes):
        raise BadHook(
            f"scores has the columns {list(scores.columns)}: give the table of hk.edge_attribution "
            "(sender, receiver and one column _delta), or that of hk.attribution at the sites "
            "['z', 'mlp_out'] and one metric"
        )
    values = scores[columns[0]].to_numpy(float)
    if not np.isfinite(values).all():
        raise BadHook(f"{columns[0]} has values that are not finite, which have no order")
    if is_edges:
        table = scores[EDGE].assign(score=values)
    else:
        table = _node_scores(scores, values)
    table = table.reset_index(drop=True).assign(in_circuit=False)
    metric, direction = columns[0].removesuffix("_delta"), scores.attrs.get("direction", "")
    return Circuit(table, metric, direction)


def _node_scores(scores: pd.DataFrame, values: Float[np.ndarray, " row"]) -> pd.DataFrame:
    """Returns the score of each node: the sum over positions, the mean over prompts."""
    others = set(scores["site"]) - set(NODE_SITES)
    if others:
        raise BadHook(f"{sorted(others)} are no nodes: score the sites ['z', 'mlp_out']")
    names = scores["site"] + "." + scores["layer"].astype(int).astype(str)
    is_head = scores["site"] == "z"
    if is_head.any():
        heads = scores.loc[is_head, "head"].astype(int).astype(str)
        names = names.where(~is_head, names + "." + heads.reindex(scores.index, fill_value=""))
    sums = pd.Series(values).groupby(names.to_numpy(), sort=False).sum()
    count = scores["row"].nunique() if "row" in scores.columns else 1
    return pd.DataFrame({"node": sums.index, "score": sums.to_numpy() / count})


def choose(
    table: Circuit,
    count: int,
    signed: Literal["negative", "positive"] | None = None,
    *,
    greedy: bool = False,
) -> Circuit:
    """Returns the best edges or nodes of a table of scores, pruned; there may be none."""
    scores = table.table["score"].to_numpy(float)
    merits = {None: np.abs(scores), "negative": -scores, "positive": scores}[signed]
    kept = np.zeros(len(scores), bool)
    if table.kind == "nodes":
        if greedy:
            raise BadHook("greedy=True follows edges, and these are nodes: leave it out")
        kept[np.argsort(-merits, kind="stable")[:count]] = True
        return table.with_only(kept)
    if greedy:
        kept[_greedy_edges(table, merits, count)] = True
    else:
        kept[np.argsort(-merits, kind="stable")[:count]] = True
    graph = table._graph
    return table._of_mask(graph, graph.prune(table.with_only(kept).mask(graph)))


def _greedy_edges(table: Circuit, merits: Float[np.ndarray, " edge"], count: int) -> list[int]:
    """Returns the rows of the best edges into what is in the circuit, one after the other."""
    rows_of_receiver = table.table.groupby("receiver", sort=False).indices
    receivers_of_node: dict[str, list[str]] = {}
    for receiver in rows_of_receiver:
        for node in table._graph.nodes_of(str(receiver)):
            receivers_of_node.setdefault(node, []).append(str(receiver))
    senders = table.table["sender"].to_numpy(object)
    candidates: list[tuple[float, int]] = []
    reached: set[str] = set()

    def reach(receivers: list[str]) -> None:
        for receiver in receivers:
            if receiver not in reached:
                reached.add(receiver)
                for row in rows_of_receiver[receiver]:
                    heapq.heappush(candidates, (-merits[row], int(row)))

    reach([LOGITS])
    chosen: list[int] = []
    while candidates and len(chosen) < count:
        chosen.append(heapq.heappop(candidates)[1])
        reach(receivers_of_node.get(senders[chosen[-1]], []))
    return chosen


def _random_edges(graph: EdgeGraph, count: int, draws: random.Random) -> Mask:
    """Returns `count` random edges; fewer if no more fit on paths."""
    kept = np.zeros_like(graph.allowed)
    senders_of = [np.flatnonzero(column).tolist() for column in graph.allowed.T]
    receivers_of = [np.flatnonzero(column).tolist() for column in graph.readers.T]
    logits, embedding = graph.receivers.get_loc(LOGITS), graph.senders.get_loc(EMBEDDING)
    left = count
    for _ in range(count + 100):
        path, receiver, sender = [], logits, -1
        while sender != embedding:
            sender = draws.choice(senders_of[receiver])
            path.append((sender, receiver))
            if sender != embedding:
                receiver = draws.choice(receivers_of[sender])
        new = [edge for edge in path if not kept[edge]]
        if len(new) <= left:
            left -= len(new)
            for edge in new:
                kept[edge] = True
    free = np.argwhere(graph.between(kept.any(axis=1)) & ~kept).tolist()
    for edge in draws.sample(free, min(left, len(free))):
        kept[tuple(edge)] = True
    return kept


# ---- names in MIB's JSON


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


def _read_document(document: Mapping[str, Any], kv_heads: int | None) -> Circuit:
    config, about = document["cfg"], document.get("hookkit", {})
    nodes = document["nodes"]
    if any("neurons" in fields for fields in nodes.values()):
        raise BadFile("the circuit is of neurons, which hookkit's circuits do not have")
    share = config["n_heads"] // (kv_heads or config.get("n_kv_heads") or config["n_heads"])
    edges = []
    for name, fields in document["edges"].items():
        start, end = name.split("->")
        score, is_inside = float(fields["score"]), bool(fields["in_graph"])
        edges.append((_sender_of(start), _receiver_of(end, share), score, is_inside))
    frame = pd.DataFrame(edges, columns=[*EDGE, "score", "in_circuit"])
    groups = frame.groupby(EDGE, sort=False)
    if (groups["in_circuit"].nunique() > 1).any():
        raise BadFile(
            "heads that share a key or a value have different edges to it there, which this model "
            "cannot separate: it is one key"
        )
    metric, direction = about.get("metric", ""), about.get("direction", "")
    scored = {name: fields for name, fields in nodes.items() if "score" in fields}
    if about.get("kind") == "nodes" or (scored and not frame["score"].any()):
        rows = []
        for name, fields in scored.items():
            if np.isfinite(fields["score"]):
                rows.append((_sender_of(name), float(fields["score"]), bool(fields["in_graph"])))
        return Circuit(pd.DataFrame(rows, columns=[*NODE, "score", "in_circuit"]), metric, direction)
    table = groups.agg({"score": "sum", "in_circuit": "first"}).reset_index()
    return Circuit(table, metric, direction)

