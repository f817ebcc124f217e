"""Which features make " coffee" likely after "I like oat milk in my"?

A dictionary of the default model writes the residual stream after block 12 as a sum of features.
Those that are active in the sentence are switched off one by one, and the six whose removal costs
" coffee" most are candidates. Then each is clamped in eleven other sentences of this kind, which
did not choose it: to 0, and to twice its activation, at all tokens but the first.

The control takes the place of a feature's decoder row by that of another feature of the dictionary,
drawn at random and scaled to the same length, at the same tokens, 40 times. A feature makes
" coffee" likely if without it the token loses log-probability, by the mean over sentences, more
than under every one of the 40 draws, and more than their mean by an interval that excludes 0. The
answer is yes if one of the six does.

python -m experiments.features_of_milk
    five minutes on two cores; writes results/features_of_milk/; needs its dictionary in the cache
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

import hookkit as hk

SEED, DRAWS, CANDIDATES = 0, 40, 6
COFFEE, MILK = " coffee", "I like oat milk in my"
TEXTS = "55_open_qa"  # of the labelled texts
QUESTION = f'Which features make "{COFFEE}" likely after "{MILK}"?'
PROMPTS = [
    MILK, "She always puts sugar in her", "He likes a little cream in his",
    "Would you like some milk in your", "I never take sugar in my", "We drink soy milk in our",
    "There is too much milk in my", "My father wants honey in his",
    "They pour almond milk in their", "Please put some cream in my", "Nobody likes salt in their",
    "I stirred the warm milk into my",
]  # fmt: skip
LATER = slice(1, None)  # the first token's values are outliers
EDITS = {"to 0": -1.0, "to twice": 1.0}  # how much of the feature is added
COLOURS = {"to 0": "#c2410c", "to twice": "#1d4ed8"}


def main(folder: str = "results/features_of_milk") -> None:
    dictionary = hk.load_dictionary()
    lm = hk.load(device="cpu").with_dictionaries(dictionary)
    with hk.record(
        folder, title="Features of oat milk", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        screened = screen(lm, dictionary)
        chosen = screened["feature"].head(CANDIDATES).tolist()
        site = f"feat.{dictionary.site}"
        corpus = hk.datasets.labelled(TEXTS, 200)["text"].tolist()
        report = hk.feature(
            lm, corpus, [f"{site}.{number}" for number in chosen], effects=0, progress=False
        )
        words = report.summary.merge(fires_on(report), on="feature", how="left")
        words = words[["feature", "promoted", "fires_on"]]
        features = screened.merge(words, on="feature", how="left")
        caption = (
            f"Every feature that is active in “{MILK}”, switched off: change of the "
            f"log-probability of {COFFEE!r}. direct: its share of the logit. Of the candidates: "
            f"promoted, by its decoder row; fires_on, the tokens at which it is largest in "
            f"{len(corpus)} questions and answers."
        )
        results.table("features", features, caption=caption)
        table = measure(lm, dictionary, chosen)
        caption = "Each sentence with a feature clamped, and the mean over its control's draws."
        results.table("sentences", by_sentence(table), caption=caption)
        effects = summarize(table)
        caption = (
            f"Log-probability of {COFFEE!r}, after minus before, mean over the {len(PROMPTS) - 1} "
            f"other sentences with its interval; control: {DRAWS} random features that add as "
            f"much. rank: after “{MILK}”."
        )
        results.table("effects", effects, caption=caption)
        caption = f"The mark is the feature, with its interval; the small ones are {DRAWS} draws."
        results.figure("effects_figure", draw(table, effects), caption=caption)
        results.answer(answer({"effects": effects, "features": features}))
    print(results.answered)


def fires_on(report: hk.types.FeatureReport) -> pd.DataFrame:
    """The most frequent tokens among those at which each feature is largest."""
    examples: Any = report.tables["examples"]
    top = examples[examples["kind"] == "top"]
    records = []
    for feature, tokens in top.groupby("feature")["token"]:
        frequent = tokens.value_counts().index[:3]
        records.append({"feature": feature, "fires_on": " ".join(map(repr, frequent))})
    return pd.DataFrame(records, columns=["feature", "fires_on"])


def coffee(run: hk.types.Run) -> pd.DataFrame:
    """The log-probability and the rank of the token after each sentence."""
    table: Any = hk.ranks(run, top=1, watch=COFFEE)
    return table[table["token"] == COFFEE].set_index("row")[["logprob", "rank"]]


def screen(lm: hk.LM, dictionary: hk.types.Dictionary) -> pd.DataFrame:
    """What switching off each active feature of the one sentence does, the largest loss first."""
    site = f"feat.{dictionary.site}"
    run = hk.forward(lm, MILK, hk.capture(site, pos=LATER))
    before = coffee(run)["logprob"][0]
    strongest = run[site][0].amax(0)
    direct: Any = hk.direct_logits(run, COFFEE, features=site)
    direct = direct[direct["kind"] == "feature"].set_index("neuron")["logit"]
    rows = []
    for number in strongest.nonzero().flatten().tolist():
        after = coffee(hk.forward(lm, MILK, hk.ablate(f"{site}.{number}", pos=LATER)))
        row = {"feature": number, "activation": float(strongest[number])}
        row |= {"direct": direct.get(number, 0.0), "logprob_delta": after["logprob"][0] - before}
        rows.append(row | {"rank_after": after["rank"][0]})
    table = pd.DataFrame(rows)
    return table.sort_values("logprob_delta", kind="stable", ignore_index=True)


def measure(lm: hk.LM, dictionary: hk.types.Dictionary, features: Sequence[int]) -> pd.DataFrame:
    """One row for each feature, edit, draw and sentence; the feature itself is draw -1."""
    site = str(dictionary.site)
    generator = torch.Generator().manual_seed(SEED)
    before = coffee(hk.forward(lm, PROMPTS, logits="last"))
    parts = []
    for feature in features:
        name = f"feat.{site}.{feature}"
        values = hk.forward(lm, PROMPTS, hk.capture(name, pos=LATER), logits=False)[name]
        own = dictionary.direction(feature)
        order = torch.randperm(dictionary.n_features, generator=generator).tolist()
        others = [number for number in order if number != feature][:DRAWS]
        for edit, factor in EDITS.items():
            hooks: dict[int, hk.types.Hook] = {-1: hk.scale(name, 1 + factor, pos=LATER)}
            for draw_number, other in enumerate(others):
                direction = dictionary.direction(other)
                direction = direction * (own.norm() / direction.norm().clamp(min=1e-30))
                added = factor * values[..., None] * direction
                hooks[draw_number] = hk.edit(site, Add(added), pos=LATER)
            for draw_number, hook in hooks.items():
                after = coffee(hk.forward(lm, PROMPTS, hook, logits="last"))
                part = after.rename(columns={"rank": "rank_after"}).reset_index()
                part["rank_before"] = before["rank"].to_numpy()
                part["logprob_delta"] = (after["logprob"] - before["logprob"]).to_numpy()
                part = part.assign(feature=feature, edit=edit, draw=draw_number)
                parts.append(part.drop(columns="logprob"))
    return pd.concat(parts, ignore_index=True)


class Add:
    """Adds a tensor to the values."""

    def __init__(self, added: torch.Tensor) -> None:
        self.added = added

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.added


def by_sentence(table: Any) -> pd.DataFrame:
    """The feature in each sentence, and the mean over its control's draws."""
    own = table[table["draw"] == -1]
    keys = ["feature", "edit", "row"]
    control = table[table["draw"] >= 0].groupby(keys)["logprob_delta"].mean()
    own = own.assign(prompt=[PROMPTS[row] for row in own["row"]])
    own = own.join(control.rename("control_logprob_delta"), on=keys)
    columns = ["feature", "edit", "row", "prompt", "rank_before", "rank_after"]
    return own[[*columns, "logprob_delta", "control_logprob_delta"]].round(4)


def summarize(table: Any) -> pd.DataFrame:
    """Each feature's mean effect, its control, and the difference, over the other sentences."""
    rows = []
    for (feature, edit), part in table.groupby(["feature", "edit"], sort=False):
        first = part[(part["draw"] == -1) & (part["row"] == 0)].iloc[0]
        part = part[part["row"] > 0]
        own = part[part["draw"] == -1].set_index("row")
        draws = part[part["draw"] >= 0]
        control = draws.groupby("row")["logprob_delta"].mean()
        by_draw = draws.groupby("draw")["logprob_delta"].mean()
        row = {"feature": feature, "edit": edit, "n": len(own), "draws": len(by_draw)}
        row |= interval(own["logprob_delta"], "effect")
        row |= {"control": by_draw.mean(), "control_lowest": by_draw.min()}
        row |= {"control_highest": by_draw.max()}
        row |= interval(own["logprob_delta"] - control, "gain")
        rows.append(row | {"rank_before": first["rank_before"], "rank_after": first["rank_after"]})
    return pd.DataFrame(rows).round(4)


def interval(values: Any, name: str) -> dict[str, float]:
    table = values.reset_index(name="value").assign(group="all")
    mean = hk.stats.mean_over_prompts(table, by=["group"], values=["value"]).iloc[0]
    limits = {f"{name}_low": mean["value_low"], f"{name}_high": mean["value_high"]}
    return {name: mean["value"], **limits}


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    effects, features = tables["effects"], tables["features"].set_index("feature")
    off = effects[effects["edit"] == "to 0"]
    works = (off["effect"] < off["control_lowest"]) & (off["gain_high"] < 0)
    best = off.loc[off["effect"].idxmin()]
    n, draws = best["n"], best["draws"]
    verdict = "Yes" if works.any() else "No"
    words = [
        f"{verdict}: for {int(works.sum())} of {len(off)} candidates, switching the feature off "
        f"costs {COFFEE!r} more than each of {draws} random features of equal length does, over "
        f"{n} other sentences."
    ]
    for row in off[works].to_dict("records"):
        words.append(
            f"Feature {row['feature']}, which fires on {features.loc[row['feature'], 'fires_on']}: "
            f"{row['effect']:+.2f} nats [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}], its "
            f"control {row['control']:+.2f}; after “{MILK}” the rank goes from "
            f"{row['rank_before']:.0f} to {row['rank_after']:.0f}."
        )
    if not works.any():
        words.append(
            f"The largest loss is that without feature {best['feature']:.0f}, "
            f"{best['effect']:+.2f} nats [{best['effect_low']:+.2f}, {best['effect_high']:+.2f}], "
            f"and random features have down to {best['control_lowest']:+.2f}."
        )
    twice = effects[effects["edit"] == "to twice"]
    rises = (twice["effect"] > twice["control_highest"]) & (twice["gain_low"] > 0)
    words.append(
        f"Twice as active, {int(rises.sum())} of {len(twice)} raise it more than each random one."
    )
    return " ".join(words)


def draw(table: Any, effects: pd.DataFrame) -> Any:
    """Each feature's effect beside the draws of its control."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(effects["feature"]))
    controls = table[(table["draw"] >= 0) & (table["row"] > 0)]
    means = controls.groupby(["feature", "edit", "draw"])["logprob_delta"].mean()
    records = effects.to_dict("records")
    last = records[-1]
    for row in records:
        side = -0.15 if row["edit"] == "to 0" else 0.15
        height = names.index(row["feature"]) + side
        colour = COLOURS[row["edit"]]
        draws = means.loc[row["feature"], row["edit"]]
        drawn = f"one of {DRAWS} random features, as long" if row is last else None
        axes.plot(draws, [height] * len(draws), ".", color="#8a8f98", ms=4, alpha=0.6, label=drawn)
        axes.plot([row["effect_low"], row["effect_high"]], [height] * 2, color=colour, lw=1.5)
        label = row["edit"] if height < 0.5 else None
        axes.plot(row["effect"], height, "D", color=colour, markersize=6, label=label)
    axes.axvline(0, color="#8a8f98", linewidth=0.8)
    axes.set_yticks(range(len(names)), [f"feature {name}" for name in names])
    axes.invert_yaxis()
    axes.set_title(f"What clamping a feature does to {COFFEE!r} in 11 sentences", loc="left")
    axes.set_xlabel(f"change of the log-probability of {COFFEE!r} (nats), mean over sentences")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
