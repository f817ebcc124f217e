"""At which layer does the name of a country become the name of its capital?

"The capital of Italy is the city of" runs with one state at a time from the run on France. The
layer is the first at which the state at the last token brings " Paris" back more than the state at
the country does. The control takes the states from a third country, and should not bring it back.

python -m experiments.patch_one_grid    two minutes; writes results/patch_one_grid/
"""

from typing import Any

import hookkit as hk

CAPITALS = {
    "France": " Paris", "Italy": " Rome", "Spain": " Madrid", "Germany": " Berlin",
    "Russia": " Moscow", "Egypt": " Cairo", "Japan": " Tokyo", "China": " Beijing",
    "Poland": " Warsaw", "Sweden": " Stockholm", "Ireland": " Dublin", "Greece": " Athens",
}  # fmt: skip
COUNTRY, LAST, SEED = 3, 7, 0  # positions in a prompt
QUESTION = "At which layer does the name of a country become the name of its capital?"


def main() -> None:
    lm = hk.load(device="cpu")
    clean = [f"The capital of {country} is the city of" for country in CAPITALS]
    corrupted = clean[1:] + clean[:1]
    metric = hk.metrics.prob(list(CAPITALS.values()))
    with hk.record("results/patch_one_grid", question=QUESTION, lm=lm, seed=SEED) as results:
        table = hk.patching(
            lm, clean, corrupted, "resid_post", metric,
            pos=list(range(COUNTRY, LAST + 1)), control="resample", draws=2,
        )  # fmt: skip
        means: Any = hk.stats.mean_over_prompts(
            table, by=["layer", "pos", "control"], values=["prob", "prob_effect"]
        )
        results.table("means", means, caption=f"Means of {len(clean)} countries, 95 % intervals.")
        title = "How much of the capital's probability one state brings back (1: all of it)"
        tokens = [repr(lm.string(token)) for token in lm.encode(clean[0])]
        tokens[COUNTRY] = "country"
        figure = hk.figures.heat_map(means[~means["control"]], labels=tokens, title=title)
        results.figure("grid", figure, caption=title)
        results.answer(answer({"means": means}))
    print(results.answered)


def answer(tables: dict[str, Any]) -> str:
    means = tables["means"].set_index(["control", "pos", "layer"])["prob_effect"].sort_index()
    means = means.round(2) + 0  # without the sign of -0.00
    country, last = means[False, COUNTRY], means[False, LAST]
    layer = (last > country).idxmax()
    return (
        f"At layer {layer}: there the state at the last token brings back {last[layer]:.0%} of the "
        f"capital's probability, and the layer before {last[layer - 1]:.0%}. The state at the "
        f"country brings back {country[layer - 1]:.0%} at layer {layer - 1} and "
        f"{country[layer]:.0%} at layer {layer}. States from a third country bring back at most "
        f"{means[True].max():.0%}."
    )


if __name__ == "__main__":
    main()
