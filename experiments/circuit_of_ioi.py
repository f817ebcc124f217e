"""Which scorer finds the most faithful circuit of the indirect object, and is it the only one?

Each scorer ranks all edges of the default model on some pairs of indirect-object sentences. Then
circuits of MIB's ten sizes run on other pairs, with all other edges at their corrupted values. CPR
is the area under a scorer's curve and CMD the area between it and 1 (the benchmark MIB: Mueller et
al. 2025). A scorer is worth its cost if its CMD is below that of the plain gradient
(EAP) and of random circuits. The circuit is not the only one if two scorers' circuits of one size
are both faithful and the edges that they share are not.

python -m experiments.circuit_of_ioi
    a quarter of an hour on one core; writes results/circuit_of_ioi/
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import LINES, MUTED, add_legend, apply_style

QUESTION = (
    "Which scorer finds the most faithful circuit of the indirect object, and is it the only one?"
)
SEED, SCORED, MEASURED = 0, 8, 16  # pairs that edges are scored on, and others for the circuits
STEPS, LAYER_STEPS, MASK_STEPS = 5, 1, 60
DRAWS = 5  # random circuits of each size
SIZE = 0.05  # share of all edges in the circuits that are compared
COMPARED = ("EAP-IG-inputs", "mask")  # with the first scorer
FAITHFUL = 0.8

Scorer = Callable[..., pd.DataFrame]


def integrated(lm: hk.LM, *pairs: Any) -> pd.DataFrame:
    return hk.edge_attribution(lm, *pairs, method="integrated", steps=STEPS)


def integrated_activations(lm: hk.LM, *pairs: Any) -> pd.DataFrame:
    settings: Any = {"steps": LAYER_STEPS, "points": "middle"}
    return hk.edge_attribution(lm, *pairs, method="integrated_activations", **settings)


def mask(lm: hk.LM, *pairs: Any) -> pd.DataFrame:
    return hk.edge_mask(lm, *pairs, steps=MASK_STEPS, batch_size=2)


SCORERS: dict[str, Scorer] = {
    "EAP": hk.edge_attribution,
    "EAP-IG-inputs": integrated,
    "EAP-IG-activations": integrated_activations,
    "mask": mask,
}


def main() -> None:
    lm = hk.load(device="cpu")
    drawn = hk.datasets.indirect_object(lm, 40, seed=SEED, same_length=True).solved(lm)
    scored, measured = drawn[:SCORED], drawn[SCORED : SCORED + MEASURED]
    with hk.record(
        "results/circuit_of_ioi", title="A circuit of IOI", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        results.text(
            f"Edges are scored on {len(scored)} pairs, and circuits measured on {len(measured)} "
            "others. All that is not in a circuit has its value on the corrupted prompt."
        )
        tables = score_edges(lm, scored)
        curves, areas = measure(lm, measured, tables)
        results.table("curves", curves.round(4), caption="Faithfulness of each circuit.")
        results.figure(
            "faithfulness",
            draw(curves),
            caption="1 is the whole model, 0 the corrupted prompts. Bands are 95 % intervals; that "
            "of random circuits reaches from the lowest draw to the highest.",
        )
        caption = "CPR is higher, CMD lower for better circuits; 95 % intervals over the pairs."
        results.table("areas", areas.round(3), caption=caption)
        overlap = compare(lm, measured, tables)
        caption = f"Circuits of {SIZE:.0%} of all edges, of two scorers each."
        results.table("overlap", overlap.round(3), caption=caption)
        written: dict[str, Any] = {}
        for name in ("curves", "areas", "overlap"):
            written[name] = hk.results.read_table(results.folder / f"{name}.csv")
        results.answer(answer(written))
    print(areas.round(3).to_string(index=False))


def arguments_of(pairs: hk.types.Pairs) -> tuple[list[Any], list[Any], hk.types.Metric]:
    return list(pairs.clean), list(pairs.corrupted), pairs.metric()


def score_edges(lm: hk.LM, pairs: hk.types.Pairs) -> dict[str, pd.DataFrame]:
    """The edges' scores by each scorer, with the forwards that the model ran, and their rows."""
    tables = {}
    for name, scorer in SCORERS.items():
        rows: list[int] = []

        def count(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], to: Any = rows) -> None:
            to.append(len(kwargs["input_ids"]))

        handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
        started = time.perf_counter()
        tables[name] = scorer(lm, *arguments_of(pairs))
        handle.remove()
        tables[name].attrs |= {"forwards": len(rows), "rows": sum(rows)}
        print(f"{name}: {time.perf_counter() - started:.0f} s, {sum(rows)} rows")
    return tables


def measure(
    lm: hk.LM, pairs: hk.types.Pairs, tables: Mapping[str, pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curves of all scorers, and their areas. Random circuits are those of the first scorer."""
    curves, areas = [], []
    for name, table in tables.items():
        draws = DRAWS if name == next(iter(tables)) else 0
        clean, corrupted, metric = arguments_of(pairs)
        result = hk.faithfulness(lm, clean, corrupted, table, metric, draws=draws)
        print(f"{name}: circuits measured in {result.seconds:.0f} s, {result.n_rows} rows")
        cost = {name: table.attrs[name] for name in ("forwards", "rows")}
        for part, parts in ((result.table, curves), (result.areas, areas)):
            names = {"circuit": name, "complement": f"without {name}"}
            part.insert(0, "scorer", part["circuit"].replace(names))
            parts.append(part.drop(columns="circuit"))
        areas[-1].loc[areas[-1]["scorer"] == name, list(cost)] = list(cost.values())
    joined: Any = [pd.concat(parts, ignore_index=True) for parts in (curves, areas)]
    return joined[0].drop_duplicates(["scorer", "draw", "size"]), joined[1]


def compare(lm: hk.LM, pairs: hk.types.Pairs, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How many edges the circuits of two scorers share, and what the shared edges do alone."""
    circuits = {name: hk.circuit(table, share=SIZE) for name, table in tables.items()}
    first = next(iter(circuits))
    clean, corrupted, metric = arguments_of(pairs)
    records = []
    for other in COMPARED:
        two = (circuits[first], circuits[other])
        table = hk.compare_circuits(lm, clean, corrupted, *two, metric).set_index("circuit")
        faithful = table["faithfulness"].add_prefix("faithfulness_")
        names = ["jaccard", "weighted_jaccard", "jaccard_by_chance"]
        overlaps = table[names].iloc[0]
        records.append({"first": first, "second": other, **overlaps, **faithful})
    return pd.DataFrame(records)


def draw(curves: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=MUTED, lw=0.8, ls=":")
    axes.axhline(0, color=MUTED, lw=0.8, ls=":")
    styles: dict[str, dict[str, Any]] = {}
    for name, colour in zip(SCORERS, LINES, strict=False):
        styles[name] = {"color": colour}
    styles["random"] = {"color": MUTED}
    styles[f"without {next(iter(SCORERS))}"] = {"color": MUTED, "ls": "--"}
    for name, style in styles.items():
        curve = curves[curves["scorer"] == name]
        if name == "random":
            curve = mean_of_draws(curve)
        axes.plot(curve["size"], curve["faithfulness"], marker="o", ms=3, label=name, **style)
        band = (curve["faithfulness_low"], curve["faithfulness_high"])
        axes.fill_between(curve["size"], *band, color=style["color"], alpha=0.12, lw=0)
    axes.set_xscale("log")
    axes.set_xlabel("share of all edges in the circuit")
    axes.set_ylabel("faithfulness")
    add_legend(axes)
    return apply_style(figure, "Circuits of the indirect object, by scorer")


def mean_of_draws(curve: Any) -> Any:
    """The mean of the random circuits of each size, and the lowest and the highest of them."""
    names = {"mean": "faithfulness", "min": "faithfulness_low", "max": "faithfulness_high"}
    draws = curve.groupby("size")["faithfulness"].agg(list(names))
    return draws.rename(columns=names).reset_index()


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    curves, overlap = tables["curves"], tables["overlap"]
    drawn = tables["areas"][tables["areas"]["scorer"] == "random"]
    areas = tables["areas"][tables["areas"]["scorer"] != "random"].set_index("scorer")
    scorers = areas.loc[[name for name in SCORERS if name in areas.index]]
    best, plain = scorers["cmd"].idxmin(), next(iter(SCORERS))
    sentences = []
    for name, row in scorers.iterrows():
        reached = curves[(curves["scorer"] == name) & (curves["faithfulness"] >= FAITHFUL)]
        size = f"from {reached['size'].min():.1%} of the edges on" if len(reached) else "never"
        sentences.append(
            f"{name}: CMD {row['cmd']:.3f} ({row['cmd_low']:.3f} to {row['cmd_high']:.3f}), CPR "
            f"{row['cpr']:.2f} "
            f"({row['cpr_low']:.2f} to {row['cpr_high']:.2f}), {FAITHFUL:.0%} faithful {size}, "
            f"{row['rows']:.0f} rows of forwards."
        )
    without = areas.loc[f"without {plain}"]
    verdict = f"{best} has the lowest CMD"
    if best != plain:
        verdict += f", {scorers.loc[best, 'cmd']:.3f} against {scorers.loc[plain, 'cmd']:.3f}"
        verdict += f" of the plain gradient ({plain})"
    nearest = overlap.loc[overlap["jaccard"].idxmin()]
    both = min(nearest["faithfulness_first"], nearest["faithfulness_second"])
    unique = "that no other circuit is faithful is not shown"
    if both >= FAITHFUL and nearest["faithfulness_shared"] >= FAITHFUL:
        unique = "so they are two circuits around one core, and none without it was found"
    elif both >= FAITHFUL:
        unique = "so the circuit is not the only one"
    return (
        f"{verdict}, on {curves['n'].iloc[0]} pairs that were not scored. {' '.join(sentences)} "
        f"The mask was trained for {MASK_STEPS} steps. Of {len(drawn)} draws of random "
        f"circuits, the best has CMD {drawn['cmd'].min():.3f} and CPR {drawn['cpr'].max():.2f}, "
        f"and what {plain} leaves out CPR "
        f"{max(0.0, without['cpr']):.2f}. At {SIZE:.0%} of the edges, the circuits of "
        f"{nearest['first']} and {nearest['second']} share {nearest['jaccard']:.0%} of their edges "
        f"(by chance {nearest['jaccard_by_chance']:.0%}) and are "
        f"{nearest['faithfulness_first']:.2f} and {nearest['faithfulness_second']:.2f} faithful; "
        f"the shared edges alone are {nearest['faithfulness_shared']:.2f} faithful: {unique}."
    )


if __name__ == "__main__":
    main()
