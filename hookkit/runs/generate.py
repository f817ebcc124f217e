"""hk.generate: transformers' generate, with hooks, a seed of its own and a record of every step.

torch has one generator of random numbers for the whole process. Runs that draw take turns, so that
the draws of one thread do not change those of another. Code that is not hookkit's does not wait.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..arguments import check_arguments, check_integer, check_seed, describe
from ..errors import BadArgument, NeverFired, UnknownKeyword, Unsupported, did_you_mean
from ..hooks.base import EVERY_STEP, Hook
from ..hooks.capture import Capture, Captured, CaptureLast
from ..models.lm import LM
from ..models.model_setup import warn_of_dropout
from ..models.overrides import PROGRESS
from ..models.padding import check_generation, forward_inputs, plain_generate
from ..models.positions import Where
from ..models.prompts import Batch, Prompts, as_batch, pad_id, pad_rows
from ..models.sites import Site, Sites
from .forward import (
    Logits,
    LogitsOption,
    outside_inference_mode,
    read_logits_option,
    refuse_two_texts,
    select_columns,
)
from .generation import NEUTRAL
from .manager import HookManager
from .run import Run
from .trace import Trace, Tracer
from .worker_thread import accelerator_type

FROM_THE_PROMPTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
COUNTS = {  # the arguments that are whole numbers, with the smallest value of each
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
}
BEAM_RULES = ("early_stopping", "length_penalty")


@outside_inference_mode
@check_arguments
def generate(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    logits: Logits = "all",
    seed: int | None = None,
    trace: Trace | None = None,
    **arguments: Any,
) -> Run:
    """Generates a continuation of the prompts with these hooks.

    Every argument of transformers' `generate` passes through. Prompts are padded on the left.
    `logits` is "all" to keep the logits that chose each token ([row, step, vocab], 4 bytes a
    number), "last" for those of the last step, or False. `seed` seeds the draws of this call and
    leaves torch's own generator as it was; without it the draws are those of transformers in the
    state in which torch is. A generation that draws nothing takes a seed too, and records it.
    `trace` records every step for `candidates` and `decisions`.

    Hooks on logits act first, on the logits of the model; then transformers' own and the user's
    `logits_processor`, in the order of transformers.

    >>> run = generate(lm, "The capital of France is", force(" coffee", step=0), max_new_tokens=3)
    >>> run.generated
    [' coffee.\\n']
    """
    tracer = None if trace is None else Tracer(lm, trace, hooks)
    return generate_with_tracer(lm, prompts, hooks, logits, Draws(lm, seed), tracer, arguments)


@outside_inference_mode
def generate_with_tracer(
    lm: LM,
    prompts: Prompts,
    hooks: tuple[Hook, ...],
    logits: Logits,
    draws: Draws,
    tracer: Tracer | None,
    arguments: dict[str, Any],
) -> Run:
    """`generate`, with a tracer that is called at each step."""
    refuse_two_texts(lm)
    config = _checked_config(lm, draws.seed, arguments)
    if lm.engine is not None:
        from .engines.vllm_client import generate_in_engine

        if tracer is not None:
            lm.refuse_engine("trace= follows transformers' generate")
        return generate_in_engine(lm, prompts, hooks, logits, draws.seed, config, arguments)
    draws.sampling = bool(config.do_sample)
    warn_of_dropout(lm.root)
    option = read_logits_option(logits)
    batch = as_batch(lm, prompts, side="left", room=arguments.get("max_new_tokens") or 0)
    check_generation(
        lm,
        padded=batch.padded,
        chunk=getattr(config, "prefill_chunk_size", None),
        width=batch.ids.shape[1],
        cache=config.cache_implementation,
        rows=batch.rows,
    )
    manager = HookManager(lm, hooks, observers=logit_observers(option), tracer=tracer)
    settings = {"verb": "generate", "logits": option, "arguments": arguments_as_json(arguments)}
    if draws.seed is not None:
        settings["seed"] = draws.seed
    output: Any = None
    started = time.perf_counter()

    def result() -> Run:
        settings["seconds"] = time.perf_counter() - started
        rows, device = manager.rows, batch.ids.device
        sequences_per_prompt = len(rows) // len(batch.rows)
        prompt_rows = tuple(row // sequences_per_prompt for row in range(len(rows)))
        ones = [[1] * len(row) for row in rows]
        return Run(
            lm=lm,
            tokens=pad_rows(rows, pad_id(lm)).to(device),
            mask=pad_rows(ones, 0).bool().to(device),
            prompt_rows=prompt_rows,
            prompt_lengths=tuple(batch.lengths[row] for row in prompt_rows),
            hooks=hooks,
            captures=manager.texts[0],
            kept_logits=_observed_logits(manager, option),
            settings=settings,
            output=output,
            prompts=batch.rows,
            _captures=manager.captures,
            arguments=arguments,
            recorded=None if tracer is None else tracer.recorded,
        )

    try:
        with draws, manager:
            inputs = _inputs(lm, batch, config, arguments)
            manager.expect(batch)
            if lm.decodes_in_pieces:
                whole = partial(plain_generate(lm), lm.root)
                output = manager.generate(whole, **inputs, **arguments)
            else:
                output = lm.model.generate(**inputs, **arguments)  # pyright: ignore
    except NeverFired as error:
        error.run = result()
        raise
    finally:
        manager.close()  # again, since Ctrl-C may have come before `__exit__` began
    return result()


def _inputs(lm: LM, batch: Batch, config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts; a tokenizer for stop strings, and a pad token if the model has none."""
    own = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    inputs: dict[str, Any] = {**forward_inputs(lm, batch.rows, own, batch.ids.shape[1], "left")}
    if config.stop_strings and "tokenizer" not in arguments:
        inputs["tokenizer"] = lm.tokenizer
    if config.pad_token_id is None and not {"generation_config", "pad_token_id"} & set(arguments):
        inputs["pad_token_id"] = pad_id(lm)
    return inputs


def logit_observers(option: LogitsOption) -> list[Hook]:
    """A capture of the logits that chose each token, which the user does not see as a hook."""
    if option == "none":
        return []
    kind = CaptureLast if option == "last" else Capture
    return [kind(Sites((Site("logits"),)), Where(step=EVERY_STEP))]


def _observed_logits(manager: HookManager, option: LogitsOption) -> Captured | None:
    if option == "none":
        return None
    return logits_of_option(manager.captures.observed().captured("logits"), option)


def logits_of_option(captured: Captured, option: LogitsOption) -> Captured:
    """Returns the logits of all steps, or with "last" those of the last step of each row."""
    if option == "all":
        return captured
    assert captured.positions is not None
    last = (captured.positions >= 0).sum(dim=1) - 1
    values = select_columns(captured.values, last)
    return replace(captured, values=values, positions=select_columns(captured.positions, last))


# ---- the arguments


def _checked_config(lm: LM, seed: int | None, arguments: Mapping[str, Any]) -> Any:
    """The generation configuration with the arguments in it; raises for those without effect."""
    _check_names(lm, arguments)
    if seed is not None:
        check_seed(seed)
    config = _effective_config(lm, arguments)
    mode = config.get_generation_mode().value
    if mode in ("greedy_search", "beam_search"):
        _refuse_sampling_rules(arguments)
    if mode == "greedy_search":
        _refuse_beam_rules(arguments)
    return config


def _check_names(lm: LM, arguments: Mapping[str, Any]) -> None:
    from transformers import GenerationConfig, GenerationMixin

    if lm.is_masked:
        raise Unsupported(
            f"{type(lm.root).__name__} has no generate(): it is a masked language model, which "
            "reads a whole text and writes none. Run hk.forward, and read hk.ranks(run, "
            "pos=hk.at('[MASK]'))"
        )
    if not isinstance(lm.root, GenerationMixin):
        raise Unsupported(
            f"{type(lm.root).__name__} has no generate(): give a causal language model of "
            "transformers"
        )
    kind: Any = type(lm.root)
    defaults = GenerationConfig()
    names = set(inspect.signature(plain_generate(lm)).parameters)
    names |= set(inspect.signature(kind.prepare_inputs_for_generation).parameters)
    names |= set(defaults.to_dict()) | lm.takes | {"tokenizer"}
    names |= getattr(lm.model, "special_peft_forward_args", set())
    names -= {"self", "kwargs", "inputs"}
    for name in arguments:
        if name in FROM_THE_PROMPTS:
            raise UnknownKeyword(
                f"{name}= is made from the prompts: give the ids, and a mask with them, as the "
                "prompts"
            )
        if name not in names and not hasattr(defaults, name):
            raise UnknownKeyword(
                f"generate() has no keyword {name!r}{did_you_mean(name, names)} It takes logits, "
                "seed, trace and whatever transformers' generate takes."
            )


def _effective_config(lm: LM, arguments: Mapping[str, Any]) -> Any:
    """The generation configuration with the arguments in it; `BadArgument` if it is invalid."""
    for name, least in COUNTS.items():
        if arguments.get(name) is not None:
            check_integer(arguments[name], name, least=least, error=BadArgument)
    config: Any = arguments.get("generation_config") or lm.root.generation_config
    config = copy.deepcopy(config)
    updates = {name: value for name, value in arguments.items() if hasattr(config, name)}
    try:
        config.update(**updates)
        config.validate()
    except (ValueError, TypeError) as error:
        raise BadArgument(f"transformers' generate refuses its arguments: {error}") from error
    return config


def _refuse_sampling_rules(arguments: Mapping[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        if arguments.get(name) not in (None, neutral):
            raise BadArgument(
                f"{name}={describe(arguments[name])} is a rule of sampling, and this generation "
                f"takes the most likely token: say do_sample=True, or leave {name} out"
            )


def _refuse_beam_rules(arguments: Mapping[str, Any]) -> None:
    for name in BEAM_RULES:
        if arguments.get(name) is not None:
            raise BadArgument(
                f"{name} is a rule of beam search, and num_beams is 1: leave {name} out"
            )


def arguments_as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as JSON can hold them; other objects by the name of their type."""
    plain_types = str | int | float | bool | list | tuple | None
    plain = {}
    for name, value in arguments.items():
        plain[name] = value if isinstance(value, plain_types) else type(value).__name__
    return plain


# ---- random numbers

_TURN = threading.RLock()
PATIENCE = 20.0  # seconds without a forward in any thread after which waiting ends


class Draws:
    """A context in which draws start from a seed; afterwards torch's generators are as before.

    Without a seed the draws are torch's own; `sampling` says whether there are any. All processes
    that hold a split model draw the same.
    """

    def __init__(self, lm: LM, seed: int | None, *, sampling: bool = False) -> None:
        self.lm, self.seed, self.sampling = lm, seed, sampling
        self._turns = 0  # how often this object has acquired the lock
        self._outer_states: Any = None  # of torch's generators outside the context

    def __enter__(self) -> None:
        seed = self.seed
        if seed is None and self.lm.ranks is not None:
            seed = self.lm.ranks.gather_values(int(torch.randint(2**62, ())))[0]
        if seed is None and not self.sampling:
            return
        try:
            self._take_turn()
            if seed is not None:
                self._outer_states = _generator_states()
                torch.manual_seed(seed)
        except BaseException:
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        except BaseException:
            self._end()  # Ctrl-C may have come in the midst of it
            raise

    def _end(self) -> None:
        if self._outer_states is not None:
            _set_generator_states(self._outer_states)
            self._outer_states = None
        self._give_turn()

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """A context inside this one in which others may draw; it does not change the next draw."""
        turns, inner_states = self._turns, None
        if self._outer_states is not None:
            inner_states = _generator_states()
            _set_generator_states(self._outer_states)
        self._give_turn()
        try:
            yield
        finally:
            if turns:
                self._take_turn()
            if inner_states is not None:
                self._outer_states = _generator_states()
                _set_generator_states(inner_states)

    def _take_turn(self) -> None:
        forwards = -1
        while not _TURN.acquire(timeout=PATIENCE):
            if forwards == PROGRESS.forwards:
                raise Unsupported(
                    "another thread draws random numbers in a generate that does not go on: torch "
                    "has one generator for all threads, so let one generate end before the next"
                )
            forwards = PROGRESS.forwards
        self._turns += 1

    def _give_turn(self) -> None:
        while self._turns:
            self._turns -= 1
            _TURN.release()


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    kind = accelerator_type()
    if kind == "cuda":
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    elif kind is not None:
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda":
            torch.cuda.set_rng_state_all(state)
        else:
            torch.get_device_module(kind).set_rng_state(state)
