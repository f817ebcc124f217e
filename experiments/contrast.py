"""Does contrast with its own prompt without the document make a model follow the document?

A document says a false capital of a country whose capital the model knows. The edit subtracts the
log-probabilities after the question alone from those after the document, `by` times
(context-aware decoding, Shi et al. 2023). It works with a document if the document's answer rises
(in log10 of its rank, over countries), and rises further than with the control: the 95 % intervals
of both lie above 0 at by=1, an amount that was chosen before this run (several had been looked at
on 18 of the countries). The control is the question about another country, the mean over all others
but the one whose capital the document names.

At by=1 the hook itself runs. The other amounts and the controls are computed from the same
log-probabilities by the formula of `hk.away_from`, which is compared with the hook at by=1.

python -m experiments.contrast      two minutes on two cores; writes results/contrast/
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import hookkit as hk

FOLDER = "results/contrast"
QUESTION = (
    "Does contrast with its own prompt without the document make a model follow the document?"
)
AMOUNTS, CHOSEN = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), 1.0
SHIFT = 7  # the false capital is that of the country so many places before
DOCUMENTS = {
    "one sentence": "The capital of {country} is {false}.",
    "a report": (
        "Last year the government of {country} made {false} the capital of the country. The "
        "decision surprised many people. The ministries moved in spring, and the new parliament "
        "was opened in autumn."
    ),
}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "Poland": "Warsaw", "Greece": "Athens", "Egypt": "Cairo", "Russia": "Moscow",
    "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin", "Portugal": "Lisbon",
    "Norway": "Oslo", "Peru": "Lima", "Cuba": "Havana", "Iraq": "Baghdad", "Iran": "Tehran",
    "Syria": "Damascus", "Sweden": "Stockholm", "China": "Beijing", "Belgium": "Brussels",
    "Canada": "Ottawa", "Turkey": "Ankara",
}  # fmt: skip
ARMS = {
    "contrast": "the question alone",
    "control": "the question about another country",
}
COLORS = {"contrast": "#c2410c", "control": "#8a8f98"}


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(FOLDER, title="Contrast with a document", question=QUESTION, lm=lm) as results:
        facts = known_facts(lm)
        alone = logprobs_after(lm, chats(facts))
        parts = [measure(lm, facts, name, alone) for name in DOCUMENTS]
        table = pd.concat(parts, ignore_index=True)
        caption = "The ranks of the document's answer and of the true one; means over draws."
        results.table("countries", by_country(table), caption=caption)
        means = summarize(table)
        results.table("means", means, caption="rise: log10 of the rank without contrast over with.")
        caption = (
            "The rank of the document's answer, a geometric mean over countries with its 95 % "
            "interval; 1 is first."
        )
        results.figure("ranks", draw(means), caption=caption)
        read_aloud(lm, facts, results)
        results.answer(answer({"means": means}))
    print(results.answered)


def chats(facts: pd.DataFrame, document: str = "") -> list[Any]:
    """The question about each country, after a document or alone."""
    prompts = []
    for country, false in zip(facts["country"], facts["false"], strict=True):
        text = document.format(country=country, false=false)
        question = f"What is the capital of {country}?"
        beginning = f"The capital of {country} is"
        prompts.append(hk.chat(user=f"{text} {question}".strip(), assistant=beginning))
    return prompts


def logprobs_after(lm: hk.LM, prompts: list[Any], *hooks: hk.types.Hook) -> Tensor:
    """The log-probabilities of the next token, [row, vocab]."""
    return hk.forward(lm, prompts, *hooks, logits="last").logits[:, -1].float().log_softmax(-1)


def ranks_of(lm: hk.LM, logprobs: Tensor, cities: Sequence[str]) -> np.ndarray:
    """The rank of each row's city."""
    ids = torch.tensor([[lm.token(f" {city}")] for city in cities])
    return (1 + (logprobs > logprobs.gather(1, ids)).sum(1)).numpy()


def known_facts(lm: hk.LM) -> pd.DataFrame:
    """The countries whose capital is one token and comes first without a document."""
    facts: Any = pd.DataFrame({"country": list(CAPITALS), "true": list(CAPITALS.values())})
    one_token = [len(lm.continuation(f" {city}")) == 1 for city in facts["true"]]
    facts = facts[one_token].reset_index(drop=True)
    facts["false"] = ""
    is_known = ranks_of(lm, logprobs_after(lm, chats(facts)), facts["true"]) == 1
    facts = facts[is_known].reset_index(drop=True)
    facts["false"] = np.roll(facts["true"], SHIFT)
    return facts


def contrasted(own: Tensor, source: Tensor, by: float) -> Tensor:
    """The formula of `hk.away_from`."""
    return own + by * (own - source)


def arms(own: Tensor, alone: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """Each arm and amount, with the log-probabilities under it."""
    for by in AMOUNTS:
        yield "contrast", by, contrasted(own, alone, by)
        for shift in range(1, len(alone)):
            if shift != SHIFT:  # that country's own answer is the document's
                yield "control", by, contrasted(own, alone.roll(shift, 0), by)


def measure(lm: hk.LM, facts: Any, name: str, alone: Tensor) -> pd.DataFrame:
    """One row for each country, arm, amount and draw of the control, after one document."""
    prompts = chats(facts, DOCUMENTS[name])
    own = logprobs_after(lm, prompts)
    before = ranks_of(lm, own, facts["false"])
    hooked = logprobs_after(lm, prompts, hk.away_from(chats(facts), by=CHOSEN))
    by_formula = contrasted(own, alone, CHOSEN).log_softmax(-1)
    assert torch.allclose(hooked, by_formula, atol=1e-3), "the hook is not its formula"
    parts = []
    for arm, by, logprobs in arms(own, alone):
        part = facts.assign(document=name, arm=arm, by=by)
        part["rank_document"] = ranks_of(lm, logprobs, facts["false"])
        part["rank_true"] = ranks_of(lm, logprobs, facts["true"])
        part["rise"] = np.log10(before / part["rank_document"])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def by_country(table: Any) -> pd.DataFrame:
    keys = ["document", "arm", "by", "country", "true", "false"]
    table = table[table["by"].isin((0.0, CHOSEN))]
    means = table.groupby(keys, sort=False)[["rank_document", "rank_true"]].mean()
    return means.round(1).reset_index()


def summarize(table: Any) -> pd.DataFrame:
    """The mean over countries of each arm and amount, and the gain over the control."""
    keys = ["document", "arm", "by"]
    table = table.assign(
        log10_rank=np.log10(table["rank_document"]), first=table["rank_document"] == 1.0
    )
    table["first"] = table["first"].astype(float)
    values = ["log10_rank", "rise", "first"]
    rows = table.groupby([*keys, "country"], sort=False)[values].mean().reset_index()
    rows = rows.assign(row=rows["country"])
    control = rows[rows["arm"] == "control"].set_index(["document", "by", "country"])["rise"]
    index = pd.MultiIndex.from_frame(rows[["document", "by", "country"]])
    rows["gain"] = rows["rise"].to_numpy() - control.loc[index].to_numpy()
    means = hk.stats.mean_over_prompts(rows, by=keys, values=[*values, "gain"])
    medians = table.groupby(keys, sort=False)["rank_document"].median().rename("median_rank")
    return means.merge(medians.reset_index(), on=keys)


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    means = tables["means"]
    verdicts, sentences = [], []
    for name in DOCUMENTS:
        arms = means[means["document"] == name].set_index(["arm", "by"])
        own, control = arms.loc[("contrast", CHOSEN)], arms.loc[("control", CHOSEN)]
        verdicts.append(own["rise_low"] > 0 and own["gain_low"] > 0)
        without = arms.loc[("contrast", 0.0), "first"]
        most = arms.loc["contrast"]["first"].idxmax()
        sentences.append(
            f"After {name}, the document's answer is first for {100 * without:.0f} % "
            f"of {own['n']:g} countries without contrast, for {100 * own['first']:.0f} % with "
            f"by={CHOSEN:g} and for {100 * control['first']:.0f} % with the control; it rises by "
            f"{own['rise']:+.2f} [{own['rise_low']:+.2f}, {own['rise_high']:+.2f}] in log10 of its "
            f"rank, {own['gain']:+.2f} [{own['gain_low']:+.2f}, {own['gain_high']:+.2f}] more than "
            f"with the control. It is first most often at by={most:g} "
            f"({100 * arms.loc[('contrast', most), 'first']:.0f} %)"
        )
    verdict = {2: "Yes, with both documents", 1: "With one document only", 0: "No"}[sum(verdicts)]
    return f"{verdict}. {'. '.join(sentences)}."


def draw(means: Any) -> Any:
    """The rank of the document's answer against the amount, for each document."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(DOCUMENTS), sharey=True)
    for axes, name in zip(panels, DOCUMENTS, strict=True):
        for arm, words in ARMS.items():
            part = means[(means["document"] == name) & (means["arm"] == arm)].sort_values("by")
            low, high = 10 ** part["log10_rank_low"], 10 ** part["log10_rank_high"]
            axes.plot(part["by"], 10 ** part["log10_rank"], "o-", color=COLORS[arm], label=words)
            axes.fill_between(part["by"], low, high, color=COLORS[arm], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_title(f"The document is {name}", loc="left", fontsize=10)
        axes.set_xlabel("by")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("rank of the document's answer")
    panels[0].legend(title="contrast with", frameon=False, fontsize=8, title_fontsize=8)
    return figure


def read_aloud(lm: hk.LM, facts: Any, results: hk.types.Record) -> None:
    results.text("# What is written")
    few, rows = facts[:2], []
    alone = chats(few)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "logits": False}
    for name, document in DOCUMENTS.items():
        for by in (0.0, 1.0, 4.0):
            edit = hk.away_from(alone, by=by)
            run = hk.generate(lm, chats(few, document), edit, **settings)
            for country, false, text in zip(
                few["country"], few["false"], run.generated, strict=True
            ):
                rows.append({"document": name, "by": by, "country": country, "false": false,
                             "text": text})  # fmt: skip
    caption = "What follows “The capital of … is”, greedily."
    results.table("texts", pd.DataFrame(rows), caption=caption)


if __name__ == "__main__":
    main()
