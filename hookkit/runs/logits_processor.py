"""hk.logits_processor: hooks on logits as a processor of transformers, for code that is not ours.

A processor sees the tokens so far and their scores, and nothing else. What more is needed to find
each row's own text is read from the `generate` of transformers that calls the processor: its mask,
its beams and its other rules. In a decoding loop of another kind, it is assumed.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import EosTokenCriteria, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria

from ..arguments import check_arguments
from ..display import describe_outcome
from ..errors import BadEdit, BadHook, EmptySelection, Unsupported
from ..hooks.base import EditHook, Hook
from ..hooks.conditions import conditions_in
from ..hooks.edits import Steer
from ..hooks.grammar import Grammar
from ..hooks.logit_shifts import Ban, Cap, Restrict
from ..hooks.logits import Decisions, Force, LogitEdit
from ..hooks.rulings import LogitJournal
from ..hooks.sources import SourceEdit
from ..hooks.when import LogitCondition, TextCondition
from ..models.batch_positions import ForwardPass, SequenceBatch, columns_of_mask
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.positions import NO_END
from ..models.prompts import pad_id
from ..models.sites import Site
from .applied_hooks import apply_hook, forget, settle
from .forward import refuse_two_texts
from .generation import Generation
from .hook_points import BoundHook, build_hook_points
from .manager import capture_reference
from .text_hooks import check_positions

Ids = Int[Tensor, "row column"]
Scores = Float[Tensor, "row vocab"]
FRAMES = 6  # how many calls up the `generate` of transformers is at most


@check_arguments
def logits_processor(lm: LM, *hooks: Hook) -> HooksProcessor:
    """Returns these hooks on logits as a `LogitsProcessor`, for other people's `generate`.

    A `generate` of transformers, a pipeline or a trainer that is given the processor chooses the
    same tokens as `hk.generate` with the same hooks: greedy, sampled or by beams, and in batches
    of prompts that are padded on the left. Steps count from the end of the prompts, and `rows`
    counts the prompts of each call. Each `generate` starts anew.

    transformers runs processors of the caller after its own rules (`repetition_penalty`,
    `min_new_tokens` …), and hooks act before them. `Unsupported` is raised where such a rule comes
    first and matters: pass it as a processor, after this one. Without beams it does not matter to
    `ban`, `restrict` and `force` without `when=` and `margin=`. With beams, `Unsupported` is also
    raised for hooks that read the size of logits, as beam search passes log-probabilities.

    In a decoding loop that is not that of transformers, the pad tokens before a prompt are padding,
    each row is a prompt, and tokens that continue those of the last call by one are its next step.
    The scores are in float32, in which transformers holds them. A hook whose step is never reached
    raises nothing, since a processor does not see the end.

    >>> processor = logits_processor(lm, force(" tea", step=0), ban(" coffee"))
    >>> ids = lm.tokenizer("I like", return_tensors="pt").input_ids
    >>> output = lm.model.generate(ids, logits_processor=[processor], max_new_tokens=2)
    >>> lm.text(output[0].tolist())
    'I like tea,'
    """
    lm.refuse_next_token()
    refuse_two_texts(lm)
    if not hooks:
        raise EmptySelection("logits_processor was given no hook: give hk.force, hk.ban …")
    for hook in hooks:
        _check_logits_hook(hook)
    return HooksProcessor(lm, hooks)


def _check_logits_hook(hook: Hook) -> None:
    """Raises `BadHook` for a hook that does more than to change the logits of the model."""
    if not isinstance(hook, EditHook) or any(site != Site("logits") for site in hook.sites):
        raise BadHook(
            f"{hook}: a processor sees the logits only, and {hook.verb} acts elsewhere: give hooks "
            "at 'logits' (hk.force, hk.ban, hk.boost …), or run the code in a block of hk.attach"
        )
    if isinstance(hook, SourceEdit):
        raise BadHook(
            f"{hook} needs forwards of its source, which a processor does not run: use hk.generate "
            "or a block of hk.attach"
        )


class HooksProcessor(LogitsProcessor):
    """Applies hooks to the scores of each step. `logits_processor` returns it.

    It owns the text of the `generate` that calls it, in each thread, and begins another one with
    the next.
    """

    def __init__(self, lm: LM, hooks: tuple[Hook, ...]) -> None:
        self.lm, self.hooks = lm, hooks
        hook_points = build_hook_points(lm, hooks, partial(capture_reference, lm))
        for bound_hook in chain.from_iterable(point.actions for point in hook_points):
            if bound_hook.receive is not None:
                raise BadHook(
                    f"{bound_hook.hook} reads {bound_hook.site}, and a processor sees the logits "
                    "of each step only: run the code in a block of hk.attach, or leave when= out"
                )
        (self._point,) = hook_points
        self._of_thread = threading.local()

    def __repr__(self) -> str:
        text = f"HooksProcessor({', '.join(map(str, self.hooks))})"
        return describe_outcome(text, "generate(..., logits_processor=[processor])")

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        call = _find_generate(self)
        text: _Text | None = getattr(self._of_thread, "text", None)
        if text is not None and text.is_continued(call, input_ids):
            text.check_taken(input_ids)
            return self._apply(text, input_ids, scores, text.next_pass(input_ids))
        self._check_call(call, input_ids, scores)
        text = self._of_thread.text = _Text.begin(self.lm, call, input_ids)
        forward_pass = text.next_pass(input_ids)
        check_positions(self._point.actions, forward_pass, text.plan)
        return self._apply(text, input_ids, scores, forward_pass)

    def _check_call(self, call: _Generate, input_ids: Ids, scores: Scores) -> None:
        """Raises for a `generate` in which the hooks would mean something else."""
        if input_ids.shape[1] == 0:
            raise Unsupported(
                "the prompt was given as embeddings, of which a processor sees nothing: give ids, "
                "or use hk.attach"
            )
        if scores.shape[1] < self.lm.n_tokens:
            raise BadEdit(
                f"the scores have {scores.shape[1]} tokens, and the vocabulary of the LM has "
                f"{self.lm.n_tokens}: make the processor for the model that generates"
            )
        for hook in self.hooks:
            if call.beams > 1:
                _check_for_beams(hook)
            for rule in call.rules_before:
                _check_order(hook, rule, call.beams)

    def _apply(
        self, text: _Text, input_ids: Ids, scores: Scores, forward_pass: ForwardPass
    ) -> Scores:
        forget(self._point.actions)
        tensor, journal = scores[:, None], LogitJournal()
        text.sequences.forget_step()
        for bound_hook in self._point.actions:
            tensor = self._apply_hook(bound_hook, forward_pass, tensor)
            journal.note(bound_hook.hook, text.sequences, tensor)
        settle(self._point.actions)
        new = tensor[:, 0]
        if text.plan.beams > 1 and new is not scores:
            new = new.log_softmax(dim=-1)  # as beam search does to the logits of the model
        text.note_decided()
        return Decisions(text.sequences, 0).apply(
            LogitsProcessorList(), frozenset(), input_ids, new, {}
        )

    def _apply_hook(
        self, bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor
    ) -> Tensor:
        try:
            return apply_hook(bound_hook, self._point, forward_pass, tensor, None)[1]
        except Exception as error:
            error.add_note(f"in {bound_hook.hook} at logits, step {forward_pass.number}")
            raise


def _ignores_shift(hook: Hook) -> bool:
    """True if a hook does the same where all logits are moved by one number."""
    if not isinstance(hook, LogitEdit | Steer):
        return False
    if hook.when is not None:
        for condition in conditions_in(hook.when):
            if not isinstance(condition, LogitCondition | TextCondition):
                return False
    return not (isinstance(hook, Cap) and hook.logit is not None)


def _check_for_beams(hook: Hook) -> None:
    """Raises `Unsupported` for a hook that cannot act on the log-probabilities of beams."""
    if not _ignores_shift(hook):
        raise Unsupported(
            f"{hook} reads the size of logits, and beam search passes log-probabilities to "
            "a processor: use hk.generate or hk.attach"
        )
    if isinstance(hook, Grammar):
        raise Unsupported(
            f"{hook}: a processor does not see which beams are returned, and some may be "
            "texts that the grammar forbids: use hk.generate or hk.attach"
        )


def _check_order(hook: Hook, rule: object, beams: int) -> None:
    """Raises `Unsupported` if it matters that a rule acts before a hook and not after it.

    It always matters to beams, whose log-probabilities are computed after the hooks.
    """
    name = type(rule).__name__
    if isinstance(rule, HooksProcessor):
        raise Unsupported(
            "two processors of hooks act one after the other: give all hooks to one "
            "hk.logits_processor"
        )
    is_plain = isinstance(hook, LogitEdit) and hook.when is None
    decides = isinstance(hook, Force) and hook.decides
    is_same = is_plain and (decides or isinstance(hook, Ban | Restrict | Grammar))
    if beams > 1 or not is_same:
        raise Unsupported(
            f"{name} acts before {hook}, which in hk.generate acts first: leave out the argument "
            f"that makes it, and pass logits_processor=[processor, {name}(…)], in this order"
        )


# ---- the generate that calls a processor


@dataclass(frozen=True)
class _Generate:
    """What a processor can know about the call of `generate` that runs it."""

    rules: Any = None  # the list of all processors of the call; None in another decoding loop
    rules_before: Sequence[object] = ()
    stops: Sequence[object] | None = None  # what ends rows; None if it is not known
    config: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def beams(self) -> int:
        return getattr(self.config, "num_beams", None) or 1

    @property
    def expand(self) -> int:
        """The number of rows of each prompt."""
        return max(self.beams, getattr(self.config, "num_return_sequences", None) or 1)


def _find_generate(processor: HooksProcessor) -> _Generate:
    """Returns the call of transformers' `generate` that runs a processor, if there is one.

    Only its frame knows the call: a new list of rules is made for each, and nothing else of it is
    passed to a processor.
    """
    frame: Any = sys._getframe(2)
    for _ in range(FRAMES):
        if frame is None:
            break
        local = frame.f_locals
        rules, config = local.get("logits_processor"), local.get("generation_config")
        is_decoding = isinstance(rules, LogitsProcessorList) and config is not None
        if is_decoding and "model_kwargs" in local and any(rule is processor for rule in rules):
            before = list(takewhile(lambda rule: rule is not processor, rules))
            stops = local.get("stopping_criteria")
            return _Generate(rules, before, stops, config, local["model_kwargs"])
        frame = frame.f_back
    return _Generate()


# ---- the text of one generate


@dataclass(eq=False)
class _Text:
    """The rows of one call of `generate`, and what they have read."""

    plan: Generation
    sequences: SequenceBatch
    rules: weakref.ref[Any] | None
    last: Ids
    steps: int = 0
    decided: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, lm: LM, call: _Generate, input_ids: Ids) -> _Text:
        """Returns the text that begins with these prompts."""
        plan = _plan(lm, call, input_ids)
        sequences = SequenceBatch(
            plan.columns,
            plan.lengths,
            plan.prompt,
            partial(find_positions, lm),
            generating=True,
            expand=call.expand,
            beams=plan.beams,
            eos=plan.eos,
            begun=True,
            head=plan.width - 1,
        )
        rules = None if call.rules is None else weakref.ref(call.rules)
        return cls(plan, sequences, rules, input_ids)

    def is_continued(self, call: _Generate, input_ids: Ids) -> bool:
        """True if these tokens are the next step of this text."""
        is_next = input_ids.shape == (len(self.last), self.last.shape[1] + 1)
        if self.rules is None or call.rules is None:
            has_text = is_next and torch.equal(input_ids[:, :-1].to(self.last), self.last)
            return has_text and self.rules is None and call.rules is None
        if self.rules() is not call.rules:
            return False
        if not is_next:
            raise Unsupported(
                f"the processor was called with {list(input_ids.shape)} tokens after "
                f"{list(self.last.shape)}: hooks need one call for each token, which assisted "
                "decoding does not make"
            )
        return True

    def next_pass(self, input_ids: Ids) -> ForwardPass:
        """Returns the forward whose logits choose the next token."""
        rows, width = input_ids.shape
        self.last = self.sequences.history = input_ids
        past, self.sequences.n_read = width - 1, width
        number, self.steps = self.steps, self.steps + 1
        if number and self.plan.other_stops:  # a row that a stop string has ended is padded
            self.sequences.ended = (input_ids[:, -1] == self.plan.pad).long()
        return ForwardPass(self.sequences, number, past, rows, 1, range(1), past)

    def note_decided(self) -> None:
        """Notes the decisions of this step, to check them at the next."""
        self.decided = {}
        if self.plan.beams == 1:
            for (row, _), item in self.sequences.decided.items():
                if item.certain:
                    self.decided[row] = item

    def check_taken(self, input_ids: Ids) -> None:
        """Raises `BadEdit` if a later processor made a row take another token than decided."""
        for row, decision in self.decided.items():
            *before, token = input_ids[row, self.plan.width :].tolist()
            has_ended = not self.plan.eos.isdisjoint(before)
            if self.plan.other_stops:
                has_ended = has_ended or token == self.plan.pad
            if token != decision.token and not has_ended:
                raise BadEdit(
                    f"{decision.hook} decides on token {decision.token} in row "
                    f"{self.sequences.of(row)}, and token {token} was taken: a processor after "
                    "this one leaves it out; change one of the two, or give force a margin="
                )


def _plan(lm: LM, call: _Generate, input_ids: Ids) -> Generation:
    """Returns where the prompts are, and how far they may go."""
    config, width = call.config, input_ids.shape[1]
    eos = _ids_of(getattr(config, "eos_token_id", None))
    pad = next(iter(_ids_of(getattr(config, "pad_token_id", None)) or eos), pad_id(lm))
    prompts = input_ids[:: call.expand]
    mask = _mask(lm, call, input_ids, pad)[:: call.expand]
    columns, lengths = columns_of_mask(mask, generating=True)

    def prompt(row: int) -> tuple[int, ...]:
        return tuple(prompts[row][mask[row]].tolist())

    return Generation(
        columns=columns,
        lengths=lengths,
        prompt=prompt,
        width=width,
        max_width=getattr(config, "max_length", None) or NO_END,
        eos=frozenset(eos),
        pad=pad,
        beams=call.beams,
        returned=call.expand,
        other_stops=call.stops is None or not all(map(_is_usual, call.stops)),
        embeddings=False,
        mode="",
        rules="",
    )


def _mask(lm: LM, call: _Generate, input_ids: Ids, pad: int) -> Bool[Tensor, "row column"]:
    """Returns which tokens of the prompts are no padding."""
    name = "decoder_attention_mask" if lm.two_texts else "attention_mask"
    mask, width = call.inputs.get(name), input_ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
        return mask[:, :width].bool().to(input_ids.device)
    begun = (input_ids != pad).cumsum(dim=1) > 0
    return begun | ~begun.any(dim=1, keepdim=True)  # a row of pad tokens only is a text


def _is_usual(stop: object) -> bool:
    return isinstance(stop, MaxLengthCriteria | EosTokenCriteria)


def _ids_of(ids: Any) -> list[int]:
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()
