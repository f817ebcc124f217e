"""hk.generate and hk.forward on a model in vLLM: what goes to the engine, and what comes back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...arguments import describe
from ...errors import Unsupported
from ...hooks.base import Hook
from ...hooks.capture import Capture, Captured, Captures, LazyCapture, capture
from ...hooks.concepts import SwapConcept
from ...hooks.grammar import Grammar
from ...hooks.sources import SourceEdit
from ...models.lm import LM
from ...models.positions import Where
from ...models.prompt_row import PromptRow, Row
from ...models.prompts import Batch, Prompts, as_batch, pad_id, pad_rows
from ...models.sites import AnySite, Site, Sites
from ..forward import Logits, LogitsOption, read_logits_option
from ..generate import arguments_as_json, logit_observers, logits_of_option
from ..generation import NEUTRAL
from ..hook_points import build_hook_points, sort_bound_hooks
from ..run import Run
from .vllm_probe import check_proved
from .vllm_run import SampledRun, ServedResult, ServedRun

# arguments of transformers' generate, by those of vLLM's SamplingParams
SAMPLING: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
}
ALWAYS: Mapping[str, str] = {"repetition_penalty": "repetition_penalty", "stop_strings": "stop"}
READ_APART = {
    "max_new_tokens", "max_length", "min_new_tokens", "do_sample", "eos_token_id", "pad_token_id",
    "bos_token_id", "num_return_sequences", "use_cache", "tokenizer", "generation_config",
    "transformers_version", "_from_model_config",
}  # fmt: skip


def generate_in_engine(
    lm: LM,
    prompts: Prompts,
    hooks: tuple[Hook, ...],
    logits: Logits,
    seed: int | None,
    config: Any,
    arguments: Mapping[str, Any],
) -> Run:
    """`hk.generate` on a model in vLLM, with the configuration in which the arguments are."""
    option = read_logits_option(logits)
    settings = _sampling_settings(lm, config, arguments)
    batch = as_batch(lm, prompts, side="left")
    returned = config.num_return_sequences or 1
    most = _most_new_tokens(config, arguments, batch.ids.shape[1])
    observers = tuple(logit_observers(option))
    eos = frozenset(settings["stop_token_ids"])
    run = ServedRun(hooks, observers, tuple(batch.rows), returned, most, eos)
    started = time.perf_counter()
    result = run_in_engine(lm, run, settings, seed)
    about = {"verb": "generate", "logits": option, "arguments": arguments_as_json(arguments)}
    if seed is not None:
        about["seed"] = seed
    about["seconds"] = time.perf_counter() - started
    prompt_rows = tuple(row // returned for row in range(len(result.rows)))
    kept_logits = None
    if result.observed:
        kept_logits = logits_of_option(result.observed[0], option)
    return served_run(lm, batch, hooks, result, prompt_rows, kept_logits, about, arguments)


def forward_in_engine(
    lm: LM, prompts: Prompts, hooks: tuple[Hook, ...], option: LogitsOption
) -> Run:
    """`hk.forward` on a model in vLLM: one token of each prompt is generated, and dropped."""
    if option == "all":
        raise Unsupported(
            "the logits at every position were asked for, and vLLM computes logits only where a "
            "token is chosen: say logits='last', or logits=False for captures alone; load the "
            "model without engine= for all logits"
        )
    batch = as_batch(lm, prompts)
    observers: tuple[Hook, ...] = ()
    if option == "last":
        observers = (Capture(Sites((Site("logits"),)), Where(-1)),)
    started = time.perf_counter()
    result = read_in_engine(lm, hooks, observers, batch)
    seconds = time.perf_counter() - started
    about = {"verb": "forward", "logits": option, "seconds": seconds}
    kept_logits = None
    if result.observed:
        kept_logits = replace(result.observed[0], where=Where())
    rows = tuple(range(len(batch.rows)))
    return served_run(lm, batch, hooks, result, rows, kept_logits, about, {})


def read_in_engine(
    lm: LM, hooks: tuple[Hook, ...], observers: tuple[Hook, ...], batch: Batch
) -> ServedResult:
    """Reads prompts once; the token that is generated after each of them is left out."""
    settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    run = ServedRun(hooks, observers, tuple(batch.rows), 1, 1, frozenset(), is_forward=True)
    result = run_in_engine(lm, run, settings, None)
    return replace(result, rows=[row[:-1] for row in result.rows])


def served_run(
    lm: LM,
    batch: Batch,
    hooks: tuple[Hook, ...],
    result: ServedResult,
    prompt_rows: tuple[int, ...],
    kept_logits: Captured | None,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Run:
    """Returns the run of a result of the engine."""
    slots = [LazyCapture(values.site, values.name, None, values) for values in result.captures]
    ones = [[1] * len(row) for row in result.rows]
    run = Run(
        lm=lm,
        tokens=pad_rows(result.rows, pad_id(lm)),
        mask=pad_rows(ones, 0).bool(),
        prompt_rows=prompt_rows,
        prompt_lengths=tuple(batch.lengths[row] for row in prompt_rows),
        hooks=hooks,
        captures=Captures(tuple(slots)),
        kept_logits=kept_logits,
        settings=settings,
        output=None,
        _captures=None,
        arguments=arguments,
        prompts=batch.rows,
    )
    log = result.log[result.log["hook"] < len(hooks)].reset_index(drop=True)
    run.__dict__["log"] = log
    return run


def run_in_engine(
    lm: LM, run: ServedRun, settings: Mapping[str, Any], seed: int | None
) -> ServedResult:
    """Checks the hooks of a run, sends it to the engine, and returns what the engine computed.

    The references of the run, and the order of its hooks, are added here.
    """
    engine = lm.engine
    assert engine is not None
    _check_hooks(lm, (*run.hooks, *run.observers))
    _check_prompts(lm, run.prompts, run.most)
    check_proved(lm)
    references: list[tuple[tuple[Any, ...], dict[AnySite, Captured]]] = []

    def reference(sites: Sequence[AnySite], others: tuple[Any, ...]) -> dict[AnySite, Captured]:
        values = reference_in_engine(lm, sites, others)
        references.append((others, values))
        return values

    points = build_hook_points(lm, run.hooks, reference, run.observers)
    order = [(bound_hook.number, bound_hook.site) for bound_hook in sort_bound_hooks(points)]
    run = replace(run, references=references, order=order)
    seeds: list[int | None] = [None] * len(run.rows)
    if seed is not None:
        seeds = [seed + row for row in run.rows]
    salts: list[str | None] = [None] * len(run.rows)
    if engine.arguments.get("enable_prefix_caching") and (run.hooks or run.observers):
        salts = [secrets.token_hex(16) for _ in run.rows]
    sampled = SampledRun(run, {**settings, "max_tokens": run.most}, seeds, salts)
    return engine.run(sampled, lm.dictionaries)


def reference_in_engine(
    lm: LM, sites: Sequence[AnySite], prompts: tuple[Any, ...]
) -> dict[AnySite, Captured]:
    """Returns the values at these sites on other prompts."""
    batch = as_batch(lm, list(prompts))
    result = read_in_engine(lm, (capture(Sites(tuple(sites))),), (), batch)
    return {values.site: values for values in result.captures}


# ---- what is refused, and the arguments


def _check_hooks(lm: LM, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        if isinstance(hook, Capture) and hook.grad:
            lm.refuse_engine(f"{hook} needs gradients")
        if isinstance(hook, Capture) and hook.device not in (None, "cpu"):
            lm.refuse_engine(f"{hook} has device={hook.device!r}, and captures come to the CPU")
        if isinstance(hook, SourceEdit | SwapConcept):
            lm.refuse_engine(f"{hook} reads another forward, or another part of this one")
        if isinstance(hook, Grammar):
            lm.refuse_engine(f"{hook} checks the rules of transformers' generate")


def _check_prompts(lm: LM, prompts: Sequence[Row], most: int) -> None:
    assert lm.engine is not None
    context = lm.engine.facts["context"]
    for row, ids in enumerate(prompts):
        if isinstance(ids, PromptRow) and ids.has_inputs:
            names = ", ".join({**ids.inputs, **ids.per_token}) or "a text for an encoder"
            lm.refuse_engine(f"prompt {row} has {names}, and is to be token ids alone")
        if len(ids) + most > context:
            raise Unsupported(
                f"row {row} has {len(ids)} tokens and may write {most}, and the engine was started "
                f"for {context}: load the model with a larger max_model_len"
            )


def _sampling_settings(lm: LM, config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of vLLM's `SamplingParams`; raises for what it does in another way."""
    neutral = {**NEUTRAL, "repetition_penalty": 1.0, "num_beams": 1}
    known = {*SAMPLING, *ALWAYS, *READ_APART}
    for name, value in {**config.to_diff_dict(), **arguments}.items():
        if name not in known and value not in (None, False, neutral.get(name)):
            lm.refuse_engine(f"{name}={describe(value)} is a rule of transformers' generate")
    eos = config.eos_token_id
    ids = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    settings: dict[str, Any] = {
        "ignore_eos": True,  # the end tokens are those of the configuration
        "stop_token_ids": ids,
        "min_tokens": config.min_new_tokens or 0,
        "skip_special_tokens": False,
        "detokenize": bool(config.stop_strings),
        "temperature": 0.0,
    }
    for name, own_name in ALWAYS.items():
        if getattr(config, name, None) is not None:
            settings[own_name] = getattr(config, name)
    if config.do_sample:
        settings["temperature"] = 1.0
        for name, own_name in SAMPLING.items():
            if getattr(config, name, None) is not None:
                settings[own_name] = getattr(config, name)
    return settings


def _most_new_tokens(config: Any, arguments: Mapping[str, Any], width: int) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    return max(1, (config.max_length or 20) - width * ("max_length" in arguments))
