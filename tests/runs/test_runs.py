"""Runs: what forward and generate give back, and how much of the model they run."""

import by_hand
import pytest
import torch
from conftest import PROMPTS, tiny

import hookkit as hk
from hookkit.errors import BadArgument, BadPrompt, EmptySelection, NotCaptured, UnknownKeyword

SITE = "resid_post.1"


def calls_of(lm, run):
    """Which layers ran, and whether the head did."""
    ran = []
    layers = lm.model.model.layers if lm.family.name == "llama" else lm.model.transformer.h
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(layers)
    ]
    handles.append(lm.model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head")))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return ran


def test_a_run_holds_tokens_text_and_logits_in_each_rows_own_positions(lm):
    run = hk.forward(lm, PROMPTS)
    rows = [lm.tokenizer.encode(text) for text in PROMPTS]
    assert run.lengths == list(run.prompt_lengths) == [len(row) for row in rows]
    assert run.text == PROMPTS
    assert run.generated == ["", "", ""]
    assert run.prompt_rows == (0, 1, 2)
    for n, row in enumerate(rows):
        assert run.tokens[n, run.mask[n]].tolist() == row
    assert run.logits.shape == (3, max(map(len, rows)), 320)
    longest = max(map(len, rows))
    assert repr(run).splitlines() == [
        f"Run(3 rows of up to {longest} tokens; logits [3, {longest}, 320]; captured nothing)",
        "  next: hk.ranks(run), run.text",
    ]


def test_the_last_logits_alone_are_those_of_the_whole_matrix(lm):
    everything, last = (
        hk.forward(lm, PROMPTS),
        hk.forward(lm, PROMPTS, hk.capture(SITE), logits="last"),
    )
    assert last.logits.shape == (3, 1, 320)
    for n, length in enumerate(everything.lengths):
        assert torch.allclose(last.logits[n, 0], everything.logits[n, length - 1], atol=1e-5)
        assert last.tokens[n].tolist() == everything.tokens[n].tolist()
    assert torch.equal(last.mask, everything.mask)
    whole = hk.forward(lm, PROMPTS, hk.capture(SITE))
    assert torch.allclose(last[SITE], whole[SITE], atol=1e-4)
    shapes = []
    handle = lm.model.lm_head.register_forward_hook(
        lambda _m, _a, output: shapes.append(output.shape[1])
    )
    hk.forward(lm, PROMPTS, logits="last")
    handle.remove()
    assert shapes == [1], "the full matrix was made"


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ([hk.capture("resid_post.0")], [0]),
        ([hk.capture("resid_pre.1")], [0]),
        ([hk.capture("z.1"), hk.scale("resid_post.0", 2.0)], [0, 1]),
        ([hk.capture("resid_post")], [0, 1, 2]),
        ([hk.capture("resid_post.0"), hk.scale("resid_post.2", 2.0)], [0, 1, 2]),
        ([hk.capture("lm_head")], [0, 1, 2, "head"]),
        ([hk.capture("embed")], []),
    ],
    ids=lambda value: (
        str([str(hook) for hook in value]) if value and isinstance(value[0], hk.types.Hook) else ""
    ),
)
def test_a_forward_without_logits_stops_where_the_last_hook_is_done(lm, hooks, expected):
    assert calls_of(lm, lambda: hk.forward(lm, PROMPTS, *hooks, logits=False)) == expected
    stopped, whole = hk.forward(lm, PROMPTS, *hooks, logits=False), hk.forward(lm, PROMPTS, *hooks)
    for site in stopped.sites:
        assert torch.equal(stopped[site], whole[site])
    with pytest.raises(NotCaptured, match="this run kept no logits: it was made with logits=False"):
        _ = stopped.logits


def test_a_forward_that_is_asked_for_nothing_is_refused(llama):
    with pytest.raises(
        EmptySelection, match="asked for nothing: give it hooks, or logits='all' or 'last'"
    ):
        hk.forward(llama, "Tea", logits=False)
    with pytest.raises(
        BadArgument,
        match="logits='first' is unknown: say 'all' or 'last' or 'none', or True or False",
    ):
        hk.forward(llama, "Tea", logits="first")
    with pytest.raises(
        UnknownKeyword, match=r"forward\(\) has no keyword 'logit'; did you mean 'logits'"
    ):
        hk.forward(llama, "Tea", logit="all")


def test_a_generate_without_logits_keeps_none(lm):
    run = hk.generate(lm, "Tea", max_new_tokens=2, logits=False)
    with pytest.raises(NotCaptured, match="kept no logits"):
        _ = run.logits
    everything = hk.generate(lm, PROMPTS[:2], max_new_tokens=3, do_sample=False, eos_token_id=None)
    last = hk.generate(
        lm, PROMPTS[:2], max_new_tokens=3, do_sample=False, eos_token_id=None, logits="last"
    )
    assert torch.equal(last.logits, everything.logits[:, -1:])


def test_a_tokenizer_without_a_pad_token_serves_a_batch(lm):
    assert lm.tokenizer.pad_token is None
    run = hk.generate(lm, PROMPTS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for n, row in enumerate(lm.tokenizer.encode(text) for text in PROMPTS):
        assert run.tokens[n, : run.lengths[n]].tolist() == by_hand.greedy(lm.model, row, 3)


def test_a_site_can_be_read_by_text_value_head_or_stack(lm):
    run = hk.forward(lm, PROMPTS, hk.capture("z"), hk.capture("resid_post"))
    assert torch.equal(run["z.1"], run[hk.Site("z", 1)])
    assert torch.equal(run["z.1.3"], run["z.1"][:, :, 3])
    assert torch.equal(
        run.stack("resid_post"), torch.stack([run[f"resid_post.{n}"] for n in range(3)])
    )
    assert run.captured("z.1").rows == (0, 1, 2)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda run: run["mlp_out.1"],
            "mlp_out.1 was not captured. It has 4 sites: resid_post.0, resid_post.1, resid_post.2, z.1",
        ),
        (
            lambda run: run["resid_post"],
            r"Name one layer, such as 'resid_post.0', or stack them with .stack\('resid_post'\)",
        ),
        (
            lambda run: run["z.1"],
            "z.1 was captured 2 times, with the names 'a', 'b': give each capture a name of its own",
        ),
        (lambda run: run["z.1", "c"], "z.1 named 'c' was not captured"),
        (lambda run: run["resid_post.1.2"], "has no heads"),
        (lambda run: run.stack("mlp_out"), "no layer of 'mlp_out' was captured"),
    ],
)
def test_a_value_that_was_not_kept_is_asked_for_in_vain(llama, ask, words):
    run = hk.forward(
        llama,
        "Tea",
        hk.capture("resid_post"),
        hk.capture("z.1", name="a"),
        hk.capture("z.1", name="b"),
    )
    with pytest.raises((NotCaptured, hk.errors.HookkitError), match=words):
        ask(run)


def test_a_run_says_how_it_was_made(lm):
    about = hk.forward(lm, PROMPTS, hk.force(3)).about
    assert about["prompts"] == PROMPTS
    assert '"hook": "force"' in about["hooks"][0]
    assert (
        about["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )  # a build may say more
    assert {"model", "dtype", "device", "attention", "seconds", "logits"} <= set(about)
    assert hk.generate(lm, "Tea", seed=3, max_new_tokens=2).about["arguments"] == {
        "max_new_tokens": 2
    }


def test_bfloat16_logits_stay_bfloat16_and_tables_are_float32(small_tokenizer):
    lm = hk.LM(tiny("llama").bfloat16(), small_tokenizer)
    run = hk.forward(lm, PROMPTS, hk.steer(SITE, torch.ones(32)), hk.force(3), hk.capture(SITE))
    assert run.logits.dtype == run[SITE].dtype == torch.bfloat16
    assert abs(hk.ranks(run, rows=0, top=None)["prob"].sum() - 1) < 1e-5


def test_plain_modules_take_rows_of_one_length_only():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    assert hk.forward(hk.LM(model), [[1, 2], [3, 4]]).logits.shape == (2, 2, 9)
    with pytest.raises(BadPrompt, match="a Sequential takes no mask: give prompts of one length"):
        hk.forward(hk.LM(model), [[1, 2], [3]])


# ---- on the default model


def test_coffee_is_first_after_oat_milk(smol):
    run = hk.forward(smol, "I like oat milk in my")
    first = hk.ranks(run, top=1).iloc[0]
    assert (first["token"], first["token_id"], first["rank"]) == (" coffee", 6728, 1)
    assert round(first["logit"], 2) == 20.37
    assert (
        hk.ranks(hk.forward(smol, "The Eiffel Tower is located in the city of"), top=1)[
            "token"
        ].iloc[0]
        == " Paris"
    )


def test_forced_coffee_wins_where_it_does_not_belong_and_the_table_knows_its_true_rank(smol):
    prompt = "The capital of France is"
    before, after = (
        hk.forward(smol, prompt),
        hk.forward(smol, prompt, hk.force(" coffee", margin=10)),
    )
    row = hk.rank_shift(before, after).set_index("token_id").loc[6728]
    logits = by_hand.logits(smol.model, smol.tokenizer.encode(prompt))[0, -1]
    assert row["rank_before"] == int((logits > logits[6728]).sum()) + 1
    assert row["rank_after"] == 1
    assert "edited" in row["why"]
    assert (
        hk.generate(smol, prompt, hk.force(" coffee", step=0), max_new_tokens=3, do_sample=False)
        .generated[0]
        .startswith(" coffee")
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_on_the_default_model_a_padded_batch_is_its_single_runs(smol, side):
    prompts = [*PROMPTS, "The capital of France is"]
    encoded = smol.tokenizer(prompts, padding=True, padding_side=side, return_tensors="pt")
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0)) * 20
    sites = (
        smol.sites(["resid_pre", "resid_mid", "z", "mlp_post", "attn_out"], layers=[0, 11, 29])
        + "final_norm"
    )
    hooks = [hk.steer("resid_post.5", vector, pos=-1), hk.ablate("z.9.3", pos=0), hk.capture(sites)]
    together = hk.forward(smol, encoded, *hooks)
    for row, prompt in enumerate(prompts):
        alone = hk.forward(smol, prompt, *hooks)
        length = alone.lengths[0]
        apart = float((together.logits[row, :length] - alone.logits[0]).abs().max())
        assert apart <= 1e-5 * float(
            alone.logits.abs().max()
        )  # 1e-4 is what plain transformers has on some processors
        for site in sites:
            difference = float((together[site][row, :length] - alone[site][0]).abs().max())
            assert difference <= 1e-5 * float(alone[site].abs().max()), site
    settings = {"max_new_tokens": 8, "do_sample": False}
    edits = [hk.steer("resid_post.5", vector, pos=hk.GENERATED), hk.ban(" coffee")]
    batch = hk.generate(smol, encoded, *edits, **settings)
    for row, prompt in enumerate(prompts):
        assert batch.generated[row] == hk.generate(smol, prompt, *edits, **settings).generated[0]


def test_on_the_default_model_patching_itself_is_the_identity(smol):
    source = hk.forward(
        smol, PROMPTS, hk.capture(smol.sites(["resid_mid", "z", "q", "mlp_post"], layers=[3, 20]))
    )
    assert torch.equal(
        hk.forward(smol, PROMPTS, hk.patch(list(source.sites), source)).logits, source.logits
    )


def test_the_default_model_tells_mary_from_john(smol):
    def difference(prompt):
        logits = hk.forward(smol, prompt, logits="last").logits[0, 0]
        return float(logits[smol.token(" Mary")] - logits[smol.token(" John")])

    assert difference(
        "When Mary and John went to the store, John gave a drink to"
    ) == pytest.approx(6.1, abs=0.2)
    assert difference(
        "When Mary and John went to the store, Mary gave a drink to"
    ) == pytest.approx(-5.5, abs=0.3)
