"""What does a report cost beside the forwards that it needs?

100 prompts and five edits need six forwards over all prompts. They are done bare, by plain
transformers with the last logits only; with the hooks by hk.forward; and as a report with its
figures, made and written. In turn, in a new order each round, behind one that warms up. It is
answered by the ratio to the bare forwards, which should be at most 1.2.

python -m experiments.benchmarks.report
    five minutes on two cores; writes results/benchmarks_report/
"""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

import hookkit as hk

from .overhead import THREADS, Work, compared

ROUNDS, PROMPTS, WORDS = 3, 100, 24  # WORDS: tokens of a prompt, about
LIMIT = 1.2  # times as long as the bare forwards
TEXT = (
    "The museum in the old town opens at nine and closes at five, and on the day before the "
    "holiday it is full of"
)
QUESTION = "What does a report cost beside the forwards that it needs?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    prompts = [lm.encode(f"{number}. {TEXT}")[:WORDS] for number in range(PROMPTS)]
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    edits = {
        "force": hk.force(" tourists"), "boost": hk.boost(" visitors", by=3),
        "head": hk.ablate("z.23.3"), "steer": hk.steer("resid_post.16", vector, scale=2),
        "block": hk.skip_block(17),
    }  # fmt: skip
    with hk.record(
        "results/benchmarks_report", title="What a report costs", question=QUESTION, lm=lm
    ) as results:
        work: Work = {
            "plain transformers, 6 forwards": lambda: bare(lm, prompts, 1 + len(edits)),
            "hk.forward, 6 forwards": lambda: [
                hk.forward(lm, prompts, *h, logits="last") for h in each(edits)
            ],
            "shift_report": lambda: reported(lm, prompts, edits),
        }
        table = compared(f"{PROMPTS} prompts, {len(edits)} edits", work, ROUNDS)
        caption = (
            f"Medians, {THREADS} threads. ratio and added_ms: to plain transformers, round by "
            "round."
        )
        results.table("report", table, caption=caption)
        results.answer(answer({"report": table}))
    print(table.to_string(index=False))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratios = tables["report"].set_index("workload")["ratio"]
    report = ratios["shift_report"]
    verdict = "Nothing" if report <= 1 else "Little" if report <= LIMIT else "Much"
    return (
        f"{verdict}: a report of {PROMPTS} prompts and five edits takes {report:.2f} times as long "
        "as six plain forwards over all prompts, because an edit's forward begins at the first "
        f"block that it touches. The six forwards by hk.forward take "
        f"{ratios['hk.forward, 6 forwards']:.2f} times as long as by plain transformers."
    )


def each(edits: dict[str, hk.types.Hook]) -> list[list[hk.types.Hook]]:
    return [[], *([hook] for hook in edits.values())]


@torch.no_grad()
def bare(lm: hk.LM, prompts: list[list[int]], times: int) -> None:
    model: Any = lm.model
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    for _ in range(times):
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def reported(lm: hk.LM, prompts: list[list[int]], edits: dict[str, hk.types.Hook]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hk.shift_report(lm, prompts, edits, watch=" people").write(folder)


if __name__ == "__main__":
    main()
