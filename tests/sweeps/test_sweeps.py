"""Sweeps: every cell has the numbers of a forward of its own, whatever was left out to get them."""

from dataclasses import replace

import pytest
import torch
from tiny_families import ONE_OF_EACH

import hookkit as hk
from hookkit.sweeps.cells import check_reached
from hookkit.sweeps.plan import FirstEffect
from hookkit.sweeps.shortcuts import shortcuts

METRICS = [hk.metrics.logit_diff(5, 7), hk.metrics.kl()]


def texts(lm):
    """Two pairs of prompts, of 9 and 6 tokens, which differ from the fifth and the fourth on."""
    draws = torch.Generator().manual_seed(0)
    long = torch.randint(3, lm.n_tokens, (9,), generator=draws).tolist()
    short = torch.randint(3, lm.n_tokens, (6,), generator=draws).tolist()
    other, another = list(long), list(short)
    other[4], another[3] = (long[4] + 1) % lm.n_tokens, (short[3] + 1) % lm.n_tokens
    return [long, short], [other, another]


def by_loop(lm, prompts, hooks, metric, *, base_hooks=()):
    """The metric of a whole forward with these hooks: a value for each prompt."""
    run = hk.forward(lm, prompts, *base_hooks, *hooks)
    return metric(run).tolist()


def assert_equal_to_the_loop(lm, prompts, table, hooks, axes, *, base_hooks=(), limit=1e-4):
    for at, found in table.groupby(axes):
        made = hooks(**dict(zip(axes, at, strict=True)))
        wanted = by_loop(
            lm,
            prompts,
            made if isinstance(made, list) else [made],
            METRICS[0],
            base_hooks=base_hooks,
        )
        assert found["logit_diff"].tolist() == pytest.approx(wanted, abs=limit), at


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_patching_in_every_family_equals_a_loop_of_whole_forwards(family):
    lm = hk.tiny(family)
    clean, corrupted = texts(lm)
    sites = [
        name
        for name in ("resid_pre", "resid_mid", "attn_out", "mlp_out")
        if len(lm.layout.layers(name) or []) > 1
    ]
    source = hk.forward(lm, clean, hk.capture([*sites, "resid_post"]))

    def hooks(site, layer, pos):
        return (
            hk.patch(hk.Site(site, layer), source, pos=pos) if lm.layout.find(site, layer) else None
        )

    grid = {"site": [*sites, "resid_post"], "layer": [0, lm.n_layers - 1], "pos": [-5, -2, -1]}
    table = hk.sweep(lm, corrupted, grid, hooks, METRICS, target=source)
    assert table.attrs["sources_not_the_models_own"] == []
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["site", "layer", "pos"])
    assert table["logit_diff_delta"].abs().max() > 1e-3


@pytest.mark.parametrize("family", sorted(name for name in ONE_OF_EACH if "mamba" not in name))
def test_heads_in_every_family_equal_a_loop_of_whole_forwards(family):
    lm = hk.tiny(family)
    clean, corrupted = texts(lm)
    layers = (lm.layout.layers("pattern") or lm.layout.layers("z"))[-2:]
    sites = [
        name
        for name in ("q", "k", "v", "z", "pattern")
        if all(lm.layout.find(name, layer) for layer in layers)
    ]
    source = hk.forward(
        lm, clean, hk.capture([hk.Site(name, layer) for name in sites for layer in layers])
    )

    def hooks(site, layer):
        return [hk.patch(hk.Site(site, layer, 0 if site in ("k", "v") else 1), source)]

    table = hk.sweep(lm, corrupted, {"site": sites, "layer": layers}, hooks, METRICS)
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["site", "layer"])


def by_hand(model, ids, module, edit):
    """The last logits of a plain model with a hand-written hook on a module's output."""
    handle = model.get_submodule(module).register_forward_hook(edit)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "block"), [("llama", "model.layers.{}"), ("gpt2", "transformer.h.{}")]
)
def test_a_patch_of_the_stream_equals_a_hand_written_hook(family, block):
    lm = hk.tiny(family)
    (clean, _), (corrupted, _) = texts(lm)
    kept = {}
    for layer in range(lm.n_layers):
        by_hand(
            lm.model,
            clean,
            block.format(layer),
            lambda m, a, o, n=layer: kept.__setitem__(n, o.clone()),
        )
    table = hk.patching(lm, [clean], [corrupted], "resid_post", hk.metrics.logit_diff(5, 7))
    for layer, pos, found in table[["layer", "pos", "logit_diff"]].itertuples(index=False):

        def put(module, args, output, layer=layer, pos=pos):
            output = output.clone()
            output[:, pos] = kept[layer][:, pos]
            return output

        logits = by_hand(lm.model, corrupted, block.format(layer), put)
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-5)
    assert len(table) == lm.n_layers * len(clean)


def test_ablating_each_head_equals_a_hand_written_hook():
    lm = hk.tiny("llama")
    (clean, _), _ = texts(lm)
    table = hk.ablations(lm, [clean], "z", hk.metrics.logit_diff(5, 7))
    width = lm.sizes["d_head"]
    for layer, head, found in table[["layer", "head", "logit_diff"]].itertuples(index=False):

        def cut(module, args, head=head):
            values = args[0].clone()
            values[..., head * width : (head + 1) * width] = 0
            return (values,)

        projection = lm.model.model.layers[layer].self_attn.o_proj
        handle = projection.register_forward_pre_hook(cut)
        with torch.no_grad():
            logits = lm.model(torch.tensor([clean])).logits[0, -1]
        handle.remove()
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-5)
    assert len(table) == lm.n_layers * lm.sizes["head"]


@pytest.fixture(scope="module")
def lm():
    return hk.tiny("llama")


def patch_grid(lm, clean):
    source = hk.forward(lm, clean, hk.capture("resid_pre"))
    grid = {"layer": range(lm.n_layers), "pos": range(-6, 0)}
    return source, grid, lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), source, pos=pos)


def test_a_wrong_cannot_matter_is_caught(lm, monkeypatch):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    hk.sweep(lm, corrupted, grid, hooks, METRICS[0], verify=18)
    monkeypatch.setattr(FirstEffect, "is_after_last_attention", lambda self, site: True)
    with pytest.raises(hk.errors.Unsupported, match="a shortcut does not hold"):
        hk.sweep(lm, corrupted, grid, hooks, METRICS[0], verify=18)


def test_as_many_cells_are_verified_as_were_asked_for(lm, monkeypatch):
    from hookkit.sweeps import sweep

    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    alone, run = [], sweep.run_base
    monkeypatch.setattr(sweep, "run_base", lambda *a, **k: alone.append(a) or run(*a, **k))
    for count, expected in ((0, 0), (2, 2), (500, 18)):
        alone.clear()
        hk.sweep(lm, corrupted, grid, hooks, METRICS[0], verify=count)
        assert len(alone) == expected


def test_cells_before_the_first_token_that_differs_are_not_run(lm):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    plan = hk.sweep_plan(lm, corrupted, grid, hooks, METRICS[0])
    assert (
        plan.filled == 3 * 3 + 1 * 3
    )  # the short pair differs from its fourth token of six, the long from 5 of 9
    table = hk.sweep(lm, corrupted, grid, hooks, METRICS[0])
    same = table[(table["row"] == 1) & (table["pos"] < -3)]
    assert (same["logit_diff_delta"] == 0).all() and len(same) == 9


def test_a_source_with_edits_is_not_taken_for_the_models_own(lm):
    clean, corrupted = texts(lm)
    source = hk.forward(
        lm, clean, hk.steer("embed", torch.ones(lm.sizes["d_model"])), hk.capture("resid_pre")
    )
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), source, pos=pos)  # noqa: E731
    table = hk.sweep(lm, corrupted, {"layer": [0, 2], "pos": [-6, -1]}, hooks, METRICS)
    assert table.attrs["sources_not_the_models_own"]
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["layer", "pos"])


def test_a_source_of_another_model_is_not_taken_for_the_models_own(lm):
    clean, corrupted = texts(lm)
    other = hk.tiny("llama", seed=1)
    source = hk.forward(other, clean, hk.capture("resid_pre"))
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), source, pos=pos)  # noqa: E731
    table = hk.sweep(lm, corrupted, {"layer": [0, 2], "pos": [-6, -1]}, hooks, METRICS)
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["layer", "pos"])


def test_hooks_under_every_cell_act_in_the_baseline_too(lm):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    under = [hk.ablate("z.1.2"), hk.steer("resid_post.0", torch.ones(lm.sizes["d_model"]), pos=-2)]
    table = hk.sweep(lm, corrupted, grid, hooks, METRICS, base_hooks=under)
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["layer", "pos"], base_hooks=under)
    baseline = METRICS[0](hk.forward(lm, corrupted, *under)).tolist()
    assert table["logit_diff_before"].tolist()[:2] == pytest.approx(baseline, abs=1e-5)


def test_edits_of_every_kind_equal_the_loop(lm):
    clean, corrupted = texts(lm)
    vector = torch.randn(lm.sizes["d_model"], generator=torch.Generator().manual_seed(0))
    edits = {
        "edit": hk.edit("mlp_out.1", lambda values: values * 0.5, pos=-3),
        "function of place": hk.edit(
            "resid_post.0", lambda v, here: v + here.positions[..., None].to(v), pos=slice(2, 5)
        ),
        "embed": hk.steer("embed", vector, pos=-2),
        "mean": hk.ablate("mlp_post.1", to="mean", over=clean, pos=-2),
        "resample": hk.ablate("z.2.1", to="resample", over=clean, per="all"),
        "knockout": hk.knockout(1, 2, query=-1, key=0),
        "skip": hk.skip_block(1),
        "project": hk.project_out("final_norm", vector),
        "force": hk.force(5, margin=3),
        "ban": hk.ban(7),
        "module": hk.scale(hk.module("model.layers.1.mlp.gate_proj"), 0.5, pos=-1),
        "one row": hk.scale("resid_pre.1", 2.0, rows=1),
        "rotated keys": hk.scale("k_rot.1.0", 2.0, pos=1),
    }
    table = hk.sweep(lm, corrupted, {"name": list(edits)}, lambda name: edits[name], METRICS[0])
    for name, found in table.groupby("name"):
        wanted = by_loop(lm, corrupted, [edits[name]], METRICS[0])
        assert found["logit_diff"].tolist() == pytest.approx(wanted, abs=1e-4), name


@pytest.mark.parametrize("site", ["embed", "pos_embed"])
def test_edits_of_embeddings_equal_a_hook_by_hand(site):
    lm = hk.tiny("gpt2")
    prompts, _ = texts(lm)
    module = lm.model.transformer.wte if site == "embed" else lm.model.transformer.wpe
    grid = {"by": [0.0, 3.0], "pos": [1, -1]}
    table = hk.sweep(lm, prompts, grid, lambda by, pos: hk.scale(site, by, pos=pos), METRICS[0])
    for by, pos, row, found in table[["by", "pos", "row", "logit_diff"]].itertuples(index=False):

        def scaled(_module, _args, output, by=by, pos=pos):
            output = output.clone()
            output[:, pos] *= by
            return output

        handle = module.register_forward_hook(scaled)
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompts[row]])).logits[0, -1]
        handle.remove()
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
    assert (table["logit_diff_delta"].abs() > 1e-4).all()


def test_the_metric_may_look_at_another_position(lm):
    clean, corrupted = texts(lm)
    _, _, hooks = patch_grid(lm, clean)
    table = hk.sweep(
        lm, corrupted, {"layer": [0, 2], "pos": [-3, -2, -1]}, hooks, METRICS[0], pos=-2
    )
    for (layer, pos), found in table.groupby(["layer", "pos"]):
        run = hk.forward(lm, corrupted, hooks(layer, pos))
        assert found["logit_diff"].tolist() == pytest.approx(
            METRICS[0](run, pos=-2).tolist(), abs=1e-4
        )
    assert (table[table["pos"] == -1]["logit_diff_delta"] == 0).all()


def test_the_loss_of_a_continuation_equals_a_forward_over_the_whole_text(lm):
    clean, corrupted = texts(lm)
    behind = [(8, 9, 10), (11, 12)]
    _, _, hooks = patch_grid(lm, clean)
    table = hk.sweep(
        lm,
        corrupted,
        {"layer": [0, 1], "pos": [-2, -1]},
        hooks,
        [hk.metrics.loss(behind), METRICS[0]],
    )
    for row, more in enumerate(behind):
        for (layer, pos), found in table[table["row"] == row].groupby(["layer", "pos"]):
            place = len(corrupted[row]) + pos
            edit = hk.patch(hk.Site("resid_pre", layer), patch_source(lm, clean[row]), pos=place)
            run = hk.forward(lm, [corrupted[row] + list(more)], edit)
            logprobs = run.logits[0, -len(more) - 1 : -1].log_softmax(-1)
            wanted = -logprobs.gather(1, torch.tensor(more)[:, None]).mean()
            assert found["loss"].tolist() == pytest.approx([float(wanted)], abs=1e-4)


def patch_source(lm, prompt):
    return hk.forward(lm, [prompt], hk.capture("resid_pre"))


def test_out_of_memory_halves_the_batch_and_goes_on(lm, monkeypatch):
    from hookkit.sweeps import execute as working

    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    wanted = hk.sweep(lm, corrupted, grid, hooks, METRICS)
    real, refused = working.run_cell_prompts, []

    def scarce(trunk, reading, units, *others):
        if len(units.cell_prompts) > 3:
            refused.append(len(units.cell_prompts))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(trunk, reading, units, *others)

    monkeypatch.setattr(working, "run_cell_prompts", scarce)
    found = hk.sweep(lm, corrupted, grid, hooks, METRICS)
    assert refused and found["logit_diff"].tolist() == pytest.approx(
        wanted["logit_diff"].tolist(), abs=1e-5
    )


def test_a_small_budget_means_more_forwards_and_the_same_numbers(lm):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    small, large = (
        hk.sweep_plan(lm, corrupted, grid, hooks, METRICS, memory=memory)
        for memory in (60_000, 10**9)
    )
    assert small.forwards > large.forwards and small.memory < large.memory
    found = hk.sweep(lm, corrupted, grid, hooks, METRICS, memory=60_000)
    wanted = hk.sweep(lm, corrupted, grid, hooks, METRICS)
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), abs=1e-5)


def test_a_model_that_allows_no_shortcut_is_swept_all_the_same(lm):
    clean, corrupted = texts(lm)
    bare = hk.LM(lm.model, lm.tokenizer)
    known = shortcuts(bare)
    key = next(name for name, value in bare.trial_results.items() if value is known)
    _, grid, hooks = patch_grid(lm, clean)
    wanted = hk.sweep(lm, corrupted, grid, hooks, METRICS)
    for name, words in (
        *((each, "no: because") for each in ("last", "prefix", "grow")),
        ("batch", "because"),
    ):
        from dataclasses import replace

        bare.trial_results[key] = replace(
            bare.trial_results[key],
            **{name: False},
            why={**bare.trial_results[key].why, name: "because"},
        )
        assert words in repr(hk.sweep_plan(bare, corrupted, grid, hooks, METRICS))
        found = hk.sweep(bare, corrupted, grid, hooks, METRICS)
        assert found["logit_diff"].tolist() == pytest.approx(
            wanted["logit_diff"].tolist(), abs=1e-5
        )
    assert known.batch and known.grow and known.prefix and known.last


def test_behind_the_last_attention_only_the_metrics_position_runs(lm):
    ids = texts(lm)[0][0]
    hooks = {
        name: hk.parse_hook(name)
        for name in ("ablate:z.1.0", "ablate:z.2.0", "scale:mlp_in.2*3", "ablate:mlp_post.2")
    }
    hooks["mixed"] = hk.edit(
        "resid_mid.2", lambda values: values.flip(1)
    )  # the end gets what was at the beginning
    assert shortcuts(lm, [ids]).last
    mlp, tokens = lm.model.model.layers[-1].mlp, []
    forward = mlp.act_fn.forward
    mlp.act_fn.forward = lambda x: (tokens.append(x.shape[:-1].numel()), forward(x))[1]
    try:
        # In one forward with the unedited prompt, or after it
        for with_it, counts in (
            ("ablate:z.2.0", [1 + 2]),
            ("scale:mlp_in.2*3", [1 + 2]),
            ("ablate:mlp_post.2", [9 + 9 + 1]),  # the second cell has its last token only
            ("mixed", [9, 2 * 9]),
        ):
            tokens.clear()
            names = [
                "ablate:z.1.0",
                with_it,
            ]  # the first of them needs all nine positions in the blocks before
            table = hk.sweep(lm, [ids], {"hook": names}, lambda hook: hooks[hook], METRICS[0])
            assert tokens == counts, with_it
            wanted = [by_loop(lm, [ids], [hooks[name]], METRICS[0])[0] for name in names]
            assert table["logit_diff"].tolist() == pytest.approx(wanted, abs=1e-5)
    finally:
        del mlp.act_fn.forward


def test_hooks_of_the_users_own_see_whole_batches_of_one_cell(lm):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    hk.sweep_plan(
        lm, corrupted, grid, hooks, METRICS
    )  # whether the model reads ahead is found out once, by three rows
    seen = []
    handle = lm.model.model.layers[1].register_forward_hook(
        lambda m, a, output: seen.append(output.shape[0])
    )
    try:
        table = hk.sweep(lm, corrupted, grid, hooks, METRICS)
        plan = hk.sweep_plan(lm, corrupted, grid, hooks, METRICS)
    finally:
        handle.remove()
    assert set(seen) == {2} and "hooks that are not hookkit's" in repr(plan)
    assert_equal_to_the_loop(lm, corrupted, table, hooks, ["layer", "pos"])


def test_no_hook_is_left_after_any_ending(lm):
    clean, corrupted = texts(lm)
    _, grid, hooks = patch_grid(lm, clean)
    before = carried(lm.model)
    hk.sweep(lm, corrupted, grid, hooks, METRICS)
    assert carried(lm.model) == before

    def fails(values):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        hk.sweep(
            lm,
            corrupted,
            {"layer": [1]},
            lambda layer: hk.edit(hk.Site("z", layer), fails),
            METRICS,
        )
    assert any("in a sweep" in note for note in caught.value.__notes__)
    assert carried(lm.model) == before


def carried(model):
    return [
        (
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            sorted(k for k in m.__dict__ if k in ("forward", "config")),
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grid": {}}, hk.errors.EmptySelection, "no dimension"),
        ({"grid": {"layer": []}}, hk.errors.EmptySelection, "'layer' is empty"),
        ({"grid": {"row": [1]}}, hk.errors.BadHook, "a column of the table"),
        ({"grid": {"layer": [99]}}, hk.errors.OutOfRange, "layer|layers"),
        ({"pos": 30}, hk.errors.OutOfRange, "the metric looks at position 30"),
        ({"metrics": []}, hk.errors.BadHook, "no metric"),
        ({"metrics": hk.metrics.logit_diff([5], [7])}, hk.errors.BadPrompt, "one entry for each"),
        (
            {"hooks": lambda layer: hk.capture(hk.Site("z", layer))},
            hk.errors.BadHook,
            "keeps metrics only",
        ),
        ({"hooks": lambda layer: None}, hk.errors.EmptySelection, "None for every point"),
        ({"hooks": lambda layer: hk.ablate("z.0", pos=40)}, hk.errors.OutOfRange, "position 40"),
        ({"control": "magic"}, hk.errors.BadArgument, "control='magic'"),
        ({"control": "resample"}, hk.errors.BadHook, "no patch"),
        ({"metrics": lambda logits: logits}, hk.errors.BadEdit, "one number for each row"),
        ({"verfy": 3}, hk.errors.UnknownKeyword, "verify"),
    ],
)
def test_a_mistake_says_what_to_do(lm, change, error, words):
    _, corrupted = texts(lm)
    given = {
        "grid": {"layer": [0]},
        "hooks": lambda layer: hk.ablate(hk.Site("z", layer)),
        "metrics": METRICS,
    } | change
    with pytest.raises(error, match=words):
        hk.sweep(
            lm, corrupted, given.pop("grid"), given.pop("hooks"), given.pop("metrics"), **given
        )


def test_a_sweep_inside_a_block_is_refused(lm):
    _, corrupted = texts(lm)
    with hk.attach(lm, hk.scale("z.0", 0.5)):
        hk.forward(lm, corrupted)
        with pytest.raises(hk.errors.Unsupported, match="base_hooks="):
            hk.sweep(
                lm, corrupted, {"layer": [0]}, lambda layer: hk.ablate(hk.Site("z", layer)), METRICS
            )


def test_a_sweep_of_a_model_that_reads_ahead_runs_whole_prompts():
    lm = hk.tiny("gemma3_text", config={"use_bidirectional_attention": True})
    prompts = [[5, 6, 7, 8], [9, 10, 11]]

    def steer(pos):
        return hk.steer("resid_post.0", torch.arange(32.0), pos=pos)

    table = hk.sweep(lm, prompts, {"pos": [0, 2]}, steer, hk.metrics.logit(7), pos=1)
    for cell in table.to_dict(orient="records"):

        def add(module, args, output, pos=cell["pos"]):
            added = torch.arange(32.0).view(1, 1, -1)
            return output.index_add(1, torch.tensor([pos]), added)

        handle = lm.model.model.layers[0].register_forward_hook(add)
        with torch.no_grad():
            expected = lm.model(torch.tensor([prompts[cell["row"]]])).logits[0, 1, 7]
        handle.remove()
        assert cell["logit"] == pytest.approx(float(expected), abs=1e-4)
        assert abs(cell["logit_delta"]) > 1e-4  # the edit at position 2 too


def test_only_the_logits_that_the_metrics_read_are_computed(lm):
    def hooks(layer):
        return hk.ablate(hk.Site("attn_out", layer))

    grid = {"layer": range(lm.n_layers)}
    metrics = [hk.metrics.logit_diff((5, 9), 3), hk.metrics.logit(300)]
    plan = hk.sweep_plan(lm, [range(5, 13)], grid, hooks, metrics)
    assert plan.tokens == [3, 5, 9, 300] and "only the logits of the metric's tokens" in repr(plan)
    table = hk.sweep(lm, [range(5, 13)], grid, hooks, metrics, verify=3)
    for row in table.itertuples():
        logits = hk.forward(lm, [range(5, 13)], hooks(row.layer)).logits[0, -1]
        expected = (logits[5] + logits[9]) / 2 - logits[3]
        assert row.logit_diff == pytest.approx(float(expected), abs=1e-5)
        assert row.logit == pytest.approx(float(logits[300]), abs=1e-5)
    banned = hk.sweep(lm, [range(5, 13)], {"token": [3, 4]}, lambda token: hk.ban(token), metrics)
    assert banned["logit_diff"].tolist()[0] == torch.inf


def test_inputs_with_other_prompts_have_their_own_positions():
    lm = hk.tiny("llama")
    grid = {"pos": [4]}
    metric = hk.metrics.logit(7)
    plan = hk.sweep_plan(lm, [[1, 2, 3, 4, 5]], grid, lambda pos: hk.ablate("z.0", pos=pos), metric)
    shorter = replace(plan.inputs, rows=((1, 2, 3),), run_rows=((1, 2, 3),))
    check_reached(plan.cells[0].hook_points, plan.inputs)
    with pytest.raises(hk.errors.OutOfRange, match="position 4 of row 0, which has 3 tokens"):
        check_reached(plan.cells[0].hook_points, shorter)
