"""Gradients: as steep as small steps say, in every family, and the model is left as it was found."""

import math

import pytest
import torch
from conftest import hooks_on
from tiny_families import ONE_OF_EACH
from torch import nn

import hookkit as hk
from hookkit.errors import BadHook, BadPrompt, OutOfRange, Unsupported

LONG, SHORT = [5, 6, 17, 8, 9, 30], [9, 11, 3]
DIFF = hk.metrics.logit_diff(5, 7)
SITES = ("embed", "resid_pre", "q", "z", "pattern", "resid_mid", "mlp_in", "mlp_post", "mlp_out")


def places(lm, names=SITES, layer=1):
    found = [
        hk.Site(name, None if name == "embed" else layer)
        for name in names
        if name in lm.layout.names
    ]
    return [site for site in found if lm.layout.find(site.name, site.layer)]


def close(found, wanted, tolerance=1e-5):
    """Equal to a fraction of the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def said(lm, row, site, step):
    """The logit difference with a site's values a step away, in one whole forward."""
    run = hk.forward(lm, [row], hk.edit(site, lambda values: values + step.to(values)))
    return float(run.logits[0, -1, 5] - run.logits[0, -1, 7])


def steepness(lm, row, site, way, width):
    return (said(lm, row, site, width * way) - said(lm, row, site, -width * way)) / (2 * width)


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_gradients_in_every_family_are_as_steep_as_small_steps_say(family):
    lm = hk.LM(hk.tiny(family).model.double())
    lm.config._experts_implementation = (
        "eager"  # torch's grouped product of experts refuses float64
    )
    sites = [*places(lm), hk.Site("final_norm"), hk.Site("resid_post", lm.n_layers - 1)]
    found = hk.gradients(
        lm, [LONG, SHORT], DIFF, [site for site in sites if site.name in lm.layout.names]
    )
    assert found.metric[1] == pytest.approx(said(lm, SHORT, sites[-1], torch.zeros(())), abs=1e-5)
    for site in found.sites:
        slope = found.of(site)[1]
        slope = (
            slope[..., : len(SHORT), : len(SHORT)]
            if site.name == "pattern"
            else slope[: len(SHORT)]
        )
        noise = torch.randn(
            slope.shape, generator=torch.Generator().manual_seed(0), dtype=slope.dtype
        )
        way = slope / slope.norm() + noise / noise.norm()
        by_steps = steepness(
            lm, SHORT, site, way[None], 2e-3
        )  # not smaller: many norms compute in float32 all the same
        assert by_steps == pytest.approx(
            float((slope * way).sum()), abs=2e-3 * float(slope.norm())
        ), site


def test_in_float64_throughout_the_steps_agree_to_seven_digits():
    lm = hk.LM(hk.tiny("gpt2").model.double())
    found = hk.gradients(lm, [LONG], DIFF, places(lm))
    for site in found.sites:
        slope = found.of(site)
        way = slope / slope.norm()
        assert steepness(lm, LONG, site, way, 1e-5) == pytest.approx(
            float(slope.norm()), rel=1e-7
        ), site


@pytest.mark.parametrize(
    ("family", "block"), [("llama", "model.layers.{}"), ("gpt2", "transformer.h.{}")]
)
def test_gradients_are_those_of_a_backward_written_by_hand(family, block):
    lm = hk.tiny(family)
    kept = {}

    def keep(number):
        def hook(module, args, output):
            output.retain_grad()
            kept[number] = output

        return lm.model.get_submodule(block.format(number)).register_forward_hook(hook)

    handles = [keep(number) for number in range(lm.n_layers)]
    logits = lm.model(torch.tensor([LONG]), use_cache=False).logits[0, -1]
    (logits[5] - logits[7]).backward()
    for handle in handles:
        handle.remove()
    lm.model.zero_grad()
    found = hk.gradients(lm, [SHORT, LONG], DIFF, "resid_post")
    assert float(found.metric[1]) == pytest.approx(
        float((logits[5] - logits[7]).detach()), abs=1e-5
    )
    for layer in range(lm.n_layers):
        assert close(found.of(f"resid_post.{layer}")[1], kept[layer].grad[0])
        assert close(found.values(f"resid_post.{layer}")[1], kept[layer].detach()[0])
        assert not found.values(f"resid_post.{layer}").requires_grad
    assert found.stack("resid_post").shape == (lm.n_layers, 2, len(LONG), 32)


def test_a_row_in_a_padded_batch_has_the_gradients_that_it_has_alone(lm):
    prompts = ["I like oat milk in my", "Tea", "The capital of France is"]
    names = ["embed", "z.1", "resid_mid.0", "scores.2", "mlp_post.1", "logits"]
    found = hk.gradients(lm, prompts, DIFF, names)
    for row, prompt in enumerate(prompts):
        alone = hk.gradients(lm, prompt, DIFF, names)
        assert float(found.metric[row]) == pytest.approx(float(alone.metric[0]), abs=1e-5)
        for name in names:
            mine, its = (each.of(name)[number] for each, number in ((found, row), (alone, 0)))
            if name == "scores.2":
                mine = mine[:, : its.shape[1], : its.shape[2]]
            assert close(mine[: len(its)], its), name
            assert name == "scores.2" or (mine[len(its) :] == 0).all()


def test_one_head_is_that_head_of_them_all(llama):
    whole, one = (hk.gradients(llama, "Tea and milk", DIFF, site) for site in ("z.1", "z.1.2"))
    assert close(whole.of("z.1.2"), one.of("z.1.2"))
    assert torch.equal(whole.values("z.1.2"), whole.values("z.1")[:, :, 2])
    assert whole.captured("z.1").rows == (0,)


@pytest.mark.parametrize("pos", [-1, 2])
def test_every_metric_with_a_slope_has_its_gradient(llama, pos):
    reference = hk.forward(llama, [SHORT])
    wanted = reference.logits[0, -1].log_softmax(-1)

    def margin(logits):
        return logits[:, 3] ** 2 - logits[:, 4]

    by_hand = {
        hk.metrics.logit(5): lambda x: x[5],
        hk.metrics.logprob((5, 6)): lambda x: x.log_softmax(-1)[5:7].logsumexp(0),
        hk.metrics.prob(5): lambda x: x.softmax(-1)[5],
        hk.metrics.entropy(): lambda x: torch.distributions.Categorical(logits=x).entropy(),
        hk.metrics.kl(reference): lambda x: (wanted.exp() * (wanted - x.log_softmax(-1))).sum(),
        margin: lambda x: x[3] ** 2 - x[4],
    }
    for metric, rule in by_hand.items():
        found = hk.gradients(llama, [LONG], metric, ["resid_post.1", "logits"], pos=pos)
        logits = hk.forward(llama, [LONG], hk.capture("resid_post.1", grad=True), logits="all")
        value = rule(logits.logits[0, pos])
        (slope,) = torch.autograd.grad(value, logits["resid_post.1"])
        assert float(found.metric[0]) == pytest.approx(float(value.detach()), abs=1e-4)
        assert close(found.of("resid_post.1"), slope), metric
        assert (found.of("resid_post.1")[0, pos % len(LONG) + 1 :] == 0).all()


def test_the_loss_of_a_continuation_has_its_gradient(llama):
    found = hk.gradients(
        llama, [LONG, SHORT], hk.metrics.loss([(8, 9), (10, 11, 12)]), "resid_post.1"
    )
    run = hk.forward(llama, [[*SHORT, 10, 11]], hk.capture("resid_post.1", grad=True))
    said_of = run.logits[0, len(SHORT) - 1 :].log_softmax(-1)
    value = -(said_of[0, 10] + said_of[1, 11] + said_of[2, 12]) / 3
    (slope,) = torch.autograd.grad(value, run["resid_post.1"])
    assert float(found.metric[1]) == pytest.approx(float(value.detach()), abs=1e-5)
    assert close(found.of("resid_post.1")[1, :5], slope[0])


def test_edits_are_in_the_numbers_and_in_the_gradients(llama):
    double = hk.scale("mlp_out.1", 2.0)
    found = hk.gradients(
        llama, [LONG], DIFF, ["resid_pre.1", "mlp_out.1"], double, hk.capture("embed")
    )
    edit = lambda step: [double, hk.edit("resid_pre.1", lambda v: v + step)]  # noqa: E731
    slope = found.of("resid_pre.1")
    way = slope / slope.norm()
    logits = [hk.forward(llama, [LONG], *edit(sign * 1e-2 * way)).logits[0, -1] for sign in (1, -1)]
    steps = float((logits[0] - logits[1])[5] - (logits[0] - logits[1])[7]) / 2e-2
    assert steps == pytest.approx(float(slope.norm()), rel=1e-2)
    assert torch.allclose(
        found.values("mlp_out.1"),
        hk.forward(llama, [LONG], double, hk.capture("mlp_out.1"))["mlp_out.1"],
    )
    assert [str(site) for site in found.run.sites] == [
        "embed"
    ] and not found.run.logits.requires_grad


def test_what_an_edit_cuts_off_has_the_gradient_zero(llama):
    cut = hk.ablate("resid_post.1")
    found = hk.gradients(llama, [LONG], DIFF, ["resid_pre.1", "resid_pre.2"], cut)
    assert (found.of("resid_pre.1") == 0).all() and found.of("resid_pre.2").abs().max() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_the_same_in_every_gradient_mode(llama, mode):
    wanted = hk.gradients(llama, [LONG], DIFF, "z.1").of("z.1")
    with mode():
        found = hk.gradients(llama, [LONG], DIFF, "z.1").of("z.1")
    assert torch.equal(found, wanted) and not found.is_inference()


def test_the_model_is_left_as_found_after_any_ending():
    lm = hk.tiny("llama")
    weights = dict(lm.model.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_("mlp" not in name)
        weight.grad = torch.ones_like(weight) if "q_proj" in name else None
    hooks, flags = (
        hooks_on(lm.model),
        {name: weight.requires_grad for name, weight in weights.items()},
    )

    def fails(values):
        raise ZeroDivisionError("mine")

    hk.gradients(lm, [LONG], DIFF, "resid_pre")
    hk.attribution(lm, [LONG], [LONG[::-1]], "z", DIFF, method="integrated", steps=2)
    hk.edge_attribution(lm, [LONG], [LONG[::-1]], DIFF, method="integrated", steps=2)
    with pytest.raises(ZeroDivisionError, match="mine"):
        hk.gradients(lm, [LONG], DIFF, "resid_pre", hk.edit("z.1", fails))
    with pytest.raises(Unsupported):
        hk.gradients(lm, [LONG], hk.metrics.rank(5), "resid_pre")
    assert {name: weight.requires_grad for name, weight in weights.items()} == flags
    assert hooks_on(lm.model) == hooks
    for name, weight in weights.items():
        assert (weight.grad is None) if "q_proj" not in name else bool((weight.grad == 1).all())


def test_an_edit_of_the_stream_reaches_it_also_where_the_mlp_reads_it_as_it_is():
    lm = hk.tiny(
        "olmo2"
    )  # whose MLP has no norm before it: resid_mid and mlp_in are one module's input
    both = [hk.scale("mlp_in.1", 0.5), hk.scale("resid_mid.1", 2.0)]
    for hooks in (both, both[::-1]):
        run = hk.forward(
            lm, [LONG], *hooks, hk.capture(["resid_mid.1", "mlp_in.1", "mlp_out.1", "resid_post.1"])
        )
        plain = hk.forward(lm, [LONG], hk.capture("resid_mid.1"))["resid_mid.1"]
        assert torch.allclose(run["resid_mid.1"], 2 * plain) and torch.allclose(
            run["mlp_in.1"], plain
        )
        assert close(run["resid_post.1"], 2 * plain + run["mlp_out.1"])
    found = hk.gradients(lm, [LONG], DIFF, ["mlp_in.1", "resid_mid.1", "resid_post.1"])
    together = found.of("mlp_in.1") + found.of("resid_post.1")
    assert close(found.of("resid_mid.1"), together)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"metric": hk.metrics.rank(5)},
            Unsupported,
            "the metric rank gives no gradient: it counts",
        ),
        ({"metric": lambda logits: logits[:, 5].detach()}, Unsupported, "gives no gradient"),
        ({"metric": hk.metrics.kl()}, Unsupported, "give kl.reference_run."),
        ({"metric": [DIFF, hk.metrics.prob(5)]}, BadHook, "metric=a list: give a metric"),
        (
            {"metric": hk.metrics.logit_diff([5], [7])},
            BadPrompt,
            "a metric has tokens for 1 prompts, and there are 2",
        ),
        ({"sites": "resid_pre.9"}, OutOfRange, "3 layers"),
        ({"pos": 4}, OutOfRange, "the metric looks at position 4, and prompt 1 has 3 tokens"),
        ({"pos": None}, BadHook, "give a whole number"),
        ({"metric": lambda logits: logits[:, 5] - math.inf}, None, ""),
        ({"metric": lambda logits: (logits[:, 5] * 0).sqrt()}, Unsupported, "not finite"),
        ({"where": 1}, hk.errors.UnknownKeyword, "gradients.. has no keyword 'where'"),
    ],
)
def test_a_mistake_says_what_to_do(llama, change, error, words):
    given = {"prompts": [LONG, SHORT], "metric": DIFF, "sites": "resid_pre"} | change
    if error is None:
        assert hk.gradients(llama, **given).of("resid_pre.0").isfinite().all()
        return
    with pytest.raises(error, match=words):
        hk.gradients(llama, **given)


def test_a_loss_with_hooks_and_the_numbers_of_experts_are_refused(llama):
    with pytest.raises(Unsupported, match="leave the hooks out"):
        hk.gradients(llama, [LONG], hk.metrics.loss((8, 9)), "z.1", hk.ablate("z.0"))
    with pytest.raises(Unsupported, match="numbers of experts, which have no gradient"):
        hk.gradients(hk.tiny("mixtral"), [LONG], DIFF, "experts.1")


def test_a_place_that_nothing_reads_is_no_place_of_gradient_zero():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.aside, self.head = (
                nn.Embedding(20, 4),
                nn.Linear(4, 4),
                nn.Linear(4, 20),
            )

        def forward(self, ids):
            values = self.table(ids)
            self.aside(values)
            return self.head(values)

    lm = hk.LM(Aside())
    with pytest.raises(Unsupported, match="does not depend on aside:output"):
        hk.gradients(lm, [[1, 2, 3]], DIFF, hk.module("aside"))
    assert hk.gradients(lm, [[1, 2, 3]], DIFF, hk.module("table")).of(hk.module("table")).shape == (
        1,
        3,
        4,
    )


def test_a_tensor_without_rows_and_positions_is_refused():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.turned, self.head = (
                nn.Embedding(20, 4),
                nn.Identity(),
                nn.Linear(4, 20),
            )

        def forward(self, ids):
            return self.head(self.turned(self.table(ids).movedim(-1, 0)).movedim(0, -1))

    lm = hk.LM(Turned())
    with pytest.raises(
        Unsupported, match=r"turned:output has shape \[4, 1, 3\], without axes batch and pos"
    ):
        hk.gradients(lm, [[1, 2, 3]], DIFF, [hk.module("table"), hk.module("turned")])
