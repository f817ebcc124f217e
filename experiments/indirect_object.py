"""Which parts of the model find out who is given the drink, and in which order?

"When Mary and John went to the store, John gave a drink to" is answered " Mary". The corrupted prompt has the other
name at its second mention (S2), and is answered " John". A place matters if its clean value, put into the corrupted
run, brings the answer back. It is answered if the effect moves from S2 to the end of the prompt, if few heads carry it,
and if their effect is far above that of the same patch from an unrelated pair.

python -m experiments.indirect_object        some minutes on two cores; writes results/indirect_object/
"""

from typing import Any

import pandas as pd

import hookkit as hk

SEED, COUNT = 0, 22  # pairs; of each length more than one, for the control
SITES = ["resid_pre", "attn_out", "mlp_out"]
TOP = 5  # heads that are looked at more closely
BACK = "What one clean value brings back: 0 nothing, 1 all of it"
TAKES = "What one corrupted output does on one path alone: 1 is as corrupted"
QUESTION = "Which parts of the model find out who is given the drink, and in which order?"


def main() -> None:
    lm = hk.load(device="cpu")
    pairs = hk.datasets.indirect_object(lm, COUNT, seed=SEED).solved(lm)
    with hk.record("results/indirect_object", title="Indirect object", question=QUESTION, lm=lm, seed=SEED) as results:
        solved(lm, pairs, results)
        where(lm, pairs, results)
        heads = which_heads(lm, pairs, results)
        readers(lm, pairs, heads, results)
    print(heads[["head_name", "logit_diff_effect", "logit_diff_effect_low", "logit_diff_effect_high"]].round(3))
    print("\nThe page: results/indirect_object/report.html")


def solved(lm: hk.LM, pairs: hk.Pairs, results: hk.Record) -> None:
    checked = pairs.check(lm)
    results.text("# Does the model do it at all?")
    results.text(
        f"{pairs.note}. In these the right name is ahead by {checked['logit_diff_clean'].mean():.2f} logits; after the "
        f"corrupted prompts the other one by {-checked['logit_diff_corrupted'].mean():.2f}."
    )
    results.table("pairs", checked.round(3), caption="Each pair: the logits of both names, clean and corrupted.")


def where(lm: hk.LM, pairs: hk.Pairs, results: hk.Record) -> None:
    results.text("# Early at the second mention, late at the end")
    metric = pairs.metric()
    places = {name: pairs.labels[name] for name in ("IO", "S1", "S2", "end")}
    table = hk.patching(lm, pairs.clean, pairs.corrupted, SITES, metric, pos=places)
    results.text(f"The plan of this sweep: {table.attrs['plan']}".replace("\n", "; "))
    means = results.table("places", hk.over_prompts(table), caption="Effect: 0 corrupted, 1 as clean; 95 % intervals.")
    results.figure("places_map", hk.heat_map(table, title=BACK), caption="By layer and named position.")
    stream: Any = means[means["site"] == "resid_pre"]
    results.figure("stream", hk.interval_lines(stream, series="pos", title=BACK), caption="The residual stream.")
    by_layer: Any = stream.pivot_table(index="layer", columns="pos", values="logit_diff_effect")
    moved = int((by_layer["end"] > by_layer["S2"]).idxmax())
    results.text(
        f"Until block {moved - 1} the clean stream at S2 brings back more than that at the end; from block {moved} on "
        "it is the other way round. IO and S1 come before the token that differs, and can bring back nothing."
    )


def which_heads(lm: hk.LM, pairs: hk.Pairs, results: hk.Record) -> pd.DataFrame:
    results.text("# Few heads carry it")
    metric = pairs.metric()
    table = hk.patching(lm, pairs.clean, pairs.corrupted, "z", metric)
    results.figure("heads_map", hk.heat_map(table, named=TOP, title=BACK), caption="Each head's clean output.")
    means = hk.over_prompts(table)
    results.table("heads", means, caption="Every head, with 95 % intervals over the pairs.")
    best = means.sort_values("logit_diff_effect", key=abs, ascending=False).head(TOP)
    names = [f"z.{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)]
    source = hk.forward(lm, pairs.clean, hk.capture(sorted({name.rpartition(".")[0] for name in names})))
    patched = {"head": names}, lambda head: hk.patch(head, source)
    control = hk.sweep(lm, pairs.corrupted, *patched, metric, control="resample", target=source)
    held = hk.over_prompts(control)
    results.table("control", held, caption="The strongest heads beside the same patch from another pair (control).")
    effect = held.pivot_table(index="head", columns="control", values="logit_diff_effect")
    results.text(
        f"The strongest: {', '.join(names)}. Patched from another pair, none of them brings back more than "
        f"{effect[True].abs().max():.2f}; from their own pair {effect[False].abs().min():.2f} to "
        f"{effect[False].abs().max():.2f} in size. What another pair's value brings back too is not the name."
    )
    return best.assign(head_name=names)


def readers(lm: hk.LM, pairs: hk.Pairs, heads: pd.DataFrame, results: hk.Record) -> None:
    results.text("# Who writes the answer, and what the writer reads")
    metric = pairs.metric()
    direct = hk.path_patching(lm, pairs.clean, pairs.corrupted, metric)
    results.figure("writers_map", hk.heat_map(direct, named=TOP, title=TAKES), caption="From head to logits.")
    means = results.table("writers", hk.over_prompts(direct), caption="The direct effect of every head.")
    writer = means.loc[means["logit_diff_effect"].idxmax()]
    layer, head = int(writer["layer"]), int(writer["head"])
    shared = head * (lm.sizes["kv_head"] or 1) // (lm.sizes["head"] or 1)  # the key-value head
    read = [hk.Site("q", layer, head), hk.Site("k", layer, shared), hk.Site("v", layer, shared)]
    senders = sorted({int(each) for each in heads["layer"] if each < layer})
    both = pairs.clean, pairs.corrupted
    found = [hk.path_patching(lm, *both, metric, receivers=site, layers=senders) for site in read]
    paths: Any = pd.concat([told.assign(site=str(site)) for told, site in zip(found, read, strict=True)])
    caption = f"From the heads of blocks {', '.join(map(str, senders))} to what head {layer}.{head} reads."
    results.figure("readers_map", hk.heat_map(paths, named=TOP, title=TAKES), caption=caption)
    means = results.table("readers", hk.over_prompts(paths, by=["site", "layer", "head"]), caption=caption)
    teller = means.loc[means["logit_diff_effect"].abs().idxmax()]
    results.answer(
        f"{', '.join(heads['head_name'][:3])} carry the most. Head {layer}.{head} writes the most by itself, "
        f"{writer['logit_diff_effect']:.2f} of the way. The largest single path into what it reads is from "
        f"head {int(teller['layer'])}.{int(teller['head'])} to {teller['site']}: {teller['logit_diff_effect']:+.3f} "
        f"[{teller['logit_diff_effect_low']:+.3f}, {teller['logit_diff_effect_high']:+.3f}] of the way."
    )


if __name__ == "__main__":
    main()
