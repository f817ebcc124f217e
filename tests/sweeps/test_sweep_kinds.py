"""What sweeps are given and where they run: grids of every library, little memory, views, hooks under every cell."""

import random
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_families import ONE_OF_EACH, PROGRAMMED

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, HookkitError

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12], [20, 21]


@pytest.fixture(scope="module")
def lm():
    return hk.tiny("llama")


def by_hand(lm, ids, pos, *edits, token=7):
    """A token's logit, by plain transformers with edits (module path, function) of what modules give."""
    handles = [
        lm.model.get_submodule(path).register_forward_hook(
            lambda m, a, output, edit=edit: edit(output)
        )
        for path, edit in edits
    ]
    try:
        with torch.no_grad():
            return float(lm.model(torch.tensor([ids])).logits[0, pos, token])
    finally:
        for handle in handles:
            handle.remove()


GRIDS = {
    "numpy": (np.arange(2), np.array([-2, -1])),
    "series": (pd.Series([0, 1]), pd.Index([-2, -1])),
    "tensors": (torch.arange(2), [torch.tensor(-2), torch.tensor(-1)]),
    "numpy scalars": ([np.int64(0), np.int8(1)], (np.int32(-2), np.int64(-1))),
    "generators": ((n for n in range(2)), iter((-2, -1))),
    "tuples and keys": ((0, 1), {-2: "", -1: ""}.keys()),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_numbers_of_every_library_are_numbers_in_a_grid(lm, kind):
    layers, positions = GRIDS[kind]
    hooks = lambda layer, pos: hk.ablate(hk.Site("mlp_out", layer), pos=pos)  # noqa: E731
    table = hk.sweep(
        lm, [LONG], {"layer": layers, "pos": positions}, hooks, hk.metrics.logit(7), progress=False
    )
    assert table["layer"].tolist() == [0, 0, 1, 1] and table["pos"].tolist() == [-2, -1] * 2
    for layer, pos, logit in table[["layer", "pos", "logit"]].itertuples(index=False):

        def cut(output, pos=pos):
            output = output.clone()
            output[:, pos] = 0
            return output

        assert logit == pytest.approx(
            by_hand(lm, LONG, -1, (f"model.layers.{layer}.mlp", cut)), abs=1e-5
        )


def test_a_grid_of_doses_from_linspace_has_pythons_numbers(lm):
    vector = torch.ones(32)
    given = []

    def hooks(scale):
        given.append(type(scale))
        return hk.steer("resid_post.1", vector, scale=scale)

    table = hk.sweep(
        lm, [LONG], {"scale": np.linspace(0, 2, 3)}, hooks, hk.metrics.logit(7), progress=False
    )
    assert given == [float] * 3 and table["scale"].tolist() == [0.0, 1.0, 2.0]
    wanted = [
        by_hand(lm, LONG, -1, ("model.layers.1", lambda output, scale=scale: output + scale))
        for scale in (0, 1, 2)
    ]
    assert table["logit"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_texts_vectors_and_slices_are_values_as_they_are(lm):
    vectors = torch.eye(32)[:2]
    for values in (["z", "mlp_out"], vectors, [slice(0, 2), slice(2, None)], [[0, 1], [2]]):
        seen = []

        def hooks(one, seen=seen):
            seen.append(one)
            return hk.steer("resid_post.1", torch.ones(32), pos=-1)

        hk.sweep(lm, [LONG], {"one": values}, hooks, hk.metrics.logit(7), progress=False)
        assert all(
            mine is theirs or torch.equal(mine, theirs)
            for mine, theirs in zip(seen, values, strict=True)
        )


WRONG = [
    ({"n": 3}, BadHook, "one value"),
    ({"n": "abc"}, BadHook, "one value"),
    ({"n": b"abc"}, BadHook, "one value"),
    ({"n": np.array(3)}, BadHook, "one value"),
    ({"n": torch.tensor(3)}, BadHook, "one value"),
    ({"n": None}, BadHook, "one value"),
    ({"n": {1, 2}}, BadHook, "in the order that is meant"),
    ({"n": {1: 2}}, BadHook, "as a list"),
    ({"n": pd.DataFrame({"a": [1]})}, BadHook, "as a list"),
    ({"n": [1, 1]}, BadHook, "has 1 twice"),
    ({"n": np.array([2, 0, 2])}, BadHook, "has 2 twice"),
    ({"n": []}, EmptySelection, "is empty"),
    ({"n": np.array([])}, EmptySelection, "is empty"),
    ({"n": iter(())}, EmptySelection, "is empty"),
    ({}, EmptySelection, "no dimension"),
    ([("n", [1])], HookkitError, "[Gg]ive a"),
    ({1: [1]}, BadHook, "name it with a text"),
    ({"row": [1]}, BadHook, "another name"),
    ({"m": [1]}, BadHook, "cannot be called with the grid.s dimensions m"),
]


@pytest.mark.parametrize(("grid", "error", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_a_grid_that_is_none_is_refused_in_words(lm, grid, error, words):
    with pytest.raises(error, match=words):
        hk.sweep(
            lm, [LONG], grid, lambda n: hk.ablate("mlp_out.0"), hk.metrics.logit(7), progress=False
        )


@pytest.mark.parametrize(
    "hooks", [lambda n: "mlp_out.0", lambda n: ["mlp_out.0"], lambda n: 3, hk.ablate("mlp_out.0")]
)
def test_what_is_no_hook_is_refused_in_words(lm, hooks):
    with pytest.raises(HookkitError, match="is no hook|a function|[Gg]ive"):
        hk.sweep(lm, [LONG], {"n": [0]}, hooks, hk.metrics.logit(7), progress=False)


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, "1GB"])
def test_memory_is_a_number_of_bytes(lm, memory):
    with pytest.raises(HookkitError, match="memory="):
        hk.sweep(
            lm,
            [LONG],
            {"n": [0]},
            lambda n: hk.ablate("mlp_out.0"),
            hk.metrics.logit(7),
            memory=memory,
        )


@pytest.mark.parametrize("memory", [1, 20_000, 100_000, None])
@pytest.mark.parametrize("pos", [0, -1, -2])
def test_a_sweep_with_little_memory_has_the_same_numbers(lm, memory, pos):
    cells = {"tanh": torch.tanh, "half": lambda x: x / 2}
    table = hk.sweep(
        lm,
        [LONG, SHORT],
        {"cell": list(cells), "layer": [0, 2]},
        lambda cell, layer: hk.edit(hk.Site("resid_post", layer), cells[cell], pos=slice(0, None)),
        hk.metrics.logit(7),
        pos=pos,
        memory=memory,
        progress=False,
    )
    for cell, layer, row, logit in table[["cell", "layer", "row", "logit"]].itertuples(index=False):
        wanted = by_hand(lm, [LONG, SHORT][row], pos, (f"model.layers.{layer}", cells[cell]))
        assert logit == pytest.approx(wanted, abs=1e-5)


def test_a_machine_without_memory_is_told_in_words():
    """A process that may not take as much memory as one forward of a long prompt."""
    program = """
        import resource, torch, hookkit as hk
        from hookkit.errors import TooLittleMemory
        torch.set_num_threads(1)
        lm = hk.tiny("llama", config={"max_position_embeddings": 40000})
        lm.model.set_attn_implementation("eager")
        hk.forward(lm, [list(range(9))])
        hooks = lambda n: hk.ablate("mlp_out.0")
        hk.sweep(lm, [list(range(9))], {"n": [0]}, hooks, hk.metrics.logit(7), progress=False)
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, taken + 2**29))
        try:
            hk.sweep(lm, [[7] * 20000], {"n": [0]}, hooks, hk.metrics.logit(7), progress=False)
        except TooLittleMemory as error:
            print("told:", error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "told: a forward of one prompt of up to 20000 tokens does not fit" in done.stdout, (
        done.stderr[-2000:]
    )


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_bigcode", "mixtral", "qwen2_moe", "olmoe", "deepseek_v3"]
)
def test_modules_that_take_a_view_of_what_they_are_given_work_in_a_sweep(family):
    lm = hk.tiny(family)
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
    block = lm.family.block.format(layer=0)
    table = hk.sweep(
        lm,
        prompts,
        {"n": [0]},
        lambda n: hk.edit("resid_post.0", torch.tanh),
        hk.metrics.logit(7),
        pos=-2,
        progress=False,
    )
    for row, ids in enumerate(prompts):
        wanted = by_hand(lm, ids, -2, (block, torch.tanh))
        assert table["logit"][row] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_function_may_give_numbers_that_do_not_lie_in_the_order_of_the_axes(family):
    lm = hk.tiny(family)
    strided = lambda x: (x / 2).transpose(0, 1).contiguous().transpose(0, 1)  # noqa: E731
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]]
    run = hk.forward(lm, prompts, hk.edit("mlp_in.1", strided))
    plain = hk.forward(lm, prompts, hk.edit("mlp_in.1", lambda x: x / 2))
    assert torch.equal(run.logits, plain.logits)


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_an_embedding_that_is_changed_under_every_cell_reaches_rows_that_join_later(family):
    """Blocks of some families read more than the stream, and what they read is made of the embedding."""
    lm = hk.tiny(family)
    last = lm.n_layers - 1
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
    vector = torch.randn(lm.shape(hk.Site("embed")), generator=torch.Generator().manual_seed(0))
    half = lambda output: (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2  # noqa: E731
    embed = lm.location(hk.Site("embed")).path
    table = hk.sweep(
        lm,
        prompts,
        {"layer": [0, last]},
        lambda layer: hk.scale(hk.Site("resid_post", layer), 0.5),
        hk.metrics.logit(7),
        base_hooks=hk.steer("embed", vector),
        progress=False,
    )
    for layer, row, logit in table[["layer", "row", "logit"]].itertuples(index=False):
        edits = [
            (embed, lambda output: output + vector),
            (lm.family.block.format(layer=layer), half),
        ]
        wanted = by_hand(lm, prompts[row], -1, *edits)
        assert logit == pytest.approx(wanted, abs=2e-4 * max(1, abs(wanted)))


def test_an_edit_of_logits_that_the_metric_does_not_read_is_accepted_as_in_a_forward(lm):
    hooks = [
        hk.edit("logits", torch.tanh, pos=0),
        hk.edit("lm_head", torch.tanh, pos=[0, 1]),
        hk.force(5, pos=0),
        hk.ban(7, pos=1, when=lambda logits, here: True),
        hk.edit("logits", torch.tanh, pos=6),
        hk.ablate("lm_head", pos=7),
    ]
    plain = by_hand(lm, LONG, 5)
    for hook in hooks:
        hk.forward(lm, [LONG], hook)
        for settings in ({}, {"base_hooks": hook}):
            cell = hk.ablate("mlp_out.0", pos=7) if settings else hook
            table = hk.sweep(
                lm,
                [LONG],
                {"n": [0]},
                lambda n, cell=cell: cell,
                hk.metrics.logit(7),
                pos=5,
                progress=False,
                **settings,
            )
            assert table["logit"][0] == pytest.approx(plain, abs=1e-5), hook


def test_a_function_under_every_cell_carries_no_logits_to_other_positions(lm):
    """It acts before the last attention: a cell's edit of logits that the metric does not read stays where it is."""
    under = hk.edit("mlp_out.1", lambda values: values / 2)
    for cell in (hk.scale("logits", 1.7, pos=2), hk.ablate("lm_head", pos=[0, 3])):
        table = hk.sweep(
            lm,
            [LONG],
            {"n": [0]},
            lambda n, cell=cell: cell,
            hk.metrics.logit(7),
            base_hooks=under,
            progress=False,
        )
        wanted = by_hand(lm, LONG, -1, ("model.layers.1.mlp", lambda output: output / 2))
        assert table["logit"][0] == pytest.approx(wanted, abs=1e-5)


def test_a_function_of_the_logits_is_given_all_of_its_positions(lm):
    """It may look from one position at another, as it may in a forward."""
    summed = lambda logits: logits.cumsum(1)  # noqa: E731
    table = hk.sweep(
        lm,
        [LONG, SHORT],
        {"n": [0]},
        lambda n: hk.edit("logits", summed),
        hk.metrics.logit(7),
        progress=False,
    )
    for row, ids in enumerate([LONG, SHORT]):
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0]
        assert table["logit"][row] == pytest.approx(float(logits.sum(0)[7]), abs=1e-4)


def test_hooks_that_are_refused_in_a_forward_are_refused_in_a_sweep_in_the_same_words(lm):
    wrong = [
        hk.ablate("mlp_out.0", pos=8),
        hk.ablate("mlp_out.7"),
        hk.ablate("mlp_out.0", rows=[1]),
        hk.edit("mlp_out.0", lambda values: None),
        hk.edit("logits", lambda values: values[:, :1]),
        hk.steer("mlp_out.0", torch.ones(31)),
        hk.ablate("mlp_out.0", pos=slice(8, None)),
        hk.edit("mlp_out.0", lambda values: 1 / 0),
        hk.force(400),
        hk.boost(5, by=1.0, step=2),
        hk.ablate(hk.module("model.layers.9.mlp")),
        hk.restrict(5, when=lambda logits, here: "yes"),
    ]
    for hook in wrong:
        with pytest.raises(Exception) as alone:
            hk.forward(lm, [LONG], hook)
        with pytest.raises(type(alone.value)) as swept:
            hk.sweep(
                lm,
                [LONG],
                {"n": [0]},
                lambda n, hook=hook: hook,
                hk.metrics.logit(7),
                progress=False,
            )
        assert str(swept.value) == str(alone.value)


def gemma_with_shared_keys():
    layers = ["sliding_attention", "full_attention"] * 2
    config = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": layers}
    return hk.tiny("gemma4_text", config=config)


@pytest.mark.parametrize("logits", ["all", "last", False])
def test_blocks_that_share_keys_run_at_every_position_whatever_logits_are_kept(logits):
    lm = gemma_with_shared_keys()
    run = hk.forward(lm, [LONG, SHORT], hk.capture("resid_post.3"), logits=logits)
    for row, ids in enumerate([LONG, SHORT]):
        with torch.no_grad():
            states = lm.model(
                torch.tensor([ids]), output_hidden_states=True, use_cache=False
            ).hidden_states
        normed = lm.model.model.norm(run["resid_post.3"][row, : len(ids)])
        assert torch.allclose(normed, states[-1][0], atol=1e-5)


def test_an_edit_at_an_early_position_of_a_block_that_shares_keys_is_accepted_in_a_sweep():
    lm = gemma_with_shared_keys()
    inner = hk.module("model.layers.2.mlp.down_proj", side="input")
    for hook in (hk.ablate(inner, pos=slice(0, 2)), hk.edit("resid_post.2", lambda x: x.cumsum(1))):
        table = hk.sweep(
            lm,
            [LONG, SHORT],
            {"n": [0]},
            lambda n, hook=hook: hook,
            hk.metrics.logit(7),
            progress=False,
        )
        run = hk.forward(lm, [LONG, SHORT], hook)
        for row, ids in enumerate([LONG, SHORT]):
            assert table["logit"][row] == pytest.approx(
                float(run.logits[row, len(ids) - 1, 7]), abs=1e-4
            )


def test_a_modules_heads_are_not_taken_for_the_positions_whose_logits_are_kept():
    """Four heads in axis 1, and four positions whose logits are kept: an edit is of all of it."""
    lm = hk.tiny("hunyuan_v1_dense")
    site = hk.module("model.layers.0.self_attn.query_layernorm", side="input")
    prompts = [[218, 107, 53, 247, 212], [128, 235]]
    cells = [hk.edit(site, torch.tanh), hk.edit("lm_head", lambda x: x.cumsum(1))]
    table = hk.sweep(
        lm, prompts, {"n": [0, 1]}, lambda n: cells[n], hk.metrics.logit(7), pos=1, progress=False
    )

    def squashed(module, args):
        return (torch.tanh(args[0]),)

    handle = lm.model.model.layers[0].self_attn.query_layernorm.register_forward_pre_hook(squashed)
    try:
        with torch.no_grad():
            wanted = [float(lm.model(torch.tensor([ids])).logits[0, 1, 7]) for ids in prompts]
    finally:
        handle.remove()
    assert table[table["n"] == 0]["logit"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_hook_at_the_heads_module_sees_every_position(lm):
    given, summed = hk.module("lm_head", side="input"), lambda x: x.cumsum(1)
    cells = [
        hk.edit(given, summed),
        hk.scale(hk.module("lm_head"), 0.5, pos=0),
        hk.scale(given, 0.5, pos=-1),
    ]
    table = hk.sweep(
        lm, [LONG, SHORT], {"n": range(3)}, lambda n: cells[n], hk.metrics.logit(7), progress=False
    )
    for number, cell in enumerate(cells):
        run = hk.forward(lm, [LONG, SHORT], cell)
        wanted = [float(run.logits[row, len(ids) - 1, 7]) for row, ids in enumerate([LONG, SHORT])]
        assert table[table["n"] == number]["logit"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_random_grids_give_what_forwards_with_their_hooks_give():
    """Cells of several hooks, of any site and position, under others; the error of a forward is the sweep's too."""
    from random_grids import differences

    names = random.Random(1).sample(sorted(set(ONE_OF_EACH) & set(PROGRAMMED)), 8)
    assert not [words for name in names for words in differences(name, range(3))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("under", [False, True])
def test_a_query_that_attends_to_later_keys_does_so_in_a_sweep_too(family, under):
    """The metric looks at -2, and the edited pattern of query 0 has weight on the last key."""
    lm = hk.tiny(family)
    more = lambda pattern: pattern * 0.7 + 0.1  # noqa: E731
    attending = [hk.edit("pattern.0", more, pos=0), hk.ablate("scores.0", pos=0)]
    other = hk.scale(hk.Site("mlp_out", 0), 0.5, pos=-1)
    for hook in attending:
        for prompts in ([LONG], [LONG, SHORT * 2]):
            base, own = ([hook], [other]) if under else ([], [hook])
            table = hk.sweep(
                lm, prompts, {"n": [0]}, lambda n, own=own: own, hk.metrics.logit(7), pos=-2,
                base_hooks=base, progress=False, verify=1,
            )  # fmt: skip
            runs = [hk.forward(lm, [ids], *base, *own) for ids in prompts]
            expected = [float(run.logits[0, -2, 7]) for run in runs]
            assert table["logit"].tolist() == pytest.approx(expected, abs=1e-5)
    first = hk.forward(lm, [LONG], attending[0]).logits[0, 0]
    cropped = hk.forward(lm, [LONG[:-1]], attending[0]).logits[0, 0]
    assert not torch.allclose(first, cropped, atol=1e-4), "the last key matters"
