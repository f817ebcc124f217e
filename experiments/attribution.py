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
from hookkit.figures.style import LINES, MUTED, add_legend, apply_style

SEED, COUNT = 0, 12  # pairs
STEPS = 5  # of the integrated gradients
STREAM = ["resid_pre", "attn_out", "mlp_out"]
WAYS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "integrated": {"method": "integrated", "steps": STEPS},
}
# How alike two tables have to be: correlation, part of the signs, part of the ten largest cells
PEARSON, SIGNS, OVERLAP = 0.9, 0.9, 0.7
METHODS: dict[Any, str] = {
    "gradient": "The gradient",
    "integrated": "The integrated gradient",
    "qk_fix": "The gradient through the softmax (qk_fix)",
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


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["agreement"]
    means: Any = table[table["cells"] == "means"]
    places: Any = means[means["site"] != "edges to logits"]
    is_alike = (places["pearson"] >= PEARSON) & (places["same_sign"] >= SIGNS)
    places = places.assign(alike=is_alike & (places["overlap"] >= OVERLAP))
    sentences, alike_everywhere = [], []
    for method, rows in places.groupby("method", sort=False):
        alike = rows[rows["alike"]]["site"].tolist()
        if len(alike) == len(rows):
            alike_everywhere.append(method)
        least_alike = rows.loc[rows["pearson"].idxmin()]
        least_sure = rows.loc[rows["same_sign"].idxmin()]
        sentences.append(
            f"{METHODS[method]} agrees with patching at {len(alike) or 'none'} of {len(rows)} "
            f"sites: its lowest correlation is {least_alike['pearson']:.2f} "
            f"({least_alike['site']}), and at {least_sure['site']} "
            f"{least_sure['same_sign']:.0%} of the cells have the right sign."
        )
    verdict = "No, not at every site."
    if alike_everywhere:
        verdict = f"Yes, by {' and '.join(map(METHODS.__getitem__, alike_everywhere))}."
    edges: Any = means[means["site"] == "edges to logits"].set_index("method")["pearson"]
    return (
        f"{verdict} Over the means of {COUNT} pairs, two tables agree if their Pearson correlation "
        f"is at least {PEARSON}, at least {SIGNS:.0%} of the cells have the same sign, and seven "
        f"of the ten largest cells are the same. {' '.join(sentences)} For edges from heads to the "
        f"logits the estimates agree with path patching: Pearson {edges['gradient']:.2f} for the "
        f"gradient and {edges['integrated']:.2f} for the integrated gradient."
    )


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
            hk.figures.heat_map(truth, title=f"Effect by patching: {label.replace('_', ' ')}"),
            caption="What patching gives.",
        )
        for method, way in ways.items():
            started = time.perf_counter()
            estimate = hk.attribution(lm, *both, sites, metric, **settings, **way)
            seconds[method] = time.perf_counter() - started
            results.figure(
                f"{label}_{method}_scatter",
                scatter(
                    estimate,
                    truth,
                    f"{METHODS[method]} against patching: {label.replace('_', ' ')}",
                ),
                caption="The mean of each cell over the pairs.",
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
    methods: list[tuple[Any, dict[str, Any]]] = [
        ("gradient", {}),
        ("integrated", {"steps": STEPS}),
    ]
    for method, settings in methods:
        table = hk.edge_attribution(lm, *given, method=method, **settings)
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


def scatter(estimate: pd.DataFrame, truth: pd.DataFrame, title: str) -> Figure:
    """Draws the mean of every cell over the pairs, in the colour of its site."""
    by = ["site", *[name for name in ("layer", "pos", "head") if name in truth]]
    sides = []
    for table in (truth, estimate):
        with_site = table if "site" in table else table.assign(site="z")
        sides.append(hk.stats.mean_over_prompts(with_site, by=by).set_index(by)["logit_diff_delta"])
    cells: Any = pd.concat(sides, axis=1, keys=["patched", "estimated"]).reset_index()
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color=MUTED, lw=0.9, ls="--", label="equal")
    for (site, part), colour in zip(cells.groupby("site", sort=False), LINES, strict=False):
        axes.scatter(part["patched"], part["estimated"], s=14, color=colour, alpha=0.7, label=site)
    axes.set_xlabel("patched: change of the logit difference (logits)")
    axes.set_ylabel("estimated: change of the logit difference (logits)")
    add_legend(axes)
    return apply_style(figure, title)


if __name__ == "__main__":
    main()
