"""hk.edge_mask: a mask over all edges, trained by gradient with the weights frozen.

Every edge has one parameter. For a circuit of k edges the mask is sigmoid(parameter + shift), with
the shift at which the masks of all edges add up to k (a limited multi-label projection: Amos et al.
2019). A receiver reads each sender's value times the edge's mask plus its corrupted value times
(1 - mask), as in Edge Pruning (Bhaskar et al. 2024), which has a penalty and a training for each
size instead. Here each step draws k anew, so that one training ranks the edges for every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_number, check_seed
from ..errors import BadHook, BadPrompt
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.model_setup import freeze_weights
from ..models.prompts import Prompts
from ..models.sites import Site
from ..tables.metrics.metric import MetricLike
from .backward import CAPTURE_NAME, PromptMetric, bind_pair
from .circuit_run import CircuitModel, Values, captured_tensors

LEAST_SHARE = 0.01  # of all edges, the smallest circuit that is drawn


class SoftTopK(torch.autograd.Function):
    """The masks sigmoid(parameters + shift) that add up to k."""

    @staticmethod
    def forward(ctx: Any, parameters: Float[Tensor, " edge"], k: float) -> Float[Tensor, " edge"]:
        low, high = -parameters.max() - 50, -parameters.min() + 50
        for _ in range(80):
            shift = (low + high) / 2
            is_low = torch.sigmoid(parameters + shift).sum() < k
            low, high = torch.where(is_low, shift, low), torch.where(is_low, high, shift)
        masks = torch.sigmoid(parameters + (low + high) / 2)
        ctx.save_for_backward(masks)
        return masks

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (masks,) = ctx.saved_tensors
        slopes = masks * (1 - masks)  # the shift moves so that the sum stays k
        mean = (slopes * gradients[0]).sum() / slopes.sum()
        return slopes * (gradients[0] - mean), None


def soft_top_k(parameters: Float[Tensor, " edge"], k: float) -> Float[Tensor, " edge"]:
    """Returns masks between 0 and 1 that add up to k, in the order of the parameters."""
    masks = SoftTopK.apply(parameters, k)
    assert isinstance(masks, Tensor)
    return masks


@check_arguments
def edge_mask(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metric: MetricLike,
    *,
    steps: int = 100,
    lr: float = 0.3,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns a mask of every edge, trained so that circuits of all sizes keep the metric: the
    larger, the sooner an edge belongs into a circuit.

    The clean prompts run, and what an edge leaves out has its value on the corrupted prompt. The
    loss of a step is |metric of the masked run - metric of the clean run|, the mean over prompts,
    relative to that of the corrupted run. The weights are frozen (Edge Pruning: Bhaskar et al.
    2024), and the sigmoid top-k of Amos et al. (2019) makes the masks add up to a number of edges
    that each step draws anew, from 1 % of all to all, so that one training serves every size. It
    starts with equal masks.

    steps       how many steps of Adam, each a masked forward and backward
    lr          the learning rate of the masks' parameters
    batch_size  how many pairs a step has at most, one batch after the other
    seed        of the sizes that are drawn

    Columns: sender, receiver, mask (0 to 1, that of a circuit of half of all edges). `hk.circuit`
    and `hk.faithfulness` take the table. `attrs` has the metric and the `loss` of each step, whose
    sizes are in `attrs["shares"]`. Raises `Unsupported` as `run_circuit` does.

    >>> table = hk.edge_mask(lm, clean, corrupted, hk.metrics.logit_diff(5, 7), steps=3)
    >>> list(table.columns)
    ['sender', 'receiver', 'mask']
    """
    check_integer(steps, "steps", least=1, meaning="how many steps,", error=BadHook)
    check_integer(batch_size, "batch_size", least=1, meaning="how many pairs,", error=BadHook)
    check_number(lr, "lr", above=0.0)
    lm.refuse_engine("a mask over edges is trained with gradients")
    draws = torch.Generator().manual_seed(check_seed(seed))
    target, source = bind_pair(lm, clean, corrupted, metric, "noise", ())
    model = CircuitModel.of(lm, target.inputs.rows, source.inputs.rows)
    pairs = zip(target.batches(batch_size), source.batches(batch_size), strict=True)
    batches = [_read_batch(model, *pair) for pair in pairs]
    scale = float(torch.cat([(batch.clean - batch.none).abs() for batch in batches]).mean())
    if not scale:
        raise BadPrompt(
            f"{target.metric.name} is the same for every clean prompt and its corrupted prompt: "
            "there is nothing that a mask could keep"
        )
    allowed = torch.from_numpy(model.graph.allowed)
    n_edges = int(allowed.sum())
    parameters = torch.zeros(n_edges, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=lr)
    keep_graph = capture(Site("resid_post", lm.n_layers - 1), grad=True, name=CAPTURE_NAME)
    losses, shares = [], []
    for step in range(steps):
        share = LEAST_SHARE ** float(torch.rand((), generator=draws))
        batch = batches[step % len(batches)]
        with torch.inference_mode(False), torch.enable_grad(), freeze_weights(lm.model):
            masks = soft_top_k(parameters, max(1.0, share * n_edges))
            mask = torch.zeros(allowed.shape).masked_scatter(allowed, masks.float())
            masked = batch.target.run(*model.hooks_of_mask(mask, batch.ablated), keep_graph)
            loss = (batch.target.of_run(masked) - batch.clean).abs().mean() / scale
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        shares.append(share)
    senders, receivers = allowed.nonzero().T.tolist()
    table = pd.DataFrame(
        {
            "sender": [model.graph.senders[number] for number in senders],
            "receiver": [model.graph.receivers[number] for number in receivers],
            "mask": soft_top_k(parameters.detach(), n_edges / 2).numpy(),
        }
    )
    table.attrs = {"metric": target.metric.name, "direction": "noise", "method": "mask"}
    table.attrs |= {"loss": losses, "shares": shares}
    return table


@dataclass(frozen=True, eq=False)
class _Batch:
    """Clean prompts, the metric of each, and that of its corrupted prompt with the ablated values
    of all senders."""

    target: PromptMetric
    ablated: Values
    clean: Float[Tensor, " row"]
    none: Float[Tensor, " row"]


def _read_batch(model: CircuitModel, target: PromptMetric, source: PromptMetric) -> _Batch:
    run = source.run(capture(model.sender_sites, name=CAPTURE_NAME))
    ablated = captured_tensors(run, model.sender_sites)
    return _Batch(target, ablated, target.of_run(target.run()), target.of_run(run))
