"""Does the default model solve the datasets that ship?

Pairs of every dataset in its default configuration, and the other way to corrupt the indirect
objects. A pair is solved where the answer's logit is above that of the wrong answer after the clean
prompt. A dataset is fit to be patched on if at least nine of ten pairs are solved, and if the
corrupted prompts take the difference away or turn it round.

python -m experiments.datasets    a quarter of an hour on two busy cores; writes results/datasets/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

import hookkit as hk
from hookkit.figures.style import DOWN, INK, MUTED, UP, apply_style

SEED = 0
N = 100  # pairs of each dataset
MADE = {
    "indirect_object": hk.datasets.indirect_object,
    "indirect_object, abc": lambda lm, n, seed: hk.datasets.indirect_object(
        lm, n, seed=seed, corrupt="abc"
    ),
    "greater_than": hk.datasets.greater_than,
    "successor": hk.datasets.successor,
    "induction": hk.datasets.induction,
    "capitals": hk.datasets.capitals,
    "landmarks": hk.datasets.landmarks,
}


def main() -> None:
    lm = hk.load(device="cpu")
    question = "Does the default model solve the datasets that ship?"
    with hk.record(
        "results/datasets", title="Datasets", question=question, lm=lm, seed=SEED
    ) as results:
        pairs = {name: make(lm, N, seed=SEED) for name, make in MADE.items()}
        checks = {name: pairs[name].check(lm) for name in tqdm(pairs, disable=None)}
        table = pd.DataFrame([summed(name, pairs[name], checks[name]) for name in pairs])
        results.text(
            "accuracy: the part of the pairs whose answer has a larger logit than the wrong answer "
            "after the clean prompt. top1: whose answer is the most likely of all tokens; many "
            "years are right in greater_than. diff: logit of the answer minus that of the wrong "
            "one, mean and 5th percentile; diff_corrupted: its mean after the corrupted prompt; "
            "turned: the part of the pairs where it is below 0 there. prompts: how many of the "
            "clean prompts differ. Templates, and for landmarks the subjects, were chosen with "
            "this model in view: the numbers say that the model is fit for the datasets, not how "
            "much it knows."
        )
        results.table("table", table, caption=f"{N} pairs of each dataset.")
        results.figure(
            "figure",
            distribution(checks),
            caption="After clean prompts in green, corrupted in red.",
        )
        results.table(
            "examples",
            examples(lm, pairs),
            caption="The first pair of each dataset, and where its labels are.",
        )
        missed = pd.concat(
            [missed_of(name, pairs[name], checks[name]) for name in pairs], ignore_index=True
        )
        results.answer(answer({"table": table}))
        if len(missed):
            results.table("missed", missed, caption="The pairs that are not solved.")
    print(table.to_string(index=False))
    print("\nThe page: results/datasets/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["table"]
    pairs = table["pairs"].sum()
    solved = round((table["accuracy"] * table["pairs"]).sum())
    turned = round((table["turned"] * table["pairs"]).sum())
    least = table.loc[table["turned"].idxmin()]
    verdict = "Yes" if (table["accuracy"] >= 0.9).all() else "Not all of them"
    return (
        f"{verdict}: {solved} of {pairs} pairs are solved, at least {table['accuracy'].min():.0%} "
        f"of each dataset. After the corrupted prompts the model prefers the wrong answer in "
        f"{turned} of {pairs} pairs; in {least['dataset']!r} in {least['turned']:.0%}."
    )


def summed(name: str, pairs: hk.types.Pairs, check: pd.DataFrame) -> dict[str, object]:
    clean, corrupted = check["logit_diff_clean"], check["logit_diff_corrupted"]
    numbers = {
        "accuracy": check["right"].mean(),
        "top1": check["is_top1"].mean(),
        "diff": clean.mean(),
        "diff_p5": clean.quantile(0.05),
        "diff_corrupted": corrupted.mean(),
        "turned": (corrupted < 0).mean(),
    }
    rounded = {column: round(float(number), 3) for column, number in numbers.items()}
    return {
        "dataset": name,
        "pairs": len(pairs),
        "prompts": len(dict.fromkeys(pairs.clean)),
        **rounded,
    }


def examples(lm: hk.LM, made: dict[str, hk.types.Pairs]) -> pd.DataFrame:
    rows = []
    for name, pairs in made.items():
        texts = [
            lm.text(prompt) if isinstance(prompt, tuple) else str(prompt)
            for prompt in (pairs.clean[0], pairs.corrupted[0])
        ]
        labels = ", ".join(f"{label} {places[0]}" for label, places in pairs.labels.items())
        rows.append((name, *texts, pairs.answers[0], pairs.wrong[0], labels))
    return pd.DataFrame(
        rows, columns=["dataset", "clean", "corrupted", "answer_token", "wrong_token", "labels"]
    )


def missed_of(name: str, pairs: hk.types.Pairs, check: pd.DataFrame) -> pd.DataFrame:
    table = pairs.to_frame()[["clean", "answer_token", "wrong_token"]].assign(
        logit_diff=check["logit_diff_clean"].round(3), rank=check["rank_clean"], dataset=name
    )
    columns = ["dataset", "clean", "answer_token", "wrong_token", "logit_diff", "rank"]
    return pd.DataFrame(table.loc[~check["right"], columns])


def distribution(checks: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(8, 0.85 * len(checks) + 1), layout="constrained")
    rows = figure.subplots(len(checks), 1, sharex=True)
    both = {"clean": UP, "corrupted": DOWN}
    found: list[float] = [
        diff for check in checks.values() for side in both for diff in check[f"logit_diff_{side}"]
    ]
    bins = [step / 2 for step in range(2 * int(min(found)) - 2, 2 * int(max(found)) + 4)]
    for axes, (name, check) in zip(rows, checks.items(), strict=True):
        for side, colour in both.items():
            diffs = check[f"logit_diff_{side}"]
            axes.hist(
                diffs, bins=bins, color=colour, alpha=0.55, lw=0, label=f"after {side} prompts"
            )
        axes.axvline(0, color=MUTED, lw=0.8)
        solved = f"{name.replace('_', ' ')}\n{check['right'].mean():.1%} solved"
        axes.set_ylabel(solved, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.tick_params(length=0)
    rows[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    rows[-1].set_xlabel(
        "logit of the answer minus logit of the wrong answer; right of 0 the answer is preferred"
    )
    return apply_style(figure, f"How clearly the model prefers the answer, over {N} pairs each")


if __name__ == "__main__":
    main()
