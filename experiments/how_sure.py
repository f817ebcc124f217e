"""Can one see from a single forward whether the model's answer is right?

Of each answer only the next-token distribution is looked at: its entropy, margins, first
probabilities. A router, a logistic regression on these numbers, is trained on some subjects and
asked about others. The answer is yes if right and wrong answers are told apart clearly better than
by chance (area under the ROC curve above 0.7). The router earns its place if it orders or
calibrates them better than the first token's probability, or a regression on that one number.

python -m experiments.how_sure
    two minutes on two busy cores; writes results/how_sure/; needs .[experiments]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hookkit as hk

QUESTION, SEED = "Can one see from a single forward whether the model's answer is right?", 0
TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. When I was a child, my "
    "grandmother told me that one should never put milk in green tea. She lived in New York, on "
    "the third floor of a house with a red door."
)
DATASETS = {
    "indirect_object": 60,
    "successor": 60,
    "induction": 90,
    "capitals": 240,
    "landmarks": 240,
}  # pairs drawn
NUMBERS = [
    "entropy",
    "varentropy",
    "margin",
    "prob_margin",
    "top1_prob",
    "top2_prob",
    "log_nucleus_90",
]
FOLDS = 5
# Names of scores in the figure
SHORT: dict[Any, str] = {
    "router, unseen dataset": "unseen dataset",
    "router of one number": "one number",
}


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record(
        "results/how_sure", title="How sure?", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        scenarios(lm, results)
        answers = pd.concat(
            [answered(lm, name, n) for name, n in DATASETS.items()], ignore_index=True
        )
        by: Any = answers.groupby("dataset", sort=False)
        counts = (
            by[["right", "top1_prob", "entropy"]]
            .mean()
            .round(3)
            .assign(answers=by.size())
            .reset_index()
        )
        results.table(
            "datasets",
            counts,
            caption="Each prompt once; right: the likeliest token is the answer.",
        )
        results.table(
            "answers",
            answers.round(6),
            caption="Each answer with the numbers that the router sees.",
        )
        summary = judged(answers, results)
    print(summary.to_string(index=False))
    print("\nThe page: results/how_sure/report.html")


def scenarios(lm: hk.LM, results: hk.types.Record) -> None:
    run = results.run("text", hk.forward(lm, TEXT))
    sure: Any = hk.uncertainty(run)
    ids = run.tokens[0].tolist()
    sure.insert(2, "before", [repr(lm.text(ids[max(0, pos - 4) : pos + 1])) for pos in sure["pos"]])
    sure["came"] = [*hk.surprisal(run)["token"], ""]
    shown = [
        "pos",
        "before",
        "top1",
        "top1_prob",
        "top2",
        "top2_prob",
        "entropy",
        "nucleus_90",
        "scenario",
        "came",
    ]
    kinds = sure.sort_values("top1_prob", ascending=False).groupby("scenario", sort=False)
    first: Any = pd.concat([part.head(4) for _, part in kinds])
    results.text(f"“{TEXT}” has {len(ids)} positions: {sure['scenario'].value_counts().to_dict()}.")
    results.table(
        "scenarios",
        first[shown].round(3),
        caption="Four positions of each kind, and the token that came.",
    )


def answered(lm: hk.LM, name: str, n: int) -> pd.DataFrame:
    pairs = getattr(hk.datasets, name)(lm, n, seed=SEED)
    once = {
        prompt: lm.token(answer) for prompt, answer in zip(pairs.clean, pairs.answers, strict=True)
    }
    run = hk.forward(lm, list(once), logits="last")
    table: Any = hk.uncertainty(run).assign(
        dataset=name, answer=list(map(lm.string, once.values()))
    )
    table["right"] = hk.ranks(run, top=1)["token_id"].to_numpy() == list(once.values())
    table["log_nucleus_90"] = np.log(table["nucleus_90"])
    return table[["dataset", "row", "answer", "top1", "right", *NUMBERS]]


def judged(answers: pd.DataFrame, results: hk.types.Record) -> pd.DataFrame:
    right, numbers = answers["right"].to_numpy(), answers[NUMBERS].to_numpy()
    router: Any = make_pipeline(StandardScaler(), LogisticRegression())
    # An answer that is asked about is not among those trained on
    told = answers["dataset"] + answers["answer"]
    first = answers[["top1_prob"]].to_numpy()
    folds: Any = {
        "router": (numbers, GroupKFold(FOLDS), told),
        "router, unseen dataset": (numbers, LeaveOneGroupOut(), answers["dataset"]),
        "router of one number": (first, GroupKFold(FOLDS), told),
    }
    scores = {
        name: np.asarray(
            cross_val_predict(router, given, right, groups=groups, cv=split, method="predict_proba")
        )[:, 1]
        for name, (given, split, groups) in folds.items()
    }
    scores |= {"top-1 probability": first[:, 0], "minus entropy": -answers["entropy"].to_numpy()}
    curves = {name: hk.stats.roc(score, right) for name, score in scores.items()}
    tables = {
        name: hk.stats.calibration(score, right)
        for name, score in scores.items()
        if score.min() >= 0
    }
    rows = [
        {"score": name, "auc": curve.attrs["auc"], "auc_within": within(answers, scores[name])}
        | {"ece": tables[name].attrs["ece"] if name in tables else None}
        for name, curve in curves.items()
    ]
    caption = (
        "auc: area under the ROC curve; auc_within: its mean over the datasets, each alone; ece: "
        "calibration error."
    )
    summary = results.table("summary", pd.DataFrame(rows).round(3), caption=caption)
    title = f"Right and wrong answers told apart: {len(right)} answers, {right.mean():.0%} right"
    shown: dict[Any, Any] = {SHORT.get(name, name): curve for name, curve in curves.items()}
    results.figure("roc", hk.figures.roc_curves(shown, title=title))
    for file, name in {
        "reliability_model": "top-1 probability",
        "reliability_router": "router",
    }.items():
        results.figure(
            file, hk.figures.reliability_diagram(tables[name], title=f"Confidence: {name}")
        )
    router.fit(numbers, right)
    weights = pd.DataFrame({"number": NUMBERS, "weight": router[-1].coef_[0].round(3)})
    results.table(
        "weights",
        weights,
        caption="What the router adds up; each number in its standard deviations.",
    )
    results.answer(answer({"summary": summary}))
    return summary


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["summary"].set_index("score")
    areas, errors = table["auc"], table["ece"]
    first, one, unseen = "top-1 probability", "router of one number", "router, unseen dataset"
    verdict = "Yes" if areas[first] > 0.7 else "No"
    gain = "orders them no better"
    if areas["router"] - areas[first] >= 0.01:
        gain = "orders them better"
    return (
        f"{verdict}: the probability of the first token alone tells right from wrong answers, with "
        f"an area under the ROC curve of {areas[first]:.3f} (chance is 0.5). A router of "
        f"{len(NUMBERS)} numbers {gain} ({areas['router']:.3f}). As a probability of being right "
        f"the first token's is off by {errors[first]:.3f} on average (expected calibration error), "
        f"the router's by {errors['router']:.3f}, and a regression on the first probability alone "
        f"by {errors[one]:.3f}. On a dataset that it never saw, the router has an area of "
        f"{areas[unseen]:.3f} and an error of {errors[unseen]:.3f}."
    )


def within(answers: pd.DataFrame, score: np.ndarray) -> float:
    """The mean area over the datasets, each alone: no credit for telling the datasets apart."""
    right = answers["right"].to_numpy()
    parts = [
        part for part in answers.groupby("dataset").indices.values() if 0 < right[part].mean() < 1
    ]
    return float(np.mean([hk.stats.roc(score[part], right[part]).attrs["auc"] for part in parts]))


if __name__ == "__main__":
    main()
