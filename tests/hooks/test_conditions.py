"""Conditions: where they hold on logits that are known, and that nothing happens where they do not."""

import math

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadEdit, BadHook, NotOneToken, UnknownKeyword

N = 320
BELOW, ABOVE = 1 - 1e-3, 1 + 1e-3


def known(*rows):
    """An edit that puts known logits at every position of each row."""
    table = torch.stack([torch.as_tensor(row, dtype=torch.float) for row in rows])
    return hk.edit("logits", lambda x: table[:, None].expand_as(x).clone())


def even(count):
    """The logits of a choice among so many tokens, all as likely: an entropy of log(count)."""
    return torch.tensor([1.5] * count + [-math.inf] * (N - count))


def holds(lm, when, *rows):
    """For each row of known logits, whether an edit with this condition acted; checked in the logits and in the log."""
    prompts = PROMPTS[: len(rows)]
    plain = hk.forward(lm, prompts, known(*rows), logits="last")
    run = hk.forward(lm, prompts, known(*rows), hk.boost(0, by=64.0, when=when), logits="last")
    acted = []
    log = run.log[run.log["hook"] == 1].sort_values("row")
    for row in range(len(rows)):
        same = torch.equal(run.logits[row], plain.logits[row])
        if not same:
            assert torch.equal(run.logits[row, :, 1:], plain.logits[row, :, 1:])
            assert torch.equal(run.logits[row, :, 0], plain.logits[row, :, 0] + 64.0)
        assert log["changed"].tolist()[row] == (0 if same else 1)
        acted.append(not same)
    return acted


def test_entropy_is_that_of_an_even_choice(lm):
    rows = even(2), even(10), even(N)
    assert holds(lm, hk.when.entropy_above(math.log(10) * BELOW), *rows) == [False, True, True]
    assert holds(lm, hk.when.entropy_above(math.log(10) * ABOVE), *rows) == [False, False, True]
    assert holds(lm, hk.when.entropy_below(math.log(10) * BELOW), *rows) == [True, False, False]
    assert holds(lm, hk.when.entropy_below(math.log(10) * ABOVE), *rows) == [True, True, False]


def test_entropy_is_in_nats_over_all_tokens(lm):
    """One token has the probability p, all others share the rest."""
    p = 0.3
    peak = torch.zeros(N)
    peak[5] = math.log(p / (1 - p) * (N - 1))
    entropy = -p * math.log(p) - (1 - p) * math.log((1 - p) / (N - 1))
    assert holds(lm, hk.when.entropy_above(entropy * BELOW), peak) == [True]
    assert holds(lm, hk.when.entropy_above(entropy * ABOVE), peak) == [False]


def test_margin_is_the_largest_logit_less_the_second(lm):
    rows = [torch.arange(N) * step for step in (0.25, 0.5, 2.0)]
    assert holds(lm, hk.when.margin_above(0.375), *rows) == [False, True, True]
    assert holds(lm, hk.when.margin_below(0.375), *rows) == [True, False, False]
    assert holds(lm, hk.when.margin_above(0.5), *rows) == [False, False, True], (
        "just as large is not above"
    )
    assert holds(lm, hk.when.margin_below(0.5), *rows) == [True, False, False], (
        "just as large is not below"
    )
    assert holds(lm, hk.when.margin_below(0.01), torch.zeros(N)) == [True]


def test_rank_is_one_more_than_the_tokens_above(lm):
    rising, falling = torch.arange(N), -torch.arange(N)
    for token in (1, 100, N - 1):
        for row, rank in ((rising, N - token), (falling, token + 1)):
            assert holds(lm, hk.when.rank_of(token, at_most=rank), row) == [True]
            if rank > 1:
                assert holds(lm, hk.when.rank_of(token, at_most=rank - 1), row) == [False]
            assert holds(lm, hk.when.rank_of(token, at_least=rank), row) == [True]
            assert holds(lm, hk.when.rank_of(token, at_least=rank + 1), row) == [False]
    assert holds(lm, hk.when.rank_of(7, at_most=1), torch.zeros(N)) == [True], (
        "tokens as large are not above"
    )


def test_probability_is_that_of_the_softmax(lm):
    rows = []
    for p in (0.1, 0.5, 0.9):
        row = torch.zeros(N)
        row[5] = math.log(p / (1 - p) * (N - 1))
        rows.append(row)
    assert holds(lm, hk.when.prob_of(5, at_least=0.5 * BELOW), *rows) == [False, True, True]
    assert holds(lm, hk.when.prob_of(5, at_least=0.5 * ABOVE), *rows) == [False, False, True]
    assert holds(lm, hk.when.prob_of(5, at_most=0.5 * ABOVE), *rows) == [True, True, False]
    assert holds(lm, hk.when.prob_of(6, at_most=0.5 / (N - 1) * ABOVE), *rows) == [
        False,
        True,
        True,
    ]
    assert holds(lm, hk.when.prob_of(5, at_most=0.0), even(3)) == [True], (
        "a banned token has probability 0"
    )


def test_a_token_may_be_named_by_its_text(lm):
    (milk,) = lm.tokenizer.encode(" milk")
    row = torch.zeros(N)
    row[milk] = 1.0
    assert holds(lm, hk.when.rank_of(" milk", at_most=1), row) == [True]
    assert holds(lm, hk.when.rank_of("a", at_most=1), row) == [False]


def test_rows_of_the_vocabulary_without_a_token_are_not_ranked(small_tokenizer):
    from conftest import tiny

    wide = tiny("llama")
    wide.resize_token_embeddings(N + 8)
    lm = hk.LM(wide, small_tokenizer)
    row = torch.cat([torch.arange(N) * 0.25, torch.full((8,), 1000.0)])
    assert holds(lm, hk.when.rank_of(N - 1, at_most=1), row) == [True]
    assert holds(lm, hk.when.margin_below(0.5), row) == [True]


def test_a_function_of_ones_own_is_given_logits_and_where_they_are(lm):
    seen = []

    def mine(logits, here):
        seen.append((logits.clone(), here.rows, here.positions.tolist(), here.steps.tolist()))
        logits.fill_(9.0)
        return here.steps == 0

    rows = torch.arange(N) * 0.25, torch.zeros(N)
    assert holds(lm, mine, *rows) == [True, True], "and what it does to them is its own affair"
    lengths = [len(lm.tokenizer.encode(prompt)) for prompt in PROMPTS[:2]]
    logits, prompts, positions, steps = seen[0]
    assert torch.equal(logits[:, 0], torch.stack(rows))
    assert prompts == [0, 1]
    assert positions == [[lengths[0] - 1], [lengths[1] - 1]]
    assert steps == [[0], [0]]


def test_a_function_may_answer_for_all_or_for_each_cell(lm):
    rows = torch.arange(N) * 0.25, torch.zeros(N)
    assert holds(lm, lambda logits, here: True, *rows) == [True, True]
    assert holds(lm, lambda logits, here: False, *rows) == [False, False]
    assert holds(lm, lambda logits, here: torch.tensor(True), *rows) == [True, True]
    assert holds(lm, lambda logits, here: logits[..., 4] > 0, *rows) == [True, False]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "when= gave NoneType: return True or False, or a bool tensor"),
        (1, "when= gave int: return True or False"),
        (
            torch.ones(2, 1),
            r"when= gave torch.float32 \[2, 1\]: return True or False, or a bool tensor \[2, 1\]",
        ),
        (torch.ones(2, N).bool(), r"when= gave torch.bool \[2, 320\]"),
        (torch.ones(1).bool(), r"when= gave torch.bool \[1\]"),
    ],
    ids=str,
)
def test_a_function_that_answers_something_else_is_refused(lm, answer, words):
    with pytest.raises(BadEdit, match=words):
        hk.forward(lm, PROMPTS[:2], hk.ban(3, when=lambda logits, here: answer), logits="last")


HOOKS = [
    lambda when: hk.force(7, when=when),
    lambda when: hk.force(hk.word([7, 8]), when=when),
    lambda when: hk.ban(7, when=when),
    lambda when: hk.ban(hk.word([7]), when=when),
    lambda when: hk.restrict(7, 8, when=when),
    lambda when: hk.boost(7, by=3.0, when=when),
    lambda when: hk.boost(by={7: 3.0, 8: 1.0}, when=when),
    lambda when: hk.cap(range(N - 1), logit=-90.0, when=when),
    lambda when: hk.cap(range(N - 1), prob=1e-6, when=when),
    lambda when: hk.swap(7, 8, when=when),
    lambda when: hk.set_rank(7, 3, when=when),
]


@pytest.mark.parametrize("make", HOOKS, ids=lambda make: str(make(None)).split("(")[0])
def test_every_edit_acts_in_the_rows_where_its_condition_holds_and_in_no_other(lm, make):
    plain = hk.forward(lm, PROMPTS)
    always = (
        hk.forward(lm, PROMPTS, make(None))
        if "word" not in str(make(None)) or "ban" in str(make(None))
        else None
    )
    ends = [plain.logits[row, length - 1] for row, length in enumerate(plain.lengths)]
    entropies = [float(torch.distributions.Categorical(logits=end).entropy()) for end in ends]
    limit = sorted(entropies)[1] * ABOVE
    run = hk.forward(lm, PROMPTS, make(hk.when.entropy_below(limit)))
    held = [entropy < limit for entropy in entropies]
    assert sum(held) == 2, "some rows should be on each side"
    for row in range(3):
        assert (run.log[run.log["row"] == row]["changed"].sum() > 0) == held[row]
        assert torch.equal(run.logits[row], plain.logits[row]) != held[row]
        if held[row] and always is not None:
            assert torch.equal(run.logits[row], always.logits[row])


def test_a_condition_sees_what_the_edits_before_it_left(lm):
    rows = [torch.zeros(N)]
    boosted = hk.boost(5, by=10.0)
    first = hk.forward(
        lm,
        PROMPTS[:1],
        known(*rows),
        boosted,
        hk.ban(5, when=hk.when.rank_of(6, at_least=2)),
        logits="last",
    )
    assert first.logits[0, 0, 5] == -math.inf
    other = hk.forward(
        lm,
        PROMPTS[:1],
        known(*rows),
        hk.ban(5, when=hk.when.rank_of(6, at_least=2)),
        boosted,
        logits="last",
    )
    assert other.logits[0, 0, 5] == 10.0


def test_the_log_of_a_generation_says_at_which_steps_the_condition_held(lm):
    settings = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "seed": 2}
    plain = hk.generate(lm, PROMPTS[0], **settings)
    top = plain.logits[0].topk(2).values
    limit = float((top[:, 0] - top[:, 1]).median()) * ABOVE
    run = hk.generate(
        lm, PROMPTS[0], hk.boost(7, by=1e-3, when=hk.when.margin_below(limit)), **settings
    )
    assert torch.equal(run.tokens, plain.tokens), "an edit too small to change a draw"
    held = (top[:, 0] - top[:, 1] < limit).tolist()
    assert 0 < sum(held) < 8
    assert run.log.sort_values("forward")["changed"].tolist() == [int(each) for each in held]


CONDITIONS = [
    hk.when.entropy_above(2.0),
    hk.when.entropy_below(0.5),
    hk.when.margin_above(1.0),
    hk.when.margin_below(1),
    hk.when.rank_of(" milk", at_most=10),
    hk.when.rank_of(7, at_least=2),
    hk.when.prob_of(" milk", at_least=0.05),
    hk.when.prob_of(7, at_most=0.5),
]


@pytest.mark.parametrize("when", CONDITIONS, ids=repr)
def test_a_condition_prints_as_the_call_that_makes_it_and_survives_json(when):
    assert (
        eval(repr(when), vars(hk.when) | {name: getattr(hk, name) for name in hk.__all__}) == when
    )
    hook = hk.ban(3, when=when)
    assert hk.types.Hook.from_json(hook.to_json()) == hook
    assert hk.types.Hook.from_json(hook.to_json()).when == when
    assert hook != hk.ban(3)
    assert len(set(CONDITIONS)) == len(CONDITIONS)


def test_a_function_of_ones_own_is_named_in_print_and_does_not_come_back_from_json():
    def unsure(logits, here):
        return True

    hook = hk.ban(3, when=unsure)
    assert str(hook) == "ban(3, when=unsure)"
    with pytest.raises(
        BadHook,
        match="has a user's function, .*unsure, of which JSON has the name and not the code",
    ):
        hk.types.Hook.from_json(hook.to_json())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hk.when.entropy_above("2"), BadHook, "nats='2' is not a finite number"),
        (lambda: hk.when.entropy_below(math.nan), BadHook, "nats=nan is not a finite number"),
        (lambda: hk.when.margin_above(math.inf), BadHook, "logits=inf is not a finite number"),
        (lambda: hk.when.margin_below(True), BadHook, "logits=True is not a finite number"),
        (
            lambda: hk.when.rank_of(7),
            BadHook,
            r"rank_of\(7\) needs one limit: at_most= or at_least=",
        ),
        (
            lambda: hk.when.prob_of(" a", at_most=0.1, at_least=0.5),
            BadHook,
            r"prob_of\(' a'\) needs one limit",
        ),
        (lambda: hk.when.prob_of(7, at_most="x"), BadHook, "at_most='x' is not a finite number"),
        (lambda: hk.when.rank_of(7, top=3), UnknownKeyword, r"rank_of\(\) has no keyword 'top'"),
        (
            lambda: hk.when.prob_of(7, above=3),
            UnknownKeyword,
            r"prob_of\(\) has no keyword 'above'",
        ),
        (
            lambda: hk.boost(7, by=1.0, when="unsure"),
            BadHook,
            "when='unsure' is no condition: give hk.when.entropy_above",
        ),
    ],
)
def test_a_condition_that_means_nothing_is_refused_when_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_condition_on_something_that_is_not_one_token_is_refused_before_the_forward(lm):
    with pytest.raises(NotOneToken, match="'coffee cup' is .* tokens here .*, and one is meant"):
        hk.forward(lm, PROMPTS, hk.ban(3, when=hk.when.rank_of("coffee cup", at_most=3)))
    with pytest.raises(
        NotOneToken, match="token 320 was asked for, and the vocabulary has ids 0 to 319"
    ):
        hk.forward(lm, PROMPTS, hk.ban(3, when=hk.when.prob_of(320, at_most=0.5)))
