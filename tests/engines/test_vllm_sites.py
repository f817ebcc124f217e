"""Every site inside vLLM is read and written where transformers has it."""

import pytest
import torch
from served_models import PROMPTS, compare, difference, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

KINDS = [
    "embed",
    "resid_pre",
    "attn_in",
    "q",
    "k",
    "v",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_pre",
    "mlp_post",
    "mlp_out",
    "resid_post",
    "final_norm",
    "logits",
]
TOLERANCES = {"served": 1e-5, "narrow": 1e-5, "own_code": 2e-5}


def site_of(kind: str) -> str:
    return kind if kind in ("embed", "final_norm", "logits") else f"{kind}.1"


@pytest.mark.parametrize("engine", TOLERANCES)
def test_every_site_is_read(engine, reference, request):
    lm = request.getfixturevalue(engine)
    sites = [site for site in reference.sites() if site.name in KINDS]
    assert [str(site) for site in lm.sites()] == [str(site) for site in sites]
    run, expected = compare(lm, reference, PROMPTS, hk.capture(sites))
    for site in sites:
        assert difference(run[site], expected[site]) <= TOLERANCES[engine], site


@pytest.mark.parametrize("engine", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_written(kind, engine, reference, request):
    lm = request.getfixturevalue(engine)
    site = site_of(kind)
    after = hk.capture(["z.2", "final_norm"])
    reverse = hk.edit(site, lambda values: values.flip(-1))
    changed, _ = compare(lm, reference, PROMPTS, after, reverse)
    plain = hk.generate(lm, PROMPTS, after, max_new_tokens=1)
    assert difference(changed.logits[:, :1], plain.logits) > 1e-2


@pytest.mark.parametrize("engine", TOLERANCES)
def test_a_capture_before_and_after_an_edit(engine, reference, request):
    lm = request.getfixturevalue(engine)
    for site in ("resid_mid.1", "q.1", "mlp_post.1", "logits"):
        hooks = [
            hk.capture(site, name="before"),
            hk.scale(site, 0.5),
            hk.capture(site, name="after"),
        ]
        run, _ = compare(lm, reference, PROMPTS, *hooks)
        assert torch.equal(run[site, "before"] * 0.5, run[site, "after"])


@pytest.mark.parametrize("engine", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {"pos": -1},
        {"pos": hk.GENERATED},
        {"pos": [0, 2]},
        {"pos": slice(1, None), "rows": [0, 2]},
        {"pos": hk.at(" Mary"), "rows": 2},
    ],
    ids=["last", "generated", "list", "slice", "phrase"],
)
def test_the_selected_positions_are_captured(options, engine, reference, request):
    lm = request.getfixturevalue(engine)
    prompts = ["Tea and", *PROMPTS[1:], "The quick brown fox"]
    if options.get("pos") == [0, 2]:
        prompts = [prompt for prompt in prompts if prompt != "Tea"]
    hook = hk.capture(["resid_post.1", "z.0.2"], **options)
    compare(lm, reference, prompts, hook)


def test_a_module_is_a_site_where_vllm_has_it(served, reference):
    run, expected = compare(
        served, reference, PROMPTS, hk.capture(hk.module("model.layers.1.mlp.down_proj"))
    )
    assert run.sites == expected.sites


def test_the_logits_and_captures_of_some_steps(served, reference):
    run, expected = compare(served, reference, PROMPTS, hk.capture("logits", step=[1, 3]))
    assert torch.equal(run.captured("logits").positions, expected.captured("logits").positions)
    last = hk.generate(served, PROMPTS, logits="last", max_new_tokens=4)
    known = hk.generate(reference, PROMPTS, logits="last", max_new_tokens=4)
    assert difference(last.logits, known.logits) < 1e-3
    assert hk.generate(served, "Tea", logits=False, max_new_tokens=2).text


def test_tables_of_a_run_are_those_of_transformers(served, reference):
    hooks = [hk.force(" coffee", step=1)]
    run, expected = compare(served, reference, PROMPTS, *hooks)
    for table in (hk.ranks, hk.uncertainty, hk.surprisal):
        ours, theirs = table(run), table(expected)
        assert list(ours.columns) == list(theirs.columns) and len(ours) == len(theirs)
        assert (
            ours.select_dtypes("number") - theirs.select_dtypes("number")
        ).abs().max().max() < 1e-2
    assert list(run.log.columns) == list(expected.log.columns)
    assert run.log["hook"].tolist() == expected.log["hook"].tolist()


@pytest.mark.parametrize("site", ["scores.1", "pattern.0", "q_rot.0", "k_rot.2", "lm_head"])
def test_a_site_that_the_engine_lacks_is_refused_with_the_reason(site, served):
    with pytest.raises(hk.errors.HookkitError, match="kernel|head as a module"):
        hk.generate(served, "Tea", hk.capture(site), max_new_tokens=1)


def test_a_module_that_the_engine_lacks_is_refused(served):
    site = hk.module("model.layers.1.self_attn.q_proj")
    with pytest.raises(hk.errors.HookkitError, match="q_proj"):
        hk.generate(served, "Tea", hk.capture(site), max_new_tokens=1)


def test_unknown_sites_positions_and_heads_raise_before_anything_is_sent(served, monkeypatch):
    def call(name: str, value: object) -> None:
        raise AssertionError(f"{name} was sent")

    hk.generate(served, "Tea", max_new_tokens=1)
    monkeypatch.setattr(served.engine, "call", call)
    for make_hook, error in [
        (lambda: hk.capture("resid_pots.1"), hk.errors.UnknownSite),
        (lambda: hk.capture("resid_post.7"), hk.errors.OutOfRange),
        (lambda: hk.capture("z.1.9"), hk.errors.OutOfRange),
        (lambda: hk.capture("scores.1"), hk.errors.MissingSite),
        (lambda: hk.steer("resid_post.1", torch.ones(3)), hk.errors.BadHook),
        (lambda: hk.force("zebra"), hk.errors.NotOneToken),
    ]:
        with pytest.raises(error):
            hk.generate(served, PROMPTS, make_hook(), max_new_tokens=4)


@pytest.mark.parametrize(
    "hook",
    [
        hk.capture("resid_post.1", pos=99),
        hk.capture("resid_post.1", rows=4),
        hk.force(" coffee", step=9),
        hk.capture("resid_post.1", pos=hk.at("zebra")),
    ],
    ids=str,
)
def test_positions_rows_and_steps_that_do_not_exist_raise_what_they_raise_in_transformers(
    hook, served, reference
):
    errors = []
    for lm in (reference, served):
        with pytest.raises(hk.errors.HookkitError) as caught:
            hk.generate(lm, PROMPTS, hook, max_new_tokens=4)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
