"""Does an edit that asks a probe first keep its effect where it is meant, and do less elsewhere?

A vector makes openings about food end happily. It is meant for food alone, and other openings are
to stay as they are. A probe of the stream, fitted to sentences about other dishes and things (by
which its layer was chosen too), is asked at each prompt's last token, and the vector is added only
where its answer is food.

It is answered with yes if both hold: on openings about food, the edit that asks raises happy
words, and no less than the edit everywhere does (the interval of the difference reaches within a
tenth of that effect); on the others it moves the next token less than the edit everywhere (the
interval of the difference of KL lies below 0). Two controls take the place of the probe and of the
vector: 20 probes of random directions, which say yes to half of the sentences as it does, and 20
random vectors of equal length, where the probe says yes. Both have to do less.

python -m experiments.ask_first    three minutes; writes results/ask_first/; needs .[probes]
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

import hookkit as hk

SEED, DRAWS = 0, 20
LAYERS, STEERED = (6, 10, 14), "resid_post.16"  # one of LAYERS is asked
DOSE, LEAST = 0.2, 0.5  # of the stream's length; of the probe's score
KEPT = 0.9  # the share of the effect that counts as no less
QUESTION = (
    "Does an edit that asks a probe first keep its effect where it is meant, and do less elsewhere?"
)
HAPPY_WORDS = (" good", " great", " wonderful", " lovely", " excellent", " perfect")
SAD_WORDS = (" bad", " terrible", " awful", " ugly", " poor", " boring")
THINGS = ("film", "hotel", "concert", "book", "journey", "lesson", "party", "game", "garden")
HAPPY = [f"I loved the {thing}. It was wonderful, and I was so happy!" for thing in THINGS]
SAD = [f"I hated the {thing}. It was terrible, and I was so sad!" for thing in THINGS]

# the probe's sentences
FORMS = (
    "I heard yesterday that the {} was", "The picture of the {} that we saw is",
    "They told me that the {} is", "At first the {} was", "We all know that the {} is",
    "Last week the {} was",
)  # fmt: skip
FOOD = (
    "soup", "bread", "cake", "cheese", "pasta", "rice", "pizza", "salad", "breakfast", "chicken",
    "butter", "dessert",
)  # fmt: skip
OTHER = (
    "train", "phone", "lecture", "car", "office", "road", "school", "bank", "football match",
    "computer", "letter", "bridge",
)  # fmt: skip

# the openings, about things that the probe has not seen, in other forms
OPENINGS = ("My sister wrote that the {} was", "Everyone agrees that the {} is", "To me, the {} is")
NEW_FOOD = (
    "risotto", "toast", "porridge", "pudding", "ham", "taco", "waffle", "gravy", "mango", "jam",
    "barbecue", "roast beef", "spaghetti", "croissant", "melon", "tofu", "pastry", "popcorn",
    "mushroom soup", "cereal", "supper", "salmon", "apple pie", "fried rice",
)  # fmt: skip
NEW_OTHER = (
    "library", "poem", "stadium", "tablet", "sermon", "motorbike", "clinic", "storm", "sculpture",
    "melody", "telescope", "temple", "cellar", "debate", "lake", "agreement", "printer", "scarf",
    "interview", "curtain", "ferry", "guitar", "valley", "sweater",
)  # fmt: skip
MARKS = {
    "random probe": ("#8a8f98", "o"),
    "random vector": ("#d97706", "x"),
    "everywhere": ("#1d4ed8", "s"),
    "asks": ("#c2410c", "D"),
}
ARMS = {
    "everywhere": "the vector everywhere",
    "asks": "the vector where the probe says yes",
    "random probe": "the vector where a random probe says yes",
    "random vector": "a random vector where the probe says yes",
}


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/ask_first", title="Ask first", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        probe = fit(lm, results)
        (vector,) = hk.mean_difference(lm, HAPPY, SAD, STEERED)
        edits = make_edits(lm, probe, vector)
        table: Any = measure(lm, edits)
        caption = "Each opening under the edit everywhere, and under the edit that asks."
        results.table(
            "openings", table[table["sample"] < 0].drop(columns="sample").round(3), caption=caption
        )
        means = summarize(table).round(4)
        caption = (
            "Means over openings, and over draws of a control. effect: happy minus unhappy words "
            "in logits, after minus before; kl: of the next token, nats; edited: the share."
        )
        results.table("means", means, caption=caption)
        caption = (
            f"Each mark is a mean over openings; the small ones are {DRAWS} draws of a control."
        )
        results.figure("effect_and_damage", draw(table), caption=caption)
        read_aloud(lm, edits, results)
        results.answer(answer({"means": means}))
    print(results.answered)


def fit(lm: hk.LM, results: hk.types.Record) -> hk.types.Probe:
    """The probe of food, which no opening and no thing of the openings was used for."""
    results.text("# Does the probe see what the text is about?")
    things = [thing for thing in FOOD + OTHER for _ in FORMS]
    labels = [thing in FOOD for thing in things]
    sites = lm.sites("resid_post", layers=LAYERS)
    probes = hk.fit_probe(lm, sentences(), labels, sites, groups=things, seed=SEED)
    caption = "Held-out dishes and things; the words of the text alone know none of them."
    results.table("probe", probes.table.round(4), caption=caption)
    return probes.best


def sentences() -> list[str]:
    return [form.format(thing) for thing in FOOD + OTHER for form in FORMS]


def make_edits(
    lm: hk.LM, probe: hk.types.Probe, vector: hk.Vector
) -> dict[tuple[str, int], hk.types.Hook]:
    """The hook of each edit and draw; the edit itself is draw -1."""
    site = probe.site
    values = hk.forward(lm, sentences(), hk.capture(site, pos=-1), logits=False)[site][:, 0]
    asks = hk.when.reads(probe, above=LEAST, pos=-1)
    edits: dict[tuple[str, int], hk.types.Hook] = {
        ("everywhere", -1): vector.steer(dose=DOSE),
        ("asks", -1): vector.steer(dose=DOSE, when=asks),
    }
    for number in range(DRAWS):
        direction = probe.vector.random(seed=number).tensor
        bias = -float((values @ direction).median())
        other = hk.when.reads(replace(probe, direction=direction, bias=bias), above=LEAST, pos=-1)
        edits["random probe", number] = vector.steer(dose=DOSE, when=other)
        random = vector.random(seed=number)
        edits["random vector", number] = random.steer(dose=DOSE, when=asks)
    return edits


def openings() -> tuple[list[str], list[str]]:
    """The openings, and what each is about."""
    texts = []
    for number, thing in enumerate(NEW_FOOD + NEW_OTHER):
        texts.append(OPENINGS[number % len(OPENINGS)].format(thing))
    return texts, ["food"] * len(NEW_FOOD) + ["other"] * len(NEW_OTHER)


def measure(lm: hk.LM, edits: Mapping[tuple[str, int], hk.types.Hook]) -> pd.DataFrame:
    """One row for each edit, draw and opening."""
    texts, about = openings()
    mood = hk.metrics.logit_diff(HAPPY_WORDS, SAD_WORDS)
    before = hk.forward(lm, texts, logits="last")
    parts = []
    for (edit, sample), hook in edits.items():
        after = hk.forward(lm, texts, hook, logits="last")
        kl = hk.stats.shift_summary(before, after)["kl"].to_numpy()
        part = pd.DataFrame({"opening": texts, "about": about, "kl": kl})
        part["effect"] = (mood(after) - mood(before)).numpy()
        part["edited"] = kl > 0
        parts.append(part.assign(edit=edit, sample=sample, row=range(len(texts))))
    columns = ["edit", "sample", "row", "opening", "about", "edited", "effect", "kl"]
    table: Any = pd.concat(parts, ignore_index=True)[columns]
    return table


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """The mean numbers of each edit, and of what asking does beyond every other edit."""
    rows = []
    for about, number in (
        ("food", "effect"),
        ("other", "kl"),
        ("food", "edited"),
        ("other", "edited"),
    ):
        part: Any = table[table["about"] == about]
        own = part[part["edit"] == "asks"].set_index("row")[number].astype(float)
        by_edit: Any = part.groupby("edit", sort=False)
        for edit, values in by_edit:
            line = {"about": about, "number": number, "edit": edit}
            line |= {"n": len(own), "samples": values["sample"].nunique()}
            line |= interval(values.assign(value=values[number]), "")
            if edit != "asks":
                difference = own.loc[values["row"]].to_numpy() - values[number].astype(float)
                line |= interval(values.assign(value=difference), "asks_minus_")
            by_draw = values.groupby("sample")[number].mean()
            rows.append(line | {"smallest": by_draw.min(), "largest": by_draw.max()})
    return pd.DataFrame(rows)


def interval(table: pd.DataFrame, prefix: str) -> dict[str, float]:
    mean = hk.stats.mean_over_prompts(table, by=["edit"], values=["value"]).iloc[0]
    return {
        f"{prefix}mean": mean["value"],
        f"{prefix}low": mean["value_low"],
        f"{prefix}high": mean["value_high"],
    }


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["means"].set_index(["about", "number", "edit"]).sort_index()
    effect: Any = table.xs(("food", "effect"))
    damage: Any = table.xs(("other", "kl"))
    is_kept = (
        effect["low"]["asks"] > 0
        and effect["asks_minus_low"]["everywhere"] > -(1 - KEPT) * effect["mean"]["everywhere"]
    )
    is_less = damage["asks_minus_high"]["everywhere"] < 0
    is_probe = (
        effect["asks_minus_low"]["random probe"] > 0 > damage["asks_minus_high"]["random probe"]
    )
    is_vector = effect["asks_minus_low"]["random vector"] > 0
    verdict = "Yes" if is_kept and is_less and is_probe and is_vector else "Not shown"
    shares = [float(table.loc[(about, "edited", "asks"), "mean"]) for about in ("food", "other")]
    return (
        f"{verdict}. The probe says yes to {shares[0]:.0%} of the openings about food and to "
        f"{shares[1]:.0%} of the others. On food the edit that asks moves happy words by "
        f"{effect['mean']['asks']:+.2f} logits, the edit everywhere by "
        f"{effect['mean']['everywhere']:+.2f} ({spread(effect, 'everywhere')}): "
        f"{'no less, by the measure set' if is_kept else 'an equal effect is not shown'}. On the "
        f"others it moves the next token by a KL of {damage['mean']['asks']:.3f} nats, the edit "
        f"everywhere by {damage['mean']['everywhere']:.3f} ({spread(damage, 'everywhere', 3)}): "
        f"{'less' if is_less else 'less is not shown'}. Beside probes of random directions it has "
        f"{spread(effect, 'random probe')} of effect on food and "
        f"{spread(damage, 'random probe', 3)} of KL on the others: "
        f"{'the probe matters' if is_probe else 'that the probe matters is not shown'}. Beside "
        f"random vectors it has {spread(effect, 'random vector')} of effect: "
        f"{'the vector matters' if is_vector else 'that the vector matters is not shown'}."
    )


def spread(table: Any, edit: str, digits: int = 2) -> str:
    """What asking does minus what an edit does, with its interval."""
    mean, low, high = (table[f"asks_minus_{end}"][edit] for end in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def draw(table: pd.DataFrame) -> Any:
    """The effect on openings about food against the damage to the others."""
    from matplotlib.figure import Figure

    by_draw: Any = table.groupby(["edit", "sample", "about"])[["effect", "kl"]].mean()
    means = by_draw.unstack("about")
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for edit, (color, marker) in MARKS.items():
        of_edit = means.loc[edit]
        is_control = len(of_edit) > 1
        axes.plot(
            of_edit["kl", "other"], of_edit["effect", "food"], marker, color=color, linestyle="",
            markersize=4 if is_control else 10, alpha=0.6 if is_control else 1, label=ARMS[edit],
        )  # fmt: skip
    axes.axhline(0, color="#8a8f98", linewidth=0.8)
    axes.axvline(0, color="#8a8f98", linewidth=0.8)
    axes.set_xlabel("damage to other openings: KL of the next token (nats)")
    axes.set_ylabel("effect on food: happy words (logits)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def read_aloud(
    lm: hk.LM, edits: Mapping[tuple[str, int], hk.types.Hook], results: hk.types.Record
) -> None:
    results.text("# What is written")
    texts, about = openings()
    chosen = [0, 1, len(NEW_FOOD), len(NEW_FOOD) + 1]
    prompts = [texts[row] for row in chosen]
    rows = []
    for edit in ("no edit", "everywhere", "asks"):
        hooks = [] if edit == "no edit" else [edits[edit, -1]]
        run = hk.generate(lm, prompts, *hooks, max_new_tokens=12, do_sample=False, logits=False)
        for row, text in zip(chosen, run.text, strict=True):
            rows.append({"edit": edit, "about": about[row], "text": text})
    results.table("texts", pd.DataFrame(rows), caption="Greedy, 12 tokens.")


if __name__ == "__main__":
    main()
