"""The grammar of hooks as short texts: VERB:WHAT@WHERE into its parts, and WHERE into values."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..arguments import shortened
from ..errors import BadHook
from ..models.positions import GENERATED, PROMPT, at
from ..models.tokens import Token
from .conditions import (
    Phrase,
    entropy_above,
    entropy_below,
    margin_above,
    margin_below,
    phrase,
    prob_of,
    rank_of,
)

CALLS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        at,
        phrase,
        entropy_above,
        entropy_below,
        margin_above,
        margin_below,
        rank_of,
        prob_of,
    )
}
NAMES: dict[str, Any] = {"PROMPT": PROMPT, "GENERATED": GENERATED, "inf": float("inf")}
END = r"(-?\d{1,18})?"  # of a span; more digits are no position
SPAN = re.compile(rf"{END}:{END}(?::(\d{{1,18}}))?")
LONGEST = 2000  # letters of a WHERE
SHOWN = 200  # letters of a text that a message shows
DEEPEST = 20  # brackets in one another, and signs before a number
NAMED = re.compile(r"\s*([a-z_]+)=(.*)", re.DOTALL)
SITE = r"[A-Za-z_][\w.\[\]-]*(?::(?:input|output)(?::\w+)?)?"
SITES = re.compile(rf"\s*{SITE}(?:\s*,\s*{SITE})*\s*")
QUOTES = "'\""


class _NoValueError(Exception):
    """A text that is no value of the grammar."""


@dataclass(frozen=True)
class Spelling:
    """The parts of a hook's text, which `text` shows in messages; `place` is a WHERE without a
    name, the position or the step.
    """

    text: str
    verb: str
    what: str
    place: Any = None
    settings: dict[str, Any] = field(default_factory=dict)


def parts_of(text: str) -> Spelling:
    """VERB:WHAT@WHERE as its parts. The first @ behind which values stand ends WHAT."""
    verb, colon, rest = text.partition(":")
    shown = shortened(text, SHOWN)
    if not colon or not re.fullmatch(r"[a-z_]+", verb.strip()):
        raise BadHook(
            f"{shown!r} spells no hook: write VERB:WHAT@WHERE, such as 'ablate:z.9.3', 'force: coffee@0' or "
            "'steer:resid_post.12:mood.safetensors*3'; or what Hook.to_json() writes"
        )
    for place in (number for number, letter in enumerate(rest) if letter == "@"):
        behind = rest[place + 1 :]
        if len(behind) > LONGEST or (
            "@" in behind and not any(quote in behind for quote in QUOTES)
        ):
            continue  # a value has another @ in quotes alone
        try:
            where, settings = _where(behind)
        except _NoValueError:
            continue
        return Spelling(shown, verb.strip(), rest[:place], where, settings)
    return Spelling(shown, verb.strip(), rest)


def place_of(text: str, what: str = "a position") -> Any:
    """The value of a position or a step as it is written: -1, 1:4, [0, 2], at('store'), PROMPT; all
    is None.
    """
    if text.strip() == "all":
        return None
    try:
        return _value(text)
    except _NoValueError:
        raise BadHook(
            f"{shortened(text, SHOWN)!r} is no place for {what}: write a number, 1:4, [0,2], at('store'), PROMPT, "
            "GENERATED or all"
        ) from None


def _where(text: str) -> tuple[Any, dict[str, Any]]:
    items = split(text)
    place, settings = None, {}
    for number, item in enumerate(items):
        if named := NAMED.fullmatch(item):
            settings[named[1]] = _or_text(named[2])
        elif number:
            raise _NoValueError
        else:
            place = _value(item)
    return place, settings


def _or_text(text: str) -> Any:
    """A setting's value: a value of the grammar, else the text itself."""
    try:
        return _value(text)
    except _NoValueError:
        return text


def _value(text: str) -> Any:
    text = text.strip()
    if span := SPAN.fullmatch(text):
        return slice(*(int(end) if end else None for end in span.groups()))
    if _is_too_much(text):
        raise _NoValueError
    try:
        return _meaning(ast.parse(text, mode="eval").body)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # the last two are of what is deep all the same
        raise _NoValueError from None


def _is_too_much(text: str) -> bool:
    """True for a text that is longer or deeper than any value is, and that Python would need long
    to read.
    """
    if len(text) > LONGEST:
        return True
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    operators = sum(text.count(letter) for letter in "+~") + text.count("not ")
    return (
        deepest > DEEPEST
        or operators > DEEPEST
        or re.search(rf"(?:-\s*){{{DEEPEST}}}", text) is not None
    )


def _meaning(node: ast.expr) -> Any:
    """The value of an expression of numbers, texts, lists, and the calls and names that the grammar
    knows.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        found = _meaning(node.operand)
        if isinstance(found, int | float):
            return -found
    if isinstance(node, ast.List | ast.Tuple):
        return [_meaning(each) for each in node.elts]
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        named = {each.arg: _meaning(each.value) for each in node.keywords if each.arg is not None}
        values = [_meaning(each) for each in node.args]
        try:
            return CALLS[node.func.id](*values, **named)
        except TypeError as error:
            raise BadHook(f"{ast.unparse(node)[:80]!r} cannot be read: {error}") from error
    raise _NoValueError


def split(text: str) -> list[str]:
    """A text at its commas, but those in brackets and in quotes. A quote opens where a value may
    begin.
    """
    items, start, depth, quote, before = [], 0, 0, "", ","
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and before != "\\" else quote
        elif letter in QUOTES and before in ",=([{":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            items.append(text[start:place])
            start = place + 1
        before = before if letter == " " else letter
    return [*items, text[start:]]


def sites_of(spelled: Spelling) -> tuple[list[str], str]:
    """The sites that WHAT begins with, and the rest behind a colon."""
    found = SITES.match(spelled.what)
    sites, rest = (found[0], spelled.what[found.end() :]) if found else ("", spelled.what)
    if not sites or (rest and rest[0] not in ":*"):
        raise BadHook(
            f"{spelled.text!r} names no site where one is meant: write {spelled.verb}:resid_post.6 or z.9.3"
        )
    return [each.strip() for each in sites.split(",")], rest


def tokens_of(spelled: Spelling) -> list[Token | Phrase]:
    """The tokens of WHAT, one or several, as they stand."""
    return [token_of(each, spelled) for each in split(spelled.what)]


def token_of(text: str, spelled: Spelling) -> Token | Phrase:
    """A token of WHAT; `BadHook` for none."""
    if not text:
        raise BadHook(
            f"{spelled.text!r} names an empty token: write {spelled.verb}: coffee, the space being its own"
        )
    return word_of(text)


def word_of(text: str) -> Token | Phrase:
    """A token as it stands, its leading space kept; or in quotes, by its id(28), or a phrase('…')."""
    bare = text.strip()
    if number := re.fullmatch(r"id\((\d{1,18})\)", bare):
        return int(number[1])
    if bare[:1] in (*QUOTES,) or bare.startswith("phrase("):
        try:
            found = _value(bare)
        except _NoValueError:
            return text
        if isinstance(found, str | Phrase) and found:
            return found
    return text


def amount_of(text: str, sign: str, spelled: Spelling) -> tuple[str, float]:
    """What stands before the last sign, and the number behind it."""
    what, _, number = text.rpartition(sign)
    try:
        return what, float(number)
    except ValueError:
        example = {"=": " tea=2.5", "*": "mlp_out.4*0.5"}[sign]
        raise BadHook(
            f"{spelled.text!r} is no amount for {shortened(text, SHOWN)!r}: write {spelled.verb}:{example}"
        ) from None
