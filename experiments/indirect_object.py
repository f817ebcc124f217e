"""Which parts of the model find out who is given the drink, and in which order?

"When Mary and John went to the store, John gave a drink to" is answered " Mary". The corrupted
prompt has the other name at its second mention (S2), and is answered " John". A place matters if
its clean value, put into the corrupted run, brings the answer back. It is answered if the effect
moves from S2 to the end of the prompt, if few heads carry it, and if their effect is far above that
of the same patch from an unrelated pair: twice as large or more. Heads are chosen on one half of
the pairs and measured on the other.

python -m experiments.indirect_object    some minutes on two cores; writes results/indirect_object/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import MUTED, apply_style, sign_colour

SEED, COUNT = 0, 22  # pairs; of each length more than one, for the control
SITES = ["resid_pre", "attn_out", "mlp_out"]
# Those of which the answer is made
TABLES = ("places", "heads", "strongest", "control", "beyond", "writer", "path")
VALUES = ["logit_diff", "logit_diff_effect"]  # of which tables have means
TOP = 5  # heads that are looked at more closely
BACK = "What one clean value brings back: 0 nothing, 1 all of it"
TAKES = "What one corrupted output does on one path alone: 1 is as corrupted"
QUESTION = "Which parts of the model find out who is given the drink, and in which order?"


def main() -> None:
    lm = hk.load(device="cpu")
    pairs = hk.datasets.indirect_object(lm, COUNT, seed=SEED).solved(lm)
    with hk.record(
        "results/indirect_object", title="Indirect object", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        solved(lm, pairs, results)
        where(lm, pairs, results)
        heads = which_heads(lm, pairs, results)
        readers(lm, pairs, heads, results)
        tables = {name: pd.read_csv(results.folder / f"{name}.csv") for name in TABLES}
        results.answer(answer(tables))
    print(
        heads[
            ["head_name", "logit_diff_effect", "logit_diff_effect_low", "logit_diff_effect_high"]
        ].round(3)
    )
    print("\nThe page: results/indirect_object/report.html")


def solved(lm: hk.LM, pairs: hk.types.Pairs, results: hk.types.Record) -> None:
    checked = pairs.check(lm)
    results.text("# Does the model do it at all?")
    results.text(
        f"{pairs.note}. In these the right name is ahead by "
        f"{checked['logit_diff_clean'].mean():.2f} logits; after the corrupted prompts the other "
        f"one by {-checked['logit_diff_corrupted'].mean():.2f}."
    )
    results.table(
        "pairs",
        checked.round(3),
        caption="Each pair: the logits of both names, clean and corrupted.",
    )


def where(lm: hk.LM, pairs: hk.types.Pairs, results: hk.types.Record) -> None:
    results.text("# Early at the second mention, late at the end")
    metric = pairs.metric()
    places = {name: pairs.labels[name] for name in ("IO", "S1", "S2", "end")}
    table = hk.patching(lm, pairs.clean, pairs.corrupted, SITES, metric, pos=places)
    results.text(f"The plan of this sweep: {table.attrs['plan']}".replace("\n", "; "))
    means = results.table(
        "places",
        hk.stats.mean_over_prompts(table, by=["site", "layer", "pos"], values=VALUES),
        caption="Effect: 0 corrupted, 1 as clean; 95 % intervals.",
    )
    results.figure(
        "places_map", hk.figures.heat_map(table, title=BACK), caption="By layer and named position."
    )
    stream: Any = means[means["site"] == "resid_pre"]
    results.figure(
        "stream",
        hk.figures.interval_lines(stream, series="pos", title=BACK),
        caption="The residual stream.",
    )
    by_layer: Any = stream.pivot_table(index="layer", columns="pos", values="logit_diff_effect")
    moved = int((by_layer["end"] > by_layer["S2"]).idxmax())
    results.text(
        f"Until block {moved - 1} the clean stream at S2 brings back more than that at the end; "
        f"from block {moved} on it is the other way round. IO and S1 come before the token that "
        "differs, and can bring back nothing."
    )


def which_heads(lm: hk.LM, pairs: hk.types.Pairs, results: hk.types.Record) -> pd.DataFrame:
    results.text("# Few heads carry it")
    metric = pairs.metric()
    table = hk.patching(lm, pairs.clean, pairs.corrupted, "z", metric)
    results.figure(
        "heads_map",
        hk.figures.heat_map(table, named=TOP, title=BACK),
        caption="Each head's clean output.",
    )
    results.table(
        "heads",
        hk.stats.mean_over_prompts(table, by=["layer", "head"], values=VALUES),
        caption="Every head, with 95 % intervals over the pairs.",
    )
    best = hk.stats.strongest(table, top=TOP)
    names = [f"z.{layer}.{head}" for layer, head in zip(best["layer"], best["head"], strict=True)]
    best = best.assign(head_name=names)
    results.table(
        "strongest", best, caption="Chosen on one half of the pairs, measured on the other."
    )
    source = hk.forward(
        lm, pairs.clean, hk.capture(sorted({name.rpartition(".")[0] for name in names}))
    )
    patched = {"head": names}, lambda head: hk.patch(head, source)
    control = hk.sweep(lm, pairs.corrupted, *patched, metric, control="resample", target=source)
    other_half: Any = control[control["row"] % 2 == 1]  # the pairs that had no part in the choice
    held = hk.stats.mean_over_prompts(other_half, by=["head", "control"])
    caption = (
        "The same heads on the same half: from their own pair, and from other pairs of the same "
        "length (control)."
    )
    results.table("control", held, caption=caption)
    rest = hk.stats.mean_over_prompts(beyond(other_half), by=["head"])
    results.table("beyond", rest, caption="What their own pair brings back beyond other pairs.")
    return best


def beyond(table: pd.DataFrame) -> pd.DataFrame:
    """What a head's own pair brings back beyond other pairs, for each pair."""
    keys = ["head", "row"]
    own: Any = table[~table["control"]].set_index(keys)
    others = table[table["control"]].groupby(keys)["logit_diff_delta"].mean()
    return own.assign(
        logit_diff_delta=own["logit_diff_delta"] - others, logit_diff=float("nan")
    ).reset_index()


def readers(
    lm: hk.LM, pairs: hk.types.Pairs, heads: pd.DataFrame, results: hk.types.Record
) -> None:
    results.text("# Who writes the answer, and what the writer reads")
    metric = pairs.metric()
    direct = hk.path_patching(lm, pairs.clean, pairs.corrupted, metric)
    results.figure(
        "writers_map",
        hk.figures.heat_map(direct, named=TOP, title=TAKES),
        caption="From head to logits.",
    )
    results.table(
        "writers",
        hk.stats.mean_over_prompts(direct, by=["layer", "head"], values=VALUES),
        caption="The direct effect of every head.",
    )
    best = hk.stats.strongest(direct, top=1, toward="up")
    results.table(
        "writer",
        best,
        caption="The largest, chosen on one half of the pairs and measured on the other.",
    )
    writer = best.iloc[0]
    layer, head = int(writer["layer"]), int(writer["head"])
    shared = head * (lm.sizes["kv_head"] or 1) // (lm.sizes["head"] or 1)  # the key-value head
    read = [hk.Site("q", layer, head), hk.Site("k", layer, shared), hk.Site("v", layer, shared)]
    senders = sorted({int(each) for each in heads["layer"] if each < layer})
    both = pairs.clean, pairs.corrupted
    found = [hk.path_patching(lm, *both, metric, receivers=site, layers=senders) for site in read]
    paths: Any = pd.concat(
        [told.assign(site=str(site)) for told, site in zip(found, read, strict=True)]
    )
    caption = (
        f"From the heads of blocks {', '.join(map(str, senders))} to what head {layer}.{head} "
        "reads."
    )
    by = ["site", "layer", "head"]
    means = results.table("readers", hk.stats.mean_over_prompts(paths, by=by), caption=caption)
    results.figure("largest_paths", largest_paths(means), caption=caption)
    best = hk.stats.strongest(paths, top=1, by=by)
    results.table(
        "path",
        best,
        caption="The largest path, chosen on one half of the pairs and measured on the other.",
    )


def largest_paths(means: Any) -> Figure:
    """Draws the largest means with their intervals, grey where the interval has 0."""
    means = means.sort_values("logit_diff_effect", key=abs).tail(2 * TOP)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    labels = []
    rows: list[Any] = means.to_dict("records")
    for place, row in enumerate(rows):
        effect, low, high = (row[f"logit_diff_effect{end}"] for end in ("", "_low", "_high"))
        colour = MUTED if low <= 0 <= high else sign_colour(effect)
        axes.plot([low, high], [place, place], color=colour, lw=1.6)
        axes.plot(effect, place, "o", color=colour, ms=5)
        labels.append(f"head {row['layer']}.{row['head']} → {row['site']}")
    axes.axvline(0, color=MUTED, lw=0.9, ls="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel(f"{TAKES}\n(means and 95 % intervals of {int(means['n'].max())} pairs)")
    return apply_style(figure, f"The {len(labels)} largest paths into what the writer reads")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    best: Any
    places, best, writer, path = (
        tables[name] for name in ("places", "strongest", "writer", "path")
    )
    stream: Any = places[places["site"] == "resid_pre"]
    by_layer: Any = stream.pivot_table(index="layer", columns="pos", values="logit_diff_effect")
    moved = int((by_layer["end"] > by_layer["S2"]).idxmax())
    held: Any = tables["control"].set_index(["head", "control"])
    rests: Any = tables["beyond"].set_index("head")
    sentences, n_far = [], 0
    for name in best["head_name"]:
        own, other, rest = held.loc[(name, False)], held.loc[(name, True)], rests.loc[name]
        against = " (against the answer)" if own["logit_diff_effect"] < 0 else ""
        n_far += other["logit_diff_effect"] / own["logit_diff_effect"] < 0.5
        sentences.append(
            f"{name} brings back {_interval(own)}{against}, from other pairs "
            f"{other['logit_diff_effect']:+.2f}, beyond them {_interval(rest)}"
        )
    verdict = {0: "No", len(best): "Yes"}.get(n_far, "In part")
    heads: Any = tables["heads"]
    many = int((heads["logit_diff_effect"].abs() > 0.1).sum())
    one, way = writer.iloc[0], path.iloc[0]
    return (
        f"{verdict}. Who is given the drink is at the second mention (S2) until block {moved - 1}, "
        f"and at the end of the prompt from block {moved} on. Few heads carry it: {many} of "
        f"{len(heads)} bring back more than 0.1 of the answer, in size. {n_far} of the "
        f"{len(best)} strongest heads have an effect at least twice that of their control, the "
        f"same patch from other pairs. Chosen on one half of the pairs and measured on the other "
        f"(n = {int(best['n'].max())}): {'; '.join(sentences)}. Head "
        f"{int(one['layer'])}.{int(one['head'])} writes most of the answer itself, "
        f"{_interval(one)} of the way. The largest path into what it reads is from head "
        f"{int(way['layer'])}.{int(way['head'])} to {way['site']} and carries {_interval(way, 3)}."
    )


def _interval(row: pd.Series, digits: int = 2) -> str:
    mean, low, high = (row[f"logit_diff_effect{end}"] for end in ("", "_low", "_high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


if __name__ == "__main__":
    main()
