"""What does a condition cost, where an edit asks before it acts?

It pays if a generation takes at most 1.05 times as long as with the same edit without it. Each
condition holds everywhere, so that the same edit acts and the same tokens are written: what is
compared is the asking alone.

python -m experiments.benchmarks.conditions
    10 minutes on two cores; writes results/benchmarks_conditions/
"""

from collections.abc import Mapping
from typing import Any

import torch

import hookkit as hk

from .overhead import Work, compared

ROUNDS = 12
NEW_TOKENS = 64
THREADS = 2
LIMIT = 1.05  # times the same edit without a condition
PROMPT = "The best way to spend a rainy Sunday in the city is"
EDITED, BEFORE, AFTER = "resid_post.16", "resid_post.8", "resid_post.24"
BASELINE = "steer"
QUESTION = "What does a condition cost, where an edit asks before it acts?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    with hk.record(
        "results/benchmarks_conditions", title="What a condition costs", question=QUESTION, lm=lm
    ) as results:
        table = compared(f"generate {NEW_TOKENS} tokens", generations(lm), ROUNDS)
        caption = (
            f"Medians of {ROUNDS} rounds in turn, {THREADS} threads. ratio and added_ms: to the "
            "same edit without a condition, by round."
        )
        results.table("conditions", table, caption=caption)
        results.answer(answer({"conditions": table}))
    print(table.round(3).to_string(index=False))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratios = tables["conditions"].set_index("workload")["ratio"].drop(BASELINE)
    on_state = ratios[[name for name in ratios.index if name.startswith("probe")]]
    verdict = "at most" if on_state.max() <= LIMIT else "more than"
    shares = ", ".join(f"{ratio:.3f} ({name})" for name, ratio in ratios.items())
    return (
        f"A condition on the model's state takes {verdict} {LIMIT} times as long as the same edit "
        f"without it. Times as long as without a condition: {shares}."
    )


def generations(lm: hk.LM) -> Work:
    """The same steering without a condition, and with conditions that hold everywhere."""
    direction = torch.randn(576, generator=torch.Generator().manual_seed(0))

    def probe(site: str, **settings: Any) -> Any:
        new_probe: Any = hk.types.Probe
        return hk.when.reads(new_probe(site, direction, bias=0.0, norm=1.0), **settings)

    always = {"above": -1.0}
    conditions: dict[str, Any] = {
        BASELINE: None,
        "probe at its own site": probe(EDITED, **always),
        "probe at an earlier block": probe(BEFORE, **always),
        "probe at a later block": probe(AFTER, **always),
        "probe of the prompt, once": probe(BEFORE, pos=hk.PROMPT, **always),
        "text so far": ~hk.when.contains("no such text"),
    }
    vector = direction / direction.norm()
    work: Work = {}
    for name, when in conditions.items():
        hook = hk.steer(EDITED, vector, scale=20.0, when=when)
        work[name] = lambda hook=hook: hk.generate(
            lm, PROMPT, hook, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    return work


if __name__ == "__main__":
    main()
