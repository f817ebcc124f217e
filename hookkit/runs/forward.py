"""hk.forward: runs the model once over the prompts, with hooks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadPrompt, EmptySelection, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import Capture, Captured
from ..models.lm import LM, logits_of
from ..models.model_setup import warn_of_dropout
from ..models.padding import can_pad
from ..models.positions import Where
from ..models.prompts import Batch, Prompts, as_batch, pad_id, pad_rows
from ..models.sites import Site
from .kept_tensors import can_keep_tensors
from .manager import HookManager
from .run import Run
from .text_hooks import Stop

LogitsOption: TypeAlias = Literal["all", "last", "none"]
Logits: TypeAlias = LogitsOption | bool | None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes a function return tensors that autograd can use, also in torch.inference_mode.

    The function leaves gradients on or off as they were, also after a Ctrl-C that came while
    torch.no_grad was left.
    """

    @functools.wraps(function)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        gradients = torch.is_grad_enabled()
        if not torch.is_inference_mode_enabled():
            try:
                return function(*args, **kwargs)
            except BaseException:
                torch.set_grad_enabled(gradients)
                raise
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


def refuse_two_texts(lm: LM) -> None:
    """Raises `Unsupported` for an encoder-decoder whose sites are unknown."""
    if lm.two_texts and not lm.family.stacks:
        raise Unsupported(
            f"{type(lm.root).__name__} is an encoder-decoder, which reads one text and writes "
            "another: run it yourself in a block of hk.attach, with hooks at hk.module(path)"
        )


def read_logits_option(logits: Logits) -> LogitsOption:
    """Returns which logits a run keeps; True means "all", False and None mean "none"."""
    if logits in ("all", True):
        return "all"
    if logits in ("none", False, None):
        return "none"
    if logits == "last":
        return "last"
    raise EmptySelection(f"logits={logits!r} is unknown: say 'all', 'last' or False")


@outside_inference_mode
@check_arguments
def forward(lm: LM, prompts: Prompts, *hooks: Hook, logits: Logits = "all") -> Run:
    """Runs the model once over the prompts with these hooks.

    `logits` is "all" for every position, "last" for the last one of each prompt (the others are
    never computed), or False: then the model runs only as far as the hooks need. An engine of vLLM
    computes logits where a token is chosen only: there, say "last" or False.

    >>> run = forward(lm, ["I like oat milk in my", "Tea"], capture("resid_post.6", pos=-1))
    >>> run["resid_post.6"].shape
    torch.Size([2, 1, 576])
    """
    option = read_logits_option(logits)
    refuse_two_texts(lm)
    if option != "none":
        _check_logits(lm)
    elif not hooks:
        raise EmptySelection(
            "the forward was asked for nothing: give it hooks, or logits='all' or 'last'"
        )
    if lm.engine is not None:
        from .engines.vllm_client import forward_in_engine

        return forward_in_engine(lm, prompts, hooks, option)
    batch = _batch_of(lm, prompts, option)
    warn_of_dropout(lm.root)
    started = time.perf_counter()
    manager, output = _run_with_hooks(lm, hooks, batch, option)
    kept_tensors = manager.strategy.kept
    if kept_tensors is not None and kept_tensors.note_overwritten():
        manager, output = _run_with_hooks(lm, hooks, batch, option)
    tokens, mask = _padded_at_the_end(lm, batch)
    return Run(
        lm=lm,
        tokens=tokens,
        mask=mask,
        prompt_rows=tuple(range(len(batch.rows))),
        prompt_lengths=tuple(batch.lengths),
        hooks=hooks,
        captures=manager.texts[0],
        kept_logits=None if option == "none" else _logits_of(output, batch, option),
        settings={"verb": "forward", "logits": option, "seconds": time.perf_counter() - started},
        output=output,
        prompts=batch.rows,
        _captures=manager.captures,
    )


def _run_with_hooks(
    lm: LM, hooks: tuple[Hook, ...], batch: Batch, option: LogitsOption
) -> tuple[HookManager, Any]:
    """Runs the model once. Returns the manager of the hooks, and the model's output."""
    keeps_tensors = can_keep_tensors(lm, hooks)
    manager = HookManager(lm, hooks, stop_early=option == "none", keeps_tensors=keeps_tensors)
    with_gradients = any(isinstance(hook, Capture) and hook.grad for hook in hooks)
    if with_gradients:
        manager.refuse_checkpoints()
    output = None
    try:
        with torch.set_grad_enabled(with_gradients), manager, suppress(Stop):
            manager.expect(batch)
            output = _call_model(lm, batch, option)
    finally:
        manager.close()  # again, since Ctrl-C may have come before `__exit__` began
    return manager, output


def _check_logits(lm: LM) -> None:
    """Raises if a model of transformers has no logits."""
    if lm.config is not None:
        lm.location(Site("logits"))


def _batch_of(lm: LM, prompts: Prompts, option: LogitsOption) -> Batch:
    """The prompts, padded on the left if only the last logits are computed and the model can."""
    batch = as_batch(lm, prompts)
    if option == "last" and (not batch.padded or can_pad(lm, "left", batch.rows)):
        batch = as_batch(lm, list(batch.rows), side="left")
    if batch.padded and lm.config is not None:
        batch.inputs(lm)  # raises if a padded row would not give the same numbers as the row alone
    return batch


def _call_model(lm: LM, batch: Batch, option: LogitsOption) -> Any:
    if lm.config is None:
        if batch.padded:
            raise BadPrompt(
                f"a {type(lm.root).__name__} takes no mask: give prompts of one length, or one at "
                "a time"
            )
        return lm.model(batch.ids)
    keep = 1 if option == "last" and batch.side == "left" else 0
    settings = lm.accepted(use_cache=False, return_dict=True, logits_to_keep=keep)
    return lm.model(**batch.inputs(lm), **settings)


def _padded_at_the_end(lm: LM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens and the mask of a batch, with the padding at the end of each row."""
    if batch.side == "right":
        return batch.ids, batch.mask
    return pad_rows(batch.rows, pad_id(lm)).to(batch.ids.device), batch.mask.flip(1)


def _logits_of(output: Any, batch: Batch, option: LogitsOption) -> Captured:
    """The logits at every position, or at the last position of each row; zero at padding."""
    values, positions = logits_of(output), batch.positions
    if option == "last" and batch.side == "left":
        values, positions = values[:, -1:], positions[:, -1:]
    elif option == "last":
        last = torch.tensor(batch.lengths) - 1
        values, positions = select_columns(values, last), last[:, None]
    elif batch.padded:
        fill = ~batch.mask[..., None]
        mask_values = values.masked_fill if values.requires_grad else values.masked_fill_
        values = mask_values(fill, 0)
    prompts = tuple(range(len(batch.rows)))
    return Captured(Site("logits"), Where(), values, positions, prompts, batch.rows)


def select_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Returns one column of each row of values, as values with one column [row, 1, ...]."""
    rows = torch.arange(len(columns), device=values.device)
    return values[rows, columns.to(values.device)][:, None]
