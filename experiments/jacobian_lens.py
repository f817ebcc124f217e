"""Does a Jacobian lens read earlier what the model will say than the logit lens and the tuned lens?

A Jacobian lens reads a state through the average Jacobian from its layer to the last one. Here it
is fitted for the names of cities only, a backward for each text and city. After landmarks ("The
Acropolis is in the city of") each lens ranks these cities at every layer: the same candidates for
all three. It is answered yes if the city's mean rank is better by the Jacobian lens than by both
others over most layers, with 95 % intervals of the paired differences that exclude 0.

python -m experiments.jacobian_lens      four minutes on one core; writes results/jacobian_lens/
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, COUNT = 0, 40  # landmarks
NEWS, TEXTS, WIDTH = "97_news_class", 100, 24  # texts of the fit, and tokens of each
SKIPPED = 6  # first positions, at which the Jacobian is not averaged
CANDIDATES = 24  # cities: the answers, and capitals as decoys
STEPS = 20  # of Adam, of the tuned lens
NEAR = 2  # the mean rank from which on a city counts as read
LENSES = JACOBIAN, LOGIT, TUNED = "Jacobian lens", "logit lens", "tuned lens"
QUESTION = (
    "Does a Jacobian lens read earlier what the model will say than the logit lens and the tuned "
    "lens?"
)


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/jacobian_lens", title="The Jacobian lens", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        pairs = hk.datasets.landmarks(lm, COUNT, seed=SEED).solved(lm)
        cities = candidates(lm, pairs)
        news = list(hk.datasets.labelled(NEWS, 2 * TEXTS, seed=SEED)["text"])
        rows = [lm.tokenizer(text)["input_ids"] for text in news]
        rows = [row for row in rows if len(row) >= WIDTH][:TEXTS]
        jacobian = hk.fit_jacobian(
            lm,
            [row[:WIDTH] for row in rows],
            tokens=cities,
            skip=SKIPPED,
            batch_tokens=1024,
            progress=False,
        )
        results.table("fit", jacobian.table, caption=f"{TEXTS} texts, {len(cities)} cities.")
        tuned = hk.train_lens(lm, rows, steps=STEPS, seed=SEED, progress=False)
        table = ranked(lm, pairs, cities, jacobian, tuned)
        write_ranks(results, table, len(pairs))
        tables = {
            name: hk.results.read_table(results.folder / f"{name}.csv")
            for name in ("fit", "ranks", "differences")
        }
        results.answer(answer(tables))
    print(f"{results.answered}\n")
    print("The page: results/jacobian_lens/report.html")


def candidates(lm: hk.LM, pairs: hk.types.Pairs) -> list[int]:
    """The cities that are ranked: the landmarks' answers, then capitals."""
    names = [*pairs.answers, *hk.datasets.capitals(lm, 60, seed=SEED).answers]
    return list(dict.fromkeys(map(lm.token, names)))[:CANDIDATES]


def ranked(
    lm: hk.LM,
    pairs: hk.types.Pairs,
    cities: list[int],
    jacobian: hk.types.JacobianLens,
    tuned: hk.types.TunedLens,
) -> pd.DataFrame:
    """The rank of each landmark's city among all candidates, by each lens at each layer."""
    prompts = list(pairs.clean)
    parts = [jacobian.rank_tokens(prompts).assign(lens=JACOBIAN)]
    for name, lens in ((LOGIT, None), (TUNED, tuned)):
        part = hk.logit_lens(
            lm, prompts, sites=list(jacobian.sums), top=0, watch=cities, lens=lens
        ).drop(columns="rank")
        cell = part.groupby(["row", "layer"])["logit"]
        parts.append(part.assign(lens=name, rank=cell.rank(ascending=False)))
    table: Any = pd.concat(parts, ignore_index=True)
    own = [lm.token(pairs.answers[row]) for row in table["row"]]
    table = table[table["token_id"] == own]
    return table.assign(**{"log10 rank": table["rank"].map(math.log10)})


def write_ranks(results: hk.types.Record, table: pd.DataFrame, count: int) -> None:
    means = hk.stats.mean_over_prompts(table, by=["lens", "layer"], values=["log10 rank"])
    kl: Any = table.groupby(["lens", "layer"], as_index=False)["kl"].mean()
    means = means.merge(kl, on=["lens", "layer"])
    results.table(
        "ranks",
        means,
        caption=f"The city's rank among {CANDIDATES}: means over {count} landmarks, 95 % "
        "intervals; and the mean KL (nats) from the model's prediction over the whole vocabulary, "
        "which rows of cities do not give.",
    )
    title = f"The city's rank among {CANDIDATES} by three lenses, over {count} landmarks"
    figure = hk.figures.interval_lines(
        means, x="layer", series="lens", value="log10 rank", title=title
    )
    results.figure("log10_rank", figure, caption="0 is rank 1, 1 is rank 10.")
    wide: Any = table.pivot(index=["row", "layer"], columns="lens", values="log10 rank")
    parts = []
    for other in (LOGIT, TUNED):
        difference = (wide[JACOBIAN] - wide[other]).rename("log10 rank ratio").reset_index()
        parts.append(difference.assign(beside=other))
    differences = hk.stats.mean_over_prompts(
        pd.concat(parts, ignore_index=True), by=["beside", "layer"], values=["log10 rank ratio"]
    )
    results.table(
        "differences",
        differences,
        caption="Below 0 the Jacobian lens ranks the city higher. Means of the same prompts' "
        "differences, 95 % intervals.",
    )


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    fit, ranks = tables["fit"], tables["ranks"].set_index(["lens", "layer"])["log10 rank"]
    name, layers = "log10 rank ratio", len(fit)
    counts = {}
    for other, part in tables["differences"].groupby("beside"):
        better, worse = part[f"{name}_high"] < 0, part[f"{name}_low"] > 0
        counts[other] = better.sum(), worse.sum(), list(part["layer"][better])
    verdict = "No"
    if min(counts[LOGIT][0], counts[TUNED][0]) > layers / 2:
        verdict = "Yes"
    words: list[str] = []
    for other in (LOGIT, TUNED):
        better, worse, at = counts[other]
        where = f" (layers {at[0]} to {at[-1]})" if at else ""
        words.append(f"than the {other} at {better} of {layers} layers{where} and worse at {worse}")
    firsts = []
    for lens in LENSES:
        near = ranks[lens].index[10 ** ranks[lens] <= NEAR]
        firsts.append(f"{min(near, default='none')} by the {lens}")
    quiet = fit["layer"][fit["noise"] < 0.5]
    return (
        f"{verdict}: the Jacobian lens, fitted on {fit['texts'].max()} texts, ranks the city "
        f"better {'; '.join(words)}. The first layer with a geometric mean rank of {NEAR} or "
        f"better among {CANDIDATES} cities is {', '.join(firsts)}. The two halves of the texts "
        f"give Jacobians that differ by {fit['noise'].max():.2f} of their mean's length at layer "
        f"{fit['layer'][fit['noise'].idxmax()]}, and by less than half at {len(quiet)} of "
        f"{layers} layers."
    )


if __name__ == "__main__":
    main()
