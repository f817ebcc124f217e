"""What was captured is found by site and name, and what is not there is said."""

import pickle
from dataclasses import replace

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadHook, NotCaptured
from hookkit.hooks.capture import merge_captures


@pytest.fixture(scope="module")
def run(llama):
    return hk.forward(
        llama,
        PROMPTS,
        hk.capture("resid_post", name="before"),
        hk.scale("resid_post.1", 2.0),
        hk.capture("resid_post.1", name="after"),
        hk.capture("z.0"),
    )


def test_two_captures_of_a_site_are_told_apart_by_name(run):
    assert torch.equal(run["resid_post.1", "after"], run["resid_post.1", "before"] * 2)
    with pytest.raises(
        NotCaptured, match=r"resid_post.1 was captured 2 times, with the names 'before', 'after'"
    ):
        run["resid_post.1"]


def test_a_head_of_a_site_captured_with_all_its_heads_is_taken_from_it(run):
    assert torch.equal(run["z.0.3"], run["z.0"][:, :, 3])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("mlp_out.0", "mlp_out.0 was not captured. It has"),
        (
            "resid_post",
            r"Name one layer, such as 'resid_post.0', or stack them with .stack\('resid_post'\)",
        ),
        (("z.0", "other"), "z.0 named 'other' was not captured"),
        ("resid_post.0.1", "'resid_post' has no heads"),
    ],
)
def test_what_is_not_there_is_said(run, key, words):
    with pytest.raises(hk.errors.HookkitError, match=words):
        run[key]


def test_a_run_without_captures_says_how_to_capture(llama):
    with pytest.raises(NotCaptured, match=r"Nothing was: give hk.capture\(site\) to the run"):
        hk.forward(llama, "Tea")["embed"]


def test_captures_with_other_slots_know_their_own_sites(run):
    captures = run.captures
    assert torch.equal(captures["z.0"], run["z.0"])  # the index is made
    others = tuple(slot for slot in captures.slots if str(slot.site) != "z.0")
    with pytest.raises(NotCaptured, match="z.0 was not captured"):
        replace(captures, slots=others)["z.0"]
    assert torch.equal(pickle.loads(pickle.dumps(captures))["z.0"], run["z.0"])


def test_captures_of_several_batches_become_one(llama):
    sites = [
        hk.forward(llama, prompts, hk.capture("embed")).captured("embed")
        for prompts in (PROMPTS[:1], PROMPTS[1:])
    ]
    together = hk.forward(llama, PROMPTS, hk.capture("embed")).captured("embed")
    both = merge_captures(sites)
    assert torch.equal(both.values, together.values)
    assert torch.equal(both.positions, together.positions)
    assert both.rows == together.rows and both.prompts == together.prompts


@pytest.mark.parametrize("to", ["mean", "resample"])
def test_a_tensor_without_rows_has_no_reference(to):
    experts = hk.module("model.layers.0.mlp.experts")  # [token, d] over all rows
    lm = hk.tiny("mixtral")
    prompts = [[1, 2, 3], [4, 5]]
    for over in (prompts, prompts[:1], hk.forward(lm, prompts, hk.capture(experts))):
        with pytest.raises(BadHook, match="no rows and positions of its own"):
            hk.forward(lm, prompts, hk.ablate(experts, to=to, over=over))
