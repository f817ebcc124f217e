"""Where do the words after "I like oat milk in my" come from, and what does it take to change them?

A logit is one number for each token. This goes through what becomes of them on a real model: what softmax does to them,
how the next token is drawn, and how forcing, banning and ablating move the ranking. It is answered if the forced token
wins, the banned one has probability 0, and the model is at the end what it was at the beginning.

python -m experiments.oat_milk        half a minute on a laptop; writes results/oat_milk/
"""

import pandas as pd
import torch

import hookkit as hk

SEED = 0
SENTENCE = "I like oat milk in my coffee, and a slice of bread with butter."
MILK = "I like oat milk in my"
FRANCE = "The capital of France is"
COFFEE = " coffee"
STEPS = 10  # generated tokens
BLOCK, HEAD = 17, (24, 8)  # one block and one head to take out


def main() -> None:
    lm = hk.load(device="cpu")
    before = hk.forward(lm, MILK)
    question = "Where do the words after “I like oat milk in my” come from, and what does it take to change them?"
    with hk.record("results/oat_milk", title="Oat milk", question=question, lm=lm, seed=SEED) as results:
        look_at_logits(lm, results)
        look_at_draws(lm, before, results)
        change_the_logits(lm, before, results)
        change_the_inside(lm, before, results)
        after = hk.forward(lm, MILK)
        same = torch.equal(before.logits, after.logits)
        results.text(f"After all of this the model gives the same logits as before, bit for bit: {same}.")
        assert same


def look_at_logits(lm: hk.LM, results: hk.Record) -> None:
    sentence = results.run("sentence", hk.forward(lm, SENTENCE))
    tokens = [repr(lm.string(i)) for i in sentence.tokens[0].tolist()]
    results.text("# A sentence is tokens, and every token gets a prediction")
    results.text(f"“{SENTENCE}” has {len(SENTENCE)} characters and {len(tokens)} tokens: {' '.join(tokens)}")
    rows = []
    for pos in range(len(tokens) - 1):
        came = int(sentence.tokens[0, pos + 1])
        ranks = hk.ranks(sentence, pos=pos, top=1, watch=came)
        real = ranks[ranks["token_id"] == came].iloc[0]
        rows.append({"pos": pos, "read": tokens[pos], "token_predicted": ranks["token"].iloc[0], "token_that_came": tokens[pos + 1],
                     "logit": real["logit"], "prob": real["prob"], "rank": real["rank"]})  # fmt: skip
    results.table("predictions", pd.DataFrame(rows), caption="What the model expected at each position, and what came.")

    logits = sentence.logits[0, -1]
    direct, shifted = softmax_as_written(logits * 10), softmax_as_written(logits * 10 - logits.max() * 10)
    results.text(
        f"Softmax as it is written, exp(x) / Σ exp(x), on these logits times 10 (as at temperature 0.1) gives "
        f"{int(torch.isnan(direct).sum()):,} NaN of {len(direct):,}, since exp({logits.max() * 10:.0f}) overflows in float32. "
        f"With the largest logit subtracted first it is exact: the sum is {shifted.sum():.6f}, and no value differs from "
        f"torch's softmax by more than {(shifted - torch.softmax(logits * 10, -1)).abs().max():.1e}. "
        "A shift of all logits changes no probability."
    )


def softmax_as_written(x: torch.Tensor) -> torch.Tensor:
    return x.exp() / x.exp().sum()


def look_at_draws(lm: hk.LM, before: hk.Run, results: hk.Record) -> None:
    results.text(f"# After “{MILK}”")
    everything = hk.ranks(before, top=None)
    results.figure("logits", hk.logit_scatter(everything, watch=COFFEE), caption="All 49152 logits at the last position.")
    results.figure("panels", hk.logit_panels(everything, watch=COFFEE), caption="The same tokens, three times.")
    results.table("top_ten", hk.ranks(before, watch=COFFEE), caption="The ten most likely next tokens.")
    settings = {"max_new_tokens": STEPS, "do_sample": True}
    draws = [results.run(f"draw_{n}", hk.generate(lm, MILK, seed=SEED + n, **settings)) for n in range(5)]
    greedy = results.run("greedy", hk.generate(lm, MILK, max_new_tokens=STEPS, do_sample=False))
    lines = [f"greedy: {greedy.generated[0]!r}", *(f"seed {SEED + n}: {run.generated[0]!r}" for n, run in enumerate(draws))]
    results.text("Ten tokens by taking the largest logit each time, and five draws:\n" + "\n".join(lines))

    steps = [hk.ranks(greedy, step=n, top=1).assign(step=n) for n in range(STEPS)]
    results.table("greedy_steps", pd.concat(steps), caption="Greedy decoding, a step at a time.")
    ids = before.tokens
    plain = lm.model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    torch.manual_seed(SEED)
    sampled = lm.model.generate(ids, **settings)
    assert torch.equal(plain, greedy.tokens) and torch.equal(sampled, draws[0].tokens)
    results.text("The greedy text and the first draw are token for token what transformers' own generate gives.")


def change_the_logits(lm: hk.LM, before: hk.Run, results: hk.Record) -> None:
    france = results.run("france", hk.forward(lm, FRANCE))
    forced = results.run("forced", hk.forward(lm, FRANCE, hk.force(COFFEE, margin=10)))
    shift = results.table("forced_shift", hk.rank_shift(france, forced), caption=f"{COFFEE!r} forced after “{FRANCE}”; deltas are after minus before.")
    results.figure("forced_ranks", hk.rank_bump(shift, title=f"{COFFEE!r} forced after “{FRANCE}”"))
    told = hk.generate(lm, FRANCE, max_new_tokens=STEPS, do_sample=False)
    made = hk.generate(lm, FRANCE, hk.force(COFFEE, margin=10, step=0), max_new_tokens=STEPS, do_sample=False)
    results.text(f"# Forced, banned\n")
    results.text(f"Unedited: {told.text[0]!r}\nForced at step 0: {made.text[0]!r}")

    banned = results.run("banned", hk.forward(lm, MILK, hk.ban(COFFEE)))
    shift = results.table("banned_shift", hk.rank_shift(before, banned), caption=f"{COFFEE!r} banned after “{MILK}”.")
    results.figure("banned_deltas", hk.delta_bars(shift, title=f"{COFFEE!r} banned after “{MILK}”"))
    print(shift[["token", "rank_before", "rank_after", "prob_before", "prob_after", "why"]].to_string(index=False))


def change_the_inside(lm: hk.LM, before: hk.Run, results: hk.Record) -> None:
    results.text("# Taken out: one block, one head")
    layer, head = HEAD
    edits = {"block": hk.skip_block(BLOCK), "head": hk.ablate(hk.Site("z", layer, head))}
    runs = {name: results.run(name, hk.forward(lm, MILK, edit)) for name, edit in edits.items()}
    summary = [hk.shift_summary(before, run).assign(edit=str(edits[name])) for name, run in runs.items()]
    results.table("ablated", pd.concat(summary), caption="How far the distribution moved.")
    for name, run in runs.items():
        shift = results.table(f"{name}_shift", hk.rank_shift(before, run, watch=COFFEE), caption=str(edits[name]))
        results.figure(f"{name}_ranks", hk.rank_bump(shift, title=str(edits[name])))


if __name__ == "__main__":
    main()
