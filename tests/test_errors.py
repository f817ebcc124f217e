"""Errors can be caught by what Python would raise, and an unknown word is answered with the nearest known one."""

import pytest

import hookkit as hk
from hookkit.arguments import check_arguments
from hookkit.errors import OutOfRange, UnknownKeyword, did_you_mean


def test_an_error_is_also_the_one_that_python_would_raise(llama):
    with pytest.raises(IndexError):
        hk.forward(llama, "Tea", hk.capture("resid_post.9"))
    assert issubclass(OutOfRange, hk.errors.HookkitError)


def test_the_nearest_words_are_offered_or_none():
    assert did_you_mean("resid_pst", ["resid_post", "embed"]) == "; did you mean 'resid_post'?"
    assert did_you_mean("xyz", ["resid_post", "embed"]) == "."


def test_an_unknown_keyword_is_answered_with_the_known_ones():
    @check_arguments
    def act(thing: str, *, pos: int = 0) -> int:
        return pos

    assert act("x", pos=2) == 2
    with pytest.raises(
        UnknownKeyword,
        match=r"act\(\) has no keyword 'poss'; did you mean 'pos'\? It takes: thing, pos\.",
    ):
        act("x", poss=2)
