"""The folder of a result: what was asked, what came out, how to make it again, and what moved against the run before.

with hk.record("results/oat_milk", title="Oat milk", lm=lm, seed=0) as record:
    record.run("forced", run)
    record.table("shift", hk.rank_shift(baseline, run), caption="after minus before")
    record.figure("bump", hk.rank_bump(shift))
    record.answer("It takes 0.6 logits.")
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import checks_arguments, folder_of
from ..display import printable
from ..errors import BadFile, BadHook, OtherSettings
from ..files.atomic import (
    Ready,
    make_folder,
    remove_leftovers,
    sha256,
    write_bytes,
    write_text,
    writing_to,
)
from ..files.tensors import MADE_BY, save_new_tensors
from ..files.untrusted import is_bare_name, json_in, strings_of
from ..models.lm import LM
from ..models.provenance import about_model, git_commit, tokenizer_hash, versions, weights_hash
from ..models.tensor_parallel import is_writing_process
from ..runs.run import Run
from .page import PAGE, Part, Report, check_name, part_files, report
from .results_diff import LAST, in_words, moved

ABOUT = "about.json"
SAME = (
    "weights_sha256",
    "tokenizer_sha256",
    "dtype",
    "seed",
    "settings",
)  # in all runs of a folder


@dataclass(eq=False)
class Record:
    """A result's folder while it is being made. Made by `record`."""

    folder: Path
    title: str
    lm: LM | None = None
    seed: int | None = None
    question: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    replace: bool = False
    answered: str = ""
    parts: list[str | Part] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    _hashes: dict[str, str] = field(
        default_factory=dict
    )  # of the files, noted before each takes its place
    _made_with: dict[str, Any] = field(default_factory=dict)
    _made_by: dict[str, Any] = field(default_factory=dict)
    _started: float = 0.0

    def __enter__(self) -> "Record":
        self._started = time.perf_counter()
        self._made_with = {"seed": self.seed, "settings": dict(self.settings)}
        if self.lm is not None:
            self._made_with |= about_model(self.lm)
            self._made_with |= {
                "weights_sha256": weights_hash(self.lm),
                "tokenizer_sha256": tokenizer_hash(self.lm),
            }
        self._made_by = {"command": _command(), "git_commit": git_commit(), "versions": versions()}
        earlier = _earlier(self.folder)
        if not self.replace:
            _check_same(self.folder, earlier, self._made_with)
        if is_writing_process():
            _check_own(self.folder, earlier)
            make_folder(self.folder)
            remove_leftovers(self.folder)
            _put_aside(self.folder, earlier)
            self._write_about("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is None:
            footer = f"Made by {_command()} in {time.perf_counter() - self._started:.0f} s; about.json says how."
            page = self.report(footer).html()
            self._put(PAGE, lambda path, ready: write_text(path, page, ready=ready))
            self.files.append(PAGE)
        self._write_about("finished" if kind is None else f"stopped: {kind.__name__}: {error}")
        if kind is None and is_writing_process() and (self.folder / LAST / ABOUT).is_file():
            words = f"{self.folder}, against the run before: {in_words(self.moved())}"
            tqdm.write(printable(words), file=sys.stderr)

    def moved(self) -> pd.DataFrame:
        """What differs from the run before, as `hk.moved` tells it; raises `BadHook` if there was none."""
        return moved(self.folder / LAST, self.folder)

    def answer(self, words: str) -> None:
        """Say in a sentence what came out: it stands under the question, and on the index of all results."""
        if self.answered:
            raise BadHook(
                f"this record has its answer already: {self.answered!r}; say all of it at once"
            )
        self.answered = words

    def text(self, words: str) -> None:
        """Add a paragraph to the page; "# words" is a heading."""
        self.parts.append(words)

    def table(self, name: str, table: pd.DataFrame, *, caption: str = "") -> pd.DataFrame:
        """Write a table as NAME.csv, put it on the page, and give it back."""
        self._add(Part(table.copy(), name, caption))  # what the page shows is what the file has
        return table

    def figure(self, name: str, figure: Figure, *, caption: str = "") -> Figure:
        """Write a figure as NAME.png, put it on the page, and give it back."""
        self._add(Part(figure, name, caption))
        return figure

    def tensors(self, name: str, tensors: Mapping[str, Tensor] | Run) -> Path:
        """Write tensors, or all that a run captured, as NAME.safetensors."""
        check_name(name)
        file = f"{name}.safetensors"
        words = tensors.tensor_words() if isinstance(tensors, Run) else None
        named = tensors.tensors() if isinstance(tensors, Run) else tensors
        self._put(file, lambda path, ready: save_new_tensors(named, path, ready, words))
        self.files.append(file)
        return self.folder / file

    def run(self, name: str, run: Run) -> Run:
        """Note in about.json how a run was made, and give it back."""
        if name in self.runs:
            raise BadHook(f"a run named {name!r} is recorded already: names stand once")
        self.runs[name] = run
        return run

    def report(self, footer: str = "") -> Report:
        """The page, as far as it is."""
        said = [words for words in (self.question, self.answered) if words]
        return report(self.title, *said, *self.parts, footer=footer)

    def _add(self, part: Part) -> None:
        check_name(part.name)
        if any(isinstance(other, Part) and other.name == part.name for other in self.parts):
            raise BadHook(f"{part.name!r} is recorded already: names stand once")
        for file, data in part_files(
            part
        ).items():  # at once, so that nothing is lost if a later step fails
            self._put(file, lambda path, ready, data=data: write_bytes(path, data, ready=ready))
            self.files.append(file)
        self.parts.append(part)

    def _put(self, file: str, write: Callable[[Path, Ready], object]) -> None:
        """Write a file of the record. about.json has its sha256 before it is there, so that it is known as the record's
        own also where the program is killed."""
        path = self.folder / file
        if not is_writing_process():
            return
        if os.path.lexists(path):
            words = (
                "is recorded already: names stand once"
                if file in self.files
                else "is there, and no record wrote it"
            )
            raise BadFile(f"{str(path)!r} {words}; give another name, or move that away")

        def note(making: Path) -> None:
            self._hashes[file] = sha256(making)
            self._write_about("running")

        write(path, note)

    def _write_about(self, ended: str) -> None:
        about: dict[str, Any] = {
            "title": self.title,
            "question": self.question,
            "answer": self.answered,
        }
        about |= {"ended": ended, **self._made_by, MADE_BY: "hookkit"}
        about |= self._made_with
        shared = set(about)
        about["runs"] = {
            n: {k: v for k, v in run.about.items() if k not in shared}
            for n, run in self.runs.items()
        }
        about |= {"files": self.files, "sha256": self._hashes}
        about["seconds"] = round(time.perf_counter() - self._started, 1)
        if is_writing_process():
            write_text(self.folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


@checks_arguments
def record(
    folder: str | os.PathLike[str],
    *,
    title: str = "",
    question: str = "",
    lm: LM | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Record:
    """A block that writes a result's folder: tables, figures, tensors, report.html, and about.json at the end.

    about.json has the model with the hashes of its weights and tokenizer as they were at the start, versions, dtype,
    device, attention, seed, settings, command, git commit, seconds, and of each recorded run its prompts and hooks. A
    block that ends in an exception keeps what was written, and about.json says how it ended.

    settings  what else decides the result, by name, as plain values
    replace   put in the place of a run with another model, seed or settings. Without it such a run raises
              `OtherSettings`, and the folder stays as it is

    The files of the run before are kept in the folder `.last`; how the tables moved against it is said at the end on
    standard error, and `record.moved()` is the table of it.

    Only files that a record wrote, and that are as it wrote them (about.json has their sha256), are moved or deleted.
    Raises `BadFile`, before anything is written, for a folder whose about.json or report.html is not a record's, or
    where a file was changed since.

    >>> with record("results/oat_milk", lm=lm, seed=0) as results:
    ...     table = results.table("ranks", ranks(run))
    """
    path = folder_of(folder)
    title = title or path.name.replace("_", " ").capitalize()
    try:
        plain = json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError) as error:
        raise BadHook(
            f"settings are kept as JSON, and these cannot be: {error}; give plain values"
        ) from None
    return Record(path, title, lm, seed, question, plain, replace)


def _earlier(folder: Path) -> dict[str, Any]:
    """What about.json says of the run that stands in a folder; nothing where there is none."""
    path = folder / ABOUT
    if not os.path.lexists(path):
        return {}
    foreign = f"{str(path)!r} was not written by hk.record: record into another folder, or move that file away"
    if path.is_symlink() or not path.is_file():
        raise BadFile(foreign)
    about = strings_of(json_in(path, finite=False), ("ended",), repr(str(path)))
    hashes = about.get("sha256")
    if (
        about.get(MADE_BY) != "hookkit"
        or not isinstance(hashes, dict)
        or not all(map(is_bare_name, hashes))
    ):
        raise BadFile(foreign)
    return dict(about)


def _check_own(folder: Path, earlier: Mapping[str, Any]) -> None:
    """Raise `BadFile` where what is in the way is not as a record wrote it."""
    hashes = earlier.get("sha256", {})
    changed = [name for name, value in hashes.items() if not _is_as_written(folder / name, value)]
    if PAGE not in hashes and os.path.lexists(folder / PAGE):
        changed.append(PAGE)
    last = folder / LAST
    if os.path.lexists(last) and (last.is_symlink() or not last.is_dir()):
        changed.append(LAST)
    elif earlier.get("ended") == "finished":
        before = _earlier(last).get("sha256", {})
        kept = {name for name, value in before.items() if not _is_as_written(last / name, value)}
        unknown = {name for name in hashes if name not in before and os.path.lexists(last / name)}
        changed += [
            f"{LAST}/{name}" for name in sorted(kept | unknown) if os.path.lexists(folder / name)
        ]
    if changed:
        raise BadFile(
            f"{str(folder)!r} has {', '.join(changed)}, which no record wrote, or which was changed since: move that "
            "away, or record into another folder"
        )


def _is_as_written(path: Path, value: str) -> bool:
    """True where the file is gone, or is the one with this sha256."""
    if not os.path.lexists(path):
        return True
    return path.is_file() and not path.is_symlink() and sha256(path) == value


def _check_same(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to put results of other settings in the place of a finished run's."""
    if earlier.get("ended") != "finished":
        return
    was = {name: earlier.get(name) for name in SAME} | {"settings": earlier.get("settings") or {}}
    other = [name for name in SAME if was[name] != now.get(name)]
    if other:
        changes = [_change(name, was[name], now.get(name)) for name in other]
        raise OtherSettings(
            f"{folder} has results of other settings ({'; '.join(changes)}): record into another folder, or put "
            "these in their place with replace=True"
        )


def _change(name: str, was: Any, now: Any) -> str:
    if name == "settings":
        words = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return ", ".join(f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in words)
    if name.endswith("_sha256"):
        return f"another {'model' if name.startswith('weights') else 'tokenizer'}"
    return f"{name} was {was!r} and is {now!r}"


def _put_aside(folder: Path, earlier: Mapping[str, Any]) -> None:
    """Move a finished run's files into the folder of the last run; what a stopped run left is removed.

    about.json goes last: while it is there, it says which files are the record's.
    """
    if not earlier:
        return
    if earlier.get("ended") != "finished":
        _remove(folder, earlier)
        return
    last = folder / LAST
    _remove(last, _earlier(last))
    make_folder(last)
    if not os.path.lexists(last / ".gitignore"):
        write_text(last / ".gitignore", "*\n")
    with writing_to(last):
        for name in (*earlier["sha256"], ABOUT):
            if (folder / name).is_file():
                (folder / name).replace(last / name)


def _remove(folder: Path, about: Mapping[str, Any]) -> None:
    """Remove a record's files that are as it wrote them, and its about.json last."""
    if not about:
        return
    with writing_to(folder):
        for name, value in about["sha256"].items():
            if os.path.lexists(folder / name) and _is_as_written(folder / name, value):
                (folder / name).unlink()
        (folder / ABOUT).unlink()


def _command() -> str:
    """The command that is running, without the machine's own paths."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = (
        ["python", "-m", main.name.removesuffix(".__main__")]
        if main
        else ["python", Path(sys.argv[0]).name]
    )
    return shlex.join([*words, *(word for word in sys.argv[1:] if not os.path.isabs(word))])
