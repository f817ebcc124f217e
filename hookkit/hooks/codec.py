"""Hooks to JSON and back. Every value in a hook has one way to be written; a user's function only its name.

What JSON has no word for is an object with one key that begins with "$": {"$sites": ["z.9.3"]}, {"$tensor": …}.
"""

import base64
import dataclasses
import hashlib
import inspect
import json
import math
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
    if verb not in HOOKS:
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
        return {"$tensor": _tensor(value, tensors)}
    if type(value).__name__ in VALUES:
        fields = {field.name: _encode(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return {"$value": type(value).__name__, **fields}
    assert callable(value), f"a hook holds a {type(value).__name__}, which has no way to be written"
    return {"$function": _named(value)}


def _tensor(tensor: Tensor, tensors: str) -> dict[str, Any]:
    data = save({"t": tensor.detach().cpu().contiguous()})
    if tensors == "inline":
        return {"safetensors": base64.b64encode(data).decode()}
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _named(function: Any) -> dict[str, str]:
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
        return {"name": name, "source": inspect.getsource(function).strip()}
    except (OSError, TypeError):
        return {"name": name}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$sites" in value:
        return Sites(tuple(map(parse, value["$sites"])))
    if "$site" in value:
        return parse(value["$site"])
    if "$part" in value:
        return Part(value["$part"])
    if "$tensor" in value:
        if "safetensors" not in value["$tensor"]:
            raise BadHook(
                "this hook was written with tensors='digest', which has the hash of its tensor and not the numbers"
            )
        return load(base64.b64decode(value["$tensor"]["safetensors"]))["t"]
    if "$function" in value:
        raise BadHook(
            f"this hook has a user's function, {value['$function']['name']}, of which JSON has the name and not the "
            "code: make the hook again with hk.edit(site, fn)"
        )
    return VALUES[value["$value"]](**{name: _decode(item) for name, item in value.items() if name != "$value"})
