"""Runs: one forward or one generate of a model with hooks, and all that came of it.

    run = hk.forward(lm, ["I like oat milk in my"], hk.capture("resid_post.6"))
    run = hk.generate(lm, "The capital of France is", hk.force(" coffee", step=0), max_new_tokens=8)

Everything in a run is in the positions of each row's own text: column 0 is the row's first token, whatever the padding
was, and a shorter row is filled up at its end, where `run.mask` is False.
"""

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .captured import Captured, Kept
from .errors import (
    BadPrompt,
    EmptySelection,
    NeverFired,
    NotCaptured,
    UnknownKeyword,
    Unsupported,
    checks_keywords,
    did_you_mean,
)
from .hooks.base import EVERY_STEP, Hook
from .hooks.looking import Capture
from .manager import HookManager, Stop
from .model import LM
from .positions import Where
from .prompts import Batch, Prompts, as_batch, pad_id, padded
from .sites import AnySite, Site, Sites
from .tracing import Recorded, Trace, Tracer
from .training import warn_of_dropout

Logits: TypeAlias = Literal["all", "last", "none"] | bool | None


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What one forward or generate gave.

    tokens          [row, pos]   ids, the generated ones included; a shorter row is filled up at its end
    mask            [row, pos]   True for real tokens
    prompt_rows     the prompt that each row is of (several rows are of one prompt where several sequences return)
    prompt_lengths  how many tokens of each row are its prompt
    output          what transformers returned
    arguments       what generate was given for transformers
    recorded        the record of each step of a generate with trace=, for `decoding` and `decisions`
    """

    lm: LM
    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    prompt_rows: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    hooks: tuple[Hook, ...]
    kept: Kept
    kept_logits: Captured | None
    settings: Mapping[str, Any]
    output: Any
    _manager: HookManager
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: Recorded | None = None

    @property
    def logits(self) -> Float[Tensor, "row pos vocab"]:
        """The logits that the model returned, every edit in them: [row, pos, vocab] of a forward, one position for
        logits="last"; of a generate [row, step, vocab], those that chose each generated token."""
        return self.captured_logits().values

    def captured_logits(self) -> Captured:
        """The logits, with the position at which each stands. `NotCaptured` where the run did not keep them."""
        if self.kept_logits is None:
            raise NotCaptured("this run kept no logits: it was made with logits=False; make it with logits='all'")
        return self.kept_logits

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return self.mask.sum(dim=1).tolist()

    @cached_property
    def text(self) -> list[str]:
        """Each row as text, special tokens included."""
        return [self.lm.text(row[:length]) for row, length in zip(self.tokens.tolist(), self.lengths, strict=True)]

    @cached_property
    def generated(self) -> list[str]:
        """What the model wrote behind each prompt, as text; empty for a forward."""
        rows = zip(self.tokens.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [self.lm.text(row[start:end]) if end > start else "" for row, start, end in rows]

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        """The captured values at a site [row, pos, ...]; `run[site, name]` where several captures kept it."""
        return self.kept[key]

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The captured values at a site, with their rows and positions."""
        return self.kept.captured(site, name)

    @property
    def sites(self) -> Sites:
        """The sites that were captured."""
        return self.kept.sites

    def stack(self, name: str) -> Tensor:
        """The captured values of every layer of a site, such as "resid_post": [layer, row, pos, ...]."""
        return self.kept.stack(name)

    @cached_property
    def log(self) -> pd.DataFrame:
        """Where each hook fired. Columns: hook, do, site, forward, row, positions, numbers, changed."""
        log = self._manager.log
        return pd.DataFrame(log[log["hook"] < len(self.hooks)]).reset_index(drop=True)

    @cached_property
    def about(self) -> dict[str, Any]:
        """How the run was made: model, versions, prompts, hooks, settings; plain values, ready for JSON."""
        from .about import about_model

        prompts = [self.lm.text(row[:end]) for row, end in zip(self.tokens.tolist(), self.prompt_lengths, strict=True)]
        hooks = [hook.to_json(tensors="digest") for hook in self.hooks]
        return {**about_model(self.lm), "prompts": prompts, "hooks": hooks, **self.settings}

    def __repr__(self) -> str:
        rows = f"{len(self.lengths)} row{'s' if len(self.lengths) > 1 else ''} of up to {max(self.lengths)} tokens"
        logits = "no logits" if self.kept_logits is None else f"logits {list(self.kept_logits.values.shape)}"
        return f"Run({rows}; {logits}; captured {self.sites})"


@checks_keywords
def forward(lm: LM, prompts: Prompts, *hooks: Hook, logits: Logits = "all") -> Run:
    """Run the model once over the prompts with these hooks.

    `logits` is "all" for every position, "last" for the last one of each prompt (the others are never computed), or
    False: then the model runs only as far as the hooks need.

    >>> run = forward(lm, ["I like oat milk in my", "Tea"], capture("resid_post.6", pos=-1))
    >>> run["resid_post.6"].shape
    torch.Size([2, 1, 576])
    """
    wanted = _wanted(logits)
    _refuse_two_texts(lm)
    if wanted != "none" and lm.config is not None:
        lm.place(Site("logits"))  # raises where the model gives none
    if wanted == "none" and not hooks:
        raise EmptySelection("the forward was asked for nothing: give it hooks, or logits='all' or 'last'")
    batch = as_batch(lm, prompts, side="left" if wanted == "last" else "right")
    manager = HookManager(lm, hooks, stop_early=wanted == "none")
    with_gradients = any(isinstance(hook, Capture) and hook.grad for hook in hooks)
    if with_gradients:
        manager.refuse_checkpoints()
    warn_of_dropout(lm)
    output, started = None, time.perf_counter()
    with torch.set_grad_enabled(with_gradients), manager, suppress(Stop):
        manager.follower.expect(batch)
        output = _called(lm, batch, wanted)
    return Run(
        lm=lm,
        tokens=batch.ids if batch.side == "right" else padded(batch.rows, pad_id(lm)).to(batch.ids.device),
        mask=batch.mask if batch.side == "right" else batch.mask.flip(1),
        prompt_rows=tuple(range(len(batch.rows))),
        prompt_lengths=tuple(batch.lengths),
        hooks=hooks,
        kept=manager.texts[0],
        kept_logits=None if wanted == "none" else _logits_of(output, batch, wanted),
        settings={"verb": "forward", "logits": wanted, "seconds": time.perf_counter() - started},
        output=output,
        _manager=manager,
    )


def _refuse_two_texts(lm: LM) -> None:
    if lm.two_texts:
        raise Unsupported(
            f"{type(lm.root).__name__} is an encoder-decoder, which reads one text and writes another: run it yourself "
            "in a block of hk.attach, with hooks at hk.module(path)"
        )


def _wanted(logits: Logits) -> Literal["all", "last", "none"]:
    if logits in ("all", True):
        return "all"
    if logits in ("none", False, None):
        return "none"
    if logits == "last":
        return "last"
    raise EmptySelection(f"logits={logits!r} is unknown: say 'all', 'last' or False")


def _called(lm: LM, batch: Batch, wanted: str) -> Any:
    if lm.config is None:
        if batch.padded:
            raise BadPrompt(f"a {type(lm.root).__name__} takes no mask: give prompts of one length, or one at a time")
        return lm.model(batch.ids)
    settings = {"use_cache": False, "return_dict": True, "logits_to_keep": 1 if wanted == "last" else 0}
    known = {name: value for name, value in settings.items() if name in lm.takes or name == "return_dict"}
    return lm.model(**batch.inputs(lm), **known)


def _logits_of(output: Any, batch: Batch, wanted: str) -> Captured:
    values = output if isinstance(output, Tensor) else output.logits
    positions = batch.positions
    if wanted == "last":
        positions, values = positions[:, -1:], values[:, -1:]
    elif batch.padded:
        fill = ~batch.mask[..., None]
        values = values.masked_fill(fill, 0) if values.requires_grad else values.masked_fill_(fill, 0)
    return Captured(Site("logits"), Where(), values, positions, tuple(range(len(batch.rows))), batch.rows)


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
    generator as it was; without it the draws are those of transformers in the state torch is in. `trace` records every
    step for `decoding` and `decisions`.

    Hooks on logits act first, on what the model says; then transformers' own and the user's `logits_processor`, in the
    order of transformers.

    >>> generate(lm, "The capital of France is", force(" coffee", step=0), max_new_tokens=3).generated
    [' coffee.\\n']
    """
    return traced(lm, prompts, hooks, logits, seed, None if trace is None else Tracer(lm, trace, hooks), arguments)


def traced(
    lm: LM,
    prompts: Prompts,
    hooks: tuple[Hook, ...],
    logits: Logits,
    seed: int | None,
    tracer: Tracer | None,
    arguments: Mapping[str, Any],
) -> Run:
    """`generate` with a tracer that is told of each step."""
    _refuse_two_texts(lm)
    _check_arguments(lm, arguments)
    warn_of_dropout(lm)
    wanted = _wanted(logits)
    batch = as_batch(lm, prompts, side="left", room=arguments.get("max_new_tokens") or 0)
    own = Capture(Sites((Site("logits"),)), Where(step=EVERY_STEP), name="hookkit.generate")
    manager = HookManager(lm, [*hooks, own] if wanted != "none" else hooks, tracer=tracer)
    ids = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    settings = {"verb": "generate", "logits": wanted, "arguments": _plain(arguments)}
    settings |= {} if seed is None else {"seed": seed}
    output: Any = None
    started = time.perf_counter()

    def run() -> Run:
        settings["seconds"] = time.perf_counter() - started
        return _generated(lm, batch, hooks, own, manager, settings, arguments, output)

    try:
        with _seeded(lm, seed), manager:
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
        kept=Kept(tuple(slot for slot in kept.slots if slot.name != own.name)),
        kept_logits=_own_logits(kept, own, settings["logits"]),
        settings=settings,
        output=output,
        _manager=manager,
        arguments=arguments,
        recorded=None if manager.tracer is None else manager.tracer.recorded,
    )


def _own_logits(kept: Kept, own: Capture, wanted: str) -> Captured | None:
    if wanted == "none":
        return None
    found = kept.captured("logits", own.name)
    return found if wanted == "all" else _last_step(found)


def _last_step(found: Captured) -> Captured:
    from dataclasses import replace

    assert found.positions is not None
    last = (found.positions >= 0).sum(dim=1) - 1
    rows = torch.arange(len(last))
    picked = found.values[rows.to(found.values.device), last.to(found.values.device)][:, None]
    return replace(found, values=picked, positions=found.positions[rows, last][:, None])


def _check_arguments(lm: LM, arguments: Mapping[str, Any]) -> None:
    """Raise `UnknownKeyword` for an argument that neither `generate` nor the model knows."""
    from transformers import GenerationConfig, GenerationMixin

    if not isinstance(lm.root, GenerationMixin):
        raise Unsupported(f"{type(lm.root).__name__} has no generate(): give a causal language model of transformers")
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


def _defaults(lm: LM, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What generate needs and the LM knows: a tokenizer for stop strings, a pad token where the model names none."""
    config: Any = arguments.get("generation_config") or lm.root.generation_config
    found: dict[str, Any] = {}
    if arguments.get("stop_strings") or config.stop_strings:
        found["tokenizer"] = lm.tokenizer
    if arguments.get("pad_token_id") is None and config.pad_token_id is None and "generation_config" not in arguments:
        found["pad_token_id"] = pad_id(lm)
    return found


@contextmanager
def _seeded(lm: LM, seed: int | None) -> Iterator[None]:
    """A block whose draws start from a seed, after which torch's generators are as they were."""
    if seed is None:
        yield
        return
    devices = [lm.device] if lm.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=lm.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON can hold them; objects by the name of their kind."""
    simple = str | int | float | bool | None
    return {
        name: value if isinstance(value, (simple, list | tuple)) else type(value).__name__
        for name, value in arguments.items()
    }
