"""What do sweeps cost?

Beside loops and batches by hand, TransformerLens and nnsight, and beside the plan.

    a  the residual stream patched at every layer and position; nine of fourteen positions come
       before the first token that differs
    b  the same with prompts that differ from the first token on
    c  each of 270 heads zeroed

It is answered by ratios in one run: every way in turn and in a new order each round, each between
two runs of hk.sweep. A way that takes long runs a part of the cells, drawn anew each round, and its
seconds are scaled up. Every value is held against hk.sweep's, and the loop by hand runs all cells
once. Other libraries run in environments of their own, made with pip at the first run; where that
fails, the row says why.

python -m experiments.benchmarks.sweeps
    half an hour on two cores; writes results/benchmarks_sweeps/
"""

import sys

import torch

import hookkit as hk

from .against.goals import goals
from .against.growth import drawn, growing
from .against.memory import memory, peak_of
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


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    peers = {name: Peer(name, THREADS) for name in PEERS}
    with hk.record("results/benchmarks_sweeps", title="What sweeps cost", lm=lm, seed=0) as results:
        rows = []
        for letter, (task, cells) in workloads(lm).items():
            rows += compared(lm, letter, task, cells, peers, ROUNDS)
        for peer in peers.values():
            peer.close()
        table = results.table("sweeps", table_of(rows), caption=TEXT)
        peaks = results.table(
            "memory", memory(), caption="Peak of a process of its own, and of it beside the model."
        )
        reached = results.table(
            "goals", goals(table, peaks), caption="What was aimed at, and what this run found."
        )
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
    for each in (table, peaks, reached, grown):
        print(each.round(3).to_string(index=False), end="\n\n")


if __name__ == "__main__":
    print(peak_of(*sys.argv[2:])) if "--peak" in sys.argv else main()
