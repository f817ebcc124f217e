"""Where do the words after "I like oat milk in my" come from, and what does it take to change them?

A logit is one number for each token. This goes through what becomes of them on a real model: what
softmax does to them, how the next token is drawn, and how forcing, banning and ablating move the
ranking. It is answered if the forced token wins, the banned one has probability 0, and the model is
at the end what it was at the beginning.

python -m experiments.oat_milk [FOLDER]    half a minute on two cores; writes results/oat_milk/
"""

import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

import hookkit as hk

SEED = 0
SENTENCE = "I like oat milk in my coffee, and a slice of bread with butter."
MILK, FRANCE, COFFEE = "I like oat milk in my", "The capital of France is", " coffee"
QUESTION = f"Where do the words after “{MILK}” come from, and what does it take to change them?"
STEPS = 10  # generated tokens
MARGIN = 10  # by how much the forced token's logit is to be the largest
BLOCK, HEAD = 17, (24, 8)  # one block and one head to take out


def main(folder: str = "results/oat_milk") -> None:
    lm = hk.load(device="cpu")
    before = hk.forward(lm, MILK)
    with hk.record(folder, title="Oat milk", question=QUESTION, lm=lm, seed=SEED) as results:
        look_at_a_sentence(lm, results)
        look_at_draws(lm, before, results)
        shift = change_the_logits(lm, before, results)
        change_the_inside(lm, before, results)
        names = ("top_ten", "forced_shift", "banned_shift", "ablated")
        tables = {name: hk.results.read_table(results.folder / f"{name}.csv") for name in names}
        results.answer(answer(tables))
        same = torch.equal(before.logits, hk.forward(lm, MILK).logits)
        results.text(
            f"After all of this, are the model's logits the same as before, bit for bit? {same}."
        )
    print(
        shift[["token", "rank_before", "rank_after", "prob_before", "prob_after", "why"]].to_string(
            index=False
        )
    )
    print(f"\n{results.answered}\nThe page: {folder}/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    first = tables["top_ten"].iloc[0]
    forced, banned = (tables[name].set_index("token") for name in ("forced_shift", "banned_shift"))
    rank = forced["rank_before"][COFFEE]
    gain = banned["logprob_delta"].drop(COFFEE).max()
    edits = []
    for edit in tables["ablated"].to_dict("records"):
        verb = "leaves" if edit["top1_after"] == first["token"] else "puts"
        edits.append(f"{edit['edit']} {verb} {edit['top1_after']!r} first")
    return (
        f"They are the tokens with the largest logits: {first['token']!r} is first, with a "
        f"probability of {first['prob']:.2f}. An edit of one logit decides which token comes: "
        f"forced after “{FRANCE}”, {COFFEE!r} goes from rank {rank:,} to rank "
        f"{forced['rank_after'][COFFEE]}; banned after “{MILK}”, its probability is "
        f"{banned['prob_after'][COFFEE]:g}, and every other token gains {gain:.2f} nats. One "
        f"part of the model matters less: {', and '.join(edits)}."
    )


def look_at_a_sentence(lm: hk.LM, results: hk.types.Record) -> None:
    run = results.run("sentence", hk.forward(lm, SENTENCE))
    ids = run.tokens[0].tolist()
    read = list(map(lm.string, ids))
    results.text("# A sentence is tokens, and every token gets a prediction")
    quoted = " ".join(map(repr, read))
    results.text(f"“{SENTENCE}” has {len(SENTENCE)} characters and {len(ids)} tokens: {quoted}")
    rows = []
    for pos, came in enumerate(ids[1:]):
        ranks = hk.ranks(run, pos=pos, top=1, watch=came)
        real = ranks.set_index("token_id").loc[came, ["token", "logit", "prob", "rank"]]
        rows.append({"pos": pos, "read": read[pos], "token_predicted": ranks["token"][0], **real})
    caption = (
        "For each token that the model read: the token that it predicted next, and the token that "
        "came, with its rank."
    )
    results.table(
        "predictions",
        pd.DataFrame(rows).rename(columns={"token": "token_that_came"}),
        caption=caption,
    )

    logits = run.logits[0, -1] * 10
    written, shifted = (x.exp() / x.exp().sum() for x in (logits, logits - logits.max()))
    results.text(
        "Softmax as it is written, exp(x) / Σ exp(x), on the last logits times 10 (as at "
        f"temperature 0.1) gives {int(written.isnan().sum()):,} NaN of {len(logits):,}, since "
        f"exp({logits.max():.0f}) overflows in float32. A shift of all logits changes no "
        f"probability: with the largest subtracted, the sum is {shifted.sum():.5f}, and no value "
        f"is further than {(shifted - logits.softmax(-1)).abs().max():.0e} from torch's own "
        "softmax."
    )


def look_at_draws(lm: hk.LM, before: hk.types.Run, results: hk.types.Record) -> None:
    results.text(f"# After “{MILK}”")
    everything = hk.ranks(before, top=None)
    results.figure(
        "panels",
        hk.figures.logit_panels(everything, watch=COFFEE),
        caption="All tokens at the last position.",
    )
    results.table(
        "top_ten", hk.ranks(before, watch=COFFEE), caption="The ten most likely next tokens."
    )
    greedy = results.run("greedy", hk.generate(lm, MILK, max_new_tokens=STEPS, do_sample=False))
    sampling = {"max_new_tokens": STEPS, "do_sample": True, "top_k": 0}  # from all tokens
    draws = [
        results.run(f"draw_{n}", hk.generate(lm, MILK, seed=SEED + n, **sampling)) for n in range(5)
    ]
    texts = [f"seed {SEED + n}: {run.generated[0]!r}" for n, run in enumerate(draws)]
    results.text(
        "\n".join(
            [f"The most likely token each time: {greedy.generated[0]!r}", "Five draws:", *texts]
        )
    )

    torch.manual_seed(SEED)
    assert step_by_step(lm, torch.argmax) == greedy.tokens[0].tolist()
    assert (
        step_by_step(lm, lambda logits: torch.multinomial(logits.softmax(-1), 1))
        == draws[0].tokens[0].tolist()
    )
    caption = (
        "Greedy decoding step by step. A loop of forwards wrote the same, and one that samples the "
        "first draw."
    )
    results.table("greedy_steps", hk.ranks(greedy, step=slice(STEPS), top=1), caption=caption)


def step_by_step(lm: hk.LM, choose) -> list[int]:
    ids = lm.tokenizer.encode(MILK)
    for _ in range(STEPS):
        ids.append(int(choose(hk.forward(lm, [ids], logits="last").logits[0, -1])))
    return ids


def change_the_logits(lm: hk.LM, before: hk.types.Run, results: hk.types.Record) -> pd.DataFrame:
    results.text("# Forced where it does not belong, banned where it does")
    greedy = {"max_new_tokens": STEPS, "do_sample": False}
    france = results.run("france", hk.generate(lm, FRANCE, **greedy))
    forced = results.run(
        "forced", hk.generate(lm, FRANCE, hk.force(COFFEE, margin=MARGIN, step=0), **greedy)
    )
    title = f"{COFFEE!r} forced after “{FRANCE}”"
    shift = results.table(
        "forced_shift",
        hk.rank_shift(france, forced, step=0),
        caption=f"{title}. Δ: after − before.",
    )
    results.figure("forced_ranks", hk.figures.rank_bump(shift, title=title))
    results.text(f"The text before: {france.text[0]!r}\nThe text after: {forced.text[0]!r}")

    banned = results.run("banned", hk.forward(lm, MILK, hk.ban(COFFEE)))
    title = f"{COFFEE!r} banned after “{MILK}”"
    fell = results.table(
        "banned_shift", hk.rank_shift(before, banned), caption=f"{title}. Δ: after − before."
    )
    results.figure("banned_deltas", hk.figures.delta_bars(fell, title=title))
    return shift


def change_the_inside(lm: hk.LM, before: hk.types.Run, results: hk.types.Record) -> None:
    results.text("# Taken out: one block, one head")
    edits = {"block": hk.skip_block(BLOCK), "head": hk.ablate(hk.Site("z", *HEAD))}
    runs = {name: results.run(name, hk.forward(lm, MILK, edit)) for name, edit in edits.items()}
    summary = [
        hk.stats.shift_summary(before, run).assign(edit=str(edits[name]))
        for name, run in runs.items()
    ]
    table = pd.concat(summary).set_index("edit").reset_index()
    results.table(
        "ablated", table, caption="How far the distribution moved. KL, JS and entropy in nats."
    )
    for name, run in runs.items():
        shift = results.table(
            f"{name}_shift", hk.rank_shift(before, run, watch=COFFEE), caption=str(edits[name])
        )
        results.figure(f"{name}_ranks", hk.figures.rank_bump(shift, title=str(edits[name])))


if __name__ == "__main__":
    main(*sys.argv[1:])
