"""Can the mood of a text be steered, and does a vector that was read or learnt do it better than a random one?

Four vectors for the residual stream of one layer: the mean difference of happy and unhappy sentences, the principal
direction of the same pairs, and two that gradient descent found with all weights frozen (for words of mood after short
openings; for happy continuations of them). The layer is chosen on those openings. The effect is measured on openings
and with words that no vector has seen. It is answered if a vector moves the mood further than random ones that damage
neutral text equally much, the 95 % interval over the openings lying above 0.

python -m experiments.steer_a_mood        under three minutes on two cores; writes results/steer_a_mood/
"""

from typing import Any

import pandas as pd

import hookkit as hk

SEED, RANDOM = 0, 8  # random vectors as a control
LAYERS, TRIED = range(2, 29, 4), 0.2  # where the mean difference is tried, and at which dose
DOSES = [0.05, 0.1, 0.2, 0.3, 0.4]  # in the stream's median length
LEVEL = 0.1  # nats a token of KL on neutral text: the damage at which vectors are compared
STEPS = 25  # of gradient descent
QUESTION = "Can the mood of a text be steered, and does a vector that was read or learnt beat a random one?"

SEEN = ((" good", " great", " wonderful", " amazing"), (" bad", " terrible", " awful", " horrible"))
HELD_OUT = ((" lovely", " excellent", " beautiful", " perfect"), (" ugly", " poor", " boring", " miserable"))
THINGS = ["film", "hotel", "meal", "concert", "book", "journey", "lesson", "party", "game", "garden", "song", "visit"]
HAPPY = [f"I loved the {thing}. It was wonderful, and I was so happy to be there!" for thing in THINGS]
UNHAPPY = [f"I hated the {thing}. It was terrible, and I was so sad to be there!" for thing in THINGS]
OPENINGS = [f"I think the {thing} was" for thing in THINGS]
ENDINGS = [" wonderful, and I was so happy to be there!", " a joy from beginning to end, and everybody smiled."]
NEW = ["The weather this morning is", "My sister's new house looks", "The view from the train window was",
       "Our neighbour's dog is", "The soup at the corner restaurant tasted", "Working with that team has been",
       "The museum we visited on Sunday was", "His first week at school was", "The speech that she gave sounded",
       "Living in this town is", "The old chair in the kitchen is", "When I opened the letter, I felt",
       "The room that they gave us was", "People say that the new mayor is", "The painting on the wall looks",
       "The last chapter of the story is"]  # fmt: skip
NEUTRAL = ["The museum opens at nine in the morning and closes at five in the afternoon.",
           "A triangle has three sides and three corners, and its angles add up to half a turn.",
           "To install the program, copy the files into a folder and open the terminal.",
           "The river flows north through the valley before it reaches the sea.",
           "In 1998 the company moved its offices from the city to the coast."]  # fmt: skip


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record("results/steer_a_mood", title="Steer a mood", question=QUESTION, lm=lm, seed=SEED) as results:
        layer = which_layer(lm, results)
        vectors = make(lm, f"resid_post.{layer}", results)
        table = dose_and_damage(lm, vectors, results)
        read_aloud(lm, vectors, compare(table, results), results)
    print("The page: results/steer_a_mood/report.html")


def which_layer(lm: hk.LM, results: hk.Record) -> int:
    results.text("# Where is the mood?")
    found = hk.mean_difference(lm, HAPPY, UNHAPPY, lm.sites("resid_post", layers=LAYERS))
    table = hk.dose_response(lm, OPENINGS, found, hk.logit_diff(*SEEN), doses=[TRIED], samples=2, seed=SEED)
    means = results.table("layers", hk.over_doses(table).drop(columns="vector"), caption="Tried on the openings.")
    title = f"Happy minus unhappy words, with the mean difference at dose {TRIED}"
    figure = hk.interval_lines(means, value="logit_diff_delta", title=title)
    results.figure("layers", figure, caption="After minus before (logits), by layer; the control is random vectors.")
    best = means[~means["control"]].set_index("layer")["logit_diff_delta"]
    results.text(f"It moves the openings furthest at layer {best.idxmax()}, which all that follows is about.")
    return int(best.idxmax())  # pyright: ignore


def make(lm: hk.LM, site: str, results: hk.Record) -> dict[str, hk.Vector]:
    results.text("# Four vectors")
    fit: dict[str, Any] = {"steps": STEPS, "dose": DOSES[-1], "progress": False}
    endings = [ENDINGS[n % len(ENDINGS)] for n in range(len(OPENINGS))]
    vectors = {
        "mean difference": hk.mean_difference(lm, HAPPY, UNHAPPY, site)[0],
        "principal": hk.principal_direction(lm, HAPPY, UNHAPPY, site)[0],
        "learnt from words": hk.fit_vector(lm, site, OPENINGS, hk.logit_diff(*SEEN), **fit),
        "learnt from texts": hk.fit_vector(lm, site, OPENINGS, endings, **fit),
    }
    for name in ("learnt from words", "learnt from texts"):
        curve = vectors[name].about["curve"]
        results.text(f"{name}: the target goes from {curve[0]:.2f} to {curve[-1]:.2f} in {STEPS} steps.")
    cosines = [{"vector": a} | {b: vectors[a].cosine(vectors[b]) for b in vectors} for a in vectors]
    results.table("cosines", pd.DataFrame(cosines).round(3), caption="How alike their directions are: cosines.")
    results.tensors("vectors", {name.replace(" ", "_"): vector.tensor for name, vector in vectors.items()})
    return vectors


def dose_and_damage(lm: hk.LM, vectors: dict[str, hk.Vector], results: hk.Record) -> pd.DataFrame:
    results.text("# What a dose does, and what it damages")
    given: dict[str, Any] = {"doses": DOSES, "neutral": NEUTRAL, "seed": SEED, "progress": False}
    metric = hk.logit_diff(*HELD_OUT)
    parts = [
        hk.dose_response(lm, NEW, {name: vector}, metric, samples=RANDOM if name == "mean difference" else 0, **given)
        for name, vector in vectors.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    results.table("doses", hk.over_doses(table), caption="Means over the held-out openings with 95 % intervals.")
    figure = hk.damage_curves(table, title="How far the mood moves, for what it damages")
    results.figure(
        "damage", figure, caption="Happy minus unhappy words (logits), after minus before. Points are doses."
    )
    return table


def compare(table: pd.DataFrame, results: hk.Record) -> pd.DataFrame:
    results.text(f"# At equal damage: {LEVEL} nats a token")
    there = hk.at_damage(table, LEVEL)
    means = hk.over_prompts(there, by=["vector", "control"])
    results.table("equal_damage", means, caption="gain: beyond the mean random vector, for the same opening.")
    random: Any = there[there["control"]].groupby("sample")["logit_diff_delta"].mean()
    for row in means[~means["control"]].to_dict("records"):
        moved, gain, low, high = (row[f"logit_diff_{word}"] for word in ("delta", "gain", "gain_low", "gain_high"))
        says = "beats" if low > 0 else "falls behind" if high < 0 else "cannot be told from"
        results.text(
            f"{row['vector']}: {moved:+.2f} logits, {gain:+.2f} [{low:+.2f}, {high:+.2f}] beyond random: it {says} "
            f"random vectors, whose best of {RANDOM} moves the mood by {random.max():+.2f}."
        )
    print(means.loc[:, ["vector", "control", "logit_diff_delta", "logit_diff_gain", "logit_diff_gain_low"]].round(2))
    return there


def read_aloud(lm: hk.LM, vectors: dict[str, hk.Vector], there: pd.DataFrame, results: hk.Record) -> None:
    results.text("# How it reads")
    doses: Any = there[there["sample"] == 0].groupby(["vector", "control"])["dose_there"].first()
    first = vectors["mean difference"]
    hooks = {"nothing": [], "random": [first.random(seed=SEED).steer(dose=doses["mean difference", True])]}
    hooks |= {name: [vector.steer(dose=doses[name, False])] for name, vector in vectors.items()}
    hooks |= {f"minus {name}": [vector.steer(dose=-doses[name, False])] for name, vector in vectors.items()}
    rows = []
    for name, hook in hooks.items():
        run = results.run(name, hk.generate(lm, NEW[:2], *hook, max_new_tokens=16, do_sample=False))
        rows += [{"added": name, "text": text} for text in run.text]
    results.table("texts", pd.DataFrame(rows), caption=f"Greedy, each at the dose that damages {LEVEL} nats a token.")


if __name__ == "__main__":
    main()
