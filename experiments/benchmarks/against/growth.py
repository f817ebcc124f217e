"""Does a sweep's cost grow as its plan says?

The prompts become more and longer; seconds are set beside the layer-tokens of the plan.
"""

import statistics
import time
from itertools import islice, permutations
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import INK, LINES, apply_style

PAIRS, WIDTHS = (1, 10, 50), (15, 60, 240)  # prompts, and tokens of each
NAMES = [
    " Mary",
    " John",
    " Tom",
    " James",
    " Anna",
    " Paul",
    " Mark",
    " Peter",
    " Jack",
    " David",
    " Sarah",
]
BEFORE = (
    "The museum opens at nine and closes at five. On Sundays it stays open until late in the "
    "evening. " * 20
)


def growing(
    lm: hk.LM, counts: tuple[int, ...] = PAIRS, widths: tuple[int, ...] = WIDTHS
) -> pd.DataFrame:
    """Patches the residual stream at every layer and position, for each number and length."""
    found = []
    for width in widths:
        forward = one_forward(lm, width)
        for count in counts:
            clean, corrupted, right, wrong = pairs(lm, count, width)
            started, used = time.perf_counter(), time.process_time()
            source = hk.forward(lm, clean, hk.capture("resid_pre"), logits=False)

            def hooks(layer: int, pos: int, source: hk.types.Run = source) -> hk.types.Hook:
                return hk.patch(hk.Site("resid_pre", layer), source, pos=pos)

            given = (
                lm,
                corrupted,
                {"layer": range(lm.n_layers), "pos": range(width)},
                hooks,
                hk.metrics.logit_diff(right, wrong),
            )
            hk.sweep(*given)
            clock, used = time.perf_counter() - started, time.process_time() - used
            plan = hk.sweep_plan(*given)
            ran, naive = plan.layer_tokens, plan.naive_layer_tokens
            loop = forward * count * len(plan.cells)
            found.append(
                [count, width, len(plan.cells) * count, plan.running, ran, naive, clock, used, loop]
            )
            found[-1] += [1e6 * clock / ran, loop / clock]
    names = [
        "pairs",
        "tokens",
        "cells",
        "run",
        "layer_tokens",
        "naive_layer_tokens",
        "clock_s",
        "processor_s",
    ]
    return pd.DataFrame(found, columns=[*names, "loop_s_computed", "us_per_layer_token", "times"])


def pairs(
    lm: hk.LM, count: int, width: int
) -> tuple[list[list[int]], list[list[int]], list[Any], list[Any]]:
    """Returns prompts of one width; the corrupted ones have another name in the last clause."""
    before, clean, corrupted, right, wrong = lm.encode(BEFORE), [], [], [], []
    for one, other in islice(permutations(NAMES, 2), count):
        for prompts, giver in ((clean, other), (corrupted, one)):
            ids = lm.encode(f"When{one} and{other} went to the store,{giver} gave a drink to")
            prompts.append(before[: width - len(ids)] + ids)
        right.append(one)
        wrong.append(other)
    return clean, corrupted, right, wrong


@torch.no_grad()
def one_forward(lm: hk.LM, width: int) -> float:
    """The seconds of one plain forward of so many tokens."""
    ids, taken = torch.tensor([lm.encode(BEFORE)[:width]]), []
    for _ in range(6):
        started = time.perf_counter()
        lm.model(input_ids=ids, use_cache=False)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def drawn(table: Any) -> Figure:
    """Draws seconds against the tokens that pass through a block, for the sweeps and for a loop."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for number, (width, part) in enumerate(table.groupby("tokens")):
        label = f"prompts of {width} tokens"
        swept: dict[str, Any] = {"color": LINES[number], "ms": 7, "label": f"hk.sweep, {label}"}
        axes.plot(part["layer_tokens"], part["clock_s"], "o-", **swept)
        loop = swept | {"mfc": "none", "lw": 1, "label": f"loop, computed, {label}"}
        axes.plot(part["naive_layer_tokens"], part["loop_s_computed"], "s--", **loop)
    # The numbers of prompts are written once, under the lowest line
    for row in table[table["tokens"] == table["tokens"].min()].to_dict("records"):
        words = f"{row['pairs']} pair{'s' if row['pairs'] > 1 else ''}"
        point = (row["layer_tokens"], row["clock_s"])
        axes.annotate(words, point, (7, -12), textcoords="offset points", size=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=table["clock_s"].min() / 3)
    axes.set_xlabel("tokens that pass through a block, counted for each block (log axis)")
    axes.set_ylabel("seconds (log axis)")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, labelcolor=INK, loc="outside right center")
    return apply_style(figure, "A sweep's time grows with the tokens that its plan counts")
