"""Writes hooks as JSON and reads them back.

User functions, and models that are the source of an edit, are written, but not read back.

A value that JSON cannot express is an object with one key that begins with "$":
{"$sites": ["z.9.3"]}, {"$tensor": …}.
"""

import base64
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import pkgutil
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ..arguments import check_choice, describe
from ..errors import BadHook, HookkitError
from ..files.untrusted import error_message, parse_json
from ..models.chat import Chat, chat_of
from ..models.lm import LM
from ..models.positions import TextPart
from ..models.provenance import config_hash
from ..models.sites import ModuleSite, Site, Sites, as_sites, parse_site

# Every hook by its verb, and every dataclass that may be inside a hook, each with its module. These
# modules import this one, so they are imported when the first hook is written or read.
HOOK_TYPES: dict[str, str] = {
    "capture": "hookkit.hooks.capture:Capture",
    "edit": "hookkit.hooks.edits:Edit",
    "steer": "hookkit.hooks.edits:Steer",
    "scale": "hookkit.hooks.edits:Scale",
    "project_out": "hookkit.hooks.edits:ProjectOut",
    "skip_block": "hookkit.hooks.edits:SkipBlock",
    "ablate": "hookkit.hooks.ablation:Ablate",
    "patch": "hookkit.hooks.ablation:Patch",
    "knockout": "hookkit.hooks.edits:Knockout",
    "force": "hookkit.hooks.logits:Force",
    "ban": "hookkit.hooks.logit_shifts:Ban",
    "restrict": "hookkit.hooks.logit_shifts:Restrict",
    "boost": "hookkit.hooks.logit_shifts:Boost",
    "cap": "hookkit.hooks.logit_shifts:Cap",
    "swap": "hookkit.hooks.logit_shifts:Swap",
    "set_rank": "hookkit.hooks.logit_shifts:SetRank",
    "toward": "hookkit.hooks.sources:Toward",
    "away_from": "hookkit.hooks.sources:AwayFrom",
    "swap_concept": "hookkit.hooks.concepts:SwapConcept",
    "grammar": "hookkit.hooks.grammar:Grammar",
    "randomised": "hookkit.sweeps.cells:Randomised",
}
VALUE_TYPES: dict[str, str] = {
    "Where": "hookkit.models.positions:Where",
    "Span": "hookkit.models.positions:Span",
    "At": "hookkit.models.positions:At",
    "Role": "hookkit.models.positions:Role",
    "Turn": "hookkit.models.positions:Turn",
    "Captured": "hookkit.hooks.capture:Captured",
    "Constant": "hookkit.hooks.base:Constant",
    "Means": "hookkit.hooks.values:Means",
    "FromRun": "hookkit.hooks.values:FromRun",
    "FromPrompt": "hookkit.hooks.values:FromPrompt",
    "Reference": "hookkit.hooks.values:Reference",
    "LogitCondition": "hookkit.hooks.when:LogitCondition",
    "StateCondition": "hookkit.hooks.when:StateCondition",
    "TextEnds": "hookkit.hooks.when:TextEnds",
    "Contains": "hookkit.hooks.when:Contains",
    "AllOf": "hookkit.hooks.when:AllOf",
    "AnyOf": "hookkit.hooks.when:AnyOf",
    "Not": "hookkit.hooks.when:Not",
    "Probe": "hookkit.hooks.probe:Probe",
    "Word": "hookkit.models.words:Word",
    "OtherModel": "hookkit.hooks.sources:OtherModel",
    "OtherPrompts": "hookkit.hooks.sources:OtherPrompts",
    "Unedited": "hookkit.hooks.sources:Unedited",
    "EarlierLayer": "hookkit.hooks.sources:EarlierLayer",
}


def to_json(hook: Any, *, tensors: str = "inline") -> str:
    """Returns the hook as JSON. Equal hooks have equal JSON."""
    check_choice(tensors, "tensors", ("inline", "digest"))
    return json.dumps({"hook": hook.verb, **_encode_fields(hook, tensors)}, allow_nan=False)


def from_json(text: str) -> Any:
    """Returns the hook that `to_json` wrote."""
    name = repr(text[:60]) if isinstance(text, str) else f"a {type(text).__name__}"
    try:
        encoded = parse_json(text, name, error=BadHook)
        verb = encoded.pop("hook")
    except (KeyError, AttributeError, TypeError, BadHook) as error:
        detail = f" ({error})" if isinstance(error, BadHook) else ""
        raise BadHook(f"this is no hook in JSON: {describe(text)}{detail}") from error
    return _decode_fields(_find_type(verb, HOOK_TYPES, "there is no hook"), encoded, verb)


def _encode_fields(value: Any, tensors: str) -> dict[str, Any]:
    fields = dataclasses.fields(value)
    return {field.name: _encode(getattr(value, field.name), tensors) for field in fields}


def _decode_fields(cls: Any, encoded: dict[str, Any], name: str) -> Any:
    """Returns a hook, or a value inside one, from its encoded fields."""
    fields = dataclasses.fields(cls)
    field_names = {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not required <= set(encoded) <= field_names:
        raise BadHook(
            f"a {name} has the fields {', '.join(sorted(field_names))}, and this has "
            f"{', '.join(sorted(encoded)) or 'none'}"
        )
    try:
        return cls(**{field: _decode(value) for field, value in encoded.items()})
    except HookkitError:
        raise
    except Exception as error:  # files of others may hold any value, which any check may refuse
        raise BadHook(
            f"this {name} in JSON has a value that cannot be read: {error_message(error)}"
        ) from error


def _encode(value: Any, tensors: str) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return {"$float": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case Sites():
            return {"$sites": list(map(str, value))}
        case Site() | ModuleSite():
            return {"$site": str(value)}
        case TextPart():
            return {"$part": value.value}
        case tuple():
            return [_encode(item, tensors) for item in value]
        case dict():
            return {"$mapping": value}
        case Tensor():
            return {"$tensor": tensor_as_json(value, tensors)}
        case LM():
            about = {"class": type(value.root).__name__, "config_sha256": config_hash(value)}
            return {"$model": {"name": value.name, **about}}
    return _encode_object(value, tensors)


def _encode_object(value: Any, tensors: str) -> Any:
    if isinstance(value, Chat):
        return {"$chat": json.loads(value.to_json())}
    name = type(value).__name__
    if name in VALUE_TYPES:
        return {"$value": name, **_encode_fields(value, tensors)}
    if getattr(value, "verb", None) in HOOK_TYPES:
        return {"$hook": {"hook": value.verb, **_encode_fields(value, tensors)}}
    assert callable(value), f"a hook holds a {name}, which cannot be written as JSON"
    return {"$function": function_as_json(value)}


def tensor_as_json(tensor: Tensor, tensors: str) -> dict[str, Any]:
    """Returns a tensor in full ("inline"), or its shape and hash ("digest")."""
    data = save({"t": tensor.detach().cpu().contiguous()})
    if tensors == "inline":
        return {"safetensors": base64.b64encode(data).decode()}
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def function_as_json(function: Any, *, alone: bool = False) -> dict[str, Any]:
    """Returns a user's function by its name and source.

    Unless `alone` is True, the values of its closure and defaults are included.
    """
    if isinstance(function, functools.partial):
        bound = {"args": function.args, **function.keywords}
        values = {name: _value_as_json(value) for name, value in bound.items()}
        return {**function_as_json(function.func), "given": values}
    module = getattr(function, "__module__", "")
    name = getattr(function, "__qualname__", type(function).__name__)
    encoded: dict[str, Any] = {"name": f"{module}.{name}"}
    try:
        encoded["source"] = inspect.getsource(function).strip()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        if code is not None:
            encoded["code"] = hashlib.sha256(_bytecode(code).encode()).hexdigest()
    if not alone and (closure := _closure(function)):
        encoded["with"] = closure
    return encoded


def _bytecode(code: Any) -> str:
    """Returns the code of a function without source, with the code of its inner functions."""
    constants = []
    for constant in code.co_consts:
        constants.append(_bytecode(constant) if hasattr(constant, "co_code") else repr(constant))
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _closure(function: Any) -> dict[str, Any]:
    """Returns the values on which a function depends: globals, closure variables and defaults.

    Functions of its own module are written by name and source.
    """
    functions, constants = {}, {}
    for name, value in _values_of(function).items():
        if inspect.isfunction(value):
            if value.__module__ == function.__module__ and value is not function:
                functions[name] = function_as_json(value, alone=True)
        elif (encoded := _value_as_json(value)) is not None:
            constants[name] = encoded
    return functions | constants


def _values_of(function: Any) -> dict[str, Any]:
    try:
        closure = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return {}
    values = {**closure.globals, **closure.nonlocals}
    for number, value in enumerate(getattr(function, "__defaults__", None) or ()):
        values[f"default {number}"] = value
    return values | (getattr(function, "__kwdefaults__", None) or {})


def _value_as_json(value: Any) -> Any:
    """Returns a number, a text, a tensor's hash or a list of them; None for a mutable object."""
    if isinstance(value, Tensor):
        return tensor_as_json(value, "digest")
    if isinstance(value, tuple):
        return list(map(_value_as_json, value))
    if isinstance(value, bool | int | float | str):
        return repr(value)
    return None


def _decode(value: Any) -> Any:
    match value:
        case list():
            return tuple(map(_decode, value))
        case dict():
            return _decode_object(value)
    return value


def _decode_object(value: dict[str, Any]) -> Any:
    match value:
        case {"$float": number}:
            return float(number)
        case {"$sites": sites}:
            return as_sites(list(map(_decode_site, sites)))
        case {"$site": site}:
            return _decode_site(site)
        case {"$mapping": dict() as mapping}:
            return mapping
        case {"$part": part}:
            return TextPart(part)
        case {"$chat": chat}:
            return chat_of(chat, 0)
        case {"$tensor": tensor}:
            return _decode_tensor(tensor)
        case {"$hook": hook}:
            return from_json(json.dumps(hook))
        case {"$value": name, **fields}:
            cls = _find_type(name, VALUE_TYPES, "a hook holds no value of type")
            return _decode_fields(cls, fields, name)
    raise BadHook(_refusal(value))


def _find_type(name: object, types: dict[str, str], problem: str) -> Any:
    """Returns the class with this name in a table of types, or raises `BadHook`."""
    if not isinstance(name, str) or name not in types:
        raise BadHook(f"{problem} {describe(name)}: there are {', '.join(sorted(types))}")
    return pkgutil.resolve_name(types[name])


def _refusal(value: dict[str, Any]) -> str:
    """Returns the message for an object that is no value of a hook."""
    if "$model" in value:
        model = value["$model"]
        name = model.get("name") if isinstance(model, dict) else None
        return (
            f"this hook has another model as its source, {describe(name)}, of which JSON has the "
            "name and not the weights: load it, and make the hook again with hk.toward or "
            "hk.away_from"
        )
    if "$function" not in value:
        keys = ", ".join(map(repr, value))
        return f"a hook in JSON has an object with the keys {keys}, and none with a $"
    function = value["$function"]
    name = function.get("name") if isinstance(function, dict) else None
    return (
        f"this hook has a user's function, {name}, of which JSON has the name and not the code: "
        "make the hook again with hk.edit(site, fn)"
    )


def _decode_tensor(encoded: Any) -> Tensor:
    if not isinstance(encoded, dict) or "safetensors" not in encoded:
        raise BadHook(
            "this hook was written with tensors='digest', which has the hash of its tensor and "
            "not the numbers"
        )
    try:
        return load(base64.b64decode(encoded["safetensors"], validate=True))["t"]
    except Exception as error:  # base64 and safetensors have several classes of errors
        raise BadHook(
            f"the tensor of this hook is damaged: {error}; write the hook again with to_json()"
        ) from error


def _decode_site(encoded: Any) -> Site | ModuleSite:
    if not isinstance(encoded, str):
        raise BadHook(
            f"a site in JSON is {describe(encoded)}: it is a text, such as 'resid_post.6'"
        )
    return parse_site(encoded)
