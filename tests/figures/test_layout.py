"""Every figure can be read whatever its table has: no text stands on another or is cut off.

The tables are made by hand, so that no model is needed. A new figure needs an entry in `MAKERS`.
"""

import io
import itertools
import os

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import hookkit as hk
from hookkit.errors import EmptySelection
from hookkit.figures import reports

LONG = " antidisestablishmentarianism" * 3
KINDS = ["plain", "long", "other scripts", "many", "one", "infinite", "missing"]
PROMPT = "I like oat milk in my"
SIZES = {"many": 200, "one": 1}
NOT_FIGURES = {"attention_view"}  # HTML of another package


def tokens(kind: str, count: int) -> list[str]:
    names = [f" word{number}" for number in range(count)]
    if kind == "long":
        names = [f"{LONG}{number}" for number in range(count)]
    if kind == "other scripts":
        samples = ["漢字", " कॉफ़ी", " кофе", "🧋", "\n", "$x_1$", " قهوة", "�", "<0xE2>", "%", "_a"]
        names = [f"{samples[number % len(samples)]}{number}" for number in range(count)]
    return names


def spoil(kind: str, values: np.ndarray) -> np.ndarray:
    """Some values without end, or missing."""
    values = np.array(values, dtype=float)
    if kind == "infinite":
        values[-1], values[0] = -np.inf, np.inf
    if kind == "missing":
        values[0] = np.nan
    return values


def with_prompt(table: pd.DataFrame, kind: str, n_tokens: int = 6) -> pd.DataFrame:
    table.attrs["prompts"] = [PROMPT * (30 if kind == "long" else 1)]
    table.attrs["tokens"] = [tokens(kind, n_tokens)]
    return table


def ranks(kind: str) -> pd.DataFrame:
    count = {"many": 50_000, "one": 1}.get(kind, 300)
    logits = np.random.default_rng(0).normal(3, 3, count)
    logits[0] = 20
    logprobs = logits - np.log(np.exp(logits).sum())
    table = pd.DataFrame({"row": 0, "pos": 5, "token": tokens(kind, count)})
    table = table.assign(token_id=range(count), logit=logits, logprob=logprobs)
    table["rank"] = table["logit"].rank(ascending=False, method="min").astype(int)
    table["prob"] = np.exp(table["logprob"])
    if count > 1 and kind == "infinite":
        table.loc[count - 1, ["logit", "logprob", "prob"]] = [-np.inf, -np.inf, 0.0]
    if kind == "missing":
        table.loc[1, ["logit", "logprob", "prob"]] = np.nan
    return with_prompt(table, kind)


def shift(kind: str) -> pd.DataFrame:
    count = SIZES.get(kind, 12)
    random = np.random.default_rng(1)
    table = pd.DataFrame({"row": 0, "pos": 5, "token": tokens(kind, count)})
    table = table.assign(token_id=range(count), why="top before, top after")
    table["rank_before"] = random.permutation(40 * count)[:count] + 1
    table["rank_after"] = random.permutation(40 * count)[:count] + 1
    table["rank_delta"] = table["rank_after"] - table["rank_before"]
    table["logprob_delta"] = spoil(kind, random.normal(0, 2, count))
    table["log10_rank_ratio"] = np.log10(table["rank_before"] / table["rank_after"])
    table.loc[0, "why"] = "edited"
    return with_prompt(table, kind)


def lens(kind: str) -> pd.DataFrame:
    layers, positions = {"many": (80, 200), "one": (1, 1)}.get(kind, (12, 6))
    cells = list(itertools.product(range(positions), range(layers)))
    table = pd.DataFrame(cells, columns=["pos", "layer"]).assign(row=0, rank=1, token_id=7)
    table["site"] = "resid_post." + table["layer"].astype(str)
    table["token"] = tokens(kind, len(cells))
    table["prob"] = spoil(kind, np.random.default_rng(0).uniform(0, 1, len(cells)))
    return with_prompt(table, kind, positions)


def components(kind: str) -> pd.DataFrame:
    count = SIZES.get(kind, 30)
    logits = spoil(kind if kind == "missing" else "", np.random.default_rng(0).normal(0, 2, count))
    if kind == "infinite":
        logits[0] = np.inf
    names = [f"mlp_out.{number}" for number in range(count)]
    table = pd.DataFrame({"row": 0, "pos": 4, "component": names, "logit": logits})
    table.attrs["token"] = repr(tokens(kind, 1)[0])
    return with_prompt(table, kind)


def grid(kind: str) -> pd.DataFrame:
    layers, positions = {"many": (80, 200), "one": (1, 1)}.get(kind, (12, 6))
    cells = list(itertools.product(["resid_pre", "attn_out"], range(layers), range(positions)))
    table = pd.DataFrame(cells, columns=["site", "layer", "pos"]).assign(row=0)
    values = np.random.default_rng(0).normal(0, 1, len(cells))
    table["logit_diff_delta"] = spoil(kind, values)
    table = table.assign(logit_diff=table["logit_diff_delta"], logit_diff_before=0.0)
    return with_prompt(table, kind, positions)


def doses(kind: str, samples: int = 2) -> pd.DataFrame:
    vectors, prompts = {"many": (30, 12), "one": (1, 1)}.get(kind, (3, 12))
    names = tokens("long" if kind == "long" else "", vectors)
    cells = itertools.product(names, [-0.2, -0.1, 0.1, 0.2], range(samples + 1), range(prompts))
    table = pd.DataFrame(list(cells), columns=["vector", "dose", "sample", "row"])
    table = table.assign(site="resid_post.16", layer=16, control=table["sample"] > 0)
    random = np.random.default_rng(0).normal(0, 0.2, len(table))
    value = 5 * table["dose"] * ~table["control"] + random
    table = table.assign(prompt=table["row"], length=table["dose"].abs(), logit_diff=value)
    table = table.assign(logit_diff_before=0.0, logit_diff_delta=value)
    table["damage_kl"] = table["dose"] ** 2
    table.attrs["prompts"] = [f"{PROMPT} {number}" for number in range(prompts)]
    return table


def candidates(kind: str) -> pd.DataFrame:
    steps, names = SIZES.get(kind, 8), tokens(kind, 12)
    rows = []
    for step, (number, name) in itertools.product(range(steps), enumerate(names)):
        why = "top, watched" if number < 6 else "top"
        row = {"token": name, "token_id": number, "logit": 9.0 - number, "rank": number + 1}
        rows.append({**row, "step": step, "drawn": number == step % 6, "why": why})
    table = pd.DataFrame(rows).assign(row=0, stage="edited")
    if kind == "infinite":
        table.loc[table["token_id"] == 5, "logit"] = -np.inf
    weights = np.exp(table["logit"])
    table["prob"] = weights / weights.groupby(table["step"]).transform("sum")
    with np.errstate(divide="ignore"):
        table["logprob"] = np.log(table["prob"])
    return with_prompt(table, kind)


def surprisal(kind: str) -> pd.DataFrame:
    count = SIZES.get(kind, 20)
    table = pd.DataFrame({"row": 0, "pos": range(count), "token": tokens(kind, count)})
    table = table.assign(token_id=range(count), rank=range(1, count + 1))
    table["loss"] = np.abs(spoil(kind, np.random.default_rng(0).normal(3, 2, count)))
    return with_prompt(table, kind)


def answers(kind: str) -> tuple[np.ndarray, np.ndarray]:
    count = {"one": 2, "many": 5_000}.get(kind, 200)
    random = np.random.default_rng(0)
    confidence = random.uniform(0, 1, count)
    right = random.uniform(0, 1, count) < confidence
    right[:2] = [True, False]
    return confidence, right


def curves(kind: str) -> dict[str, pd.DataFrame]:
    names = tokens(kind, {"many": 20, "one": 1}.get(kind, 4))
    return {name: hk.stats.roc(*answers(kind)) for name in names}


def rank_parts(kind: str) -> dict:
    order = np.random.default_rng(0).permutation(3000) + 1
    names = tokens(kind, {"many": 4, "one": 1}.get(kind, 2))
    return {name: (shift(kind), np.arange(1, 3001), order) for name in names}


def shift_layers(kind: str) -> tuple[pd.DataFrame, list[str]]:
    layers, count = {"many": (80, 30), "one": (1, 1)}.get(kind, (12, 4))
    cells = list(itertools.product(tokens(kind, 2), range(count), range(layers)))
    table = pd.DataFrame(cells, columns=["edit", "token_id", "layer"])
    table["token"] = [tokens(kind, count)[number] for number in table["token_id"]]
    ranks = np.random.default_rng(0).integers(1, 9000, (2, len(table)))
    table = table.assign(rank_before=ranks[0], rank_after=ranks[1], edited=table["layer"] == 3)
    return table, tokens(kind, 2)


def moved_components(kind: str) -> dict[str, pd.DataFrame]:
    table = components(kind).head(12).rename(columns={"logit": "logit_delta"})
    return dict.fromkeys(tokens(kind, 2), table)


def watched_means(kind: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    edits, prompts = {"many": (12, 40), "one": (1, 1)}.get(kind, (3, 12))
    watched_names = [*tokens(kind, 2), "what was first"]
    cells = itertools.product(watched_names, tokens(kind, edits), range(prompts))
    watched = pd.DataFrame(list(cells), columns=["watched", "edit", "row"])
    watched["logprob_delta"] = np.random.default_rng(0).normal(0, 2, len(watched))
    groups = watched.groupby(["watched", "edit"], sort=False)["logprob_delta"]
    summary = groups.mean().reset_index().assign(n=prompts, control=False)
    summary["logprob_delta"] = spoil(kind, summary["logprob_delta"].to_numpy())
    low, high = summary["logprob_delta"] - 1, summary["logprob_delta"] + 1
    return summary.assign(logprob_delta_low=low, logprob_delta_high=high), watched


def faithfulness(kind: str) -> pd.DataFrame:
    count = {"many": 40, "one": 1}.get(kind, 10)
    sizes = np.geomspace(0.001, 1, count) if count > 1 else np.array([0.5])
    arms = [("circuit", 0), ("random", 0), ("random", 1), ("complement", 0)]
    table = pd.DataFrame(
        [(*arm, size) for arm in arms for size in sizes], columns=["circuit", "draw", "size"]
    )
    values = spoil(kind, np.random.default_rng(0).uniform(-0.1, 1.2, len(table)))
    return table.assign(
        faithfulness=values, faithfulness_low=values - 0.1, faithfulness_high=values + 0.1, n=16
    )


def circuit_edges(kind: str) -> pd.DataFrame:
    layers, heads = {"many": (30, 9), "one": (1, 1)}.get(kind, (4, 3))
    senders, receivers = ["embed"], []
    for layer in range(layers):
        for head in range(heads):
            receivers += [f"{name}.{layer}.{head}" for name in "qkv"]
            senders.append(f"z.{layer}.{head}")
        senders.append(f"mlp_out.{layer}")
        receivers.append(f"mlp_in.{layer}")
    edges = [(sender, receivers[7 * n % len(receivers)]) for n, sender in enumerate(senders)]
    edges += [(sender, "logits") for sender in senders[::2]]
    table = pd.DataFrame(edges, columns=["sender", "receiver"])
    return table.assign(score=np.random.default_rng(0).normal(0, 1, len(edges)), in_circuit=True)


def histogram(kind: str) -> pd.DataFrame:
    low = np.linspace(0, {"long": 1e6}.get(kind, 40), 20)
    counts = {"one": [1] + [0] * 19, "many": list(range(0, 20_000_000, 1_000_000))}
    return pd.DataFrame({"low": low, "high": low + low[1], "count": counts.get(kind, [9] * 20)})


def diff_sites(kind: str) -> pd.DataFrame:
    layers = {"many": 80, "one": 1}.get(kind, 12)
    cells = list(itertools.product(["resid_post", "attn_out", "mlp_out"], range(layers)))
    table = pd.DataFrame(cells, columns=["name", "layer"])
    table["difference"] = spoil(kind, np.random.default_rng(0).uniform(1e-4, 1, len(cells)))
    return table.assign(cka=0.9)


def diff_tokens(kind: str) -> pd.DataFrame:
    count = SIZES.get(kind, 12)
    kl = np.abs(spoil(kind, np.random.default_rng(0).normal(0, 1, count)))
    changed = np.arange(count) % 3 == 0
    table = pd.DataFrame({"row": 0, "pos": range(count), "read": tokens(kind, count)})
    return with_prompt(table.assign(kl=kl, top1_changed=changed), kind)


def diff_stream(kind: str) -> pd.DataFrame:
    table = (
        grid(kind).query("site == 'resid_pre'").rename(columns={"logit_diff_delta": "difference"})
    )
    names = tokens(kind, 200)
    return table.assign(difference=table["difference"].abs(), read=[names[p] for p in table["pos"]])


# Each figure of `hk.figures`, and those of the reports, from the tables of a kind.
MAKERS = {
    "logit_scatter": lambda kind: hk.figures.logit_scatter(ranks(kind), watch=[0]),
    "logit_panels": lambda kind: hk.figures.logit_panels(ranks(kind), watch=[0]),
    "rank_bump": lambda kind: hk.figures.rank_bump(shift(kind), names=(LONG, "after")),
    "delta_bars": lambda kind: hk.figures.delta_bars(shift(kind)),
    "lens_map": lambda kind: hk.figures.lens_map(lens(kind)),
    "logit_bars": lambda kind: hk.figures.logit_bars(components(kind)),
    "heat_map": lambda kind: hk.figures.heat_map(grid(kind)),
    "interval_lines": lambda kind: hk.figures.interval_lines(
        grid(kind), x="layer", series="pos", value="logit_diff_delta"
    ),
    "dose": lambda kind: hk.figures.dose(doses(kind)),
    "damage_curves": lambda kind: hk.figures.damage_curves(doses(kind)),
    "rank_lines": lambda kind: hk.figures.rank_lines(
        candidates(kind), stage="edited", watch=range(6)
    ),
    "prob_against": lambda kind: hk.figures.prob_against(
        candidates(kind), candidates(kind), token=5
    ),
    "decision_strip": lambda kind: hk.figures.decision_strip(candidates(kind), stage="edited"),
    "surprisal_strip": lambda kind: hk.figures.surprisal_strip(surprisal(kind)),
    "reliability_diagram": lambda kind: hk.figures.reliability_diagram(
        hk.stats.calibration(*answers(kind))
    ),
    "roc_curves": lambda kind: hk.figures.roc_curves(curves(kind)),
    "faithfulness_curve": lambda kind: hk.figures.faithfulness_curve(faithfulness(kind)),
    "circuit_graph": lambda kind: hk.figures.circuit_graph(circuit_edges(kind)),
}
REPORT_MAKERS = {
    "rank_against_rank": lambda kind: reports.rank_against_rank(rank_parts(kind)),
    "shift_through_layers": lambda kind: reports.shift_through_layers(*shift_layers(kind)),
    "component_bars": lambda kind: reports.component_bars(moved_components(kind)),
    "mean_changes": lambda kind: reports.mean_changes(*watched_means(kind)),
    "diff_through_layers": lambda kind: reports.diff_through_layers(diff_sites(kind), 1e-4),
    "token_bars": lambda kind: reports.token_bars(diff_tokens(kind)),
    "stream_map": lambda kind: reports.stream_map(diff_stream(kind)),
    "activation_histogram": lambda kind: reports.activation_histogram(histogram(kind)),
}


# What is left of each table without its rows.
EMPTY = {
    "logit_scatter": lambda: hk.figures.logit_scatter(ranks("plain").head(0)),
    "logit_panels": lambda: hk.figures.logit_panels(ranks("plain").head(0)),
    "rank_bump": lambda: hk.figures.rank_bump(shift("plain").head(0)),
    "delta_bars": lambda: hk.figures.delta_bars(shift("plain").head(0)),
    "lens_map": lambda: hk.figures.lens_map(lens("plain").head(0)),
    "logit_bars": lambda: hk.figures.logit_bars(components("plain").head(0)),
    "heat_map": lambda: hk.figures.heat_map(grid("plain").head(0)),
    "interval_lines": lambda: hk.figures.interval_lines(grid("plain").head(0)),
    "dose": lambda: hk.figures.dose(doses("plain").head(0)),
    "damage_curves": lambda: hk.figures.damage_curves(doses("plain").head(0)),
    "rank_lines": lambda: hk.figures.rank_lines(candidates("plain").head(0)),
    "prob_against": lambda: hk.figures.prob_against(
        candidates("plain").head(0), candidates("plain"), token=5
    ),
    "decision_strip": lambda: hk.figures.decision_strip(candidates("plain").head(0)),
    "surprisal_strip": lambda: hk.figures.surprisal_strip(surprisal("plain").head(0)),
    "reliability_diagram": lambda: hk.figures.reliability_diagram(
        hk.stats.calibration(*answers("plain")).head(0)
    ),
    "roc_curves": lambda: hk.figures.roc_curves({}),
    "faithfulness_curve": lambda: hk.figures.faithfulness_curve(faithfulness("plain").head(0)),
    "circuit_graph": lambda: hk.figures.circuit_graph(circuit_edges("plain").head(0)),
}


def corners(text: Text, renderer) -> np.ndarray:
    """The corners of the box of a text, in pixels, turned as the text is."""
    angle = text.get_rotation()
    text.set_rotation(0)
    # Of an annotation only the text, without the line to its point.
    left, bottom, width, height = Text.get_window_extent(text, renderer).bounds
    text.set_rotation(angle)
    box = np.array([[0, 0], [width, 0], [width, height], [0, height]]) + np.array([left, bottom])
    if angle == 0:
        return box
    upright = Text.get_window_extent(text, renderer)
    anchor = text.get_transform().transform(text.get_position())
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    turned = (box - anchor) @ np.array([[cos, sin], [-sin, cos]]) + anchor
    middle = np.array([upright.x0 + upright.x1, upright.y0 + upright.y1]) / 2
    return turned + middle - (turned.min(axis=0) + turned.max(axis=0)) / 2


def overlap(one: np.ndarray, other: np.ndarray, slack: float) -> bool:
    """Whether two boxes share more than `slack` pixels: no side of either separates them."""
    for box in (one, other):
        sides = np.diff(box, axis=0)[:2]
        for direction in sides / np.linalg.norm(sides, axis=1, keepdims=True):
            mine, theirs = one @ direction, other @ direction
            if min(mine.max(), theirs.max()) - max(mine.min(), theirs.min()) <= slack:
                return False
    return True


def visible_texts(figure: Figure) -> list[Text]:
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high or not axes.axison:
                    hidden |= {tick.label1, tick.label2}
                if not tick.get_visible():
                    hidden |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [t for t in texts if t.get_visible() and t.get_text().strip() and t not in hidden]


def layout_faults(figure: Figure) -> list[str]:
    """The texts that stand on another one, or that leave the canvas."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # which puts everything in its place
    texts = visible_texts(figure)
    boxes = [corners(text, renderer) for text in texts]
    width, height = figure.bbox.width, figure.bbox.height
    faults = []
    for text, box in zip(texts, boxes, strict=True):
        (left, bottom), (right, top) = box.min(axis=0), box.max(axis=0)
        if left < -1 or bottom < -1 or right > width + 1 or top > height + 1:
            faults.append(f"{text.get_text()!r} leaves the canvas")
    bounds = np.array([[*box.min(axis=0), *box.max(axis=0)] for box in boxes])
    slack = 2.0  # pixels: the boxes have room around their letters
    for number, (left, bottom, right, top) in enumerate(bounds):
        near = (bounds[:, 0] < right) & (bounds[:, 2] > left)
        near &= (bounds[:, 1] < top) & (bounds[:, 3] > bottom)
        for other in np.flatnonzero(near).tolist():
            if other > number and overlap(boxes[number], boxes[other], slack):
                pair = texts[number].get_text(), texts[other].get_text()
                faults.append(f"{pair[0]!r} stands on {pair[1]!r}")
    return faults


def test_every_figure_is_held_here():
    assert set(dir(hk.figures)) - NOT_FIGURES == set(MAKERS) == set(EMPTY)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_table_is_refused_in_words(name):
    with pytest.raises(EmptySelection):
        EMPTY[name]()


def test_the_test_of_layouts_finds_what_it_is_for():
    figure = hk.figures.delta_bars(shift("plain"))
    (axes,) = figure.axes
    axes.text(0.5, 0.5, "first", transform=axes.transAxes)
    axes.text(0.5, 0.52, "second", transform=axes.transAxes)
    figure.text(0.97, 0.5, "too long for its place")
    faults = layout_faults(figure)
    assert "'too long for its place' leaves the canvas" in faults
    assert "'first' stands on 'second'" in faults


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MAKERS, *REPORT_MAKERS])
def test_no_text_stands_on_another_or_leaves_the_canvas(name, kind):
    figure = (MAKERS | REPORT_MAKERS)[name](kind)
    if figure is None:
        assert (name, kind) == ("stream_map", "many")  # a long prompt has none
        return
    if folder := os.environ.get("HOOKKIT_FIGURES"):
        figure.savefig(f"{folder}/{name}-{kind.replace(' ', '_')}.png", dpi=80)
    assert layout_faults(figure) == []
    assert figure.get_suptitle()
    assert figure.dpi == 150
    if kind == "other scripts":
        figure.savefig(io.BytesIO(), format="svg")  # a missing character is a warning, an error
