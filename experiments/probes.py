"""Does a probe tell more about a text than its words do?

Twelve sets of labelled texts: topics, styles, a mood, grammar, truth, and facts that a name does
not spell out. On each, a linear probe of the stream at layer 20 is compared with a classifier that
sees the words and the length of the text, in the same folds. The layer was chosen in advance, two
thirds of the way through the model; other layers are only shown. A probe tells more if the 95 %
interval of the difference of the two areas under the ROC curve lies above 0, and less if it lies
below 0. The control is the same procedure with shuffled labels.

python -m experiments.probes    ten minutes; writes results/probes/; needs .[probes]
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, COUNT, LAYER = 0, 400, 20  # COUNT: texts of each set
LAYERS = (8, 14, LAYER, 26)
QUESTION = "Does a probe tell more about a text than its words do?"
SETS = {
    "96_spam_is": "spam",
    "105_click_bait": "clickbait",
    "22_headline_isobama": "headlines on Obama",
    "92_glue_sst2": "mood of a review",
    "87_glue_cola": "grammar",
    "36_sciq_tf": "right answers, science",
    "41_truthqa_tf": "right answers, myths",
    "5_hist_fig_ismale": "names of men",
    "154_athlete_sport_football": "names in football",
    "126_art_type_book": "titles of books",
    "118_us_state_CA": "places in California",
    "65_high-school": "“high school” as a pair",
}
COLUMNS = ["set", "about", "layer", "auroc", "auroc_low", "auroc_high", "text_only"]
COLUMNS += ["text_only_low", "text_only_high", "above_text", "above_text_low", "above_text_high"]
COLUMNS += ["shuffled", "shuffled_low", "shuffled_high", "n", "n_positive", "n_groups"]


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/probes", title="Probes", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        parts = []
        for name, about in SETS.items():
            texts: Any = hk.datasets.labelled(name, COUNT, seed=SEED)
            sites = lm.sites("resid_post", layers=LAYERS)
            probes = hk.fit_probe(lm, texts["text"], texts["label"], sites, seed=SEED)
            parts.append(probes.table.assign(set=name, about=about))
        table: Any = pd.concat(parts, ignore_index=True)[COLUMNS]
        caption = "Areas under the ROC curve of held-out texts, with intervals of 95 %."
        results.table("areas", table.round(4), caption=caption)
        caption = (
            f"Probes at layer {LAYER} (orange) and the text alone (blue), with intervals; grey: "
            "shuffled labels; small dots: probes at other layers."
        )
        results.figure("probes_and_words", draw(table), caption=caption)
        results.answer(answer({"areas": table.round(4)}))
    print(results.answered)


def answer(tables: Mapping[str, Any]) -> str:
    table = tables["areas"]
    table = table[table["layer"] == LAYER]
    more = table[table["above_text_low"] > 0]
    less = table[table["above_text_high"] < 0]
    same = table.drop(index=[*more.index, *less.index])
    outside = table[table["auroc_low"] > table["shuffled_high"]]
    verdict = "Sometimes" if len(more) else "No"
    sentences = [f"{verdict}: on {len(more)} of {len(table)} sets ({listed(more)})"]
    sentences.append(f"On {len(less)} the words tell more ({listed(less)})" if len(less) else "")
    if len(same):
        sentences.append(f"On {len(same)} no difference is shown ({listed(same)})")
    sentences.append(
        f"The probe is above what shuffled labels give on {len(outside)} of {len(table)}: a large "
        "area alone does not show that the model knows more than the words say"
    )
    return ". ".join(filter(None, sentences)) + "."


def listed(table: Any) -> str:
    """The sets with the area of the probe and that of the text alone."""
    parts = []
    for row in table.to_dict("records"):
        parts.append(f"{row['about']} {row['auroc']:.2f} against {row['text_only']:.2f}")
    return "; ".join(parts) or "none"


def draw(table: pd.DataFrame) -> Any:
    """The areas of each set, in the order of the probe's at the chosen layer."""
    from matplotlib.figure import Figure

    chosen: Any = table[table["layer"] == LAYER]
    chosen = chosen.sort_values("above_text")
    figure = Figure(figsize=(7, 0.42 * len(chosen) + 0.8), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(chosen.to_dict("records")):
        shuffled = (row["shuffled_low"], row["shuffled_high"])
        axes.plot(shuffled, [height, height], color="#d4d4d8", linewidth=9, solid_capstyle="butt")
        others: Any = table[(table["set"] == row["set"]) & (table["layer"] != LAYER)]
        axes.plot(others["auroc"], [height + 0.14] * len(others), ".", color="#f59e0b", alpha=0.6)
        for name, shift, color, marker in (
            ("auroc", 0.14, "#c2410c", "D"),
            ("text_only", -0.14, "#1d4ed8", "o"),
        ):
            limits = (row[f"{name}_low"], row[f"{name}_high"])
            axes.plot(limits, [height + shift] * 2, color=color, linewidth=1.5)
            axes.plot(row[name], height + shift, marker, color=color, markersize=5)
    axes.axvline(0.5, color="#8a8f98", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(chosen)), chosen["about"].tolist())
    axes.set_xlabel("area under the ROC curve, held-out texts")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
