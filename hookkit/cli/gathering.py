"""Options that stand together: a command takes a dataclass, and the command line has an option for each field of it."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, get_type_hints


def gathered(function: Callable[..., None], within: Callable[[], AbstractContextManager[None]]) -> Callable[..., None]:
    """The function as typer is to see it: with the fields of its dataclasses written out. It runs `within` a block."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, given in inspect.signature(function).parameters.items():
        parameters += _of(groups[name]) if name in groups else [given.replace(annotation=hints[name])]

    @functools.wraps(function)
    def called(**given: Any) -> None:
        made = {
            name: kind(**{each.name: given.pop(each.name) for each in fields(kind)}) for name, kind in groups.items()
        }
        with within():
            function(**given, **made)

    written_out: Any = called
    written_out.__signature__ = Signature([each.replace(kind=Parameter.KEYWORD_ONLY) for each in parameters])
    written_out.__annotations__ = {each.name: each.annotation for each in parameters}
    del written_out.__wrapped__  # or the annotations are looked up there
    return called


def _of(kind: Any) -> list[Parameter]:
    """The fields of a dataclass as parameters."""
    hints = get_type_hints(kind, include_extras=True)
    given = {each.name: Parameter.empty if each.default is MISSING else each.default for each in fields(kind)}
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=hints[name]) for name, value in given.items()
    ]
