"""What a call of transformers' `generate` is going to do, read before its first token; and how each row of it ended.

Nothing here registers hooks. Modes of decoding in which an edit has no defined meaning are refused here.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import Unsupported
from ..hooks.captured_values import SequenceEnd
from ..hooks.decided_tokens import Decisions, heeding
from ..models.batch_positions import Columns, SequenceBatch, contiguous, masked
from ..models.overrides import Lent

OFFERED = ("greedy_search", "sample", "beam_search", "beam_sample")
NEUTRAL = {  # the rules of sampling in the order in which transformers applies them, and the value that changes nothing
    "temperature": 1.0,
    "top_h": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
ONE_FORWARD_PER_TOKEN = "hooks need one forward of this model for each token: leave it out"


@dataclass(frozen=True)
class Generation:
    """One call of `generate`: its prompts by row, and what decides how rows go on and end."""

    columns: list[Columns]
    lengths: list[int]
    prompt: Callable[[int], tuple[int, ...]]
    width: int  # columns of the prompts
    max_width: int  # columns after the last token that may be generated
    eos: frozenset[int]
    pad: int | None
    beams: int
    returned: int  # sequences for each prompt
    other_stops: bool  # rows may end without an end token
    embeddings: (
        bool  # the prompt was given as embeddings alone, so the result holds generated tokens only
    )
    mode: str  # "greedy_search", "sample", "beam_search" or "beam_sample"
    rules: str  # the decoding rules in words, such as "top_p = 0.9"

    def text(self, find: Any) -> SequenceBatch:
        """The text that this call makes flow through the model."""
        return SequenceBatch(
            self.columns, self.lengths, self.prompt, find, generating=True, beams=self.beams
        )


def read(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
    """What this call of `model.generate` is going to do, or `Unsupported` with the reason."""
    given = dict(kwargs)
    inputs = args[0] if args else given.pop("inputs", None)
    config_given = given.pop("generation_config", args[1] if len(args) > 1 else None)
    _refuse_arguments(given)
    stops = given.pop("stopping_criteria", None)
    for name in (
        "logits_processor",
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "streamer",
        "tokenizer",
    ):
        given.pop(name, None)
    config, rest = model._prepare_generation_config(config_given, **given)
    _refuse_mode(config)
    ids: Any = inputs if inputs is not None else rest.get("input_ids")
    embeds: Any = rest.get("inputs_embeds")
    if ids is None and embeds is None:
        raise Unsupported("generate was called without input_ids: hookkit needs to know the prompt")
    embeddings = embeds is not None and (ids is None or ids.shape[1] == 0)
    prompt: Any = embeds if embeddings else ids
    columns, lengths = _rows(prompt, rest.get("attention_mask"), config)
    width = prompt.shape[1]
    eos = config.eos_token_id
    return Generation(
        columns=columns,
        lengths=lengths,
        prompt=(lambda row: (-1,) * lengths[row])
        if embeddings
        else _reader(prompt, columns, lengths),
        width=width,
        max_width=width + _new_tokens(model, config, config_given, given, width),
        eos=frozenset() if eos is None else frozenset(torch.as_tensor(eos).flatten().tolist()),
        pad=config.pad_token_id if config.pad_token_id is not None else _first(eos),
        beams=config.num_beams or 1,
        returned=config.num_return_sequences or 1,
        other_stops=bool(stops) or config.stop_strings is not None or config.max_time is not None,
        embeddings=embeddings,
        mode=config.get_generation_mode().value,
        rules=_rules(config) if config.do_sample else "",
    )


def _rules(config: Any) -> str:
    given = {name: getattr(config, name, None) for name in NEUTRAL}
    return ", ".join(
        f"{n} = {value:g}"
        for n, value in given.items()
        if value is not None and value != NEUTRAL[n]
    )


def _refuse_arguments(given: Mapping[str, Any]) -> None:
    for name in ("assistant_model", "custom_generate", "negative_prompt_ids"):
        if given.get(name) is not None:
            raise Unsupported(f"{name}= was given: {ONE_FORWARD_PER_TOKEN}")
    if given.get("cache_implementation") == "paged":
        raise Unsupported(
            "cache_implementation='paged' packs prompts into one row: choose another cache"
        )


def _refuse_mode(config: Any) -> None:
    for name in (
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
        "dola_layers",
        "token_healing",
    ):
        if getattr(config, name, None):
            raise Unsupported(
                f"{name} runs the model on tokens that may be taken back: {ONE_FORWARD_PER_TOKEN}"
            )
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise Unsupported(
            f"guidance_scale runs the model twice for each token: {ONE_FORWARD_PER_TOKEN}"
        )
    mode = config.get_generation_mode()
    if mode.value not in OFFERED:
        raise Unsupported(
            f"the decoding mode {mode.value!r} is not offered with hooks: choose from {', '.join(OFFERED)}"
        )


def _rows(prompt: Tensor, mask: Tensor | None, config: Any) -> tuple[list[Columns], list[int]]:
    if mask is not None:
        return masked(mask.bool(), generating=True)
    count, width = prompt.shape[:2]
    pad, end = config.pad_token_id, config.eos_token_id
    ends = set() if end is None else set(torch.as_tensor(end).flatten().tolist())
    if prompt.ndim == 2 and pad is not None and pad not in ends and bool((prompt == pad).any()):
        return masked(
            prompt != pad, generating=True
        )  # transformers makes this mask when none is given
    return contiguous([width] * count, [0] * count, open_end=True), [width] * count


def _reader(
    ids: Tensor, columns: list[Columns], lengths: list[int]
) -> Callable[[int], tuple[int, ...]]:
    return lambda row: tuple(ids[row, columns[row][0] : columns[row][0] + lengths[row]].tolist())


def _new_tokens(
    model: Any, config: Any, config_given: Any, given: Mapping[str, Any], width: int
) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    explicit = (
        given.get("max_length")
        or getattr(config_given, "max_length", None)
        or model.generation_config.max_length
    )
    return config.max_length - width if explicit is not None else config.max_length


def _first(ids: Any) -> int | None:
    return None if ids is None else int(torch.as_tensor(ids).flatten()[0])


def eager(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same keywords, with the compilation of decoding steps off: a compiled step would not see the hooks."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    if config is None:
        return {**kwargs, "disable_compile": True}
    if len(args) > 1:
        raise Unsupported("give generation_config to generate by its name")
    config = copy.deepcopy(config)
    config.disable_compile = True
    return {**kwargs, "generation_config": config}


@runtime_checkable
class Listener(Protocol):
    """Who is told of each step: a tracer."""

    def processed(self, scores: Tensor) -> Tensor:
        """What the logits processors made of the logits [row, vocab], and what decoding is to go on with."""
        ...

    def drawn(self, tokens: Tensor, done: Tensor) -> None:
        """The tokens that were chosen [row], and which rows end with them."""


@dataclass(eq=False)
class Watch:
    """Watches a call of `generate` from inside: what each row has read, and at which column it ended."""

    listener: Listener | None = None
    decisions: Decisions | None = None
    tokens: Tensor | None = None  # what every row has read, before a forward
    ended: Tensor | None = None  # for each row the columns that it has, or 0 while it goes on
    before: Tensor | None = None  # what every row had read before the forward before
    drawn: tuple[Tensor, Tensor] | None = (
        None  # the rows, or candidates for beams, of the last step, and who is done
    )
    due: bool | None = (
        None  # the next forward is a step of it; None where the model does not prepare its forwards
    )

    def begins_step(self) -> bool:
        """True for a forward that `generate` has prepared; false for others, such as those of a logits processor."""
        due = self.due is not False
        self.due = None if self.due is None else False
        return due

    def prepared(self, inner: Any, /, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's `prepare_inputs_for_generation`, noting what every row has read."""
        self.before, self.tokens = self.tokens, input_ids
        prepared = inner(input_ids, *args, **kwargs)
        self.due = True
        return prepared

    def stopping(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The model's `_get_stopping_criteria`, noting what they decide: pad tokens alone do not tell who ended."""
        from transformers import StoppingCriteriaList

        watch = self
        stopping = inner(*args, **kwargs)  # called as it is: that of an outer block notes too

        class Noted(StoppingCriteriaList):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                done = stopping(input_ids, scores, **kwargs)
                watch.note(done, input_ids.shape[1])
                watch.drawn = input_ids, done
                if watch.listener is not None:
                    watch.listener.drawn(input_ids[:, -1], done)
                return done

        return Noted(stopping)

    def processing(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The model's `_get_logits_processor`, whose rules heed decisions and tell the listener what they make of the
        logits."""
        return heeding(inner(*args, **kwargs), kwargs, self.decisions, self.listener)

    def note(self, done: Tensor, width: int) -> None:
        """Some rows are done, after so many columns."""
        if self.ended is None or self.ended.shape != done.shape:
            self.ended = torch.zeros_like(done, dtype=torch.long)
        self.ended = torch.where((self.ended == 0) & done, width, self.ended)

    def ended_rows(self) -> list[int]:
        """The model rows of the forward before whose text ended with what they chose. Of beams, those of which some
        candidate ended."""
        if self.drawn is None or self.before is None:
            return []
        candidates, done = self.drawn
        if not bool(done.any()):
            return []
        if self.ended is not None and len(candidates) == len(self.before):
            return (self.ended == candidates.shape[1]).nonzero().flatten().tolist()
        rows = []
        for number in done.nonzero().flatten().tolist():
            same = (self.before == candidates[number, :-1]).all(dim=1).nonzero().flatten().tolist()
            rows += same
        return sorted(set(rows))


@contextmanager
def watched(
    model: Any,
    listener: Listener | None = None,
    decisions: Decisions | None = None,
    acts: Callable[[], bool] | None = None,
) -> Iterator[Watch]:
    """A block in which the model's own steps of `generate` tell a Watch, and a listener, what they do, and take the
    tokens that were decided on.

    `acts` says which calls are meant; left out, those of this thread.
    """
    watch = Watch(listener, decisions)
    with Lent() as lent:
        if listener is not None or decisions is not None:
            lent.around(model, "_get_logits_processor", watch.processing, acts)
        lent.around(model, "_get_stopping_criteria", watch.stopping, acts)
        lent.around(model, "prepare_inputs_for_generation", watch.prepared, acts)
        yield watch


def final_rows(
    generation: Generation, text: SequenceBatch, sequences: Tensor, watch: Watch
) -> list[list[int]]:
    """The tokens of each returned sequence, its prompt included, without padding and what follows its end."""
    prompts = [number for number in range(len(text.lengths)) for _ in range(generation.returned)]
    ended = (
        watch.ended.tolist()
        if watch.ended is not None and generation.beams == 1
        else [0] * len(prompts)
    )
    rows = []
    for prompt, row, columns in zip(prompts, sequences.tolist(), ended, strict=True):
        new = row if generation.embeddings else row[generation.width :]
        end = (
            columns - (0 if generation.embeddings else generation.width)
            if columns
            else _end_of(new, generation)
        )
        rows.append([*text.prompt(prompt), *new[:end]])
    return rows


def _end_of(new: list[int], generation: Generation) -> int | None:
    """Where a beam ended: behind its first end token, or, where other rules end rows too, before the padding."""
    for count, token in enumerate(new, start=1):
        if token in generation.eos:
            return count
    fill = next((n for n, token in enumerate(reversed(new)) if token != generation.pad), len(new))
    return len(new) - fill if generation.other_stops else None


def ending(
    generation: Generation,
    text: SequenceBatch,
    sequences: Tensor,
    rows: Sequence[Sequence[int]],
    histories: dict[int, Tensor | None],
) -> SequenceEnd:
    """How the text ended. The last token of a row was chosen and never read, so its position does not count."""
    prompts = [number for number in range(len(text.lengths)) for _ in range(generation.returned)]
    lineage = None
    if generation.beams > 1:
        lineage = {
            call: _ancestors(seen, sequences, prompts, text.expand)
            for call, seen in histories.items()
        }
    return SequenceEnd(prompts, [len(row) - 1 for row in rows], lineage, text.expand)


def _ancestors(
    seen: Tensor | None, sequences: Tensor, prompts: Sequence[int], expand: int
) -> list[int]:
    """For each final row, the model row whose tokens so far were its own; -1 where its beam had ended."""
    if seen is None:
        return [prompt * expand for prompt in prompts]  # all beams of a prompt are the same so far
    length = seen.shape[1]
    found = []
    for row, prompt in enumerate(prompts):
        beams = seen[prompt * expand : (prompt + 1) * expand]
        same = (
            (beams == sequences[row, :length].to(beams.device)).all(dim=1)
            if length <= sequences.shape[1]
            else []
        )
        found.append(next((prompt * expand + beam for beam, equal in enumerate(same) if equal), -1))
    return found
