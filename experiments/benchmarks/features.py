"""What do the features of a dictionary cost?

A capture of one layer's features has to multiply the layer's values by the encoder: it stands
beside a hook by hand that does this and nothing else. An edit of ten features in generate stands
beside a steering vector at the same site. It is answered by ratios in one run, the workloads in
turn and in a new order each round. The dictionary is random, of 4,608 features, with a ReLU.

python -m experiments.benchmarks.features
    three minutes on two cores; writes results/benchmarks_features/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

import hookkit as hk

from .overhead import Work, compared, plainly

ROUNDS, BATCH, WIDTH, NEW_TOKENS, THREADS = 10, 8, 64, 48, 2
N_FEATURES, LAYER = 4608, 12
CAPTURE_LIMIT, EDIT_LIMIT = 1.15, 1.10
PROMPT = "I like oat milk in my"
SITE = f"feat.resid_post.{LAYER}"
QUESTION = "What do the features of a dictionary cost?"
BY_HAND, CAPTURE = "the product by hand", "capture of all features"
STEERING, EDIT = "steering", "ten features clamped"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    dictionary = random_dictionary()
    lm = lm.with_dictionaries(dictionary, check=False)
    with hk.record(
        "results/benchmarks_features", title="What features cost", question=QUESTION, lm=lm, seed=0
    ) as results:
        parts = [
            compared("forward", forwards(lm, dictionary), ROUNDS),
            compared("generate", generation(lm), ROUNDS),
        ]
        caption = (
            f"Medians of {ROUNDS} rounds in turn, {THREADS} threads: forwards of {BATCH} x {WIDTH} "
            f"tokens, {NEW_TOKENS} generated tokens, {N_FEATURES} features. ratio and added_ms: to "
            "the first of each kind, by round."
        )
        table = results.table("features", pd.concat(parts, ignore_index=True), caption=caption)
        results.answer(answer({"features": table}))
    print(table.round(2).to_string(index=False))


def random_dictionary() -> hk.types.Dictionary:
    """A dictionary with unit decoder rows; a bias keeps most features off."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_FEATURES, 576, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    weights = {
        "W_enc": directions.T.contiguous(),
        "b_enc": torch.full((N_FEATURES,), -10.0),
        "W_dec": directions,
        "b_dec": torch.zeros(576),
    }
    site = hk.Site("resid_post", LAYER)
    return hk.types.Dictionary(site, site, weights, "relu")


def forwards(lm: hk.LM, dictionary: hk.types.Dictionary) -> Work:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49000, (BATCH, WIDTH), generator=generator)
    return {
        BY_HAND: by_hand(lm.model, ids, dictionary),
        CAPTURE: lambda: hk.forward(lm, ids, hk.capture(SITE)),
        "sparse capture": lambda: hk.forward(lm, ids, hk.capture(SITE, sparse=True)),
        "capture of one feature": lambda: hk.forward(lm, ids, hk.capture(f"{SITE}.7")),
        "plain transformers": plainly(lm.model, ids),
    }


def by_hand(model: Any, ids: torch.Tensor, dictionary: hk.types.Dictionary) -> Any:
    weights = dictionary.weights

    @torch.no_grad()
    def run() -> object:
        kept: list[torch.Tensor] = []

        def encode(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            kept.append((output @ weights["W_enc"] + weights["b_enc"]).relu())

        handle = model.model.layers[LAYER].register_forward_hook(encode)
        logits = model(ids, use_cache=False).logits
        handle.remove()
        return logits, kept

    return run


def generation(lm: hk.LM) -> Work:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    vector = torch.randn(576, generator=torch.Generator().manual_seed(1))

    def with_hooks(*hooks: hk.types.Hook) -> Any:
        return lambda: hk.generate(lm, PROMPT, *hooks, **settings)

    return {
        STEERING: with_hooks(hk.steer(f"resid_post.{LAYER}", vector)),
        EDIT: with_hooks(hk.ablate(SITE, units=list(range(10)), to=torch.full((N_FEATURES,), 3.0))),
        "nothing attached": with_hooks(),
    }


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    ratio = tables["features"].set_index("workload")["ratio"]
    capture, edit = ratio[CAPTURE], ratio[EDIT]
    is_close = capture <= CAPTURE_LIMIT and edit <= EDIT_LIMIT
    verdict = "Little beside the product itself" if is_close else "More than was set as the limit"
    return (
        f"{verdict}: a forward that captures all {N_FEATURES:,} features of a layer takes "
        f"{capture:.2f} times as long as one with the product by hand (limit {CAPTURE_LIMIT}), "
        f"with a sparse capture {ratio['sparse capture']:.2f} times, and plain transformers "
        f"{ratio['plain transformers']:.2f} times. Generation with ten features clamped takes "
        f"{edit:.2f} times as long as with a steering vector (limit {EDIT_LIMIT:.2f})."
    )


if __name__ == "__main__":
    main()
