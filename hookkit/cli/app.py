"""The program itself, and how its commands end: done, with a wish that cannot be met, by Ctrl-C, or unread.

Options that stand together: a command takes a dataclass, and the command line has an option for each field of it.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer


def gathered(
    function: Callable[..., None], within: Callable[[], AbstractContextManager[None]]
) -> Callable[..., None]:
    """The function as typer is to see it: with the fields of its dataclasses written out. It runs `within` a block."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for name, given in inspect.signature(function).parameters.items():
        parameters += (
            _of(groups[name]) if name in groups else [given.replace(annotation=hints[name])]
        )

    @functools.wraps(function)
    def called(**given: Any) -> None:
        made = {
            name: kind(**{each.name: given.pop(each.name) for each in fields(kind)})
            for name, kind in groups.items()
        }
        with within():
            function(**given, **made)

    written_out: Any = called
    written_out.__signature__ = Signature(
        [each.replace(kind=Parameter.KEYWORD_ONLY) for each in parameters]
    )
    written_out.__annotations__ = {each.name: each.annotation for each in parameters}
    del written_out.__wrapped__  # or the annotations are looked up there
    return called


def _of(kind: Any) -> list[Parameter]:
    """The fields of a dataclass as parameters."""
    hints = get_type_hints(kind, include_extras=True)
    given = {
        each.name: Parameter.empty if each.default is MISSING else each.default
        for each in fields(kind)
    }
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=hints[name])
        for name, value in given.items()
    ]


DONE = 0
UNHEALTHY = (
    1  # the exit status of a model in which something does not hold, and of a result that moved
)
WRONG = 2  # that of a wish that cannot be met
INTERRUPTED = 130  # that of a program that Ctrl-C ended

TRACEBACK = "HOOKKIT_TRACEBACK"  # set, it shows where in the program a fault is

STATUS = (
    "Exit status: 0 done; 1 doctor found what does not work, or what was run failed or moved; 2 a wish that cannot be "
    "met; 130 ended by Ctrl-C."
)


def is_terminal(stream: Any) -> bool:
    """True for a stream that a person reads; False for one that is closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed later on
        return False


PIPED = not is_terminal(sys.stdout)  # help and refusals are then plain text, without frames

Function = TypeVar("Function", bound=Callable[..., None])


def program(**settings: Any) -> typer.Typer:
    """The program, or a group of commands in it."""
    mode = None if PIPED else "rich"
    return typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=mode, **settings
    )


app = program(add_completion=True, epilog=STATUS)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hookkit {version('hookkit')}")
        raise typer.Exit(DONE)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Say which hookkit this is."
        ),
    ] = False,
) -> None:
    """See and change what a language model computes. A model is SmolLM2-135M-Instruct unless --model names another."""
    if sys.stdout is None:
        _refuse("standard output is closed, and there is nowhere to say anything: leave >&- out")
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8" and hasattr(
        sys.stdout, "reconfigure"
    ):
        wide: Any = sys.stdout
        wide.reconfigure(**({"errors": "backslashreplace"} if not PIPED else {"encoding": "utf-8"}))


def command(
    example: str, *, panel: str, within: typer.Typer = app, name: str | None = None
) -> Callable[..., Any]:
    """What makes a function a command, whose endings are all clean. `panel` is its heading in the program's help."""

    def made(function: Function) -> Function:
        words = (
            f"Example: {example}" if not PIPED else f"\b\nExample:\n  {example}"
        )  # \b keeps its lines
        within.command(name, epilog=words, rich_help_panel=panel)(gathered(function, endings_said))
        return function

    return made


@contextmanager
def endings_said(left: str = "") -> Iterator[None]:
    """A block that ends the program with its status and a word, where a wish cannot be met, and at Ctrl-C.

    Where nobody reads on (`| head`), it ends quietly. `left` says what an interrupted program leaves.
    """
    from ..errors import HookkitError

    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort):
        _flush()
        raise
    except HookkitError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _say("interrupted" + (f"; {left}" if left else ""))
        _flush()
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _silence()
        raise typer.Exit(DONE) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        _refuse(f"{error.strerror or error}{where}")
    except MemoryError:
        _refuse("there is not enough memory: give fewer or shorter prompts, or a smaller model")
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _refuse(
            f"{type(error).__name__}: {error}. This is a fault of hookkit, or of a library that it uses; with "
            f"{TRACEBACK}=1 in the environment the same command shows where"
        )


def _refuse(text: str) -> NoReturn:
    """End the program with the reason why a wish cannot be met."""
    _say(text)
    _flush()
    raise typer.Exit(WRONG) from None


def _say(text: str) -> None:
    from ..display import printable_lines

    with suppress(OSError):  # standard error may be full, too
        typer.echo(f"hookkit: {printable_lines(text)}", err=True)


def _flush() -> None:
    """Bring out what was said so far; where that cannot be, so that Python does not try again at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _silence()


def _silence() -> None:
    """What Python still flushes goes nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
