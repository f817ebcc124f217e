"""What the pages that compare before with after share: the columns, the page, its settings.

Deltas are after minus before.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import pandas as pd

from ..arguments import shorten
from ..hooks.base import Hook
from ..models.lm import LM
from .page import Report, report
from .parts import FORMATS, Content, Folded, Part

SHIFT_COLUMNS = ["token", "logit_before", "logit_after", "logit_delta",
                 "prob_before", "prob_after", "prob_delta",
                 "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip
LONGEST_NAME = 80  # letters of a prompt in a sentence


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
    texts = filter(None, (about["question"], *about["answer"].split("\n")))
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


def name_prompt(lm: LM, text: str) -> str:
    """A prompt's text as a sentence quotes it: short, in one line, without special tokens.

    Of a long text the middle is left out. Of a long chat, which ends with the question, it is the
    beginning.
    """
    tokens = getattr(lm.tokenizer, "all_special_tokens", ())  # a model may lack a tokenizer
    special = [token for token in tokens if token in text]
    words = text
    for token in special:
        words = words.replace(token, " ")
    words = " ".join(words.split()) or text
    if len(special) > 1 and len(words) > LONGEST_NAME:
        return f"…{words[1 - LONGEST_NAME :]}"
    return shorten(words, LONGEST_NAME)


def describe_model(about: Mapping[str, Any]) -> str:
    """A model's name, class, dtypes and device."""
    return f"{about['model']} ({about['class']}, {', '.join(about['dtype'])}, {about['device']})"


def hook_as_json(hook: Hook, tensors: Literal["inline", "digest"] = "digest") -> Any:
    """A hook as plain values, with its tensors or with their digests."""
    return json.loads(hook.to_json(tensors=tensors))


def indented_json(value: Any) -> str:
    """Plain values as text with line ends."""
    return json.dumps(value, indent=1, ensure_ascii=False)
