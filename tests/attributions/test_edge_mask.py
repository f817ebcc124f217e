"""The mask over edges: its top-k, its gradient, and the run in which edges carry a mix of two values."""

import numpy as np
import pandas as pd
import pytest
import torch

import hookkit as hk
from hookkit.attributions.circuit_run import CircuitModel, captured_tensors
from hookkit.attributions.edge_mask import soft_top_k
from hookkit.errors import BadHook, BadPrompt

CLEAN = [[5, 6, 7, 8, 9, 30], [9, 10, 3, 11, 12, 40]]
CORRUPTED = [[5, 6, 17, 8, 9, 30], [9, 11, 3, 11, 14, 40]]
DIFF = hk.metrics.logit_diff(5, 7)
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]


@pytest.mark.parametrize("k", [1.0, 7.5, 39.0])
def test_the_masks_add_up_to_k_with_the_derivative_of_small_steps(k):
    torch.manual_seed(0)
    parameters = 3 * torch.randn(40, dtype=torch.float64)
    masks = soft_top_k(parameters, k)
    assert float(masks.sum()) == pytest.approx(k, abs=1e-9)
    assert masks.argsort().tolist() == parameters.argsort().tolist()
    shift = torch.logit(masks) - parameters
    assert float(shift.max() - shift.min()) < 1e-6  # one shift for all
    parameters.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: soft_top_k(values, k), parameters)


def masked_metric(lm, mask):
    model = CircuitModel.of(lm, CLEAN, CORRUPTED)
    ablated = captured_tensors(model.corrupted_run(CORRUPTED), model.sender_sites)
    last = hk.capture(f"resid_post.{lm.n_layers - 1}", grad=mask.requires_grad)
    run = hk.forward(lm, CLEAN, *model.hooks_of_mask(mask, ablated), last)
    return model.graph, run.logits[:, -1, 5] - run.logits[:, -1, 7]


def allowed(lm):
    return torch.from_numpy(CircuitModel.of(lm, CLEAN, CORRUPTED).graph.allowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_at_the_full_mask_is_minus_edge_attribution(family):
    """An edge that is left out a little carries a little of the corrupted value: EAP by another way."""
    lm = hk.tiny(family)
    mask = ((1 - 1e-5) * allowed(lm).float()).requires_grad_()
    graph, metric = masked_metric(lm, mask)
    (gradient,) = torch.autograd.grad(metric.mean(), mask)
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF)
    rows, columns = graph.find_senders(table["sender"]), graph.find_receivers(table["receiver"])
    scores = table["logit_diff_delta"].to_numpy()
    error = np.abs(gradient.numpy()[rows, columns] + scores).max()
    assert error < 2e-3 * np.abs(scores).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_zeros_and_ones_is_a_circuit(family):
    lm = hk.tiny(family)
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF)
    circuit = hk.circuit(table, share=0.5)
    graph = CircuitModel.of(lm, CLEAN, CORRUPTED).graph
    mask = torch.from_numpy(circuit.mask(graph)).float()
    _, metric = masked_metric(lm, mask)
    expected = DIFF(hk.run_circuit(lm, CLEAN, CORRUPTED, circuit))
    assert metric.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_exact_edge_is_the_model_without_it():
    """hk.edge_attribution(method="exact") and hk.run_circuit patch in two ways."""
    lm = hk.tiny("llama")
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, method="exact")
    full = hk.circuit(table, share=1.0)
    before = DIFF(hk.forward(lm, CLEAN))
    for row in range(0, len(table), 7):
        without = full.with_only(np.arange(len(table)) != row)
        change = DIFF(hk.run_circuit(lm, CLEAN, CORRUPTED, without)) - before
        assert table["logit_diff_delta"][row] == pytest.approx(float(change.mean()), abs=1e-4)


def test_training_keeps_the_metric_and_leaves_the_model_as_it_was():
    lm = hk.tiny("llama")
    weights = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    table = hk.edge_mask(lm, CLEAN, CORRUPTED, DIFF, steps=60)
    assert list(table.columns) == ["sender", "receiver", "mask"] and len(table) == 190
    assert table["mask"].between(0, 1).all()
    assert table["mask"].sum() == pytest.approx(95)
    losses = pd.Series(table.attrs["loss"], index=table.attrs["shares"])
    small = losses.index < 0.5
    assert losses[small].iloc[-10:].mean() < 0.8 * losses[small].iloc[:10].mean()
    for name, weight in lm.model.named_parameters():
        assert torch.equal(weight, weights[name]) and weight.grad is None and weight.requires_grad
    again = hk.edge_mask(lm, CLEAN, CORRUPTED, DIFF, steps=60)
    pd.testing.assert_frame_equal(table, again)
    other = hk.edge_mask(lm, CLEAN, CORRUPTED, DIFF, steps=60, seed=1)
    assert not table["mask"].equals(other["mask"])


def test_what_cannot_be_trained_says_why():
    lm = hk.tiny("llama")
    with pytest.raises(BadHook, match="steps=0"):
        hk.edge_mask(lm, CLEAN, CORRUPTED, DIFF, steps=0)
    with pytest.raises(BadPrompt, match="nothing is ablated"):
        hk.edge_mask(lm, CLEAN, CLEAN, DIFF)
    table = hk.edge_mask(lm, CLEAN, CORRUPTED, DIFF, steps=1)
    with pytest.raises(BadHook, match="masks have no sign"):
        hk.circuit(table, share=0.1, signed="negative")
