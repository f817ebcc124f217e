"""hk.generate: transformers' generate, with hooks, a seed of its own and a record of every step."""

import copy
import inspect
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..arguments import checks_arguments, described, seed_of, whole_number
from ..errors import BadArgument, NeverFired, UnknownKeyword, Unsupported, did_you_mean
from ..hooks.base import EVERY_STEP, Hook
from ..hooks.capture import Capture, CaptureLast
from ..hooks.captured_values import Captured, Captures
from ..models.lm import LM
from ..models.padding import check_generation
from ..models.positions import Where
from ..models.prompts import Batch, Prompts, as_batch, pad_id, padded
from ..models.sites import Site, Sites
from ..models.training import warn_of_dropout
from .generation import NEUTRAL
from .manager import HookManager
from .random_state import Draws
from .run import Logits, Run, outside_inference_mode, refuse_two_texts, wanted_logits
from .trace import Trace, Tracer


@outside_inference_mode
@checks_arguments
def generate(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    logits: Logits = "all",
    seed: int | None = None,
    trace: Trace | None = None,
    **arguments: Any,
) -> Run:
    """Let the model go on from the prompts with these hooks. Every argument of transformers' `generate` passes through.

    Prompts are padded on the left. `logits` is "all" to keep the logits that chose each token ([row, step, vocab], 4
    bytes a number), "last" for those of the last step, or False. `seed` seeds this call's draws and leaves torch's own
    generator as it was; without it the draws are those of transformers in the state torch is in. A generation that
    draws nothing takes a seed too, and has it on record. `trace` records every step for `decoding` and `decisions`.

    Hooks on logits act first, on what the model says; then transformers' own and the user's `logits_processor`, in the
    order of transformers.

    >>> generate(lm, "The capital of France is", force(" coffee", step=0), max_new_tokens=3).generated
    [' coffee.\\n']
    """
    tracer = None if trace is None else Tracer(lm, trace, hooks)
    return traced(lm, prompts, hooks, logits, Draws(lm, seed), tracer, arguments)


@outside_inference_mode
def traced(
    lm: LM,
    prompts: Prompts,
    hooks: tuple[Hook, ...],
    logits: Logits,
    draws: Draws,
    tracer: Tracer | None,
    arguments: Mapping[str, Any],
) -> Run:
    """`generate` with a tracer that is told of each step."""
    refuse_two_texts(lm)
    _check_arguments(lm, arguments)
    _check_effects(lm, draws.seed, arguments)
    warn_of_dropout(lm)
    wanted = wanted_logits(logits)
    config: Any = arguments.get("generation_config") or lm.root.generation_config
    draws.sampling = bool(arguments.get("do_sample", config.do_sample))
    batch = as_batch(lm, prompts, side="left", room=arguments.get("max_new_tokens") or 0)
    chunk, cache = (
        _setting(lm, arguments, name) for name in ("prefill_chunk_size", "cache_implementation")
    )
    check_generation(lm, padded=batch.padded, chunk=chunk, width=batch.ids.shape[1], cache=cache)
    kind = CaptureLast if wanted == "last" else Capture
    own = kind(Sites((Site("logits"),)), Where(step=EVERY_STEP), name="hookkit.generate")
    manager = HookManager(lm, [*hooks, own] if wanted != "none" else hooks, tracer=tracer)
    ids = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    settings = {"verb": "generate", "logits": wanted, "arguments": _plain(arguments)}
    settings |= {} if draws.seed is None else {"seed": draws.seed}
    output: Any = None
    started = time.perf_counter()

    def run() -> Run:
        settings["seconds"] = time.perf_counter() - started
        return _generated(lm, batch, hooks, own, manager, settings, arguments, output)

    try:
        with draws, manager:
            output = lm.model.generate(**ids, **_defaults(lm, arguments), **arguments)  # pyright: ignore
    except NeverFired as error:
        error.run = run()
        raise
    return run()


def _generated(
    lm: LM,
    batch: Batch,
    hooks: tuple[Hook, ...],
    own: Capture,
    manager: HookManager,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    output: Any,
) -> Run:
    rows, kept = manager.rows, manager.texts[0]
    prompt_rows = [row * len(batch.rows) // len(rows) for row in range(len(rows))]
    return Run(
        lm=lm,
        tokens=padded(rows, pad_id(lm)).to(batch.ids.device),
        mask=padded([[1] * len(row) for row in rows], 0).bool().to(batch.ids.device),
        prompt_rows=tuple(prompt_rows),
        prompt_lengths=tuple(batch.lengths[row] for row in prompt_rows),
        hooks=hooks,
        kept=Captures(tuple(slot for slot in kept.slots if slot.name != own.name), kept.ended),
        kept_logits=_own_logits(kept, own, settings["logits"]),
        settings=settings,
        output=output,
        _keeping=manager.keeping,
        arguments=arguments,
        recorded=None if manager.tracer is None else manager.tracer.recorded,
    )


def _own_logits(kept: Captures, own: Capture, wanted: str) -> Captured | None:
    if wanted == "none":
        return None
    found = kept.captured("logits", own.name)
    return found if wanted == "all" else _last_step(found)


def _last_step(found: Captured) -> Captured:
    assert found.positions is not None
    last = (found.positions >= 0).sum(dim=1) - 1
    rows = torch.arange(len(last))
    picked = found.values[rows.to(found.values.device), last.to(found.values.device)][:, None]
    return replace(found, values=picked, positions=found.positions[rows, last][:, None])


def _check_arguments(lm: LM, arguments: Mapping[str, Any]) -> None:
    """Raise `UnknownKeyword` for an argument that neither `generate` nor the model knows."""
    from transformers import GenerationConfig, GenerationMixin

    if not isinstance(lm.root, GenerationMixin):
        raise Unsupported(
            f"{type(lm.root).__name__} has no generate(): give a causal language model of transformers"
        )
    kind: Any = type(lm.root)
    signature = set(inspect.signature(kind.generate).parameters)
    prepared = set(inspect.signature(kind.prepare_inputs_for_generation).parameters)
    known = signature | prepared | set(GenerationConfig().to_dict()) | lm.takes | {"tokenizer"}
    known |= getattr(lm.model, "special_peft_forward_args", set())
    known -= {"self", "kwargs", "inputs"}
    for name in arguments:
        if name in ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            raise UnknownKeyword(
                f"{name}= is made from the prompts: give the ids, and a mask with them, as the prompts"
            )
        if name not in known and not hasattr(GenerationConfig(), name):
            raise UnknownKeyword(
                f"generate() has no keyword {name!r}{did_you_mean(name, known)} It takes logits, seed, trace and "
                "whatever transformers' generate takes."
            )


def _setting(lm: LM, arguments: Mapping[str, Any], name: str) -> Any:
    """What generate is going to use: what was given, or what a configuration says."""
    config: Any = arguments.get("generation_config") or lm.root.generation_config
    value = arguments.get(name)
    return value if value is not None else getattr(config, name, None)


COUNTS = (
    "max_new_tokens",
    "min_new_tokens",
    "max_length",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "top_k",
)
BEAM_RULES = ("early_stopping", "length_penalty")


def _check_effects(lm: LM, seed: int | None, arguments: Mapping[str, Any]) -> None:
    """Raise where an argument cannot be, or would have no effect on this generation."""
    for name in COUNTS:
        if arguments.get(name) is not None:
            least = 0 if name in ("top_k", "min_new_tokens", "min_length") else 1
            whole_number(arguments[name], name, least=least, error=BadArgument)
    config = _configured(lm, arguments)
    if seed is not None:
        seed_of(seed)
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "beam_search"):
        return
    rules = [
        name for name, neutral in NEUTRAL.items() if arguments.get(name) not in (None, neutral)
    ]
    if rules:
        raise BadArgument(
            f"{rules[0]}={described(arguments[rules[0]])} is a rule of sampling, and this generation takes the most "
            f"likely token: say do_sample=True, or leave {rules[0]} out"
        )
    if mode == "greedy_search":
        for name in BEAM_RULES:
            if arguments.get(name) is not None:
                raise BadArgument(
                    f"{name} is a rule of beam search, and num_beams is 1: leave {name} out"
                )


def _configured(lm: LM, arguments: Mapping[str, Any]) -> Any:
    """What decides this generation: the configuration, with the arguments in it. `BadArgument` where it is refused."""
    config: Any = copy.deepcopy(arguments.get("generation_config") or lm.root.generation_config)
    own = {name: value for name, value in arguments.items() if hasattr(config, name)}
    try:
        config.update(**own)
        config.validate()
    except (ValueError, TypeError) as error:
        raise BadArgument(f"transformers' generate refuses its arguments: {error}") from error
    return config


def _defaults(lm: LM, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What generate needs and the LM knows: a tokenizer for stop strings, a pad token where the model names none."""
    config: Any = arguments.get("generation_config") or lm.root.generation_config
    found: dict[str, Any] = {}
    if arguments.get("stop_strings") or config.stop_strings:
        found["tokenizer"] = lm.tokenizer
    if (
        arguments.get("pad_token_id") is None
        and config.pad_token_id is None
        and "generation_config" not in arguments
    ):
        found["pad_token_id"] = pad_id(lm)
    return found


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON can hold them; objects by the name of their kind."""
    simple = str | int | float | bool | None
    return {
        name: value if isinstance(value, (simple, list | tuple)) else type(value).__name__
        for name, value in arguments.items()
    }
