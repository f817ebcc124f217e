"""`hk.show` over the table of every public function that returns one."""

import inspect
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.cells import cell_len

import hookkit as hk

CLEAN, CORRUPTED = [[5, 6, 7, 8], [9, 6, 11, 8]], [[5, 40, 7, 8], [9, 40, 11, 8]]
METRIC = hk.metrics.logit_diff(20, 21)
QUIET = {"progress": False}
ELSEWHERE = {"stats.evaluate", "datasets.labelled"}  # which need lm-eval, and a download


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """The inputs that tables are made from."""
    folder = tmp_path_factory.mktemp("results")
    with hk.record(folder / "one", title="One", settings={"n": 1}) as results:
        results.table("numbers", pd.DataFrame({"token": [" a", "\n"], "prob": [0.5, 0.25]}))
    before = hk.forward(llama, CLEAN, hk.capture("final_norm"))
    settings = {"max_new_tokens": 3, "do_sample": False}
    edges = hk.edge_attribution(llama, CLEAN, CORRUPTED, METRIC)
    vector = hk.mean_difference(llama, CLEAN, CORRUPTED, "resid_post.1")[0]
    return SimpleNamespace(
        lm=llama,
        folder=folder,
        before=before,
        after=hk.forward(llama, CLEAN, hk.ban(20), hk.capture("final_norm")),
        generated=hk.generate(llama, CLEAN, hk.ban(20), trace=hk.trace(), **settings),
        edges=edges,
        circuit=hk.circuit(edges, share=1.0),
        lens=hk.logit_lens(llama, CLEAN),
        cells=hk.patching(llama, CLEAN * 3, CORRUPTED * 3, "resid_pre", METRIC, **QUIET),
        doses=hk.dose_response(
            llama, CLEAN, vector, METRIC, samples=2, doses=[-0.2, 0.2], neutral=CLEAN, **QUIET
        ),
    )


def skip(layer):
    return hk.skip_block(layer)


TABLES = {
    "ablations": lambda m: hk.ablations(m.lm, CLEAN, "z", METRIC, **QUIET),
    "attribution": lambda m: hk.attribution(m.lm, CLEAN, CORRUPTED, "z", METRIC),
    "candidates": lambda m: hk.candidates(m.generated),
    "causal_tracing": lambda m: hk.causal_tracing(
        m.lm, "Tea with milk", "Tea", METRIC, samples=2, **QUIET
    ),
    "check_laws": lambda m: hk.check_laws(m.lm),
    "compare_circuits": lambda m: hk.compare_circuits(
        m.lm, CLEAN, CORRUPTED, m.circuit, m.circuit, METRIC
    ),
    "decisions": lambda m: hk.decisions(m.generated),
    "direct_logits": lambda m: hk.direct_logits(m.before, 20),
    "dose_response": lambda m: m.doses,
    "edge_attribution": lambda m: m.edges,
    "edge_mask": lambda m: hk.edge_mask(m.lm, CLEAN, CORRUPTED, METRIC, steps=2),
    "head_scores": lambda m: hk.head_scores(m.lm, n=2, length=6),
    "logit_lens": lambda m: m.lens,
    "logit_path": lambda m: hk.logit_path(m.lm, CLEAN[:1]),
    "logit_terms": lambda m: hk.logit_terms(m.before, 20),
    "minimality": lambda m: hk.minimality(m.lm, CLEAN, CORRUPTED, m.circuit, METRIC),
    "patching": lambda m: m.cells,
    "patchscope": lambda m: hk.patchscope(m.lm, CLEAN[:1], target=[[5, 6, 7]], max_new_tokens=2),
    "path_patching": lambda m: hk.path_patching(m.lm, CLEAN, CORRUPTED, METRIC, **QUIET),
    "rank_shift": lambda m: hk.rank_shift(m.before, m.after),
    "ranks": lambda m: hk.ranks(m.before),
    "sampling_distributions": lambda m: hk.sampling_distributions(m.before, top_k=[1, 5]),
    "surprisal": lambda m: hk.surprisal(m.before, top=2),
    "surprisal_shift": lambda m: hk.surprisal_shift(m.before, m.after),
    "sweep": lambda m: hk.sweep(m.lm, CLEAN, {"layer": range(3)}, skip, METRIC, **QUIET),
    "token_attribution": lambda m: hk.token_attribution(m.lm, CLEAN, METRIC),
    "token_losses": lambda m: hk.token_losses(m.lm, CLEAN, top=2),
    "uncertainty": lambda m: hk.uncertainty(m.before),
    "stats.calibration": lambda m: hk.stats.calibration([0.2, 0.7, 0.9], [0, 1, 1], bins=5),
    "stats.compare_attributions": lambda m: hk.stats.compare_attributions(
        hk.attribution(m.lm, CLEAN * 3, CORRUPTED * 3, "resid_pre", METRIC), m.cells
    ),
    "stats.effect_at_damage": lambda m: hk.stats.effect_at_damage(m.doses, 1e-6),
    "stats.lens_summary": lambda m: hk.stats.lens_summary(m.lens),
    "stats.mean_over_doses": lambda m: hk.stats.mean_over_doses(m.doses),
    "stats.mean_over_prompts": lambda m: hk.stats.mean_over_prompts(m.cells),
    "stats.roc": lambda m: hk.stats.roc([0.2, 0.7, 0.9], [0, 1, 1]),
    "stats.shift_summary": lambda m: hk.stats.shift_summary(m.before, m.after),
    "stats.strongest": lambda m: hk.stats.strongest(m.cells),
    "results.changed_cells": lambda m: hk.results.changed_cells(
        {"one": pd.DataFrame({"n": [1.0]})}, {"one": pd.DataFrame({"n": [2.0]})}
    ),
    "results.changed_settings": lambda m: hk.results.changed_settings(
        m.folder / "one", m.folder / "one"
    ),
    "results.compare_results": lambda m: hk.results.compare_results(
        {"one": pd.DataFrame({"n": [1.0]})}, {"one": pd.DataFrame({"n": [2.0]})}
    ),
    "results.list_results": lambda m: hk.results.list_results(m.folder),
    "results.read_table": lambda m: hk.results.read_table(m.folder / "one" / "numbers.csv"),
}


def table_functions() -> set[str]:
    """The names of the public functions that return a DataFrame."""
    names = set()
    rooms = {"": hk, "stats.": hk.stats, "results.": hk.results, "datasets.": hk.datasets}
    for prefix, room in rooms.items():
        for name in getattr(room, "__all__", dir(room)):
            value = getattr(room, name)
            annotations = getattr(value, "__annotations__", {})
            if inspect.isfunction(value) and annotations.get("return") == "pd.DataFrame":
                names.add(prefix + name)
    return names


def test_every_public_function_that_returns_a_table_is_here():
    assert table_functions() == set(TABLES) | ELSEWHERE


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_shown_with_every_column_named_and_unchanged(name, made, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    table = TABLES[name](made)
    copy = table.copy()
    hk.show(table)
    shown = capsys.readouterr().out
    pd.testing.assert_frame_equal(table, copy)
    drawn = [line for line in shown.splitlines() if not line.startswith("more ")]
    assert max(map(cell_len, drawn), default=0) <= 100
    assert not re.search(r"\bnan\b|<NA>|\bNone\b", shown)
    words = set(re.findall(r"\w+", shown))
    assert set(map(str, table.columns)) <= words or table.empty
