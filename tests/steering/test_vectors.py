"""Steering vectors against plain transformers with hooks written by hand: means, principal directions, gradient descent,
doses and damage, files; and what is refused."""

import json
import math
from contextlib import ExitStack, contextmanager

import by_hand
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import hooks_on
from tiny_families import ONE_OF_EACH
from torch import Tensor

import hookkit as hk
from hookkit.errors import (
    BadHook,
    BadPrompt,
    EmptySelection,
    MissingSite,
    NotCaptured,
    OtherModel,
    OutOfRange,
    UnknownKeyword,
)
from hookkit.tables import intervals

METRIC = hk.metrics.logit_diff(5, 7)
SITE, LAYER = "resid_post.1", 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def small(request) -> hk.LM:
    """A model that no test changes."""
    return hk.tiny(request.param)


@pytest.fixture(scope="module")
def llama_ids() -> hk.LM:
    """The same of one family, for what does not depend on the family."""
    return hk.tiny("llama")


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=draws).tolist() for length in lengths]


MORE, LESS, PAIRED = drawn(5, 8, 6), drawn(7, 4, seed=1), drawn(7, 4, 6, seed=2)
NEUTRAL = drawn(9, 5, 7, seed=3)


def values(lm: hk.LM, ids: list[int], site: str = "resid_post", layer: int = LAYER) -> Tensor:
    """The stream of one prompt, [pos, d_model], in float64."""
    return by_hand.captured(lm.model, ids, site, layer)[0].double()


def vector(lm: hk.LM, seed: int = 0, norm: float = 8.0) -> hk.Vector:
    return hk.Vector(SITE, torch.randn(32, generator=torch.Generator().manual_seed(seed)), norm)


@contextmanager
def untouched(lm: hk.LM):
    """Weights, what they take of gradients, and hooks are at the end what they were."""
    weights = dict(lm.root.named_parameters())
    before = {name: (w.detach().clone(), w.requires_grad, w.grad) for name, w in weights.items()}
    hooks = hooks_on(lm.root)
    yield
    for name, weight in weights.items():
        was, learns, grad = before[name]
        assert (
            torch.equal(weight, was) and weight.requires_grad == learns and weight.grad is grad
        ), name
    assert hooks_on(lm.root) == hooks


# ---- read from prompts


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("pos", [-1, 2, None, slice(1, None), [0, -2]])
def test_a_mean_difference_is_that_of_the_prompts_one_by_one(small, pos, batch):
    def mean(prompts: list[list[int]], site: str, layer: int) -> tuple[Tensor, Tensor]:
        index = slice(None) if pos is None else [pos] if isinstance(pos, int) else pos
        each = torch.cat([values(small, ids, site, layer)[index] for ids in prompts])
        return each.mean(0), each.norm(dim=-1)

    with untouched(small):
        found = hk.mean_difference(
            small, MORE, LESS, ["resid_post", "mlp_out.2"], pos=pos, batch=batch
        )
    assert [str(site) for site in found.sites] == [
        "resid_post.0",
        "resid_post.1",
        "resid_post.2",
        "mlp_out.2",
    ]
    for each in found:
        (more, lengths), (less, others) = (
            mean(p, each.site.name, each.site.layer) for p in (MORE, LESS)
        )
        assert torch.allclose(each.tensor.double(), more - less, atol=1e-5)
        ordered = torch.cat([lengths, others]).sort().values
        assert each.norm == pytest.approx(float(ordered[(len(ordered) - 1) // 2]), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_mean(small, side):
    width = max(map(len, MORE))
    rows = [
        [0] * (width - len(r)) + r if side == "left" else r + [0] * (width - len(r)) for r in MORE
    ]
    real = [
        [0] * (width - len(r)) + [1] * len(r)
        if side == "left"
        else [1] * len(r) + [0] * (width - len(r))
        for r in MORE
    ]
    given = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(real)}
    for pos in (None, -1):
        padded, plain = (
            hk.mean_difference(small, p, LESS, SITE, pos=pos)[SITE] for p in (given, MORE)
        )
        assert torch.allclose(padded.tensor, plain.tensor, atol=1e-5)
        assert padded.about["data_sha256"] == plain.about["data_sha256"]


def test_a_vector_of_one_head_is_read_too(llama_ids):
    found = hk.mean_difference(llama_ids, MORE, LESS, "z.1.2")["z.1.2"]
    each = [
        torch.stack([values(llama_ids, ids, "z")[-1, 2] for ids in prompts]).mean(0)
        for prompts in (MORE, LESS)
    ]
    assert torch.allclose(found.tensor.double(), each[0] - each[1], atol=1e-5)


@pytest.mark.parametrize("pos", [-1, slice(1, None)])
def test_a_principal_direction_is_the_first_eigenvector_of_the_pairs_differences(small, pos):
    found = hk.principal_direction(small, MORE, PAIRED, SITE, pos=pos)[SITE]
    index = slice(-1, None) if pos == -1 else pos
    apart = torch.stack(
        [
            values(small, a)[index].mean(0) - values(small, b)[index].mean(0)
            for a, b in zip(MORE, PAIRED, strict=True)
        ]
    )
    sizes, axes = torch.linalg.eigh(apart.T @ apart)
    wanted = axes[:, -1] * torch.sign((apart @ axes[:, -1]).mean())
    assert torch.allclose(found.tensor.double(), wanted, atol=1e-5)
    assert found.about["share"] == pytest.approx(float(sizes[-1] / sizes.sum()), rel=1e-5)
    back = hk.principal_direction(small, PAIRED, MORE, SITE, pos=pos)[SITE]
    assert torch.allclose(back.tensor, -found.tensor, atol=1e-5)


def test_positive_prompts_lie_in_a_principal_directions_own_sense(small):
    sites = ["resid_post", "mlp_out", "attn_out"]
    means = hk.mean_difference(small, MORE, PAIRED, sites)
    for found in hk.principal_direction(small, MORE, PAIRED, sites):
        assert found.tensor @ means[found.site].tensor > 0, found.site


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (
            lambda lm: hk.principal_direction(lm, MORE, LESS, SITE),
            BadPrompt,
            "3 positive and 2 negative",
        ),
        (
            lambda lm: hk.principal_direction(lm, MORE, MORE, SITE),
            BadHook,
            "the pairs are the same",
        ),
        (
            lambda lm: hk.mean_difference(lm, MORE, LESS, SITE, pos=slice(4, None)),
            EmptySelection,
            "nothing in row 1",
        ),
        (lambda lm: hk.mean_difference(lm, MORE, LESS, SITE, pos=7), hk.errors.HookkitError, "7"),
        (lambda lm: hk.mean_difference(lm, MORE, LESS, "z.1"), BadHook, "name one head"),
        (lambda lm: hk.mean_difference(lm, MORE, LESS, "pattern.1"), BadHook, "pattern.1"),
        (lambda lm: hk.mean_difference(lm, MORE, LESS, SITE, batch=0), BadHook, "batch=0"),
        (
            lambda lm: hk.mean_difference(lm, MORE, LESS, SITE, position=1),
            UnknownKeyword,
            "position",
        ),
        (
            lambda lm: hk.mean_difference(lm, MORE, LESS, SITE)["resid_post.2"],
            NotCaptured,
            "no vector of resid_post.2",
        ),
    ],
)
def test_reading_says_what_is_wrong(llama_ids, wrong, error, words):
    with pytest.raises(error, match=words):
        wrong(llama_ids)


# ---- a vector as a value


def test_vectors_can_be_added_and_multiplied(small):
    one, other = vector(small), vector(small, seed=1, norm=4.0)
    assert (
        torch.equal((one + other).tensor, one.tensor + other.tensor) and (one + other).norm == 6.0
    )
    assert torch.equal((one - other).tensor, one.tensor - other.tensor)
    assert torch.equal((2 * one).tensor, one.tensor * 2) and torch.equal(
        (one * 2).tensor, one.tensor * 2
    )
    assert torch.equal((one / 4).tensor, one.tensor / 4) and torch.equal((-one).tensor, -one.tensor)
    assert one.unit().length == pytest.approx(1) and one.unit().norm == 8.0
    assert one.dose == pytest.approx(float(one.tensor.norm()) / 8)
    cosine = torch.nn.functional.cosine_similarity(one.tensor, other.tensor, dim=0)
    assert one.cosine(other) == pytest.approx(float(cosine), abs=1e-6) and one.cosine(
        -3 * one
    ) == pytest.approx(-1)


def test_a_vector_is_a_copy_and_says_how_it_came_to_be(llama_ids):
    mine = torch.ones(32)
    made = hk.Vector(SITE, mine, 8.0)
    mine.zero_()
    assert made.tensor.sum() == 32
    read = hk.mean_difference(llama_ids, MORE, LESS, SITE)[SITE]
    assert (2 * read - read.unit()).method == "(2 * mean difference - unit of mean difference)"
    assert (read + read).about["weights_sha256"] == read.about["weights_sha256"]
    assert (read + read).about["data_sha256"] != read.about["data_sha256"]
    assert repr(read).startswith("Vector(resid_post.1: mean difference, length ")


def test_random_vectors_are_as_long_and_depend_on_seed_and_site_alone(small):
    one = vector(small)
    assert one.random(seed=3).length == pytest.approx(one.length, rel=1e-5)
    assert torch.equal(one.random(seed=3).tensor, one.random(seed=3).tensor)
    assert abs(one.random(seed=3).cosine(one.random(seed=4))) < 0.7
    assert (
        hk.Vector("resid_post.2", one.tensor, 8.0).random(seed=3).cosine(one.random(seed=3)) < 0.9
    )
    assert vector(small, seed=5).random(seed=3).cosine(one.random(seed=3)) == pytest.approx(1)


def test_a_dose_is_a_fraction_of_the_streams_length(small):
    one, ids = vector(small), MORE[0]
    for hook, size in (
        (one.steer(dose=-0.5), -4.0 / one.length),
        (one.steer(scale=3), 3.0),
        (one.steer(), 1.0),
    ):
        wanted = by_hand.edited_logits(
            small.model, ids, "resid_post", LAYER, lambda x, s=size: x + s * one.tensor
        )
        assert torch.allclose(hk.forward(small, [ids], hook).logits, wanted, atol=1e-4)
    third = hk.Vector(SITE, one.tensor, norm=1 / 3).steer(dose=1)
    assert third.scale == 0.333333  # the rest of a measured length is the processor's
    with pytest.raises(BadHook, match=r"dose=1\.0 and scale=1\.0"):
        one.steer(dose=1, scale=1)
    with pytest.raises(BadHook, match="zero, and has no direction"):
        (0 * one).steer(dose=1)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda lm: hk.Vector("resid_post", torch.ones(32), 1.0), BadHook, "name a layer"),
        (lambda lm: hk.Vector(SITE, torch.ones(2, 32), 1.0), BadHook, r"shape \[2, 32\]"),
        (lambda lm: hk.Vector(SITE, torch.ones(32) / 0, 1.0), BadHook, "not finite"),
        (lambda lm: hk.Vector(SITE, torch.ones(32), 0.0), BadHook, "norm=0.0"),
        (
            lambda lm: vector(lm) + hk.Vector("resid_post.2", torch.ones(32), 1.0),
            BadHook,
            "at one site",
        ),
        (lambda lm: vector(lm).cosine(hk.Vector(SITE, torch.ones(8), 1.0)), BadHook, "32 and 8"),
        (lambda lm: vector(lm) * math.inf, BadHook, "factor"),
    ],
)
def test_a_vector_says_what_is_wrong(llama_ids, wrong, error, words):
    with pytest.raises(error, match=words):
        wrong(llama_ids)


# ---- files


def test_a_vector_is_saved_and_loaded(small, tmp_path):
    read = hk.mean_difference(small, MORE, LESS, SITE)[SITE]
    path = read.save(tmp_path / "there" / "mood.safetensors")
    again = hk.load_vector(small, path)
    assert torch.equal(again.tensor, read.tensor) and (again.site, again.norm) == (
        read.site,
        read.norm,
    )
    assert again.about == read.about and len(again.about["data_sha256"]) == 64
    assert read.save(tmp_path / "twice").read_bytes() == path.read_bytes()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["vector"])["site"] == SITE


def test_a_vector_of_another_model_is_refused_unless_asked_for(tmp_path):
    one, other = hk.tiny("llama"), hk.tiny("llama", seed=1)
    path = hk.mean_difference(one, MORE, LESS, "resid_post.2")[0].save(tmp_path / "v")
    with pytest.raises(
        OtherModel, match="made with tiny llama.*differs in weights_sha256.*any_model=True"
    ):
        hk.load_vector(other, path)
    assert hk.load_vector(other, path, any_model=True).site == hk.Site("resid_post", 2)
    with pytest.raises(OtherModel, match="says nothing of weights_sha256"):
        hk.load_vector(one, vector(one).save(tmp_path / "by_hand"))
    with pytest.raises(OutOfRange, match="2"):
        hk.load_vector(hk.tiny("llama", config={"num_hidden_layers": 2}), path, any_model=True)
    hk.results.save_tensors({"vector": torch.ones(3)}, tmp_path / "else")
    with pytest.raises(BadHook, match="no steering vector"):
        hk.load_vector(one, tmp_path / "else")
    with pytest.raises(OtherModel, match="different models"):
        hk.load_vector(one, path) + hk.mean_difference(other, MORE, LESS, "resid_post.2")[0]


def test_a_change_of_one_weight_makes_another_model(tmp_path):
    lm = hk.tiny("gpt2")
    path = hk.mean_difference(lm, MORE, LESS, SITE)[0].save(tmp_path / "v")
    with torch.no_grad():
        next(lm.model.parameters()).view(-1)[0] += 1
    with pytest.raises(OtherModel):
        hk.load_vector(lm, path)


# ---- learnt


def descended(lm: hk.LM, prompts, target, steps, lr, *, pos=slice(None), behind=(), longest=None):
    """Adam in plain torch: a leaf that a hook adds at the site, one prompt at a time. `target(logits, n)` is to rise."""
    norms = torch.cat([values(lm, ids)[pos].norm(dim=-1) for ids in prompts]).sort().values
    norm = float(norms[(len(norms) - 1) // 2])
    leaf = torch.zeros(32, requires_grad=True)
    adam = torch.optim.Adam([leaf], lr=lr * norm / 32**0.5)
    module, side, _ = by_hand.module_of(lm.model, "resid_post", LAYER)
    curve = []

    def value() -> Tensor:
        total = torch.zeros(())
        for number, ids in enumerate(prompts):
            where = torch.zeros(len(ids) + max(0, len(behind) - 1), 1)
            where[: len(ids)][pos] = 1
            where[len(ids) :] = float(pos == slice(None))
            with ExitStack() as stack:
                handle = by_hand.with_hook(module, side, lambda x, w=where: x + w * leaf)
                stack.callback(handle.remove)
                logits = lm.model(torch.tensor([[*ids, *behind[:-1]]])).logits[0]
            total = total + target(logits, number) / len(prompts)
        return total

    for _ in range(steps):
        adam.zero_grad()
        mean = value()
        curve.append(mean.item())
        (leaf.grad,) = torch.autograd.grad(-mean, leaf)
        adam.step()
        if longest is not None and leaf.norm() > longest * norm:
            with torch.no_grad():
                leaf *= longest * norm / leaf.norm()
    return leaf.detach(), [*curve, value().item()], norm


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("pos", [None, -1, slice(1, 3)])
def test_a_learnt_vector_is_that_of_a_loop_in_plain_torch(small, pos, batch):
    index = slice(None) if pos is None else slice(-1, None) if pos == -1 else pos
    wanted, curve, norm = descended(
        small, MORE, lambda logits, _: logits[-1, 5] - logits[-1, 7], 4, 0.05, pos=index
    )
    with untouched(small):
        found = hk.fit_vector(
            small, MORE, METRIC, SITE, pos=pos, steps=4, lr=0.05, batch=batch, progress=False
        )
    assert torch.allclose(found.tensor, wanted, atol=1e-3 * float(wanted.norm()))
    assert found.about["curve"] == pytest.approx(curve, abs=1e-4) and curve[-1] > curve[0]
    assert found.norm == pytest.approx(norm, rel=1e-5)
    assert all(weight.grad is None for weight in small.model.parameters())


@pytest.mark.parametrize("pos", [None, -1])
def test_the_loss_of_a_continuation_falls_as_in_plain_torch(small, pos):
    behind = (8, 9, 11, 4)
    index = slice(None) if pos is None else slice(-1, None)

    def likely(logits: Tensor, number: int) -> Tensor:
        said = logits[len(MORE[number]) - 1 :].log_softmax(-1)
        return sum(said[place, token] for place, token in enumerate(behind)) / len(behind)

    wanted, curve, _ = descended(
        small, MORE, likely, 4, 0.05, pos=index, behind=behind, longest=0.12
    )
    with untouched(small):
        found = hk.fit_vector(
            small,
            MORE,
            hk.metrics.loss(behind),
            SITE,
            pos=pos,
            steps=4,
            lr=0.05,
            dose=0.12,
            batch=2,
            progress=False,
        )
    assert torch.allclose(found.tensor, wanted, atol=1e-3 * float(wanted.norm()))
    assert found.about["curve"] == pytest.approx([-value for value in curve], abs=1e-4)
    assert found.about["curve"][-1] < found.about["curve"][0] and found.dose == pytest.approx(
        0.12, rel=1e-4
    )


def test_texts_are_continuations(lm):
    given = ["I like oat milk in my", "Tea"]
    settings = {"steps": 2, "progress": False}
    one = hk.fit_vector(lm, given, [" coffee", " and milk"], SITE, **settings)
    assert torch.equal(
        one.tensor,
        hk.fit_vector(
            lm, given, hk.metrics.loss([" coffee", " and milk"]), SITE, **settings
        ).tensor,
    )
    assert one.about["target"] == "Loss(continuation=[' coffee', ' and milk'])"
    same = hk.fit_vector(lm, given, " sugar", SITE, **settings)
    assert same.about["curve"][-1] < same.about["curve"][0]


def test_a_fit_is_the_same_twice_and_a_seed_changes_its_start(llama_ids):
    settings = {"steps": 3, "progress": False}
    one, two = (hk.fit_vector(llama_ids, MORE, METRIC, SITE, **settings) for _ in range(2))
    assert torch.equal(one.tensor, two.tensor) and one.about == two.about
    seeded = [
        hk.fit_vector(llama_ids, MORE, METRIC, SITE, seed=seed, **settings) for seed in (0, 0, 1)
    ]
    assert torch.equal(seeded[0].tensor, seeded[1].tensor)
    assert seeded[0].about["curve"][0] != one.about["curve"][0] != seeded[2].about["curve"][0]
    start = one.random(seed=1).unit().tensor * (0.02 * one.norm)
    before = hk.forward(llama_ids, MORE, hk.steer(SITE, start))
    assert seeded[2].about["curve"][0] == pytest.approx(float(METRIC(before).mean()), abs=1e-4)
    named = hk.fit_vector(llama_ids, MORE, METRIC, SITE, pos=-2, lr=0.1, dose=0.5, **settings).about
    words = {
        name: named[name] for name in ("method", "pos", "steps", "lr", "dose", "seed", "prompts")
    }
    said = {
        "method": "learnt",
        "pos": "-2",
        "steps": 3,
        "lr": 0.1,
        "dose": 0.5,
        "seed": None,
        "prompts": [len(MORE)],
    }
    assert words == said


def test_a_metric_that_compares_is_told_what_was_there_before(llama_ids):
    found = hk.fit_vector(
        llama_ids, MORE, hk.metrics.kl(), SITE, steps=3, seed=0, batch=2, progress=False
    )
    before = hk.forward(llama_ids, MORE)
    after = hk.forward(llama_ids, MORE, found.steer())
    assert found.about["curve"][-1] == pytest.approx(
        float(hk.metrics.kl(before)(after).mean()), rel=1e-3
    )
    assert found.about["curve"][-1] > found.about["curve"][0]


def test_weights_that_were_frozen_stay_so_and_gradients_stay_where_they_are(llama_ids):
    lm = hk.tiny("llama")
    weights = list(lm.model.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    with untouched(lm):
        hk.fit_vector(lm, MORE, METRIC, SITE, steps=1, progress=False)
        with pytest.raises(ZeroDivisionError):
            hk.fit_vector(lm, MORE, lambda logits: logits[:, 1 // 0], SITE, steps=1, progress=False)
        with torch.inference_mode():
            hk.fit_vector(lm, MORE, METRIC, SITE, steps=1, progress=False)
    assert weights[1].grad.sum() == weights[1].numel()


@pytest.mark.parametrize("model_type", sorted(ONE_OF_EACH))
def test_a_vector_can_be_learnt_in_every_family(model_type):
    lm = hk.tiny(model_type)
    with untouched(lm):
        found = hk.fit_vector(lm, MORE, METRIC, SITE, steps=2, lr=0.005, batch=2, progress=False)
    assert found.about["curve"][-1] > found.about["curve"][0]
    after = hk.forward(lm, MORE, found.steer())
    assert found.about["curve"][-1] == pytest.approx(float(METRIC(after).mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"target": hk.metrics.rank(5)}, BadHook, "Rank.*has no gradient"),
        ({"target": hk.metrics.top1_changed()}, BadHook, "no gradient"),
        ({"target": [METRIC, hk.metrics.prob(5)]}, BadHook, "2 targets"),
        ({"site": "resid_post"}, BadHook, "3 sites"),
        ({"site": "z.1"}, BadHook, "name one head"),
        ({"site": "pattern.1.0"}, BadHook, "pattern.1.0"),
        ({"site": "resid_post.9"}, OutOfRange, "9"),
        ({"site": "pos_embed"}, MissingSite, "pos_embed"),
        (
            {"site": "resid_post.2", "pos": 0},
            BadHook,
            "does not change with a vector at resid_post.2",
        ),
        ({"steps": 0}, BadHook, "steps=0"),
        ({"lr": -1}, BadHook, "lr=-1"),
        ({"dose": 0}, BadHook, "dose=0"),
        ({"batch": 0}, BadHook, "batch=0"),
        ({"pos": slice(6, 7)}, EmptySelection, "prompt 0 has no token"),
        ({"target": hk.metrics.loss([(5,)])}, BadPrompt, "1 continuations"),
        ({"position": -1}, UnknownKeyword, "position"),
    ],
)
def test_a_fit_says_what_is_wrong(llama_ids, given, error, words):
    settings = {"site": SITE, "target": METRIC, "progress": False, **given}
    with untouched(llama_ids), pytest.raises(error, match=words):
        hk.fit_vector(llama_ids, MORE, settings.pop("target"), settings.pop("site"), **settings)


# ---- doses and damage


def said(lm: hk.LM, ids: list[int], add: Tensor) -> Tensor:
    return by_hand.edited_logits(lm.model, ids, "resid_post", LAYER, lambda x: x + add)[0]


@pytest.mark.parametrize("batch", [2, 16])
def test_a_dose_response_is_a_loop_by_hand(small, batch):
    one = vector(small)
    with untouched(small):
        table = hk.dose_response(
            small,
            MORE,
            one,
            METRIC,
            doses=[-0.5, 0.25],
            samples=2,
            neutral=NEUTRAL,
            seed=4,
            batch=batch,
            progress=False,
        )
    assert list(table.columns) == [
        *("vector", "site", "layer", "dose", "length", "control", "sample", "row", "prompt"),
        *(
            "logit_diff",
            "logit_diff_before",
            "logit_diff_delta",
            "damage_kl",
            "damage_loss",
            "perplexity",
        ),
    ]
    assert len(table) == 2 * 3 * 3 and table.attrs["complete"]
    for cell in table.itertuples():
        way = one.random(seed=4 + cell.sample) if cell.control else one
        add = way.tensor / way.length * cell.dose * 8.0
        assert (cell.vector, cell.site, cell.layer) == ("a vector made by hand", SITE, 1)
        assert cell.length == pytest.approx(float(add.norm()), rel=1e-5) and cell.prompt == cell.row
        logits, before = (
            said(small, MORE[cell.row], add)[-1],
            by_hand.logits(small.model, MORE[cell.row])[0, -1],
        )
        assert cell.logit_diff == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
        assert cell.logit_diff_before == pytest.approx(float(before[5] - before[7]), abs=1e-4)
        losses, divergences, plain = [], [], []
        for ids in NEUTRAL:
            now, was = (
                x.double().log_softmax(-1)[:-1]
                for x in (said(small, ids, add), by_hand.logits(small.model, ids)[0])
            )
            places = torch.arange(len(ids) - 1)
            losses.append(-now[places, ids[1:]])
            plain.append(-was[places, ids[1:]])
            divergences.append((was.exp() * (was - now)).sum(-1))
        loss, first, kl = (float(torch.cat(each).mean()) for each in (losses, plain, divergences))
        assert cell.damage_kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert cell.damage_loss == pytest.approx(loss - first, abs=1e-4)
        assert cell.perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_what_acts_under_every_dose_acts_in_prompts_and_neutral_text(llama_ids):
    one, cut = vector(llama_ids), hk.ablate("mlp_out.0")
    table = hk.dose_response(
        llama_ids,
        MORE,
        one,
        METRIC,
        doses=[0.5],
        samples=0,
        neutral=NEUTRAL,
        base_hooks=cut,
        pos=-1,
        progress=False,
    )
    after = hk.forward(llama_ids, MORE, cut, one.steer(dose=0.5, pos=-1))
    assert table["logit_diff"].tolist() == pytest.approx(METRIC(after).tolist(), abs=1e-4)
    was, now = (
        hk.forward(llama_ids, NEUTRAL[:1], cut, *more).logits[0, :-1].log_softmax(-1)
        for more in ((), (one.steer(dose=0.5),))
    )
    alone = hk.dose_response(
        llama_ids,
        MORE,
        one,
        METRIC,
        doses=[0.5],
        samples=0,
        neutral=NEUTRAL[:1],
        base_hooks=cut,
        pos=-1,
        progress=False,
    )
    assert alone["damage_kl"][0] == pytest.approx(
        float((was.exp() * (was - now)).sum(-1).mean()), rel=1e-3
    )


def test_vectors_of_several_layers_and_with_names_of_their_own(llama_ids):
    layers = hk.mean_difference(llama_ids, MORE, LESS, "resid_post")
    table = hk.dose_response(
        llama_ids, MORE, layers, METRIC, doses=[0.1], samples=1, progress=False
    )
    assert table[["layer", "site"]].drop_duplicates().values.tolist() == [
        [n, f"resid_post.{n}"] for n in range(3)
    ]
    assert set(table["vector"]) == {"mean difference"} and "damage_kl" not in table.columns
    named = {"read": layers, "mine": vector(llama_ids)}
    table = hk.dose_response(llama_ids, MORE, named, METRIC, doses=[0.1], samples=0, progress=False)
    assert table[["vector", "site"]].drop_duplicates().values.tolist() == [
        *(["read", f"resid_post.{n}"] for n in range(3)),
        ["mine", SITE],
    ]
    last = hk.mean_difference(llama_ids, MORE, LESS, "final_norm")
    assert (
        "layer"
        not in hk.dose_response(
            llama_ids, MORE, last, METRIC, doses=[1], samples=0, progress=False
        ).columns
    )


@pytest.mark.parametrize("pos", [None, slice(1, None), -1])
def test_a_plain_tensor_is_dosed_by_the_length_of_the_stream_where_it_is_added(small, pos):
    tensor = vector(small).tensor
    index = slice(None) if pos is None else [pos] if isinstance(pos, int) else pos
    lengths = torch.cat([values(small, ids)[index].norm(dim=-1) for ids in MORE])
    unit = float(lengths.sort().values[(len(lengths) - 1) // 2])  # the median length
    settings = {"doses": [-0.3, 0.5], "samples": 1, "pos": pos, "progress": False}
    with untouched(small):
        table = hk.dose_response(small, MORE, tensor, METRIC, site=SITE, **settings)
    assert set(table["site"]) == {SITE} and set(table["layer"]) == {1}
    for cell in table[~table["control"]].itertuples():
        assert cell.length == pytest.approx(abs(cell.dose) * unit, rel=1e-5)
        add = torch.zeros(len(MORE[cell.row]), 32)
        add[index] = tensor / tensor.norm() * cell.dose * unit
        logits = said(small, MORE[cell.row], add)[-1]
        assert cell.logit_diff == pytest.approx(float(logits[5] - logits[7]), abs=1e-4)
    by_hand_vector = hk.Vector(SITE, tensor, unit)
    same = hk.dose_response(small, MORE, by_hand_vector, METRIC, **settings)
    pd.testing.assert_frame_equal(table, same, atol=1e-5)
    named = {"one": tensor, "more": [2 * tensor, -tensor][:1]}
    table = hk.dose_response(small, MORE, named, METRIC, site=hk.Site("resid_post", 1), **settings)
    assert list(dict.fromkeys(table["vector"])) == ["one", "more"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"vectors": torch.ones(32)}, BadHook, "no steering vector.*site='resid_post.12'"),
        ({"site": SITE}, BadHook, "a Vector was given: leave site= out"),
        ({"vectors": [1.0] * 32, "site": SITE}, BadHook, "plain tensors"),
        ({"vectors": torch.ones(31), "site": SITE}, BadHook, r"\[31\].*give a tensor \[32\]"),
        ({"vectors": torch.ones(2, 32), "site": SITE}, BadHook, r"give a tensor \[32\]"),
        ({"vectors": torch.ones(32), "site": "resid_post"}, BadHook, "3 sites.*resid_post.0"),
        ({"vectors": [torch.ones(32)] * 2, "site": SITE}, BadHook, "give them names"),
        ({"vectors": []}, BadHook, "no vector"),
        ({"vectors": [hk.Vector(SITE, torch.ones(32), 1.0)] * 2}, BadHook, "give them names"),
        ({"samples": -1}, BadHook, "samples=-1"),
        ({"doses": []}, EmptySelection, "doses|dose"),
        ({"doses": ["much"]}, BadHook, "a dose='much'"),
        ({"neutral": [[5]]}, BadPrompt, "neutral text 0 has one token"),
        ({"vectors": hk.Vector("resid_post.7", torch.ones(32), 1.0)}, OutOfRange, "7"),
        ({"dosis": [1]}, UnknownKeyword, "doses"),
    ],
)
def test_a_dose_response_says_what_is_wrong(llama_ids, given, error, words):
    settings = {"vectors": vector(llama_ids), "progress": False, **given}
    with pytest.raises(error, match=words):
        hk.dose_response(llama_ids, MORE, settings.pop("vectors"), METRIC, **settings)


# ---- comparing


def made_up() -> pd.DataFrame:
    """Two prompts; a vector that moves by 10 and 20 times the dose, random ones by 2 and by 4; damage as the square."""
    rows = []
    for name, control, sample, slope in (
        ("v", False, 0, 10),
        ("v", True, 0, 2),
        ("v", True, 1, 4),
        ("w", False, 0, 1),
    ):
        for dose in (-0.2, 0.1, 0.2, 0.4):
            for row in (0, 1):
                delta = slope * dose * (row + 1)
                cost = dose**2 * (0.5 if control else 1)
                rows.append(
                    [
                        name,
                        "resid_post.1",
                        1,
                        dose,
                        dose,
                        control,
                        sample,
                        row,
                        row,
                        delta + 1,
                        1.0,
                        delta,
                        cost,
                    ]
                )
    names = ["vector", "site", "layer", "dose", "length", "control", "sample", "row", "prompt"]
    names += ["m", "m_before", "m_delta", "damage_kl"]
    return pd.DataFrame(rows, columns=names)


def test_vectors_are_compared_where_they_damage_equally_much():
    found = hk.stats.effect_at_damage(made_up(), 0.025)
    doses = found.groupby(["vector", "control", "sample"], sort=False)["dose_there"].first()
    there = {
        ("v", False): 0.1 + 0.1 * (0.025 - 0.01) / 0.03,
        ("v", True): 0.2 + 0.2 * (0.025 - 0.02) / 0.06,
    }
    assert (
        doses["v", False, 0] == pytest.approx(there["v", False])
        and doses["w", False, 0] == doses["v", False, 0]
    )
    assert doses["v", True, 0] == doses["v", True, 1] == pytest.approx(there["v", True])
    for row in (0, 1):
        own = found[found["row"] == row].set_index(["vector", "control", "sample"])
        random = 3 * there["v", True] * (row + 1)
        assert own.loc[("v", False, 0), "m_delta"] == pytest.approx(
            10 * there["v", False] * (row + 1)
        )
        assert own.loc[("v", False, 0), "m"] == pytest.approx(
            1 + own.loc[("v", False, 0), "m_delta"]
        )
        assert own.loc[("v", False, 0), "m_gain"] == pytest.approx(
            own.loc[("v", False, 0), "m_delta"] - random
        )
        assert own.loc[("w", False, 0), "m_gain"] == pytest.approx(
            there["v", False] * (row + 1) - random
        )
    means = hk.stats.mean_over_prompts(found, by=["vector", "control"])
    assert means["n"].tolist() == [2, 2, 2]
    little = hk.stats.effect_at_damage(
        made_up(), 0.005
    )  # before the first dose: from nothing at all
    assert little["dose_there"].iloc[0] == pytest.approx(0.05) and little["m_delta"].iloc[
        0
    ] == pytest.approx(0.5)
    assert hk.stats.effect_at_damage(made_up(), 0.01, toward=-1)["m_delta"].iloc[
        0
    ] == pytest.approx(-0.5)


def test_tables_may_be_put_together():
    table = made_up()
    both = pd.concat([table[table["vector"] == name].reset_index(drop=True) for name in ("v", "w")])
    pd.testing.assert_frame_equal(
        hk.stats.effect_at_damage(both, 0.025), hk.stats.effect_at_damage(table, 0.025)
    )
    pd.testing.assert_frame_equal(hk.stats.mean_over_doses(both), hk.stats.mean_over_doses(table))
    assert len(hk.figures.damage_curves(both).axes[0].get_lines()) == len(
        hk.figures.damage_curves(table).axes[0].get_lines()
    )


def test_without_random_vectors_there_is_no_gain():
    table = made_up()
    alone = hk.stats.effect_at_damage(table[~table["control"]], 0.01)
    assert np.isnan(alone["m_gain"]).all() and set(alone["random_vectors"]) == {0}


def test_means_over_doses_take_random_vectors_together():
    means = hk.stats.mean_over_doses(made_up())
    cell = means[(means["vector"] == "v") & means["control"] & (means["dose"] == 0.2)].iloc[0]
    assert cell["n"] == 2 and cell["samples"] == 2 and cell["damage_kl"] == pytest.approx(0.02)
    assert cell["m_delta"] == pytest.approx(0.9) and cell["interval"].startswith("t, two-way")
    assert len(means) == 3 * 4
    deltas = np.array(
        [[0.4, 0.8], [0.8, 1.6]]
    )  # a row for each prompt, a column for each random vector
    squares = {"prompts": 2 * deltas.mean(1).var(ddof=1), "vectors": 2 * deltas.mean(0).var(ddof=1)}
    squares["rest"] = float(
        ((deltas - deltas.mean(0) - deltas.mean(1)[:, None] + deltas.mean()) ** 2).sum()
    )
    variance = (squares["prompts"] + squares["vectors"] - squares["rest"]) / 4
    degrees = variance**2 / sum(
        (each / 4) ** 2 for each in squares.values()
    )  # each has one degree of freedom
    half = scipy.stats.t.ppf(0.975, degrees) * variance**0.5
    assert cell["m_delta_low"] == pytest.approx(0.9 - half) and cell[
        "m_delta_high"
    ] == pytest.approx(0.9 + half)


def null_experiment(
    draws: np.random.Generator,
    prompts: int,
    vectors: int,
    between: float = 0.42,
    within: float = 0.12,
):
    """A vector that is one more random one, at one dose: their effects differ, and a little from prompt to prompt."""
    rows = []
    for control, sample in [(False, 0), *((True, number) for number in range(vectors))]:
        deltas = draws.normal(0, between) + draws.normal(0, within, prompts)
        for row, delta in enumerate(deltas):
            rows.append(["v", SITE, 0.2, control, sample, row, row, delta, 0.0, delta, 0.1])
    names = [
        "vector",
        "site",
        "dose",
        "control",
        "sample",
        "row",
        "prompt",
        "m",
        "m_before",
        "m_delta",
        "damage_kl",
    ]
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize(("prompts", "vectors"), [(5, 3), (16, 8), (16, 20), (50, 8)])
def test_a_random_vector_is_called_an_effect_in_3_to_8_percent_of_experiments(prompts, vectors):
    draws, wrong, count = np.random.default_rng(prompts + vectors), 0, 1500
    for _ in range(count):
        own = draws.normal(0, 0.42, vectors + 1)[:, None] + draws.normal(
            0, 0.12, (vectors + 1, prompts)
        )
        gains = own[0] - own[1:].mean(axis=0)
        rest = intervals.variation(own[1:].T).residual ** 0.5
        spread = own[1:].mean(axis=1).std(ddof=1)
        _, half = intervals.beyond_random(gains, spread, rest, vectors, 0.95)
        wrong += abs(gains.mean()) > half
    assert 0.03 <= wrong / count <= 0.08


def test_a_gain_has_an_interval_over_prompts_and_random_vectors():
    table = hk.stats.effect_at_damage(null_experiment(np.random.default_rng(0), 16, 8), 0.1)
    deltas = table[table["control"]].pivot_table(index="sample", columns="row", values="m_delta")
    spread = deltas.mean(axis=1).std() * (1 + 1 / 8) ** 0.5
    assert set(table["random_vectors"]) == {8}
    for some in (table, table[~table["control"]]):  # also where the random ones were left out
        cell = (
            hk.stats.mean_over_prompts(some, by=["vector", "control"]).query("not control").iloc[0]
        )
        own = table.query("not control")["m_delta"].mean()
        assert cell["m_gain"] == pytest.approx(own - deltas.to_numpy().mean())
        assert cell["m_gain_se"] == pytest.approx(spread) and cell["interval"] == "t; t, two-way"
        assert cell["m_gain_high"] - cell["m_gain"] == pytest.approx(
            scipy.stats.t.ppf(0.975, 7) * spread
        )
    random = hk.stats.mean_over_prompts(table, by=["vector", "control"]).query("control").iloc[0]
    assert random["m_gain"] == pytest.approx(0) and random["m_gain_low"] == pytest.approx(
        -random["m_gain_high"]
    )
    assert random["m_gain_se"] == pytest.approx(spread)  # where one more random vector would lie


def test_a_gain_that_differs_from_prompt_to_prompt_has_that_in_its_interval():
    table = null_experiment(np.random.default_rng(0), 16, 8)
    own = ~table["control"]
    table.loc[own, "m_delta"] += np.linspace(-20, 20, 16)
    table["m"] = table["m_delta"]
    cell = (
        hk.stats.mean_over_prompts(hk.stats.effect_at_damage(table, 0.1), by=["vector", "control"])
        .query("not control")
        .iloc[0]
    )
    assert cell["m_gain_se"] == pytest.approx(np.linspace(-20, 20, 16).std(ddof=1) / 4, rel=0.05)


def test_one_random_vector_is_no_control_and_the_same_ones_beside_two_vectors_count_once():
    draws = np.random.default_rng(1)
    one = hk.stats.mean_over_prompts(
        hk.stats.effect_at_damage(null_experiment(draws, 5, 1), 0.1), by=["vector", "control"]
    )
    assert one["m_gain_low"].isna().all() and one["m_delta_low"].notna().all()
    table = null_experiment(draws, 5, 4)
    both = hk.stats.effect_at_damage(pd.concat([table, table.assign(vector="w")]), 0.1)
    alone = hk.stats.effect_at_damage(table, 0.1)
    for name in ("random_vectors", "m_random_sd", "m_random_rest"):
        assert both[name].iloc[0] == pytest.approx(alone[name].iloc[0])
    sites = pd.concat([table, table.assign(site="resid_post.2")])
    with pytest.raises(BadHook, match="name 'site' in by="):
        hk.stats.mean_over_prompts(hk.stats.effect_at_damage(sites, 0.1), by=["vector", "control"])


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (
            lambda table: hk.stats.effect_at_damage(table, 1.0),
            OutOfRange,
            "reaches 0.16.*dose further",
        ),
        (
            lambda table: hk.stats.effect_at_damage(table, 0.1, toward=-1),
            OutOfRange,
            "'v' at resid_post.1 reaches 0.04",
        ),
        (
            lambda table: hk.stats.effect_at_damage(table[table["dose"] > 0], 0.1, toward=-1),
            EmptySelection,
            "no negative dose",
        ),
        (lambda table: hk.stats.effect_at_damage(table, 0), BadHook, "damage=0"),
        (
            lambda table: hk.stats.effect_at_damage(table.drop(columns="damage_kl"), 0.1),
            BadHook,
            "neutral=",
        ),
        (
            lambda table: hk.stats.effect_at_damage(table, 0.1, by="damage_lk"),
            BadHook,
            "did you mean 'damage_kl'",
        ),
        (
            lambda table: hk.stats.mean_over_doses(table.drop(columns="vector")),
            BadHook,
            "what dose_response gave",
        ),
        (lambda table: hk.figures.damage_curves(table, by="perplexity"), BadHook, "perplexity"),
        (lambda table: hk.figures.damage_curves(table, value="n_delta"), BadHook, "n_delta"),
    ],
)
def test_comparing_says_what_is_wrong(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong(made_up())


def test_the_figure_has_a_line_for_each_vector_and_one_for_each_random_one(tmp_path):
    figure = hk.figures.damage_curves(made_up(), title="What it costs")
    figure.savefig(tmp_path / "damage.png")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "random vectors of equal length",
        "v",
        "w",
    ]
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert [pytest.approx(point) for point in drawn[0]] == [[0.02, -0.6]]  # sample 0, downwards
    assert any(len(line) == 3 and line[0] == pytest.approx([0.01, 1.5]) for line in drawn)
    assert not axes.collections and [0.01, 1.0] in [
        pytest.approx(point) for line in drawn for point in line
    ]
    many = pd.concat([made_up().assign(row=row, prompt=row) for row in range(5)])
    many = pd.concat([many, many.assign(row=many["row"] + 5, prompt=many["row"] + 5)])
    (axes,) = hk.figures.damage_curves(many[many["vector"] == "v"]).axes
    assert len(axes.collections) == 2  # from 10 prompts on a band on either side of no dose


# ---- a direction out of every layer


def test_a_direction_projected_out_of_every_layer_is_nowhere(small):
    way = vector(small).unit()
    everywhere = hk.project_out(small.sites(["resid_pre", "resid_mid", "resid_post"]), way.tensor)
    run = hk.forward(small, MORE, everywhere, hk.capture(["resid_pre", "resid_mid", "resid_post"]))
    for site in run.sites:
        assert float((run[site] @ way.tensor).abs().max()) < 1e-4 * float(
            run[site].norm(dim=-1).max()
        ), site
    ends = hk.forward(
        small, MORE, hk.project_out(small.sites(["resid_pre", "resid_post"]), way.tensor)
    )
    for row, ids in enumerate(MORE):
        with ExitStack() as stack:
            for layer in range(3):
                for site in ("resid_pre", "resid_post"):
                    module, side, _ = by_hand.module_of(small.model, site, layer)
                    handle = by_hand.with_hook(
                        module, side, lambda x: x - (x @ way.tensor)[..., None] * way.tensor
                    )
                    stack.callback(handle.remove)
            wanted = by_hand.logits(small.model, ids)[0]
        assert torch.allclose(ends.logits[row, : len(ids)], wanted, atol=1e-4)
