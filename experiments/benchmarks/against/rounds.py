"""Ways to sweep, in turn.

Each way runs between two runs of hk.sweep, so that a drift of the machine's speed affects both.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pandas as pd

import hookkit as hk

from .by_hand import by_hand
from .peers import Peer
from .serving import Answer, Cells, Task, answered
from .workloads import swept

PARTS = {
    "one by one": 12,
    "batched": 3,
    "batched invokes": 3,
}  # of so many cells, or layers, a round runs one
COLUMNS = [
    "workload",
    "whose",
    "how",
    "ran",
    "clock_s",
    "processor_s",
    "times",
    "times_processor",
    "apart",
]


@dataclass(eq=False)
class Way:
    """One way to sweep: whose, how, the call that does it, and what came of it."""

    whose: str
    how: str
    ask: Callable[[Task, Cells], Answer]
    ran: int = 0  # cells of a round
    # Seconds by clock and processor, and times hk.sweep's
    taken: list[Sequence[float]] = field(default_factory=list)
    apart: float = 0.0  # the largest difference of a cell from hk.sweep's

    def some(self, cells: Cells, draw: random.Random) -> Cells:
        """The part of the cells that a round runs: whole layers, where those run together."""
        layers = sorted({layer for layer, _ in cells})
        if self.how == "one by one":
            return sorted(draw.sample(list(cells), max(1, len(cells) // PARTS[self.how])))
        chosen = draw.sample(layers, max(1, len(layers) // PARTS[self.how]))
        return [cell for cell in cells if cell[0] in chosen]


def compared(
    lm: hk.LM, letter: str, task: Task, cells: Cells, peers: dict[str, Peer], rounds: int
) -> list[list[object]]:
    """A row for each way to run one workload."""
    source, hand = by_hand(lm.model)
    ways = [Way("by hand", how, partial(answered, source, way)) for how, way in hand.items()]
    ways += [
        Way(name, how, partial(peer, how)) for name, peer in peers.items() for how in peer.ways
    ]
    started = answered(*swept(lm), task, cells)
    values = dict(zip(cells, started["values"], strict=True))
    ours = [_seconds(answered(*swept(lm), task, cells)) for _ in range(2)][1:]
    _round(
        ways,
        task,
        cells,
        values,
        partial(answered, *swept(lm), task, cells),
        random.Random(0),
        whole=True,
    )
    for way in ways:
        way.taken.clear()
    for number in range(1, rounds + 1):
        ours += _round(
            ways,
            task,
            cells,
            values,
            partial(answered, *swept(lm), task, cells),
            random.Random(number),
        )
    mine = _medians(ours)
    rows: list[list[object]] = [
        [letter, "hookkit", "hk.sweep", f"all {len(cells)} cells", *mine, 1.0, 1.0, 0.0]
    ]
    for way in ways:
        rows.append(
            [
                letter,
                way.whose,
                way.how,
                f"{way.ran} of {len(cells)}",
                *_medians(way.taken),
                way.apart,
            ]
        )
    return rows + [
        [letter, name, peer.why_not, "", *[None] * 5]
        for name, peer in peers.items()
        if peer.why_not
    ]


def _round(
    ways: Sequence[Way],
    task: Task,
    cells: Cells,
    values: dict[tuple[int, int], float],
    sweep: Callable[[], Answer],
    draw: random.Random,
    *,
    whole: bool = False,
) -> list[tuple[float, float]]:
    """Runs every way once, in a new order; a warm-up loop by hand runs `whole` of the cells."""
    ours = [_seconds(sweep())]
    for way in draw.sample(list(ways), len(ways)):
        some = cells if whole and way is ways[0] else way.some(cells, draw)
        answer = way.ask(task, some)
        ours.append(_seconds(sweep()))
        spent = _seconds(answer, len(cells) / len(some))
        mine = [(before + after) / 2 for before, after in zip(*ours[-2:], strict=True)]
        way.taken.append([*spent, spent[0] / mine[0], spent[1] / mine[1]])
        differences = [
            abs(value - values[cell]) for cell, value in zip(some, answer["values"], strict=True)
        ]
        way.ran, way.apart = len(some), max(way.apart, *differences)
    return ours


def _seconds(answer: Answer, scale: float = 1.0) -> tuple[float, float]:
    """Of the whole sweep: what is patched in is computed once, the cells are scaled up."""
    (clock, used), (cells_clock, cells_used) = answer["source"], answer["cells"]
    return clock + scale * cells_clock, used + scale * cells_used


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def table_of(rows: Sequence[Sequence[object]]) -> pd.DataFrame:
    """The rows of all workloads."""
    return pd.DataFrame([list(row) for row in rows], columns=COLUMNS)
