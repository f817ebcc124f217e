"""What does a grammar cost while a model generates?

The goal: at most 1.10 of the same generation without one, 64 tokens of the default model.

    plain           hk.generate of 64 tokens
    json            the same under the schema of an array of objects, which is longer than 64 tokens
    regex           the same under a regular expression
    json by hand    transformers' generate with a logits processor that calls llguidance

In turn, and in a new order each round. Reading the vocabulary (once for each tokenizer) and the
grammar (once for each generate) are counted apart. The cost is compared in seconds of the clock.

python -m experiments.benchmarks.grammar
    five minutes; writes results/benchmarks_grammar/
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import llguidance
import numpy as np
import pandas as pd
import torch
from llguidance.hf import from_tokenizer
from torch import Tensor

import hookkit as hk

ROUNDS, NEW_TOKENS, THREADS = 9, 64, 2
GOAL = 1.10
PROMPTS = ["The people at the table, as JSON:"]
SCHEMA = {
    "type": "array",
    "minItems": 20,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}
REGEX = r"( [A-Za-z]+[,.]?){200}"
QUESTION = "What does a grammar cost while a model generates?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    about: Any = {"title": "What a grammar costs", "question": QUESTION, "lm": lm}
    with hk.record("results/benchmarks_grammar", **about) as results:
        once = results.table("once", measure_once(lm), caption="Milliseconds, by what is read.")
        cost = results.table(
            "cost",
            compare_cost(lm),
            caption=f"Medians of {ROUNDS} rounds of {NEW_TOKENS} tokens, {THREADS} threads. ratio: "
            f"to plain generation in the same round; the goal is {GOAL}.",
        )
        results.answer(answer({"cost": cost, "once": once}))
    print(cost.round(3).to_string(index=False), once.round(1).to_string(index=False), sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratio = tables["cost"].set_index("way")["ratio"]
    once = tables["once"].set_index("what")["ms"]
    verdict = "as was aimed at" if ratio[["json", "regex"]].max() <= GOAL else "more than aimed at"
    return (
        f"Under a JSON schema generation takes {ratio['json']:.2f} times as long as without, and "
        f"under a regular expression {ratio['regex']:.2f} times, {verdict} ({GOAL:.2f}). The same "
        f"library in a logits processor by hand takes {ratio['json by hand']:.2f} times. Reading "
        f"the vocabulary takes {once['vocabulary']:.0f} ms, once, and the schema "
        f"{once['json']:.1f} ms in each generate."
    )


def measure_once(lm: hk.LM) -> pd.DataFrame:
    """Returns how long it takes to read the vocabulary and each grammar."""
    started = time.perf_counter()
    tokenizer = from_tokenizer(lm.tokenizer)
    records = [("vocabulary", (time.perf_counter() - started) * 1000)]
    grammar_from: Any = llguidance.grammar_from
    for kind, text in (("json", json.dumps(SCHEMA)), ("regex", REGEX)):
        started = time.perf_counter()
        llguidance.LLMatcher(tokenizer, grammar_from(kind, text)).compute_bitmask()
        records.append((kind, (time.perf_counter() - started) * 1000))
    return pd.DataFrame(records, columns=["what", "ms"])


class ByHand:
    """A logits processor for one row, whose matcher reads each new token."""

    def __init__(self, matcher: llguidance.LLMatcher, width: int) -> None:
        self.matcher, self.width = matcher, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.width:
            self.matcher.consume_token(int(input_ids[0, -1]))
        mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: scores.shape[-1]]
        return scores.masked_fill(torch.from_numpy(bits == 0), -torch.inf)


def compare_cost(lm: hk.LM) -> pd.DataFrame:
    """Returns the time of each way, and its ratio to plain generation, round by round."""
    settings: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    tokenizer = from_tokenizer(lm.tokenizer)
    start = llguidance.LLMatcher(tokenizer, llguidance.grammar_from("json", json.dumps(SCHEMA)))
    ids = torch.tensor([lm.encode(PROMPTS[0])])

    def by_hand() -> None:
        processor: Any = ByHand(start.deep_copy(), ids.shape[1])
        inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model: Any = lm.model
        model.generate(**inputs, logits_processor=[processor], **settings)

    def generate(*hooks: hk.types.Hook) -> None:
        run = hk.generate(lm, PROMPTS, *hooks, logits=False, **settings)
        assert run.lengths[0] - run.prompt_lengths[0] == NEW_TOKENS

    ways: dict[str, Callable[[], None]] = {
        "plain": generate,
        "json": lambda: generate(hk.grammar(json=SCHEMA)),
        "regex": lambda: generate(hk.grammar(regex=REGEX)),
        "json by hand": by_hand,
    }
    taken: dict[str, list[float]] = {label: [] for label in ways}
    for number in range(ROUNDS + 1):  # the first is not counted
        for label in random.Random(number).sample(list(ways), len(ways)):
            started = time.perf_counter()
            ways[label]()
            taken[label].append(time.perf_counter() - started)
    records = []
    for label, rounds in taken.items():
        ratios = [mine / plain for mine, plain in zip(rounds[1:], taken["plain"][1:], strict=True)]
        low, high = min(ratios), max(ratios)
        records.append((label, median(rounds[1:]) * 1000, median(ratios), low, high))
    return pd.DataFrame(records, columns=["way", "median_ms", "ratio", "ratio_min", "ratio_max"])


if __name__ == "__main__":
    main()
