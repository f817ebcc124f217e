"""What the pages that compare before with after share: tokens as literals, the page, its settings.

Deltas are after minus before.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pandas as pd

from ..hooks.base import Hook
from ..models.lm import LM
from ..tables.rank_tables import Pair, shift_table
from .page import Report, report
from .parts import FORMATS, Content, Folded, Part

SHIFT_COLUMNS = ["token", "logit_before", "logit_after", "logit_delta",
                 "prob_before", "prob_after", "prob_delta",
                 "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip


def literal_shifts(
    pairs: Sequence[Pair], top: int, movers: int, watched: list[int], named: list[int]
) -> pd.DataFrame:
    """The table of `rank_shift`, with the tokens as literals."""
    table = shift_table(pairs, top, movers, watched, named)
    return table.assign(token=token_literals(pairs[0][0].lm, table["token_id"]))


def token_literals(lm: LM, ids: Iterable[int]) -> list[str]:
    """Tokens as Python literals."""
    return [token_literal(lm, int(token)) for token in ids]


def token_literal(lm: LM, token_id: int) -> str:
    """A token as a Python literal: its text, or its bytes if it is a part of a character."""
    text = lm.string(token_id)
    if "\ufffd" not in text:
        return repr(text)
    data = _bytes_of(str(lm.tokenizer.convert_ids_to_tokens(token_id)))
    return repr(data or text)


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece of a byte-level vocabulary, or of sentencepiece's <0xF0>."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    try:
        return bytes(map(_byte_letters().__getitem__, piece))
    except KeyError:
        return None


@cache
def _byte_letters() -> dict[str, int]:
    """The byte of each letter of GPT-2's vocabulary.

    A printable byte is its own letter. The other bytes are the letters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = sorted(set(range(256)) - printable)
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(unprintable)}


def compose_page(
    parts: Iterable[Content],
    tables: Mapping[str, pd.DataFrame],
    captions: Mapping[str, str],
    about: Mapping[str, Any],
    footer: str,
) -> Report:
    """The page of a comparison: the question and the answer that `about` has, then the parts.

    Beside it are about.json and the captioned tables that have rows, in all formats.
    """
    texts = filter(None, (about["question"], about["answer"]))
    page = report(about["title"], *texts, *parts, footer=footer)
    data = []
    for name, caption in captions.items():
        if name in tables and not tables[name].empty:
            data.append(Part(tables[name], name, caption))
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    return replace(page, data=tuple(data), formats=("csv", *FORMATS), files={"about.json": text})


def write_settings(
    models: str, about: Mapping[str, Any], hooks: Mapping[str, str], note: str = ""
) -> Iterator[Content]:
    """How to make the page again: the models, the versions, and hooks as JSON by their names."""
    yield "# How to make it again"
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield f"{models}.\n{packages}.\nabout.json has all of it{note}."
    for name, text in hooks.items():
        yield Folded(f"{name}, as JSON", text)


def describe_model(about: Mapping[str, Any]) -> str:
    """A model's name, class, dtypes and device."""
    return f"{about['model']} ({about['class']}, {', '.join(about['dtype'])}, {about['device']})"


def hook_as_json(hook: Hook, tensors: Literal["inline", "digest"] = "digest") -> Any:
    """A hook as plain values, with its tensors or with their digests."""
    return json.loads(hook.to_json(tensors=tensors))


def indented_json(value: Any) -> str:
    """Plain values as text with line ends."""
    return json.dumps(value, indent=1, ensure_ascii=False)
