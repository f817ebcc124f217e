"""`grammar`: generated text that fits a JSON schema, a regular expression or a grammar in EBNF.

llguidance (the extra `hookkit[grammar]`) reads the grammars, and says which tokens may follow. It
needs no other package, and it refuses a schema of which it cannot keep a part.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from json import dumps, loads
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_choice, check_keywords, check_text, describe, leave_out_none, shorten
from ..errors import BadEdit, BadHook, MissingExtra, Unsupported
from ..models.batch_positions import Ruling, SequenceBatch
from ..models.lm import LM
from ..models.positions import IndicesLike
from ..models.sites import Site, Sites
from .base import EVERY_STEP, Binding, Change, EditContext, as_where
from .logits import LogitEdit, Logits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ..models.batch_positions import PositionRange

LOGITS = Sites((Site("logits"),))
KINDS = {"json": "a JSON schema", "regex": "a regular expression", "ebnf": "a grammar in EBNF"}


@dataclass(frozen=True)
class Grammar(LogitEdit, verb="grammar", bare=("kind", "text"), gives_infinity=True):
    """Leaves only the tokens with which the generated text fits a grammar. `grammar` returns it."""

    kind: str
    text: str

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    def check_sites(self) -> None:
        if self.sites != LOGITS:
            raise BadHook(f"a grammar acts at 'logits', and cannot act at {self.sites}")

    def check(self) -> None:
        super().check()
        if self.where.step != EVERY_STEP or self.when is not None:
            raise BadHook(
                "a grammar is of the whole generated text, and acts at every step of it: leave "
                "pos=, step= and when= out; rows= chooses prompts"
            )
        check_choice(self.kind, "a kind of grammar", KINDS)
        check_text(self.text, self.kind, KINDS[self.kind])
        is_error, messages = _library().LLMatcher.validate_grammar_with_warnings(self._compiled())
        if is_error:
            raise self._refusal(messages[0])
        for message in messages:
            warnings.warn(f"{self}: {message}", stacklevel=2)

    def _compiled(self) -> str:
        """Returns the grammar as llguidance reads it."""
        try:
            return _library().grammar_from(self.kind, self.text)
        except ValueError as error:
            raise self._refusal(str(error)) from error

    def _refusal(self, message: str) -> BadHook:
        reason = shorten(" ".join(message.split()), 300)
        return BadHook(f"{self} is no grammar that can be kept: {reason}")

    def __str__(self) -> str:
        value = repr(self.text)
        if self.kind == "json":
            value = repr(loads(self.text))
        arguments = [f"{self.kind}={shorten(value)}"]
        if self.where.rows is not None:
            arguments.append(f"rows={self.where.rows!r}")
        return f"grammar({', '.join(arguments)})"

    def start(self, lm: LM) -> LLMatcher:
        """Returns a matcher at the start of a text. `BadHook` if it cannot read the tokenizer."""
        matcher = _library().LLMatcher(_tokenizer_of(lm, self), self._compiled())
        if matcher.is_error():
            raise self._refusal(matcher.get_error())
        return matcher

    def change(self, binding: Binding) -> Change:
        matchers = RowMatchers(self, binding.lm)

        def apply(logits: Logits, here: EditContext) -> Logits:
            allowed = matchers.allowed(here, logits.shape[-1], logits.device)
            new = logits.masked_fill(~allowed, -torch.inf)
            if here.cells.text.generating:  # LogitJournal knows which edit was before
                return new
            if bool(here.real_cells(new.amax(dim=-1) == -torch.inf).any()):
                raise BadEdit(
                    f"{self} leaves no token to choose at {here.site}: all that it allows were "
                    "banned before, or it allows none"
                )
            return new

        return apply


class RowMatchers:
    """Says which tokens a grammar allows after the generated tokens of each row.

    It owns a matcher for each row of each text, with the tokens that it has read. If a row has
    other tokens than before (another beam, or the same text once more without a cache), its matcher
    begins again.
    """

    def __init__(self, hook: Grammar, lm: LM) -> None:
        self._hook, self._lm = hook, lm
        self._start = hook.start(lm)
        self._own_ends = _end_tokens(lm)
        self._library_ends = set(_tokenizer_of(lm, hook).eos_tokens)
        self._matchers: WeakKeyDictionary[SequenceBatch, dict[int, tuple[list[int], LLMatcher]]]
        self._matchers = WeakKeyDictionary()

    def allowed(self, here: EditContext, size: int, device: torch.device) -> Tensor:
        """Returns the allowed tokens [row, pos, vocab], and notes those of each row's last cell."""
        text = here.cells.text
        if not text.generating and not text.final:
            raise Unsupported(
                f"{self._hook} cannot know where the generated text begins in a decoding loop of "
                "one's own: use generate, also under hk.attach, or hk.forward, where it acts as "
                "before the first token"
            )
        ended = _ended_rows(text)
        cells = here.cells
        shape = (len(cells.rows), max(map(len, cells.row_positions)), size)
        allowed, ruled = np.ones(shape, dtype=bool), []
        for index, (row, positions) in enumerate(zip(cells.rows, cells.row_positions, strict=True)):
            if row not in ended and self._fill(allowed[index], here, index, positions):
                ruled.append(index)
        result = torch.from_numpy(allowed).to(device)
        self._rule(here, ruled, result)
        return result

    def _fill(self, allowed: Any, here: EditContext, index: int, positions: PositionRange) -> bool:
        """Writes what is allowed at each position of a row. Returns False for a row that ended."""
        text, row = here.cells.text, here.cells.rows[index]
        first = text.lengths[text.of(row)] - 1
        ends = [token for token in text.eos or self._own_ends if token < allowed.shape[-1]]
        goes_on = True
        for column, position in enumerate(positions):
            tokens: list[int] = []
            if position > first:
                tokens = here.read(index, position, position - first)
            goes_on = set(ends).isdisjoint(tokens)
            if goes_on:
                matcher = self._matcher_after(text, row, tokens)
                goes_on = matcher is not None
                if matcher is not None:
                    allowed[column] = self._mask(matcher, ends, allowed.shape[-1])
            elif not text.eos:  # generate does not end a row
                allowed[column] = False
                allowed[column, ends] = True
        return goes_on

    def _matcher_after(self, text: SequenceBatch, row: int, tokens: list[int]) -> LLMatcher | None:
        """Returns the matcher that has read these tokens; None for a beam that is impossible."""
        matchers = self._matchers.setdefault(text, {})
        tokens_read, matcher = matchers.pop(row, ([], self._start.deep_copy()))
        if tokens[: len(tokens_read)] != tokens_read:
            tokens_read, matcher = [], self._start.deep_copy()
        new = tokens[len(tokens_read) :]
        count = matcher.try_consume_tokens(new)
        if count == len(new):
            matchers[row] = tokens, matcher
            return matcher
        if text.beams > 1:  # where fewer tokens are allowed than there are beams
            return None
        step = len(tokens_read) + count
        raise BadEdit(
            f"row {text.of(row)} has {self._lm.string(new[count])!r} at step {step}, which "
            f"{self._hook} forbids: what is not a hook or a rule of generate has written it"
        )

    def _mask(self, matcher: LLMatcher, ends: list[int], size: int) -> Any:
        """Returns for each row of the vocabulary whether the matcher allows it."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().partition("<state>")[0].split())
            raise BadEdit(
                f"{self._hook} cannot go on: no token of the vocabulary continues the text, or the "
                f"grammar is too large ({reason})"
            )
        tokens = np.unpackbits(bits, bitorder="little")[: self._lm.n_tokens]
        mask = np.zeros(size, dtype=bool)
        mask[: len(tokens)] = tokens
        mask[list(self._library_ends.intersection(range(size)))] = False
        mask[ends] = matcher.is_accepting()
        return mask

    def _rule(self, here: EditContext, ruled: list[int], allowed: Tensor) -> None:
        """Notes what is allowed in the step that a `generate` is in, and checks forced tokens."""
        text, cells = here.cells.text, here.cells
        if not text.generating or not ruled:
            return
        rows, prompts, steps = [cells.rows[index] for index in ruled], [], []
        last_cells = [len(cells.row_positions[index]) - 1 for index in ruled]
        of_rows = allowed[ruled, last_cells]
        for index, row in enumerate(rows):
            prompt, position = text.of(row), cells.row_positions[ruled[index]][-1]
            prompts.append(prompt)
            steps.append(position - text.lengths[prompt] + 1)
            decision = text.decided.get((row, text.columns[prompt][position]))
            if decision is not None and not bool(of_rows[index, decision.token]):
                raise BadEdit(
                    f"{decision.hook} puts {self._name(decision.token)} first in row {prompt} at "
                    f"step {steps[-1]}, where {self._hook} forbids it: change one of the two"
                )
        text.rulings.append(Ruling(str(self._hook), rows, prompts, steps, of_rows, self._name))

    def _name(self, token: int) -> str:
        return repr(self._lm.string(token))


def check_sequences(
    hooks: Iterable[object],
    lm: LM,
    text: SequenceBatch,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[int],
) -> None:
    """Raises `Unsupported` for a sequence that `generate` returned and a grammar forbids.

    That is a beam that beam search went on with where the grammar allowed too few tokens.
    """
    for hook in hooks:
        if not isinstance(hook, Grammar):
            continue
        start, ends = hook.start(lm), text.eos or _end_tokens(lm)
        selected = text.selected_positions(hook.where)
        for index, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
            new = list(tokens[text.lengths[prompt] :])
            if selected[prompt] is not None and not _is_allowed(start.deep_copy(), new, ends):
                raise Unsupported(
                    f"sequence {index} of {len(rows)}, of row {prompt}, is none that {hook} "
                    "allows: it has fewer texts than there are beams, so take fewer beams, or "
                    "return fewer sequences"
                )


def _is_allowed(matcher: Any, tokens: list[int], ends: Collection[int]) -> bool:
    """True if a grammar allows a text; the matcher reads no end token of generate's own."""
    count = matcher.try_consume_tokens(tokens)
    return count == len(tokens) or (tokens[count] in ends and matcher.is_accepting())


@check_keywords
def grammar(
    *,
    json: Any = None,
    regex: str | None = None,
    ebnf: str | None = None,
    rows: IndicesLike = None,
) -> Grammar:
    """Makes each row's generated text a JSON document, a match of a regex, or one of a grammar.

    `json` is a JSON schema: a dict, its text, or a pydantic model. `regex` is a regular expression
    in the syntax of Rust, without look-around, which the whole text matches. `ebnf` is a grammar as
    llama.cpp writes it ('root ::= "yes" | "no"'), or in Lark ('start: "yes" | "no"').

    At each step the logits of all tokens with which the text cannot become such a text are -inf.
    The end token is possible exactly where the text may end. If `max_new_tokens` is reached before,
    the text is the beginning of one. In a forward the edit acts at the prompt's last position, as
    before the first token.

    Other edits act before the grammar and after it, in the order in which they are given. `BadEdit`
    is raised, before a token is drawn, if a hook or a rule of `generate` leaves nothing of what the
    grammar allows, or makes possible what it forbids (`force`, `swap`, `forced_eos_token_id` …);
    the message names both. `Unsupported` is raised if beam search returns a text that the grammar
    forbids, since there are fewer texts than beams.

    llguidance (`pip install 'hookkit[grammar]'`) reads the grammars. What it cannot keep of a
    schema raises `BadHook`. Its options, such as {"x-guidance": {"whitespace_flexible": False}},
    are a part of the schema.

    >>> print(grammar(regex=r"(yes|no)[.!]"))
    grammar(regex='(yes|no)[.!]')
    >>> capital = grammar(regex=r" [A-Z][a-z]+[.]")
    >>> settings = {"max_new_tokens": 8, "do_sample": False}
    >>> generate(lm, "The capital of France is", capital, **settings).generated
    [' Paris.<|im_end|>']
    """
    arguments = {"json": json, "regex": regex, "ebnf": ebnf}
    values = leave_out_none(arguments)
    if len(values) != 1:
        named = " and ".join(values) or "none"
        raise BadHook(f"grammar() needs one of json=, regex= and ebnf=, and was given {named}")
    kind, text = values.popitem()
    if kind == "json":
        text = _schema_text(text)
    return Grammar(LOGITS, as_where(None, rows, EVERY_STEP), kind, text)


def _schema_text(schema: Any) -> str:
    """Returns a JSON schema as text. The order of its keys, which documents follow, is kept."""
    make_schema = getattr(schema, "model_json_schema", None)
    if isinstance(schema, type) and make_schema is not None:  # a pydantic model
        schema = make_schema()
    try:
        if isinstance(schema, str):
            schema = loads(schema)
        if isinstance(schema, Mapping | bool):
            return dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadHook(f"json={describe(schema)} is no JSON: {error}") from error
    raise BadHook(
        f"json={describe(schema)} is no JSON schema: give a dict, its text, or a pydantic model"
    )


# ---- the library


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra(
            "hk.grammar needs llguidance, which is not installed: pip install 'hookkit[grammar]'"
        ) from error
    return llguidance


# Reading a vocabulary takes half a second, so that each tokenizer is read once.
_TOKENIZERS: WeakKeyDictionary[Any, LLTokenizer] = WeakKeyDictionary()


def _tokenizer_of(lm: LM, hook: Grammar) -> LLTokenizer:
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise BadHook(f"{hook} is of text, and this model came without a tokenizer")
    if tokenizer not in _TOKENIZERS:
        _library()
        from llguidance.hf import from_tokenizer

        try:
            _TOKENIZERS[tokenizer] = from_tokenizer(tokenizer)
        except Exception as error:  # that of the library, which names no classes of errors
            raise BadHook(
                f"{hook}: llguidance cannot read the tokenizer {type(tokenizer).__name__}: {error}"
            ) from error
    return _TOKENIZERS[tokenizer]


def _end_tokens(lm: LM) -> frozenset[int]:
    """Returns the tokens that end a text where `generate` says none."""
    config = getattr(lm.root, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = getattr(lm.tokenizer, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(torch.as_tensor(ends).flatten().tolist())


def _ended_rows(text: SequenceBatch) -> set[int]:
    """Returns the model rows that a `generate` has ended. Beams show it by their end token."""
    if text.ended is None or text.beams > 1:
        return set()
    return set(text.ended.nonzero().flatten().tolist())
