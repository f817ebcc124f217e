"""How faithful are circuits on the tasks and models of the Mechanistic Interpretability Benchmark?

MIB (Mueller et al. 2025, arXiv 2504.13151) measures circuits by CPR, the area under the curve of
their faithfulness over ten sizes (higher is better), and CMD, the area between it and 1 (lower is
better). Here a model's edges are scored by one scorer on the task's train split, circuits are
measured on its validation split, and the numbers stand beside those of the paper. As in MIB's code,
edges are ranked by how much the metric needs them, and the metric is the difference of two logits.

python -m experiments.mib --model gpt2 --task ioi --scorer EAP-IG-inputs --pairs 100
    needs the Hugging Face Hub and .[experiments] with datasets; writes results/mib_TASK_MODEL/
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

import hookkit as hk
from hookkit.errors import Unsupported

QUESTION = "How faithful are circuits on MIB's task {task} in {model}?"
MODELS = {
    "gpt2": "openai-community/gpt2",
    "qwen2.5": "Qwen/Qwen2.5-0.5B",
    "gemma2": "google/gemma-2-2b",
    "llama3": "meta-llama/Llama-3.1-8B",
}
# The data set on the Hub, its configuration, and the column of the corrupted prompt
TASKS: dict[str, tuple[str, str | None, str]] = {
    "ioi": ("mib-bench/ioi", None, "s2_io_flip_counterfactual"),
    "mcqa": ("mib-bench/copycolors_mcqa", "4_answer_choices", "symbol_counterfactual"),
    "arc_easy": ("mib-bench/arc_easy", None, "symbol_counterfactual"),
    "arc_challenge": ("mib-bench/arc_challenge", None, "symbol_counterfactual"),
    "arithmetic_addition": ("mib-bench/arithmetic_addition", None, "random_counterfactual"),
    "arithmetic_subtraction": ("mib-bench/arithmetic_subtraction", None, "random_counterfactual"),
}
OPERATORS = {"arithmetic_addition": "+", "arithmetic_subtraction": "-"}
SCORERS: dict[str, Callable[..., pd.DataFrame]] = {
    "EAP": hk.edge_attribution,
    "EAP-IG-inputs": lambda *pairs: hk.edge_attribution(*pairs, method="integrated"),
    "EAP-IG-activations": lambda *pairs: hk.edge_attribution(
        *pairs, method="integrated_activations"
    ),
    "mask": hk.edge_mask,
}
# CPR and CMD of the paper, for what is known here
PUBLISHED = pd.DataFrame(
    [
        ("ioi", "gpt2", "random", 0.25, 0.75),
        ("ioi", "gpt2", "EAP", 1.20, None),
        ("ioi", "gpt2", "EAP-IG-inputs", 1.85, 0.03),
        ("ioi", "qwen2.5", "EAP-IG-inputs", 1.63, None),
        ("ioi", "gemma2", "EAP-IG-inputs", 3.20, None),
        ("ioi", "llama3", "EAP-IG-inputs", 2.08, None),
    ],
    columns=["task", "model", "circuit", "cpr_paper", "cmd_paper"],
)
Example = tuple[str, str, str, str]  # clean, corrupted, right, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--task", choices=TASKS, default="ioi")
    parser.add_argument("--scorer", choices=SCORERS, default="EAP-IG-inputs")
    parser.add_argument("--pairs", type=int, default=100)
    chosen = parser.parse_args()
    train, validation = (read_rows(chosen.task, split) for split in ("train", "validation"))
    lm = hk.load(MODELS[chosen.model])
    folder = f"results/mib_{chosen.task}_{chosen.model}"
    question = QUESTION.format(task=chosen.task, model=chosen.model)
    with hk.record(folder, title="MIB", question=question, lm=lm) as results:
        curve, areas = measure(lm, chosen.task, chosen.scorer, train, validation, chosen.pairs)
        table = beside_paper(areas, chosen.task, chosen.model, chosen.scorer)
        results.table("curve", curve, caption="Faithfulness of each circuit.")
        results.table("areas", table, caption="CPR and CMD, and those of the paper.")
        results.answer(answer({"areas": table}))
    print(table.round(3).to_string(index=False))


def read_rows(task: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a split on the Hub. Raises `Unsupported` without it."""
    name, configuration, _ = TASKS[task]
    try:
        return importlib.import_module("datasets").load_dataset(name, configuration, split=split)
    except Exception as error:  # the Hub's client has many classes of errors
        raise Unsupported(
            f"MIB's data {name!r} is on the Hugging Face Hub, which is needed here, with the "
            f"package datasets (pip install datasets) and run as python -m experiments.mib: {error}"
        ) from error


def examples(task: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """The prompts and answers of a task, as in MIB's code."""
    column = TASKS[task][2]
    for row in rows:
        other = row[column]
        if other is None or other["prompt"] is None:
            continue
        if task == "ioi":
            names = row["metadata"]
            right, wrong = f" {names['indirect_object']}", f" {names['subject']}"
        elif task in OPERATORS:
            if row["operator"] != OPERATORS[task]:
                continue
            right, wrong = str(row["label"]), str(other["label"])
        else:
            right = str(row["choices"]["label"][row["answerKey"]])
            wrong = str(other["choices"]["label"][other["answerKey"]])
        yield row["prompt"], other["prompt"], right, wrong


def select_pairs(lm: hk.LM, task: str, rows: Iterable[Mapping[str, Any]], count: int) -> Any:
    """The first pairs whose prompts have equally many tokens, and so their answers, of which the
    first token counts. (In arithmetic, answers are one token.)"""
    clean, corrupted, right, wrong = [], [], [], []
    for prompt, other, *answers in examples(task, rows):
        one, two = (lm.tokenizer(text).input_ids for text in (prompt, other))
        ids = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in answers]
        is_pair = len(one) == len(two) and one != two and len(ids[0]) == len(ids[1])
        if not is_pair or (task in OPERATORS and len(ids[0]) > 1):
            continue
        for values, value in zip(
            (clean, corrupted, right, wrong), (one, two, ids[0][0], ids[1][0]), strict=True
        ):
            values.append(value)
        if len(clean) == count:
            break
    if not clean:
        raise Unsupported(f"no pair of {task} has prompts and answers of equal length in tokens")
    return clean, corrupted, hk.metrics.logit_diff(right, wrong)


def measure(
    lm: hk.LM,
    task: str,
    scorer: str,
    train: Iterable[Mapping[str, Any]],
    validation: Iterable[Mapping[str, Any]],
    count: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curve of the circuits of one scorer, and its areas."""
    scores = SCORERS[scorer](lm, *select_pairs(lm, task, train, count))
    column = scores.columns[2]
    if column != "mask":  # the lowest is needed most, and MIB's code ranks by the sign
        scores[column] = scores[column].max() - scores[column]
    clean, corrupted, metric = select_pairs(lm, task, validation, count)
    result = hk.faithfulness(lm, clean, corrupted, scores, metric, draws=1)
    return result.table, result.areas


def beside_paper(areas: pd.DataFrame, task: str, model: str, scorer: str) -> pd.DataFrame:
    areas = areas.replace({"circuit": {"circuit": scorer}})
    published = PUBLISHED[(PUBLISHED["task"] == task) & (PUBLISHED["model"] == model)]
    return areas.merge(published.drop(columns=["task", "model"]), on="circuit", how="left")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    sentences = []
    for row in tables["areas"].to_dict("records"):
        paper = "" if pd.isna(row["cpr_paper"]) else f" (in the paper {row['cpr_paper']:.2f})"
        sentences.append(f"{row['circuit']}: CPR {row['cpr']:.2f}{paper}, CMD {row['cmd']:.2f}")
    return f"By the areas of their curves, these circuits have {'; '.join(sentences)}."


if __name__ == "__main__":
    main()
