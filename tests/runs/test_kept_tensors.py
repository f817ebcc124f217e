"""Captures that keep the model's tensors: the same values as copies, whatever writes in place afterwards."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

import hookkit as hk
from hookkit.runs.kept_tensors import can_keep_tensors, overwritten

IDS = [[31, 32, 33, 34], [41, 42, 43, 44]]


def by_hand(lm: hk.LM, path: str, ids: list[list[int]] = IDS) -> Tensor:
    """A copy of a module's output, made at once, in plain transformers."""
    copies = []

    def copy(module, arguments, output):
        copies.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = lm.model.get_submodule(path).register_forward_hook(copy)
    try:
        with torch.no_grad():
            lm.model(input_ids=torch.tensor(ids))
    finally:
        handle.remove()
    return copies[0]


def test_a_capture_of_the_stream_is_the_models_own_tensor():
    lm = hk.tiny("llama")
    pointers = []
    sites = ["resid_post.0", "resid_post.1", "resid_post.2", "attn_out.1", "mlp_out.1"]
    run = hk.forward(lm, IDS, hk.capture(sites))
    assert len({run[site].data_ptr() for site in sites}) == len(sites)
    for site, path in (
        ("resid_post.1", "model.layers.1"),
        ("attn_out.1", "model.layers.1.self_attn"),
    ):
        assert torch.equal(run[site], by_hand(lm, path))

    def look(values: Tensor) -> Tensor:
        pointers.append(values.data_ptr())
        return values

    watched = hk.tiny("llama")
    inner = watched.model.model.layers[1].forward
    watched.model.model.layers[1].forward = lambda *args, **kwargs: look(inner(*args, **kwargs))
    run = hk.forward(watched, IDS, hk.capture("resid_post"))
    assert run["resid_post.1"].data_ptr() == pointers[0]


def test_writing_into_one_capture_changes_no_other():
    lm = hk.tiny("llama")
    hooks = [hk.capture("resid_post"), hk.capture(["resid_pre", "resid_mid"], name="others")]
    run = hk.forward(lm, IDS, *hooks)
    before = {site: run[site, "others"].clone() for site in ("resid_pre.1", "resid_pre.2")}
    logits = run.logits.clone()
    run["resid_post.0"].zero_()
    run["resid_post.1"].zero_()
    assert all(torch.equal(run[site, "others"], values) for site, values in before.items())
    assert torch.equal(run.logits, logits)
    again = hk.forward(lm, IDS, *hooks)
    assert torch.equal(again["resid_pre.1", "others"], before["resid_pre.1"])


@pytest.mark.parametrize("name", ["falcon", "llama4_text", "gpt2", "bloom", "gemma4_text"])
def test_a_family_that_writes_in_place_is_captured_right(name):
    lm = hk.tiny(name)
    sites = [
        f"{site}.{layer}" for site in ("attn_out", "mlp_out", "resid_post") for layer in (0, 1)
    ]
    run = hk.forward(lm, IDS, hk.capture(sites))
    for site in sites:
        location = lm.location(lm.sites(site)[0])
        if location.side == "output":
            expected = by_hand(lm, location.path).reshape(run[site].shape)
            assert torch.equal(run[site], expected), site
    if name == "falcon":  # its blocks add into the MLP's output
        assert {location.path for location in overwritten(lm)} >= {"transformer.h.0.mlp"}


def test_what_may_write_afterwards_means_copies():
    lm = hk.tiny("llama")
    whole = hk.capture("resid_post")
    assert can_keep_tensors(lm, [whole])
    assert not can_keep_tensors(lm, [whole, hk.ablate("z.1.0")])
    assert not can_keep_tensors(lm, [hk.capture("resid_post", grad=True)])
    expected = by_hand(lm, "model.layers.1")

    def double(module, arguments):
        arguments[0].mul_(2)

    handle = lm.model.model.layers[2].register_forward_pre_hook(double)
    assert not can_keep_tensors(lm, [whole])
    assert torch.equal(hk.forward(lm, IDS, whole)["resid_post.1"], expected)
    handle.remove()
    lm.model.train()
    assert not can_keep_tensors(lm, [whole])


def test_a_module_that_writes_in_place_is_found_at_its_first_forward_and_copied_from_then_on():
    lm = hk.tiny("llama")
    block = lm.model.model.layers[2]
    inner, calls = block.forward, []

    def forward(hidden, *args, **kwargs):
        calls.append(hidden.data_ptr())
        return inner(hidden.mul_(1.5), *args, **kwargs)

    block.forward = forward
    expected = by_hand(lm, "model.layers.1")
    calls.clear()
    assert torch.equal(hk.forward(lm, IDS, hk.capture("resid_post"))["resid_post.1"], expected)
    assert len(calls) == 2  # it ran again
    assert torch.equal(hk.forward(lm, IDS, hk.capture("resid_post"))["resid_post.1"], expected)
    assert len(calls) == 3
    stopped = hk.forward(lm, IDS, hk.capture(["resid_post.1", "resid_post.2"]), logits=False)
    assert torch.equal(stopped["resid_post.1"], expected)


def test_a_thousand_forwards_leak_nothing():
    lm = hk.tiny("llama")
    gc.collect()
    references = []
    for _ in range(1000):
        run = hk.forward(lm, IDS, hk.capture("resid_post"))
        references.append(weakref.ref(run["resid_post.1"]))
    del run
    gc.collect()
    assert sum(reference() is not None for reference in references) == 0
