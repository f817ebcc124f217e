"""How does one token come to be chosen, from the prompt to the draw?

One step of one text, as a learner would read it: the tokens that the model reads, the hidden state
that they end in, the logits as W h, what softmax makes of them, what the decoding rules leave, and
which candidate the dice take. It is answered if every number follows from the one before it, and
transformers' own generate draws the same token.

python -m experiments.one_decision        half a minute on two cores; writes results/one_decision/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

import hookkit as hk

SEED = 3
PROMPT = "I like oat milk in my"
WATCH = " coffee"
RULES = {"temperature": 0.8, "top_k": 0, "top_p": 0.9}
STEPS = 8  # of which the first is explained in full


def main() -> None:
    lm = hk.load(device="cpu")
    question = f"How does the token after “{PROMPT}” come to be chosen?"
    with hk.record(
        "results/one_decision", title="One decision", question=question, lm=lm, seed=SEED
    ) as results:
        read(lm, results)
        logits = computed(lm, results)
        run = drawn(lm, results, logits)
        told(results, run)
        names = ("by_hand", "steps")
        tables = {name: hk.results.read_table(results.folder / f"{name}.csv") for name in names}
        results.answer(answer(tables))
    print(
        hk.decisions(run)[
            ["step", "token", "rank_model", "prob_model", "prob_processed", "why"]
        ].to_string(index=False)
    )
    print("\nThe page: results/one_decision/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    by_hand, step = tables["by_hand"].iloc[0], tables["steps"].iloc[0]
    same = "draws the same token" if by_hand["transformers"] == step["token"] else "draws another"
    return (
        f"By a draw from {by_hand['kept']} of {by_hand['tokens']:,} tokens. The model gives every "
        f"token a logit; temperature {RULES['temperature']} divides them, softmax makes them "
        f"probabilities, and top_p = {RULES['top_p']} keeps the most likely tokens until they make "
        f"up {RULES['top_p']:.0%}. The draw takes {step['token']!r}, which has rank "
        f"{step['rank_model']} for the model and a probability of {by_hand['prob']:.3f} among "
        f"those kept (hookkit's record says {step['prob_processed']:.3f}). With the same seed, "
        f"transformers' own generate {same}."
    )


def read(lm: hk.LM, results: hk.types.Record) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    results.text("# 1. Read")
    results.text(f"The model reads {len(ids)} numbers, and nothing else:")
    tokens = {"pos": range(len(ids)), "token_id": ids, "token": list(map(lm.string, ids))}
    results.table("tokens", pd.DataFrame(tokens), caption="The prompt as tokens.")


def computed(lm: hk.LM, results: hk.types.Record) -> torch.Tensor:
    run = results.run("forward", hk.forward(lm, PROMPT, hk.capture("final_norm", pos=-1)))
    hidden, logits = run["final_norm"][0, 0], run.logits[0, -1]
    head: Any = lm.submodule("lm_head")
    weights = head.weight.detach()
    by_hand = weights @ hidden
    results.text("# 2. Score")
    results.text(
        f"The last token's hidden state h has {len(hidden)} numbers. A token's logit is the sum of "
        f"h times the token's row of W ({weights.shape[0]:,} rows): for {WATCH!r}, "
        f"{by_hand[lm.token(WATCH)]:.4f}. The model says {logits[lm.token(WATCH)]:.4f}; over the "
        f"whole vocabulary the two differ by at most {(by_hand - logits).abs().max():.0e}."
    )
    largest = (weights[lm.token(WATCH)] * hidden).abs().topk(5).indices
    parts = {
        "dimension": largest,
        "weight": weights[lm.token(WATCH), largest],
        "hidden": hidden[largest],
    }
    terms = pd.DataFrame({name: values.tolist() for name, values in parts.items()})
    caption = f"The five of {len(hidden)} products that weigh most in the logit of {WATCH!r}."
    results.table("terms", terms.assign(product=terms["weight"] * terms["hidden"]), caption=caption)
    results.table(
        "candidates",
        hk.ranks(run, watch=WATCH),
        caption="The first ten by logit, with what softmax makes of it.",
    )
    results.figure(
        "panels",
        hk.figures.logit_panels(hk.ranks(run, top=None), watch=WATCH),
        caption="Logit, softmax, log-softmax.",
    )
    return logits


def drawn(lm: hk.LM, results: hk.types.Record, logits: torch.Tensor) -> hk.types.Run:
    results.text("# 3. Choose")
    settings = {"max_new_tokens": STEPS, "do_sample": True, **RULES}
    record = hk.trace(top=10, watch=WATCH)
    run = results.run("sampled", hk.generate(lm, PROMPT, seed=SEED, trace=record, **settings))
    probs, order = (logits / RULES["temperature"]).softmax(dim=-1).sort(descending=True)
    kept = order[probs.cumsum(0) - probs < RULES["top_p"]]
    chosen = int(run.tokens[0, run.prompt_lengths[0]])
    left = (logits[kept] / RULES["temperature"]).softmax(dim=-1)[kept == chosen].item()
    by_hand = {"tokens": len(logits), "kept": len(kept), "token": lm.string(chosen), "prob": left}
    torch.manual_seed(SEED)
    model: Any = lm.model
    plain = model.generate(run.tokens[:, : run.prompt_lengths[0]], **settings)
    by_hand["transformers"] = lm.string(int(plain[0, run.prompt_lengths[0]]))
    caption = "The step by hand, and what transformers' own generate draws with this seed."
    results.table("by_hand", pd.DataFrame([by_hand]), caption=caption)
    first = (
        hk.candidates(run).query("step == 0 and stage != 'edited'").drop(columns=["row", "step"])
    )
    results.table(
        "stages",
        first,
        caption="The candidates of this step: as the model has them, and what the rules leave.",
    )
    return run


def told(results: hk.types.Record, run: hk.types.Run) -> None:
    results.text("# 4. And so on")
    results.text(
        f"The token is read, and the next is chosen from what it makes of the text: {run.text[0]!r}"
    )
    record = hk.candidates(run)
    results.figure(
        "strip",
        hk.figures.decision_strip(record),
        caption="Each chosen token, by how little it was expected.",
    )
    results.figure(
        "ranks",
        hk.figures.rank_lines(record, watch=WATCH),
        caption=f"Where {WATCH!r} stood for the model.",
    )
    columns = [
        "step",
        "token",
        "why",
        "rank_model",
        "prob_model",
        "prob_processed",
        "candidates",
        "entropy_model",
    ]
    results.table(
        "steps",
        hk.decisions(run).loc[:, columns],
        caption="Every step of the text. Entropy in nats.",
    )


if __name__ == "__main__":
    main()
