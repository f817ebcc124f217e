"""Does attribution, one backward for all places, tell what patching tells, one forward for each?

On pairs of indirect-object sentences every place is patched, and estimated by its gradient: the
residual stream and what attention and MLPs write, at four positions, and every head, its query and
its key. It is answered by how alike both are (Pearson, Spearman, signs, and the ten largest), for
the plain gradient, for one that is integrated over the embeddings, for queries and keys taken
through their own softmax, and for edges from heads to the logits, which path patching gives
exactly.

python -m experiments.attribution        some minutes on two cores; writes results/attribution/
"""

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import MUTED, UP, apply_style

SEED, COUNT = 0, 12  # pairs
STEPS = 5  # of the integrated gradients
STREAM = ["resid_pre", "attn_out", "mlp_out"]
WAYS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "integrated": {"method": "integrated", "steps": STEPS},
}
SOFTMAX: dict[str, dict[str, Any]] = {"qk_fix": {"method": "qk_fix"}}
QUESTION = (
    "Does attribution, one backward for all places, tell what patching tells, one forward for each?"
)


def main() -> None:
    lm = hk.load(device="cpu")
    pairs = hk.datasets.indirect_object(lm, COUNT, seed=SEED).solved(lm)
    with hk.record(
        "results/attribution", title="Attribution", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        found = [*places(lm, pairs, results), *edges(lm, pairs, results)]
        table: Any = pd.concat(found, ignore_index=True)
        results.text("# How alike")
        caption = (
            "cells: of each pair by itself, or means over the pairs. 1 is the same; the last two "
            "are shares."
        )
        results.table("agreement", table.round(3), caption=caption)
        results.answer(answer({"agreement": pd.read_csv(results.folder / "agreement.csv")}))
    print(table.round(3).to_string(index=False))


def answer(tables: Mapping[str, pd.DataFrame]) -> str:
    """The answer, from the table that was written."""
    table = tables["agreement"]
    means: Any = table[(table["cells"] == "means") & (table["site"] != "edges to logits")]
    words = []
    for method, rows in means.groupby("method", sort=False):
        worst = rows.loc[rows["same_sign"].idxmin()]
        words.append(
            f"{method}: Pearson {_range(rows['pearson'])}, Spearman {_range(rows['spearman'])}, "
            f"the right sign in {_range(rows['same_sign'])} of the cells (fewest: "
            f"{worst['site']}), {_range(rows['overlap'])} of the ten largest"
        )
    edges: Any = table[table["site"] == "edges to logits"]
    told = [f"{row['method']} {row['pearson']:.2f}" for row in edges.to_dict("records")]
    least: Any = means.groupby("method", sort=False)[["pearson", "same_sign", "overlap"]].min()
    good = least[
        (least["pearson"] >= 0.9) & (least["same_sign"] >= 0.9) & (least["overlap"] >= 0.7)
    ].index.tolist()
    sure = least[least["same_sign"] >= 0.9].index.tolist()
    return (
        f"{'Yes, by ' + ', '.join(good) if good else 'In part: by no method'} at every site "
        f"(Pearson and sign 0.9, seven of the ten largest, or more). Over the means of {COUNT} "
        f"pairs, from the site that is least alike to the most: {'; '.join(words)}. The sign of a "
        f"cell can be relied on (0.9 at every site) with {', '.join(sure) or 'no method'}. Edges "
        f"to the logits, Pearson: {', '.join(told)}."
    )


def _range(values: pd.Series) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def places(lm: hk.LM, pairs: hk.types.Pairs, results: hk.types.Record) -> list[pd.DataFrame]:
    results.text("# Places")
    metric = pairs.metric()
    named = {name: pairs.labels[name] for name in ("IO", "S1", "S2", "end")}
    both = (list(pairs.clean), list(pairs.corrupted))
    found: list[pd.DataFrame] = []
    grids: list[tuple[str, Any, Any, Any]] = [
        ("stream", STREAM, {"pos": named}, WAYS),
        ("heads", ["z"], {}, WAYS),
    ]
    for label, sites, settings, ways in [
        *grids,
        ("queries_and_keys", ["q", "k"], {}, WAYS | SOFTMAX),
    ]:
        started = time.perf_counter()
        truth = hk.patching(lm, *both, sites, metric, **settings)
        seconds = {"patching": time.perf_counter() - started}
        results.figure(
            f"{label}_patched",
            hk.figures.heat_map(truth, title="Patched"),
            caption="What patching gives.",
        )
        for method, way in ways.items():
            started = time.perf_counter()
            estimate = hk.attribution(lm, *both, sites, metric, **settings, **way)
            seconds[method] = time.perf_counter() - started
            caption = f"What attribution makes of it ({method})."
            results.figure(
                f"{label}_{method}",
                hk.figures.heat_map(estimate, title=f"Estimated: {method}"),
                caption=caption,
            )
            results.figure(
                f"{label}_{method}_scatter",
                scatter(estimate, truth, method),
                caption="Each cell, all pairs.",
            )
            found += alike(estimate, truth, method)
        taken = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        results.text(f"Seconds for the {label}: {taken}.")
    return found


def alike(estimate: pd.DataFrame, truth: pd.DataFrame, method: str) -> list[pd.DataFrame]:
    """How alike two tables are, cell by cell and in their means over the pairs."""
    estimate, truth = (
        table if "site" in table else table.assign(site="z") for table in (estimate, truth)
    )
    of_pairs, of_means = (
        (estimate, truth),
        (hk.stats.mean_over_prompts(estimate), hk.stats.mean_over_prompts(truth)),
    )
    both = (("pairs", of_pairs), ("means", of_means))
    return [
        hk.stats.compare_attributions(*tables, by="site").assign(method=method, cells=cells)
        for cells, tables in both
    ]


def edges(lm: hk.LM, pairs: hk.types.Pairs, results: hk.types.Record) -> list[pd.DataFrame]:
    results.text("# Edges from heads to the logits")
    metric = pairs.metric()
    given = (list(pairs.clean), list(pairs.corrupted), metric)
    truth = hk.stats.mean_over_prompts(hk.path_patching(lm, *given, freeze=("z", "mlp_out")))
    found = []
    for method, steps in (("gradient", 1), ("integrated", STEPS)):
        table = hk.edge_attribution(lm, *given, direction="noise", steps=steps)
        results.table(
            f"edges_{method}",
            table.nlargest(20, "logit_diff_delta"),
            caption="The 20 that raise it most.",
        )
        heads: Any = table[(table["receiver"] == "logits") & table["sender"].str.startswith("z.")]
        place = heads["sender"].str.split(".", expand=True)
        estimate = heads.assign(layer=place[1].astype(int), head=place[2].astype(int))
        compared = hk.stats.compare_attributions(estimate, truth)
        found.append(compared.assign(site="edges to logits", method=method, cells="means"))
    return found


def scatter(estimate: pd.DataFrame, truth: pd.DataFrame, method: str) -> Figure:
    one, two = (
        hk.stats.mean_over_prompts(table)["logit_diff_delta"] for table in (estimate, truth)
    )
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color=MUTED, lw=0.8)
    axes.scatter(two, one, s=10, color=UP, alpha=0.6, lw=0)
    axes.set_xlabel("patched: change of the logit difference")
    axes.set_ylabel(f"estimated ({method})")
    return apply_style(figure, "Attribution against patching")


if __name__ == "__main__":
    main()
