"""Boost, cap, swap and set_rank: what they do to logits by closed forms, and to what is written by a loop by hand."""

import math

import by_hand
import pytest
import torch
from conftest import PROMPTS
from test_logits import MODES, by_transformers, rows_of, unedited_text, written

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, OutOfRange, UnknownKeyword

INF = math.inf
HALF = range(1, 320, 2)
AMOUNTS = {7: 40.0, 9: 35.0, 115: -50.0}


def boosted(amounts):
    def edit(said, step, ids):
        for token, by in amounts.items():
            said[token] = said[token] + by
        return said

    return lambda: edit


def capped_at(tokens, limit):
    def edit(said, step, ids):
        for token in tokens:
            said[token] = min(float(said[token]), limit)
        return said

    return lambda: edit


def capped_together(tokens, prob):
    """Where these tokens have more than `prob`, they get just that, and keep their odds."""
    others = [n for n in range(320) if n not in tokens]

    def edit(said, step, ids):
        probs = said.double().softmax(-1)
        mass = probs[list(tokens)].sum()
        if mass <= prob:
            return said
        new = torch.empty_like(probs)
        new[list(tokens)] = probs[list(tokens)] * prob / mass
        new[others] = probs[others] * (1 - prob) / (1 - mass)
        level = (
            said[others[0]].double() - new[others[0]].log()
        )  # so that the other tokens keep their logits
        return (new.log() + level).float()

    return lambda: edit


def swapped(a, b):
    def edit(said, step, ids):
        x, y = float(said[a]), float(said[b])
        said[a], said[b] = y, x
        return said

    return lambda: edit


def ranked(token, rank):
    """Midway between the tokens that are then before and after it."""

    def edit(said, step, ids):
        others = sorted((float(x) for n, x in enumerate(said) if n != token), reverse=True)
        said[token] = others[0] + 1 if rank == 1 else (others[rank - 2] + others[rank - 1]) / 2
        return said

    return lambda: edit


EDITS = {
    "boost": (hk.boost(7, 9, by=40.0), boosted({7: 40.0, 9: 40.0})),
    "boost by amounts": (hk.boost(by=AMOUNTS), boosted(AMOUNTS)),
    "cap at a logit": (hk.cap(HALF, logit=-2.0), capped_at(HALF, -2.0)),
    "cap at a probability": (hk.cap(HALF, prob=0.02), capped_together(HALF, 0.02)),
    "swap": (hk.swap(115, 319), swapped(115, 319)),
    "set_rank": (hk.set_rank(7, 1), ranked(7, 1)),
    "set_rank second": (hk.set_rank(115, 2), ranked(115, 2)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EDITS)
def test_what_is_written_is_what_transformers_writes_after_the_same_edit_by_hand(lm, name, mode):
    hook, edit = EDITS[name]
    rows, settings = rows_of(lm), MODES[mode]
    assert written(lm, rows, hook, **settings) == by_transformers(lm, rows, [edit] * 3, **settings)


@pytest.mark.parametrize("name", EDITS)
def test_the_edit_is_seen_in_what_is_written(lm, name):
    _, edit = EDITS[name]
    ways = MODES["greedy"], MODES["three sequences"]
    assert any(
        by_transformers(lm, rows_of(lm), [edit] * 3, **way) != unedited_text(lm, way)
        for way in ways
    )


@pytest.mark.parametrize("mode", ["greedy", "all warpers", "beams"])
@pytest.mark.parametrize("name", EDITS)
def test_a_soft_cap_comes_before_the_edit(soft_capped, name, mode):
    hook, edit = EDITS[name]
    rows, settings = rows_of(soft_capped), MODES[mode]
    assert written(soft_capped, rows, hook, **settings) == by_transformers(
        soft_capped, rows, [edit] * 3, **settings
    )


@pytest.mark.parametrize("name", EDITS)
def test_a_row_alone_is_the_row_in_a_padded_batch(lm, name):
    hook, _ = EDITS[name]
    rows = rows_of(lm)
    assert [written(lm, [row], hook)[0] for row in rows] == written(lm, rows, hook)


@pytest.mark.parametrize("mode", ["greedy", "no cache", "chunks"])
def test_rows_with_an_edit_each_are_runs_of_one_row(lm, mode):
    rows, settings = rows_of(lm), MODES[mode]
    makes = [
        lambda n: hk.boost(by=AMOUNTS, rows=n),
        lambda n: hk.cap(HALF, prob=0.02, rows=n),
        lambda n: hk.swap(115, 319, rows=n),
    ]
    by_row = [boosted(AMOUNTS), capped_together(HALF, 0.02), swapped(115, 319)]
    together = written(lm, rows, *(make(n) for n, make in enumerate(makes)), **settings)
    assert together == by_transformers(lm, rows, by_row, **settings)
    for n, make in enumerate(makes):
        assert written(lm, rows[n : n + 1], make(0), **settings) == together[n : n + 1]


# ---- the logits themselves


def said(lm, *hooks):
    """The logits of each prompt's last position, before and after."""
    before = torch.stack([by_hand.logits(lm.model, row)[0, -1] for row in rows_of(lm)])
    return before, hk.forward(lm, PROMPTS, *hooks, logits="last").logits[:, 0]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "soft_capped"])
def test_the_logits_are_those_of_the_edit_by_hand(request, model, name):
    hook, edit = EDITS[name]
    before, after = said(request.getfixturevalue(model), hook)
    expected = torch.stack([edit()(row.clone(), 0, []) for row in before])
    assert torch.allclose(after, expected, atol=1e-4)


def test_a_cap_at_a_logit_is_kept_to_the_last_digit(lm):
    _before, after = said(lm, hk.cap(HALF, logit=0.1))
    assert bool((after[:, 1::2] <= torch.tensor(0.1)).all())
    assert bool((after[:, 1::2] == torch.tensor(0.1)).any())


@pytest.mark.parametrize("prob", [0.001, 0.3, 0.999])
def test_a_cap_at_a_probability_leaves_just_that_and_the_odds_among_the_tokens(lm, prob):
    tokens = list(HALF)
    before, after = said(lm, hk.cap(tokens, prob=prob))
    mass = before.softmax(-1)[:, tokens].sum(-1)
    assert torch.allclose(after.softmax(-1)[:, tokens].sum(-1), mass.clamp(max=prob), atol=1e-5)
    assert torch.allclose(after[:, tokens].softmax(-1), before[:, tokens].softmax(-1), atol=1e-4)
    assert torch.allclose(after[:, ::2], before[:, ::2], atol=1e-4)


def test_what_stands_below_its_limit_is_left_as_it_is(lm):
    plain = hk.forward(lm, PROMPTS)
    for hook in (hk.cap(HALF, logit=1000.0), hk.cap(4, prob=0.999999)):
        run = hk.forward(lm, PROMPTS, hook)
        assert torch.equal(run.logits, plain.logits)
        assert run.log["changed"].tolist() == [0, 0, 0]


def test_a_banned_token_stays_banned_under_a_cap_and_a_boost(lm):
    _, after = said(lm, hk.ban(4), hk.cap(4, prob=0.5), hk.cap(4, logit=3.0), hk.boost(4, by=50.0))
    assert (after[:, 4] == -INF).all()
    assert not after.isnan().any()


def test_amounts_come_from_a_csv_file_by_text_or_by_id(lm, tmp_path):
    by_text, by_id = tmp_path / "text.csv", tmp_path / "id.csv"
    by_text.write_text('token,by\n milk,2.5\n"a",-1\n')
    milk, a = (lm.tokenizer.encode(text)[0] for text in (" milk", "a"))
    by_id.write_text(
        f"token_id,token,by\n{milk},what it looks like,2.5\n{a},,-1e0\n", encoding="utf-8-sig"
    )
    before, after = said(lm, hk.boost(by=by_text))
    expected = before.clone()
    expected[:, milk] += 2.5
    expected[:, a] -= 1.0
    assert torch.allclose(after, expected, atol=1e-4)
    assert hk.boost(by=str(by_text)) == hk.boost(by={" milk": 2.5, "a": -1.0})
    assert hk.boost(by=by_id) == hk.boost(by={milk: 2.5, a: -1.0})


CALLS = [
    hk.boost(" milk", 7, by=1.5),
    hk.boost(by={" milk": 2.0, 7: -1.0}),
    hk.boost(by={0: 1.0}, rows=1, step=2, when=hk.when.rank_of(" milk", at_most=3)),
    hk.cap(" milk", 7, logit=-1.0),
    hk.cap(" milk", prob=0.25, when=hk.when.margin_above(1.0)),
    hk.swap(" milk", 7, step=(1, 2)),
    hk.set_rank(" milk", 3, pos=-1, when=hk.when.prob_of(7, at_least=0.5)),
]


@pytest.mark.parametrize("hook", CALLS, ids=str)
def test_the_call_that_a_hook_prints_as_makes_it_again_and_json_does_too(hook):
    assert eval(str(hook), vars(hk.when) | {name: getattr(hk, name) for name in hk.__all__}) == hook
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook
    assert again.to_json() == hook.to_json()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hk.boost(7, by={8: 1.0}), BadHook, "by= names its tokens itself: leave out 7"),
        (lambda: hk.boost(by={}), BadHook, r"boost\(\) names no token"),
        (lambda: hk.boost(by={7: INF}), BadHook, r"by\[7\]=inf is not a finite number"),
        (lambda: hk.boost(7, by=None), BadHook, "by=None is not a finite number"),
        (
            lambda: hk.boost(by="nowhere.csv"),
            BadHook,
            r"by='nowhere.csv' is no file that can be read \(No such file",
        ),
        (lambda: hk.cap(7), BadHook, r"cap\(\) needs one limit: logit= or prob="),
        (lambda: hk.cap(7, logit=1, prob=0.5), BadHook, r"cap\(\) needs one limit"),
        (
            lambda: hk.cap(7, prob=1.0),
            BadHook,
            "prob=1.0 is no limit: give a probability between 0 and 1",
        ),
        (lambda: hk.cap(7, prob=0), BadHook, "prob=0 is no limit"),
        (lambda: hk.cap(7, logit=INF), BadHook, "logit=inf is not a finite number"),
        (lambda: hk.cap(prob=0.5), BadHook, r"cap\(\) names no token"),
        (lambda: hk.cap(7, limit=0.5), UnknownKeyword, r"cap\(\) has no keyword 'limit'"),
        (
            lambda: hk.set_rank(7, 0),
            OutOfRange,
            "rank=0: ranks are whole numbers from 1, the most likely token",
        ),
        (lambda: hk.set_rank(7, True), OutOfRange, "rank=True: ranks are whole numbers"),
    ],
)
def test_what_means_nothing_is_refused_when_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            b"token,amount\na,1\n",
            "is no table of amounts: it needs a line for each token, under token",
        ),
        (b"word,by\na,1\n", "is no table of amounts"),
        (b"token,by\n", "is no table of amounts"),
        (b"", "is no table of amounts"),
        (
            b"token,by\na,much\n",
            "has a value that is no number: could not convert string to float: 'much'",
        ),
        (b"token,by\na\n", "has a value that is no number"),
        (b"token_id,by\na,1\n", "has a value that is no number: invalid literal for int"),
        (b"token,by\na,1\na,2\n", "names token 'a' twice: name each once"),
        (b"token,by\n\xff,1\n", "is no file that can be read .'utf-8' codec can't decode"),
        (b"token,by\na,nan\n", "=nan is not a finite number"),
    ],
)
def test_a_table_of_amounts_that_cannot_be_read_is_refused(tmp_path, lines, words):
    path = tmp_path / "amounts.csv"
    path.write_bytes(lines)
    with pytest.raises(BadHook, match=words):
        hk.boost(by=path)


def milk(lm):
    return lm.tokenizer.encode(" milk")[0]


@pytest.mark.parametrize(
    ("hooks", "error", "words"),
    [
        (
            lambda lm: [hk.swap(" milk", milk(lm))],
            BadHook,
            "names one token twice: there is nothing to swap",
        ),
        (
            lambda lm: [hk.boost(by={" milk": 1.0, milk(lm): 2.0})],
            BadHook,
            "names token .* twice: name each once",
        ),
        (
            lambda lm: [hk.cap(7, 7, prob=0.1)],
            BadHook,
            r"cap\(7, 7, prob=0.1\) names token 7 twice",
        ),
        (
            lambda lm: [hk.boost(hk.word([7, 8]), by=1.0)],
            BadHook,
            r"word\(\[7, 8\]\) is several tokens",
        ),
        (
            lambda lm: [hk.set_rank(7, 321)],
            OutOfRange,
            "rank 321 was asked for, and the vocabulary has 320 tokens",
        ),
        (
            lambda lm: [hk.restrict(7, 8), hk.set_rank(9, 5)],
            BadEdit,
            r"set_rank\(9, 5\) cannot be: the tokens that would stand before and after it have the same logit",
        ),
        (
            lambda lm: [hk.restrict(7, 8), hk.cap(7, 8, prob=0.1)],
            BadEdit,
            r"cap\(7, 8, prob=0.1\) cannot be at logits: no other token can be chosen",
        ),
    ],
)
def test_what_cannot_be_done_with_this_model_is_refused(llama, hooks, error, words):
    with pytest.raises(error, match=words):
        hk.forward(llama, PROMPTS, *hooks(llama))


def test_a_row_of_the_vocabulary_without_a_token_has_no_rank(llama, small_tokenizer):
    from conftest import tiny

    wide = tiny("llama")
    wide.resize_token_embeddings(len(small_tokenizer) + 8)
    lm = hk.LM(wide, small_tokenizer)
    with pytest.raises(
        BadHook, match=r"token 325 is a row of the vocabulary without a token \(they end at 319\)"
    ):
        hk.forward(lm, PROMPTS, hk.set_rank(325, 2))


def test_where_a_condition_does_not_hold_nothing_is_asked_of_the_edit(lm):
    never = hk.when.entropy_below(1e-9)
    plain = hk.forward(lm, PROMPTS, hk.restrict(7, 8)).logits
    for hook in (hk.set_rank(9, 5, when=never), hk.cap(7, 8, prob=0.1, when=never)):
        assert torch.equal(hk.forward(lm, PROMPTS, hk.restrict(7, 8), hook).logits, plain)
