"""Figures of circuits: their faithfulness by size, and their edges. No torch, no display.

result = hk.faithfulness(lm, clean, corrupted, scores, metric)
hk.figures.faithfulness_curve(result.table)
hk.figures.circuit_graph(hk.circuit(scores, share=0.001).table)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..arguments import check_arguments
from ..display import count_of
from ..errors import EmptySelection
from ..tables.intervals import MIN_FOR_INTERVAL
from . import style

CURVE_COLUMNS = ("circuit", "draw", "size", "faithfulness", "faithfulness_low", "n")
EDGE_COLUMNS = ("sender", "receiver", "score", "in_circuit")
BLOCK_HEIGHT, HEAD_WIDTH, MAX_SIDE = 0.42, 0.62, 14.0  # inches

Node: TypeAlias = tuple[int, int]
EMBEDDING, LOGITS = (-1, 0), (10**6, 0)


@check_arguments
def faithfulness_curve(table: pd.DataFrame, *, title: str = "") -> Figure:
    """The faithfulness of circuits by their size, beside random circuits and the complements.

    `table` is the table of `hk.faithfulness`. The band around the circuits is the 95 % interval,
    where there are 10 prompts or more. The band of random circuits reaches from the lowest draw to
    the highest. 1 is the whole model, 0 is everything ablated.
    """
    style.check_columns(table, CURVE_COLUMNS, "hk.faithfulness")
    figure, axes = style.new_figure(7.4, 4.2)
    for value in (0.0, 1.0):
        axes.axhline(value, color=style.MUTED, lw=1, ls="--")
    for number, name in enumerate(("circuit", "random", "complement")):
        part = pd.DataFrame(table[table["circuit"] == name])
        if len(part):
            _draw_arm(axes, part, name, style.line_style(number))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{100 * size:g}"))
    axes.set_xlabel("size (% of all edges or nodes, log axis)")
    axes.set_ylabel("faithfulness (0: all ablated, 1: the model)")
    style.add_legend(axes)
    note = f"Means over {count_of(int(table['n'].iloc[0]), 'prompt')}"
    return style.apply_style(figure, title or "Faithfulness by size of the circuit", note)


def _draw_arm(axes: Axes, part: pd.DataFrame, name: str, look: dict[str, Any]) -> None:
    """Draw the curve of one kind of circuit, and its band."""
    sizes, draws = sorted(set(part["size"].tolist())), len(set(part["draw"].tolist()))
    label, low_column, high_column = name, "faithfulness", "faithfulness"
    if draws > 1:
        label = f"{name} ({draws} draws)"
    elif min(part["n"].tolist()) >= MIN_FOR_INTERVAL:
        label = f"{name} (95 % interval)"
        low_column, high_column = "faithfulness_low", "faithfulness_high"
    means, lows, highs = [], [], []
    for size in sizes:
        rows = pd.DataFrame(part[part["size"] == size])
        means.append(np.mean(rows["faithfulness"].to_numpy(float)))
        lows.append(np.min(rows[low_column].to_numpy(float)))
        highs.append(np.max(rows[high_column].to_numpy(float)))
    axes.plot(sizes, means, lw=1.6, ms=4, label=label, **look)
    axes.fill_between(sizes, lows, highs, color=look["color"], alpha=0.18, lw=0)


@check_arguments
def circuit_graph(table: pd.DataFrame, *, title: str = "") -> Figure:
    """The edges of a circuit, from the embedding at the bottom to the logits at the top.

    `table` is `circuit.table` of a circuit of edges. A row of nodes is a block: its heads by their
    number, and its MLP at the right. A line ends at each head that reads there, as a query, a key
    or a value; it has the colour of the score's sign, and is thicker the larger the score.
    """
    style.check_columns(table, EDGE_COLUMNS, "circuit.table of a circuit of edges")
    chosen = pd.DataFrame(table[table["in_circuit"]])
    if chosen.empty:
        raise EmptySelection("the circuit has no edge to draw")
    lines = _lines_of(table, chosen)
    senders, readers, _ = zip(*lines, strict=True)
    positions = _place({*senders, *readers})
    right, top = np.array(list(positions.values())).max(axis=0)
    width = min(MAX_SIDE, max(5.0, HEAD_WIDTH * (right + 2)))
    figure, axes = style.new_figure(width, min(MAX_SIDE, max(3.0, BLOCK_HEIGHT * (top + 2))))
    _draw_lines(axes, lines, positions)
    box = {"boxstyle": "round,pad=0.2", "fc": style.PAPER, "ec": style.MUTED, "lw": 0.7}
    look = {"ha": "center", "va": "center", "fontsize": 7, "color": style.INK}
    for node, (x, y) in positions.items():
        axes.text(x, y, _label(node), bbox=box, zorder=2, **look)
    axes.set_xlim(-0.6, right + 0.6)
    axes.set_ylim(-0.6, top + 0.6)
    edges = count_of(len(chosen), "edge")
    style.apply_style(figure, title or f"A circuit of {edges}")
    axes.set_axis_off()
    return figure


def _lines_of(table: pd.DataFrame, edges: pd.DataFrame) -> list[tuple[Node, Node, float]]:
    """Returns the two nodes and the score of each line, with the largest scores last, on top."""
    n_heads = Counter(name.rpartition(".")[0] for name in {*table["sender"], *table["receiver"]})
    lines: list[tuple[Node, Node, float]] = []
    for sender, receiver, score in edges[["sender", "receiver", "score"]].to_numpy(object):
        start = _nodes_of(sender, n_heads)[0]
        lines += [(start, end, float(score)) for end in _nodes_of(receiver, n_heads)]
    return sorted(lines, key=lambda line: abs(line[2]))


def _draw_lines(
    axes: Axes,
    lines: Sequence[tuple[Node, Node, float]],
    positions: Mapping[Node, tuple[float, float]],
) -> None:
    largest = max(abs(score) for *_, score in lines) or 1.0
    for sender, reader, score in lines:
        x, y = zip(positions[sender], positions[reader], strict=True)
        share = abs(score) / largest
        look = {"lw": 0.4 + 2.6 * share, "alpha": 0.25 + 0.6 * share, "zorder": 1}
        axes.plot(x, y, color=style.sign_colour(score), **look)


def _nodes_of(name: str, n_heads: Mapping[str, int]) -> list[Node]:
    """Returns the nodes that have this end of an edge: of a key or a value all heads that share it,
    as (block, head or -1 for its MLP)."""
    site, *numbers = name.split(".")
    if not numbers:
        return [EMBEDDING if site == "embed" else LOGITS]
    layer = int(numbers[0])
    if site.startswith("mlp"):
        return [(layer, -1)]
    share = n_heads[f"z.{layer}"] // n_heads[f"{site}.{layer}"]
    first = int(numbers[1]) * share
    return [(layer, head) for head in range(first, first + share)]


def _place(nodes: Iterable[Node]) -> dict[Node, tuple[float, float]]:
    """Returns where each node is: heads of one number in a column, MLPs at the right."""
    ordered = sorted(nodes)
    rows = sorted({layer for layer, _ in ordered})
    columns = sorted({head for _, head in ordered if head >= 0})
    positions: dict[Node, tuple[float, float]] = {}
    for layer, head in ordered:
        column = len(columns) if head < 0 else columns.index(head)
        if (layer, head) in (EMBEDDING, LOGITS):
            column = len(columns) / 2
        positions[layer, head] = (column, rows.index(layer) + 0.3 * (head < 0))
    return positions


def _label(node: Node) -> str:
    if node in (EMBEDDING, LOGITS):
        return "embed" if node == EMBEDDING else "logits"
    layer, head = node
    return f"m{layer}" if head < 0 else f"a{layer}.{head}"
