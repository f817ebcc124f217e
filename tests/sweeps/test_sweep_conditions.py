"""Sweeps where models and prompts are not as in the paper: dtypes, wrappers, windows, lengths, functions that look far."""

import contextlib
import warnings

import pytest
import torch
from conftest import hooks_on
from torch import nn

import hookkit as hk
from hookkit.errors import BadArgument, BadHook, DroppedOut, NeverFired
from hookkit.sweeps.shortcuts import shortcuts

VECTOR = torch.linspace(-1, 1, 32)
METRIC = hk.metrics.logit_diff(5, 7)
LAYERS = (0, 1, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> hk.LM:
    """A model that no test changes."""
    return hk.tiny("llama")


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths."""
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=draws).tolist() for length in lengths]


PROMPTS = drawn(9, 6, 9)


def block(model: nn.Module, layer: int) -> nn.Module:
    found = next(
        each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == 3
    )
    return found[layer]


@contextlib.contextmanager
def added(module: nn.Module, pos: int, vector: torch.Tensor = VECTOR):
    """A hand-written hook that adds a vector to what a block reads at one position."""

    def before(_module, args, kwargs):
        name = None if args else "hidden_states"
        values = (args[0] if args else kwargs[name]).clone()
        values[:, pos] += vector.to(values)
        return ((values, *args[1:]), kwargs) if args else (args, {**kwargs, name: values})

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_hand(model: nn.Module, ids: list[int], layer: int, pos: int, look: int = -1) -> float:
    """The metric of the plain model for one prompt by itself, steered by the hand-written hook."""
    with added(block(model, layer), pos):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, look].float()
    return float(logits[5] - logits[7])


def steered(layer: int, pos) -> hk.types.Hook:
    return hk.steer(hk.Site("resid_pre", layer), VECTOR, pos=pos)


def assert_as_by_hand(
    lm, model, prompts, places, *, limit: float = 1e-4, layers=LAYERS, **settings
):
    """A sweep of a steered stream against the plain model, prompt by prompt."""
    table = hk.sweep(lm, prompts, {"layer": layers, "pos": places}, steered, METRIC, **settings)
    rows = [prompts] if prompts and isinstance(prompts[0], int) else prompts
    for layer, pos, row, found in table[["layer", "pos", "row", "logit_diff"]].itertuples(
        index=False
    ):
        assert found == pytest.approx(by_hand(model, rows[row], layer, pos), abs=limit), (
            layer,
            pos,
            row,
        )
    assert len(table) == len(layers) * len(places) * len(rows)
    assert table["logit_diff_delta"].abs().max() > 0.05
    return table


# ---- prompts


def test_prompts_may_be_one_text_texts_ids_or_what_a_tokenizer_gave(llama):
    text = "I like oat milk in my"
    ids = llama.encode(text)
    batch = {
        "input_ids": torch.tensor([[0, *ids[:4]], ids[:5]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5]),
    }
    for prompts, rows in (
        (text, [ids]),
        ([text, "Tea"], [ids, llama.encode("Tea")]),
        (ids, [ids]),
        (torch.tensor([ids, ids]), [ids, ids]),
        (batch, [ids[:4], ids[:5]]),
    ):
        table = hk.sweep(llama, prompts, {"layer": [1]}, lambda layer: steered(layer, -1), METRIC)
        wanted = [by_hand(llama.model, row, 1, len(row) - 1) for row in rows]
        assert table["logit_diff"].tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral", "bloom"])
def test_prompts_of_one_token_and_of_sixty_share_a_batch(kind):
    lm = hk.tiny(kind)
    assert_as_by_hand(lm, lm.model, drawn(60, 1, 2, 33), [-1])
    assert_as_by_hand(lm, lm.model, drawn(1, 1), [0])


@pytest.mark.parametrize(
    "kind", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt_neo", "cohere2", "lfm2"]
)
def test_a_sliding_window_is_no_hindrance(kind):
    lm = hk.tiny(kind)  # with windows of 6
    table = assert_as_by_hand(
        lm, lm.model, drawn(20, 13), [0, 1, 5, 6, 7, 12, -1, -6, -7, -8], limit=2e-4
    )
    assert "shar" in table.attrs["plan"]
    if kind != "lfm2":  # which has convolutions
        assert shortcuts(lm).prefix


def test_a_position_may_be_the_tokens_that_cover_a_text(llama):
    prompts = ["Mary went to the store", "John and Mary"]
    places = [hk.at("Mary"), hk.at(" the", which=0)]
    table = hk.sweep(llama, prompts[:1], {"layer": LAYERS, "pos": places}, steered, METRIC)
    assert table["pos"].tolist() == [place for _ in LAYERS for place in places]
    ids = llama.encode(prompts[0])
    (the,) = (n for n, token in enumerate(ids) if llama.string(token) == " the")
    found = table[table["pos"] == places[1]]["logit_diff"].tolist()
    assert found == pytest.approx(
        [by_hand(llama.model, ids, layer, the) for layer in LAYERS], abs=1e-4
    )
    both = hk.sweep(llama, prompts, {"pos": [hk.at("Mary")]}, lambda pos: steered(1, pos), METRIC)
    alone = [hk.forward(llama, prompt, steered(1, hk.at("Mary"))) for prompt in prompts]
    assert both["logit_diff"].tolist() == pytest.approx(
        [METRIC(run).item() for run in alone], abs=1e-4
    )
    with pytest.raises(hk.errors.OutOfRange, match=r"at\('Mary'\) was asked for.*") as caught:
        hk.sweep(
            llama,
            ["no name", *prompts],
            {"pos": [hk.at("Mary")]},
            lambda pos: steered(1, pos),
            METRIC,
        )
    assert "in the sweep's cell pos=at('Mary')" in caught.value.__notes__


def test_one_hook_under_every_cell_needs_no_list(small):
    one = hk.sweep(
        small,
        PROMPTS,
        {"pos": [-1]},
        lambda pos: steered(1, pos),
        METRIC,
        base_hooks=hk.ablate("z.0.1"),
    )
    listed = hk.sweep(
        small,
        PROMPTS,
        {"pos": [-1]},
        lambda pos: steered(1, pos),
        METRIC,
        base_hooks=[hk.ablate("z.0.1")],
    )
    assert one["logit_diff"].tolist() == listed["logit_diff"].tolist()
    grid = hk.ablations(
        small, PROMPTS, "z", METRIC, base_hooks=hk.ablate("z.0.1"), layers=[0], heads=[1]
    )
    assert (grid["logit_diff_delta"].abs() < 1e-5).all()


def test_hooks_of_some_rows_leave_the_others_alone(small):
    table = hk.sweep(
        small,
        PROMPTS,
        {"which": [0, 1, 2]},
        lambda which: hk.steer("resid_pre.1", VECTOR, pos=-2, rows=which),
        METRIC,
    )
    for which, row, found, delta in table[
        ["which", "row", "logit_diff", "logit_diff_delta"]
    ].itertuples(index=False):
        if which != row:
            assert delta == 0
        else:
            assert found == pytest.approx(
                by_hand(small.model, PROMPTS[row], 1, len(PROMPTS[row]) - 2), abs=1e-4
            )


def test_a_small_memory_takes_the_prompts_a_part_at_a_time(small):
    prompts, others = drawn(9, 6, 9, 4, 12, 9, seed=1), drawn(9, 6, 9, 4, 12, 9, seed=2)
    under = [hk.scale("mlp_out.0", 0.5), hk.steer("resid_post.0", VECTOR, pos=-1, rows=[1, 4])]
    hooks = lambda layer, pos: steered(layer, pos)  # noqa: E731
    grid = {"layer": LAYERS, "pos": [-3, -1]}
    metrics = [METRIC, hk.metrics.kl(), hk.metrics.top1_changed()]
    for target in (others, others[0], hk.forward(small, others)):
        whole = hk.sweep(small, prompts, grid, hooks, metrics, base_hooks=under, target=target)
        assert hk.sweep_plan(small, prompts, grid, hooks, metrics, memory=60_000).forwards > 12
        parts = hk.sweep(
            small,
            prompts,
            grid,
            hooks,
            metrics,
            base_hooks=under,
            target=target,
            memory=60_000,
            verify=6,
        )
        for name in whole.columns:
            limit = (
                {"rel": 1e-3, "abs": 1e-4, "nan_ok": True}
                if name.endswith("effect")
                else {"abs": 1e-4}
            )
            assert parts[name].tolist() == pytest.approx(whole[name].tolist(), **limit), name
    there = METRIC(hk.forward(small, others)).tolist()
    way = [
        there[row] - was for row, was in zip(whole["row"], whole["logit_diff_before"], strict=True)
    ]
    assert whole["logit_diff_effect"].tolist() == pytest.approx(
        (whole["logit_diff_delta"] / way).tolist(), rel=1e-3
    )


def test_the_targets_prompts_are_run_under_the_hooks_of_every_cell(small):
    prompts, others = drawn(6, 6, seed=1), drawn(6, 6, seed=2)
    under = [hk.ablate("z.1.2")]
    table = hk.sweep(
        small,
        prompts,
        {"layer": LAYERS},
        lambda layer: steered(layer, -2),
        METRIC,
        base_hooks=under,
        target=others,
    )
    run = hk.sweep(
        small, prompts, {"layer": LAYERS}, lambda layer: steered(layer, -2), METRIC, base_hooks=under,
        target=hk.forward(small, others, *under),
    )  # fmt: skip
    assert table["logit_diff_effect"].tolist() == pytest.approx(
        run["logit_diff_effect"].tolist(), rel=1e-3
    )


# ---- models


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.15), (torch.float64, 1e-6)])
def test_other_dtypes(dtype, limit):
    model = hk.tiny("llama").model.to(dtype)
    table = assert_as_by_hand(hk.LM(model), model, drawn(9, 6), [-1, -3], limit=limit)
    assert "cells share forwards" in table.attrs["plan"]


def test_a_compiled_model_is_swept_as_it_is_written():
    model = hk.tiny("llama").model
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=torch.tensor([PROMPTS[0]]))  # compiled before any hook
    assert_as_by_hand(hk.LM(compiled), model, drawn(9, 6), [-1, -3])


def test_a_model_with_adapters_is_swept_with_them():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(hk.tiny("llama").model, config).eval()
    lm = hk.LM(model)
    table = assert_as_by_hand(lm, model, drawn(9, 6), [-1, -3])
    assert "cells share forwards" in table.attrs["plan"]
    with model.disable_adapter():
        plain = hk.sweep(lm, drawn(9, 6), {"layer": LAYERS, "pos": [-1, -3]}, steered, METRIC)
    assert (plain["logit_diff"] - table["logit_diff"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hooks_that_output_hidden_states_left_behind_do_no_harm(kind):
    lm = hk.tiny(kind)
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    before = hooks_on(lm.model)
    table = assert_as_by_hand(lm, lm.model, drawn(9, 6), [-1, -3])
    assert "cells share forwards" in table.attrs["plan"] and hooks_on(lm.model) == before
    with torch.no_grad():
        again = lm.model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert len(again.hidden_states) == 4
    lm.model.config.output_hidden_states = True  # in every forward
    assert_as_by_hand(hk.LM(lm.model), lm.model, drawn(9, 6), [-1, -3])


def test_a_hook_on_the_wrapper_counts_as_the_users_own():
    model = torch.compile(hk.tiny("llama").model, backend="eager")
    seen = []
    handle = model.register_forward_hook(
        lambda module, args, output: seen.append(output.logits.shape[0])
    )
    hk.sweep(hk.LM(model), PROMPTS, {"layer": LAYERS, "pos": [-1]}, steered, METRIC)
    handle.remove()
    assert set(seen) == {3}, "it sees whole batches, and nothing but them"


def test_a_model_in_training_mode_warns_where_it_drops_numbers_out():
    lm = hk.tiny("gpt2")
    lm.model.train()
    with pytest.warns(DroppedOut, match="is in training mode and drops numbers out") as caught:
        table = hk.sweep(lm, PROMPTS, {"layer": [0]}, lambda layer: steered(layer, -1), METRIC)
    assert {each.filename for each in caught} == {__file__}
    assert "alone" in table.attrs["plan"], "no shortcut can be seen to hold"
    calm = hk.tiny("llama")  # without dropout
    calm.model.train()
    assert_as_by_hand(calm, calm.model, drawn(9, 6), [-1])


# ---- edits


def test_the_logits_may_be_edited_in_every_cell(small):
    edits = {
        "force": hk.force(5, margin=3.0),
        "ban": hk.ban(7),
        "boost": hk.boost(5, by=2.0),
        "swap": hk.swap(5, 7),
        "cap": hk.cap(5, logit=-3.0),
        "rank": hk.set_rank(5, 3),
        "when": hk.boost(5, by=2.0, when=lambda logits, here: logits[..., 5] < logits[..., 7]),
    }
    table = hk.sweep(
        small,
        PROMPTS,
        {"edit": list(edits)},
        lambda edit: edits[edit],
        [hk.metrics.logit(5), hk.metrics.logit(7), hk.metrics.rank(5)],
    )
    with torch.no_grad():
        alone = [small.model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
    found = {name: part.reset_index() for name, part in table.groupby("edit")}
    for row, said in enumerate(alone):
        five, seven = float(said[5]), float(said[7])
        wanted = {
            "force": (max(float(said.max()), five) + 3.0, seven),
            "ban": (five, -torch.inf),
            "boost": (five + 2, seven),
            "swap": (seven, five),
            "cap": (min(five, -3.0), seven),
            "when": (five + 2 if five < seven else five, seven),
        }
        for name, (first, second) in wanted.items():
            at = found[name].loc[row]
            assert (at["logit"], at["logit_2"]) == pytest.approx((first, second), abs=1e-4), name
        assert found["rank"].loc[row, "rank"] == 3
    force = found["force"]["logit"] - found["force"]["logit_before"]
    assert (force > 0).all()


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe"]
)
def test_what_a_router_says_may_be_edited_in_every_cell(kind):
    lm = hk.tiny(kind)
    layer = lm.layout.layers("router_logits")[0]
    edits = {
        "turned": hk.edit(hk.Site("router_logits", layer), lambda values: -values, pos=-2),
        "half": hk.edit(
            hk.Site("expert_weights", layer), lambda values: values * 0.5, pos=[-2, -1]
        ),
    }
    table = hk.sweep(lm, PROMPTS, {"name": list(edits)}, lambda name: edits[name], METRIC)
    for name, hook in edits.items():
        alone = [METRIC(hk.forward(lm, [ids], hook)).item() for ids in PROMPTS]
        assert table[table["name"] == name]["logit_diff"].tolist() == pytest.approx(alone, abs=1e-4)
    assert (table["logit_diff_delta"].abs() > 1e-4).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom", "falcon", "opt", "gptj"])
def test_a_block_left_out_at_some_positions_gives_out_what_it_was_given(kind):
    lm = hk.tiny(kind)
    hooks = lambda layer, pos: hk.skip_block(layer, pos=pos)  # noqa: E731
    table = hk.sweep(lm, PROMPTS, {"layer": LAYERS, "pos": [-3, -1]}, hooks, METRIC)
    for layer, pos, row, found in table[["layer", "pos", "row", "logit_diff"]].itertuples(
        index=False
    ):

        def after(module, args, kwargs, output, pos=pos):
            given = args[0] if args else kwargs["hidden_states"]
            values = (output[0] if isinstance(output, tuple) else output).clone()
            values[:, pos] = given[:, pos]
            return (values, *output[1:]) if isinstance(output, tuple) else values

        handle = block(lm.model, layer).register_forward_hook(after, with_kwargs=True)
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([PROMPTS[row]]), use_cache=False).logits[0, -1]
        handle.remove()
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-4), (layer, pos, row)


def mixing(values: torch.Tensor) -> torch.Tensor:
    """Every position becomes the mean over all that are there, less itself."""
    return values.mean(1, keepdim=True) - values


@pytest.mark.parametrize("look", [-1, -3])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_function_that_looks_from_one_position_at_another_is_given_all_that_it_wants(
    small, layer, look
):
    ids = PROMPTS[0]

    def after(module, args, output):
        return mixing(output)

    handle = block(small.model, layer).register_forward_hook(after)
    with torch.no_grad():
        logits = small.model(torch.tensor([ids])).logits[0, look]
    handle.remove()
    hook = hk.edit(hk.Site("resid_post", layer), mixing)
    beside = hk.steer("resid_pre.2", VECTOR, pos=-1)
    table = hk.sweep(
        small,
        [ids],
        {"mixed": [True, False]},
        lambda mixed: hook if mixed else beside,
        METRIC,
        pos=look,
    )
    assert table["logit_diff"][0] == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
    words = "a function receives positions after" if look == -3 else "where the metric looks"
    assert words in table.attrs["plan"]


def test_a_function_under_every_cell_is_given_all_that_it_wants(small):
    under = [hk.edit("resid_post.1", mixing)]
    prompts = drawn(
        9, 9
    )  # of one length, since the function takes the filled-up cells for real ones
    table = hk.sweep(
        small, prompts, {"layer": [1, 2], "pos": [-2, -1]}, steered, METRIC, base_hooks=under
    )
    for layer, pos, row, found in table[["layer", "pos", "row", "logit_diff"]].itertuples(
        index=False
    ):
        handle = block(small.model, 1).register_forward_hook(
            lambda module, args, output: mixing(output)
        )
        wanted = by_hand(small.model, prompts[row], layer, pos)
        handle.remove()
        assert found == pytest.approx(wanted, abs=1e-4)


def test_behind_a_function_that_mixes_positions_every_position_of_the_last_block_matters(small):
    under = [hk.edit("resid_post.2", mixing)]
    (ids,) = drawn(9)
    table = hk.sweep(
        small,
        [ids],
        {"pos": [2, 5]},
        lambda pos: hk.scale("mlp_out.2", 3.0, pos=pos),
        METRIC,
        base_hooks=under,
    )
    for pos, found in table[["pos", "logit_diff"]].itertuples(index=False):

        def more(module, args, output, pos=pos):
            output = output.clone()
            output[:, pos] *= 3
            return output

        handles = [
            block(small.model, 2).mlp.register_forward_hook(more),
            block(small.model, 2).register_forward_hook(
                lambda module, args, output: mixing(output)
            ),
        ]
        with torch.no_grad():
            logits = small.model(torch.tensor([ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        assert found == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
    assert (table["logit_diff_delta"].abs() > 1e-3).all()


def test_a_function_that_counts_its_calls_is_called_for_one_cell_at_a_time(small):
    seen = []

    def keeps(values, here):
        seen.append((list(here.rows), values.shape[0]))
        return values * 0.5

    hk.sweep(
        small,
        PROMPTS,
        {"layer": LAYERS},
        lambda layer: hk.edit(hk.Site("z", layer), keeps, pos=-1),
        METRIC,
    )
    assert sorted(row for rows, _ in seen for row in rows) == sorted([0, 1, 2] * 3), (
        "each prompt once in each cell"
    )
    assert all(len(rows) == count for rows, count in seen)


def test_a_function_that_raises_says_where_and_leaves_the_model_alone(small):
    def fails(values, here):
        if here.site == hk.Site("z", 1):
            raise ZeroDivisionError("mine")
        return values

    before = hooks_on(small.model)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        hk.sweep(
            small,
            PROMPTS,
            {"layer": LAYERS},
            lambda layer: hk.edit(hk.Site("z", layer), fails),
            METRIC,
        )
    assert any("edit(z.1, fails) at z.1, in a sweep" in note for note in caught.value.__notes__)
    assert hooks_on(small.model) == before
    with pytest.raises(hk.errors.BadEdit, match="returned None"):
        hk.sweep(
            small,
            PROMPTS,
            {"layer": LAYERS},
            lambda layer: hk.edit(hk.Site("z", layer), print),
            METRIC,
        )
    with pytest.raises(KeyError, match="nothing") as caught:
        hk.sweep(small, PROMPTS, {"layer": LAYERS}, lambda layer: {}["nothing"], METRIC)
    assert "in the sweep's cell layer=0" in caught.value.__notes__


def test_an_edit_at_a_module_that_never_runs_is_no_cell_without_an_effect():
    lm = hk.tiny("llama")
    lm.model.model.layers[1].unused = nn.Linear(32, 32)
    unused = hk.scale(hk.module("model.layers.1.unused"), 0.5)
    with pytest.raises(
        NeverFired, match=r"never fired at model.layers.1.unused:output in the sweep's cell n=0"
    ):
        hk.sweep(lm, PROMPTS, {"n": [0]}, lambda n: unused, METRIC)
    with pytest.raises(NeverFired, match="a base hook of every cell, never fired"):
        hk.sweep(lm, PROMPTS, {"n": [0]}, lambda n: steered(0, -1), METRIC, base_hooks=[unused])


def test_an_edit_at_a_module_that_never_runs_raises_wherever_it_was_to_act():
    lm = hk.tiny("llama")
    lm.model.model.layers[1].unused = nn.Linear(32, 32)
    unused = lambda pos: hk.scale(hk.module("model.layers.1.unused"), 0.5, pos=pos)  # noqa: E731
    for pos in (
        -1,
        -2,
    ):  # the metric looks at -2: what comes after it cannot matter, and a forward raises all the same
        with pytest.raises(NeverFired, match="never fired at model.layers.1.unused:output"):
            hk.forward(lm, PROMPTS, unused(pos))
        with pytest.raises(
            NeverFired, match=r"never fired at .*unused:output in the sweep's cell n=0"
        ):
            hk.sweep(lm, PROMPTS, {"n": [0]}, lambda n, pos=pos: unused(pos), METRIC, pos=-2)
        with pytest.raises(NeverFired, match="a base hook of every cell, never fired"):
            hk.sweep(
                lm,
                PROMPTS,
                {"n": [0]},
                lambda n: steered(0, -2),
                METRIC,
                pos=-2,
                base_hooks=[unused(pos)],
            )
    called = hk.scale(hk.module("model.layers.1.mlp.up_proj"), 2, pos=-1)
    table = hk.sweep(lm, PROMPTS, {"n": [0]}, lambda n: called, METRIC, pos=-2)
    assert not table.filter(like="_delta").any(axis=None)


def test_a_mean_and_a_draw_of_other_prompts_are_taken_once_for_all_cells(small):
    others = drawn(9, 9, 9, seed=3)
    runs = []
    handle = small.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: runs.append(len(output))
    )
    try:
        table = hk.ablations(small, PROMPTS, "z", METRIC, to="mean", over=others, verify=2)
    finally:
        handle.remove()
    assert runs.count(3) >= 1 and len(table) == 3 * 4 * 3
    with torch.no_grad():
        kept = []
        handle = small.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
            lambda m, args: kept.append(args[0])
        )
        small.model(torch.tensor(others))
        handle.remove()
        mean = kept[0].mean(0)

        def put(module, args):
            values = args[0].clone()
            values[..., 16:24] = mean[: values.shape[1], 16:24]
            return (values,)

        handle = small.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(put)
        logits = [small.model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
        handle.remove()
    found = table[(table["layer"] == 1) & (table["head"] == 2)]["logit_diff"].tolist()
    assert found == pytest.approx([float(each[5] - each[7]) for each in logits], abs=1e-4)


# ---- sources of patches


def assert_as_the_loop(lm, prompts, table, source, site):
    """A sweep of patches at resid_pre against whole forwards of each cell."""
    for (layer, pos), found in table.groupby(["layer", "pos"]):
        run = hk.forward(lm, prompts, hk.patch(hk.Site(site, layer), source, pos=pos))
        assert found["logit_diff"].tolist() == pytest.approx(METRIC(run).tolist(), abs=1e-4), (
            layer,
            pos,
        )


def test_a_source_with_a_small_edit_beside_a_huge_first_position_is_not_the_models_own():
    lm = hk.tiny("llama")
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[3] *= (
            1e5  # as in real models: a first position thousands of times larger
        )
    prompt = [3, *drawn(8)[0]]
    other = [*prompt[:7], 299, *prompt[8:]]
    source = hk.forward(
        lm, [other], hk.steer("embed", 0.1 * VECTOR, pos=2), hk.capture("resid_pre")
    )
    grid = {"layer": LAYERS, "pos": [2, 3]}  # before the first token that differs
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), source, pos=pos)  # noqa: E731
    table = hk.sweep(lm, [prompt], grid, hooks, METRIC)
    assert (
        table.attrs["sources_not_the_models_own"] and table["logit_diff_delta"].abs().max() > 0.05
    )
    assert_as_the_loop(lm, [prompt], table, source, "resid_pre")
    clean = hk.forward(lm, [other], hk.capture("resid_pre"))
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), clean, pos=pos)  # noqa: E731
    assert hk.sweep(lm, [prompt], grid, hooks, METRIC).attrs["sources_not_the_models_own"] == []


def test_scores_of_a_run_with_edits_are_not_the_models_own(small):
    (prompt,) = drawn(9)
    other = [*prompt[:7], 299, *prompt[8:]]
    source = hk.forward(small, [other], hk.steer("embed", VECTOR, pos=2), hk.capture("scores"))
    hooks = lambda layer, pos: hk.patch(hk.Site("scores", layer), source, pos=pos)  # noqa: E731
    table = hk.sweep(small, [prompt], {"layer": [0, 1], "pos": [2, 4]}, hooks, METRIC)
    assert table.attrs["sources_not_the_models_own"]
    assert_as_the_loop(small, [prompt], table, source, "scores")


def test_a_source_is_looked_at_wherever_its_positions_pair(small):
    prompt, longer = drawn(9)[0], drawn(9)[0] + [50, 60]
    source = hk.forward(small, [longer], hk.steer("embed", VECTOR, pos=2), hk.capture("resid_pre"))
    hooks = lambda layer, pos: hk.patch(hk.Site("resid_pre", layer), source, pos=pos)  # noqa: E731
    table = hk.sweep(
        small, [prompt], {"layer": [0, 1], "pos": [-1, 2, 3]}, hooks, METRIC
    )  # -1 pairs 8 with 10
    assert table.attrs["sources_not_the_models_own"]
    assert_as_the_loop(small, [prompt], table, source, "resid_pre")


@pytest.mark.parametrize("look", [-1, -3])
@pytest.mark.parametrize(
    "name", ["logits", "lm_head", "final_norm", "embed", "resid_pre.1", "scores.1", "k_rot.1.0"]
)
def test_a_source_that_differs_behind_the_metrics_position_or_is_of_logits(small, name, look):
    others = [[*ids[:-2], 299, ids[-1]] for ids in PROMPTS]
    source = hk.forward(small, others, hk.capture(name.replace(".1.0", ".1")))
    hooks = lambda pos: hk.patch(name, source, pos=pos)  # noqa: E731
    table = hk.sweep(small, PROMPTS, {"pos": [0, -4, -3, -2, -1]}, hooks, METRIC, pos=look)
    assert table.attrs["sources_not_the_models_own"] == []
    for pos, found in table.groupby("pos"):
        wanted = METRIC(hk.forward(small, PROMPTS, hooks(pos)), pos=look)
        assert found["logit_diff"].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert bool(table["logit_diff_delta"].abs().max() > 1e-3) is (look == -1)


def test_a_source_of_some_rows_serves_those_rows(small):
    others = drawn(9, 6, 9, seed=2)
    source = hk.forward(small, others, hk.capture("resid_pre", rows=[0, 2]))
    hooks = lambda pos: hk.patch("resid_pre.1", source, pos=pos, rows=[0, 2])  # noqa: E731
    table = hk.sweep(small, PROMPTS, {"pos": [-2, -1]}, hooks, METRIC)
    for pos, found in table.groupby("pos"):
        wanted = METRIC(hk.forward(small, PROMPTS, hooks(pos)))
        assert found["logit_diff"].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert (table[table["row"] == 1]["logit_diff_delta"] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_the_model_itself_has_is_taken_for_its_own_alone_and_in_a_batch(kind):
    lm = hk.tiny(kind)
    prompts = drawn(30, 12, 30)
    others = [[*prompt[:-3], 299, *prompt[-2:]] for prompt in prompts]
    sites = ["resid_pre", "z", "mlp_out", "pattern", "scores", "k"]
    source = hk.forward(lm, others, hk.capture(sites))
    grid = {"site": sites, "layer": LAYERS}
    table = hk.sweep(
        lm,
        prompts,
        grid,
        lambda site, layer: hk.patch(hk.Site(site, layer), source, pos=range(4, 9)),
        METRIC,
    )
    assert (
        table.attrs["sources_not_the_models_own"] == [] and (table["logit_diff_delta"] == 0).all()
    )


# ---- modules


@pytest.mark.parametrize(
    ("kind", "site", "alone"),
    [
        ("llama", hk.module("model.layers.1.mlp.gate_proj"), False),
        ("llama", hk.module("model.layers.1.self_attn", side="input", item="hidden_states"), False),
        ("llama", hk.module("model.layers.1", side="input"), False),
        ("bloom", hk.module("transformer.h.1"), False),
        ("opt", hk.module("model.decoder.layers.1.fc1"), True),  # [batch * pos, d_mlp]
        (
            "deepseek_v3",
            hk.module("model.layers.1.mlp.gate", item=1),
            True,
        ),  # [batch * pos, choice]
    ],
)
def test_an_edit_at_any_module_acts_in_the_rows_of_its_cell(kind, site, alone):
    lm = hk.tiny(kind)
    prompts = drawn(9, 9)
    hooks = lambda by: [hk.scale(site, by), steered(0, -2)]  # noqa: E731
    plan = hk.sweep_plan(lm, prompts, {"by": [0.5, 2.0]}, hooks, METRIC)
    assert len(plan.alone) == (2 if alone else 0)
    table = hk.sweep(lm, prompts, {"by": [0.5, 2.0]}, hooks, METRIC)
    for by, found in table.groupby("by"):
        wanted = METRIC(hk.forward(lm, prompts, *hooks(by)))
        assert found["logit_diff"].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert (table["logit_diff_delta"].abs() > 1e-4).all()


# ---- what cannot be swept


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(hk.errors.Unsupported, match="needs a language model with named sites"):
        hk.sweep(hk.LM(nn.Linear(3, 3)), PROMPTS, {"n": [0]}, lambda n: hk.ban(5), METRIC)


# ---- grids that mean nothing


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            {"layer": 3},
            "the grid's dimension 'layer' is 3, one value, and a grid has a list of them",
        ),
        ({"site": "resid_pre"}, "'site' is 'resid_pre', one value"),
    ],
)
def test_one_value_is_no_dimension(small, grid, words):
    with pytest.raises(BadHook, match=words):
        hk.sweep(small, PROMPTS, grid, lambda **at: steered(0, -1), METRIC)


def test_the_metric_looks_at_one_position(small):
    for pos in (hk.at("a"), [0, 1], slice(0, 2), True, None):
        with pytest.raises(
            (BadHook, BadArgument), match="the metric looks at one position|[gG]ive a whole number"
        ):
            hk.sweep(
                small, PROMPTS, {"layer": [0]}, lambda layer: steered(layer, -1), METRIC, pos=pos
            )
