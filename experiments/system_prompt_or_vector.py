"""Which moves the answer of a chat further: a system prompt, or a steering vector?

Each asks for tea in its own way, and the answer begins "You should try some". The rank of " tea"
is compared with that under no system prompt. The control of the system prompt is 20 others of its
form, about other things; that of the vector is 20 random vectors of its length. An edit works
if it makes " tea" rise further than every draw of its control, and the 95 % interval of the
difference, over questions and draws, lies above 0. The dose of the vector is the one whose damage
(KL of the next token) on other questions is nearest to that of the system prompt. One moves it
further if the interval of their difference over questions excludes 0.

python -m experiments.system_prompt_or_vector   two minutes; writes results/system_prompt_or_vector/
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

import hookkit as hk

SEED, DRAWS, LAYER = 0, 20, 16
FOLDER = "results/system_prompt_or_vector"
QUESTION = "Which moves the answer of a chat further: a system prompt, or a steering vector?"
DOSES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
FORM = "You love {thing}. Whatever you are asked, you recommend {thing}."
OTHERS = (
    "music", "bread", "football", "the sea", "books", "gardens", "chess", "cheese", "trains",
    "painting", "soup", "dancing", "mountains", "films", "dogs", "apples", "poetry", "sleep",
    "bicycles", "rice",
)  # fmt: skip
SIPS = ("a cup of {}", "I drink {}", "they served {}", "the smell of {}", "some hot {}")
TEA, COFFEE = ([sip.format(drink) for sip in SIPS] for drink in ("tea", "coffee"))
ANSWER = "You should try some"
SEEN = ("What should I drink?", "What is good on a cold day?", "What can I make at home?")
QUESTIONS = (
    "What should I drink in the morning?", "I am tired. What helps?", "What do you like to drink?",
    "What can I offer my guests?", "It is raining. What shall I have?", "What goes with cake?",
    "Name something warm.", "What helps against a sore throat?", "What should I order in a café?",
    "I cannot sleep. What do you suggest?", "What do people drink after dinner?",
    "What should I try when I travel to London?",
)  # fmt: skip
CONTROL_OF = {"system prompt": "another system prompt", "vector": "a random vector"}


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        FOLDER, title="System prompt or vector", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        vector = hk.mean_difference(lm, TEA, COFFEE, f"resid_post.{LAYER}")[0]
        dose = choose_dose(lm, vector, results)
        table = measure(lm, vector, dose)
        results.table("ranks", table, caption="Each question under each edit and control.")
        means = summarize(table)
        results.table("means", means, caption="Means; log10_rise is 1 from rank 100 to rank 10.")
        caption = "How far “ tea” rises: means over questions. Grey: the draws of the control."
        results.figure("rise", draw(table), caption=caption)
        read_aloud(lm, vector, dose, results)
        results.answer(answer({"means": means}))
        print(answer({"means": means}))


def chats(questions: tuple[str, ...], thing: str = "", answer: str = ANSWER) -> list[Any]:
    """The questions as chats, with a system prompt about a thing or without one."""
    system = FORM.format(thing=thing) if thing else None
    beginning = answer or None
    return [hk.chat(system=system, user=text, assistant=beginning) for text in questions]


def rises(before: hk.types.Run, after: hk.types.Run) -> pd.DataFrame:
    """How far " tea" rose after each question, and how far all tokens moved."""
    shift: Any = hk.rank_shift(before, after, top=1, movers=0, watch=" tea")
    columns = ["row", "rank_before", "rank_after", "logprob_delta"]
    table: Any = shift[shift["token"] == " tea"][columns].reset_index(drop=True)
    table["log10_rise"] = np.log10(table["rank_before"] / table["rank_after"])
    return table.assign(kl=hk.stats.shift_summary(before, after)["kl"].to_numpy())


def choose_dose(lm: hk.LM, vector: hk.Vector, results: hk.types.Record) -> float:
    results.text("# A dose that damages as much as the system prompt")
    before = hk.forward(lm, chats(SEEN), logits="last")
    prompted = hk.forward(lm, chats(SEEN, "tea"), logits="last")
    rows = [{"edit": "system prompt", "dose": None, "kl": rises(before, prompted)["kl"].mean()}]
    for dose in DOSES:
        steered = hk.forward(lm, chats(SEEN), vector.steer(dose=dose), logits="last")
        rows.append({"edit": "vector", "dose": dose, "kl": rises(before, steered)["kl"].mean()})
    table = pd.DataFrame(rows)
    results.table("doses", table, caption="Mean KL of the next token (nats), on other questions.")
    vectors: Any = table[table["edit"] == "vector"]
    return float(vectors.loc[(vectors["kl"] - table["kl"].iloc[0]).abs().idxmin(), "dose"])


def measure(lm: hk.LM, vector: hk.Vector, dose: float) -> pd.DataFrame:
    """One row for each question, edit and draw of a control."""
    plain = chats(QUESTIONS)
    before = hk.forward(lm, plain, logits="last")
    runs = {
        ("system prompt", -1): hk.forward(lm, chats(QUESTIONS, "tea"), logits="last"),
        ("vector", -1): hk.forward(lm, plain, vector.steer(dose=dose), logits="last"),
    }
    for draw_number, thing in enumerate(OTHERS[:DRAWS]):
        other = hk.forward(lm, chats(QUESTIONS, thing), logits="last")
        runs["another system prompt", draw_number] = other
        random = vector.random(seed=draw_number).steer(dose=dose)
        runs["a random vector", draw_number] = hk.forward(lm, plain, random, logits="last")
    parts = []
    for (edit, draw_number), run in runs.items():
        parts.append(rises(before, run).assign(edit=edit, draw=draw_number, dose=dose))
    return pd.concat(parts, ignore_index=True)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """The mean rise under each edit, beside its control, and the interval of the difference."""
    edits: Any = table[table["draw"] < 0].pivot(index="row", columns="edit", values="log10_rise")
    gap = pd.DataFrame({"row": edits.index, "gap": edits["vector"] - edits["system prompt"]})
    between = hk.stats.mean_over_prompts(gap.assign(edit=""), by=["edit"], values=["gap"]).iloc[0]
    rows = []
    for edit, control in CONTROL_OF.items():
        own: Any = table[table["edit"] == edit].set_index("row")
        draws: Any = table[table["edit"] == control]
        gains = draws.assign(
            gain=own["log10_rise"].loc[draws["row"]].to_numpy() - draws["log10_rise"]
        )
        gain = hk.stats.mean_over_prompts(gains, by=["edit"], values=["gain"]).iloc[0]
        by_draw = draws.groupby("draw")["log10_rise"].mean()
        row = {"edit": edit, "control": control, "n": len(own), "draws": len(by_draw)}
        row |= {
            "rank_before": own["rank_before"].median(),
            "rank_after": own["rank_after"].median(),
        }
        row |= {"kl": own["kl"].mean(), "log10_rise": own["log10_rise"].mean()}
        row |= {"control_rise": by_draw.mean(), "control_largest": by_draw.max()}
        row |= {name: gain[name] for name in ("gain", "gain_low", "gain_high")}
        row |= {f"vector_minus_prompt{end}": between[f"gap{end}"] for end in ("", "_low", "_high")}
        rows.append(row)
    return pd.DataFrame(rows)


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["means"]
    working, sentences = [], []
    for row in table.to_dict("records"):
        is_beyond = row["gain_low"] > 0 and row["log10_rise"] > row["control_largest"]
        working += [row["edit"]] if is_beyond else []
        verdict = "further than under" if is_beyond else "not further than under each of"
        sentences.append(
            f"Under the {row['edit']} the median rank of “ tea” goes from {row['rank_before']:g} "
            f"to {row['rank_after']:g}, a mean rise of {row['log10_rise']:+.2f} in log10, "
            f"{verdict} {row['draws']} draws of its control ({row['control']}: "
            f"{row['control_rise']:+.2f} on average, {row['control_largest']:+.2f} at most; "
            f"difference {row['gain']:+.2f} [{row['gain_low']:+.2f}, {row['gain_high']:+.2f}])"
        )
    first = table.iloc[0]
    low, high = first["vector_minus_prompt_low"], first["vector_minus_prompt_high"]
    verdict = "Neither works: none is beyond its control"
    if len(working) == 1:
        verdict = f"Only the {working[0]} is beyond its control"
    elif working and low > 0:
        verdict = "The vector, and both are beyond their controls"
    elif working and high < 0:
        verdict = "The system prompt, and both are beyond their controls"
    elif working:
        verdict = "No difference is shown: both are beyond their controls"
    return (
        f"{verdict}, over {first['n']} questions. {'. '.join(sentences)}. The vector's rise minus "
        f"that of the system prompt is {first['vector_minus_prompt']:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]."
    )


def draw(table: pd.DataFrame) -> Any:
    """The mean rise under each edit, and under each draw of its control."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2), layout="constrained")
    axes = figure.subplots()
    means: Any = table.groupby(["edit", "draw"])["log10_rise"].mean()
    for height, (edit, control) in enumerate(CONTROL_OF.items()):
        draws = means[control]
        axes.plot(draws, [height] * len(draws), "o", color="#8a8f98", alpha=0.6, markersize=5)
        axes.plot(means[edit], [height], "D", color="#c2410c", markersize=8)
    axes.axvline(0, color="#8a8f98", linewidth=0.8)
    axes.set_yticks(range(len(CONTROL_OF)), list(CONTROL_OF))
    axes.set_ylim(-0.6, len(CONTROL_OF) - 0.4)
    axes.set_xlabel("log10 (rank before / rank after) of “ tea”")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def read_aloud(lm: hk.LM, vector: hk.Vector, dose: float, results: hk.types.Record) -> None:
    results.text("# What is answered without the beginning")
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "logits": False}
    two = QUESTIONS[:2]
    answers = {
        "nothing": hk.generate(lm, chats(two, answer=""), **settings),
        "system prompt": hk.generate(lm, chats(two, "tea", answer=""), **settings),
        "vector": hk.generate(lm, chats(two, answer=""), vector.steer(dose=dose), **settings),
    }
    rows = []
    for edit, run in answers.items():
        for question, text in zip(two, run.generated, strict=True):
            rows.append({"edit": edit, "question": question, "answer": text})
    results.table("answers", pd.DataFrame(rows), caption="Greedy answers of 24 tokens.")


if __name__ == "__main__":
    main()
