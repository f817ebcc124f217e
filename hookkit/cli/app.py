"""The program of the command line: how commands are declared, and how they end.

A command can take a dataclass, and then has an option for each of its fields. A command ends with
an exit status. An error becomes a message on standard error instead of a traceback.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version as installed_version
from inspect import Parameter, Signature
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from ..errors import HookkitError
from .output import is_terminal, print_message

DONE = 0
FAILED = 1  # a model has a problem, an experiment failed, or a result changed
REFUSED = 2  # the request cannot be met
INTERRUPTED = 130  # Ctrl-C ended the program

TRACEBACK = "HOOKKIT_TRACEBACK"  # environment variable: show the traceback of unexpected errors

STATUS_HELP = (
    "Exit status: 0 done; 1 doctor found a problem, or what was run failed or changed; "
    "2 the request cannot be met; 130 ended by Ctrl-C."
)


PIPED = not is_terminal(sys.stdout)  # help and errors are then plain text, without frames

Function = TypeVar("Function", bound=Callable[..., None])


def create_program(**settings: Any) -> typer.Typer:
    """Returns a program, or a group of commands in it."""
    mode = None if PIPED else "rich"
    return typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=mode, **settings
    )


app = create_program(add_completion=True, epilog=STATUS_HELP)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hookkit {installed_version('hookkit')}")
        raise typer.Exit(DONE)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """See and change what a language model computes.

    The model is SmolLM2-135M-Instruct unless --model names another.
    """
    if sys.stdout is None:
        _refuse("standard output is closed, and there is nowhere to print results: leave >&- out")
    _accept_all_characters(sys.stdout)


def _accept_all_characters(stdout: Any) -> None:
    """Makes standard output write UTF-8 to a pipe, and what a terminal cannot show as escapes."""
    is_utf8 = (stdout.encoding or "").lower().replace("-", "") == "utf8"
    if is_utf8 or not hasattr(stdout, "reconfigure"):
        return
    if PIPED:
        stdout.reconfigure(encoding="utf-8")
    else:
        stdout.reconfigure(errors="backslashreplace")


def command(
    example: str, *, panel: str, within: typer.Typer = app, name: str | None = None
) -> Callable[[Function], Function]:
    """Returns a decorator that makes a function a command. `panel` is its heading in the help."""

    def add_command(function: Function) -> Function:
        epilog = f"Example: {example}"
        if PIPED:
            epilog = f"\b\nExample:\n  {example}"  # \b keeps the line ends
        within.command(name, epilog=epilog, rich_help_panel=panel)(_with_options(function))
        return function

    return add_command


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function with a keyword for each field of its dataclasses, and errors handled."""
    declared = inspect.signature(function).parameters.values()
    annotations = {parameter.name: parameter.annotation for parameter in declared}
    groups: dict[str, Any] = {
        name: kind for name, kind in annotations.items() if is_dataclass(kind)
    }
    keywords: list[Parameter] = []
    for parameter in declared:
        keywords += _expand(parameter)

    @functools.wraps(function)
    def run_command(**arguments: Any) -> None:
        options = {}
        for name, group in groups.items():
            values = {field.name: arguments.pop(field.name) for field in fields(group)}
            options[name] = group(**values)
        with exit_cleanly():
            function(**arguments, **options)

    wrapper: Any = run_command
    wrapper.__signature__ = Signature(keywords)
    wrapper.__annotations__ = {keyword.name: keyword.annotation for keyword in keywords}
    del wrapper.__wrapped__  # else typer reads the annotations of the function
    return wrapper


def _expand(parameter: Parameter) -> list[Parameter]:
    """Returns the keywords for a parameter: one, or one for each field of a dataclass."""
    parameters = [parameter]
    group: Any = parameter.annotation
    if is_dataclass(parameter.annotation):
        parameters = list(inspect.signature(group).parameters.values())
    return [option.replace(kind=Parameter.KEYWORD_ONLY) for option in parameters]


@contextmanager
def exit_cleanly(kept_results: str = "") -> Iterator[None]:
    """Ends the program with a status and a message after an error in the `with` block or Ctrl-C.

    Ends silently if nobody reads the output (`| head`). `kept_results` says what an interrupted
    program leaves.
    """
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        _flush()
        raise
    except KeyboardInterrupt:
        _print_error("; ".join(filter(None, ("interrupted", kept_results))))
        _flush()
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _discard_output()
        raise typer.Exit(DONE) from None
    except (HookkitError, OSError, MemoryError) as error:
        _refuse(_explain(error))
    except Exception as error:  # a command never ends in a traceback unless one is asked for
        if os.environ.get(TRACEBACK):
            raise
        _refuse(_explain(error))


def _explain(error: Exception) -> str:
    """Returns the message for an error that ends a command."""
    match error:
        case HookkitError():
            return str(error)
        case OSError():
            location = "" if error.filename is None else f": {error.filename}"
            return f"{error.strerror or error}{location}"
        case MemoryError():
            return "there is not enough memory: give fewer or shorter prompts, or a smaller model"
    return (
        f"{type(error).__name__}: {error}. This is a fault of hookkit, or of a library that it "
        f"uses; with {TRACEBACK}=1 in the environment the same command shows where"
    )


def _refuse(reason: str) -> NoReturn:
    """Ends the program with the reason why the request cannot be met."""
    _print_error(reason)
    _flush()
    raise typer.Exit(REFUSED) from None


def _print_error(text: str) -> None:
    with suppress(OSError):  # the disk of standard error may be full, too
        print_message(text)


def _flush() -> None:
    """Flushes standard output. If that fails, discards it, so that Python does not try again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _discard_output()


def _discard_output() -> None:
    """Redirects what Python still has to flush to the null device."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
