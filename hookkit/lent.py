"""Lending an object another attribute for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A block in which an object has another attribute of its own; then it has again what it had."""
    had = name in owner.__dict__
    old = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = old
        else:
            owner.__dict__.pop(name, None)
