"""Checks of arguments: each kind of value that a user passes is checked in one way, with one error.

Functions named `as_...` return the value that an object stands for, or None for another kind of
object. Functions named `check_...` take the value and the name of the argument. They return the
value in the form that the code works with, or raise an error that says what was passed, what is
possible and what to do.

`check_arguments` decorates public functions. It checks each argument by its annotation: `int` is a
whole number, `bool` is True or False, `Literal` is one of its names, and `Run` is a run.

Integers of numpy and pandas and tensors without axes count as whole numbers; True and False never
do. This module does not import torch, numpy or pandas: it recognises their values by their
attributes.
"""

import functools
import inspect
import itertools
import math
import numbers
import operator
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import (
    BadArgument,
    BadHook,
    EmptySelection,
    HookkitError,
    OutOfRange,
    UnknownKeyword,
    did_you_mean,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Class = TypeVar("Class", bound=type[Any])
Error: TypeAlias = type[HookkitError]

LARGEST_SEED = 2**63 - 1
SIMPLE_TYPES = bool | int | float | str | types.NoneType


# ---- values in messages


def shorten(text: str, most: int = 80) -> str:
    """Returns the text, with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most - 30]}…{text[-25:]}"


def describe(value: Any) -> str:
    """Returns a value as messages show it: short values as code, others by their type and shape."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    shape = _array_shape(value)
    if shape == () or _is_short(value):
        return shorten(repr(value))
    type_name = type(value).__name__
    article = "an" if type_name[:1].lower() in "aeio" else "a"
    if shape is None:
        return f"{article} {type_name}"
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return f"{article} {type_name} of shape {list(shape)} and dtype {dtype}"


def _array_shape(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of an array or a tensor, and None for other values."""
    shape = getattr(value, "shape", None)
    has_dtype = getattr(value, "dtype", None) is not None
    return shape if has_dtype and isinstance(shape, tuple) else None


def _is_short(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) <= 4 and all(isinstance(item, SIMPLE_TYPES) for item in value)
    return isinstance(value, SIMPLE_TYPES | complex | bytes | slice)


# ---- conversions: the value, or None for an object of another kind


def as_integer(value: object) -> int | None:
    """Returns a whole number of Python, numpy, pandas or a tensor without axes as an int."""
    if type(value) is int:
        return value
    if isinstance(value, bool | str | bytes):
        return None
    if getattr(value, "shape", ()) != () or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):
        return None


def as_number(value: object) -> float | None:
    """Returns a real number, which may be infinite or NaN, as a float."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_bool(value: object) -> bool | None:
    """Returns True or False of Python or numpy as a bool."""
    kind = type(value)
    is_numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool_", "bool")
    if isinstance(value, bool) or is_numpy_bool:
        return bool(value)
    return None


def as_items(values: Any) -> list[Any] | None:
    """Returns the items of a collection as a list. Items of arrays and tensors become numbers."""
    if isinstance(values, str | bytes | bytearray | type) or is_mapping(values):
        return None
    if getattr(values, "shape", None) == ():
        return None
    if hasattr(values, "tolist") and hasattr(values, "dtype"):  # an array, a tensor or a column
        return list(values.tolist())
    try:
        return list(values)
    except TypeError:
        return None


def leave_out_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are not None, by name."""
    return {name: value for name, value in values.items() if value is not None}


def is_mapping(value: object) -> bool:
    """True for a dict, and for the `UserDict` that a tokenizer or a processor returns."""
    if isinstance(value, Mapping):
        return True
    return hasattr(value, "keys") and hasattr(value, "data") and hasattr(value, "items")


# ---- numbers


def check_integer(
    value: object,
    name: str,
    *,
    least: int | float = -math.inf,
    most: int | float = math.inf,
    meaning: str = "",
    error: Error = OutOfRange,
) -> int:
    """Returns a whole number from `least` to `most`. `meaning` tells the user what it counts."""
    meaning = meaning.rstrip(",")
    number = as_integer(value)
    if number is None:
        about = f"{meaning}, a whole number" if meaning else "a whole number"
        raise error(f"{name}={describe(value)}: give {about}{_limits(least, most)}")
    if number < least:
        raise error(f"{name}={number}: give {meaning or 'a whole number'}, at least {least}")
    if number > most:
        raise error(f"{name}={number}: give {meaning or 'a whole number'}, at most {most}")
    return number


def _limits(least: int | float, most: int | float) -> str:
    if most < math.inf:
        return f" from {least} to {most}"
    return f" from {least} upwards" if least > -math.inf else ""


def check_integers(values: object, name: str, *, least: int, meaning: str) -> list[int]:
    """Returns one whole number or several as a list. Raises `BadHook` if a number occurs twice."""
    items = [values] if as_integer(values) is not None else as_items(values)
    if items is None:
        raise OutOfRange(
            f"{name}={describe(values)}: give {meaning}, a whole number or a list of them"
        )
    if not items:
        raise EmptySelection(
            f"{name}={describe(values)} selects nothing: name at least one, or leave {name} out"
        )
    result = [check_integer(item, name, least=least, meaning=meaning) for item in items]
    ((number, count),) = Counter(result).most_common(1)
    if count > 1:
        raise BadHook(f"{name} names {number} twice: name each once")
    return result


def check_number(
    value: object,
    name: str,
    *,
    least: int | float = -math.inf,
    most: int | float = math.inf,
    above: int | float = -math.inf,
    meaning: str = "",
    error: Error = BadHook,
) -> float:
    """Returns a finite number from `least` to `most` that is larger than `above`."""
    number = as_number(value)
    if number is None or not math.isfinite(number):
        about = f"{meaning.rstrip(',')}, " if meaning else ""
        raise error(
            f"{name}={describe(value)} is not a finite number: "
            f"give {about}a real number such as 2.0"
        )
    if not least <= number <= most or number <= above:
        limits = {"above": above, "at least": least, "at most": most}
        words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        raise error(f"{name}={describe(value)}: give {meaning or 'a number'} {' and '.join(words)}")
    return number


def check_seed(value: object) -> int:
    """Returns a seed: a whole number from 0 upwards that fits into 63 bits."""
    meaning = "a seed, so that the same draws can be made again,"
    return check_integer(value, "seed", least=0, most=LARGEST_SEED, meaning=meaning)


def check_bool(value: object, name: str, error: Error = BadHook) -> bool:
    """Returns True or False."""
    result = as_bool(value)
    if result is None:
        raise error(f"{name}={describe(value)}: give True or False")
    return result


# ---- names and texts


def check_choice(value: object, name: str, names: Iterable[str]) -> str:
    """Returns one of the names."""
    names, hint = list(names), "."
    if isinstance(value, str):
        if value in names:
            return str(value)
        hint = did_you_mean(value, names)
    options = ", ".join(map(repr, names))
    raise BadHook(f"{name}={describe(value)} is unknown{hint} Give one of {options}.")


def check_text(value: object, name: str, meaning: str) -> str:
    """Returns a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise BadHook(f"{name}={describe(value)}: give {meaning}")
    return str(value)


# ---- kinds of values by annotations


@dataclass(frozen=True)
class Kind:
    """A kind of value: its description, a test for it, and its conversion for the code."""

    words: str
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()  # the values of a Literal


def _is_real_number(value: object) -> bool:
    number = as_number(value)
    return number is not None and not math.isnan(number)


SIMPLE_KINDS = {
    int: Kind("a whole number", lambda value: as_integer(value) is not None, as_integer),
    float: Kind("a number", _is_real_number, as_number),
    bool: Kind("True or False", lambda value: as_bool(value) is not None, as_bool),
    str: Kind("a text", lambda value: isinstance(value, str), str),
    types.NoneType: Kind("None", lambda value: value is None),
}
HOW_TO_GET = {
    "LM": "a model as an LM: hk.LM(model, tokenizer), or hk.load(name)",
    "Run": "a run: hk.forward(lm, prompts) or hk.generate(lm, prompts)",
    "DataFrame": "a pandas table, as hookkit's functions return it",
    "Hook": "hooks, such as hk.capture('resid_post.6') or hk.force(' coffee')",
    "Site": "a site, hk.Site('resid_post', 6)",
    "ModuleSite": "hk.module(path)",
    "Metric": "a metric, such as hk.metrics.logit_diff(' Mary', ' John')",
    "Trace": "hk.trace()",
    "Ray": "hk.Ray(…)",
    "Pairs": "pairs of hk.datasets",
    "Harvest": "a harvest, hk.open_harvest(folder)",
    "Statistics": "statistics, hk.results.load_statistics(folder)",
    "JacobianLens": "a lens, hk.fit_jacobian(…) or hk.load_lens(path)",
    "TunedLens": "a lens, hk.train_lens(…) or hk.load_lens(folder)",
    "Probe": "a probe, hk.fit_probe(…).best or hk.load_probe(lm, path)",
    "Vector": "a vector, hk.mean_difference(…) or hk.load_vector(lm, path)",
    "Dictionary": "a dictionary, hk.load_dictionary(folder)",
    "Record": "hk.record(folder)",
    "PathLike": "a pathlib.Path",
    "Module": "a model, any nn.Module",
    "Tensor": "a tensor",
    "Figure": "a matplotlib Figure",
    "Condition": "a condition, such as hk.when.entropy_above(2.0)",
    "At": "hk.at('text')",
    "Span": "a slice",
    "Word": "hk.word('coffee')",
}
MODEL_FIRST = "; the model comes first, then the prompts"
MISTAKES = (  # a kind, a type or an attribute of values that are passed by mistake, and what to do
    ("LM", "named_modules", ", since a model alone has no tokenizer"),
    ("LM", "tokens", MODEL_FIRST),
    ("LM", (str, list, tuple), MODEL_FIRST),
    ("Hook", (list, tuple), "; write *hooks for a list of them"),
    ("Run", "columns", "; this function reads a run, and not a table"),
    ("DataFrame", "prompt_lengths", "; this function reads a table, and not a run"),
)
PROMPTS = {str, Sequence[int], Mapping[str, Any]}  # in the union that annotates prompts
CHECKED_PACKAGES = ("hookkit", "torch", "pandas", "matplotlib", "pathlib", "os")


def kinds_of(annotation: Any) -> list[Kind] | None:
    """Returns the kinds that an annotation allows. It is None if the function checks the value."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _kinds_of_union(members)
    if origin is Literal:
        return [_kind_of_literal(members)]
    if origin is Callable:
        return [Kind("a function", callable)]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [Kind("a mapping, such as a dict", lambda value: isinstance(value, Mapping))]
    if isinstance(annotation, str):
        return [Kind(HOW_TO_GET[annotation], functools.partial(_has_type_name, annotation))]
    return _kinds_of_class(origin or annotation)


def _has_type_name(name: str, value: object) -> bool:
    return name in [kind.__name__ for kind in type(value).__mro__]


def _kinds_of_union(members: tuple[Any, ...]) -> list[Kind] | None:
    if set(members) >= PROMPTS:
        return [
            Kind("an iterator of prompts", lambda value: isinstance(value, Iterator), list),
            Kind("prompts", lambda value: True),
        ]
    if {str, int} <= set(members):  # a token or an item, which has its own check
        return None
    checked = [kinds for kinds in map(kinds_of, members) if kinds is not None]
    return list(itertools.chain(*checked)) if len(checked) == len(members) else None


def _kind_of_literal(values: tuple[Any, ...]) -> Kind:
    words = " or ".join(map(repr, values))
    names = tuple(value for value in values if isinstance(value, str))
    return Kind(words, lambda value: isinstance(value, str) and value in names, names=names)


def _kinds_of_class(kind: Any) -> list[Kind] | None:
    if kind in SIMPLE_KINDS:
        return [SIMPLE_KINDS[kind]]
    package = getattr(kind, "__module__", "").split(".")[0]
    if not isinstance(kind, type) or package not in CHECKED_PACKAGES:
        return None
    if typing.is_typeddict(kind) or getattr(kind, "_is_protocol", False):
        return None
    words = HOW_TO_GET.get(kind.__name__, f"a {kind.__name__}")
    return [Kind(words, lambda value: isinstance(value, kind))]


def read_as(kinds: Sequence[Kind] | None, value: Any, function: str, name: str) -> Any:
    """Returns the value as the first kind that it fits. With `kinds=None`, it is not checked."""
    if kinds is None:
        return value
    for kind in kinds:
        if kind.fits(value):
            return kind.convert(value)
    raise _wrong_kind(kinds, value, function, name)


def _wrong_kind(kinds: Sequence[Kind], value: Any, function: str, name: str) -> BadArgument:
    words = ", or ".join(kind.words for kind in kinds)
    names = list(itertools.chain(*(kind.names for kind in kinds)))
    if names and isinstance(value, str):
        hint = did_you_mean(value, names)
        return BadArgument(f"{name}={describe(value)} is unknown: say {words}{hint}")
    hint = _hint_for_mistake(words, value)
    return BadArgument(f"{function}() has {name}={describe(value)}: give {words}{hint}")


def _hint_for_mistake(words: str, value: Any) -> str:
    """Returns what to pass instead of a value that is a common mistake."""
    for name, sign, hint in MISTAKES:
        is_mistake = hasattr(value, sign) if isinstance(sign, str) else isinstance(value, sign)
        if is_mistake and HOW_TO_GET[name] in words:
            return hint
    return ""


# ---- decorators of public functions and classes


def check_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns the function, whose arguments are checked by their annotations before it runs.

    Raises `UnknownKeyword` for a keyword that the function does not take, and `BadArgument` for a
    missing argument or a value of another kind. `**settings: Unpack[Settings]` takes the names of
    that TypedDict; `**arguments: Any` takes any name.
    """
    return _wrap(function, checks_values=True)


def check_keywords(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns the function, whose keywords are checked, for dataclasses that check the values."""
    return _wrap(function, checks_values=False)


def check_fields(kind: Class) -> Class:
    """Returns the dataclass. Its constructor raises errors that name a missing or unknown field."""
    kind.__init__ = _wrap(kind.__init__, checks_values=False, title=kind.__name__)
    return kind


def _wrap(function: Any, *, checks_values: bool, title: str = "") -> Any:
    title = title or str(function.__name__)
    signature = inspect.signature(function)
    settings = _read_settings(signature, function.__globals__)
    keywords, takes_any = _read_keywords(signature, settings)
    fits = _fitting_calls(signature)

    # The annotations are read at the first call, when every module is imported.
    kinds_by_name = functools.cache(lambda: _read_kinds(signature, settings, function.__globals__))

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not checks_values and fits(args, kwargs):
            return function(*args, **kwargs)
        if not takes_any:
            _check_names(kwargs, keywords, title)
        bound = _bind(signature, keywords, title, args, kwargs)
        if not checks_values:
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            bound.arguments[name] = _check_value(parameter, value, kinds_by_name(), title)
        with _restored_gradient_mode():
            return function(*bound.args, **bound.kwargs)

    if settings is not None:
        checked.__dict__["__signature__"] = _with_keywords(signature, settings)
    return checked


def _fitting_calls(
    signature: inspect.Signature,
) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """Returns a function that says whether a call fits a signature, faster than `bind`.

    It is False for every call of a function with variable arguments.
    """
    parameters = signature.parameters.values()
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(parameter.kind not in by_keyword for parameter in parameters):
        return lambda args, kwargs: False
    names = [parameter.name for parameter in parameters]
    n_positional = sum(parameter.kind == by_keyword[0] for parameter in parameters)
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    # the keywords that a call needs and can have, by the number of its positional arguments
    needed = [required.difference(names[:count]) for count in range(n_positional + 1)]
    possible = [set(names[count:]) - {"self"} for count in range(n_positional + 1)]

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        count = len(args)
        if count > n_positional:
            return False
        return needed[count] <= kwargs.keys() <= possible[count]

    return fits


class _Default:
    """The default of a keyword that another function sets; help() shows it as three dots."""

    def __repr__(self) -> str:
        return "..."


def _with_keywords(signature: inspect.Signature, settings: Any) -> inspect.Signature:
    """Returns the signature with the keywords of a TypedDict in place of `**settings`.

    So help() lists them, and the tab key completes them.
    """
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    for name, annotation in settings.__annotations__.items():
        text = getattr(annotation, "__forward_arg__", annotation)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=_Default(), annotation=text))
    return signature.replace(parameters=parameters)


def _read_kinds(
    signature: inspect.Signature, settings: Any, names: dict[str, Any]
) -> dict[str, list[Kind] | None]:
    """Returns the kinds of each parameter, and of each field of the settings."""
    hints = get_type_hints(settings) if settings else {}
    for name, parameter in signature.parameters.items():
        hints[name] = _evaluate(parameter.annotation, names)
    return dict(zip(hints, map(kinds_of, hints.values()), strict=True))


def _bind(
    signature: inspect.Signature,
    keywords: list[str],
    title: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as mistake:
        takes = ", ".join(keywords) or "nothing"
        raise BadArgument(f"{title}(): {mistake}. It takes: {takes}.") from None


REFUSED_KEYWORDS = {  # by function and keyword, why it does not take it
    ("capture", "when"): "a capture keeps all the cells that pos= and rows= select, so that its "
    "tensor has rows and positions; keep them, and read in run.log where a condition held",
}


def _check_names(names: Iterable[str], keywords: list[str], title: str) -> None:
    for name in names:
        if (title, name) in REFUSED_KEYWORDS:
            raise UnknownKeyword(f"{title}() takes no {name}=: {REFUSED_KEYWORDS[title, name]}.")
        if name not in keywords:
            hint = did_you_mean(name, keywords)
            raise UnknownKeyword(
                f"{title}() has no keyword {name!r}{hint} It takes: {', '.join(keywords)}."
            )


def _read_settings(signature: inspect.Signature, names: dict[str, Any]) -> Any:
    """Returns the TypedDict of `**settings: Unpack[Settings]`; None if a function has none."""
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            typed_dicts = get_args(_evaluate(parameter.annotation, names))
            return next(iter(typed_dicts), None)
    return None


def _read_keywords(signature: inspect.Signature, settings: Any) -> tuple[list[str], bool]:
    """Returns the keywords that a function takes, and whether it takes any other keyword."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    kinds.pop("self", None)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    keywords = [name for name, kind in kinds.items() if kind not in variable]
    keywords += getattr(settings, "__annotations__", ())
    return keywords, settings is None and inspect.Parameter.VAR_KEYWORD in kinds.values()


def _evaluate(annotation: Any, names: dict[str, Any]) -> Any:
    """Returns the type that an annotation names.

    The value of an alias may be a text too. If the module of the type is not imported, it is the
    name of the type where `HOW_TO_GET` has it, and else `Any`.
    """
    while isinstance(annotation, str):
        try:
            annotation = eval(annotation, names)
        except (NameError, AttributeError, TypeError):
            return annotation if annotation in HOW_TO_GET else Any
    return annotation


def _check_value(
    parameter: inspect.Parameter, value: Any, kinds: dict[str, list[Kind] | None], function: str
) -> Any:
    name = parameter.name
    if parameter.kind is parameter.VAR_KEYWORD:
        return {key: read_as(kinds.get(key), item, function, key) for key, item in value.items()}
    if parameter.kind is parameter.VAR_POSITIONAL:
        return tuple(read_as(kinds[name], item, function, name) for item in value)
    return read_as(kinds[name], value, function, name)


@contextmanager
def _restored_gradient_mode() -> Iterator[None]:
    """Restores torch's gradient mode after an exception, such as Ctrl-C within torch.no_grad."""
    torch: Any = sys.modules.get("torch")
    before = torch is not None and torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        if torch is not None:
            torch.set_grad_enabled(before)
        raise
