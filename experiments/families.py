"""Which sites has each model family, and do the names mean there what they mean everywhere?

A tiny random model of every family in hookkit's table is made from its configuration class, and the
laws are run on it: a site is proved where all that name it hold in every block tried. It is
answered if nothing is left that is there and not proved, but for the exceptions that the table
gives a reason for.

python -m experiments.families        eight minutes on two cores; writes results/families/
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import transformers
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

import hookkit as hk
from hookkit.figures.style import GRID, INK, PAPER
from hookkit.models.families.encoders import ENCODERS
from hookkit.models.families.table import FAMILIES, RECENT
from hookkit.models.sites import STACKS
from hookkit.models.tiny_settings import ENCODER_DECODERS, MULTIMODAL

MODEL_TYPES = (*FAMILIES, *MULTIMODAL, *ENCODER_DECODERS, *ENCODERS)

STATES = {  # and the colour of each
    "proved": "#3b7a57",
    "proved, in some blocks": "#8fbf9f",
    "proved, with an exception": "#d9a441",
    "not there": GRID,
    "not proved": "#c0392b",
}


def main() -> None:
    question = "Which sites has each model family, and are their meanings proved?"
    with hk.record("results/families", title="Model families", question=question) as results:
        checked = {
            model_type: hk.doctor(hk.tiny(model_type))
            for model_type in tqdm(MODEL_TYPES, disable=None)
        }
        table = pd.concat([rows_of(model_type, checkup) for model_type, checkup in checked.items()])
        summary = summed(table, checked)
        results.text(
            f"{len(MODEL_TYPES)} model types of transformers {transformers.__version__}, each as "
            f"a random model of two to four blocks in float32: {len(FAMILIES)} decoders, of which "
            f"the first {len(RECENT)} are those since the end of 2024, {len(MULTIMODAL)} that read "
            f"images or sound too, {len(ENCODER_DECODERS)} encoder-decoders, and {len(ENCODERS)} "
            "masked models. An encoder, or a tower that reads images or sound, has a row of its "
            "own, and is tried with such prompts; its text model is tried with text. The largest "
            "difference is a part of the largest value at the site, over all laws that compare two "
            "ways to compute it."
        )
        grid = table.pivot(index="model_type", columns="site", values="state")
        states = grid.loc[table["model_type"].unique(), table["site"].unique()].reset_index()
        results.answer(answer({"sites": states, "families": summary}))
        results.figure("coverage", coverage(table), caption="Family by site.")
        results.table("families", summary, caption="One row for each model type.")
        reasons = table.query("state != 'proved'").groupby(["state", "reason"], sort=False)
        why = reasons.agg(sites=("site", joined), model_types=("model_type", joined)).reset_index()
        results.table("reasons", why, caption="Why a site is not there, or not everywhere.")
        results.table("sites", states, caption="Every family and site.")
    print(summary.to_string(index=False))
    print(f"\n{results.answered}\nThe page: results/families/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    states = tables["sites"].drop(columns="model_type").stack().dropna()
    families = tables["families"]
    n_absent, n_unproved = (states == "not there").sum(), (states == "not proved").sum()
    n_there = len(states) - n_absent
    verdict = "Yes, all of them are proved" if n_unproved == 0 else "Not all of them are proved"
    return (
        f"{verdict}: {n_there - n_unproved:,} of the {n_there:,} sites that {len(families)} model "
        f"families have. Of these, {(states == 'proved, in some blocks').sum()} are in some blocks "
        f"only, and {(states == 'proved, with an exception').sum()} have an exception, for which "
        f"the table gives the reason. A family has {families['sites'].min()} to "
        f"{families['sites'].max()} sites; {n_absent} combinations of a family and a site do not "
        "exist."
    )


def rows_of(model_type: str, checkup: hk.types.Checkup) -> pd.DataFrame:
    """The sites of one model; those of an encoder or of a tower have a model type of their own."""
    laws: list[dict[str, Any]] = checkup.laws.to_dict(orient="records")
    excused = {law["site"]: law["note"] for law in laws if law["note"].startswith("exception: ")}
    rows = []
    for row in checkup.sites.to_dict(orient="records"):
        site, blocks = row["site"], row["blocks"]
        state, reason = "proved", ""
        if not blocks:
            state, reason = "not there", row["why"]
        elif not (row["proved"] and row["editable"]):
            state, reason = "not proved", row["why"]
        elif site in excused:
            state, reason = "proved, with an exception", excused[site].removeprefix("exception: ")
        elif blocks != "once" and len(set(blocks.split(" of "))) > 1:
            state = "proved, in some blocks"
            reason = next(
                note for note in checkup.notes if note.startswith(f"{site} is not in")
            ).partition(": ")[2]
        stack, _, name = site.rpartition(".")
        part = f"{model_type} ({stack})" if stack else model_type
        rows.append((part, name, state, blocks, row["difference"], reason))
    return pd.DataFrame(
        rows, columns=["model_type", "site", "state", "blocks", "difference", "reason"]
    )


def joined(names: pd.Series) -> str:
    return ", ".join(dict.fromkeys(names))


def summed(table: pd.DataFrame, checked: dict[str, hk.types.Checkup]) -> pd.DataFrame:
    rows = []
    for model_type in table["model_type"].unique():
        found = [row for row in table.to_dict(orient="records") if row["model_type"] == model_type]
        there = [row for row in found if row["state"] != "not there"]
        proved = sum(row["state"].startswith("proved") for row in there)
        whole, _, stack = model_type.removesuffix(")").partition(" (")
        laws = []
        for law in checked[whole].laws.to_dict(orient="records"):
            prefix, _, name = law["site"].rpartition(".")
            if stack in (prefix, name) or (not stack and not prefix and name not in STACKS):
                laws.append(law)
        holds = [law["holds"] or law["note"].startswith("exception: ") for law in laws]
        largest = max(row["difference"] for row in there)
        rows.append((model_type, len(there), proved, len(holds), sum(holds), largest))
    columns = ["model_type", "sites", "proved", "laws tried", "laws hold", "largest difference"]
    return pd.DataFrame(rows, columns=columns)


def coverage(table: pd.DataFrame) -> Figure:
    states = [*STATES]
    grid = table.assign(number=table["state"].map(states.index))
    grid = grid.pivot_table(index="model_type", columns="site", values="number", sort=False)
    figure, axes = plt.subplots(figsize=(9.5, 0.21 * len(grid) + 1.6), layout="constrained")
    axes.pcolormesh(
        grid,
        cmap=ListedColormap([*STATES.values()]),
        vmin=0,
        vmax=len(states),
        edgecolors=PAPER,
        lw=1,
    )
    axes.set_xticks(
        [x + 0.5 for x in range(grid.shape[1])],
        grid.columns,
        rotation=60,
        ha="left",
        rotation_mode="anchor",
    )
    axes.set_yticks([y + 0.5 for y in range(len(grid))], grid.index)
    axes.tick_params(
        length=0,
        labelsize=8,
        labelcolor=INK,
        top=True,
        labeltop=True,
        bottom=False,
        labelbottom=False,
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    used = [state for state in states if state in table["state"].tolist()]
    handles = [Patch(color=STATES[state], label=state) for state in used]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    return figure


if __name__ == "__main__":
    main()
