"""hk.forward: the model once over the prompts, with hooks."""

import time
from contextlib import suppress
from typing import Any

import torch

from ..arguments import checks_arguments
from ..errors import BadPrompt, EmptySelection
from ..hooks.base import Hook
from ..hooks.capture import Capture
from ..hooks.captured_values import Captured
from ..models.lm import LM
from ..models.padding import logits_of, pads
from ..models.positions import Where
from ..models.prompts import Batch, Prompts, as_batch, pad_id, padded
from ..models.sites import Site
from ..models.training import warn_of_dropout
from .dispatch import Stop
from .manager import HookManager
from .run import Logits, Run, outside_inference_mode, refuse_two_texts, wanted_logits


@outside_inference_mode
@checks_arguments
def forward(lm: LM, prompts: Prompts, *hooks: Hook, logits: Logits = "all") -> Run:
    """Run the model once over the prompts with these hooks.

    `logits` is "all" for every position, "last" for the last one of each prompt (the others are never computed), or
    False: then the model runs only as far as the hooks need.

    >>> run = forward(lm, ["I like oat milk in my", "Tea"], capture("resid_post.6", pos=-1))
    >>> run["resid_post.6"].shape
    torch.Size([2, 1, 576])
    """
    wanted = wanted_logits(logits)
    refuse_two_texts(lm)
    if wanted != "none" and lm.config is not None:
        lm.place(Site("logits"))  # raises where the model gives none
    if wanted == "none" and not hooks:
        raise EmptySelection(
            "the forward was asked for nothing: give it hooks, or logits='all' or 'last'"
        )
    batch = as_batch(lm, prompts)
    if wanted == "last" and (not batch.padded or pads(lm, "left")):
        batch = as_batch(lm, list(batch.rows), side="left")
    if batch.padded and lm.config is not None:
        batch.inputs(lm)  # raises where a padded row would not be the row alone
    manager = HookManager(lm, hooks, stop_early=wanted == "none")
    with_gradients = any(isinstance(hook, Capture) and hook.grad for hook in hooks)
    if with_gradients:
        manager.refuse_checkpoints()
    warn_of_dropout(lm)
    output, started = None, time.perf_counter()
    with torch.set_grad_enabled(with_gradients), manager, suppress(Stop):
        manager.expect(batch)
        output = _called(lm, batch, wanted)
    return Run(
        lm=lm,
        tokens=batch.ids
        if batch.side == "right"
        else padded(batch.rows, pad_id(lm)).to(batch.ids.device),
        mask=batch.mask if batch.side == "right" else batch.mask.flip(1),
        prompt_rows=tuple(range(len(batch.rows))),
        prompt_lengths=tuple(batch.lengths),
        hooks=hooks,
        kept=manager.texts[0],
        kept_logits=None if wanted == "none" else _logits_of(output, batch, wanted),
        settings={"verb": "forward", "logits": wanted, "seconds": time.perf_counter() - started},
        output=output,
        _keeping=manager.keeping,
    )


def _called(lm: LM, batch: Batch, wanted: str) -> Any:
    if lm.config is None:
        if batch.padded:
            raise BadPrompt(
                f"a {type(lm.root).__name__} takes no mask: give prompts of one length, or one at a time"
            )
        return lm.model(batch.ids)
    keep = 1 if wanted == "last" and batch.side == "left" else 0
    return lm.model(
        **batch.inputs(lm), **lm.accepted(use_cache=False, return_dict=True, logits_to_keep=keep)
    )


def _logits_of(output: Any, batch: Batch, wanted: str) -> Captured:
    values = logits_of(output)
    positions = batch.positions
    if wanted == "last" and batch.side == "left":
        positions, values = positions[:, -1:], values[:, -1:]
    elif wanted == "last":
        rows, last = torch.arange(len(batch.rows)), torch.tensor(batch.lengths) - 1
        positions, values = (
            last[:, None],
            values[rows.to(values.device), last.to(values.device)][:, None],
        )
    elif batch.padded:
        fill = ~batch.mask[..., None]
        values = (
            values.masked_fill(fill, 0) if values.requires_grad else values.masked_fill_(fill, 0)
        )
    return Captured(
        Site("logits"), Where(), values, positions, tuple(range(len(batch.rows))), batch.rows
    )
