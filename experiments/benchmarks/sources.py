"""What does an edit with a source cost?

A source is a second distribution for each token: another prompt or the model without its hooks
costs one more forward for each token, two models' worth, and a layer costs the model's head once
more. It is answered by ratios of medians in one run, beside plain transformers and beside
transformers' own guidance_scale, the workloads in turn and in a new order each round.

python -m experiments.benchmarks.sources
    three minutes on two cores; writes results/benchmarks_sources/
"""

from collections.abc import Mapping
from typing import Any

import torch

import hookkit as hk

from .overhead import Work, compared

ROUNDS, NEW_TOKENS, THREADS = 6, 64, 2
LIMIT = 2.15  # times plain transformers: two models' worth
PROMPT, OTHER = "I like oat milk in my", "She likes black tea in her"
QUESTION = "What does an edit with a source cost?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    with hk.record(
        "results/benchmarks_sources", title="What sources cost", question=QUESTION, lm=lm
    ) as results:
        table = compared("generate", workloads(lm), ROUNDS)
        caption = (
            f"Medians of {ROUNDS} rounds in turn, {NEW_TOKENS} tokens, {THREADS} threads. ratio "
            "and added_ms: to plain transformers, by round."
        )
        results.table("sources", table, caption=caption)
        results.answer(answer({"sources": table}))
    print(table.round(2).to_string(index=False))


def workloads(lm: hk.LM) -> Work:
    model: Any = lm.model
    inputs = lm.tokenizer(PROMPT, return_tensors="pt")
    negative = lm.tokenizer(OTHER, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    guided = {**settings, "guidance_scale": 1.5, "negative_prompt_ids": negative}

    def with_hooks(*hooks: hk.types.Hook) -> Any:
        return lambda: hk.generate(lm, PROMPT, *hooks, **settings)

    layer = hk.Site("resid_post", lm.n_layers // 2)
    return {
        "plain transformers": lambda: model.generate(**inputs, **settings),
        "guidance_scale of transformers": lambda: model.generate(**inputs, **guided),
        "nothing attached": with_hooks(),
        "another prompt": with_hooks(hk.away_from(OTHER, by=0.5)),
        "the unedited model": with_hooks(
            hk.scale("mlp_out.12", 0.5), hk.away_from(hk.UNEDITED, by=0.5)
        ),
        "an earlier layer": with_hooks(hk.away_from(layer, by=0.5, plausible=0.1)),
    }


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    ratio = tables["sources"].set_index("workload")["ratio"]
    prompt, twin = ratio["another prompt"], ratio["the unedited model"]
    verdict = "Two models' worth" if max(prompt, twin) <= LIMIT else "More than two models' worth"
    return (
        f"{verdict}: generation with another prompt as the source takes {prompt:.2f} times as long "
        f"as in plain transformers, and with the unedited model {twin:.2f} times; transformers' "
        f"own guidance_scale takes {ratio['guidance_scale of transformers']:.2f} times as long. "
        f"An earlier layer takes {ratio['an earlier layer']:.2f} times as long."
    )


if __name__ == "__main__":
    main()
