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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ..arguments import check_arguments, check_integer, check_number, check_seed, describe
from ..display import describe_outcome, render_html
from ..errors import BadArgument, BadFile, BadHook, EmptySelection, OtherModel
from ..files.atomic import write_text
from ..files.untrusted import check_file, check_mapping, check_path, read_json
from ..models.lm import LM
from .circuit_files import circuit_document, read_circuit_document
from .edge_graph import (
    EDGE,
    EMBEDDING,
    LOGITS,
    NODE,
    EdgeGraph,
    Mask,
    graph_of_model,
    graph_of_names,
)

if TYPE_CHECKING:
    import networkx as nx

MASK = "mask"  # the column of hk.edge_mask
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
        if not isinstance(self.table, pd.DataFrame):
            raise BadArgument(f"table={describe(self.table)}: give a table, as hk.circuit makes it")
        missing = {*self.names, "score", "in_circuit"} - set(self.table.columns)
        if missing or self.table.empty or self.table.duplicated(self.names).any():
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
        rows = np.flatnonzero(self.is_inside)
        scores = self.table["score"].to_numpy(float)
        order = rows[np.argsort(-np.abs(scores[rows]), kind="stable")]
        return self.table.iloc[order].drop(columns="in_circuit").reset_index(drop=True)

    @property
    def is_inside(self) -> Bool[np.ndarray, " edge"]:
        """For each row of the table, whether it is in the circuit."""
        return self.table["in_circuit"].to_numpy(bool)

    def __len__(self) -> int:
        return int(self.is_inside.sum())

    @property
    def share(self) -> float:
        """How many of all edges, or nodes, are in the circuit."""
        return len(self) / len(self.table)

    @cached_property
    def _graph(self) -> EdgeGraph:
        return graph_of_names(list(self.table["sender"]), list(self.table["receiver"]))

    def with_only(self, kept_edges: Bool[np.ndarray, " edge"]) -> Circuit:
        """Returns the circuit of these rows of the table."""
        return replace(self, table=self.table.assign(in_circuit=np.asarray(kept_edges, bool)))

    def complement(self) -> Circuit:
        """Returns the circuit of all edges, or scored nodes, that are not in this one."""
        return self.with_only(~self.is_inside)

    def random(self, *, seed: int = 0) -> Circuit:
        """Returns a random circuit of as many edges or nodes.

        Edges are those of random walks from the logits back to the embedding, so that each is on a
        path between the two, and at last random edges between the nodes of these walks.
        """
        draws = random.Random(check_seed(seed))
        if self.kind == "nodes" or self.share in (0.0, 1.0):
            kept_edges = self.is_inside.tolist()
            draws.shuffle(kept_edges)
            return self.with_only(np.array(kept_edges))
        return self._of_mask(self._graph, _random_edges(self._graph, len(self), draws))

    def _of_mask(self, graph: EdgeGraph, kept_edges: Mask) -> Circuit:
        senders = graph.find_senders(self.table["sender"])
        return self.with_only(kept_edges[senders, graph.find_receivers(self.table["receiver"])])

    def mask(self, graph: EdgeGraph) -> Mask:
        """Returns which edges of a model's graph are in the circuit.

        Raises `OtherModel` if the model lacks one.
        """
        kept_edges = self.table[self.is_inside]
        if self.kind == "nodes":
            nodes = ~np.isin(graph.senders, self.table["node"].tolist())
            nodes[graph.find_senders(kept_edges["node"])] = True
            return graph.between(nodes)
        mask = np.zeros_like(graph.allowed)
        senders = graph.find_senders(kept_edges["sender"])
        mask[senders, graph.find_receivers(kept_edges["receiver"])] = True
        if (mask & ~graph.allowed).any():
            raise OtherModel("the circuit has edges that this model lacks: it is of another model")
        return mask

    def to_networkx(self) -> nx.MultiDiGraph:
        """Returns the circuit as a graph of networkx, which graphviz can draw.

        Its nodes are "embed", heads "z.9.3", MLPs "mlp_out.9" and "logits". An edge has the score,
        and its key is what reads: "q", "k" or "v" of a head, "mlp_in" or "logits". A key or value
        that several heads share is an edge to each of them. A circuit of nodes has no edges.
        `networkx.nx_agraph.to_agraph(graph).draw("circuit.svg", prog="dot")` draws it where
        pygraphviz is installed.
        """
        import networkx as nx

        graph = nx.MultiDiGraph(metric=self.metric, direction=self.direction)
        if self.kind == "nodes":
            for row in self.chosen.to_dict("records"):
                graph.add_node(row["node"], score=row["score"])
            return graph
        for row in self.chosen.to_dict("records"):
            reader = row["receiver"].partition(".")[0]
            for node in self._graph.nodes_of(row["receiver"]) or [LOGITS]:
                graph.add_edge(row["sender"], node, key=reader, score=row["score"])
        return graph

    # ---- the JSON of the benchmark MIB

    @check_arguments
    def save(self, path: str | os.PathLike[str], lm: LM) -> Path:
        """Writes the circuit of a model as the JSON of the Mechanistic Interpretability Benchmark
        (MIB: Mueller et al. 2025), and returns its path.

        There every head has its own key and value: an edge to those that several heads share is
        written once for each, with an equal part of its score.
        """
        graph = graph_of_model(lm)
        about = {"metric": self.metric, "direction": self.direction, "kind": self.kind}
        document = circuit_document(lm, graph, self.table, self.mask(graph)) | {"hookkit": about}
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
            table = read_circuit_document(document, kv_heads)
            about = document.get("hookkit", {})
            return cls(table, about.get("metric", ""), about.get("direction", ""))
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

    scores  the table of `hk.edge_attribution` or `hk.edge_mask`; for nodes those of
            `hk.attribution` at the sites "z" and "mlp_out" in one, whose rows are averaged
    share   how many of all edges or nodes are taken (0.01 if `n` is not given either)
    n       the same as a number
    signed  by default the largest absolute values are the best; "negative" takes the lowest scores
            (with direction="noise", what the metric needs), "positive" the highest
    greedy  False: the best edges of all. True: the best edge into what is in the circuit already,
            from the logits on, so that more of them are connected (edges only)

    Then edges that are on no path from the embedding to the logits are left out, as in MIB, so that
    there may be fewer. Raises `EmptySelection` if none remains.

    >>> scores = edge_attribution(lm, clean, corrupted, logit_diff(" Mary", " John"))
    >>> chosen = circuit(scores, n=1413)
    >>> len(chosen), len(chosen.table)
    (1275, 70651)
    """
    table = score_table(scores)
    if signed is not None and MASK in scores.columns:
        raise BadHook(
            f"signed={signed!r} has no meaning here, since masks have no sign: leave it out"
        )
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
            f"embedding to the logits: take more (share=, n=){'' if greedy else ', or greedy=True'}"
        )
    return result


def count_of_share(total: int, share: float) -> int:
    """Returns how many edges are a share of all, as MIB counts them: rounded down."""
    check_number(share, "share", least=0.0, most=1.0)
    return int(share * total + 1e-9)


def score_table(scores: pd.DataFrame) -> Circuit:
    """Returns the circuit of no edge with these scores."""
    scores = scores.reset_index(drop=True)
    is_nodes = {"site", "layer"} <= set(scores.columns)
    column = _score_column(scores, is_nodes or set(EDGE) <= set(scores.columns))
    values = scores[column].to_numpy(float)
    if not np.isfinite(values).all():
        raise BadHook(f"{column} has values that are not finite, which have no order")
    table = _node_scores(scores, values) if is_nodes else scores[EDGE].assign(score=values)
    table = table.reset_index(drop=True).assign(in_circuit=False)
    metric, direction = column.removesuffix("_delta"), scores.attrs.get("direction", "")
    if column == MASK:
        metric = scores.attrs.get("metric", "")
    return Circuit(table, metric, direction)


def _score_column(scores: pd.DataFrame, has_parts: bool) -> str:
    """Returns the name of the one column of scores of a table that has edges or nodes."""
    columns = [name for name in scores.columns if str(name).endswith("_delta") or name == MASK]
    if len(columns) != 1 or not has_parts:
        raise BadHook(
            f"scores has the columns {list(scores.columns)}: give the table of hk.edge_attribution "
            "(sender, receiver and one column _delta), or that of hk.attribution at the sites "
            "['z', 'mlp_out'] and one metric"
        )
    return columns[0]


def _node_scores(scores: pd.DataFrame, values: Float[np.ndarray, " row"]) -> pd.DataFrame:
    """Returns the score of each node: the sum over positions, the mean over prompts."""
    unknown_sites = set(scores["site"]) - set(NODE_SITES)
    if unknown_sites:
        raise BadHook(f"{sorted(unknown_sites)} are no nodes: score the sites ['z', 'mlp_out']")
    columns = [name for name in ("site", "layer", "head") if name in scores.columns]
    cells = scores[columns].to_numpy(object).tolist()
    names = []
    for site, layer, *head in cells:
        numbers = [int(layer), *map(int, head[: site == "z"])]
        names.append(".".join([site, *map(str, numbers)]))
    totals: dict[str, float] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        totals[name] = totals.get(name, 0.0) + value
    count = len(set(scores["row"])) if "row" in scores.columns else 1
    means = [total / count for total in totals.values()]
    return pd.DataFrame({"node": list(totals), "score": means})


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
    kept_edges = np.zeros(len(scores), bool)
    if table.kind == "nodes":
        if greedy:
            raise BadHook("greedy=True follows edges, and these are nodes: leave it out")
        kept_edges[np.argsort(-merits, kind="stable")[:count]] = True
        return table.with_only(kept_edges)
    if not table._graph.is_complete:
        raise BadHook(
            f"scores are of {len(scores)} edges, which are not all of a model, so that it is not "
            "known which of them are on a path: give every edge a score, such as 0"
        )
    if greedy:
        kept_edges[_greedy_edges(table, merits, count)] = True
    else:
        kept_edges[np.argsort(-merits, kind="stable")[:count]] = True
    graph = table._graph
    return table._of_mask(graph, graph.prune(table.with_only(kept_edges).mask(graph)))


def _greedy_edges(table: Circuit, merits: Float[np.ndarray, " edge"], count: int) -> list[int]:
    """Returns the rows of `count` edges. Each is the best that ends in the circuit so far."""
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
                    heapq.heappush(candidates, (-float(merits[row]), int(row)))

    reach([LOGITS])
    chosen: list[int] = []
    while candidates and len(chosen) < count:
        chosen.append(heapq.heappop(candidates)[1])
        reach(receivers_of_node.get(senders[chosen[-1]], []))
    return chosen


def _random_edges(graph: EdgeGraph, count: int, draws: random.Random) -> Mask:
    """Returns `count` random edges; fewer if no more fit on paths."""
    kept_edges = np.zeros_like(graph.allowed)
    senders = [np.flatnonzero(column).tolist() for column in graph.allowed.T]
    receivers = [np.flatnonzero(column).tolist() for column in graph.readers.T]
    left = count
    for _ in range(count + 100):
        if not left:
            break
        path = _random_path(graph, senders, receivers, draws)
        new = [edge for edge in path if not kept_edges[edge]]
        if len(new) <= left:
            left -= len(new)
            for edge in new:
                kept_edges[edge] = True
    free = np.argwhere(graph.between(kept_edges.sum(axis=1) > 0) & ~kept_edges).tolist()
    for edge in draws.sample(free, min(left, len(free))):
        kept_edges[tuple(edge)] = True
    return kept_edges


def _random_path(
    graph: EdgeGraph, senders: list[list[int]], receivers: list[list[int]], draws: random.Random
) -> list[tuple[int, int]]:
    """Returns the edges of a random path, from the logits back to the embedding.

    `senders` are those of each receiver, and `receivers` those through which each sender reads.
    """
    embedding = graph.senders.index(EMBEDDING)
    receiver = graph.receivers.index(LOGITS)
    path = [(draws.choice(senders[receiver]), receiver)]
    while path[-1][0] != embedding:
        receiver = draws.choice(receivers[path[-1][0]])
        path.append((draws.choice(senders[receiver]), receiver))
    return path
