"""Does attribution, one backward for all places, tell what patching tells, one forward for each?

On pairs of indirect-object sentences every place is patched, and estimated by its gradient: the residual stream and
what attention and MLPs write, at four positions, and every head, its query and its key. It is answered by how alike
both are (Pearson, Spearman, signs, and the ten largest), for the plain gradient, for one that is integrated over the
embeddings, for queries and keys taken through their own softmax, and for edges from heads to the logits, which path
patching gives exactly.

python -m experiments.attribution        some minutes on two cores; writes results/attribution/
"""

import time
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures import MUTED, UP, finished

SEED, COUNT = 0, 12  # pairs
STEPS = 5  # of the integrated gradients
STREAM = ["resid_pre", "attn_out", "mlp_out"]
WAYS: dict[str, dict[str, Any]] = {"gradient": {}, "integrated": {"method": "integrated", "steps": STEPS}}
SOFTMAX: dict[str, dict[str, Any]] = {"qk_fix": {"method": "qk_fix"}}
QUESTION = "Does attribution, one backward for all places, tell what patching tells, one forward for each?"


def main() -> None:
    lm = hk.load(device="cpu")
    pairs = hk.datasets.indirect_object(lm, COUNT, seed=SEED).solved(lm)
    with hk.record("results/attribution", title="Attribution", question=QUESTION, lm=lm, seed=SEED) as results:
        found = [*places(lm, pairs, results), *edges(lm, pairs, results)]
        table: Any = pd.concat(found, ignore_index=True)
        results.text("# How alike")
        caption = "cells: of each pair by itself, or means over the pairs. 1 is the same; the last two are shares."
        results.table("agreement", table.round(3), caption=caption)
        means = table[table["cells"] == "means"]
        worst = means.loc[means["pearson"].idxmin()]
        results.answer(
            f"Over the means, the plain gradient has a Pearson correlation of {_range(means, 'gradient')} with "
            f"patching, the integrated one {_range(means, 'integrated')}, queries and keys through their own softmax "
            f"{_range(means, 'qk_fix')}. The furthest off is {worst['site']} by {worst['method']}, "
            f"{worst['pearson']:.2f}. The plain gradient is right for small effects, and too little "
            "where a large change goes through norms and softmax, as in the stream's first blocks."
        )
    print(table.round(3).to_string(index=False))


def _range(means: Any, method: str) -> str:
    found = means[(means["method"] == method) & (means["site"] != "edges to logits")]["pearson"]
    return f"{found.min():.2f} to {found.max():.2f}"


def places(lm: hk.LM, pairs: hk.Pairs, results: hk.Record) -> list[pd.DataFrame]:
    results.text("# Places")
    metric = pairs.metric()
    named = {name: pairs.labels[name] for name in ("IO", "S1", "S2", "end")}
    both = (list(pairs.clean), list(pairs.corrupted))
    found: list[pd.DataFrame] = []
    grids: list[tuple[str, Any, Any, Any]] = [("stream", STREAM, {"pos": named}, WAYS), ("heads", ["z"], {}, WAYS)]
    for label, sites, settings, ways in [*grids, ("queries_and_keys", ["q", "k"], {}, WAYS | SOFTMAX)]:
        started = time.perf_counter()
        truth = hk.patching(lm, *both, sites, metric, **settings)
        seconds = {"patching": time.perf_counter() - started}
        results.figure(f"{label}_patched", hk.heat_map(truth, title="Patched"), caption="What patching gives.")
        for method, way in ways.items():
            started = time.perf_counter()
            estimate = hk.attribution(lm, *both, sites, metric, **settings, **way)
            seconds[method] = time.perf_counter() - started
            caption = f"What attribution makes of it ({method})."
            results.figure(f"{label}_{method}", hk.heat_map(estimate, title=f"Estimated: {method}"), caption=caption)
            results.figure(
                f"{label}_{method}_scatter", scatter(estimate, truth, method), caption="Each cell, all pairs."
            )
            found += alike(estimate, truth, method)
        taken = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        results.text(f"Seconds for the {label}: {taken}.")
    return found


def alike(estimate: pd.DataFrame, truth: pd.DataFrame, method: str) -> list[pd.DataFrame]:
    """How alike two tables are, cell by cell and in their means over the pairs."""
    estimate, truth = (table if "site" in table else table.assign(site="z") for table in (estimate, truth))
    of_pairs, of_means = (estimate, truth), (hk.over_prompts(estimate), hk.over_prompts(truth))
    both = (("pairs", of_pairs), ("means", of_means))
    return [hk.agreement(*tables, by="site").assign(method=method, cells=cells) for cells, tables in both]


def edges(lm: hk.LM, pairs: hk.Pairs, results: hk.Record) -> list[pd.DataFrame]:
    results.text("# Edges from heads to the logits")
    metric = pairs.metric()
    given = (list(pairs.clean), list(pairs.corrupted), metric)
    truth = hk.over_prompts(hk.path_patching(lm, *given, freeze=("z", "mlp_out")))
    found = []
    for method, steps in (("gradient", 1), ("integrated", STEPS)):
        table = hk.edge_attribution(lm, *given, direction="noise", steps=steps)
        results.table(f"edges_{method}", table.nlargest(20, "logit_diff_delta"), caption="The 20 that raise it most.")
        heads: Any = table[(table["receiver"] == "logits") & table["sender"].str.startswith("z.")]
        place = heads["sender"].str.split(".", expand=True)
        estimate = heads.assign(layer=place[1].astype(int), head=place[2].astype(int))
        compared = hk.agreement(estimate, truth)
        found.append(compared.assign(site="edges to logits", method=method, cells="means"))
    return found


def scatter(estimate: pd.DataFrame, truth: pd.DataFrame, method: str) -> Figure:
    one, two = (hk.over_prompts(table)["logit_diff_delta"] for table in (estimate, truth))
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color=MUTED, lw=0.8)
    axes.scatter(two, one, s=10, color=UP, alpha=0.6, lw=0)
    axes.set_xlabel("patched: change of the logit difference")
    axes.set_ylabel(f"estimated ({method})")
    return finished(figure, "Attribution against patching")


if __name__ == "__main__":
    main()
