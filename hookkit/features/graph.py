"""Graph: an attribution graph as a value, its influence on the logits, and its pruning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_number
from ..display import count_of, describe_outcome, first_rows, quote_token, render_html
from ..errors import BadHook

KEPT = ("token", "logit")  # kinds of nodes that no pruning removes


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """The attribution graph of a prompt: which features, errors and tokens made which logits.

    nodes      one row each, numbered from 0, sources before what they reach: kind ("feature",
               "error", "token", "logit"), site, layer, pos, feature, token and token_id (of a
               logit the predicted token, else the prompt's token at pos), value (a feature's
               activation; a logit minus the mean logit; the norm of an error's or a token's
               vector), bias (what reaches a feature or logit from no node), prob, influence (its
               share in all paths to the logits) and cumulative (the shares up to this one, from
               the largest)
    adjacency  [target, source]: what the source adds to the target's value. Before pruning the row
               of a feature or a logit and its bias sum to its value
    tokens     the prompt's tokens
    about      what it was computed from, and how it was pruned; ready for JSON

    `hk.attribution_graph` and `hk.load_graph` return it.
    """

    nodes: pd.DataFrame
    adjacency: Float[Tensor, "target source"]
    tokens: tuple[str, ...]
    about: Mapping[str, Any]

    @cached_property
    def edges(self) -> pd.DataFrame:
        """The edges, the strongest first: source and target (numbers of nodes), the site and the
        position of each, and the weight."""
        targets, sources = self.adjacency.nonzero(as_tuple=True)
        weights = self.adjacency[targets, sources]
        columns: dict[str, Any] = {"source": sources.tolist(), "target": targets.tolist()}
        for end in ("source", "target"):
            rows = self.nodes.iloc[columns[end]]
            columns |= {f"{end}_site": rows["site"].tolist(), f"{end}_pos": rows["pos"].tolist()}
        table = pd.DataFrame({**columns, "weight": weights.tolist()})
        return table.sort_values(
            "weight", key=abs, ascending=False, kind="stable", ignore_index=True
        )

    @property
    def logits(self) -> pd.DataFrame:
        """The predicted tokens, the most likely first: token, token_id, value, bias and prob."""
        columns = ["token", "token_id", "value", "bias", "prob"]
        return self.nodes.loc[self.nodes["kind"] == "logit", columns]

    @check_arguments
    def prune(self, *, node_share: float = 0.8, edge_share: float = 0.98) -> Graph:
        """Returns the graph without what matters little for the logits.

        The nodes that are kept are the fewest that have `node_share` of the influence of all, and
        the edges the fewest that have `edge_share` of the influence of the edges between them.
        Tokens and logits stay. Then features and errors that reach nothing, and features that
        nothing reaches, are removed until there are none. The influence of a node is the sum over
        all its paths to the logits, weighted by their probabilities, where each edge counts by its
        share of the absolute weights into its target (Ameisen et al. 2025).

        The columns influence and cumulative keep their values, and rows no longer sum to values.
        """
        for name, share in (("node_share", node_share), ("edge_share", edge_share)):
            check_number(share, name, least=0, most=1, error=BadHook)
        always = torch.tensor([kind in KEPT for kind in self.nodes["kind"]])
        is_feature = torch.tensor([kind == "feature" for kind in self.nodes["kind"]])
        weights = logit_weights(self.nodes)
        influence = path_influence(self.adjacency, weights)
        mask = always | (influence >= smallest_kept(influence, node_share))
        between = self.adjacency * mask[:, None] * mask
        scores = _shares(between) * (path_influence(between, weights) + weights)[:, None]
        edges = (scores > 0) & (scores >= smallest_kept(scores.flatten(), edge_share))
        while True:
            connected = mask & (always | edges.any(0)) & (~is_feature | edges.any(1))
            if torch.equal(connected, mask):
                break
            mask = connected
            edges &= mask[:, None] & mask
        numbers = mask.nonzero().flatten()
        about = {**self.about, "pruned": {"node_share": node_share, "edge_share": edge_share}}
        nodes = self.nodes.iloc[numbers.tolist()].reset_index(drop=True)
        adjacency = (self.adjacency * edges)[numbers][:, numbers]
        return replace(self, nodes=nodes, adjacency=adjacency, about=about)

    @check_arguments
    def save(self, path: str | os.PathLike[str], *, scan: str | None = None) -> Path:
        """Writes the graph as JSON of circuit-tracer, whose viewer opens the folder, and for
        `load_graph`. Returns the file's path.

        The file `graph-metadata.json` beside it lists the graphs of the folder for the viewer.
        `scan` is the name under which a viewer has pages of the features; by default the model's.
        Prune the graph first: a viewer shows some thousands of edges.
        """
        from .graph_json import write_graph

        return write_graph(self, Path(path), scan)

    def _repr_html_(self) -> str:
        table = first_rows(self.nodes, "kind", "site", "pos", "token", "value", "influence")
        return render_html(f"Attribution graph of {quote_token(self.about['prompt'])}", rows=table)

    def __repr__(self) -> str:
        kinds = self.nodes["kind"].value_counts().to_dict()
        counts = [count_of(number, kind) for kind, number in sorted(kinds.items())]
        edges = count_of(int(self.adjacency.count_nonzero()), "edge")
        calls = ("graph.prune()", "graph.nodes", "graph.edges", "graph.save(path)")
        return describe_outcome(f"Graph({', '.join(counts)}; {edges})", *calls)


def logit_weights(nodes: pd.DataFrame) -> Float[Tensor, " node"]:
    """Returns the probability of each logit node, and 0 for the others."""
    return torch.tensor(nodes["prob"].fillna(0.0).to_numpy(dtype="float64"))


def path_influence(
    adjacency: Float[Tensor, "target source"], weights: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """Returns the sum over all paths from each node to the logits.

    It is weights · ((I - A)⁻¹ - I) for the shares A of the absolute weights into each target. Each
    step of a path is to an earlier layer, so that the sum ends.
    """
    shares = _shares(adjacency)
    total = step = weights @ shares
    while bool(step.any()):
        step = step @ shares
        total = total + step
    return total


def _shares(adjacency: Float[Tensor, "target source"]) -> Float[Tensor, "target source"]:
    """Returns each edge's share of the absolute weights into its target."""
    sizes = adjacency.abs().double()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)


def smallest_kept(scores: Float[Tensor, " score"], share: float) -> float:
    """Returns the smallest of the fewest scores that have a share of their sum."""
    ordered = scores.sort(descending=True).values
    sums = ordered.cumsum(0)
    index = int(torch.searchsorted(sums, share * sums[-1]))
    return float(ordered[min(index, len(ordered) - 1)])
