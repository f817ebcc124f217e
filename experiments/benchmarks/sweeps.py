"""What do sweeps cost?

Beside loops and batches by hand, TransformerLens and nnsight, and beside the plan.

    a  the residual stream patched at every layer and position; nine of fourteen positions come
       before the first token that differs
    b  the same with prompts that differ from the first token on
    c  each of 270 heads zeroed

The first sweep of a process is measured beside a later one, and where the seconds of a sweep go.

It is answered by ratios in one run: every way in turn and in a new order each round, each between
two runs of hk.sweep. A way that takes long runs a part of the cells, drawn anew each round, and its
seconds are scaled up. Every value is held against hk.sweep's, and the loop by hand runs all cells
once. Other libraries run in environments of their own, made with pip at the first run; where that
fails, the row says why.

python -m experiments.benchmarks.sweeps
    half an hour on two cores; writes results/benchmarks_sweeps/
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch

import hookkit as hk

from .against.first_sweeps import first_of, first_sweeps
from .against.goals import goals as goals_of
from .against.growth import drawn, growing
from .against.memory import memory, peak_of
from .against.parts import parts
from .against.peers import PEERS, Peer
from .against.rounds import compared, table_of
from .against.workloads import workloads

ROUNDS = 3
THREADS = 2
TEXT = (
    f"Medians of {ROUNDS} rounds, {THREADS} threads. ran: the cells of a round; seconds are scaled "
    "up to all cells. times: how much longer than hk.sweep, round by round, by the clock, and in "
    "seconds of the processor, which say less about others on the machine. apart: the largest "
    "difference of a cell from hk.sweep's. by hand, one by one: the loop of whole forwards; "
    "batched: the cells of a layer in one forward, logits at the last position only."
)
FIRST_TEXT = (
    f"Medians of {ROUNDS} processes. first_s: the first sweep of a process that has run the model "
    "once by hand; later_s: a later sweep in it. Of a model that was never swept on this machine, "
    "the first sweep begins with a trial of the shortcuts; what the trial found is kept on disk, "
    "and a new process reads it after a hash of the weights."
)
PARTS_TEXT = (
    "Seconds of the operators, by torch's profiler in one sweep; Python is what is left of a sweep "
    "without the profiler."
)
QUESTION = "What do sweeps cost?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    peers = {name: Peer(name, THREADS) for name in PEERS}
    with hk.record(
        "results/benchmarks_sweeps", title="What sweeps cost", question=QUESTION, lm=lm, seed=0
    ) as results:
        rows = []
        for letter, (task, cells) in workloads(lm).items():
            rows += compared(lm, letter, task, cells, peers, ROUNDS)
        for peer in peers.values():
            peer.close()
        table = results.table("sweeps", table_of(rows), caption=TEXT)
        peaks = results.table(
            "memory", memory(), caption="Peak of a process of its own, and of it beside the model."
        )
        first = results.table("first", first_sweeps(ROUNDS, THREADS), caption=FIRST_TEXT)
        spent = results.table("parts", parts(lm), caption=PARTS_TEXT)
        reached = results.table(
            "goals",
            goals_of(table, peaks, first),
            caption="What was aimed at, and what this run found.",
        )
        results.answer(answer({"sweeps": table, "goals": reached}))
        caption = (
            "Patching every layer and position. loop_s_computed: a whole forward's seconds for "
            "each cell."
        )
        grown = results.table("growth", growing(lm), caption=caption)
        results.figure(
            "growth_figure",
            drawn(grown),
            caption="Both axes are logarithmic: a line up is a tenfold.",
        )
    for each in (table, peaks, first, spent, reached, grown):
        print(each.round(3).to_string(index=False), end="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    times = tables["sweeps"].set_index(["workload", "whose", "how"])["times"]
    goals = tables["goals"]
    one_by_one = [times[letter, "by hand", "one by one"] for letter in "abc"]
    batched = [times[letter, "by hand", "batched"] for letter in "abc"]
    missed = "; ".join(goals[~goals["met"]]["goal"])
    rest = f" Missed: {missed}." if missed else ""
    return (
        f"A loop of forwards by hand takes {min(one_by_one):.0f} to {max(one_by_one):.0f} times as "
        f"long as hk.sweep, and batches by hand {min(batched):.1f} to {max(batched):.1f} times, "
        f"over three sweeps of the default model. {goals['met'].sum()} of {len(goals)} goals are "
        f"reached.{rest}"
    )


if __name__ == "__main__":
    measured = {"--peak": peak_of, "--first": first_of}
    if len(sys.argv) > 1:
        print(measured[sys.argv[1]](*sys.argv[2:]))
    else:
        main()
