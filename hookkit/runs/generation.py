"""A call of transformers' `generate`: what it will do, what it does, and how each row ended.

`plan_generation` reads the arguments before the first token, and refuses decoding modes in which an
edit has no defined meaning. `GenerationWatch` follows the steps from inside `generate`. The last
functions find each returned row's tokens and its end. Nothing here registers hooks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..hooks.capture import SequenceEnd
from ..hooks.logits import Decisions, follow_decisions
from ..models.batch_positions import Columns, ForwardPass, SequenceBatch, columns_of_mask
from ..models.overrides import Overrides
from ..models.positions import NO_END

if TYPE_CHECKING:
    from .trace import Tracer

SUPPORTED_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
# the rules of sampling in the order in which transformers applies them, and the value of each that
# changes nothing
NEUTRAL = {
    "temperature": 1.0,
    "top_h": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# arguments of `generate` that are no part of its configuration, and do not change the plan
PASSED_ON = ("logits_processor", "prefix_allowed_tokens_fn", "synced_gpus", "streamer", "tokenizer")
ONE_FORWARD_PER_TOKEN = "hooks need one forward of this model for each token: leave it out"
OTHER_MODELS = ("assistant_model", "custom_generate", "negative_prompt_ids")
SPECULATIVE = ("prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers", "token_healing")


# ---- before the first token


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
    other_stops: bool  # True if rows may end without an end token
    embeddings: bool  # True if the prompt is embeddings: the result has generated tokens only
    mode: str  # "greedy_search", "sample", "beam_search" or "beam_sample"
    rules: str  # the decoding rules as text, such as "top_p = 0.9"


def plan_generation(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
    """Returns what a call of `model.generate` will do, or raises `Unsupported` with the reason."""
    arguments = dict(kwargs)
    inputs = (*args, arguments.pop("inputs", None))[0]
    config_argument = _config_argument(args, kwargs)
    _refuse_arguments(arguments)
    stopping_criteria = arguments.pop("stopping_criteria", None)
    for name in ("generation_config", *PASSED_ON):
        arguments.pop(name, None)
    config, model_inputs = model._prepare_generation_config(config_argument, **arguments)
    _refuse_mode(config)
    mask = model_inputs.get("attention_mask")
    if not getattr(model.config, "is_encoder_decoder", False):
        prompt, has_embeddings = _find_prompt(inputs, model_inputs)
    else:
        prompt, has_embeddings = _decoder_prompt(config, inputs, model_inputs), False
        mask = model_inputs.get("decoder_attention_mask")
    columns, lengths = _lay_out_rows(prompt, mask, config)
    width = prompt.shape[1]
    new_tokens = _max_new_tokens(model, config, config_argument, arguments, width)
    eos = _token_ids(config.eos_token_id)
    return Generation(
        columns=columns,
        lengths=lengths,
        prompt=partial(_read_prompt, None if has_embeddings else prompt, columns, lengths),
        width=width,
        max_width=width + new_tokens,
        eos=frozenset(eos),
        pad=next(iter([*_token_ids(config.pad_token_id), *eos]), None),
        beams=config.num_beams or 1,
        returned=config.num_return_sequences or 1,
        other_stops=bool(stopping_criteria) or _may_stop_early(config),
        embeddings=has_embeddings,
        mode=config.get_generation_mode().value,
        rules=_rules_text(config),
    )


def _may_stop_early(config: Any) -> bool:
    """True if the configuration may end a row without an end token."""
    return config.stop_strings is not None or config.max_time is not None


def _find_prompt(inputs: Any, model_inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The ids or the embeddings of the prompts; True if they are embeddings."""
    ids = inputs if inputs is not None else model_inputs.get("input_ids")
    embeddings = model_inputs.get("inputs_embeds")
    if embeddings is not None and (ids is None or ids.shape[1] == 0):
        return embeddings, True
    if ids is None:
        raise Unsupported("generate was called without input_ids: hookkit needs to know the prompt")
    return ids, False


def _decoder_prompt(config: Any, inputs: Any, model_inputs: Mapping[str, Any]) -> Tensor:
    """The ids with which the decoder of an encoder-decoder begins."""
    ids = model_inputs.get("decoder_input_ids")
    if ids is not None:
        return ids
    source, _ = _find_prompt(inputs, model_inputs)
    start = config.decoder_start_token_id
    if start is None:
        start = config.bos_token_id
    return torch.full((len(source), 1), start, device=source.device)


def _config_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if "generation_config" in kwargs:
        return kwargs["generation_config"]
    return args[1] if len(args) > 1 else None


def _rules_text(config: Any) -> str:
    if not config.do_sample:
        return ""
    rules = []
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            rules.append(f"{name} = {value:g}")
    return ", ".join(rules)


def _refuse_arguments(arguments: Mapping[str, Any]) -> None:
    for name in OTHER_MODELS:
        if arguments.get(name) is not None:
            raise Unsupported(f"{name}= was given: {ONE_FORWARD_PER_TOKEN}")
    if arguments.get("cache_implementation") == "paged":
        raise Unsupported(
            "cache_implementation='paged' packs prompts into one row: choose another cache"
        )


def _refuse_mode(config: Any) -> None:
    for name in SPECULATIVE:
        if getattr(config, name, None):
            raise Unsupported(
                f"{name} runs the model on tokens that may be taken back: {ONE_FORWARD_PER_TOKEN}"
            )
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        raise Unsupported(
            f"guidance_scale runs the model twice for each token: {ONE_FORWARD_PER_TOKEN}, and "
            "give hk.away_from(prompt, by=guidance_scale - 1)"
        )
    mode = config.get_generation_mode().value
    if mode not in SUPPORTED_MODES:
        raise Unsupported(
            f"the decoding mode {mode!r} is not offered with hooks: choose from "
            f"{', '.join(SUPPORTED_MODES)}; hk.grammar constrains the text in each of them"
        )


def _lay_out_rows(
    prompt: Tensor, mask: Tensor | None, config: Any
) -> tuple[list[Columns], list[int]]:
    if mask is not None:
        return columns_of_mask(mask.bool(), generating=True)
    count, width = prompt.shape[:2]
    pad = config.pad_token_id
    if prompt.ndim == 2 and pad is not None and pad not in _token_ids(config.eos_token_id):
        real = prompt != pad  # transformers makes this mask if the caller passes none
        if not bool(real.all()):
            return columns_of_mask(real, generating=True)
    return [range(NO_END)] * count, [width] * count


def _read_prompt(
    ids: Tensor | None, columns: list[Columns], lengths: list[int], row: int
) -> tuple[int, ...]:
    """The ids of a row; -1 for each position of embeddings."""
    if ids is None:
        return (-1,) * lengths[row]
    start = columns[row][0]
    return tuple(ids[row, start : start + lengths[row]].tolist())


def _max_new_tokens(
    model: Any, config: Any, config_argument: Any, arguments: Mapping[str, Any], width: int
) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    explicit = (
        arguments.get("max_length")
        or getattr(config_argument, "max_length", None)
        or model.generation_config.max_length
    )
    if explicit is None:
        return config.max_length  # transformers' default counts new tokens only
    return config.max_length - width


def _token_ids(ids: Any) -> list[int]:
    """Token ids as a list: a configuration has None, a number, a list or a tensor."""
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()


def without_compilation(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same keywords, with the compilation of decoding steps off.

    A compiled step would not call the hooks.
    """
    config = _config_argument(args, kwargs)
    if config is None:
        return {**kwargs, "disable_compile": True}
    if len(args) > 1:
        raise Unsupported("give generation_config to generate by its name")
    config = copy.deepcopy(config)
    config.disable_compile = True
    return {**kwargs, "generation_config": config}


# ---- from step to step


@dataclass(eq=False)
class GenerationWatch:
    """Follows a call of `generate`: what each row has read, and the column at which it ended.

    Owned by the `TextHooks` that run the call.
    """

    tracer: "Tracer | None" = None
    decisions: Decisions | None = None
    tokens: Tensor | None = None  # [row, column], what each row has read before this forward
    previous_tokens: Tensor | None = None  # the same before the previous forward
    ended: Tensor | None = None  # [row], the columns of a row that has ended, else 0
    # the rows (of beams the candidates) of the last step, and which of them are done
    last_step: tuple[Tensor, Tensor] | None = None
    # for beams: the tokens of each model row before each forward; None while it reads the prompt
    histories: dict[int, Tensor | None] = field(default_factory=dict)
    # True if the next forward is a step; None if the model does not prepare its forwards
    step_is_due: bool | None = None

    def begins_step(self) -> bool:
        """True for a forward that `generate` has prepared; false for one of a logits processor."""
        if self.step_is_due is None:
            return True
        is_due, self.step_is_due = self.step_is_due, False
        return is_due

    def begin_forward(self, forward_pass: ForwardPass, prompt_width: int) -> None:
        """Notes in the text of a step what its rows have read."""
        text = forward_pass.text
        text.history, text.ended_rows, text.ended = self.tokens, self.ended_rows, self.ended
        if text.beams > 1:  # beams change rows from step to step
            reads_prompt = forward_pass.past + forward_pass.width <= prompt_width
            self.histories[forward_pass.number] = None if reads_prompt else self.tokens

    def prepare_inputs(self, inner: Any, /, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of `prepare_inputs_for_generation`; notes what each row has read."""
        self.previous_tokens, self.tokens = self.tokens, input_ids
        inputs = inner(input_ids, *args, **kwargs)
        self.step_is_due = True
        return inputs

    def get_stopping_criteria(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of `_get_stopping_criteria`; notes which rows the criteria end.

        Padding alone does not show this: the pad token may be generated.
        """
        from transformers import StoppingCriteriaList

        watch = self
        criteria = inner(*args, **kwargs)  # if they are those of an outer block, these note too

        class WatchedCriteria(StoppingCriteriaList):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                done = criteria(input_ids, scores, **kwargs)
                watch.note_step(input_ids, done)
                return done

        return WatchedCriteria(criteria)

    def get_logits_processor(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of `_get_logits_processor`; adds the decisions and the tracer."""
        return follow_decisions(inner(*args, **kwargs), kwargs, self.decisions, self.tracer)

    def note_step(self, input_ids: Tensor, done: Tensor) -> None:
        """Notes the rows after a step, and which of them are done."""
        if self.ended is None or self.ended.shape != done.shape:
            self.ended = torch.zeros_like(done, dtype=torch.long)
        ends_now = (self.ended == 0) & done
        self.ended = torch.where(ends_now, input_ids.shape[1], self.ended)
        self.last_step = input_ids, done
        if self.tracer is not None:
            self.tracer.drawn(input_ids[:, -1], done)

    def ended_rows(self) -> list[int]:
        """Returns the model rows of the previous forward that ended with the token they chose.

        Of beams, those of which some candidate ended.
        """
        if self.last_step is None or self.previous_tokens is None:
            return []
        candidates, done = self.last_step
        if self.ended is not None and len(candidates) == len(self.previous_tokens):
            return (self.ended == candidates.shape[1]).nonzero().flatten().tolist()
        rows: set[int] = set()
        for candidate in candidates[done]:
            rows.update(_rows_equal(self.previous_tokens, candidate[:-1]))
        return sorted(rows)


def _rows_equal(tokens: Tensor, row: Tensor) -> list[int]:
    """The rows of tokens [row, column] that are equal to one row."""
    return (tokens == row.to(tokens.device)).all(dim=1).nonzero().flatten().tolist()


@contextmanager
def watch_generate(
    model: Any, tracer: "Tracer | None", decisions: Decisions | None, acts: Callable[[], bool]
) -> Iterator[GenerationWatch]:
    """A context in which a `GenerationWatch` follows the model's own steps of `generate`.

    `acts` is true for the calls that belong to it.
    """
    watch = GenerationWatch(tracer, decisions)
    with Overrides() as overrides:
        if tracer is not None or decisions is not None:
            overrides.wrap_method(model, "_get_logits_processor", watch.get_logits_processor, acts)
        overrides.wrap_method(model, "_get_stopping_criteria", watch.get_stopping_criteria, acts)
        overrides.wrap_method(model, "prepare_inputs_for_generation", watch.prepare_inputs, acts)
        yield watch


# ---- after the last token


def end_of_rows(
    generation: Generation,
    text: SequenceBatch,
    sequences: Tensor,
    watch: GenerationWatch,
) -> tuple[list[list[int]], SequenceEnd]:
    """Returns the tokens of each returned sequence without padding, and how the text ended.

    The last token of a row was chosen and never read, so its position does not count.
    """
    prompts = [row // generation.returned for row in range(len(sequences))]
    rows = _rows_without_padding(generation, text, prompts, sequences, watch)
    lineage = None
    if generation.beams > 1:
        lineage = {
            forward: _ancestors(history, sequences, prompts, text.expand)
            for forward, history in watch.histories.items()
        }
    return rows, SequenceEnd(prompts, [len(row) - 1 for row in rows], lineage, text.expand)


def _rows_without_padding(
    generation: Generation,
    text: SequenceBatch,
    prompts: Sequence[int],
    sequences: Tensor,
    watch: GenerationWatch,
) -> list[list[int]]:
    """Returns the tokens of the prompt and of the generated text of each returned sequence."""
    ended = [0] * len(prompts)
    if watch.ended is not None and generation.beams == 1:
        ended = watch.ended.tolist()
    prompt_width = 0 if generation.embeddings else generation.width
    rows = []
    for prompt, sequence, columns in zip(prompts, sequences.tolist(), ended, strict=True):
        new = sequence[prompt_width:]
        end = columns - prompt_width if columns else _end_of(new, generation)
        rows.append([*text.prompt(prompt), *new[:end]])
    return rows


def _end_of(new: list[int], generation: Generation) -> int | None:
    """Where a beam ended: after its first end token, or before its padding; None at its width."""
    for count, token in enumerate(new, start=1):
        if token in generation.eos:
            return count
    if not generation.other_stops:
        return None
    end = len(new)
    while end and new[end - 1] == generation.pad:
        end -= 1
    return end


def _ancestors(
    history: Tensor | None, sequences: Tensor, prompts: Sequence[int], expand: int
) -> list[int]:
    """For each final row, the model row that had its tokens; -1 if its beam had ended.

    `history` has the tokens [row, column] before a forward; None while the prompt was read.
    """
    if history is None:
        return [prompt * expand for prompt in prompts]  # all beams of a prompt are the same
    width = history.shape[1]
    ancestors = []
    for prompt, sequence in zip(prompts, sequences[:, :width], strict=True):
        first, same = prompt * expand, []
        if len(sequence) == width:
            same = _rows_equal(history[first : first + expand], sequence)
        ancestors.append(first + same[0] if same else -1)
    return ancestors
