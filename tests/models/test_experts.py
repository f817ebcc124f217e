"""Neurons of experts: mlp_pre and mlp_post of each expert that a token chose.

The second route is a loop in plain torch: one token, one of its experts at a time (tests/by_hand_families.py, which
tests/checks/test_every_family.py uses for all families).
"""

import pytest
import torch
from by_hand_families import neurons_one_by_one
from torch import Tensor, nn

import hookkit as hk
from hookkit.errors import BadHook, MissingSite, OutOfRange, UnknownSite, Unsupported

IDS = [[5, 9, 17, 200, 33, 41, 7, 90, 12], [3, 14, 15]]
NAMES = ["mlp_pre.1", "mlp_post.1", "experts.1", "expert_weights.1", "mlp_in.1", "mlp_out.1"]
IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]
WITH_SHARED = {  # the module of the experts that every token reads, and whether a gate weighs it
    "deepseek_v3": "shared_experts",
    "glm4_moe": "shared_experts",
    "ernie4_5_moe": "shared_experts",
    "qwen2_moe": "shared_expert",
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def lm() -> hk.LM:
    return hk.tiny("mixtral")


def far(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) / float(expected.abs().max())


def experts_of(lm: hk.LM, layer: int = 1) -> nn.Module:
    return lm.model.get_submodule(f"model.layers.{layer}.mlp.experts")


@torch.no_grad()
def logits_with(lm: hk.LM, ids: list[int], change) -> Tensor:
    """The logits of plain transformers whose experts of block 1 are computed by hand, [token, choice, neuron] changed."""
    experts = experts_of(lm)

    def by_hand(_module: nn.Module, args: tuple, _output: Tensor) -> Tensor:
        read, chosen, weights = args
        _, post, _ = neurons_one_by_one(experts, read, chosen)
        post = change(post, chosen)
        outs = torch.zeros_like(read)
        for token in range(len(read)):
            for choice, expert in enumerate(chosen[token].tolist()):
                outs[token] += weights[token, choice] * (
                    experts.down_proj[expert] @ post[token, choice]
                )
        return outs

    handle = experts.register_forward_hook(by_hand)
    try:
        return lm.model(torch.tensor([ids]), use_cache=False).logits
    finally:
        handle.remove()


# ---- read


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe", *WITH_SHARED])
def test_the_neurons_through_the_experts_weights_are_what_the_mlp_gives(family):
    lm = hk.tiny(family)
    run = hk.forward(lm, IDS[0:1], hk.capture(NAMES))
    mlp = lm.model.get_submodule("model.layers.1.mlp")
    read, chosen = run["mlp_in.1"][0], run["experts.1"][0]
    with torch.no_grad():
        pre, post, outs = neurons_one_by_one(mlp.experts, read, chosen)
        total = (outs * run["expert_weights.1"][0][..., None]).sum(1)
        if family in WITH_SHARED:
            shared = mlp.get_submodule(WITH_SHARED[family])(read)
            if family == "qwen2_moe":
                shared = torch.sigmoid(mlp.shared_expert_gate(read)) * shared
            total = total + shared
    assert far(run["mlp_pre.1"][0], pre) < 1e-5
    assert far(run["mlp_post.1"][0], post) < 1e-5
    assert far(run["mlp_out.1"][0], total) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_neurons_are_the_same_however_transformers_computes_the_experts(family, implementation):
    lm = hk.tiny(family)
    sites = lm.sites(["mlp_pre", "mlp_post"])
    expected = hk.forward(lm, IDS, hk.capture(sites))
    edited = hk.forward(lm, IDS, hk.scale(sites, 0.5)).logits
    lm.model.set_experts_implementation(implementation)
    plain = hk.forward(lm, IDS).logits
    run = hk.forward(lm, IDS, hk.capture(sites))
    assert torch.equal(run.logits, plain)
    for site in sites:
        assert far(run[site], expected[site]) < 1e-5
    assert far(hk.forward(lm, IDS, hk.scale(sites, 0.5)).logits, edited) < 1e-5
    assert torch.equal(hk.forward(lm, IDS, hk.patch(sites, run)).logits, plain)


def test_an_implementation_that_computes_something_else_is_refused(lm):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    def doubled(*arguments):
        return 2 * batched_mm_experts_forward(*arguments)

    ALL_EXPERTS_FUNCTIONS["doubled"] = doubled
    lm = hk.tiny("mixtral")
    lm.model.set_experts_implementation("doubled")
    try:
        with pytest.raises(Unsupported, match="'doubled' computes something else"):
            hk.forward(lm, IDS, hk.capture("mlp_post.1"))
        hk.forward(lm, IDS)
    finally:
        ALL_EXPERTS_FUNCTIONS.pop("doubled")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_alone_has_the_neurons_that_it_has_in_a_batch(implementation):
    lm = hk.tiny("qwen3_moe")
    lm.model.set_experts_implementation(implementation)
    together = hk.forward(lm, IDS, hk.capture(["mlp_pre", "mlp_post"]))
    for row, ids in enumerate(IDS):
        alone = hk.forward(lm, [ids], hk.capture(["mlp_pre", "mlp_post"]))
        for site in together.sites:
            assert far(together[site][row, : len(ids)], alone[site][0]) < 1e-5, site


@pytest.mark.parametrize(
    "way", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 2}]
)
def test_neurons_while_generating_are_those_of_the_whole_text(lm, way):
    run = hk.generate(lm, IDS, hk.capture(["mlp_post.1", "experts.1"]), **GREEDY, **way)
    for row, length in enumerate(run.lengths):
        whole = hk.forward(
            lm, [run.tokens[row, : length - 1].tolist()], hk.capture(["mlp_post.1", "experts.1"])
        )
        assert torch.equal(run["experts.1"][row, : length - 1], whole["experts.1"][0])
        assert far(run["mlp_post.1"][row, : length - 1], whole["mlp_post.1"][0]) < 1e-5


def test_looking_at_neurons_changes_nothing_and_the_model_is_left_as_found(lm):
    before = {path: set(module.__dict__) for path, module in lm.model.named_modules()}
    run = hk.forward(lm, IDS, hk.capture(["mlp_pre", "mlp_post"]))
    assert torch.equal(run.logits, hk.forward(lm, IDS).logits)
    with pytest.raises(RuntimeError, match="stop"):
        hk.forward(lm, IDS, hk.edit("mlp_post.1", stopping))
    assert before == {path: set(module.__dict__) for path, module in lm.model.named_modules()}


def stopping(values: Tensor) -> Tensor:
    raise RuntimeError("stop")


# ---- written


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_edit_does_what_the_experts_do_by_hand_with_other_neurons(implementation):
    lm = hk.tiny("mixtral")
    lm.model.set_experts_implementation(implementation)
    width = lm.shape(hk.Site("mlp_post", 1))[-1]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))

    def at_second_and_last(change):
        def changed(post, chosen):
            post = post.clone()
            post[[1, -1]] = change(post[[1, -1]])
            return post

        return changed

    hooks = {
        hk.steer("mlp_post.1", vector, pos=[1, -1]): lambda post: post + vector,
        hk.ablate("mlp_post.1", pos=[1, -1]): torch.zeros_like,
        hk.scale("mlp_post.1", 3.0, pos=[1, -1]): lambda post: 3 * post,
        hk.ablate("mlp_post.1", to=vector, pos=[1, -1]): lambda post: vector.expand_as(post),
    }
    for hook, change in hooks.items():
        expected = logits_with(lm, IDS[0], at_second_and_last(change))
        assert far(hk.forward(lm, IDS, hook).logits[:1], expected) < 1e-5, hook


def test_an_edit_before_the_activation_reaches_the_neurons_after_it():
    for family in ("mixtral", "gpt_oss", "nemotron_h"):
        lm = hk.tiny(family)
        layer = lm.sites("mlp_post")[-1].layer
        pre, post = f"mlp_pre.{layer}", f"mlp_post.{layer}"
        plain = hk.forward(lm, IDS, hk.capture([pre, post]))
        run = hk.forward(lm, IDS, hk.edit(pre, lambda x: x - 1.0, rows=0), hk.capture([pre, post]))
        assert far(run[pre][0], plain[pre][0] - 1.0) < 1e-5
        assert torch.equal(run[post][1], plain[post][1])
        assert far(run[post][0], plain[post][0]) > 1e-2


def test_each_row_of_a_batch_has_its_own_edit(lm):
    hooks = [hk.scale("mlp_post.1", 2.0, rows=0), hk.ablate("mlp_post.1", rows=1, units=[3, 7])]
    together = hk.forward(lm, IDS, *hooks).logits
    alone = hk.forward(lm, IDS[1:], hk.ablate("mlp_post.1", units=[3, 7])).logits

    def without_two(post, chosen):
        post[..., [3, 7]] = 0
        return post

    assert far(together[:1], logits_with(lm, IDS[0], lambda post, chosen: 2 * post)) < 1e-5
    assert far(together[1:, : len(IDS[1])], alone) < 1e-5
    assert far(alone, logits_with(lm, IDS[1], without_two)) < 1e-5


def test_neurons_of_another_run_and_means_take_the_place_of_these_choice_by_choice(lm):
    other = [8, 9, 17, 201, 33, 41, 7, 90, 12]
    source = hk.forward(lm, [other], hk.capture("mlp_post.1"))
    values = source["mlp_post.1"][0]
    patched = hk.forward(lm, IDS[:1], hk.patch("mlp_post.1", source)).logits
    assert far(patched, logits_with(lm, IDS[0], lambda post, chosen: values)) < 1e-5
    mean = hk.forward(
        lm, IDS[:1], hk.ablate("mlp_post.1", to="mean", over=[other], per="all")
    ).logits
    assert (
        far(mean, logits_with(lm, IDS[0], lambda post, chosen: values.mean(0).expand_as(post)))
        < 1e-5
    )
    drawn = hk.forward(
        lm, IDS[:1], hk.ablate("mlp_post.1", to="resample", over=[other], seed=1)
    ).logits
    assert far(drawn, patched) < 1e-5


def test_an_edit_while_generating_is_that_of_a_forward_over_the_text(lm):
    hook = hk.scale("mlp_post.1", 0.3, pos=slice(2, None))
    run = hk.generate(lm, IDS, hook, **GREEDY)
    for row, length in enumerate(run.lengths):
        whole = hk.forward(lm, [run.tokens[row, :length].tolist()], hook).logits[0]
        written = run.prompt_lengths[row]
        assert far(run.logits[row], whole[written - 1 : length - 1]) < 1e-5


def test_the_neurons_of_one_expert_are_silenced_where_it_was_chosen(lm):
    chosen: dict[str, Tensor] = {}

    def note(experts: Tensor) -> Tensor:
        chosen["now"] = experts.clone()
        return experts

    def silence(neurons: Tensor) -> Tensor:
        return neurons.masked_fill((chosen["now"] == 2)[..., None], 0)

    hooks = hk.edit("experts.1", note), hk.edit("mlp_post.1", silence)
    run = hk.forward(lm, IDS, *hooks)

    def by_hand(post, experts):
        post[experts == 2] = 0
        return post

    for row, ids in enumerate(IDS):
        assert far(run.logits[row : row + 1, : len(ids)], logits_with(lm, ids, by_hand)) < 1e-5
    generated = hk.generate(lm, IDS, *hooks, **GREEDY)
    for row, length in enumerate(generated.lengths):
        text = generated.tokens[row, :length].tolist()
        whole = logits_with(lm, text, by_hand)[0]
        assert far(generated.logits[row], whole[generated.prompt_lengths[row] - 1 : -1]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_of_hooks_one_in_another_act_one_after_the_other(implementation):
    lm = hk.tiny("mixtral")
    lm.model.set_experts_implementation(implementation)
    with (
        hk.attach(lm, hk.scale("mlp_post.1", 2.0)),
        hk.attach(lm, hk.steer("mlp_post.1", torch.ones(48)), hk.capture("mlp_post.1")) as inner,
    ):
        output = lm.model(torch.tensor(IDS[:1])).logits
    expected = logits_with(lm, IDS[0], lambda post, chosen: 2 * post + 1)
    assert far(output.detach(), expected) < 1e-5
    plain = hk.forward(lm, IDS[:1], hk.capture("mlp_post.1"))["mlp_post.1"]
    assert far(inner["mlp_post.1"], 2 * plain + 1) < 1e-5


def test_an_edit_of_the_choice_gives_the_neurons_of_the_other_experts(lm):
    other = hk.edit("experts.1", lambda experts: (experts + 1) % 4)
    run = hk.forward(lm, IDS[:1], other, hk.capture(["experts.1", "mlp_in.1", "mlp_post.1"]))
    with torch.no_grad():
        _, post, _ = neurons_one_by_one(experts_of(lm), run["mlp_in.1"][0], run["experts.1"][0])
    assert far(run["mlp_post.1"][0], post) < 1e-5


# ---- what else takes neurons


def test_gradients_at_neurons_are_those_of_small_steps():
    lm = hk.tiny("mixtral")
    metric = hk.metrics.logit(7)
    found = hk.gradients(lm, IDS[:1], metric, "mlp_post.1").gradient[hk.Site("mlp_post", 1)]
    vector = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))

    def value(step: float) -> float:
        hook = hk.edit("mlp_post.1", lambda values: values + step * vector)
        return float(hk.forward(lm, IDS[:1], hook).logits[0, -1, 7])

    slope = (value(0.01) - value(-0.01)) / 0.02
    assert abs(slope - float((found * vector).sum())) < 1e-2 * max(1.0, abs(slope))


def test_sweeps_and_attributions_take_a_block_of_experts_as_a_whole(lm):
    clean, corrupted = IDS[:1], [[8, *IDS[0][1:]]]
    metric = hk.metrics.logit(7)
    table = hk.patching(lm, clean, corrupted, "mlp_post", metric, layers=[1])
    source = hk.forward(lm, clean, hk.capture("mlp_post.1"))
    for _, row in table.iterrows():
        run = hk.forward(lm, corrupted, hk.patch("mlp_post.1", source, pos=int(row["pos"])))
        assert abs(float(run.logits[0, -1, 7]) - row["logit"]) < 1e-4
    estimates = hk.attribution(lm, clean, corrupted, "mlp_post", metric, layers=[1])
    gradient = hk.gradients(lm, corrupted, metric, "mlp_post.1")
    site = hk.Site("mlp_post", 1)
    there = hk.forward(lm, corrupted, hk.capture("mlp_post.1"))
    difference = source[site] - there[site]
    by_hand = (difference * gradient.gradient[site]).sum((-1, -2))[0]
    assert torch.allclose(torch.tensor(estimates["logit_delta"]).float(), by_hand, atol=1e-5)
    unit = hk.ablations(lm, clean, "mlp_post", metric, units=[5], layers=[1])
    run = hk.forward(lm, clean, hk.ablate("mlp_post.1", units=[5]))
    assert abs(float(run.logits[0, -1, 7]) - unit["logit"].item()) < 1e-4


def test_harvests_and_statistics_keep_the_choices(lm, tmp_path):
    folder = hk.harvest(lm, IDS, ["mlp_post.1", "experts.1"], folder=tmp_path / "h", progress=False)
    run = hk.forward(lm, IDS, hk.capture("mlp_post.1"))
    rows = run["mlp_post.1"][run.mask]
    assert far(folder["mlp_post.1"][:], rows) < 1e-5
    statistics = hk.stats.activation_statistics(lm, IDS, ["mlp_post.1"], progress=False)
    assert far(statistics["mlp_post.1"].mean, rows.double().mean(0)) < 1e-5


def test_what_has_no_meaning_for_neurons_of_experts_is_refused_with_the_reason(lm):
    metric, clean, corrupted = hk.metrics.logit(7), IDS[:1], [[8, *IDS[0][1:]]]
    with pytest.raises(BadHook, match="neurons of the experts that each token chose"):
        hk.attribution(lm, clean, corrupted, "mlp_post", metric, by="neuron")
    with pytest.raises(Unsupported, match="those of experts.*leave neurons= out"):
        hk.direct_logits(hk.forward(lm, clean), 7, neurons=True)
    with pytest.raises(BadHook, match="neurons of experts are other ones at each token"):
        hk.mean_difference(lm, clean, corrupted, "mlp_post.1")
    with pytest.raises(UnknownSite, match="'mlp_post' has no heads; neurons are named by units="):
        hk.capture("mlp_post.1.0")
    with pytest.raises(BadHook, match=r"shape \[47\], and mlp_post.1 is \[batch, pos, 2, 48\]"):
        hk.forward(lm, IDS, hk.steer("mlp_post.1", torch.ones(47)))
    with pytest.raises(OutOfRange, match="unit 48 of mlp_post.1"):
        hk.forward(lm, IDS, hk.ablate("mlp_post.1", units=[48]))
    with pytest.raises(MissingSite, match="each expert reads every token"):
        hk.forward(hk.tiny("llama4_text"), IDS, hk.capture("mlp_post.1"))


def test_blocks_of_experts_stay_whole_where_others_are_split_by_neuron():
    lm = hk.tiny("qwen3_moe")
    table = hk.direct_logits(hk.forward(lm, IDS[:1]), 7, neurons=True)
    parts = set(table["component"])
    assert {"mlp_out.1", "mlp_out.2"} <= parts and "mlp_out.0" not in parts


def test_experts_that_processes_share_are_refused():
    lm = hk.tiny("mixtral")
    experts_of(lm)._is_expert_parallel = True
    with pytest.raises(Unsupported, match="each process holds some of the experts"):
        hk.forward(lm, IDS, hk.capture("mlp_post.1"))


def test_offloaded_experts_have_neurons_where_all_pairs_are_computed_together(lm):
    accelerate = pytest.importorskip("accelerate")
    expected = hk.forward(lm, IDS, hk.capture("mlp_post"))
    offloaded = hk.tiny("mixtral")
    accelerate.cpu_offload(offloaded.model, execution_device="cpu")
    run = hk.forward(offloaded, IDS, hk.capture("mlp_post"))
    assert torch.equal(run["mlp_post.2"], expected["mlp_post.2"])
    offloaded.model.set_experts_implementation("eager")
    with pytest.raises(Unsupported, match=r"call model.set_experts_implementation\('grouped_mm'\)"):
        hk.forward(offloaded, IDS, hk.capture("mlp_post"))


def test_the_table_of_sites_says_which_blocks_have_a_choice():
    table = hk.tiny("qwen3_moe").describe().set_index("site")
    assert table.loc["mlp_post", "axes"] == "batch pos d_mlp or batch pos choice d_mlp"
    assert table.loc["mlp_post", "sizes"] == "batch pos 48 or batch pos 2 24"
