"""Pages of Markdown whose examples run: README.md and the guide.

    python tests/pages.py README.md hookkit/docs/pages/*.md     runs them, and writes what they print

A page is one session. ```python is code, and ```text after it what it prints. ```pycon is a session of
Python's prompt. ```console is a command and its output. In an output, a line ... stands for any lines.
A picture hookkit/docs/pages/images/NAME.png is what the code of a page saves as NAME.png.
"""

import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shown import same

from hookkit.errors import HookkitError

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "hookkit" / "docs" / "pages"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


WILD = re.compile(r"(?<!\[)\.\.\.(?!\])")  # not the [...] of a message
CONTINUED = re.compile(r"^\.\.\. ", flags=re.MULTILINE)


@dataclass(frozen=True)
class Output:
    """An output of a page: where it stands, what the page shows, what was printed."""

    start: int
    end: int
    shown: str
    printed: str

    @property
    def holds(self) -> bool:
        """Whether the page shows what was printed, where a last digit may differ."""
        return is_same(self.shown, self.printed)


def run_page(text: str, session: dict[str, Any], command: Callable[[str], str]) -> list[Output]:
    """Runs the examples of a page from top to bottom, and returns its outputs."""
    with patch.dict(os.environ, COLUMNS="100"):  # the width of tables, in any terminal
        return _run_blocks(text, session, command)


def _run_blocks(text: str, session: dict[str, Any], command: Callable[[str], str]) -> list[Output]:
    outputs = []
    printed = None
    for match in BLOCK.finditer(text):
        kind, block = match[1], match[2]
        result = None
        if kind == "python":
            printed = _run_code(block, session)
        elif kind == "text" and printed is not None:
            result, printed = printed, None
        elif kind == "pycon":
            result = _run_pycon(block, session)
        elif kind == "console":
            line = block.partition("\n")[0]
            result = f"{line}\n{command(line)}"
        if result is not None:
            outputs.append(Output(match.start(2), match.end(2), block, _plain(result)))
    return outputs


def is_same(shown: str, printed: str) -> bool:
    """Whether an output is what a page shows; ... matches anything."""
    shown, printed = CONTINUED.sub(">>> ", shown), CONTINUED.sub(">>> ", printed)
    if not WILD.search(shown):
        return same(shown, printed)
    pieces = WILD.split(" ".join(shown.split()))
    pattern = ".*".join(re.escape(piece.strip()) for piece in pieces)
    return bool(re.fullmatch(pattern, " ".join(printed.split())))


def _run_code(block: str, session: dict[str, Any]) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(compile(block, "page", "exec"), session)
    return stream.getvalue()


def _run_pycon(block: str, session: dict[str, Any]) -> str:
    """Returns the session of a prompt with what each of its statements printed."""
    lines = []
    for example in doctest.DocTestParser().get_examples(block):
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            try:
                exec(compile(example.source, "page", "single"), session)
            except HookkitError as error:
                kind = f"{type(error).__module__}.{type(error).__name__}"
                stream.write(f"Traceback (most recent call last):\n{kind}: {error}\n")
        first, *others = example.source.rstrip("\n").split("\n")
        lines += [f">>> {first}", *(f"... {line}" for line in others), stream.getvalue().rstrip()]
    return "\n".join(line for line in lines if line) + "\n"


def _plain(printed: str) -> str:
    """Returns an output without the spaces at the ends of its lines."""
    return "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())


def new_session(lm: Any) -> dict[str, Any]:
    """Returns the names that a page of the guide may take as given."""
    import hookkit as hk

    clean = "When Mary and John went to the store, John gave a drink to"
    prompt = "I like oat milk in my"
    names = {"clean": clean, "corrupted": clean.replace(", John", ", Mary"), "prompt": prompt}
    return {"hk": hk, "lm": lm, "inputs": lm.tokenizer(prompt, return_tensors="pt"), **names}


def run_command(line: str) -> str:
    """Returns what a line such as `$ hookkit ranks "…"` prints."""
    from typer.testing import CliRunner

    from hookkit.cli import app

    words = shlex.split(line.removeprefix("$ hookkit "))
    result = CliRunner().invoke(app, words, prog_name="hookkit")
    return result.stdout or result.stderr


def commands(path: Path) -> list[str]:
    """Returns the commands that a page shows, those without an output too."""
    shown = []
    for match in BLOCK.finditer(path.read_text()):
        if match[1] in ("sh", "console"):
            joined = match[2].replace("\\\n", " ")
            shown += re.findall(r"^(?:\$ )?(hookkit .*)$", joined, flags=re.MULTILINE)
    return shown


def links(path: Path) -> list[str]:
    """Returns the relative links and pictures of a page."""
    text = BLOCK.sub("", path.read_text())
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text)
    return [one or other for one, other in targets if not (one or other).startswith("http")]


def _write_outputs(path: Path, lm: Any) -> None:
    text = path.read_text()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs = run_page(text, new_session(lm), run_command)
        for picture in Path().glob("*.png"):
            if f"images/{picture.name}" in text:
                shutil.copy(picture, GUIDE / "images" / picture.name)
    for output in reversed(outputs):
        if output.holds:
            continue
        print(output.printed)
        if WILD.search(CONTINUED.sub("", output.shown)):
            print("    was not written: a part of the page's output stands for itself")
            continue
        text = text[: output.start] + output.printed + text[output.end :]
    path.write_text(text)


def main(paths: list[str]) -> None:
    import hookkit as hk
    from hookkit.models import loading

    lm = hk.load(device="cpu")
    load = loading.load
    loading.load = lambda *name, **options: load(*name, **options) if name or options else lm
    for path in paths:
        print(path, flush=True)
        try:
            _write_outputs(Path(path).absolute(), lm)
        except Exception:  # noqa: BLE001 - the other pages are written all the same
            traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
