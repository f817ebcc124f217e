"""Where is a landmark's city in the model, and when does the last token come to know it?

The subject's tokens are blurred with noise, so that the city is lost; then one clean state at a
time is put back (causal tracing, Meng et al. 2022). It is answered if two places bring the city
back: the MLPs early at the subject's last token, and attention late at the end of the prompt; and
if the state of a landmark brings its own city with it. Each of the three is found if it brings back
more than half.

python -m experiments.where_is_paris    some minutes on two cores; writes results/where_is_paris/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, SAMPLES, NOISE = 0, 10, 3.0  # draws of noise, in standard deviations of the embeddings
PROMPT, SUBJECT, CITY = "The Eiffel Tower is located in the city of", "Eiffel Tower", " Paris"
COUNT, WINDOW = 30, 5  # pairs of landmarks; blocks that are restored together
TABLES = ("mlp_out", "attn_out", "swapped")  # those of which the answer is made
QUESTION = (
    "Where does the model keep which city a landmark is in, and when does the last token come to "
    "know it?"
)


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/where_is_paris", title="Where is Paris", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        traced(lm, results)
        swapped(lm, results)
        results.answer(
            answer({name: pd.read_csv(results.folder / f"{name}.csv") for name in TABLES})
        )
    print("The page: results/where_is_paris/report.html")


def traced(lm: hk.LM, results: hk.types.Record) -> None:
    clean = results.run("clean", hk.forward(lm, PROMPT))
    strings = [lm.string(token) for token in clean.tokens[0].tolist()]
    tokens = [repr(string) for string in strings]
    last = next(
        number for number in range(len(tokens)) if SUBJECT in "".join(strings[: number + 1])
    )
    named = {last: "subject", len(tokens) - 1: "end"}
    results.text("# Blurred, and put back")
    for site, window in (("resid_post", 1), ("mlp_out", WINDOW), ("attn_out", WINDOW)):
        table = hk.causal_tracing(
            lm,
            PROMPT,
            SUBJECT,
            hk.metrics.prob(CITY),
            site=site,
            window=window,
            noise=NOISE,
            samples=SAMPLES,
            seed=SEED,
        )
        means = hk.stats.mean_over_prompts(table)
        means.insert(2, "place", [named.get(pos, "") for pos in means["pos"]])
        columns = ["layer", "pos", "place", "prob", "prob_before", "prob_delta", "prob_effect"]
        results.table(
            site,
            pd.DataFrame(means[columns]),
            caption=f"{site}: means over {SAMPLES} draws of noise, of one prompt.",
        )
        around = "one block" if window == 1 else f"{window} blocks"
        title = f"How much of the probability of {CITY!r} {site} of {around} brings back"
        figure = hk.figures.heat_map(table, value="prob_delta", labels=tokens, title=title)
        results.figure(f"{site}_map", figure, caption=f"{title}.")
        best = means.loc[means["prob_delta"].idxmax()]
        results.text(
            f"{site}: p({CITY!r}) is {hk.metrics.prob(CITY)(clean).item():.3f} clean and "
            f"{best['prob_before']:.3f} blurred; the best place, block {int(best['layer'])} at "
            f"{tokens[int(best['pos'])]}, makes it {best['prob']:.3f}."
        )


def swapped(lm: hk.LM, results: hk.types.Record) -> None:
    results.text("# Another landmark's state")
    pairs = hk.datasets.landmarks(lm, COUNT, seed=SEED).solved(lm)
    metric = [pairs.metric(), hk.metrics.rank(list(pairs.answers))]
    places = {name: pairs.labels[name] for name in ("subject", "end")}
    table = hk.patching(
        lm, pairs.clean, pairs.corrupted, ["resid_post", "mlp_out", "attn_out"], metric, pos=places
    )
    means = results.table(
        "swapped",
        hk.stats.mean_over_prompts(
            table,
            by=["site", "layer", "pos"],
            values=["logit_diff", "logit_diff_effect", "rank", "rank_effect"],
        ),
        caption=f"{len(pairs)} pairs of landmarks; 95 % intervals.",
    )
    results.text(f"{pairs.note}.")
    stream: Any = means[means["site"] == "resid_post"]
    results.figure(
        "stream",
        hk.figures.interval_lines(
            stream, series="pos", title="How far another landmark's state brings its own city"
        ),
        caption="1: the other landmark's city has won.",
    )


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    best: dict[str, Any] = {}
    for site, place in (("mlp_out", "subject"), ("attn_out", "end")):
        table: Any = tables[site][tables[site]["place"] == place]
        best[site] = table.loc[table["prob_effect"].idxmax()]
    mlp, attention = best["mlp_out"], best["attn_out"]
    swaps = tables["swapped"]
    stream: Any = swaps[swaps["site"] == "resid_post"].set_index("pos")
    half: dict[str, list[int]] = {}
    for place in ("subject", "end"):
        table = stream.loc[place]
        half[place] = [int(layer) for layer in table[table["logit_diff_effect_low"] > 0.5]["layer"]]
    swap = stream.loc["subject"].sort_values("logit_diff_effect").iloc[-1]
    mean, low, high = (swap[f"logit_diff_effect{end}"] for end in ("", "_low", "_high"))
    verdicts = [mlp["prob_effect"] > 0.5, attention["prob_effect"] > 0.5, bool(half["subject"])]
    count = ("None", "One", "Two", "All")[sum(verdicts)]
    return (
        f"{count} of the three expected effects {'is' if sum(verdicts) == 1 else 'are'} there. "
        f"Put back after noise on one prompt, attention of {WINDOW} blocks at the end of the "
        f"prompt brings back at most {attention['prob_effect']:.0%} of the city's probability "
        f"(around block {int(attention['layer'])}), and MLPs of {WINDOW} blocks at the subject's "
        f"last token at most {mlp['prob_effect']:.0%} (around block {int(mlp['layer'])}). Over "
        f"{int(swap['n'])} landmarks, another landmark's state at the subject's last token brings "
        f"its own city by at most {mean:.0%} [{low:.0%}, {high:.0%}] of the way (block "
        f"{int(swap['layer'])}); the interval lies above half in {_span(half['subject'])}. The "
        f"last token knows the city in {_span(half['end'])}, where its state brings more than half."
    )


def _span(layers: list[int]) -> str:
    return f"blocks {min(layers)} to {max(layers)}" if layers else "no block"


if __name__ == "__main__":
    main()
