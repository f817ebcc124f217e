"""Saying when: what each way of writing a position means, and what is refused."""

import pytest

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, OutOfRange
from hookkit.models.positions import (
    NO_END,
    Span,
    Where,
    read_indices,
    read_position,
    resolve_positions,
    resolve_rows,
)

LENGTH = 6


def means(pos=None, step=None):
    return resolve_positions(
        Where(read_position(pos), None, read_indices(step, "step", negative=False)),
        LENGTH,
        lambda at: (2, 3),
    )


@pytest.mark.parametrize(
    ("pos", "expected"),
    [
        (None, range(NO_END)),
        (0, (0,)),
        (-1, (5,)),
        ([3, 1, -1], (1, 3, 5)),
        (range(2, 4), (2, 3)),
        (slice(2, 4), range(2, 4)),
        (slice(-2, None), range(4, NO_END)),
        (slice(None, -1), range(5)),
        (slice(-99, 2), range(2)),
        (slice(1, None, 2), range(1, NO_END, 2)),
        (hk.PROMPT, range(6)),
        (hk.GENERATED, range(6, NO_END)),
        (hk.at("store"), (2, 3)),
        (9, (9,)),
    ],
    ids=str,
)
def test_a_position_means(pos, expected):
    assert means(pos) == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (5,)),
        (2, (7,)),
        ([0, 3], (5, 8)),
        (slice(1, None), range(6, NO_END)),
        (slice(0, 2), range(5, 7)),
    ],
)
def test_step_0_is_chosen_by_the_logits_at_the_prompts_last_token(step, expected):
    assert means(step=step) == expected


@pytest.mark.parametrize(
    ("pos", "error", "words"),
    [
        (
            -7,
            OutOfRange,
            "position -7 was asked for, and the prompt has 6 tokens: positions go from -6 to 5",
        ),
        ([5, -1], BadHook, "name one token twice in a prompt of 6 tokens"),
        ([2, 2], BadHook, r"pos=\[2, 2\] names one of them twice"),
        ([], EmptySelection, r"pos=\[\] selects nothing"),
        (
            "last",
            BadHook,
            "pos='last' is not valid: give a whole number, a list of them or a slice",
        ),
        (True, BadHook, "pos=True is not a whole number"),
        (1.0, BadHook, "pos=1.0 is not valid"),
        (slice(5, 2, -1), BadHook, "steps backwards"),
    ],
)
def test_a_position_that_means_nothing_is_refused(pos, error, words):
    with pytest.raises(error, match=words):
        means(pos)


def test_a_negative_step_or_row_is_refused():
    with pytest.raises(OutOfRange, match="step=-1: steps count from 0 upwards"):
        hk.force("x", step=-1)
    with pytest.raises(OutOfRange, match="row=-1: rows count from 0 upwards"):
        hk.capture("embed", rows=-1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        ([2, 0], [0, 2]),
        (Span(1, None), [1, 2]),
        (Span(0, 9), [0, 1, 2]),
    ],
)
def test_rows_mean_prompts_of_the_batch(rows, expected):
    assert resolve_rows(read_indices(rows, "row"), 3) == expected


def test_a_row_that_is_not_there_is_refused():
    with pytest.raises(OutOfRange, match="row 3 was asked for, and the batch has 3 rows, 0 to 2"):
        resolve_rows(read_indices(3, "row"), 3)
    with pytest.raises(OutOfRange, match="the batch has 1 row, row 0"):
        resolve_rows(read_indices([0, 1], "row"), 1)
    with pytest.raises(EmptySelection, match="selects none of the batch's 3 rows"):
        resolve_rows(Span(5, None), 3)


def test_positions_print_as_they_are_written():
    assert [repr(p) for p in (hk.PROMPT, hk.GENERATED, hk.at("a"), hk.at("a", which=1), Span(2, None), Span(None, 4, 2))] == [
        "PROMPT", "GENERATED", "at('a')", "at('a', which=1)", "2:", ":4:2",
    ]  # fmt: skip


def test_an_empty_text_covers_nothing():
    with pytest.raises(EmptySelection, match=r"at\(''\) covers no token"):
        hk.at("")


def test_what_is_no_position_is_told_what_a_position_may_be():
    with pytest.raises(
        BadHook, match=r"or a slice, hk.PROMPT, hk.GENERATED, hk.at\('text'\) or hk.role\('user'\)$"
    ):
        read_position(1.5)
    with pytest.raises(BadHook, match="give a whole number, a list of them or a slice$"):
        read_indices(1.5, "row", negative=False)
