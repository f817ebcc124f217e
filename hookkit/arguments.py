"""The readers of arguments: each kind of value that a user passes in is read here, in one way, with one error.

A reader takes the value and the name of the argument. It returns the value in the form that the code works with, or
raises an error that says what was passed, what is possible, and what to do. numpy's and pandas' integers and torch's
tensors without axes are whole numbers everywhere; True and False never are.

    whole_number(value, "top", least=1)         finite_number(value, "scale")       choice(value, "per", NAMES)
    read_token(value)       read_tokens(values, "ban")    prompt_rows(prompts)                path_of(folder, "folder")

`checks_arguments` is the decorator of public functions: it reads each argument by its annotation before the function
runs, so that `int` is a whole number, `bool` is True or False, `Literal` is one of its names, and `Run` is a run.

Nothing here imports torch, numpy or pandas: their values are recognised by what they can do.
"""

import functools
import inspect
import math
import numbers
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)

from .errors import (
    BadArgument,
    BadFile,
    BadHook,
    BadPrompt,
    EmptySelection,
    HookkitError,
    NotOneToken,
    OutOfRange,
    UnknownKeyword,
    did_you_mean,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Class = TypeVar("Class", bound=type[Any])
Error: TypeAlias = type[HookkitError]
Row: TypeAlias = tuple[int, ...]

LARGEST_SEED = 2**63 - 1
MODEL_INPUTS = ("input_ids", "attention_mask")  # what a mapping of prompts may hold


# ---- words for messages


def shortened(text: str, most: int = 80) -> str:
    """A long text as its beginning and end."""
    if len(text) <= most:
        return text
    return f"{text[: most - 30]}…{text[-25:]}"


def described(value: Any) -> str:
    """A value as a message shows it: short values as they are written, others by their type and shape."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | slice):
        if isinstance(value, int) and abs(value) >= 10**30:
            return "an integer of more than 30 digits"
        return shortened(repr(value))
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeio" else "a"
    if isinstance(shape, tuple) and hasattr(value, "dtype"):
        if not shape:
            return shortened(repr(value))
        return f"{article} {kind} of shape {list(shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= 4:
        simple = all(item is None or isinstance(item, bool | int | float | str) for item in value)
        if simple:
            return shortened(repr(value))
    return f"{article} {kind}"


# ---- numbers


def as_whole(value: object) -> int | None:
    """The whole number that a value is, of Python, numpy, pandas or a tensor without axes; None for anything else."""
    if isinstance(value, bool | str | bytes):
        return None
    if getattr(value, "shape", ()) != () or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        return None


def as_real(value: object) -> float | None:
    """The real number that a value is, infinite and NaN included; None for anything else."""
    if isinstance(value, bool | str | bytes | complex):
        return None
    if not isinstance(value, numbers.Real):
        is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
        value = value.item() if is_scalar else None  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_flag(value: object) -> bool | None:
    """True or False, of Python or numpy; None for anything else."""
    if isinstance(value, bool):
        return value
    return (
        bool(value)
        if type(value).__name__ in ("bool_", "bool") and type(value).__module__ == "numpy"
        else None
    )


def whole_number(
    value: object,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
    meaning: str = "",
    error: Error = OutOfRange,
) -> int:
    """A whole number between `least` and `most`. `meaning` says what it counts, for the message."""
    number = as_whole(value)
    too_small = number is not None and least is not None and number < least
    too_large = number is not None and most is not None and number > most
    if number is None or too_small or too_large:
        what = meaning.rstrip(",")
        if number is None:
            about = f"{what}, " if what else ""
            raise error(
                f"{name}={described(value)}: give {about}a whole number{_between(least, most)}"
            )
        limit = f"at least {least}" if too_small else f"at most {most}"
        raise error(f"{name}={number}: give {what or 'a whole number'}, {limit}")
    return number


def whole_numbers(
    values: object,
    name: str,
    *,
    least: int | None = None,
    meaning: str = "",
    error: Error = OutOfRange,
) -> list[int]:
    """One whole number or several, as a list without repeats."""
    if as_whole(values) is not None:
        return [whole_number(values, name, least=least, meaning=meaning, error=error)]
    items = items_of(values)
    if items is None:
        raise error(
            f"{name}={described(values)}: give {meaning or name}, a whole number or a list of them"
        )
    if not items:
        raise EmptySelection(
            f"{name}={described(values)} selects nothing: name at least one, or leave {name} out"
        )
    found = [whole_number(item, name, least=least, meaning=meaning, error=error) for item in items]
    if len(set(found)) < len(found):
        twice = next(number for number in found if found.count(number) > 1)
        raise BadHook(f"{name} names {twice} twice: name each once")
    return found


def finite_number(
    value: object,
    name: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    meaning: str = "",
    error: Error = BadHook,
) -> float:
    """A finite real number within the limits: from `least`, to `most`, larger than `above`, smaller than `below`."""
    number = as_real(value)
    about = f"{meaning.rstrip(',')}, " if meaning else ""
    if number is None or not math.isfinite(number):
        raise error(
            f"{name}={described(value)} is not a finite number: give {about}a real number such as 2.0"
        )
    limits = {
        "at least": (least, least is not None and number < least),
        "at most": (most, most is not None and number > most),
        "above": (above, above is not None and number <= above),
        "below": (below, below is not None and number >= below),
    }
    if any(is_outside for _, is_outside in limits.values()):
        words = [f"{word} {limit:g}" for word, (limit, _) in limits.items() if limit is not None]
        what = meaning or "a number"
        raise error(f"{name}={described(value)}: give {what} {' and '.join(sorted(words))}")
    return number


def probability(value: object, name: str, *, error: Error = BadHook) -> float:
    """A probability from 0 to 1."""
    return finite_number(
        value, name, least=0.0, most=1.0, meaning="a probability from 0 to 1", error=error
    )


def seed_of(value: object, name: str = "seed") -> int:
    """A seed: a whole number from 0 upwards that fits into 63 bits."""
    meaning = "a seed, so that the same draws can be made again,"
    return whole_number(value, name, least=0, most=LARGEST_SEED, meaning=meaning, error=OutOfRange)


def flag(value: object, name: str, *, error: Error = BadArgument) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    answer = as_flag(value)
    if answer is None:
        raise error(f"{name}={described(value)}: give True or False")
    return answer


def _between(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" from {least} upwards"
    return "" if most is None else f" up to {most}"


# ---- names and texts


def choice(value: object, name: str, names: Iterable[str], *, error: Error = BadHook) -> str:
    """One of some names, as it is written there."""
    known = list(names)
    if isinstance(value, str) and value in known:
        return str(value)
    hint = did_you_mean(value, known) if isinstance(value, str) else "."
    raise error(
        f"{name}={described(value)} is unknown{hint} Give one of {', '.join(map(repr, known))}."
    )


def text_of(
    value: object, name: str, *, meaning: str = "a text", error: Error = BadArgument
) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise error(f"{name}={described(value)}: give {meaning}")
    return str(value)


def path_of(
    value: object, name: str = "path", *, error: Error = BadArgument
) -> str | os.PathLike[str]:
    """The path of a file or folder, as a text or a `pathlib.Path`."""
    if isinstance(value, str | os.PathLike) and str(value) and "\0" not in str(value):
        return value
    raise error(
        f"{name}={described(value)} is no path: give the path of a file or folder, as a text or a pathlib.Path"
    )


def file_of(value: object, name: str = "path") -> Path:
    """The path of a file that is there; `BadFile` where there is none, or a folder."""
    path = Path(path_of(value, name))
    if path.is_dir():
        raise BadFile(
            f"{name}={str(path)!r} is a folder, and a file is meant: give the path of one in it"
        )
    if not path.exists():
        raise BadFile(f"{name}={str(path)!r} does not exist: give the path of a file")
    return path


def folder_of(value: object, name: str = "folder") -> Path:
    """The path of a folder, which may not be there yet; `BadFile` where it is a file, or within one."""
    path = Path(path_of(value, name))
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise BadFile(
                f"{name}={str(path)!r}: {part.name!r} is a file, and a folder is meant: give another name"
            )
    return path


# ---- tokens


def read_token(value: object, name: str = "token") -> str | int:
    """One token: its text, or its id as a whole number from 0."""
    if isinstance(value, str):
        if not value:
            raise NotOneToken(f"{name}='' is no token: give its text, such as ' coffee', or its id")
        return str(value)
    number = as_whole(value)
    if number is not None and number >= 0:
        return number
    if number is not None:
        raise NotOneToken(f"{name}={number} is no token: ids count from 0 upwards")
    hint = ""
    if isinstance(value, bytes):
        hint = "; bytes are no text: decode them first, value.decode()"
    elif as_real(value) is not None and not isinstance(value, bool):
        hint = "; an id is a whole number, int(value)"
    elif items_of(value) is not None:
        hint = "; several are given where one token is meant"
    raise NotOneToken(
        f"{name}={described(value)} is no token: give its text, such as ' coffee', or its id{hint}"
    )


def read_tokens(
    values: object, name: str = "tokens", *, also: tuple[type, ...] = ()
) -> tuple[Any, ...]:
    """One token or several, in order. Values of the types `also` are kept as they are, such as phrases."""
    if isinstance(values, (str, bytes, bool, *also)) or as_whole(values) is not None:
        values = [values]
    items = items_of(values)
    if items is None:
        read_token(values, name)
        return ()
    return tuple(item if isinstance(item, also) else read_token(item, name) for item in items)


# ---- prompts


def prompt_rows(prompts: object) -> list[str | Row]:
    """The prompts one by one: each a text, or a tuple of token ids without padding.

    `prompts` is a text, several texts, the token ids of one row or of several, or a mapping with `input_ids` and
    perhaps `attention_mask`, as a tokenizer returns it. Lists, tuples, generators, columns of a pandas table, numpy
    arrays and tensors hold several. `BadPrompt` for anything else, and for a mapping with a key that would be ignored.
    """
    if isinstance(prompts, str):
        return [str(prompts)]
    if _is_mapping(prompts):
        return _rows_of_mapping(prompts)
    refuse_container(prompts)
    items = items_of(prompts)
    if items is None:
        raise BadPrompt(f"{described(prompts)} is no prompt: {_PROMPTS_ARE}")
    if not items:
        raise BadPrompt("no prompt was given: give a text, a list of texts, or token ids")
    if all(as_whole(item) is not None for item in items):
        return [_row_of_ids(items, 0)]
    return [one_prompt(item, number) for number, item in enumerate(items)]


_PROMPTS_ARE = "give texts, or rows of token ids"


def is_one_row(prompts: object) -> bool:
    """True where what holds several holds whole numbers: the token ids of one row."""
    if not isinstance(prompts, list | tuple) and not hasattr(prompts, "dtype"):
        return False
    items = items_of(prompts)
    return bool(items) and all(as_whole(item) is not None for item in items or ())


def _is_mapping(value: object) -> bool:
    """True for a dict and for what a tokenizer or processor returns, which is a `UserDict`."""
    return isinstance(value, Mapping) or (
        hasattr(value, "keys") and hasattr(value, "data") and hasattr(value, "items")
    )


def refuse_container(prompts: Any, *, rows: bool = False) -> None:
    """Raises `BadPrompt` for what can be iterated over, and does not hold prompts.

    With `rows`, a data set of which each row is a mapping is let through.
    """
    kind = type(prompts).__name__
    if isinstance(prompts, bytes | bytearray | memoryview):
        raise BadPrompt(
            f"the prompt is {kind}, which is no text: decode it first, prompt.decode('utf-8')"
        )
    if isinstance(prompts, Set):
        raise BadPrompt(
            f"the prompts are in a {kind}, which has no order: give a list, sorted(prompts) for example"
        )
    names = getattr(prompts, "columns", None)
    if names is None and not rows:
        names = getattr(prompts, "column_names", None)
    if names is not None and not callable(names):
        columns = [str(name) for name in names]
        name = columns[0] if columns else "text"
        raise BadPrompt(
            f"the prompts are a table, a {kind} with the columns {', '.join(map(repr, columns))}: give one column, "
            f"list(table[{name!r}])"
        )
    if hasattr(prompts, "clean") and hasattr(prompts, "corrupted"):
        raise BadPrompt(
            "the prompts are Pairs, which have two prompts each: give pairs.clean or pairs.corrupted"
        )
    if hasattr(prompts, "prompt_lengths") and hasattr(prompts, "tokens"):
        raise BadPrompt("the prompt is a run: give run.text, or the ids of a row, run.tokens[0]")
    if hasattr(prompts, "sites") and hasattr(prompts, "where"):
        raise BadPrompt(
            "the prompt is a hook: the prompts come after the model, and the hooks after the prompts"
        )
    if hasattr(prompts, "named_modules") or hasattr(prompts, "located"):
        raise BadPrompt(f"the prompt is a model, a {kind}: the model comes first, then the prompts")
    if hasattr(prompts, "convert_ids_to_tokens"):
        raise BadPrompt(
            f"the prompt is a tokenizer, a {kind}: the model comes first, then the prompts"
        )


def one_prompt(item: object, number: int) -> str | Row:
    """One prompt of several: its text, or its token ids. `number` is its place among them, for the message."""
    if isinstance(item, str):
        return str(item)
    if _is_mapping(item):
        return _prompt_of_mapping(item, number)
    refuse_container(item)
    ids = items_of(item)
    if ids is None:
        hint = f"; {described(item)} is missing" if item is None or item != item else ""
        raise BadPrompt(
            f"prompt {number} is {described(item)}, which is no prompt: {_PROMPTS_ARE}{hint}"
        )
    return _row_of_ids(ids, number)


def _prompt_of_mapping(item: Any, number: int) -> Row:
    """One prompt of a list that is a mapping of its own, as a tokenizer returns it for one text."""
    if "role" in item:
        raise BadPrompt(
            f"prompt {number} is a chat message: give the text of the chat, "
            "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
        )
    rows = _rows_of_mapping(item)
    if len(rows) != 1:
        raise BadPrompt(
            f"prompt {number} is a mapping with {len(rows)} rows: give it by itself, as the prompts"
        )
    return rows[0]


def _row_of_ids(ids: Sequence[object], number: int) -> Row:
    row = [as_whole(token_id) for token_id in ids]
    for token_id, whole in zip(ids, row, strict=True):
        if whole is None:
            nested = (
                ", several prompts are given where one is meant"
                if items_of(token_id) is not None
                else ""
            )
            raise BadPrompt(
                f"prompt {number} has {described(token_id)} where a token id is meant{nested}: "
                "token ids are whole numbers; give texts, or rows of token ids"
            )
    return tuple(whole for whole in row if whole is not None)


def _rows_of_mapping(inputs: Any) -> list[Any]:
    """The rows of ids of what a tokenizer returned, without padding."""
    if "input_ids" not in inputs:
        keys = ", ".join(repr(str(key)) for key in inputs) or "nothing"
        raise BadPrompt(
            f"the prompts are a mapping with {keys}, and without 'input_ids': give texts, mapping['text'] for example, "
            "or what a tokenizer returns"
        )
    for key in inputs:
        if key not in MODEL_INPUTS:
            raise BadPrompt(
                f"the prompts have {str(key)!r}, which would be ignored: hookkit reads input_ids and attention_mask. "
                f"Leave it out, for example with inputs.pop({str(key)!r}), or run the model yourself in hk.attach"
            )
    rows = prompt_rows(inputs["input_ids"])
    if any(isinstance(row, str) for row in rows):
        raise BadPrompt(
            "input_ids are texts: give token ids there, or the texts themselves as the prompts"
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        return rows
    kept = items_of(mask)
    if kept is None:
        raise BadPrompt(
            f"attention_mask is {described(mask)}: give 1 for each real token and 0 for padding"
        )
    if all(items_of(line) is None for line in kept):
        kept = [kept]
    if len(kept) != len(rows):
        raise BadPrompt(
            f"input_ids has {len(rows)} rows and attention_mask {len(kept)}: give one shape"
        )
    return [
        _unpadded(row, line, number)
        for number, (row, line) in enumerate(zip(rows, kept, strict=True))
    ]


def _unpadded(row: Any, mask: object, number: int) -> Row:
    """A row of ids without padding, which may be before it or after it."""
    values = items_of(mask)
    if values is None or len(values) != len(row):
        count = described(mask) if values is None else f"{len(values)} numbers"
        raise BadPrompt(
            f"row {number} has {len(row)} input_ids, and its attention_mask has {count}: give one shape"
        )
    flags = [
        as_real(value) if as_flag(value) is None else float(as_flag(value) or 0) for value in values
    ]
    if any(value not in (0.0, 1.0) for value in flags):
        raise BadPrompt(
            f"attention_mask of row {number} has other values than 0 and 1: give 1 for each real token"
        )
    real = [index for index, value in enumerate(flags) if value == 1.0]
    if real and real[-1] - real[0] + 1 != len(real):
        raise BadPrompt(
            f"attention_mask of row {number} has a 0 between tokens, which would be taken out of the text: hide tokens "
            "with hk.knockout(layers, key=…), and give padding at one end only"
        )
    return tuple(row[index] for index in real)


def items_of(values: Any) -> list[Any] | None:
    """The items of what holds several, with the numbers of arrays and tensors as Python's own; None for one value."""
    if (
        isinstance(values, str | bytes | bytearray)
        or _is_mapping(values)
        or isinstance(values, type)
    ):
        return None
    if hasattr(values, "tolist") and hasattr(
        values, "dtype"
    ):  # an array, a tensor, a column of a table
        if getattr(values, "shape", None) == ():
            return None
        return list(values.tolist())
    if not isinstance(values, Iterable) and not hasattr(values, "__getitem__"):
        return None
    try:
        return list(values)
    except TypeError:
        return None


# ---- arguments by their annotations


class _Unfit:
    """What a reader returns for a value of another kind."""


UNFIT = _Unfit()


@dataclass(frozen=True)
class Kind:
    """A kind of value: its name in words, and a function that returns the value, or `UNFIT` for another kind."""

    words: str
    read: Callable[[Any], Any]
    names: tuple[str, ...] = ()  # of a Literal


HOW_TO_GET = {
    "LM": "a model as an LM: hk.LM(model, tokenizer), or hk.load(name)",
    "Run": "a run: hk.forward(lm, prompts) or hk.generate(lm, prompts)",
    "DataFrame": "a pandas table, as hookkit's functions return it",
    "Hook": "hooks, such as hk.capture('resid_post.6') or hk.force(' coffee')",
    "Site": "a site, hk.Site('resid_post', 6)",
    "ModuleSite": "hk.module(path)",
    "Metric": "a metric, such as hk.logit_diff(' Mary', ' John')",
    "Trace": "hk.trace()",
    "Ray": "hk.Ray(…)",
    "Pairs": "pairs of hk.datasets",
    "Harvest": "a harvest, hk.open_harvest(folder)",
    "Statistics": "statistics, hk.load_statistics(folder)",
    "TunedLens": "a lens, hk.train_lens(…) or hk.load_lens(folder)",
    "Vector": "a vector, hk.mean_difference(…) or hk.load_vector(lm, path)",
    "Record": "hk.record(folder)",
    "PathLike": "a pathlib.Path",
    "Module": "a model, any nn.Module",
    "Tensor": "a tensor",
    "Figure": "a matplotlib Figure",
    "Condition": "a condition, such as hk.entropy_above(2.0)",
    "At": "hk.at('text')",
    "Span": "a slice",
    "Phrase": "hk.phrase('text')",
}


PROMPTS = {str, Sequence[int], Mapping[str, Any]}  # of the union that prompts are annotated with


def kinds_of(annotation: Any) -> list[Kind] | None:
    """The kinds of value that an annotation allows; None where the function has to read the value itself."""
    if annotation is None or annotation is types.NoneType:
        return [Kind("None", lambda value: None if value is None else UNFIT)]
    origin = get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return _kinds_of_union(get_args(annotation))
    if origin is Literal:
        return [_literal(get_args(annotation))]
    if origin is Callable:
        return [Kind("a function", lambda value: value if callable(value) else UNFIT)]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [
            Kind(
                "a mapping, such as a dict",
                lambda value: value if isinstance(value, Mapping) else UNFIT,
            )
        ]
    kind = origin if origin is os.PathLike else annotation
    return _kinds_of_class(kind) if isinstance(kind, type) and not is_typeddict(kind) else None


def _kinds_of_union(members: tuple[Any, ...]) -> list[Kind] | None:
    if set(members) >= PROMPTS:
        return [
            Kind("prompts", lambda value: list(value) if isinstance(value, Iterator) else value)
        ]
    if {str, int} <= set(members):  # a token, or an item: its own reader says more
        return None
    found: list[Kind] = []
    for member in members:
        kinds = kinds_of(member)
        if kinds is None:
            return None
        found += kinds
    return found


def _literal(names: tuple[Any, ...]) -> Kind:
    words = " or ".join(map(repr, names))
    known = tuple(name for name in names if isinstance(name, str))
    return Kind(
        words, lambda value: value if isinstance(value, str) and value in known else UNFIT, known
    )


def _kinds_of_class(kind: type) -> list[Kind] | None:
    if kind is int:
        return [Kind("a whole number", lambda value: _or_unfit(as_whole(value)))]
    if kind is float:
        return [Kind("a number", lambda value: _or_unfit(_unless_nan(as_real(value))))]
    if kind is bool:
        return [Kind("True or False", lambda value: _or_unfit(as_flag(value)))]
    if kind is str:
        return [Kind("a text", lambda value: str(value) if isinstance(value, str) else UNFIT)]
    simple = kind.__module__.split(".")[0] in (
        "hookkit",
        "torch",
        "pandas",
        "matplotlib",
        "pathlib",
        "os",
    )
    if not simple or getattr(kind, "_is_protocol", False):
        return None
    words = HOW_TO_GET.get(kind.__name__, f"a {kind.__name__}")
    return [Kind(words, lambda value: value if isinstance(value, kind) else UNFIT)]


def _or_unfit(value: Any) -> Any:
    return UNFIT if value is None else value


def _unless_nan(value: float | None) -> float | None:
    return None if value is not None and math.isnan(value) else value


def read_as(kinds: Sequence[Kind], value: Any, function: str, name: str) -> Any:
    """The value as the first of the kinds that it fits, or `BadArgument`, which lists them."""
    for kind in kinds:
        fitting = kind.read(value)
        if fitting is not UNFIT:
            return fitting
    names = [known for kind in kinds for known in kind.names]
    hint = did_you_mean(value, names) if isinstance(value, str) and names else "."
    words = ", or ".join(kind.words for kind in kinds)
    if names and isinstance(value, str):
        raise BadArgument(f"{name}={described(value)} is unknown: say {words}{hint}")
    instead = _instead(kinds, value)
    raise BadArgument(f"{function}() has {name}={described(value)}: give {words}{instead}")


def _instead(kinds: Sequence[Kind], value: Any) -> str:
    """What to write in place of a value that is a common mistake."""
    words = {kind.words for kind in kinds}
    if HOW_TO_GET["LM"] in words:
        if hasattr(value, "named_modules"):
            return ", since a model alone has no tokenizer"
        if isinstance(value, str | list | tuple) or hasattr(value, "tokens"):
            return "; the model comes first, then the prompts"
    if HOW_TO_GET["Hook"] in words and isinstance(value, list | tuple):
        return "; write *hooks for a list of them"
    if HOW_TO_GET["Run"] in words and hasattr(value, "columns"):
        return "; this function reads a run, and not a table"
    if HOW_TO_GET["DataFrame"] in words and hasattr(value, "prompt_lengths"):
        return "; this function reads a table, and not a run"
    return ""


def checks_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, with its arguments read by their annotations before it runs.

    `UnknownKeyword` for a keyword that the function does not take, with the known ones; `BadArgument` for a missing
    argument, and for a value of another kind than the annotation's. What a function passes on,
    `**settings: Unpack[Settings]`, are the names in that TypedDict; `**arguments: Any` takes any name.
    """
    return _checked(function, reads_values=True)


def checks_keywords(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`checks_arguments` without the kinds: for a function whose values are read by the dataclass that it makes."""
    return _checked(function, reads_values=False)


def checks_construction(kind: Class) -> Class:
    """The same dataclass, whose fields are checked by name when one is made: a missing or unknown one is named."""
    kind.__init__ = _checked(kind.__init__, reads_values=False, called=kind.__name__)
    return kind


def _checked(function: Any, *, reads_values: bool, called: str | None = None) -> Any:
    signature = inspect.signature(function)
    parameters = signature.parameters
    names = [
        p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    rest = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    passed_on: dict[str, Any] = {}
    for parameter in rest:
        for kind in get_args(parameter.annotation):
            passed_on |= kind.__annotations__
    takes_any = bool(rest) and not passed_on
    keywords = [name for name in (*names, *passed_on) if name != "self"]
    title = called or function.__name__

    @functools.cache
    def kinds() -> dict[str, list[Kind]]:
        """The kinds of each argument; worked out at the first call, when every module is loaded."""
        annotations = {
            name: parameter.annotation for name, parameter in parameters.items()
        } | passed_on
        space = getattr(function, "__globals__", {})
        found = {
            name: kinds_of(_resolved(annotation, space)) for name, annotation in annotations.items()
        }
        return {name: each for name, each in found.items() if each is not None}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in keywords and not takes_any:
                raise UnknownKeyword(
                    f"{title}() has no keyword {name!r}{did_you_mean(name, keywords)} It takes: {', '.join(keywords)}."
                )
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as mistake:
            takes = ", ".join(keywords) or "nothing"
            raise BadArgument(f"{title}(): {mistake}. It takes: {takes}.") from None
        if not reads_values:
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _read(parameters[name], value, kinds(), title)
        with _with_gradients_as_before():
            return function(*bound.args, **bound.kwargs)

    return checked


def _resolved(annotation: Any, space: dict[str, Any]) -> Any:
    """An annotation that is written as a text, as the type that it names; `Any` where its module is not imported."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, space)
    except (NameError, AttributeError, TypeError):
        return Any


def _read(
    parameter: inspect.Parameter, value: Any, kinds: dict[str, list[Kind]], function: str
) -> Any:
    name = parameter.name
    if parameter.kind is parameter.VAR_KEYWORD:
        known = {key: item for key, item in value.items() if key in kinds}
        return value | {
            key: read_as(kinds[key], item, function, key) for key, item in known.items()
        }
    if name not in kinds:
        return value
    if parameter.kind is parameter.VAR_POSITIONAL:
        return tuple(read_as(kinds[name], item, function, name) for item in value)
    return read_as(kinds[name], value, function, name)


@contextmanager
def _with_gradients_as_before() -> Iterator[None]:
    """A block after which gradients are on or off as before, also where Ctrl-C came while torch.no_grad was left."""
    torch: Any = sys.modules.get("torch")
    before = torch is not None and torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        if torch is not None:
            torch.set_grad_enabled(before)
        raise
