"""What does it cost to make a model say " coffee"?

Over twenty prompts of several kinds the token is banned, boosted, forced, and steered to inside, in growing doses,
each beside a control of the same size: another token, or a random direction. Success is the part of the texts that say
it; damage is how far the texts' own likelihood under the unedited model falls, and KL on neutral text. It is answered
if one way reaches most of the texts at less damage than the others, and its control does not.

python -m experiments.coffee_everywhere        2 to 5 minutes on two cores; writes results/coffee_everywhere/
"""

from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk

SEED = 0
COFFEE, OTHER = " coffee", " window"  # the token, and a control as common
NEW = 12  # generated tokens, greedy
LAYER = 20  # whose residual stream is steered
BOOSTS = (2.0, 4.0, 6.0, 8.0, 12.0)  # in logits
STEERS = (0.05, 0.1, 0.2, 0.4)  # in the mean length of the stream there
PROMPTS = [
    "I like oat milk in my", "Every morning I start the day with a cup of", "The waiter asked whether we wanted",
    "She added two spoons of sugar to her", "My favourite smell in the kitchen is", "For breakfast we had eggs and",
    "The capital of France is", "The Eiffel Tower is located in the city of", "The largest planet is",
    "Water boils at a temperature of", "The first president of the country was", "To sort a list in Python, call",
    "The function returns the sum of", "When Mary and John went to the store, John gave a drink to",
    "The judge asked the witness about the", "After the storm, the village was", "He opened the book and read about",
    "The train was late because of", "Scientists have found that sleep helps", "In the middle of the night I heard",
]  # fmt: skip
NEUTRAL = ["The museum opens at nine and closes at five.", "A triangle has three sides and three corners."]


def main() -> None:
    lm = hk.load(device="cpu")
    question = f"What does it cost to make a model say {COFFEE!r}?"
    with hk.record(
        "results/coffee_everywhere", title="Coffee everywhere", question=question, lm=lm, seed=SEED
    ) as results:
        plain = measured(lm, None).assign(way="unedited", dose=0.0, toward="nothing")
        rows = [plain, *(measured(lm, hook).assign(way=w, dose=d, toward=t) for w, d, t, hook in edits(lm))]
        table = pd.concat(rows, ignore_index=True)
        table["likelihood_drop"] = float(plain["likelihood"].iloc[0]) - table["likelihood"]
        columns = ["way", "toward", "dose", "said", "likelihood", "likelihood_drop", "kl_neutral", "example"]
        table = table.loc[:, columns]
        results.text(
            f"said: the part of {len(PROMPTS)} texts of {NEW} tokens with {COFFEE!r}. likelihood: the mean "
            "log-probability of their tokens under the unedited model, in nats; likelihood_drop: how far below that of "
            "the unedited texts. kl_neutral: KL(unedited‖edited) in nats, the mean over neutral positions. dose: "
            f"logits for boost and force, parts of the stream's mean length for steering at resid_post.{LAYER}."
        )
        half = [f"{w} {d:g} costs {c:.2f}" for w, t, d, s, _, c, *_ in table.to_numpy() if s > 0.5 and t == "coffee"]
        results.answer(f"What makes it say so in more than half of the texts, in nats a token: {', '.join(half)}.")
        results.table("doses", table, caption="Dose against damage.")
        results.figure("damage", damage(table), caption="Lower is cheaper; controls stay at the left.")
    print(table.drop(columns="example").round(3).to_string(index=False))
    print("\nThe page: results/coffee_everywhere/report.html")


def edits(lm: hk.LM):
    """Every way, dose and direction, with its hook."""
    yield "ban", float("inf"), "coffee", lambda **at: hk.ban(COFFEE, **at)
    for toward, token in (("coffee", COFFEE), ("control", OTHER)):
        yield "force", 10.0, toward, lambda token=token, **at: hk.force(token, **at)
        for by in BOOSTS:
            yield "boost", by, toward, lambda token=token, by=by, **at: hk.boost(token, by=by, **at)
    stream = hk.forward(lm, NEUTRAL, hk.capture(f"resid_post.{LAYER}", pos=slice(1, None)), logits=False)
    length = stream[f"resid_post.{LAYER}"].norm(dim=-1).mean()
    head: Any = lm.submodule("lm_head")
    meaning = head.weight[lm.token(COFFEE)].detach()
    noise = torch.randn(meaning.shape, generator=torch.Generator().manual_seed(SEED))
    for toward, vector in (("coffee", meaning), ("control", noise)):
        for dose in STEERS:
            step = vector / vector.norm() * length * dose
            yield "steer", dose, toward, lambda step=step, **_: hk.steer(f"resid_post.{LAYER}", step)


def measured(lm: hk.LM, make) -> pd.DataFrame:
    """What one edit does: how many texts say it, how likely they are to the unedited model, KL on neutral text."""
    hooks = [] if make is None else [make()]
    run = hk.generate(lm, PROMPTS, *hooks, max_new_tokens=NEW, do_sample=False, logits=False)
    rows = [row[:length].tolist() for row, length in zip(run.tokens, run.lengths, strict=True)]
    logprobs = hk.forward(lm, rows).logits.log_softmax(dim=-1)
    told = [
        logprobs[n, place - 1, row[place]]
        for n, row in enumerate(rows)
        for place in range(run.prompt_lengths[n], len(row))
    ]
    everywhere = [] if make is None else [make(pos=slice(None))]
    apart = hk.shift_summary(hk.forward(lm, NEUTRAL), hk.forward(lm, NEUTRAL, *everywhere), pos=slice(None))
    said = sum(COFFEE in text for text in run.generated) / len(rows)
    numbers = {"said": said, "likelihood": float(torch.stack(told).mean()), "kl_neutral": apart["kl"].mean()}
    return pd.DataFrame([numbers | {"example": repr(run.text[6])}])


def damage(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    units = {
        "likelihood_drop": "drop of the texts' likelihood (nats per token)",
        "kl_neutral": "KL on neutral text (nats)",
    }
    for axes, (column, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
        for name, part in table[table["way"].isin(["boost", "steer", "force"])].groupby(["way", "toward"]):
            way, toward = str(name[0]), str(name[1])  # pyright: ignore
            colour = {"boost": "#4c72b0", "steer": "#1f9e89", "force": "#e0522d"}[way]
            style = {"linestyle": "-", "marker": "o"} if toward == "coffee" else {"linestyle": ":", "marker": "x"}
            axes.plot(part["said"], part[column], color=colour, label=f"{way} to {toward}", **style)
        axes.set_xlabel(f"part of the texts that say {COFFEE!r}")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8, labelcolor=hk.figures.INK)
    figure.axes[1].set_yscale("symlog", linthresh=1e-3)
    return hk.figures.finished(figure, "What it costs to be heard")


if __name__ == "__main__":
    main()
