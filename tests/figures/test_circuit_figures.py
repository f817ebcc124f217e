"""Figures of circuits: the curves are the table's numbers, and the lines are the circuit's edges."""

import io

import numpy as np
import pandas as pd
import pytest

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection

SIZES = [0.01, 0.1, 1.0]


def curve_table(n=12, draws=2) -> pd.DataFrame:
    arms = [("circuit", 0), *(("random", draw) for draw in range(draws)), ("complement", 0)]
    rows = []
    for number, (name, draw) in enumerate(arms):
        for size in SIZES:
            value = size / (number + 1)
            rows.append((name, draw, size, int(100 * size), value, value - 0.1, value + 0.1, n))
    names = ["circuit", "draw", "size", "n_edges", "faithfulness"]
    return pd.DataFrame(rows, columns=[*names, "faithfulness_low", "faithfulness_high", "n"])


def test_each_curve_is_the_mean_of_its_rows_with_its_interval():
    figure = hk.figures.faithfulness_curve(curve_table())
    (axes,) = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [line.get_xdata().tolist() for line in curves] == [SIZES] * 3
    heights = [line.get_ydata() for line in curves]
    expected = [np.array(SIZES), np.array(SIZES) * (1 / 2 + 1 / 3) / 2, np.array(SIZES) / 4]
    assert np.allclose(heights, expected)
    bands = [band.get_paths()[0].vertices for band in axes.collections]
    assert bands[0][:, 1].min() == pytest.approx(-0.09) and bands[0][:, 1].max() == 1.1
    assert bands[1][:, 1].min() == pytest.approx(0.01 / 3)  # the lowest draw
    assert axes.get_xscale() == "log"
    figure.savefig(io.BytesIO(), format="png")


def test_few_prompts_have_no_interval():
    (axes,) = hk.figures.faithfulness_curve(curve_table(n=3)).axes
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 1.0


def test_every_edge_is_a_line_to_each_head_that_reads_it():
    names = [
        ("embed", "q.0.3", 1.0, True),
        ("embed", "k.0.1", -2.0, True),
        ("z.0.3", "mlp_in.1", 0.5, True),
        ("mlp_out.1", "logits", 3.0, True),
        ("embed", "k.0.0", 9.0, False),
        ("z.0.0", "logits", 9.0, False),
        ("z.0.1", "logits", 9.0, False),
        ("z.0.2", "logits", 9.0, False),
        ("embed", "q.0.0", 9.0, False),
        ("embed", "q.0.1", 9.0, False),
        ("embed", "q.0.2", 9.0, False),
        ("mlp_out.0", "logits", 9.0, False),
    ]
    table = pd.DataFrame(names, columns=["sender", "receiver", "score", "in_circuit"])
    figure = hk.figures.circuit_graph(table)
    (axes,) = figure.axes
    assert len(axes.lines) == 5  # two heads share the key
    labels = sorted(text.get_text() for text in axes.texts)
    assert labels == ["a0.2", "a0.3", "embed", "logits", "m1"]
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths) and widths[-1] == 3.0
    figure.savefig(io.BytesIO(), format="png")
    with pytest.raises(EmptySelection, match="no edge"):
        hk.figures.circuit_graph(table.assign(in_circuit=False))
    with pytest.raises(BadHook, match="in_circuit"):
        hk.figures.circuit_graph(table.drop(columns="in_circuit"))
