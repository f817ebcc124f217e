"""When does the model come to say Paris, and can a state in its midst be read before that?

The residual stream at the last token is read after every block: by the model's own final norm and
head (logit lens), through an affine translator trained for each layer (tuned lens), and by the
model itself, with the state put into another prompt (patchscope). It is answered if the answer's
rank falls to 1 at some block and stays there, over many landmarks; the claim that is tested is
Belrose et al. 2023: that a tuned lens predicts earlier and more faithfully.

python -m experiments.lens_of_paris        three minutes on two cores; writes results/lens_of_paris/
"""

import math
import pydoc_data.topics
from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, COUNT = 0, 40  # landmarks
NEAR = 10  # the rank of a city that can be read, in the geometric mean over the landmarks
PROMPT, CITY = "The Eiffel Tower is located in the city of", " Paris"
# Of the text that the tuned lens is trained on (Python's own manual), and steps of Adam
LETTERS, STEPS = 24_000, 20
LINES = {
    "log10 rank": "The rank of a landmark's city by both lenses",
    "kl": "How far both lenses are from the model's own prediction",
}
TABLES = ("lens", "landmarks", "patchscope")  # those of which the answer is made
QUESTION = (
    "When does the model come to say Paris, and can a state in its midst be read before that?"
)


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/lens_of_paris", title="The lens of Paris", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        one_prompt(lm, results)
        tuned = hk.train_lens(lm, manual(), steps=STEPS, seed=SEED, progress=False)
        history = results.table(
            "training", tuned.history, caption="Mean KL(final, lens), nats, on held-out text."
        )
        better = (history["kl_after"] < history["kl_before"]).sum()
        results.text(
            f"# Tuned\n\nThe tuned lens is nearer to the model's prediction at {better} of "
            f"{len(history)} layers."
        )
        many_landmarks(lm, results, tuned)
        said_by_the_model(lm, results)
        tables = {name: hk.results.read_table(results.folder / f"{name}.csv") for name in TABLES}
        results.answer(answer(tables))
    print(f"{results.answered}\n")
    print("The page: results/lens_of_paris/report.html")


def manual() -> str:
    """English text that is on every machine: the topics of Python's help."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[:LETTERS]


def one_prompt(lm: hk.LM, results: hk.types.Record) -> None:
    run = results.run("prompt", hk.forward(lm, PROMPT))
    tokens = [repr(lm.string(token)) for token in run.tokens[0].tolist()]
    lens: Any = hk.logit_lens(lm, PROMPT, pos=None, top=1, watch=CITY)
    results.table(
        "lens", lens[lens["pos"] == len(tokens) - 1], caption="The lens at the last token."
    )
    leading: Any = lens[lens["rank"] == 1]
    words = (
        "What each block would say, after reading each token; the uppermost row is what the model "
        "says."
    )
    title = "What each block would say after each token"
    figure = hk.figures.lens_map(leading, labels=tokens, title=title)
    results.figure("lens_map", figure, caption=words)


def many_landmarks(lm: hk.LM, results: hk.types.Record, tuned: hk.types.TunedLens) -> None:
    pairs = hk.datasets.landmarks(lm, COUNT, seed=SEED).solved(lm)
    parts = []
    for name, translator in (("logit lens", None), ("tuned lens", tuned)):
        lens = hk.logit_lens(
            lm, list(pairs.clean), top=0, watch=set(pairs.answers), lens=translator
        )
        own = [lm.string(lm.token(pairs.answers[row])) for row in lens["row"]]
        parts.append(lens[lens["token"] == own].assign(lens=name))
    table: Any = pd.concat(parts, ignore_index=True)
    table["log10 rank"] = table["rank"].map(math.log10)
    means = hk.stats.mean_over_prompts(
        table, by=["lens", "layer"], values=["log10 rank", "prob", "kl"]
    )
    results.table("landmarks", means, caption=f"{len(pairs)} landmarks: means and 95 % intervals.")
    for value, words in (
        ("log10 rank", "0 is rank 1, 3 is rank 1,000"),
        ("kl", "0 is what the model says at its end"),
    ):
        title = f"{LINES[value]}, over {len(pairs)} landmarks"
        lines: dict[str, Any] = {"x": "layer", "series": "lens", "value": value}
        figure = hk.figures.interval_lines(means, **lines, title=title)
        results.figure(
            value.replace(" ", "_"), figure, caption=f"{value} of the landmark's city: {words}."
        )
    firsts = table[table["rank"] == 1].groupby(["lens", "row"])["layer"].min().groupby("lens")
    counts = {name: f"{int(of.median())} (of {len(of)} landmarks)" for name, of in firsts}
    results.text(
        "The median block at which the city first leads: "
        + "; ".join(f"{k} {v}" for k, v in counts.items())
    )


def said_by_the_model(lm: hk.LM, results: hk.types.Record) -> None:
    results.text(
        "# Said by the model itself\n\nThe last token's state, put into a prompt that asks to "
        "repeat a word."
    )
    scope: Any = hk.patchscope(lm, PROMPT, sites="resid_post")
    results.table(
        "patchscope",
        scope[["layer", "token", "prob", "text"]],
        caption="What the model writes behind it.",
    )


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    summary: Any = hk.stats.lens_summary(tables["lens"]).set_index("token").loc[CITY]
    landmarks: Any = tables["landmarks"].set_index(["lens", "layer"])
    early = {}
    for lens in ("logit lens", "tuned lens"):
        ranks = 10 ** landmarks.loc[lens]["log10 rank"]
        early[lens] = int(ranks.index[ranks <= NEAR].min())
    middle = landmarks.index.get_level_values("layer").max() // 2 + 1
    distances = landmarks["kl"].xs(middle, level="layer")
    scope: Any = tables["patchscope"]
    layers = scope[scope["text"].str.contains(CITY.strip())]["layer"]
    written = "with no state the model writes Paris"
    if len(layers):
        written = (
            f"the first state with which the model writes Paris is that of block {min(layers)}"
        )
    verdict = "Yes" if early["tuned lens"] < early["logit lens"] else "No"
    return (
        f"After “{PROMPT}” the logit lens has {CITY!r} first at {summary['first']}, and from "
        f"{summary['since']} to the end. {verdict}, a state can be read before that: over "
        f"{int(landmarks['n'].max())} landmarks the city's mean rank is {NEAR} or better from "
        f"block {early['tuned lens']} on by the tuned lens, and from block "
        f"{early['logit lens']} on by the logit lens. At block {middle} the tuned lens is "
        f"{distances['tuned lens']:.1f} nats (KL) from the model's prediction, and the logit "
        f"lens {distances['logit lens']:.1f}. Put "
        f"into another prompt (patchscope), {written}."
    )


if __name__ == "__main__":
    main()
