"""What moved, and why: how do three edits of three kinds look on one page each?

A token forced at the logits, and the same token steered to inside; two heads that name the indirect
object taken out; a word that the last token may no longer see. Each beside a control. It is
answered if the watched token moves further than under the control, the 95 % intervals over the
prompts lying apart, and each change is the sum of its parts.

python -m experiments.shift_reports        three minutes on two cores; writes results/shift_reports/
"""

from pathlib import Path
from typing import Any

import hookkit as hk

SEED = 0
SHOWN: dict[str, Any] = {"details": 2}  # prompts with tables of their own
FOLDER = Path("results/shift_reports")
COFFEE, TEA = " coffee", " tea"
TEAS = [
    "The English are known for their love of", "He put the kettle on and made some",
    "Sencha is a kind of Japanese", "Every afternoon at five she drinks a cup of green",
    "With the scones they served a pot of",
]  # fmt: skip
LAYER, DOSE = 20, 0.2  # where it is steered, and by how much of the stream's length
DRINKS = [["I drink coffee", "A cup of coffee"], ["I drink tea", "A cup of tea"]]
HEADS = [
    hk.Site("z", 23, 3),
    hk.Site("z", 20, 0),
]  # they name the indirect object, as indirect_object.py finds
OTHER = hk.Site("z", 23, 5)  # a neighbour
GIVEN = ["When Mary and John went to the store, John gave a drink to",
         "When John and Mary went to the park, John gave a book to",
         "After Mary and John left the house, John handed the keys to",
         "While Mary and John worked in the garden, John passed a cup to",
         "When Mary and John met at the station, John showed the letter to"]  # fmt: skip
CITIES = ["The Eiffel Tower is located in the city of", "The Eiffel Tower stands in the centre of",
          "From the top of the Eiffel Tower one can see all of"]  # fmt: skip


def main() -> None:
    lm = hk.load(device="cpu")
    for name, page in (
        ("coffee", coffee(lm)),
        ("indirect_object", indirect_object(lm)),
        ("eiffel", eiffel(lm)),
    ):
        page.write(FOLDER / name)
        print(name, apart(page), f"The page: {FOLDER / name}/report.html", sep="\n", end="\n\n")


def coffee(lm: hk.LM) -> hk.types.Report:
    vector = hk.mean_difference(lm, DRINKS[0], DRINKS[1], f"resid_post.{LAYER}")[0]
    edits: dict[str, Any] = {"forced": hk.force(COFFEE), "steered": vector.steer(dose=DOSE)}
    question = (
        "What does it take to make it say coffee: the logit by force, or the stream by a push?"
    )
    settings: dict[str, Any] = {"watch": (COFFEE, TEA), "generate": 8, "seed": SEED}
    return hk.shift_report(
        lm, TEAS, edits, title="Coffee over tea", question=question,
        **settings, **SHOWN,
    )  # fmt: skip


def indirect_object(lm: hk.LM) -> hk.types.Report:
    question = (
        "How much of “ Mary” is the work of two heads that name her, and what else goes with them?"
    )
    edits = {f"{head} taken out": hk.ablate(head) for head in HEADS}
    settings: dict[str, Any] = {
        "controls": {f"{OTHER} taken out": hk.ablate(OTHER)},
        "heads": True,
        "seed": SEED,
    }
    return hk.shift_report(
        lm, GIVEN, edits, watch=(" Mary", " John"), title="Without the heads that name Mary",
        question=question, **settings, **SHOWN,
    )  # fmt: skip


def eiffel(lm: hk.LM) -> hk.types.Report:
    question = (
        "Does the last token look at “Eiffel” itself, or has the rest of the sentence already "
        "heard of it?"
    )
    every, tower = range(lm.n_layers), hk.at(" Eiffel Tower")
    cuts = {
        f"blind to it from block {start}": hk.knockout(every[start:], query=-1, key=tower)
        for start in (0, 16)
    }
    controls = {"blind to its “ the”": hk.knockout(every, query=-1, key=hk.at(" the", which=-1))}
    return hk.shift_report(
        lm, CITIES, cuts, controls=controls, watch=(" Paris", " London"), seed=SEED,
        title="Paris without the Eiffel Tower", question=question, **SHOWN,
    )  # fmt: skip


def apart(page: hk.types.Report) -> str:
    """Returns the first watched token per edit and control, and the largest error of the sums."""
    summary, why = page.tables["summary"], page.tables["why"]
    first: Any = summary[summary["watched"] == summary["watched"].iloc[0]]
    columns = ["edit", "watched", "logprob_delta", "logprob_delta_low", "logprob_delta_high"]
    rest: Any = why[why["kind"] == "residual"][["logit_before", "logit_after"]]
    missed = rest.abs().to_numpy().max()
    return f"{first[columns].round(2).to_string(index=False)}\nWhat the sums miss: {missed:.1e}"


if __name__ == "__main__":
    main()
