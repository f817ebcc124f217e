"""An attribution graph as the JSON of circuit-tracer, which its viewers open, and read back.

The keys that circuit-tracer does not know are in `hookkit`: the table of nodes and what the graph
was computed from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..arguments import check_arguments
from ..display import printable
from ..errors import BadFile, BadHook
from ..files.atomic import disk_errors_as_bad_file, make_folder, write_text
from ..files.untrusted import check_mapping, read_json
from .graph import Graph

LISTING = "graph-metadata.json"  # the graphs of a folder, for the viewer
KINDS = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}
INTEGER_COLUMNS = ("layer", "pos", "feature", "token_id")


def write_graph(graph: Graph, path: Path, scan: str | None) -> Path:
    """Writes a graph to a file, and lists it in the file of its folder's graphs."""
    if path.suffix != ".json" or path.name == LISTING:
        raise BadHook(
            f"save was given {str(path)!r}: give a name that ends in .json and is not {LISTING}"
        )
    content = _content(graph, path.stem, scan or graph.about["model"] or "hookkit")
    listing = path.parent / LISTING
    metadata = content["metadata"]
    graphs = [item for item in _listed(listing) if item.get("slug") != metadata["slug"]]
    with disk_errors_as_bad_file(path):
        make_folder(path.parent)
        write_text(path, json.dumps(content, allow_nan=False))
        write_text(listing, json.dumps({"graphs": [*graphs, metadata]}, indent=2))
    return path


def _listed(listing: Path) -> list[dict[str, Any]]:
    if not listing.exists():
        return []
    graphs = check_mapping(read_json(listing), repr(str(listing))).get("graphs")
    if not isinstance(graphs, list) or not all(isinstance(item, dict) for item in graphs):
        raise BadFile(f"{str(listing)!r} has no list of graphs: remove it, or save elsewhere")
    return graphs


def _content(graph: Graph, slug: str, scan: str) -> dict[str, Any]:
    n_layers = max(graph.nodes["layer"].dropna().tolist()) + 1
    nodes = [_node(row, n_layers) for row in graph.nodes.to_dict("records")]
    ids = [node["node_id"] for node in nodes]
    targets, sources = graph.adjacency.nonzero(as_tuple=True)
    weights = graph.adjacency[targets, sources].tolist()
    links: list[dict[str, Any]] = []
    for target, source, weight in zip(targets.tolist(), sources.tolist(), weights, strict=True):
        links.append({"source": ids[source], "target": ids[target], "weight": weight})
    pruned = graph.about.get("pruned") or {}
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(map(printable, graph.tokens)),
        "prompt": graph.about["prompt"],
        "node_threshold": pruned.get("node_share"),
        "schema_version": 1,
    }
    columns = graph.nodes.astype(object).where(graph.nodes.notna(), None).to_dict("list")
    tables = {"nodes": columns, "tokens": list(graph.tokens), "about": dict(graph.about)}
    tables["dtype"] = str(graph.adjacency.dtype).removeprefix("torch.")
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {
        "metadata": metadata,
        "qParams": view,
        "nodes": nodes,
        "links": links,
        "hookkit": tables,
    }


def _node(row: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """Returns a node as circuit-tracer has it. Ids of errors differ from those of features."""
    kind, pos, token_id = row["kind"], row["pos"], row["token_id"]
    node: dict[str, Any] = {"feature_type": KINDS[kind], "ctx_idx": pos, "run_idx": 0}
    node |= {"reverse_ctx_idx": 0, "is_target_logit": False, "token_prob": 0.0, "clerp": ""}
    node |= {"influence": _number(row["cumulative"]), "activation": None}
    if kind == "feature":
        layer, feature = row["layer"], row["feature"]
        pair = (layer + feature) * (layer + feature + 1) // 2 + feature  # Cantor's pairing
        names = (f"{layer}_{feature}_{pos}", f"{layer}_{feature}-0", str(layer), pair)
        node["activation"] = float(row["value"])
    elif kind == "error":
        layer = row["layer"]
        names = (f"error_{layer}_{pos}", f"error_{layer}_{pos}-0", str(layer), -1)
    elif kind == "token":
        names = (f"E_{token_id}_{pos}", f"E_{token_id}-{pos}", "E", pos)
    else:
        layer = str(n_layers + 1)
        names = (f"{layer}_{token_id}_{pos}", f"L_{token_id}-{pos}", layer, token_id)
        node["token_prob"] = float(row["prob"])
        node["clerp"] = f'Output "{printable(row["token"])}" (p={row["prob"]:.3f})'
    return node | dict(zip(("node_id", "jsNodeId", "layer", "feature"), names, strict=True))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


@check_arguments
def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Returns the attribution graph that `Graph.save` wrote. Raises `BadFile` for another file."""
    name = repr(os.fspath(path))
    content = check_mapping(read_json(path), name)
    if "hookkit" not in content:
        raise BadFile(f"{name} is no graph that Graph.save wrote: it has no part 'hookkit'")
    try:
        tables = content["hookkit"]
        nodes = pd.DataFrame(tables["nodes"])
        integers = dict.fromkeys(INTEGER_COLUMNS, "Int64")
        floats = dict.fromkeys(("value", "bias", "prob", "influence", "cumulative"), "float64")
        nodes = nodes.astype(integers | floats)
        adjacency = _read_adjacency(content, len(nodes), getattr(torch, tables["dtype"]))
        return Graph(nodes, adjacency, tuple(tables["tokens"]), dict(tables["about"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadFile(f"{name} is no graph that Graph.save wrote: {error!r}") from error


def _read_adjacency(content: Mapping[str, Any], count: int, dtype: torch.dtype) -> Tensor:
    """Returns the weights of the links, [target, source]."""
    numbers = {node["node_id"]: number for number, node in enumerate(content["nodes"])}
    links = content["links"]
    targets = torch.tensor([numbers[link["target"]] for link in links], dtype=torch.long)
    sources = torch.tensor([numbers[link["source"]] for link in links], dtype=torch.long)
    adjacency = torch.zeros(count, count, dtype=dtype)
    adjacency[targets, sources] = torch.tensor([link["weight"] for link in links], dtype=dtype)
    return adjacency
