"""Can the mood of a text be steered, and does a vector that was read or learnt beat a random one?

Two vectors are read from happy and unhappy sentences, and gradient descent finds two with all
weights frozen: for words of mood after short openings, and for happy continuations. Layer and
vectors never see the openings and words by which the effect is measured. It is answered if a vector
moves the mood further than random ones that damage neutral text equally much: the interval of its
gain, over openings and random vectors, lies above 0. The four vectors are asked together, so that
each interval is one of 98.75 % (Bonferroni).

python -m experiments.steer_a_mood    under three minutes on two cores; writes results/steer_a_mood/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, RANDOM = 0, 20  # random vectors as a control
LAYERS, TRIED = range(2, 29, 4), 0.2  # where the mean difference is tried, and at which dose
DOSES = [0.05, 0.1, 0.2, 0.4]  # in the stream's median length
LEVEL = 0.1  # nats a token of KL on neutral text: the damage at which vectors are compared
STEPS, LR = 12, 0.03  # of gradient descent; a step in the same unit
QUESTION = (
    "Can the mood of a text be steered, and does a vector that was read or learnt beat a random "
    "one?"
)
SEEN = ((" good", " great", " wonderful", " amazing"), (" bad", " terrible", " awful", " horrible"))
HELD_OUT = (
    (" lovely", " excellent", " beautiful", " perfect"),
    (" ugly", " poor", " boring", " miserable"),
)
THINGS = [
    "film",
    "hotel",
    "meal",
    "concert",
    "book",
    "journey",
    "lesson",
    "party",
    "game",
    "garden",
    "song",
    "visit",
]
HAPPY = [
    f"I loved the {thing}. It was wonderful, and I was so happy to be there!" for thing in THINGS
]
UNHAPPY = [
    f"I hated the {thing}. It was terrible, and I was so sad to be there!" for thing in THINGS
]
OPENINGS = [f"I think the {thing} was" for thing in THINGS]
ENDINGS = [" a joy, and I loved every minute.", " all that I had hoped for!"]
NEW = [
    "The weather this morning is", "My sister's new house looks",
    "The view from the train window was", "Our neighbour's dog is",
    "The soup at the restaurant tasted", "Working with them has been", "Our museum is",
    "His first week at school was", "The speech that she gave sounded", "Living in this town is",
    "The chair is", "When I opened the letter, I felt", "The room that they gave us was",
    "People say that the new mayor is", "The painting on the wall looks",
    "The last chapter of the story is",
]  # fmt: skip
NEUTRAL = [
    "The museum opens at nine and closes at five.",
    "To install it, copy the files and open a terminal.",
    "A triangle has three sides and three corners, and its angles add up to half a turn.",
    "In 1998 the company moved its offices from the city to the coast.",
]  # fmt: skip


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/steer_a_mood", title="Steer a mood", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        vectors = make(lm, f"resid_post.{which_layer(lm, results)}", results)
        compare(dose_and_damage(lm, vectors, results), results)
        read_aloud(lm, vectors, results)


def which_layer(lm: hk.LM, results: hk.types.Record) -> int:
    results.text("# Where is the mood?")
    found = hk.mean_difference(lm, HAPPY, UNHAPPY, lm.sites("resid_post", layers=LAYERS))
    table = hk.dose_response(
        lm, OPENINGS, found, hk.metrics.logit_diff(*SEEN), doses=[TRIED], samples=8, seed=SEED
    )
    means = results.table(
        "layers",
        hk.stats.mean_over_doses(table).drop(columns="vector"),
        caption="Tried on the openings.",
    )
    lines = {"value": "logit_diff_delta", "series": "control"}
    figure = hk.figures.interval_lines(means, **lines, title=f"The mean difference at dose {TRIED}")
    results.figure(
        "by_layer",
        figure,
        caption="Happy minus unhappy words, after minus before, beside random vectors.",
    )
    best: Any = means[~means["control"]].set_index("layer")["logit_diff_delta"].idxmax()
    results.text(
        f"It moves the openings furthest at layer {best}, which all that follows is about."
    )
    return int(best)


def make(lm: hk.LM, site: str, results: hk.types.Record) -> dict[str, hk.Vector]:
    results.text("# Four vectors")
    fit: dict[str, Any] = {"steps": STEPS, "lr": LR, "dose": DOSES[-1], "progress": False}
    vectors = {
        "mean difference": hk.mean_difference(lm, HAPPY, UNHAPPY, site)[0],
        "principal": hk.principal_direction(lm, HAPPY, UNHAPPY, site)[0],
        "learnt from words": hk.fit_vector(lm, OPENINGS, hk.metrics.logit_diff(*SEEN), site, **fit),
        "learnt from texts": hk.fit_vector(lm, OPENINGS, ENDINGS * 6, site, **fit),
    }
    for name, curve in [
        (name, v.about["curve"]) for name, v in vectors.items() if v.method == "learnt"
    ]:
        results.text(
            f"{name}: the target goes from {curve[0]:.2f} to {curve[-1]:.2f} in {STEPS} steps."
        )
    cosines = [{"vector": a} | {b: vectors[a].cosine(vectors[b]) for b in vectors} for a in vectors]
    results.table(
        "cosines",
        pd.DataFrame(cosines).round(3),
        caption="How alike their directions are: cosines.",
    )
    results.tensors(
        "vectors", {name.replace(" ", "_"): vector.tensor for name, vector in vectors.items()}
    )
    return vectors


def dose_and_damage(
    lm: hk.LM, vectors: dict[str, hk.Vector], results: hk.types.Record
) -> pd.DataFrame:
    results.text("# What a dose does, and what it damages")
    words = (
        "A dose is a part of the stream's length. Damage: KL(without ‖ with) on neutral text, nats "
        "a token."
    )
    results.text(f"{words} A line that hides another has its direction: see the cosines.")
    given: dict[str, Any] = {"doses": DOSES, "neutral": NEUTRAL, "seed": SEED, "progress": False}
    samples = {
        name: RANDOM if name == "mean difference" else 0 for name in vectors
    }  # the same for all at one site
    mood, each = hk.metrics.logit_diff(*HELD_OUT), vectors.items()
    table = pd.concat(
        [hk.dose_response(lm, NEW, {n: v}, mood, samples=samples[n], **given) for n, v in each]
    )
    results.table(
        "doses",
        hk.stats.mean_over_doses(table),
        caption="Means over the held-out openings with 95 % intervals.",
    )
    figure = hk.figures.damage_curves(table, title="How far the mood moves, for what it damages")
    results.figure(
        "damage",
        figure,
        caption="Happy minus unhappy words (logits): after minus before. Points: doses.",
    )
    return table


def compare(table: pd.DataFrame, results: hk.types.Record) -> None:
    results.text(f"# At equal damage: {LEVEL} nats a token")
    there = hk.stats.effect_at_damage(table, LEVEL)
    count = len(set(there[~there["control"]]["vector"]))
    means = hk.stats.mean_over_prompts(there, by=["vector", "control"], confidence=1 - 0.05 / count)
    caption = (
        "gain: beyond the mean random vector. Intervals are of 95 % for all vectors together; in "
        "the control's "
    )
    caption += "gain, where one more random vector would lie."
    results.table("equal_damage", means, caption=caption)
    results.answer(answer({"equal_damage": means}))
    columns = [
        "vector",
        "control",
        "logit_diff_delta",
        "logit_diff_gain",
        "logit_diff_gain_low",
        "logit_diff_gain_high",
    ]
    print(f"{means[columns].round(2).to_string()}\n\nThe page: results/steer_a_mood/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table: Any = tables["equal_damage"].set_index("vector")
    sentences, n_better = [], 0
    for name, row in table[~table["control"]].iterrows():
        moved, gain, low, high = (
            row[f"logit_diff_{end}"] for end in ("delta", "gain", "gain_low", "gain_high")
        )
        verdict = "which does not tell it from a random vector"
        if low > 0:
            verdict = "more than a random vector"
            n_better += 1
        elif high < 0:
            verdict = "less than a random vector"
        sentences.append(
            f"“{name}” moves it by {moved:+.2f} logits, {gain:+.2f} [{low:+.2f}, {high:+.2f}] "
            f"beyond the mean of the random vectors, {verdict}"
        )
    random = table[table["control"]].iloc[0]
    verdict = {0: "No", len(sentences): "Yes"}.get(n_better, "Yes, by some vectors")
    return (
        f"{verdict}: {n_better} of {len(sentences)} vectors move the mood further than random "
        f"vectors that damage neutral text equally ({LEVEL:g} nats a token). "
        f"The vector {'; '.join(sentences)}. The {RANDOM} random vectors, the control, move it by "
        f"{random['logit_diff_delta']:+.2f} on average."
    )


def read_aloud(lm: hk.LM, vectors: dict[str, hk.Vector], results: hk.types.Record) -> None:
    results.text("# How it reads")
    given = vectors | {"random": vectors["mean difference"].random(seed=SEED)}
    hooks = {
        f"{way:+} {name}": [v.steer(dose=way)]
        for name, v in given.items()
        for way in (DOSES[-1], -DOSES[-1])
    }
    hooks, greedy = {"nothing": [], **hooks}, {"max_new_tokens": 16, "do_sample": False}
    runs = {
        name: results.run(name, hk.generate(lm, NEW[:2], *hook, **greedy))
        for name, hook in hooks.items()
    }
    texts = [{"added": name, "text": text} for name, run in runs.items() for text in run.text]
    results.table(
        "texts",
        pd.DataFrame(texts),
        caption="Greedy texts with the largest dose of each, and its opposite.",
    )


if __name__ == "__main__":
    main()
