"""Hooks to JSON and back. Every value in a hook has one way to be written; a user's function only its name.

What JSON has no word for is an object with one key that begins with "$": {"$sites": ["z.9.3"]}, {"$tensor": …}.
"""

import base64
import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from safetensors.torch import load, save
from torch import Tensor

from ..captured import Captured
from ..errors import BadHook, HookkitError
from ..positions import At, Part, Span, Where
from ..sites import ModuleSite, Site, Sites, parse

HOOKS: dict[str, Any] = {}  # every kind of hook by its verb; filled where the kinds are defined
VALUES: dict[str, type] = {kind.__name__: kind for kind in (Where, Span, At, Captured)}  # and what `storable` adds

Kind = TypeVar("Kind", bound=type)


def storable(kind: Kind) -> Kind:
    """A frozen dataclass that may stand inside a hook, and is written field by field."""
    VALUES[kind.__name__] = kind
    return kind


def to_json(hook: Any, *, tensors: str = "inline") -> str:
    """The hook as JSON; equal hooks give equal text."""
    if tensors not in ("inline", "digest"):
        raise BadHook(f"tensors={tensors!r} is unknown: say 'inline' or 'digest'")
    fields = {field.name: _encode(getattr(hook, field.name), tensors) for field in dataclasses.fields(hook)}
    return json.dumps({"hook": hook.verb, **fields}, allow_nan=False)


def from_json(text: str) -> Any:
    """The hook that `to_json` wrote."""
    try:
        written = json.loads(text)
        verb = written.pop("hook")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise BadHook(f"this is no hook in JSON: {text[:60]!r}") from error
    if not isinstance(verb, str) or verb not in HOOKS:
        raise BadHook(f"there is no hook {verb!r}: there are {', '.join(sorted(HOOKS))}")
    known = {field.name: field for field in dataclasses.fields(HOOKS[verb])}
    needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not needed <= set(written) <= set(known):
        raise BadHook(f"a {verb} has the fields {', '.join(sorted(known))}, and this has {', '.join(sorted(written))}")
    try:
        return HOOKS[verb](**{name: _decode(value) for name, value in written.items()})
    except HookkitError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadHook(f"this {verb} in JSON has a value that cannot be read: {error}") from error


def _encode(value: Any, tensors: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Sites):
        return {"$sites": [str(site) for site in value]}
    if isinstance(value, Site | ModuleSite):
        return {"$site": str(value)}
    if isinstance(value, Part):
        return {"$part": value.value}
    if isinstance(value, tuple):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, Tensor):
        return {"$tensor": tensor_as_json(value, tensors)}
    if type(value).__name__ in VALUES:
        fields = {field.name: _encode(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return {"$value": type(value).__name__, **fields}
    if HOOKS.get(getattr(value, "verb", "")) is type(value):
        return {"$hook": json.loads(to_json(value, tensors=tensors))}
    assert callable(value), f"a hook holds a {type(value).__name__}, which has no way to be written"
    return {"$function": function_as_json(value)}


def tensor_as_json(tensor: Tensor, tensors: str) -> dict[str, Any]:
    """A tensor in full, or its shape and its hash ("digest")."""
    data = save({"t": tensor.detach().cpu().contiguous()})
    if tensors == "inline":
        return {"safetensors": base64.b64encode(data).decode()}
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def function_as_json(function: Any, *, alone: bool = False) -> dict[str, Any]:
    """A user's function by its name and source, with what it takes from around it unless it is wanted `alone`."""
    if isinstance(function, functools.partial):
        given = {"args": function.args, **function.keywords}
        return {**function_as_json(function.func), "given": {name: _held(value) for name, value in given.items()}}
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    found: dict[str, Any] = {"name": name}
    try:
        found["source"] = inspect.getsource(function).strip()
    except (OSError, TypeError):
        if (code := getattr(function, "__code__", None)) is not None:
            found["code"] = hashlib.sha256(_code(code).encode()).hexdigest()
    around = {} if alone else _around(function)
    return found | ({"with": around} if around else {})


def _code(code: Any) -> str:
    """What a function does, where its source is not to be had."""
    constants = [_code(each) if hasattr(each, "co_code") else repr(each) for each in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _around(function: Any) -> dict[str, Any]:
    """What a function takes from around it, and its defaults: numbers, words, tensors, other functions of its file."""
    try:
        found = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return {}
    names = {**found.globals, **found.nonlocals}
    names |= {f"default {place}": value for place, value in enumerate(getattr(function, "__defaults__", None) or ())}
    names |= getattr(function, "__kwdefaults__", None) or {}
    ours = {
        name: function_as_json(value, alone=True)
        for name, value in names.items()
        if inspect.isfunction(value) and value.__module__ == function.__module__ and value is not function
    }
    told = {name: _held(value) for name, value in names.items()}
    return ours | {name: value for name, value in told.items() if value is not None}


def _held(value: Any) -> Any:
    """A number, a word, a tensor's hash, or several of them; None for anything else, which may change by itself."""
    if isinstance(value, Tensor):
        return tensor_as_json(value, "digest")
    if isinstance(value, tuple):
        return [_held(each) for each in value]
    return repr(value) if isinstance(value, bool | int | float | str) else None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if not isinstance(value, dict):
        return value
    word = next((word for word in READ if word in value), None)
    if word is not None:
        return READ[word](value[word])
    return VALUES[value["$value"]](**{name: _decode(item) for name, item in value.items() if name != "$value"})


def _read_tensor(written: Any) -> Tensor:
    if "safetensors" not in written:
        raise BadHook(
            "this hook was written with tensors='digest', which has the hash of its tensor and not the numbers"
        )
    return load(base64.b64decode(written["safetensors"]))["t"]


def _no_function(written: Any) -> Any:
    raise BadHook(
        f"this hook has a user's function, {written['name']}, of which JSON has the name and not the code: make the "
        "hook again with hk.edit(site, fn)"
    )


READ: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$sites": lambda written: Sites(tuple(map(parse, written))),
    "$site": parse,
    "$part": Part,
    "$tensor": _read_tensor,
    "$hook": lambda written: from_json(json.dumps(written)),
    "$function": _no_function,
}
