"""Features of a dictionary inside vLLM: captured and edited as in transformers."""

import pytest
import torch
from served_models import PROMPTS, difference, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

D_MODEL, N_FEATURES = 128, 256
FEATURES = "feat.resid_post.1"
CLAMPED = torch.full((N_FEATURES,), 3.0)
HOOKS = {
    "all features": [hk.capture(FEATURES)],
    "sparse": [hk.capture(FEATURES, sparse=True)],
    "one feature": [hk.capture(f"{FEATURES}.7", pos=0)],
    "a feature scaled": [hk.scale(f"{FEATURES}.7", 5.0), hk.capture([FEATURES, "resid_post.1"])],
    "features clamped": [hk.ablate(FEATURES, units=[1, 2, 3], to=CLAMPED), hk.capture("z.2")],
}


def dictionary(site: hk.Site) -> hk.types.Dictionary:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_FEATURES, D_MODEL, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    weights = {
        "W_enc": directions.T.contiguous(),
        "b_enc": torch.full((N_FEATURES,), -0.1),
        "W_dec": directions,
        "b_dec": torch.zeros(D_MODEL),
    }
    return hk.types.Dictionary(site, site, weights, "relu")


def transcoder() -> hk.types.Dictionary:
    plain = dictionary(hk.Site("mlp_out", 1))
    return hk.types.Dictionary(hk.Site("mlp_out", 1), hk.Site("mlp_in", 1), plain.weights, "relu")


@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_features_in_the_engine_are_those_in_transformers(name, verb, engine, reference, request):
    item = dictionary(hk.Site("resid_post", 1))
    lm = request.getfixturevalue(engine).with_dictionaries(item, check=False)
    plain = reference.with_dictionaries(item, check=False)
    _compare(lm, plain, verb, HOOKS[name])


def test_a_transcoder_reads_one_site_and_writes_another(served, reference):
    lm = served.with_dictionaries(transcoder(), check=False)
    plain = reference.with_dictionaries(transcoder(), check=False)
    hooks = [hk.scale("feat.mlp_out.1.3", 4.0), hk.capture(["feat.mlp_out.1", "resid_post.1"])]
    _compare(lm, plain, "generate", hooks)


def _compare(lm: hk.LM, plain: hk.LM, verb: str, hooks: list[hk.types.Hook]) -> None:
    settings = {"forward": {"logits": "last"}, "generate": {"max_new_tokens": 4}}[verb]
    run = getattr(hk, verb)(lm, PROMPTS, *hooks, **settings)
    expected = getattr(hk, verb)(plain, PROMPTS, *hooks, **settings)
    assert torch.equal(run.tokens, expected.tokens)
    assert difference(run.logits, expected.logits) <= 1e-4
    for site in expected.sites:
        assert run[site].is_sparse == expected[site].is_sparse
        assert difference(run[site].to_dense(), expected[site].to_dense()) <= 3e-5, site


def test_runs_without_the_dictionary_are_as_before(served, reference):
    lm = served.with_dictionaries(dictionary(hk.Site("resid_post", 1)), check=False)
    hk.forward(lm, PROMPTS, hk.capture(FEATURES), logits=False)
    run = hk.forward(served, PROMPTS, hk.capture("z.1"), logits=False)
    expected = hk.forward(reference, PROMPTS, hk.capture("z.1"), logits=False)
    assert difference(run["z.1"], expected["z.1"]) <= 1e-5
    with pytest.raises(hk.errors.MissingSite, match="no dictionary"):
        hk.forward(served, PROMPTS, hk.capture(FEATURES), logits=False)


def test_a_dictionary_is_checked_by_a_forward_of_the_engine(served):
    with pytest.raises(hk.errors.OtherModel, match=r"12\d\.\d features .* are active"):
        served.with_dictionaries(dictionary(hk.Site("resid_post", 1)))


def test_the_loss_of_a_replacement_is_refused(served):
    item = dictionary(hk.Site("resid_post", 1))
    with pytest.raises(hk.errors.Unsupported, match="replace=True"):
        served.with_dictionaries(item, replace=True, check=False)


def test_features_are_harvested(served, reference, tmp_path):
    harvests = []
    for number, lm in enumerate((served, reference)):
        with_features = lm.with_dictionaries(dictionary(hk.Site("resid_post", 1)), check=False)
        folder = tmp_path / str(number)
        harvests.append(hk.harvest(with_features, PROMPTS, FEATURES, folder, progress=False))
    values, expected = (made[FEATURES][:].to_dense() for made in harvests)
    assert difference(values, expected) <= 3e-5
