"""Force, ban and restrict: the tokens that come out are those of plain transformers with the edit written by hand."""

import math

import by_hand
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, NotOneToken, OutOfRange, Unsupported

INF = math.inf
STEPS = 6
PLAIN = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "all warpers": {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.001,
        "typical_p": 0.9,
    },
    "three sequences": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}


def rows_of(lm):
    return [lm.tokenizer.encode(prompt) for prompt in PROMPTS]


def written(lm, rows, *hooks, **settings):
    """The new tokens of each row that hookkit's generate returns."""
    run = hk.generate(lm, rows, *hooks, seed=3, **PLAIN | settings)
    return [
        run.tokens[n, start : start + STEPS].tolist() for n, start in enumerate(run.prompt_lengths)
    ]


def by_transformers(lm, rows, edits, **settings):
    return by_hand.generated(lm.model, rows, edits, 3, PLAIN | settings)


def unedited():
    return lambda said, step, ids: said


known: dict[tuple[int, str], list[list[int]]] = {}


def unedited_text(lm, settings):
    """What the model writes behind the prompts by itself, found once."""
    key = id(lm.model), str(settings)
    if key not in known:
        known[key] = by_transformers(lm, rows_of(lm), [unedited] * 3, **settings)
    return known[key]


# Each edit is written twice: with hookkit, and by hand as a function that makes an edit of one row's logits.


def first(said, token, margin):
    """One token stands first."""
    if margin == INF:
        others = torch.arange(len(said)) != token
        said[others] = -INF
    else:
        said[token] = max(said.tolist()) + margin
    return said


def forced(token, margin=10.0, steps=range(STEPS)):
    return lambda: lambda said, step, ids: first(said, token, margin) if step in steps else said


def forced_phrase(tokens, starts, margin=10.0):
    due = {start + n: token for start in starts for n, token in enumerate(tokens)}
    return lambda: lambda said, step, ids: first(said, due[step], margin) if step in due else said


def forced_when(tokens, limit):
    """A phrase that is written whenever the largest logit is less than this above the next."""

    def make():
        waiting = []

        def edit(said, step, ids):
            one, two = sorted(said.tolist())[-2:]
            if not waiting and two - one < limit:
                waiting.extend(tokens)
            return first(said, waiting.pop(0), 10.0) if waiting else said

        return edit

    return make


def banned(tokens):
    def edit(said, step, ids):
        for token in tokens:
            said[token] = -INF
        return said

    return lambda: edit


def banned_phrases(phrases):
    def edit(said, step, ids):
        for phrase in phrases:
            if ids[len(ids) - len(phrase) + 1 :] == phrase[:-1]:
                said[phrase[-1]] = -INF
        return said

    return lambda: edit


def only(tokens):
    def edit(said, step, ids):
        return torch.tensor([float(x) if token in tokens else -INF for token, x in enumerate(said)])

    return lambda: edit


HALF = range(1, 320, 2)
EDITS = {
    "force": (hk.force(7, margin=10.0), forced(7)),
    "force, some steps": (hk.force(7, margin=INF, step=[1, 4]), forced(7, INF, (1, 4))),
    "force a phrase": (hk.force(hk.word([7, 8, 9]), margin=10.0), forced_phrase([7, 8, 9], [0])),
    "force a phrase from step 2": (
        hk.force(hk.word([7, 8, 9]), step=2, margin=10.0),
        forced_phrase([7, 8, 9], [2]),
    ),
    "force a phrase at two steps": (
        hk.force(hk.word([7, 8, 9]), step=[0, 3], margin=INF),
        forced_phrase([7, 8, 9], [0, 3], INF),
    ),
    "force a phrase where unsure": (
        hk.force(hk.word([7, 8]), when=hk.when.margin_below(0.6), margin=10.0),
        forced_when([7, 8], 0.6),
    ),
    "ban": (hk.ban(HALF), banned(HALF)),
    "restrict": (hk.restrict(range(10, 16)), only(range(10, 16))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_chosen_is_what_transformers_chooses_after_the_same_edit_by_hand(lm, name, mode):
    hook, edit = EDITS[name]
    rows, settings = rows_of(lm), MODES[mode]
    if mode == "beams" and "unsure" in name:
        with pytest.raises(Unsupported, match="has no place in beam search"):
            written(lm, rows, hook, **settings)
        return
    expected = by_transformers(lm, rows, [edit] * 3, **settings)
    assert expected != unedited_text(lm, settings), "the edit would not be seen"
    assert written(lm, rows, hook, **settings) == expected


@pytest.mark.parametrize("mode", ["greedy", "all warpers", "beams"])
@pytest.mark.parametrize("name", EDITS)
def test_a_soft_cap_changes_nothing_about_it(soft_capped, name, mode):
    if mode == "beams" and "unsure" in name:
        pytest.skip("refused in beams")
    hook, edit = EDITS[name]
    rows, settings = rows_of(soft_capped), MODES[mode]
    expected = by_transformers(soft_capped, rows, [edit] * 3, **settings)
    assert expected != unedited_text(soft_capped, settings), "the edit would not be seen"
    assert written(soft_capped, rows, hook, **settings) == expected


def likely_phrases(lm, rows):
    """Phrases that the model would write: three tokens from the prompt into the text, and two within it."""
    new = unedited_text(lm, {})
    across = [[*row[-2:], tokens[0]] for row, tokens in zip(rows, new, strict=True)]
    return (
        across
        + [tokens[n : n + 2] for tokens in new for n in range(STEPS - 1)]
        + [[5, tokens[0]] for tokens in new]
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_banned_phrase_is_never_completed_across_the_prompts_end_or_behind_it(lm, mode):
    rows, settings = rows_of(lm), MODES[mode]
    phrases = likely_phrases(lm, rows)
    expected = by_transformers(lm, rows, [banned_phrases(phrases)] * 3, **settings)
    found = written(lm, rows, hk.ban(*map(hk.word, phrases)), **settings)
    assert found == expected
    assert not [
        phrase
        for phrase in phrases
        for new in found
        for n in range(STEPS)
        if new[n:][: len(phrase)] == phrase
    ]
    if mode in ("greedy", "no cache", "chunks", "static cache"):
        plain = unedited_text(lm, settings)
        assert all(new[0] != old[0] for new, old in zip(found, plain, strict=True)), (
            "the prompt's tokens were not read"
        )


def test_a_phrase_may_be_begun_and_left_unfinished(lm):
    rows = rows_of(lm)
    new = unedited_text(lm, {})[0]
    unfinished = hk.ban(hk.word([*new[:3], 5 if new[3] != 5 else 6]))
    assert written(lm, rows[:1], unfinished) == [new]
    assert written(lm, rows[:1], hk.ban(hk.word(new[:3])))[0][:2] == new[:2]


@pytest.mark.parametrize(
    "make", [lambda n: hk.ban(n), lambda n: hk.ban(hk.word([n]))], ids=["token", "phrase"]
)
@pytest.mark.parametrize("model", ["llama", "soft_capped"])
def test_a_banned_token_never_comes_in_a_thousand_draws(request, model, make):
    lm = request.getfixturevalue(model)
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "num_return_sequences": 50,
        "max_new_tokens": 20,
        "top_k": 0,
    }
    often = range(100, 112)
    plain = hk.generate(lm, PROMPTS[0], seed=1, **PLAIN | settings)
    count = sum(int((plain.tokens[:, plain.prompt_lengths[0] :] == token).sum()) for token in often)
    assert count > 10, "the ban would not be seen"
    run = hk.generate(lm, PROMPTS[0], *map(make, often), seed=1, **PLAIN | settings)
    new = run.tokens[:, run.prompt_lengths[0] :]
    assert new.shape == (50, 20)
    assert not torch.isin(new, torch.tensor(often)).any()
    probs = hk.forward(lm, PROMPTS, *map(make, often), logits="last").logits.softmax(-1)
    assert (probs[..., list(often)] == 0).all()
    assert torch.allclose(probs.sum(-1), torch.ones(3, 1))


@pytest.mark.parametrize("model", ["llama", "soft_capped"])
def test_a_token_forced_without_limit_comes_in_every_one_of_a_thousand_draws(request, model):
    lm = request.getfixturevalue(model)
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "num_return_sequences": 50,
        "max_new_tokens": 20,
        "top_k": 0,
    }
    run = hk.generate(lm, PROMPTS[0], hk.force(33, margin=INF), seed=1, **PLAIN | settings)
    new = run.tokens[:, run.prompt_lengths[0] :]
    assert new.shape == (50, 20)
    assert (new == 33).all()
    logits = hk.forward(lm, PROMPTS, hk.ban(33), hk.force(33, margin=INF), logits="last").logits
    assert torch.equal(logits.softmax(-1)[..., 33], torch.ones(3, 1)), (
        "a ban before it does not stop it"
    )


@pytest.mark.parametrize("margin", [0.5, 10.0, INF])
@pytest.mark.parametrize("model", ["llama", "gpt2", "soft_capped"])
def test_a_forced_token_has_rank_one_whatever_the_margin(request, model, margin):
    lm = request.getfixturevalue(model)
    before = hk.forward(lm, PROMPTS, logits="last").logits
    after = hk.forward(lm, PROMPTS, hk.force(33, margin=margin), logits="last").logits
    assert (after.argsort(-1, descending=True)[..., 0] == 33).all()
    others = [n for n in range(320) if n != 33]
    if margin == INF:
        assert (after[..., others] == -INF).all()
        assert torch.equal(after[..., 33], before[..., 33])
    else:
        assert torch.equal(after[..., 33], before.amax(-1) + margin)
        assert torch.equal(after[..., others], before[..., others])


def test_restricted_tokens_keep_their_odds_and_all_others_have_probability_zero(lm):
    before = hk.forward(lm, PROMPTS, logits="last").logits
    after = hk.forward(lm, PROMPTS, hk.restrict(5, [80, 200]), logits="last").logits
    kept = [5, 80, 200]
    assert torch.allclose(after.softmax(-1)[..., kept], before[..., kept].softmax(-1))
    assert (after.softmax(-1)[..., [n for n in range(320) if n not in kept]] == 0).all()


@pytest.mark.parametrize("mode", ["greedy", "no cache", "chunks"])
def test_rows_with_an_edit_each_are_runs_of_one_row(lm, mode):
    rows, settings = rows_of(lm), MODES[mode]
    phrase = likely_phrases(lm, rows)[2]
    makes = [
        lambda n: hk.force(hk.word([7, 8]), when=hk.when.margin_below(1.0), rows=n),
        lambda n: hk.force(hk.word([9, 10, 11]), step=[0, 3], rows=n),
        lambda n: hk.ban(hk.word(phrase), rows=n),
    ]
    by_row = [
        forced_when([7, 8], 1.0),
        forced_phrase([9, 10, 11], [0, 3]),
        banned_phrases([phrase]),
    ]
    together = written(lm, rows, *(make(n) for n, make in enumerate(makes)), **settings)
    assert together == by_transformers(lm, rows, by_row, **settings)
    for n, make in enumerate(makes):
        assert written(lm, rows[n : n + 1], make(0), **settings) == together[n : n + 1]


@pytest.mark.parametrize("name", EDITS)
def test_a_row_alone_is_the_row_in_a_padded_batch(lm, name):
    hook, _ = EDITS[name]
    rows = rows_of(lm)
    together = written(lm, rows, hook)
    assert [written(lm, [row], hook)[0] for row in rows] == together


def test_edits_act_in_the_order_given(lm):
    rows = rows_of(lm)[:1]
    assert written(lm, rows, hk.force(7), hk.ban(7))[0].count(7) == 0
    assert written(lm, rows, hk.ban(7), hk.force(7))[0] == [7] * STEPS
    assert written(lm, rows, hk.restrict(7, 9), hk.ban(7))[0] == [9] * STEPS


def test_a_phrase_as_text_is_the_tokens_that_the_tokenizer_makes_of_it(lm):
    ids = lm.tokenizer.encode(" cup")
    assert len(ids) > 1
    run = hk.generate(lm, PROMPTS[0], hk.force(hk.word(" cup", exact=True), step=1), **PLAIN)
    start = run.prompt_lengths[0] + 1
    assert run.tokens[0, start : start + len(ids)].tolist() == ids
    assert " cup" in run.generated[0]


def test_a_condition_decides_at_which_of_the_named_steps_a_phrase_begins(lm):
    rows = rows_of(lm)[:1]
    plain = written(lm, rows)[0]
    always, never = hk.when.entropy_above(-1.0), hk.when.entropy_below(1e-9)
    assert written(lm, rows, hk.force(hk.word([7, 8, 9]), step=2, when=always))[0][:5] == [
        *plain[:2],
        7,
        8,
        9,
    ]
    assert written(lm, rows, hk.force(hk.word([7, 8, 9]), step=2, when=never))[0] == plain


def test_where_a_condition_does_not_hold_nothing_is_asked_of_the_edit(lm):
    never = hk.when.entropy_below(1e-9)
    plain = hk.forward(lm, PROMPTS).logits
    for hook in (hk.ban(range(320), when=never), hk.restrict(3, when=never)):
        assert torch.equal(
            hk.forward(lm, PROMPTS, hk.ban(3), hk.boost(3, by=1.0), hook).logits[..., 4:],
            plain[..., 4:],
        )


CALLS = [
    hk.force(7),
    hk.force(" milk", margin=2.5, step=3, rows=1),
    hk.force(7, margin=10.5, when=hk.when.prob_of(7, at_most=0.5)),
    hk.force(hk.word(" a cup of tea", exact=True), step=(3, 20)),
    hk.force(hk.word([7, " a"]), when=hk.when.entropy_above(2.0)),
    hk.ban(" milk", 7),
    hk.ban(hk.word(" a cup", exact=True), hk.word([7, 8]), 3, rows=(0, 2)),
    hk.restrict(" milk", 7, when=hk.when.rank_of(" milk", at_least=2)),
]


@pytest.mark.parametrize("hook", CALLS, ids=str)
def test_the_call_that_a_hook_prints_as_makes_it_again_and_json_does_too(hook):
    assert eval(str(hook), vars(hk.when) | {name: getattr(hk, name) for name in hk.__all__}) == hook
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook
    assert again.to_json() == hook.to_json()


def test_json_keeps_an_unlimited_margin():
    hook = hk.force(7, margin=INF)
    assert hk.types.Hook.from_json(hook.to_json()) == hook


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: hk.force(7, margin=0),
            BadHook,
            "margin=0 does not put the token first: give a number above 0",
        ),
        (lambda: hk.force(7, margin=-INF), BadHook, "margin=-inf is not a finite number"),
        (
            lambda: hk.force(7, when=3),
            BadHook,
            r"when=3 is no condition: give hk.when.entropy_above\(2.0\), hk.when.reads",
        ),
        (
            lambda: hk.force(hk.word([7, 8]), step=slice(2, None)),
            BadHook,
            r"word\(\[7, 8\]\) is written from a step on: say step=3, or the steps at which it begins",
        ),
        (lambda: hk.force(hk.word([7, 8]), pos=2), BadHook, "is written from a step on"),
        (lambda: hk.ban([]), BadHook, r"ban\(\) names no token: give at least one"),
        (lambda: hk.restrict(), BadHook, r"restrict\(\) names no token"),
        (lambda: hk.restrict(hk.word([7, 8])), BadHook, r"word\(\[7, 8\]\) is several tokens"),
        (lambda: hk.swap(3, 3), BadHook, "names one token twice"),
        (
            lambda: hk.restrict(7, step=1, pos=1),
            BadHook,
            "pos=1 and step=1 were both given: say one of them",
        ),
        (
            lambda: hk.ban(7, site="z.1"),
            BadHook,
            "an edit of logits cannot act at z.1, which holds no logits",
        ),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("hooks", "error", "words"),
    [
        (
            [hk.force(hk.word([7, 8, 9]), step=[0, 2])],
            BadHook,
            r"force\(word\(\[7, 8, 9\]\), step=\(0, 2\)\) would begin again before it is written: 3 tokens are needed",
        ),
        (
            [hk.force(hk.word([7, 8, 9]), step=STEPS - 2)],
            OutOfRange,
            f"means step {STEPS} of row 0, and at most {STEPS} tokens are generated",
        ),
        (
            [hk.force("coffee cup")],
            NotOneToken,
            "and one is meant.* For several tokens in a row, say hk.word",
        ),
        ([hk.ban("coffee cup")], NotOneToken, "For several tokens in a row, say hk.word"),
        ([hk.ban(range(320))], BadEdit, "leaves no token to choose at logits"),
        (
            [hk.ban(7, 8), hk.restrict(7, 8)],
            BadEdit,
            r"restrict\(7, 8\) leaves no token to choose at logits: all of these were banned before",
        ),
        (
            [hk.force(32, site=hk.module("model.layers.0.mlp"))],
            BadEdit,
            "token 32 was asked for, and the last axis of model.layers.0.mlp:output has 32 numbers",
        ),
    ],
)
def test_what_cannot_be_done_with_this_model_is_refused(llama, hooks, error, words):
    with pytest.raises(error, match=words):
        written(llama, rows_of(llama), *hooks)
