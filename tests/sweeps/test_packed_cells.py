"""Cells side by side in one row of a batch: the same numbers as one forward for each cell, where it is not possible, and what the plan says."""

from dataclasses import replace

import pytest
import torch
from tiny_families import ALL, made

import hookkit as hk
from hookkit.runs.growing_batch import TokenPlaces
from hookkit.sweeps.jobs import JobChooser
from hookkit.sweeps.shortcuts import shortcuts

METRIC = hk.metrics.logit_diff(5, 7)
MIXED_LENGTHS = [[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53], [27, 18, 28, 18, 28, 45]]
ONE_LENGTH = [row[:5] for row in MIXED_LENGTHS]

PACKED = [
    "llama",
    "gpt2",  # its blocks are given the mask by position
    "gemma2",  # sliding windows, soft-caps, eager
    "qwen3",
    "gpt_neox",
    "phi",  # attention and MLP in parallel
    "mixtral",
    "deepseek_v3",  # keys and values of different widths
    "gpt_oss",  # attention sinks
]
NOT_PACKED = {
    "doge": "changes the mask",  # chooses the keys of the largest weights
    "bloom": "not transformers' own",
    "gpt_neo": "not transformers' own",
    "jamba": "a trial",
}


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Packs whatever may be packed: in these narrow models attention to other cells costs much."""
    monkeypatch.setattr(JobChooser, "packed_cost", lambda self, job: 0.0)


def patching(lm, prompts):
    """A grid of patches and steers at every block and the last four positions."""
    others = [[*row[:-3], 44, *row[-2:]] for row in prompts]
    source = hk.forward(lm, others, hk.capture("resid_pre"), logits=False)

    def hooks(layer, pos, kind):
        if kind == "patch":
            return hk.patch(hk.Site("resid_pre", layer), source, pos=pos)
        site = hk.Site(kind, layer)
        return hk.steer(site, torch.ones(lm.shape(site)), pos=pos)

    grid = {"layer": range(lm.n_layers), "pos": [-4, -3, -2, -1], "kind": ["patch", "mlp_out", "z"]}
    return grid, hooks


def by_loop(lm, prompts, grid, hooks):
    """The metric of each cell from forwards of one prompt each."""
    values = []
    for layer in grid["layer"]:
        for pos in grid["pos"]:
            for kind in grid["kind"]:
                hook = hooks(layer, pos, kind)
                for number, row in enumerate(prompts):
                    edit = hook
                    if kind == "patch":
                        other = [*row[:-3], 44, *row[-2:]]
                        own = hk.forward(lm, [other], hk.capture("resid_pre"), logits=False)
                        edit = hk.patch(hk.Site("resid_pre", layer), own, pos=pos)
                    logits = hk.forward(lm, [row], edit).logits[0, -1]
                    values.append((layer, pos, kind, number, float(logits[5] - logits[7])))
    return values


@pytest.mark.parametrize("prompts", [MIXED_LENGTHS, ONE_LENGTH], ids=["mixed", "one length"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_cells_are_the_cells_of_a_loop(family, prompts):
    lm = made(family)
    grid, hooks = patching(lm, prompts)
    plan = hk.sweep_plan(lm, prompts, grid, hooks, METRIC)
    assert plan.shortcuts.pack, plan.shortcuts.why
    assert any(job.packed for job in plan.all_jobs)
    table = hk.sweep(lm, prompts, grid, hooks, METRIC)
    found = table.set_index(["layer", "pos", "kind", "row"])["logit_diff"]
    for layer, pos, kind, row, value in by_loop(lm, prompts, grid, hooks):
        assert found[layer, pos, kind, row] == pytest.approx(value, abs=2e-4, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_packed_cells_have_the_numbers_of_rows_in_every_family(family):
    lm = made(family)
    site = next((name for name in ("mlp_out", "resid_pre") if name in lm.layout.names), "")
    if not site or family in ("recurrent_gemma", "deepseek_v4"):
        pytest.skip("no such site, or no batches with padding")
    layers = lm.layout.layers(site)
    grid = {"layer": layers, "pos": [-3, -2, -1]}
    vector = torch.ones(lm.shape(hk.Site(site, layers[0])))
    hooks = lambda layer, pos: hk.steer(hk.Site(site, layer), vector, pos=pos)  # noqa: E731
    packed = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, METRIC)
    for name, value in list(lm.trial_results.items()):
        if getattr(value, "pack", False):
            lm.trial_results[name] = replace(value, pack=False, why={"pack": "because"})
    by_rows = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, METRIC)
    assert packed["logit_diff"].tolist() == pytest.approx(
        by_rows["logit_diff"].tolist(), abs=2e-4, rel=2e-4
    )


@pytest.mark.parametrize("family", NOT_PACKED)
def test_where_cells_cannot_be_packed_the_plan_says_why(family):
    lm = made(family)
    kind = "mlp_out" if "mlp_out" in lm.layout.names else "resid_post"
    hooks = lambda layer, pos: hk.scale(hk.Site(kind, layer), 0.5, pos=pos)  # noqa: E731
    plan = hk.sweep_plan(lm, MIXED_LENGTHS, {"layer": [0, 1], "pos": [-2, -1]}, hooks, METRIC)
    assert not plan.shortcuts.pack and NOT_PACKED[family] in plan.shortcuts.why["pack"]
    assert not any(job.packed for job in plan.all_jobs)
    assert "pack            no: " in repr(plan)


def test_the_unedited_prompts_run_in_the_same_forward():
    lm = hk.tiny("llama")
    grid, hooks = patching(lm, ONE_LENGTH)
    plan = hk.sweep_plan(lm, ONE_LENGTH, grid, hooks, METRIC)
    assert plan.forwards == 1 and plan.all_jobs[0].n_unedited == len(ONE_LENGTH)
    table = hk.sweep(lm, ONE_LENGTH, grid, hooks, METRIC)
    plain = hk.forward(lm, ONE_LENGTH).logits[:, -1]
    for row, delta, value in table[["row", "logit_diff_delta", "logit_diff"]].itertuples(
        index=False
    ):
        unedited = float(plain[row, 5] - plain[row, 7])
        assert value - delta == pytest.approx(unedited, abs=1e-4)


def test_a_source_of_another_model_is_found_where_the_unedited_prompts_run_with_the_cells():
    lm = hk.tiny("llama")
    foreign = hk.forward(hk.tiny("llama", seed=1), ONE_LENGTH, hk.capture("resid_pre"))
    grid = {"layer": [0, 1], "pos": [-3, -1]}
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), foreign, pos=pos)  # noqa: E731
    assert hk.sweep_plan(lm, ONE_LENGTH, grid, hooks, METRIC).running == 0
    table = hk.sweep(lm, ONE_LENGTH, grid, hooks, METRIC)
    for layer, pos, row, found in table[["layer", "pos", "row", "logit_diff"]].itertuples(
        index=False
    ):
        own = hk.forward(hk.tiny("llama", seed=1), [ONE_LENGTH[row]], hk.capture("resid_pre"))
        edit = hk.patch(hk.Site("resid_pre", layer), own, pos=pos)
        logits = hk.forward(lm, [ONE_LENGTH[row]], edit).logits[0, -1]
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_post", "z"])
def test_sources_at_the_last_block_are_compared_with_whole_rows(site, monkeypatch):
    from hookkit.sweeps import execute

    lm = hk.tiny("llama")
    found = []
    compare = execute.find_foreign_source
    monkeypatch.setattr(
        execute, "find_foreign_source", lambda *given: found.append(compare(*given)) or found[-1]
    )
    source = hk.forward(lm, [[*row[:-1], 44] for row in ONE_LENGTH], hk.capture(site))
    hooks = lambda layer, pos: hk.patch(hk.Site(site, layer), source, pos=pos)  # noqa: E731
    hk.sweep(lm, ONE_LENGTH, {"layer": [1, 2], "pos": [-4, -1]}, hooks, METRIC)
    assert found == ["", ""]


def test_a_sweep_with_a_trial_from_disk_may_be_the_first_thing_that_a_model_runs():
    other = hk.tiny("llama")
    hooks = lambda layer, pos: hk.scale(hk.Site("z", layer), 0.5, pos=pos)  # noqa: E731
    grid = {"layer": [0, 1, 2], "pos": [-3, -1]}
    again = hk.sweep(other, MIXED_LENGTHS, grid, hooks, METRIC)
    lm = hk.LM(other.model, other.tokenizer)
    for name, result in other.trial_results.items():
        if str(name).startswith(("shortcuts", "reads_ahead")):
            lm.trial_results[name] = result
    table = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, METRIC)  # tries a padded row before
    assert table["logit_diff"].tolist() == pytest.approx(again["logit_diff"].tolist(), abs=1e-5)


def test_too_little_memory_for_both_runs_the_unedited_prompts_first(monkeypatch):
    from hookkit.sweeps import execute

    lm = hk.tiny("llama")
    grid, hooks = patching(lm, ONE_LENGTH)
    wanted = hk.sweep(lm, ONE_LENGTH, grid, hooks, METRIC)
    refused = []

    def scarce(*arguments):
        refused.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(execute, "run_with_unedited", scarce)
    found = hk.sweep(lm, ONE_LENGTH, grid, hooks, METRIC)
    assert len(refused) == 1
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), abs=1e-5)


def test_the_loss_of_a_continuation_reads_several_positions_of_a_packed_row():
    lm = hk.tiny("llama")
    continuation = (11, 12, 13)
    hooks = lambda layer, pos: hk.scale(hk.Site("mlp_out", layer), 3.0, pos=pos)  # noqa: E731
    grid = {"layer": [0, 1, 2], "pos": [-3, -2, -1]}
    metric = hk.metrics.loss([continuation] * 3)
    plan = hk.sweep_plan(lm, MIXED_LENGTHS, grid, hooks, metric)
    assert any(job.packed for job in plan.all_jobs)
    table = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, metric)
    for layer, pos, row, value in table[["layer", "pos", "row", "loss"]].itertuples(index=False):
        prompt = MIXED_LENGTHS[row]
        edit = hk.scale(hk.Site("mlp_out", layer), 3.0, pos=len(prompt) + pos)
        logits = hk.forward(lm, [[*prompt, *continuation]], edit).logits[0, -4:-1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(continuation))
        assert value == pytest.approx(float(wanted), abs=1e-4)


def test_functions_and_sites_inside_attention_are_not_packed():
    lm = hk.tiny("llama")
    flip = hk.edit("resid_mid.1", lambda values: values.flip(1))
    kinds = {"function": flip, "scores": hk.ablate("scores.1.0"), "plain": hk.scale("z.1", 0.5)}
    plan = hk.sweep_plan(lm, ONE_LENGTH, {"kind": list(kinds)}, lambda kind: kinds[kind], METRIC)
    assert plan.chooser.packable_cells == {2}
    table = hk.sweep(lm, ONE_LENGTH, {"kind": list(kinds)}, lambda kind: kinds[kind], METRIC)
    for kind, row, value in table[["kind", "row", "logit_diff"]].itertuples(index=False):
        logits = hk.forward(lm, [ONE_LENGTH[row]], kinds[kind]).logits[0, -1]
        assert value == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)


@pytest.mark.parametrize("n_unedited", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, None])
def test_a_token_sees_its_own_cell_and_its_prompt_before_the_edit(dtype, n_unedited):
    prompts, widths, columns = [0, 1, 0, 1, 1], [6, 6, 2, 3, 1], 6
    if not n_unedited:
        prompts, widths = prompts[2:], widths[2:]
    places = TokenPlaces.of_rows(prompts, widths, columns, n_unedited)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    if dtype is not None:
        causal[1, :, :, 0] = False  # the second prompt is padded on the left
    of_rows = {
        torch.bool: causal,
        torch.float32: torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo().min),
        None: None,
    }[dtype]
    mask = places.mask(of_rows, past=0)
    keys = [(int(p), int(c), None) for p, c in zip(*places.prefix, strict=True)]
    tokens = list(
        zip(places.prompts.tolist(), places.columns.tolist(), places.owners.tolist(), strict=True)
    )
    for query, (prompt, column, owner) in enumerate(tokens):
        start = columns - widths[owner]
        for key, (other, at, its_owner) in enumerate([*keys, *tokens]):
            is_before = (its_owner is None or its_owner < n_unedited) and at < start
            seen = prompt == other and at <= column and (its_owner == owner or is_before)
            if dtype is not None and prompt == 1 and at == 0:
                seen = False
            value = mask[0, 0, query, key]
            assert bool(value if dtype is not torch.float32 else value == 0) == seen


def test_a_model_that_allows_no_packing_gives_the_same_numbers():
    lm = hk.tiny("llama")
    grid, hooks = patching(lm, MIXED_LENGTHS)
    packed = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, METRIC)
    known = shortcuts(lm)
    for name, value in list(lm.trial_results.items()):
        if getattr(value, "pack", False):
            lm.trial_results[name] = replace(value, pack=False, why={"pack": "because"})
    assert known.pack
    assert "pack            no: because" in repr(
        hk.sweep_plan(lm, MIXED_LENGTHS, grid, hooks, METRIC)
    )
    by_rows = hk.sweep(lm, MIXED_LENGTHS, grid, hooks, METRIC)
    assert packed["logit_diff"].tolist() == pytest.approx(by_rows["logit_diff"].tolist(), abs=1e-5)
