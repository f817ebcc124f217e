"""Attention from inside: scores and patterns, queries and keys after rotation, and a router's logits."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, Unsupported
from hookkit.models.attention import _additive_mask

IDS = [5, 9, 17, 200, 33, 41, 7]


class Fused(TorchFunctionMode):
    """Counts the calls of torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_only_the_layer_whose_pattern_is_edited_leaves_fused_attention(llama):
    def calls(*hooks: hk.types.Hook) -> int:
        with hk.attach(llama, *hooks), torch.no_grad():
            llama.model(
                torch.tensor([IDS])
            )  # the first time, what is told is compared with what is computed
            with Fused() as fused:
                llama.model(torch.tensor([IDS]))
        return fused.calls

    assert calls() == 3
    assert calls(hk.edit("pattern.1", lambda pattern: pattern * 0.5)) == 2
    assert calls(hk.capture("pattern.1")) == 3
    assert llama.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "gpt_oss", "bloom", "gptj", "mpt", "cohere2"]
)
@pytest.mark.parametrize("implementation", ["as it comes", "eager"])
def test_a_captured_pattern_is_what_transformers_returns_as_attentions(family, implementation):
    lm = hk.tiny(family)
    if implementation == "eager":
        lm.model.set_attn_implementation("eager")
    run = hk.forward(lm, [IDS], hk.capture("pattern"))
    assert torch.equal(run.logits, hk.forward(lm, [IDS]).logits)
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = lm.model(torch.tensor([IDS]), output_attentions=True).attentions
    for layer, attention in enumerate(expected):
        torch.testing.assert_close(run[f"pattern.{layer}"], attention, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("hook", [hk.capture("pattern.1"), hk.scale("pattern.1", 0.5)], ids=str)
def test_a_pattern_that_is_not_what_the_model_computes_is_refused(hook):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def doubled(*args, **kwargs):
        output, pattern = sdpa_attention_forward(*args, **kwargs)
        return output * 2, pattern

    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    lm = hk.tiny("llama")
    lm.model.config._attn_implementation_internal = "doubled"
    with pytest.raises(
        Unsupported,
        match="under 'doubled' computes another attention .* attn_implementation='eager'",
    ):
        hk.forward(lm, [IDS], hook)
    hk.forward(lm, [IDS], hk.capture(["q_rot", "k_rot", "z"]))


def test_an_edited_pattern_is_what_the_values_are_weighed_with(llama):
    """By hand: z is the pattern times the values of the head's key-value head."""
    even = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    edit = hk.edit("pattern.1.2", lambda pattern: even.expand_as(pattern).clone())
    run = hk.forward(llama, [IDS], edit, hk.capture(["z.1", "v.1"]))
    torch.testing.assert_close(run["z.1.2"][0], even @ run["v.1"][0, :, 1], atol=1e-5, rtol=1e-5)
    other = hk.forward(llama, [IDS], hk.capture("z.1"))
    torch.testing.assert_close(run["z.1.1"], other["z.1.1"], atol=1e-5, rtol=1e-5)


def test_scores_are_the_logarithm_of_the_pattern_and_hidden_keys_stay_hidden(llama):
    run = hk.forward(llama, [IDS], hk.capture(["scores.1", "pattern.1"]))
    torch.testing.assert_close(run["scores.1"].softmax(-1), run["pattern.1"], atol=1e-6, rtol=1e-5)
    opened = hk.forward(
        llama, [IDS], hk.edit("scores.1", torch.zeros_like), hk.capture("pattern.1")
    )["pattern.1"]
    even = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(opened[0], even.expand(4, 7, 7), atol=1e-6, rtol=1e-5)


def test_an_edit_is_given_rows_heads_queries_and_keys_in_the_rows_own_positions(llama):
    seen = []

    def look(pattern: torch.Tensor, here: hk.types.EditContext) -> torch.Tensor:
        seen.append((tuple(pattern.shape), here.positions.tolist()))
        return pattern

    hk.forward(llama, [IDS, IDS[:3]], hk.edit("pattern.1", look, pos=-1))
    assert seen == [((2, 4, 1, 7), [[6], [2]])]
    seen.clear()
    hk.forward(llama, [IDS, IDS[:3]], hk.edit("pattern.1.3", look))
    assert seen[0][0] == (2, 7, 7)


def test_queries_and_keys_after_rotation_make_the_scores(llama):
    run = hk.forward(llama, [IDS], hk.capture(["q_rot.1", "k_rot.1", "scores.1", "q.1", "k.1"]))
    scores = run["q_rot.1.3"][0] @ run["k_rot.1.1"][0].T / 8**0.5
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(run["scores.1.3"][0][seen], scores[seen], atol=1e-5, rtol=1e-5)
    assert torch.allclose(run["q_rot.1"][0, 0], run["q.1"][0, 0]), "position 0 is not turned"
    assert not torch.allclose(run["q_rot.1"][0, 3], run["q.1"][0, 3])


def test_an_edit_of_rotated_keys_holds_in_every_later_step(llama):
    edits = [
        hk.scale("k_rot.1", 2.0, pos=slice(1, 3)),
        hk.edit("k_rot.2.0", lambda k: k + 1.0, pos=hk.GENERATED),
    ]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = hk.generate(llama, [IDS, IDS[:4]], *edits, hk.capture("k_rot.1"), **settings)
    without = hk.generate(
        llama, [IDS, IDS[:4]], *edits, hk.capture("k_rot.1"), use_cache=False, **settings
    )
    torch.testing.assert_close(cached.logits, without.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached["k_rot.1"], without["k_rot.1"], atol=1e-5, rtol=1e-5)


def test_gradients_reach_a_captured_pattern(llama):
    run = hk.forward(llama, [IDS], hk.capture("pattern.1", grad=True))
    (gradient,) = torch.autograd.grad(run.logits[0, -1, 11], run["pattern.1"])
    assert gradient.shape == (1, 4, 7, 7)
    step = 1e-2
    moved = hk.forward(
        llama,
        [IDS],
        hk.edit("pattern.1.2", lambda p: p + step * torch.eye(7)[6] * torch.eye(7)[6][:, None]),
    )
    difference = float(moved.logits[0, -1, 11] - run.logits[0, -1, 11].detach())
    assert difference == pytest.approx(step * float(gradient[0, 2, 6, 6]), rel=0.1, abs=1e-4)


def test_an_inner_block_sees_what_an_outer_block_changed(llama):
    outer, inner = (
        hk.attach(llama, hk.scale("pattern.1", 0.0)),
        hk.attach(llama, hk.capture("pattern.1")),
    )
    with torch.no_grad(), outer, inner:
        llama.model(torch.tensor([IDS]))
    assert (inner["pattern.1"] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: hk.steer("pattern.1", torch.ones(7)),
        lambda: hk.project_out("scores.1", torch.ones(7)),
        lambda: hk.ablate("pattern.1", to=torch.ones(7)),
        lambda: hk.ablate("pattern.1", to="mean", over=["Tea"]),
    ],
)
def test_what_only_vectors_can_take_is_refused_at_scores_and_pattern(make):
    with pytest.raises(BadHook, match=r"a number for each query and key, .* hk.knockout"):
        make()


def test_patterns_of_another_run_can_be_put_in(llama):
    source = hk.forward(llama, [[1, 2, 3, 4, 5, 6, 7]], hk.capture("pattern.1"))
    run = hk.forward(llama, [IDS], hk.patch("pattern.1", source), hk.capture("pattern.1"))
    torch.testing.assert_close(run["pattern.1"], source["pattern.1"])


def test_a_routers_edited_logits_choose_other_experts():
    lm = hk.tiny("mixtral")
    force = hk.edit(
        "router_logits.1", lambda logits: logits + 100 * torch.tensor([0.0, 0.0, 1.0, 1.0])
    )
    run = hk.forward(
        lm, [IDS], force, hk.capture(["experts.1", "expert_weights.1", "router_logits.1"])
    )
    assert set(run["experts.1"].flatten().tolist()) == {2, 3}
    chosen = run["router_logits.1"].softmax(-1).gather(-1, run["experts.1"])
    torch.testing.assert_close(run["expert_weights.1"], chosen / chosen.sum(-1, keepdim=True))
    with pytest.raises(BadEdit, match="experts.1 is torch.int64"):
        hk.forward(lm, [IDS], hk.scale("experts.1", 0.5))


def test_every_kind_of_mask_is_read_as_one_that_is_added():
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    lowest = torch.finfo(torch.float32).min
    flash = _additive_mask(torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]), query, key, None)
    assert flash is not None
    assert (flash[0, 0] == 0).tolist() == [
        [True] * 3 + [False] * 2,
        [True] * 4 + [False],
        [True] * 5,
    ]
    assert flash[1, 0, 0].tolist() == [lowest, 0, 0, lowest, lowest]
    window = _additive_mask(torch.ones(2, 5), query, key, 2)
    assert window is not None and (window[0, 0] == 0).sum(-1).tolist() == [2, 2, 2]
    causal = _additive_mask(None, query, key, None)
    assert causal is not None and (causal[0, 0] == 0).sum(-1).tolist() == [
        1,
        2,
        3,
    ]  # four axes, which 5.0 cuts
    assert _additive_mask(None, query[:, :, :1], key, None) is None
