"""Hooks to JSON and back. Every value in a hook has one way to be written; a user's function only
its name.

What JSON has no word for is an object with one key that begins with "$": {"$sites": ["z.9.3"]},
{"$tensor": …}.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ..arguments import choice, described
from ..errors import BadHook, HookkitError
from ..files.untrusted import json_of, reason
from ..models.positions import Part
from ..models.sites import ModuleSite, Site, Sites, as_sites, parse

# Every kind of hook by its verb, and every frozen dataclass that may stand inside one, each with its module. The
# modules are above this one, so they are imported when the first hook is written or read.
HOOK_TYPES: dict[str, str] = {
    "capture": "hookkit.hooks.capture:Capture",
    "edit": "hookkit.hooks.edits:Edit",
    "steer": "hookkit.hooks.edits:Steer",
    "scale": "hookkit.hooks.edits:Scale",
    "project_out": "hookkit.hooks.edits:ProjectOut",
    "skip_block": "hookkit.hooks.edits:SkipBlock",
    "ablate": "hookkit.hooks.ablation:Ablate",
    "patch": "hookkit.hooks.ablation:Patch",
    "knockout": "hookkit.hooks.knockout:Knockout",
    "force": "hookkit.hooks.logits:Force",
    "ban": "hookkit.hooks.logits:Ban",
    "restrict": "hookkit.hooks.logits:Restrict",
    "boost": "hookkit.hooks.logit_shifts:Boost",
    "cap": "hookkit.hooks.logit_shifts:Cap",
    "swap": "hookkit.hooks.logit_shifts:Swap",
    "set_rank": "hookkit.hooks.logit_shifts:SetRank",
    "randomised": "hookkit.sweeps.cells:Randomised",
}
VALUE_TYPES: dict[str, str] = {
    "Where": "hookkit.models.positions:Where",
    "Span": "hookkit.models.positions:Span",
    "At": "hookkit.models.positions:At",
    "Captured": "hookkit.hooks.captured_values:Captured",
    "Constant": "hookkit.hooks.base:Constant",
    "Means": "hookkit.hooks.ablation:Means",
    "FromRun": "hookkit.hooks.ablation:FromRun",
    "FromPrompt": "hookkit.hooks.ablation:FromPrompt",
    "Reference": "hookkit.hooks.ablation:Reference",
    "Condition": "hookkit.hooks.conditions:Condition",
    "Phrase": "hookkit.hooks.conditions:Phrase",
}


def hook_type(verb: object) -> Any:
    """The class of hooks with this verb, or `BadHook`."""
    if not isinstance(verb, str) or verb not in HOOK_TYPES:
        raise BadHook(
            f"there is no hook {described(verb)}: there are {', '.join(sorted(HOOK_TYPES))}"
        )
    return _imported(HOOK_TYPES[verb])


def value_type(name: object) -> Any:
    """The dataclass of this name that may stand inside a hook, or `BadHook`."""
    if not isinstance(name, str) or name not in VALUE_TYPES:
        raise BadHook(
            f"a hook holds no value of type {described(name)}: there are {', '.join(VALUE_TYPES)}"
        )
    return _imported(VALUE_TYPES[name])


@functools.cache
def _imported(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def to_json(hook: Any, *, tensors: str = "inline") -> str:
    """The hook as JSON; equal hooks give equal text."""
    choice(tensors, "tensors", ("inline", "digest"))
    fields = {
        field.name: _encode(getattr(hook, field.name), tensors)
        for field in dataclasses.fields(hook)
    }
    return json.dumps({"hook": hook.verb, **fields}, allow_nan=False)


def from_json(text: str) -> Any:
    """The hook that `to_json` wrote."""
    name = repr(text[:60]) if isinstance(text, str) else f"a {type(text).__name__}"
    try:
        written = json_of(text, name, error=BadHook)
        verb = written.pop("hook")
    except (KeyError, AttributeError, TypeError, BadHook) as error:
        why = f" ({error})" if isinstance(error, BadHook) else ""
        raise BadHook(f"this is no hook in JSON: {described(text)}{why}") from error
    return _built(hook_type(verb), written, verb)


def _built(kind: Any, written: dict[str, Any], name: str) -> Any:
    """A hook, or a value inside one, from its fields as they are written."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if not needed <= set(written) <= set(known):
        raise BadHook(
            f"a {name} has the fields {', '.join(sorted(known))}, and this has {', '.join(sorted(written)) or 'none'}"
        )
    try:
        return kind(**{field: _decode(value) for field, value in written.items()})
    except HookkitError:
        raise
    except Exception as error:
        raise BadHook(
            f"this {name} in JSON has a value that cannot be read: {reason(error)}"
        ) from error


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
    if type(value).__name__ in VALUE_TYPES:
        fields = {
            field.name: _encode(getattr(value, field.name), tensors)
            for field in dataclasses.fields(value)
        }
        return {"$value": type(value).__name__, **fields}
    if getattr(value, "verb", None) in HOOK_TYPES and type(value) is hook_type(value.verb):
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
    """A user's function by its name and source, with what it takes from around it unless it is
    wanted `alone`.
    """
    if isinstance(function, functools.partial):
        given = {"args": function.args, **function.keywords}
        return {
            **function_as_json(function.func),
            "given": {name: _held(value) for name, value in given.items()},
        }
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
    """What a function takes from around it, and its defaults: numbers, words, tensors, other
    functions of its file.
    """
    try:
        found = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return {}
    names = {**found.globals, **found.nonlocals}
    names |= {
        f"default {place}": value
        for place, value in enumerate(getattr(function, "__defaults__", None) or ())
    }
    names |= getattr(function, "__kwdefaults__", None) or {}
    ours = {
        name: function_as_json(value, alone=True)
        for name, value in names.items()
        if inspect.isfunction(value)
        and value.__module__ == function.__module__
        and value is not function
    }
    told = {name: _held(value) for name, value in names.items()}
    return ours | {name: value for name, value in told.items() if value is not None}


def _held(value: Any) -> Any:
    """A number, a word, a tensor's hash, or several of them; None for anything else, which may
    change by itself.
    """
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
    if "$value" not in value:
        raise BadHook(
            f"a hook in JSON has an object with the keys {', '.join(map(repr, value))}, and none with a $"
        )
    name = value["$value"]
    fields = {field: item for field, item in value.items() if field != "$value"}
    return _built(value_type(name), fields, name)


def _read_tensor(written: Any) -> Tensor:
    if not isinstance(written, dict) or "safetensors" not in written:
        raise BadHook(
            "this hook was written with tensors='digest', which has the hash of its tensor and not the numbers"
        )
    try:
        return load(base64.b64decode(written["safetensors"], validate=True))["t"]
    except Exception as error:
        raise BadHook(
            f"the tensor of this hook is damaged: {error}; write the hook again with to_json()"
        ) from error


def _text(written: Any) -> str:
    if not isinstance(written, str):
        raise BadHook(
            f"a site in JSON is {described(written)}: it is a text, such as 'resid_post.6'"
        )
    return written


def _no_function(written: Any) -> Any:
    name = written.get("name") if isinstance(written, dict) else None
    raise BadHook(
        f"this hook has a user's function, {name}, of which JSON has the name and not the code: make the "
        "hook again with hk.edit(site, fn)"
    )


READ: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$sites": lambda written: as_sites([parse(_text(site)) for site in written]),
    "$site": lambda written: parse(_text(written)),
    "$part": Part,
    "$tensor": _read_tensor,
    "$hook": lambda written: from_json(json.dumps(written)),
    "$function": _no_function,
}
