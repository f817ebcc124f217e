"""What does it cost to make a model say " coffee"?

Over twenty prompts of several kinds the token is banned, boosted, forced, and steered to inside, in
growing doses, each beside controls of the same size: five other tokens, or five random directions.
Success is the part of the texts that say it; damage is how far the texts' own likelihood under the
unedited model falls, and KL on neutral text. It is answered if one way reaches most of the texts at
less damage than the others, by both damages, and its controls do not.

python -m experiments.coffee_everywhere
    2 to 5 minutes on two cores; writes results/coffee_everywhere/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import INK, LINES, MUTED, add_legend, apply_style

SEED = 0
COFFEE = " coffee"
OTHERS = (" window", " table", " river", " letter", " garden")  # controls, as common
NEW = 12  # generated tokens, greedy
LAYER = 20  # whose residual stream is steered
BOOSTS = (2.0, 4.0, 6.0, 8.0, 12.0)  # in logits
STEERS = (0.05, 0.1, 0.2, 0.4)  # in the mean length of the stream there
WORDS = {
    "boost": "a boost of {:g} logits",
    "force": "forcing it to be {:g} logits ahead",
    "steer": "steering by {:g} of the stream's length",
}
PROMPTS = [
    "I like oat milk in my", "Every morning I start the day with a cup of",
    "The waiter asked whether we wanted", "She added two spoons of sugar to her",
    "My favourite smell in the kitchen is", "For breakfast we had eggs and",
    "The capital of France is", "The Eiffel Tower is located in the city of",
    "The largest planet is", "Water boils at a temperature of",
    "The first president of the country was", "To sort a list in Python, call",
    "The function returns the sum of", "When Mary and John went to the store, John gave a drink to",
    "The judge asked the witness about the", "After the storm, the village was",
    "He opened the book and read about", "The train was late because of",
    "Scientists have found that sleep helps", "In the middle of the night I heard",
]  # fmt: skip
NEUTRAL = [
    "The museum opens at nine and closes at five.", "A triangle has three sides and three corners.",
    "In 1998 the company moved its offices to the coast.",
    "The bridge was built of stone and iron.", "Copy the files and open a terminal.",
    "The two teams met again in the final.", "Her brother studies law in another city.",
    "The report has twelve pages and four tables.", "Snow fell on the hills during the night.",
    "The bus stops in front of the library.",
]  # fmt: skip


def main() -> None:
    lm = hk.load(device="cpu")
    question = f"What does it cost to make a model say {COFFEE!r}?"
    with hk.record(
        "results/coffee_everywhere", title="Coffee everywhere", question=question, lm=lm, seed=SEED
    ) as results:
        plain = measured(lm, None)
        parts = [plain.assign(way="unedited", dose=0.0, toward="nothing", sample=0)]
        for way, dose, toward, sample, make in edits(lm):
            parts.append(
                measured(lm, make).assign(way=way, dose=dose, toward=toward, sample=sample)
            )
        table = pd.concat(parts, ignore_index=True)
        was = plain.set_index(["what", "row"])["likelihood"]
        table["likelihood_drop"] = [
            was[key] for key in zip(table["what"], table["row"], strict=True)
        ]
        table["likelihood_drop"] -= table["likelihood"]
        results.text(
            f"said: the part of {len(PROMPTS)} texts of {NEW} tokens with {COFFEE!r}. likelihood: "
            "the mean log-probability of their tokens under the unedited model, in nats; "
            "likelihood_drop: how far below that of the unedited texts. kl_neutral: "
            f"KL(unedited‖edited) in nats on {len(NEUTRAL)} neutral texts. dose: logits for boost "
            f"and force, parts of the stream's mean length for steering at resid_post.{LAYER}. "
            f"Controls are {len(OTHERS)} other tokens or random directions: intervals are over "
            "texts and controls."
        )
        summary = results.table(
            "doses", summed(table), caption="Dose against damage, with 95 % intervals."
        )
        examples = table[table["example"] != ""][["way", "toward", "dose", "sample", "example"]]
        results.table("examples", pd.DataFrame(examples), caption="How the seventh text goes.")
        results.answer(answer({"doses": pd.read_csv(results.folder / "doses.csv")}))
        results.figure(
            "damage", damage(summary), caption="Lower is cheaper; bars are 95 % intervals."
        )
    print(
        summary[["way", "toward", "dose", "said", "likelihood_drop", "kl_neutral"]]
        .round(3)
        .to_string(index=False)
    )
    print("\nThe page: results/coffee_everywhere/report.html")


def summed(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the texts, and over the controls, with intervals."""
    by = ["way", "toward", "dose"]
    own: Any = table[table["what"] == "text"]
    values = ["likelihood", "likelihood_drop"]
    alone: Any = own[own["toward"] != "control"]
    shares = [hk.stats.mean_over_prompts(alone.astype({"said": bool}), by=by, values=["said"])]
    shares.append(
        hk.stats.mean_over_prompts(
            own[own["toward"] == "control"].astype({"said": float}), by=by, values=["said"]
        )
    )
    said = pd.concat(shares, ignore_index=True).drop(columns="interval")
    texts = hk.stats.mean_over_prompts(own, by=by, values=values).drop(columns=["n", "interval"])
    neutral = hk.stats.mean_over_prompts(
        pd.DataFrame(table[table["what"] == "neutral"]), by=by, values=["kl_neutral"]
    )
    return (
        texts[by]
        .merge(said, on=by)
        .merge(texts, on=by)
        .merge(neutral.drop(columns=["n", "interval"]), on=by)
    )


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    doses: Any = tables["doses"]
    half: Any = doses[(doses["said"] > 0.5) & (doses["toward"] == "coffee")]
    sentences = []
    for row in half.to_dict("records"):
        name = _name(row)
        sentences.append(
            f"{name[0].upper()}{name[1:]} makes {_interval(row, 'said')} of the texts say it and "
            f"costs {_interval(row, 'likelihood_drop')} nats a token of likelihood and "
            f"{_interval(row, 'kl_neutral', 'g')} nats of KL on neutral text."
        )
    others: Any = doses[(doses["toward"] == "coffee") & ~doses["way"].isin([*half["way"], "ban"])]
    for way, rows in others.groupby("way", sort=False):
        most = rows["said"].max()
        sentences.append(f"With {way} no dose reaches half of the texts (at most {most:.2f}).")
    controls = doses[doses["toward"] == "control"]["said"].max()
    plain = doses[doses["way"] == "unedited"]["said"].iloc[0]
    sentences.append(
        f"Without an edit {plain:.2f} of the texts say it, and with the controls (other tokens, "
        f"random directions) at most {controls:.2f}."
    )
    return f"{_cheapest(half)} {' '.join(sentences)}"


def _cheapest(half: Any) -> str:
    """Which of the edits that reach half of the texts costs least, by both damages."""
    first, second = (half.loc[half[name].idxmin()] for name in ("likelihood_drop", "kl_neutral"))
    count = int(half["n"].max())
    rivals = half[
        (half["way"] != first["way"])
        & (half["likelihood_drop_low"] <= first["likelihood_drop_high"])
    ]
    close = " and ".join(map(_name, rivals.to_dict("records")))
    unsure = ""
    if close:
        unsure = f" By likelihood the interval of {_name(first)} is not apart from that of {close}."
    ways = f"{_name(first)} costs least by likelihood and {_name(second)} by KL on neutral text"
    if _name(first) == _name(second):
        ways = f"{_name(first)} costs least, by both damages"
    return f"Of the edits that make more than half of {count} texts say it, {ways}.{unsure}"


def _name(row: Mapping[Any, Any]) -> str:
    """An edit and its dose in words."""
    return WORDS[row["way"]].format(row["dose"])


def _interval(row: Mapping[Any, Any], name: str, form: str = "f") -> str:
    mean, low, high = (f"{row[f'{name}{end}']:.2{form}}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def edits(lm: hk.LM):
    """Every way, dose, direction and number of the control, with its hook."""
    yield "ban", float("inf"), "coffee", 0, lambda **at: hk.ban(COFFEE, **at)
    for toward, sample, token in (
        ("coffee", 0, COFFEE),
        *(("control", n, other) for n, other in enumerate(OTHERS)),
    ):
        yield "force", 10.0, toward, sample, lambda token=token, **at: hk.force(token, **at)
        for by in BOOSTS:
            yield (
                "boost",
                by,
                toward,
                sample,
                lambda token=token, by=by, **at: hk.boost(token, by=by, **at),
            )
    stream = hk.forward(
        lm, NEUTRAL, hk.capture(f"resid_post.{LAYER}", pos=slice(1, None)), logits=False
    )
    length = stream[f"resid_post.{LAYER}"].norm(dim=-1).mean()
    head: Any = lm.submodule("lm_head")
    meaning = head.weight[lm.token(COFFEE)].detach()
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(len(OTHERS), *meaning.shape, generator=generator)
    for toward, sample, vector in (
        ("coffee", 0, meaning),
        *(("control", n, other) for n, other in enumerate(noise)),
    ):
        for dose in STEERS:
            step = vector / vector.norm() * length * dose
            yield (
                "steer",
                dose,
                toward,
                sample,
                lambda step=step, **_: hk.steer(f"resid_post.{LAYER}", step),
            )


def measured(lm: hk.LM, make) -> pd.DataFrame:
    """Returns, for one edit, which texts say it, how likely they were, and KL on neutral texts."""
    hooks = [] if make is None else [make()]
    run = hk.generate(lm, PROMPTS, *hooks, max_new_tokens=NEW, do_sample=False, logits=False)
    rows = [row[:length].tolist() for row, length in zip(run.tokens, run.lengths, strict=True)]
    logprobs = hk.forward(lm, rows).logits.log_softmax(dim=-1)
    table: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        places = range(run.prompt_lengths[number], len(row))
        likely = torch.stack([logprobs[number, place - 1, row[place]] for place in places]).mean()
        example = repr(run.text[number]) if number == 6 else ""
        said = COFFEE in run.generated[number]
        table.append(
            {
                "what": "text",
                "row": number,
                "said": said,
                "likelihood": float(likely),
                "example": example,
            }
        )
    everywhere = [] if make is None else [make(pos=slice(None))]
    apart = hk.stats.shift_summary(
        hk.forward(lm, NEUTRAL), hk.forward(lm, NEUTRAL, *everywhere), pos=slice(None)
    )
    kl: Any = apart.groupby("row")["kl"].mean()
    table += [
        {"what": "neutral", "row": row, "kl_neutral": value, "example": ""}
        for row, value in kl.items()
    ]
    return pd.DataFrame(table)


def damage(table: Any) -> Figure:
    """Draws both damages against the part of the texts that say it: above the edits, below their
    controls."""
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    units = {"likelihood_drop": "drop of the texts' likelihood\n(nats per token)",
             "kl_neutral": "KL on neutral text (nats)"}  # fmt: skip
    rows = {"coffee": "Toward coffee", "control": "Controls: other tokens, random directions"}
    grid = figure.subplots(2, 2, sharex=True, sharey="col")
    for panels, (toward, title) in zip(grid, rows.items(), strict=True):
        for axes, (column, unit) in zip(panels, units.items(), strict=True):
            for number, way in enumerate(("boost", "steer", "force")):
                part = table[(table["way"] == way) & (table["toward"] == toward)]
                ends = [part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]]
                bars = [end.fillna(0.0).clip(lower=0.0) for end in ends]
                style: dict[str, Any] = {
                    "color": LINES[number],
                    "label": way,
                    "marker": "os^"[number],
                }
                axes.errorbar(part["said"], part[column], yerr=bars, elinewidth=0.9, ms=5, **style)
            axes.axhline(0, color=MUTED, lw=0.9, ls="--")
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_ylabel(unit)
    for axes in grid[:, 1]:
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_ylim(-1e-2, 30)
    for axes in grid[1]:
        axes.set_xlabel(f"part of {len(PROMPTS)} texts that say {COFFEE!r}")
    add_legend(grid[0, 1])
    return apply_style(figure, "What it costs to make the model say coffee, with 95 % intervals")


if __name__ == "__main__":
    main()
