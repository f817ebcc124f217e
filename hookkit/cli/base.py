"""The program itself, and what its commands share: how a wish that cannot be met, and Ctrl-C, end it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..model import LM

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
UNHEALTHY = 1  # that of a model in which something does not hold
WRONG = 2  # that of a wish that cannot be met


@app.callback()
def main() -> None:
    """See and change what a language model computes."""


@contextmanager
def refusals_said() -> Iterator[None]:
    """A block in which a wish that cannot be met ends the program, with the reason."""
    from ..errors import HookkitError

    try:
        yield
    except HookkitError as error:
        typer.echo(f"hookkit: {error}", err=True)
        raise typer.Exit(WRONG) from None


@contextmanager
def interrupts_said(left: str) -> Iterator[None]:
    """A block that Ctrl-C ends with a word on what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"hookkit: interrupted; {left}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def loaded(words: dict[str, Any]) -> "LM":
    """The model that these words mean, the default one where they say nothing."""
    from ..zoo import load

    given = {name: value for name, value in words.items() if value is not None}
    name = given.pop("model", None)
    return load(**given) if name is None else load(name, **given)


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table as plain values; what is no finite number is None."""
    return json.loads(table.to_json(orient="records"))
