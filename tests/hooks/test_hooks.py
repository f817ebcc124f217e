"""Hooks as values: what each does by a closed form, how it prints, what it equals, and what JSON keeps of it."""

import functools
import json
import math

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, EmptySelection, NotCaptured, OutOfRange, UnknownKeyword

VECTOR = torch.linspace(-1, 1, 32)
SITE = "resid_post.1"


def values(lm, *hooks, prompts=PROMPTS, site=SITE):
    """What is at a site before and after these hooks."""
    run = hk.forward(
        lm, prompts, hk.capture(site, name="before"), *hooks, hk.capture(site, name="after")
    )
    return run[site, "before"], run[site, "after"]


def as_a_function(x, *_):
    return x * 2


EXAMPLES = {
    "capture(resid_post.1, pos=-1)": hk.capture(SITE, pos=-1),
    "capture(z.0, z.1.3, name='a', dtype='float16', rows=(0, 2))": hk.capture(
        ["z.0", "z.1.3"], name="a", dtype=torch.float16, rows=[0, 2]
    ),
    "capture(logits, step=1:)": hk.capture("logits", step=slice(1, None)),
    "edit(resid_post.1, as_a_function, pos=PROMPT)": hk.edit(SITE, as_a_function, pos=hk.PROMPT),
    "steer(resid_post.1, tensor[32], scale=2.0, pos=at('store'))": hk.steer(
        SITE, VECTOR, scale=2, pos=hk.at("store")
    ),
    "scale(z.1.3, 0.5)": hk.scale("z.1.3", 0.5),
    "project_out(resid_post.1, tensor[32])": hk.project_out(SITE, VECTOR),
    "skip_block(resid_post.1, resid_post.2)": hk.skip_block([1, 2]),
    "ablate(z.0)": hk.ablate("z.0"),
    "ablate(7 sites: z.0, z.1, z.2, …, z.5, z.6)": hk.ablate([f"z.{n}" for n in range(7)]),
    "ablate(resid_post.1, to=tensor[32])": hk.ablate(SITE, to=VECTOR),
    "ablate(resid_post.1, to='mean', over=2 prompts, per='all')": hk.ablate(
        SITE, to="mean", over=["a", [1, 2]], per="all"
    ),
    "force(' coffee')": hk.force(" coffee"),
    "force(' coffee', margin=2.0, rows=1, step=0)": hk.force(" coffee", margin=2, step=0, rows=1),
    "force(3, margin=inf)": hk.force(3, margin=math.inf),
    "force(lm_head, 3, pos=2)": hk.force(3, site="lm_head", pos=2),
    "ban(' coffee', 7)": hk.ban(" coffee", 7),
    "boost(1, 2, by=1.5)": hk.boost([1, 2], by=1.5),
    "swap(1, 2)": hk.swap(1, 2),
    "set_rank(' tea', 3)": hk.set_rank(" tea", 3),
    "capture(a.b:output)": hk.capture(hk.module("a.b")),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_hook_prints_as_the_call_that_makes_it(text):
    assert str(EXAMPLES[text]) == text


@pytest.mark.parametrize("text", [text for text in EXAMPLES if not text.startswith("edit")])
def test_a_hook_survives_json(text):
    hook = EXAMPLES[text]
    written = hook.to_json()
    json.loads(written)
    assert hk.types.Hook.from_json(written) == hook
    assert hash(hk.types.Hook.from_json(written)) == hash(hook)
    assert hk.types.Hook.from_json(written).to_json() == written


def test_hooks_are_equal_when_everything_in_them_is_equal():
    assert hk.steer(SITE, VECTOR) == hk.steer(SITE, VECTOR.clone())
    assert hk.steer(SITE, VECTOR) != hk.steer(SITE, VECTOR + 1e-6)
    assert hk.steer(SITE, VECTOR) != hk.steer(SITE, VECTOR, pos=-1)
    assert hk.capture(SITE) != hk.capture(SITE, name="b")
    assert len({hk.force(1), hk.force(1), hk.force(2)}) == 2


def test_a_vector_that_changes_later_does_not_change_the_hook():
    vector = VECTOR.clone()
    hook = hk.steer(SITE, vector)
    vector.zero_()
    assert hook == hk.steer(SITE, VECTOR)


def test_a_patch_survives_json_with_its_values(llama):
    source = hk.forward(llama, PROMPTS[0], hk.capture(["resid_post.1", "z.2"]))
    hook = hk.patch(["resid_post.1", "z.2"], source)
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook
    expected = hk.forward(llama, PROMPTS[0], hk.ablate("mlp_out.0"), hook).logits
    assert torch.equal(
        hk.forward(llama, PROMPTS[0], hk.ablate("mlp_out.0"), again).logits, expected
    )


def test_json_holds_the_name_and_source_of_a_users_function_and_refuses_to_bring_it_back():
    written = json.loads(hk.edit(SITE, as_a_function).to_json())
    assert written["fn"]["$function"]["name"].endswith("as_a_function")
    assert "return x * 2" in written["fn"]["$function"]["source"]
    with pytest.raises(
        BadHook,
        match="has a user's function, .*as_a_function, of which JSON has the name and not the code",
    ):
        hk.types.Hook.from_json(json.dumps(written))


FACTOR = 3.0


def test_json_tells_two_functions_with_the_same_source_and_other_numbers_apart():
    def times(factor, tensor):
        return hk.edit(SITE, lambda values: values * factor + tensor)

    def default(values, by=2.0):
        return values * by * FACTOR

    assert times(1.0, VECTOR).to_json() == times(1.0, VECTOR.clone()).to_json()
    assert (
        len(
            {
                times(1.0, VECTOR).to_json(),
                times(2.0, VECTOR).to_json(),
                times(1.0, -VECTOR).to_json(),
            }
        )
        == 3
    )
    around = json.loads(hk.edit(SITE, default).to_json())["fn"]["$function"]["with"]
    assert around == {"default 0": "2.0", "FACTOR": "3.0"}
    partials = [
        hk.edit(SITE, functools.partial(as_a_function, factor)).to_json() for factor in (1, 2)
    ]
    assert partials[0] != partials[1] and "return x * 2" in partials[0]
    made = [
        eval(compile(f"lambda x: x * {n}", "<nowhere>", "eval")) for n in (2, 2, 3)
    ]  # no source to be read
    written = [hk.edit(SITE, fn).to_json() for fn in made]
    assert written[0] == written[1] != written[2]


def test_json_can_hold_digests_instead_of_tensors():
    written = hk.steer(SITE, VECTOR).to_json(tensors="digest")
    digest = json.loads(written)["vector"]["tensor"]["$tensor"]
    assert digest["shape"] == [32]
    assert len(digest["sha256"]) == 64
    with pytest.raises(BadHook, match="has the hash of its tensor and not the numbers"):
        hk.types.Hook.from_json(written)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "this is no hook in JSON: 'nonsense'"),
        ("[1]", "this is no hook in JSON"),
        (
            '{"hook": "stear"}',
            "there is no hook 'stear': there are ablate, away_from, ban, boost, cap",
        ),
        (
            '{"hook": "scale", "sites": {"$sites": ["z.0"]}, "where": {"$value": "There"}, "factor": 2}',
            "a hook holds no value of type 'There'",
        ),
        (
            '{"hook": "scale", "sites": {"$sites": ["z.0"]}}',
            "a scale has the fields factor, sites, when, where, and this has sites",
        ),
    ],
)
def test_json_that_is_no_hook_is_refused(text, words):
    with pytest.raises(BadHook, match=words):
        hk.types.Hook.from_json(text)


# ---- what they do


def test_steer_adds_scale_times_the_vector(lm):
    before, after = values(lm, hk.steer(SITE, VECTOR, scale=3.0))
    mask = hk.forward(lm, PROMPTS, hk.capture(SITE)).mask
    assert torch.equal(after[mask], (before + 3.0 * VECTOR)[mask])
    assert (after[~mask] == 0).all()


def test_a_vector_for_each_position_goes_to_the_positions_in_order(lm):
    vectors = torch.randn(2, 32)
    before, after = values(lm, hk.steer(SITE, vectors, pos=[0, -1]), prompts=PROMPTS[0])
    expected = before.clone()
    expected[0, 0] += vectors[0]
    expected[0, -1] += vectors[1]
    assert torch.equal(after, expected)
    each = torch.randn(3, 1, 32)
    before, after = values(lm, hk.steer(SITE, each, pos=0))
    assert torch.equal(after[:, 0], before[:, 0] + each[:, 0])


def test_scale_multiplies_one_head_and_leaves_the_others(lm):
    before, after = values(lm, hk.scale("z.1.2", 0.25), site="z.1")
    assert torch.equal(after[:, :, 2], before[:, :, 2] * 0.25)
    assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])


def test_projecting_out_leaves_nothing_along_the_direction(lm):
    before, after = values(lm, hk.project_out(SITE, 5 * VECTOR))
    unit = VECTOR / VECTOR.norm()
    assert torch.allclose(after, before - (before @ unit)[..., None] * unit, atol=1e-4)
    subspace = torch.randn(3, 32)
    _, after = values(lm, hk.project_out(SITE, subspace))
    assert float((after @ subspace.T).abs().max()) < 1e-4 * float(before.abs().max()) * 32


@pytest.mark.parametrize(
    "to", ["zero", VECTOR, torch.randn(1, 32)], ids=["zero", "vector", "position"]
)
def test_ablate_puts_in_what_it_says(lm, to):
    before, after = values(lm, hk.ablate(SITE, to=to, pos=-1), prompts=PROMPTS[0])
    expected = before.clone()
    expected[:, -1] = torch.zeros(32) if isinstance(to, str) else to
    assert torch.equal(after, expected)


REFERENCE = ["Tea and coffee", "The capital of France is Paris", "We love deep learning"]


@pytest.mark.parametrize("source", ["prompts", "run"])
def test_mean_ablation_takes_the_mean_of_the_reference(lm, source):
    rows = [hk.forward(lm, text, hk.capture(SITE))[SITE][0] for text in REFERENCE]
    over = REFERENCE if source == "prompts" else hk.forward(lm, REFERENCE, hk.capture(SITE))
    before, after = values(lm, hk.ablate(SITE, to="mean", over=over, per="all"))
    everything = torch.cat(rows).mean(0)
    mask = before.abs().sum(-1) > 0
    assert torch.allclose(after[mask], everything.expand_as(after[mask]), atol=1e-5)
    _, after = values(lm, hk.ablate(SITE, to="mean", over=over, pos=[0, 1]), prompts=PROMPTS[0])
    for place in (0, 1):
        assert torch.allclose(
            after[0, place], torch.stack([row[place] for row in rows]).mean(0), atol=1e-5
        )


def test_mean_ablation_by_position_refuses_a_position_that_the_reference_lacks(lm):
    with pytest.raises(
        BadHook,
        match=r"position \d+ of resid_post.1 is to be replaced, and no prompt of the reference is that long",
    ):
        hk.forward(lm, PROMPTS[2], hk.ablate(SITE, to="mean", over="Tea"))


def test_a_large_reference_runs_in_several_batches(lm):
    many = [f"{text} {n}" for n in range(7) for text in REFERENCE]
    rows = [hk.forward(lm, text, hk.capture(SITE))[SITE][0] for text in many]
    _, after = values(lm, hk.ablate(SITE, to="mean", over=many, per="all"), prompts=PROMPTS[0])
    assert torch.allclose(after[0, 0], torch.cat(rows).mean(0), atol=1e-4)


@pytest.mark.parametrize("per", ["position", "all"])
def test_resampling_takes_values_of_the_reference_the_same_alone_and_in_a_batch(lm, per):
    hook = hk.ablate(SITE, to="resample", over=PROMPTS[2:] + REFERENCE, per=per, seed=3)
    pool = [hk.forward(lm, text, hk.capture(SITE))[SITE][0] for text in PROMPTS[2:] + REFERENCE]
    _before, together = values(lm, hook)
    for row, prompt in enumerate(PROMPTS):
        _, alone = values(lm, hook, prompts=prompt)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        for place in range(alone.shape[1]):
            donors = torch.cat([text if per == "all" else text[place : place + 1] for text in pool])
            assert float((donors - alone[0, place]).abs().amax(1).min()) < 1e-5 * float(
                donors.abs().max()
            )
    other = hk.ablate(SITE, to="resample", over=PROMPTS[2:] + REFERENCE, per=per, seed=4)
    assert not torch.equal(values(lm, other)[1], together)


def test_patching_takes_the_same_place_of_the_other_text(smol):
    clean = "When Mary and John went to the store, John gave a drink to"
    other = "Yesterday, when John and Mary went to the big store, Mary gave a drink to"
    source = hk.forward(smol, other, hk.capture("resid_post.5"))
    length = source.lengths[0]
    for pos, place in (
        (-1, length - 1),
        (3, 3),
        (
            hk.at("store"),
            next(i for i in range(length) if smol.string(int(source.tokens[0, i])) == " store"),
        ),
    ):
        run = hk.forward(
            smol,
            clean,
            hk.patch("resid_post.5", source, pos=pos),
            hk.capture("resid_post.5", pos=pos),
        )
        assert torch.equal(run["resid_post.5"][0, 0], source["resid_post.5"][0, place])


def test_a_model_that_writes_into_what_a_patch_put_in_leaves_the_source_as_it_was(llama):
    source = hk.forward(llama, [[1, 2, 3]], hk.capture("resid_post.0"))
    before = source["resid_post.0"].clone()
    block = llama.submodule("model.layers.1")

    def write(module, args):
        args[0].zero_()

    handle = block.register_forward_pre_hook(write)
    try:
        with torch.no_grad():
            hk.forward(llama, [[4, 5, 6]], hk.patch("resid_post.0", source))
    finally:
        handle.remove()
    assert torch.equal(source["resid_post.0"], before)


def test_patching_takes_rows_by_number_or_the_only_one(lm):
    source = hk.forward(lm, PROMPTS, hk.capture(SITE, pos=-1))
    _, after = values(lm, hk.patch(SITE, source), prompts=[PROMPTS[0]] * 3)
    assert torch.equal(after[:, -1], source[SITE][:, 0])
    one = hk.forward(lm, PROMPTS[1], hk.capture(SITE, pos=-1))
    _, after = values(lm, hk.patch(SITE, one), prompts=[PROMPTS[0]] * 3)
    assert torch.equal(after[:, -1], one[SITE].expand(3, 1, 32)[:, 0])


def test_a_head_can_be_patched_from_a_run_that_captured_them_all(lm):
    source = hk.forward(lm, PROMPTS[0], hk.capture("z.1"))
    _before, after = values(
        lm, hk.ablate("attn_in.1"), hk.patch("z.1.2", source), prompts=PROMPTS[0], site="z.1"
    )
    assert torch.equal(after[:, :, 2], source["z.1"][:, :, 2])


def test_a_patch_from_a_prompt_does_not_reach_into_the_generated_text(lm):
    source = hk.forward(lm, PROMPTS[0], hk.capture("resid_post"))
    run = hk.generate(
        lm, PROMPTS[0], hk.patch("resid_post", source), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(
        run.tokens, hk.generate(lm, PROMPTS[0], max_new_tokens=4, do_sample=False).tokens
    )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda s: hk.patch("resid_post.0", s),
            NotCaptured,
            r"resid_post.0 was not captured. It has 1 site: resid_post.1",
        ),
        (lambda s: hk.patch("mlp_out", s), NotCaptured, "the source captured no mlp_out"),
        (
            lambda s: hk.patch(SITE, torch.ones(2)),
            BadHook,
            "patch needs a run or a prompt's text as its source, and was given Tensor",
        ),
        (
            lambda s: hk.patch(SITE, s),
            BadHook,
            r"row 0 has 19 tokens and the source of resid_post.1 has \d+, so pos=PROMPT does not pair",
        ),
        (
            lambda s: hk.patch(SITE, s, pos=18),
            NotCaptured,
            "position 18 of resid_post.1 was asked for, and the source has positions 0 to",
        ),
    ],
)
def test_a_patch_that_cannot_be_is_refused(llama, make, error, words):
    source = hk.forward(llama, PROMPTS[0], hk.capture(SITE))
    length = len(llama.tokenizer.encode(PROMPTS[2]))
    with pytest.raises(
        error, match=words.replace("19", str(length)).replace("18", str(length - 1))
    ):
        hook = make(source)
        hk.forward(
            llama,
            PROMPTS[2],
            *([hk.patch(SITE, source, pos=length - 1)] if "position 18" in words else [hook]),
        )


def test_a_run_that_has_modules_too_is_a_source_of_each_of_its_layers(llama):
    gate = hk.module("model.layers.0.mlp.gate_proj")
    source = hk.forward(llama, PROMPTS[0], hk.capture("resid_post"), hk.capture(gate))
    plain = hk.forward(llama, PROMPTS[0])
    for hook in (hk.patch("resid_post", source), hk.ablate("resid_post", to=source)):
        assert len(hook.sites) == llama.n_layers
        assert torch.equal(hk.forward(llama, PROMPTS[0], hook).logits, plain.logits)
    mean = hk.ablate("resid_post", to="mean", over=source)
    assert len(mean.sites) == llama.n_layers
    assert source.stack("resid_post").shape[0] == llama.n_layers
    with pytest.raises(NotCaptured, match="the source captured no z"):
        hk.patch("z", source)


# ---- at the logits


def said(lm, *hooks, prompts=PROMPTS):
    before, after = (
        hk.forward(lm, prompts, logits="last"),
        hk.forward(lm, prompts, *hooks, logits="last"),
    )
    return before.logits[:, 0], after.logits[:, 0]


def test_force_is_the_largest_logit_plus_the_margin(lm):
    before, after = said(lm, hk.force(9, margin=2.5))
    assert torch.equal(after[:, 9], before.amax(-1) + 2.5)
    others = [n for n in range(320) if n != 9]
    assert torch.equal(after[:, others], before[:, others])
    _, certain = said(lm, hk.force(9, margin=math.inf))
    assert torch.equal(certain.softmax(-1)[:, 9], torch.ones(3))


def test_ban_leaves_a_probability_of_exactly_zero(lm):
    before, after = said(lm, hk.ban(3, [4, 5]))
    assert (after.softmax(-1)[:, [3, 4, 5]] == 0).all()
    assert torch.equal(after[:, 6:], before[:, 6:])


def test_boost_adds_and_swap_exchanges(lm):
    before, after = said(lm, hk.boost(3, 4, by=1.5))
    assert torch.equal(after[:, 3:5], before[:, 3:5] + 1.5)
    before, after = said(lm, hk.swap(3, 4))
    assert torch.equal(after[:, [3, 4]], before[:, [4, 3]])


@pytest.mark.parametrize("rank", [1, 2, 3, 50, 319, 320])
def test_set_rank_gives_the_rank(lm, rank):
    before, after = said(lm, hk.set_rank(9, rank))
    assert ((after > after[:, 9:10]).sum(-1) + 1 == rank).all()
    others = [n for n in range(320) if n != 9]
    assert torch.equal(after[:, others], before[:, others])


def test_set_rank_between_equal_logits_is_refused(lm):
    tie = hk.edit(
        "logits", lambda x: torch.cat([torch.full_like(x[..., :5], 99.0), x[..., 5:]], dim=-1)
    )
    with pytest.raises(
        BadEdit, match=r"set_rank\(9, 3\) cannot be: the tokens .* have the same logit"
    ):
        hk.forward(lm, PROMPTS, tie, hk.set_rank(9, 3))


def test_logit_edits_leave_the_rest_of_the_prompt_alone(lm):
    before, after = hk.forward(lm, PROMPTS), hk.forward(lm, PROMPTS, hk.force(9))
    for row, length in enumerate(before.lengths):
        assert torch.equal(before.logits[row, : length - 1], after.logits[row, : length - 1])
        assert int(after.logits[row, length - 1].argmax()) == 9
    early = hk.forward(lm, PROMPTS[0], hk.force(9, pos=1))
    assert early.logits[0].argmax(-1).tolist()[1] == 9


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: hk.steer(SITE, VECTOR, position=3),
            UnknownKeyword,
            r"steer\(\) has no keyword 'position'; did you mean 'pos'\? It takes: site, vector, scale, pos, rows",
        ),
        (
            lambda: hk.capture(SITE, layers=[3]),
            UnknownKeyword,
            r"capture\(\) has no keyword 'layers'",
        ),
        (
            lambda: hk.capture(SITE, step=0),
            BadHook,
            r"step=0 at resid_post.1: a step counts generated tokens and exists at lm_head and logits only",
        ),
        (lambda: hk.force(1, step=0, pos=1), BadHook, "pos=1 and step=0 were both given"),
        (lambda: hk.capture("logits", step=0, pos=1), BadHook, "pos=1 and step=0 were both given"),
        (
            lambda: hk.force(1, site=SITE),
            BadHook,
            "an edit of logits cannot act at resid_post.1, which holds no logits",
        ),
        (lambda: hk.force(1, margin=0), BadHook, "margin=0 does not put the token first"),
        (lambda: hk.force(1, margin=float("nan")), BadHook, "margin=nan is not a finite number"),
        (lambda: hk.set_rank(1, 0), OutOfRange, "rank=0: ranks are whole numbers from 1"),
        (lambda: hk.ban(), BadHook, r"ban\(\) names no token"),
        (lambda: hk.boost(1, by="a"), BadHook, "by='a' is no file that can be read"),
        (lambda: hk.scale(SITE, float("inf")), BadHook, "factor=inf is not a finite number"),
        (
            lambda: hk.steer(SITE, [1.0, float("nan")]),
            BadHook,
            "the vector has values that are not finite numbers: 1 of them",
        ),
        (
            lambda: hk.steer(SITE, "up"),
            BadHook,
            "the vector is a str, and a tensor of numbers is needed",
        ),
        (
            lambda: hk.edit(SITE, 3),
            BadHook,
            "edit needs a function of the values, and was given int",
        ),
        (
            lambda: hk.ablate(SITE, to="mean"),
            BadHook,
            "to='mean' needs a reference: say over=run, or over=",
        ),
        (
            lambda: hk.ablate(SITE, to="mode"),
            BadHook,
            "to='mode' is unknown: give 'zero', 'mean', 'resample', a tensor, statistics or a run",
        ),
        (
            lambda: hk.ablate(SITE, over=["a"]),
            BadHook,
            "over= goes with to='mean' or to='resample'",
        ),
        (lambda: hk.ablate(SITE, to="mean", over=[]), BadHook, r"over=\[\] has no prompt"),
        (lambda: hk.ablate(SITE, to="mean", over="a", per="row"), BadHook, "per='row' is unknown"),
        (
            lambda: hk.project_out(SITE, torch.zeros(2, 2, 2)),
            BadHook,
            r"the direction has shape \[2, 2, 2\]",
        ),
        (
            lambda: hk.capture(SITE, dtype="float17"),
            BadHook,
            "dtype='float17' is no dtype of torch",
        ),
        (
            lambda: hk.capture(SITE, grad=True, dtype="float16"),
            BadHook,
            "grad=True. keeps the very tensor",
        ),
        (lambda: hk.skip_block([]), EmptySelection, "name at least one"),
    ],
)
def test_a_hook_that_means_nothing_is_refused_when_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("hook", "error", "words"),
    [
        (
            hk.steer(SITE, torch.ones(31)),
            BadHook,
            r"the vector has shape \[31\], and resid_post.1 is \[batch, pos, 32\]: give \[32\]",
        ),
        (
            hk.steer("z.1.0", VECTOR),
            BadHook,
            r"the vector has shape \[32\], and z.1.0 is \[batch, pos, 8\]",
        ),
        (hk.ablate(SITE, to=torch.ones(1, 1, 1, 32)), BadHook, "the tensor has shape"),
        (
            hk.project_out(SITE, torch.ones(31)),
            BadHook,
            "the direction has 31 numbers, and the last axis of resid_post.1 has 32",
        ),
        (
            hk.project_out(SITE, torch.zeros(32)),
            BadHook,
            "the directions are zero, or one of them is made of the others",
        ),
        (
            hk.project_out(SITE, torch.ones(2, 32)),
            BadHook,
            "the directions are zero, or one of them is made of the others",
        ),
        (hk.skip_block(3), OutOfRange, "resid_post.3 was asked for, and the model has 3 layers"),
        (
            hk.steer(SITE, torch.ones(2, 32), pos=[0, 1, 2]),
            BadEdit,
            r"the vector has shape \[2, 32\], and the values at resid_post.1 have",
        ),
        (
            hk.set_rank(3, 321),
            OutOfRange,
            "rank 321 was asked for, and the vocabulary has 320 tokens",
        ),
        (hk.ban(*range(320)), BadEdit, "leaves no token to choose at logits"),
    ],
    ids=str,
)
def test_a_hook_that_does_not_fit_the_model_is_refused(llama, hook, error, words):
    with pytest.raises(error, match=words):
        hk.forward(llama, PROMPTS[2], hook)


def test_some_units_of_a_site_are_replaced_and_the_others_are_not():
    lm = hk.tiny("llama")
    before = hk.forward(lm, [[5, 6, 7]], hk.capture("mlp_post.1"))
    cut = hk.ablate("mlp_post.1", units=[2, 30])
    after = hk.forward(lm, [[5, 6, 7]], cut, hk.capture("mlp_post.1"))["mlp_post.1"]
    others = [unit for unit in range(after.shape[-1]) if unit not in (2, 30)]
    assert (after[..., [2, 30]] == 0).all()
    assert torch.equal(after[..., others], before["mlp_post.1"][..., others])
    assert hk.types.Hook.from_json(cut.to_json()) == cut


def test_a_unit_that_is_not_there_is_refused():
    with pytest.raises(
        hk.errors.OutOfRange, match="unit 48 of mlp_post.1 was asked for, which has 48"
    ):
        hk.forward(hk.tiny("llama"), [[5]], hk.ablate("mlp_post.1", units=48))
    with pytest.raises(hk.errors.BadHook, match="a number for each query and key"):
        hk.ablate("pattern.1", units=3)
