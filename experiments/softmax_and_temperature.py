"""What do softmax, temperature, top-k and top-p each do to one list of logits?

Claims to test on two positions, one where the model is sure and one where it is not: a difference
of two logits is the logarithm of how many times likelier one token is; temperature changes how far
the tokens are apart and never their order; top-k keeps as many where the model is sure as where it
is not, top-p does not. They hold if numbers that are predicted from the logits alone are those that
transformers' own rules give, and draws fall as the table says.

python -m experiments.softmax_and_temperature
    half a minute on two cores; writes results/softmax_and_temperature/
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import INK, LINES, MUTED, add_legend, apply_style, drawable

SEED = 0
PROMPTS = {"sure": "The Eiffel Tower is in the city of", "unsure": "I like oat milk in my"}
TEMPERATURES = (0.1, 0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0)
TOP_K, TOP_P = (1, 5, 50), (0.5, 0.9, 0.99)
DRAWS = 500


def main() -> None:
    lm = hk.load(device="cpu")
    question = "What do softmax, temperature, top-k and top-p each do to one list of logits?"
    with hk.record(
        "results/softmax_and_temperature", question=question, lm=lm, seed=SEED
    ) as results:
        runs = {name: results.run(name, hk.forward(lm, prompt)) for name, prompt in PROMPTS.items()}
        softmax(runs["unsure"], results)
        table = settings(runs, results)
        drawn(lm, runs["unsure"], results)
        names = ("softmax", "settings", "summary")
        tables = {name: hk.results.read_table(results.folder / f"{name}.csv") for name in names}
        results.answer(answer(tables))
    print(table.to_string(index=False))
    print("\nThe page: results/softmax_and_temperature/report.html")


def softmax(run: hk.types.Run, results: hk.types.Record) -> None:
    results.text("# Softmax: a difference of logits is a ratio of probabilities")
    found: Any = hk.ranks(run, top=6)
    found["behind_first"] = found["logit"][0] - found["logit"]
    found["predicted_ratio"] = found["behind_first"].map(math.exp)
    found["ratio"] = found["prob"][0] / found["prob"]
    shown = ["token", "logit", "prob", "rank", "behind_first", "predicted_ratio", "ratio"]
    results.table(
        "softmax",
        found[shown],
        caption="After the unsure prompt. predicted_ratio is e^behind_first.",
    )
    logits = run.logits[0, -1]
    off = ((logits + 100).softmax(-1) - logits.softmax(-1)).abs().max()
    results.text(
        "Softmax is exp(x) / Σ exp(x). The largest error of the predicted ratios is "
        f"{(found['predicted_ratio'] / found['ratio'] - 1).abs().max():.0e}. Adding 100 to all "
        f"{len(logits):,} logits changes no probability by more than {off:.0e}."
    )


def settings(runs: dict[str, hk.types.Run], results: hk.types.Record) -> pd.DataFrame:
    words = {"temperature": TEMPERATURES, "top_k": TOP_K, "top_p": TOP_P}
    tables = {name: hk.sampling_distributions(run, **words, top=5) for name, run in runs.items()}
    both: Any = pd.concat(tables, names=["position"]).reset_index("position").reset_index(drop=True)
    summary = (
        both[["position", "setting", "tokens_kept", "entropy", "perplexity"]]
        .drop_duplicates()
        .round(4)
    )
    results.text(
        f"# Temperature, top-k, top-p: sure after “{PROMPTS['sure']}”, unsure after "
        f"“{PROMPTS['unsure']}”"
    )
    results.figure(
        "figure",
        drawing(tables),
        caption="Left and middle: the first five tokens at each temperature.",
    )
    results.table("settings", both.drop(columns=["row", "pos"]), caption="All settings.")
    results.table(
        "summary", summary, caption="What each setting leaves to draw from. Entropy in nats."
    )
    return summary


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratios = tables["softmax"]
    off = (ratios["predicted_ratio"] / ratios["ratio"] - 1).abs().max()
    hot: Any = tables["settings"]
    hot = hot[hot["setting"].str.startswith("temperature")]
    moved = hot.groupby(["position", "token"])["rank"].nunique() > 1
    kept = tables["summary"].set_index(["setting", "position"])["tokens_kept"]
    return (
        "Softmax turns a difference of two logits into a ratio of probabilities, which is e to the "
        f"difference (the largest error is {off:.1g}). Temperature moves the probabilities and not "
        f"the order: {moved.sum()} of {len(moved)} tokens change their rank over "
        f"{len(TEMPERATURES)} temperatures. Top-k 50 keeps {kept['top_k=50', 'sure']} tokens where "
        f"the model is sure and {kept['top_k=50', 'unsure']} where it is not; top-p 0.9 keeps "
        f"{kept['top_p=0.9', 'sure']} and {kept['top_p=0.9', 'unsure']}."
    )


def drawing(tables: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, (name, table) in zip((left, middle), tables.items(), strict=True):
        draw_temperatures(axes, table)
        axes.set_title(f"{name}: “{PROMPTS[name]}”", fontsize=9, color=INK)
    draw_counts(right, tables)
    return apply_style(figure, "What temperature does to probabilities, and what the others keep")


def draw_temperatures(axes: Axes, table: pd.DataFrame) -> None:
    """Draws the probability of the first five tokens at each temperature, on log axes."""
    hot = table[table["setting"].str.startswith("temperature")]
    for number, (token, part) in enumerate(hot.groupby("token", sort=False)):
        label = drawable(repr(token))
        style: dict[str, Any] = {"color": LINES[number], "marker": "os^Dv"[number], "ms": 4}
        axes.plot(TEMPERATURES, part["prob"], label=label, lw=1.4, **style)
    axes.axvline(1, color=MUTED, lw=0.8, ls="--")
    axes.set_xscale("log")
    axes.set_xticks(TEMPERATURES, [f"{t:g}" for t in TEMPERATURES])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_ylim(1e-5, 2)
    axes.set_xlabel("temperature (log axis; dashed: 1, as it is)")
    axes.set_ylabel("probability (log axis)")
    add_legend(axes)


def draw_counts(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Draws how many tokens each setting keeps."""
    names = [f"top_k={k}" for k in TOP_K] + [f"top_p={p:g}" for p in TOP_P]
    colours = (LINES[0], LINES[2])
    for shift, colour, (name, table) in zip((-0.2, 0.2), colours, tables.items(), strict=True):
        counts = table.drop_duplicates("setting").set_index("setting")["tokens_kept"][names]
        positions = [place + shift for place in range(len(names))]
        bars = axes.barh(positions, counts, height=0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8, padding=2, color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, 3e4)
    axes.set_xlabel("tokens left to draw from (log axis)")
    add_legend(axes)


def drawn(lm: hk.LM, run: hk.types.Run, results: hk.types.Record) -> None:
    rules = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 1}
    said: Any = hk.sampling_distributions(run, temperature=0.7, top=5)
    said = said[said["setting"] != "as it is"]
    many = hk.generate(
        lm, PROMPTS["unsure"], seed=SEED, num_return_sequences=DRAWS, logits=False, **rules
    )
    counts = torch.bincount(many.tokens[:, -1], minlength=lm.n_tokens)
    found = said[["token", "token_id", "prob"]].assign(
        drawn=[int(counts[i]) / DRAWS for i in said["token_id"]]
    )
    found["standard_error"] = (found["prob"] * (1 - found["prob"]) / DRAWS) ** 0.5
    found["off_by"] = ((found["drawn"] - found["prob"]) / found["standard_error"]).round(2)
    results.text("# Do draws fall as the table says?")
    results.table(
        "draws",
        found.round(4),
        caption=f"{DRAWS:,} draws of generate at temperature 0.7. off_by: in standard errors.",
    )


if __name__ == "__main__":
    main()
