"""Every verb inside vLLM: the tokens and logits are those of hookkit on transformers.

Prompts have different lengths, so that the rows of a step are at different positions.
"""

import pytest
import torch
from served_models import PROMPTS, compare, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

D_MODEL = 128
LAYER = "resid_post.1"


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (D_MODEL,), generator=torch.Generator().manual_seed(seed))


def captured_run(lm: hk.LM) -> hk.types.Run:
    return hk.forward(lm, PROMPTS[::-1], hk.capture("resid_post.1", pos=-1))


def probe() -> hk.types.Probe:
    return hk.types.Probe("resid_post.0", vector(3), bias=0.0, norm=30.0)


def by_context(values: torch.Tensor, here: hk.types.EditContext) -> torch.Tensor:
    """A function of the user's that needs positions and rows."""
    factors = 1 + 0.1 * (here.positions % 5) + 0.1 * torch.tensor(here.rows)[:, None]
    return values * factors[..., None]


VERBS = {
    "steer": [hk.steer(LAYER, vector(0), scale=4.0)],
    "steer at the last token": [hk.steer(LAYER, vector(0), scale=8.0, pos=-1)],
    "steer at generated tokens": [hk.steer(LAYER, vector(0), scale=8.0, pos=hk.GENERATED)],
    "steer two rows": [hk.steer(LAYER, vector(0), scale=8.0, rows=[0, 2])],
    "steer a phrase": [hk.steer(LAYER, vector(0), scale=8.0, pos=hk.at(" the store"), rows=2)],
    "ablate": [hk.ablate(["attn_out.1", "mlp_out.2"])],
    "ablate a head to the mean of prompts": [hk.ablate("z.1.2", to="mean", over=PROMPTS[:3], per="all")],
    "ablate to another prompt": [hk.ablate("mlp_out.1", to="resample", over=PROMPTS, per="all", seed=1)],
    "ablate neurons": [hk.ablate("mlp_post.1", units=[3, 5, 7], pos=-1)],
    "patch from a prompt": [hk.patch("resid_post.1", "Tea and milk", pos=-1)],
    "patch from a run": [captured_run],
    "scale": [hk.scale("attn_out.0", 0.3, pos=hk.PROMPT)],
    "project out": [hk.project_out(["resid_post.0", "resid_mid.1"], vector(1, 2, D_MODEL))],
    "skip a block": [hk.skip_block([1])],
    "edit with a function of the context": [hk.edit("resid_pre.2", by_context)],
    "edit with a lambda": [hk.edit("mlp_post.0", lambda values: values.flip(-1), pos=slice(1, 4), rows=[0, 2, 3])],
    "force": [hk.force(" coffee")],
    "force at steps": [hk.force(" milk", step=[1, 3]), hk.force(" the", step=2, rows=[1, 3])],
    "force a margin": [hk.force(" coffee", margin=0.5)],
    "force a text": [hk.force(hk.word(" the city of", exact=True), step=1)],
    "ban": [hk.ban(" the", " and", "e")],
    "ban a word": [hk.ban(hk.word("milk")), hk.boost(" milk", by=30.0)],
    "boost": [hk.boost(" coffee", " milk", by=20.0, step=range(1, 8))],
    "restrict": [hk.restrict(" milk", " the", " and", "e")],
    "cap": [hk.cap(" the", " and", prob=0.01), hk.cap("e", logit=0.0)],
    "swap": [hk.swap(" milk", "e")],
    "set_rank": [hk.set_rank(" milk", 1, step=[0, 2])],
    "two edits at one site": [hk.steer(LAYER, vector(0)), hk.scale(LAYER, 0.5)],
}  # fmt: skip

CONDITIONS = {
    "text": hk.when.text_ends("e") | hk.when.contains(" Mary"),
    "logits": hk.when.entropy_above(1.0),
    "rank of a token": hk.when.rank_of(" milk", at_least=100),
    "state in the same forward": hk.when.reads(probe(), above=0.5),
    "state of the prompt": hk.when.reads(probe(), above=0.5, pos=hk.PROMPT),
    "cosine at the site": hk.when.cosine(vector(4), above=0.0),
    "norm at a later site": hk.when.norm_above(30.0, site="resid_post.2"),
    "not": ~hk.when.norm_above(30.0, site="resid_pre.0", pos=-1),
}


def hooks_of(name: str, reference: hk.LM) -> list[hk.types.Hook]:
    hooks = VERBS[name]
    if hooks == [captured_run]:
        hooks = [hk.patch("resid_post.1", captured_run(reference))]
    return hooks


@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_in_the_engine_is_the_verb_in_transformers(verb, engine, reference, request):
    lm = request.getfixturevalue(engine)
    run, _ = compare(lm, reference, PROMPTS, *hooks_of(verb, reference))
    plain = hk.generate(reference, PROMPTS, max_new_tokens=8)
    assert not torch.equal(run.logits[:, : plain.logits.shape[1]], plain.logits)


@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_in_the_engine_is_the_condition_in_transformers(
    condition, engine, reference, request
):
    lm = request.getfixturevalue(engine)
    when, options = CONDITIONS[condition], {}
    if condition in ("logits", "rank of a token"):
        compare(lm, reference, PROMPTS, hk.ban("e", " milk", when=when))
    if condition != "cosine at the site":
        compare(lm, reference, PROMPTS, hk.force(" coffee", when=when))
    if engine == "narrow" and condition in ("state of the prompt", "not"):
        with pytest.raises(hk.errors.Unsupported, match="the prompt is read in chunks"):
            hk.generate(lm, PROMPTS, hk.steer(LAYER, vector(0), when=when), max_new_tokens=8)
        options = {"pos": slice(-1, None)}
    hook = hk.steer(LAYER, vector(0), scale=8.0, when=when, **options)
    compare(lm, reference, PROMPTS, hook)


@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
def test_each_row_has_hooks_of_its_own(engine, reference, request):
    lm = request.getfixturevalue(engine)
    hooks = [
        hk.steer(LAYER, vector(0), scale=8.0, rows=0),
        hk.ablate("z.1.2", rows=1),
        hk.force(" coffee", step=2, rows=2),
        hk.edit("mlp_out.1", by_context, rows=3),
    ]
    together, _ = compare(lm, reference, PROMPTS, *hooks)
    alone = [hk.steer(LAYER, vector(0), scale=8.0), hk.ablate("z.1.2")]
    alone += [hk.force(" coffee", step=2), hk.edit("mlp_out.1", lambda values: values * 1.0)]
    for row, hook in enumerate(alone[:3]):
        single = hk.generate(lm, PROMPTS[row], hook, max_new_tokens=8)
        assert single.generated == [together.generated[row]]
