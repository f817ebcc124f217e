"""The grammar of hooks as short texts: VERB:WHAT@WHERE.

`parse_parts` splits a text into a `Spelling`; WHAT holds sites or tokens, WHERE a position or step
and settings. Values are numbers, texts, lists, slices, and calls such as at('store'). Conditions
are imported where a text has one, so that positions are read without torch.
"""

import ast
import itertools
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..arguments import shorten
from ..errors import BadHook
from ..models import positions, words

if TYPE_CHECKING:
    from ..models.words import WordLike

CONDITIONS = (
    "entropy_above", "entropy_below", "margin_above", "margin_below", "rank_of", "prob_of",
    "norm_above", "text_ends", "contains",
)  # fmt: skip
CALLS = ("at", "role", "turn", "word", *CONDITIONS)
NAMES: dict[str, Any] = {
    "PROMPT": positions.PROMPT,
    "GENERATED": positions.GENERATED,
    "TEMPLATE": positions.TEMPLATE,
    "IMAGE": positions.IMAGE,
    "AUDIO": positions.AUDIO,
    "inf": float("inf"),
}
END = r"(-?\d{1,18})?"  # an end of a slice; more digits are no position
SLICE = re.compile(rf"{END}:{END}(?::(\d{{1,18}}))?")
MAX_LENGTH = 2000  # characters of a WHERE
SHOWN = 200  # characters of a text in a message
MAX_DEPTH = 20  # nested brackets, and signs before a number
SETTING = re.compile(r"\s*([a-z_]+)=(.*)", re.DOTALL)
SITE = r"[A-Za-z_][\w.\[\]-]*(?::(?:input|output)(?::\w+)?)?"
SITES = re.compile(rf"\s*{SITE}(?:\s*,\s*{SITE})*\s*")
STEP_VERBS = ("force", "ban", "restrict", "boost", "cap", "swap", "set_rank", "toward", "away_from")
# the keyword of a position or step without a name; "pos" for other verbs
POSITION_NAMES = {"knockout": "query", **dict.fromkeys(STEP_VERBS, "step")}
QUOTES = "'\""


class _NoValueError(Exception):
    """Raised for a text that is not a value of the grammar."""


@dataclass(frozen=True)
class Spelling:
    """The parts of a hook's text, which is shown in messages."""

    text: str
    verb: str
    what: str
    settings: dict[str, Any] = field(default_factory=dict)


def parse_parts(text: str) -> Spelling:
    """Splits VERB:WHAT@WHERE. The first @ with values after it ends WHAT."""
    verb, colon, after_verb = text.partition(":")
    verb = verb.strip()
    shown_text = shorten(text, SHOWN)
    if not colon or not re.fullmatch(r"[a-z_]+", verb):
        raise BadHook(
            f"{shown_text!r} spells no hook: write VERB:WHAT@WHERE, such as 'ablate:z.9.3', "
            "'force: coffee@0' or 'steer:resid_post.12:mood.safetensors*3'; or what Hook.to_json() "
            "writes"
        )
    # an earlier @ would have too much after it
    first = max(0, len(after_verb) - MAX_LENGTH - 1)
    for match in re.compile("@").finditer(after_verb, first):
        after = after_verb[match.end() :]
        has_quote = any(quote in after for quote in QUOTES)
        # a value contains another @ only in quotes
        if "@" in after and not has_quote:
            continue
        try:
            settings = _parse_where(after, POSITION_NAMES.get(verb, "pos"))
        except _NoValueError:
            continue
        return Spelling(shown_text, verb, after_verb[: match.start()], settings)
    return Spelling(shown_text, verb, after_verb)


def parse_place(text: str, what: str = "a position") -> Any:
    """Parses a position or a step: -1, 1:4, [0, 2], at('store') or PROMPT; "all" is None."""
    if text.strip() == "all":
        return None
    try:
        return _parse_value(text)
    except _NoValueError:
        raise BadHook(
            f"{shorten(text, SHOWN)!r} is no place for {what}: write a number, 1:4, [0,2], "
            "at('store'), role('user'), turn(-1), TEMPLATE, IMAGE, PROMPT, GENERATED or all"
        ) from None


def _parse_where(text: str, position_name: str) -> dict[str, Any]:
    """Returns the settings of a WHERE; the first may be a position or a step without its name."""
    settings = {}
    for number, item in enumerate(split(text)):
        if setting := SETTING.fullmatch(item):
            settings[setting[1]] = setting[2]  # a text that is not a value is kept as it is
            with suppress(_NoValueError):
                settings[setting[1]] = _parse_value(setting[2])
        elif number == 0:
            settings[position_name] = _parse_value(item)
        else:
            raise _NoValueError
    return settings


def _parse_value(text: str) -> Any:
    text = text.strip()
    if match := SLICE.fullmatch(text):
        ends = [int(end) if end else None for end in match.groups()]
        return slice(*ends)
    if _is_too_complex(text):
        raise _NoValueError
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two if nested deeply
        raise _NoValueError from None


def _is_too_complex(text: str) -> bool:
    """True for a text that is longer or deeper than any value, and slow to parse."""
    if len(text) > MAX_LENGTH:
        return True
    changes_of_depth = ((letter in "([{") - (letter in ")]}") for letter in text)
    max_depth = max(itertools.accumulate(changes_of_depth), default=0)
    n_operators = sum(map(text.count, ("+", "~", "not ")))
    has_many_signs = re.search(rf"(?:-\s*){{{MAX_DEPTH}}}", text) is not None
    return max(max_depth, n_operators) > MAX_DEPTH or has_many_signs


def _evaluate(node: ast.expr) -> Any:
    """Returns the value of an expression of numbers, texts, lists, and known names and calls."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub()):
            value = _evaluate(node.operand)
            if isinstance(value, int | float):
                return -value
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_evaluate_condition(operand)
        case ast.BinOp(op=ast.BitAnd()):
            return _evaluate_condition(node.left) & _evaluate_condition(node.right)
        case ast.BinOp(op=ast.BitOr()):
            return _evaluate_condition(node.left) | _evaluate_condition(node.right)
        case ast.List() | ast.Tuple():
            return list(map(_evaluate, node.elts))
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            return _call(name, node)
    raise _NoValueError


def _evaluate_condition(node: ast.expr) -> Any:
    """Returns the value of a part of a condition, which may be combined with others."""
    value = _evaluate(node)
    if isinstance(value, bool | int | float | str | list | None):
        raise _NoValueError
    return value


def _call(name: str, node: ast.Call) -> Any:
    module: Any = positions
    if name == "word":
        module = words
    elif name in CONDITIONS:
        from . import when as module
    keywords = {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
    arguments = map(_evaluate, node.args)
    try:
        return getattr(module, name)(*arguments, **keywords)
    except TypeError as error:
        raise BadHook(f"{ast.unparse(node)[:80]!r} cannot be read: {error}") from error


def split(text: str) -> list[str]:
    """Splits a text at its commas, except those in brackets and quotes.

    A quote opens only where a value may begin.
    """
    items, start, depth, open_quote, previous = [], 0, 0, "", ","
    for index, letter in enumerate(text):
        if open_quote:
            if letter == open_quote and previous != "\\":
                open_quote = ""
        elif letter in QUOTES and previous in ",=([{":
            open_quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            items.append(text[start:index])
            start = index + 1
        if letter != " ":
            previous = letter
    return [*items, text[start:]]


def parse_sites(spelling: Spelling) -> tuple[list[str], str]:
    """Returns the sites at the start of WHAT, and the text after them, which begins with : or *."""
    match = SITES.match(spelling.what)
    sites = match[0] if match else ""
    after = spelling.what[len(sites) :]
    if not sites or (after and after[0] not in ":*"):
        raise BadHook(
            f"{spelling.text!r} names no site where one is meant: write "
            f"{spelling.verb}:resid_post.6 or z.9.3"
        )
    return list(map(str.strip, sites.split(","))), after


def parse_token(text: str, spelling: Spelling) -> "WordLike":
    """Returns a token of WHAT. Raises `BadHook` for an empty text."""
    if not text:
        raise BadHook(
            f"{spelling.text!r} names an empty token: write {spelling.verb}: coffee, where the "
            "space is part of the token"
        )
    return parse_bare_token(text)


def parse_bare_token(text: str) -> "WordLike":
    """Returns a token or a word.

    A token is the text itself with its leading space, '…' or id(28). A word is word:coffee, or
    word('coffee', plural=True).
    """
    bare = text.strip()
    if match := re.fullmatch(r"id\((\d{1,18})\)", bare):
        return int(match[1])
    if bare.startswith("word:"):
        return words.word(bare.removeprefix("word:").strip())
    if bare.startswith(("'", '"', "word(")):
        with suppress(_NoValueError):
            value = _parse_value(bare)
            if value and not isinstance(value, list):
                return value
    return text


def parse_amount(text: str, sign: str, spelling: Spelling) -> tuple[str, float]:
    """Splits a text at its last sign. Returns the text before it and the number after it."""
    what, _, number = text.rpartition(sign)
    try:
        return what, float(number)
    except ValueError:
        example = {"=": " tea=2.5", "*": "mlp_out.4*0.5"}[sign]
        raise BadHook(
            f"{spelling.text!r} is no amount for {shorten(text, SHOWN)!r}: write "
            f"{spelling.verb}:{example}"
        ) from None
