"""Turns prompts into the padded batch that a model reads, and a text into its tokens' positions."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import compress, count, groupby
from typing import Any, TypeAlias

from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import as_bool, as_integer, as_items, as_number, describe, is_mapping
from ..arguments import shorten as shorten
from ..errors import BadPrompt, Unsupported
from .batch_positions import Side as Side
from .batch_positions import pad_batch
from .batch_positions import pad_rows as pad_rows
from .chat import Chat, chat_of, read_with_processor, render
from .lm import LM
from .named_positions import placeholder_ids
from .padding import forward_inputs, padding_scheme
from .prompt_row import (
    PromptRow,
    Row,
    extend_row,
    has_inputs,
    input_names,
    split_inputs,
)

Messages: TypeAlias = Sequence[Mapping[str, Any]]  # a chat
Prompt: TypeAlias = str | Sequence[int] | Tensor | Chat | Messages | Mapping[str, Any]
Prompts: TypeAlias = Prompt | Sequence[Prompt]

MODEL_INPUTS = ("input_ids", "attention_mask")  # the keys that hookkit itself reads in a mapping
# Inputs that hookkit makes, or that take the place of the ids.
REFUSED_INPUTS = ("position_ids", "inputs_embeds", "labels", "past_key_values", "cache_position")
# The token types of text that follows the prompt, by model type.
TYPES_OF_CONTINUATION = {"gemma3": 0, "gemma4": 0, "paligemma": 1}
PROMPT_FORMS = "give texts, chats, or rows of token ids"
OTHER_OBJECTS = {  # the attributes by which an object is recognised, and the message
    ("clean", "corrupted"): "the prompts are Pairs, which have two prompts each: "
    "give pairs.clean or pairs.corrupted",
    ("prompt_lengths", "tokens"): "the prompt is a run: give the ids of a row, run.tokens[0]",
    ("sites", "where"): "the prompt is a hook: "
    "the prompts come after the model, and the hooks after the prompts",
    ("named_modules",): "the prompt is a model, a {kind}: the model comes first, then the prompts",
    ("located",): "the prompt is a model, a {kind}: the model comes first, then the prompts",
    ("convert_ids_to_tokens",): "the prompt is a tokenizer, a {kind}: "
    "the model comes first, then the prompts",
}


# ---- the forms in which users pass prompts


def check_prompts(prompts: object) -> list[str | Chat | Row]:
    """Returns the prompts as a list of texts, chats, and tuples of token ids without padding.

    `prompts` is a text, several texts, the token ids of one row or of several rows, one chat or
    several (as `Chat`, as a list of messages, or as a mapping with `messages`), or a mapping
    with `input_ids` and optionally `attention_mask` and other inputs of the model, as tokenizers
    and processors return it. Several prompts can be in a list, a tuple, a generator, a column of a
    pandas table, a numpy array or a tensor. A row with other inputs is a `PromptRow`. Raises
    `BadPrompt` for anything else, and for a mapping with an input that hookkit makes itself.
    """
    prompt = _single_prompt(prompts, 0)
    if prompt is not None:
        return [prompt]
    if is_mapping(prompts):
        return _rows_of_mapping(prompts)
    refuse_non_prompts(prompts)
    items = as_items(prompts)
    if items is None:
        raise BadPrompt(f"{describe(prompts)} is no prompt: {PROMPT_FORMS}")
    if not items:
        raise BadPrompt("no prompt was given: give a text, a list of texts, or token ids")
    if _are_whole(items):
        return [_row_of_ids(items, 0)]
    return [check_prompt(item, number) for number, item in enumerate(items)]


def check_prompt(item: object, number: int) -> str | Chat | Row:
    """Returns the text, chat or token ids of one of several prompts. `number` is its row."""
    prompt = _single_prompt(item, number)
    if prompt is not None:
        return prompt
    if is_mapping(item):
        return _row_of_mapping(item, number)
    refuse_non_prompts(item)
    ids = as_items(item)
    if ids is None:
        hint = ""
        if item is None or item != item:  # NaN is not equal to itself
            hint = f"; {describe(item)} is missing"
        raise BadPrompt(
            f"prompt {number} is {describe(item)}, which is no prompt: {PROMPT_FORMS}{hint}"
        )
    return _row_of_ids(ids, number)


def _single_prompt(value: object, number: int) -> str | PromptRow | Chat | None:
    """Returns a text, a row with inputs or a chat as one prompt; None for any other value."""
    if isinstance(value, str):
        return str(value)
    return value if isinstance(value, PromptRow) else chat_of(value, number)


def is_token_row(prompts: object) -> bool:
    """True for a collection of whole numbers, which are the token ids of one row."""
    if not isinstance(prompts, list | tuple) and not hasattr(prompts, "dtype"):
        return False
    items = as_items(prompts)
    return bool(items) and _are_whole(items)


def _are_whole(items: Iterable[object]) -> bool:
    return None not in map(as_integer, items)


def refuse_non_prompts(prompts: Any, *, rows: bool = False) -> None:
    """Raises `BadPrompt` for an iterable without prompts. With `rows`, data sets are allowed."""
    kind = type(prompts).__name__
    if isinstance(prompts, bytes | bytearray | memoryview):
        raise BadPrompt(
            f"the prompt is {kind}, which is no text: decode it first, prompt.decode('utf-8')"
        )
    if isinstance(prompts, Set):
        raise BadPrompt(
            f"the prompts are in a {kind}, which has no order: "
            "give a list, sorted(prompts) for example"
        )
    _refuse_table(prompts, rows=rows)
    for attributes, problem in OTHER_OBJECTS.items():
        if all(hasattr(prompts, attribute) for attribute in attributes):
            raise BadPrompt(problem.format(kind=kind))


def _refuse_table(prompts: Any, *, rows: bool) -> None:
    names = getattr(prompts, "columns", None)
    if names is None and not rows:
        names = getattr(prompts, "column_names", None)
    if names is None or callable(names):
        return
    columns = list(map(repr, map(str, names)))
    raise BadPrompt(
        f"the prompts are a table, a {type(prompts).__name__} with the columns "
        f"{', '.join(columns)}: give one column, list(table[{next(iter(columns), repr('text'))}])"
    )


def _row_of_ids(ids: Sequence[object], number: int) -> Row:
    row: list[int] = []
    for token_id in ids:
        whole = as_integer(token_id)
        if whole is None:
            hint = ""
            if as_items(token_id) is not None:
                hint = ", several prompts are given where one is meant"
            raise BadPrompt(
                f"prompt {number} has {describe(token_id)} where a token id is meant{hint}: "
                "token ids are whole numbers; give texts, or rows of token ids"
            )
        row.append(whole)
    return tuple(row)


def _row_of_mapping(item: Any, number: int) -> Row:
    """Returns the ids of a mapping that a tokenizer returned for one text."""
    rows = _rows_of_mapping(item)
    if len(rows) != 1:
        raise BadPrompt(
            f"prompt {number} is a mapping with {len(rows)} rows: give it by itself, as the prompts"
        )
    return rows[0]


def _rows_of_mapping(inputs: Any) -> list[Any]:
    """Returns the rows of ids, without padding, of a mapping that a tokenizer returned."""
    _check_keys(inputs)
    if "input_ids" not in inputs:  # a model that reads sound and writes text
        sounds = as_items(inputs["input_features"]) or []
        return split_inputs([()] * len(sounds), [()] * len(sounds), 0, inputs)
    rows: list[Any] = list(check_prompts(inputs["input_ids"]))
    if str in map(type, rows):
        raise BadPrompt(
            "input_ids are texts: give token ids there, or the texts themselves as the prompts"
        )
    width = max(map(len, rows))
    columns: list[Sequence[int]] = [range(len(row)) for row in rows]
    mask = inputs.get("attention_mask")
    if mask is not None:
        columns = _columns_by_mask(rows, mask)
        rows = [tuple(map(row.__getitem__, own)) for row, own in zip(rows, columns, strict=True)]
    others = {str(name): inputs[name] for name in inputs if name not in MODEL_INPUTS}
    return split_inputs(rows, columns, width, others)


def _columns_by_mask(rows: Sequence[Any], mask: Any) -> list[Sequence[int]]:
    """Returns the columns of each row that are no padding by the mask."""
    mask_rows = _rows_of_mask(mask)
    if len(mask_rows) != len(rows):
        raise BadPrompt(
            f"input_ids has {len(rows)} rows and attention_mask {len(mask_rows)}: give one shape"
        )
    return list(map(_columns_without_padding, rows, mask_rows, count()))


def _rows_of_mask(mask: object) -> list[Any]:
    mask_rows = as_items(mask)
    if mask_rows is None:
        raise BadPrompt(
            f"attention_mask is {describe(mask)}: give 1 for each real token and 0 for padding"
        )
    if all(as_items(mask_row) is None for mask_row in mask_rows):
        return [mask_rows]
    return mask_rows


def _check_keys(inputs: Any) -> None:
    if "input_ids" not in inputs and "input_features" not in inputs:
        keys = ", ".join(map(repr, map(str, inputs))) or "nothing"
        raise BadPrompt(
            f"the prompts are a mapping with {keys}, and without 'input_ids': give texts, "
            "mapping['text'] for example, or what a tokenizer returns"
        )
    refused = [str(key) for key in inputs if key in REFUSED_INPUTS]
    if refused:
        raise BadPrompt(
            f"the prompts have {refused[0]!r}, which hookkit makes itself or cannot read: leave it "
            f"out, for example with inputs.pop({refused[0]!r}), or run the model yourself in "
            "hk.attach"
        )


def _columns_without_padding(row: Any, mask: object, number: int) -> Row:
    """Returns the columns of a row without its padding, which may be before or after the text."""
    values = as_items(mask)
    if values is None or len(values) != len(row):
        size = describe(mask) if values is None else f"{len(values)} numbers"
        raise BadPrompt(
            f"row {number} has {len(row)} input_ids, and its attention_mask has {size}: "
            "give one shape"
        )
    bits = list(map(_mask_bit, values))
    if not {0.0, 1.0}.issuperset(bits):
        raise BadPrompt(
            f"attention_mask of row {number} has other values than 0 and 1: "
            "give 1 for each real token"
        )
    runs = [bit for bit, _ in groupby(bits)]
    if runs.count(1.0) > 1:
        raise BadPrompt(
            f"attention_mask of row {number} has a 0 between tokens, which would be taken "
            "out of the text: hide tokens with hk.knockout(layers, key=…), "
            "and give padding at one end only"
        )
    return tuple(compress(count(), bits))


def _mask_bit(value: object) -> float | None:
    return as_number(value) if as_bool(value) is None else float(bool(value))


# ---- the batch that a model reads


@dataclass(frozen=True)
class Batch:
    """Prompts as the model reads them.

    `rows` are token ids without padding, and `ids` the same padded on one side. `positions` has
    each token's position in its own row, -1 for padding, on the CPU.
    """

    rows: tuple[Row, ...]
    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    side: Side

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return list(map(len, self.rows))

    @property
    def padded(self) -> bool:
        """True if the rows, or their sources, differ in length."""
        sources = [getattr(row, "source", None) or () for row in self.rows]
        return len(set(self.lengths)) > 1 or len(set(map(len, sources))) > 1

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True for real tokens."""
        return (self.positions >= 0).to(self.ids.device)

    def inputs(self, lm: LM) -> dict[str, Tensor]:
        """Returns the arguments of a forward.

        A padded batch has a mask too, and what else the model needs so that a padded row gives the
        same numbers as the row alone. Raises `Unsupported` for a model in which nothing does so.
        """
        width, own = self.ids.shape[1], {"input_ids": self.ids}
        if self.padded:
            own = padding_scheme(lm, self.side, self.rows).inputs(self.ids, self.positions, width)
        return forward_inputs(lm, self.rows, own, width, self.side)


def as_batch(lm: LM, prompts: Prompts, *, side: Side = "right", room: int = 0) -> Batch:
    """Returns the prompts as one padded batch on the model's device.

    Prompts are a text, a list of texts, token ids (one row or several), or what a tokenizer
    returned: a mapping with `input_ids` and perhaps `attention_mask`, padded on either side. Texts
    are tokenized with the tokenizer's own special tokens, and chats by its template. `room` is the
    number of tokens to be generated. Raises `BadPrompt` for empty prompts, for ids outside the
    vocabulary and for texts beyond the context.
    """
    rows = as_rows(lm, prompts)
    for number, row in enumerate(rows):
        if lm.context is not None and len(row) + room > lm.context:
            new = f" and {room} new ones" if room else ""
            raise BadPrompt(
                f"prompt {number} has {len(row)} tokens{new}, and the model's context is "
                f"{lm.context}: shorten it"
            )
    ids, positions = pad_batch(rows, pad_id(lm), side)
    return Batch(tuple(rows), ids.to(lm.device), positions, side)


def as_rows(lm: LM, prompts: Prompts) -> list[Row]:
    """Returns the prompts as rows of token ids of the vocabulary, of any length."""
    rows: list[Row] = []
    placeholders = placeholder_ids(lm)
    for number, content in enumerate(check_prompts(prompts)):
        row = tokenize(lm, content)
        from_tokenizer = isinstance(content, str | Chat) or isinstance(prompts, Mapping)
        _check_ids(lm, number, row, from_tokenizer=from_tokenizer)
        source = getattr(row, "source", None)
        if source is not None:
            _check_ids(lm, number, source, from_tokenizer=from_tokenizer)
        _check_inputs(lm, number, row, placeholders)
        rows.append(row)
    return rows


def _with_source(lm: LM, row: Row) -> Row:
    """Returns the row of an encoder-decoder whose encoder reads these tokens.

    The decoder reads `decoder_input_ids` if the prompt has them, else its start token alone.
    """
    if getattr(row, "source", None) is not None:
        return row
    inputs = dict(getattr(row, "inputs", {}))
    decoder_ids = inputs.pop("decoder_input_ids", None)
    mask = inputs.pop("decoder_attention_mask", None)
    if decoder_ids is None and "input_features" in inputs and row:
        return row  # a row of a run, whose ids are the decoder's
    ids: list[int] = [start_token(lm)]
    if decoder_ids is not None:
        ids = decoder_ids.flatten().tolist()
    if mask is not None:
        ids = list(compress(ids, mask.flatten().tolist()))
    per_token = getattr(row, "per_token", {})
    source = None if "input_features" in inputs else tuple(row)
    return PromptRow(ids, inputs, per_token, source=source)


def start_token(lm: LM) -> int:
    """Returns the token with which a decoder begins."""
    generation = getattr(lm.root, "generation_config", None)
    for config in (generation, lm.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token_id = getattr(config, name, None)
            if isinstance(token_id, int):
                return token_id
    raise BadPrompt(
        f"{type(lm.root).__name__} says no decoder_start_token_id: give decoder_input_ids with the "
        "prompts, {'input_ids': …, 'decoder_input_ids': …}"
    )


def batches_by_length(
    lengths: Sequence[int], max_tokens: int, *, one_length: bool = False
) -> list[list[int]]:
    """Returns batches of indices into rows of these lengths, the longest rows first.

    A batch has at most `max_tokens` tokens with padding; a longer row has a batch of its own. With
    `one_length`, for models that take no mask, all rows of a batch are equally long.
    """
    result: list[list[int]] = []
    width = 0  # of the last batch
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = bool(result) and width * (len(result[-1]) + 1) <= max_tokens
        if fits and (not one_length or width == lengths[index]):
            result[-1].append(index)
        else:
            result.append([index])
            width = lengths[index]
    return result


def pad_id(lm: LM) -> int:
    """Returns the id in the padding, which the mask hides: the pad or end token, or 0."""
    vocab = lm.sizes["vocab"] or math.inf
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(lm.tokenizer, name, None)
        if token_id is not None and token_id < vocab:
            return token_id
    return 0


def tokenize(lm: LM, content: str | Chat | Row) -> Row:
    """Returns the token ids of a text with the tokenizer's own special tokens, or of a chat.

    For an encoder-decoder they are the source of the row that is returned. Raises `BadPrompt` for a
    text that already begins with a special token which the tokenizer puts before every text, so
    that the model would read it twice.
    """
    row = _tokenize(lm, content)
    return _with_source(lm, row) if lm.two_texts else row


def _tokenize(lm: LM, content: str | Chat | Row) -> Row:
    if isinstance(content, Chat):
        return _tokenize_chat(lm, content)
    if not isinstance(content, str):
        return content
    if lm.tokenizer is None:
        raise BadPrompt(
            f"{shorten(content)!r} is text, and this model came without a tokenizer: give token ids"
        )
    ids = tuple(lm.tokenizer.encode(content, verbose=False)) if content else ()
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == (bos, bos) and lm.encode(content)[:2] != [bos, bos]:
        raise BadPrompt(
            f"{shorten(content)!r} begins with {lm.tokenizer.bos_token!r}, which this tokenizer "
            "puts before every text, so the model would read it twice: leave it out of the text, "
            "or give hk.chat(user='…') for a chat, whose template writes it once, or give token ids"
        )
    return ids


def _tokenize_chat(lm: LM, chat: Chat) -> PromptRow:
    if chat.has_media:
        row = _row_of_mapping(read_with_processor(lm.processor, chat), 0)
        inputs_of_row = getattr(row, "inputs", None), getattr(row, "per_token", None)
        return PromptRow(row, *inputs_of_row, speakers=chat.roles)
    rendering = render(lm.tokenizer, chat)
    return PromptRow(rendering.ids, turns=rendering.turns, speakers=chat.roles)


def _check_ids(lm: LM, number: int, row: Row, *, from_tokenizer: bool) -> None:
    if not row:
        raise BadPrompt(f"prompt {number} is empty: the model needs at least one token to read")
    vocab = lm.sizes["vocab"]
    if vocab is None:
        return
    invalid = [token_id for token_id in row if not 0 <= token_id < vocab]
    if not invalid:
        return
    hint = ""
    if from_tokenizer and invalid[0] >= vocab:
        hint = (
            ": the tokenizer is not this model's, or tokens were added to it. Give the model's "
            "own, or call model.resize_token_embeddings(len(tokenizer))"
        )
    raise BadPrompt(
        f"prompt {number} has token id {invalid[0]}, and the vocabulary has ids 0 to "
        f"{vocab - 1}{hint}"
    )


def _check_inputs(lm: LM, number: int, row: Row, placeholders: set[int]) -> None:
    """Raises if the model would not read an input of a row, or lacks what a token stands for."""
    ignored = [name for name in input_names([row]) if name not in lm.takes]
    if ignored:
        raise BadPrompt(
            f"prompt {number} has {ignored[0]!r}, which would be ignored: the forward of "
            f"{type(lm.root).__name__} has no such parameter. Leave it out, for example with "
            f"inputs.pop({ignored[0]!r})"
        )
    missing = placeholders.intersection(row)
    if missing and not getattr(row, "inputs", {}):
        raise BadPrompt(
            f"prompt {number} has token {min(missing)}, which stands for an image, a video or "
            "sound, and came without it: give what the model's processor returns for the text and "
            "its images. If it was given, this function cannot use it"
        )


def continue_row(lm: LM, row: Row, ids: Sequence[int]) -> Row:
    """Returns a row with text after it, with the types per token that the model's text has."""
    fills = {"mm_token_type_ids": 0}
    model_type = getattr(lm.config, "model_type", None)
    if model_type in TYPES_OF_CONTINUATION:
        fills["token_type_ids"] = TYPES_OF_CONTINUATION[model_type]
    return extend_row(row, ids, fills)


def refuse_inputs(rows: Iterable[Any], function: str) -> None:
    """Raises `Unsupported` for prompts with more than token ids, in a function that reads ids."""
    for number, row in enumerate(rows):
        if has_inputs(row):
            raise Unsupported(
                f"{function} reads token ids only, and prompt {number} has "
                f"{input_names([row])[0]!r} too"
            )
