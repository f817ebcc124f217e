"""The folder of a result: the question, the answer, how to make it again, and what changed.

with hk.record("results/oat_milk", title="Oat milk", lm=lm, seed=0) as record:
    record.run("forced", run)
    record.table("shift", hk.rank_shift(baseline, run), caption="after minus before")
    record.figure("bump", hk.figures.rank_bump(shift))
    record.answer("It takes 0.6 logits.")
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import check_arguments
from ..display import count_of, describe_outcome, printable
from ..errors import BadFile, BadHook, OtherSettings
from ..files.atomic import (
    MADE_BY,
    Ready,
    disk_errors_as_bad_file,
    make_folder,
    remove_leftovers,
    save_new_tensors,
    sha256,
    write_bytes,
    write_text,
)
from ..files.untrusted import check_folder, check_mapping, is_bare_name, read_json
from ..models.devices import is_writing_process
from ..models.lm import LM
from ..models.provenance import about_model, git_commit, tokenizer_hash, versions, weights_hash
from ..runs.run import Run
from .page import PAGE, Report, has_hash, report
from .parts import README, Part, check_name, encode_text, part_files
from .results_diff import LAST, compare_results, describe_changes

ABOUT = "about.json"
# What has to be the same in all runs of a folder.
FIXED = {"weights_sha256": "another model", "tokenizer_sha256": "another tokenizer",
         "dtype": "", "seed": ""}  # fmt: skip


@dataclass(eq=False)
class Record:
    """A result's folder while it is written. Made by `record`, and owned by its `with` block."""

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
    _hashes: dict[str, str] = field(default_factory=dict)  # of the files, noted before each exists
    _conditions: dict[str, Any] = field(default_factory=dict)  # the seed, the settings, the model
    _origin: dict[str, Any] = field(default_factory=dict)  # the command, the commit, the versions
    _started: float = 0.0

    def __repr__(self) -> str:
        files = count_of(len(self.files), "file")
        text = f"Record({self.title!r} in {str(self.folder)!r}: {files})"
        calls = ("results.text(...)", "results.table(name, table)", "results.figure(name, figure)")
        return describe_outcome(text, *calls)

    def __enter__(self) -> Record:
        self._started = time.perf_counter()
        self._conditions = {"seed": self.seed, "settings": dict(self.settings)}
        if self.lm is not None:
            self._conditions |= about_model(self.lm)
            self._conditions["weights_sha256"] = weights_hash(self.lm)
            self._conditions["tokenizer_sha256"] = tokenizer_hash(self.lm)
        self._origin = {"command": _command(), "git_commit": git_commit(), "versions": versions()}
        earlier = _read_about(self.folder)
        if not self.replace:
            _check_conditions(self.folder, earlier, self._conditions)
        if is_writing_process():
            _check_files(self.folder, earlier)
            make_folder(self.folder)
            remove_leftovers(self.folder)
            _move_earlier_run(self.folder, earlier)
            self._write_about("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is not None:
            self._write_about(f"stopped: {kind.__name__}: {error}")
            return
        seconds = time.perf_counter() - self._started
        footer = f"Made by {_command()} in {seconds:.0f} s; about.json says how."
        page = self.report(footer)
        pages = {PAGE: page.html()}
        if not os.path.lexists(self.folder / README):
            pages[README] = self.report().readme()
        for name, text in pages.items():
            self._write_data(name, encode_text(text))
        self._write_about("finished")
        if is_writing_process() and (self.folder / LAST / ABOUT).is_file():
            words = f"{self.folder}, against the run before: {describe_changes(self.moved())}"
            tqdm.write(printable(words), file=sys.stderr)

    def moved(self) -> pd.DataFrame:
        """What differs from the run before, as a table of `hk.results.compare_results`.

        Raises `BadHook` if there was no run before.
        """
        return compare_results(self.folder / LAST, self.folder)

    def answer(self, words: str) -> None:
        """Set the answer, a sentence. It is under the question, and on the index of all results."""
        if self.answered:
            raise BadHook(
                f"this record has its answer already: {self.answered!r}; say all of it at once"
            )
        self.answered = words

    def text(self, words: str) -> None:
        """Add a paragraph to the page; "# words" is a heading."""
        self.parts.append(words)

    def table(self, name: str, table: pd.DataFrame, *, caption: str = "") -> pd.DataFrame:
        """Write a table as NAME.csv, add it to the page, and return it."""
        # The copy keeps the page equal to the file if the caller changes the table.
        self._add(Part(table.copy(), name, caption))
        return table

    def figure(self, name: str, figure: Figure, *, caption: str = "") -> Figure:
        """Write a figure as NAME.png, add it to the page, and return it."""
        self._add(Part(figure, name, caption))
        return figure

    def tensors(self, name: str, tensors: Mapping[str, Tensor] | Run) -> Path:
        """Write tensors, or all captures of a run, as NAME.safetensors. Returns the path."""
        check_name(name)
        file = f"{name}.safetensors"
        values: Any = tensors
        words = None
        if isinstance(tensors, Run):
            values, words = tensors.tensors(), tensors.tensor_words()
        self._write_file(file, lambda path, ready: save_new_tensors(values, path, ready, words))
        return self.folder / file

    def run(self, name: str, run: Run) -> Run:
        """Note in about.json how a run was made, and return the run."""
        if name in self.runs:
            raise BadHook(f"a run named {name!r} is recorded already: names stand once")
        self.runs[name] = run
        return run

    def report(self, footer: str = "") -> Report:
        """The page with all parts so far."""
        opening = filter(None, (self.question, self.answered))
        return report(self.title, *opening, *self.parts, footer=footer)

    def _add(self, part: Part) -> None:
        check_name(part.name)
        if any(isinstance(other, Part) and other.name == part.name for other in self.parts):
            raise BadHook(f"{part.name!r} is recorded already: names stand once")
        # Files are written at once, so that nothing is lost if a later step fails.
        for file, data in part_files(part).items():
            self._write_data(file, data)
        self.parts.append(part)

    def _write_data(self, file: str, data: bytes) -> None:
        self._write_file(file, lambda path, ready: write_bytes(path, data, ready=ready))

    def _write_file(self, file: str, write: Callable[[Path, Ready], object]) -> None:
        """Write a file. Its sha256 is noted before it exists, as the program may be killed."""
        if is_writing_process():
            path = self.folder / file
            if os.path.lexists(path):
                reason = "is there, and no record wrote it"
                if file in self.files:
                    reason = "is recorded already: names stand once"
                raise BadFile(f"{str(path)!r} {reason}; give another name, or move that away")

            def note_hash(temporary: Path) -> None:
                self._hashes[file] = sha256(temporary)
                self._write_about("running")

            write(path, note_hash)
        self.files.append(file)

    def _write_about(self, ended: str) -> None:
        about: dict[str, Any] = {
            "title": self.title,
            "question": self.question,
            "answer": self.answered,
            "ended": ended,
            **self._origin,
            MADE_BY: "hookkit",
            **self._conditions,
        }
        about_runs = {}
        for name, run in self.runs.items():
            about_runs[name] = {key: value for key, value in run.about.items() if key not in about}
        about["runs"] = about_runs
        about["files"] = self.files
        about["sha256"] = self._hashes
        about["seconds"] = round(time.perf_counter() - self._started, 1)
        if is_writing_process():
            write_text(self.folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


@check_arguments
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
    """A context manager that writes a result's folder.

    The folder has tables, figures, tensors, report.html, README.md, which has the page for a code
    host (a README.md that no record wrote is not changed), and about.json: the model with the
    hashes of its weights and tokenizer at the start, versions, dtype, device, attention, seed,
    settings, command, git commit, seconds, and of each recorded run its prompts and hooks. A `with`
    block that ends in an exception keeps what was written, and about.json says how it ended.

    settings  what else decides the result, by name, as plain values
    replace   replace a run with another model, seed or settings. Without it such a run raises
              `OtherSettings`, and the folder stays as it is

    The files of the run before are kept in the folder `.last`. How the tables changed against it is
    written to standard error at the end; `record.moved()` is the table of it.

    Only files that a record wrote and that were not changed since (about.json has their sha256) are
    moved or deleted. Raises `BadFile`, before anything is written, for a folder whose about.json or
    report.html is not a record's, or where a file was changed since.

    >>> with record("results/oat_milk", lm=lm, seed=0) as results:
    ...     table = results.table("ranks", ranks(run))
    """
    path = check_folder(folder)
    title = title or path.name.replace("_", " ").capitalize()
    try:
        plain_settings = json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError) as error:
        raise BadHook(
            f"settings are kept as JSON, and these cannot be: {error}; give plain values"
        ) from None
    return Record(path, title, lm, seed, question, plain_settings, replace)


def _read_about(folder: Path) -> dict[str, Any]:
    """The about.json of the run in a folder; empty if there is none."""
    path = folder / ABOUT
    if not os.path.lexists(path):
        return {}
    foreign = (
        f"{str(path)!r} was not written by hk.record: record into another folder, or move that "
        "file away"
    )
    if path.is_symlink() or not path.is_file():
        raise BadFile(foreign)
    about = check_mapping(read_json(path, finite=False), repr(str(path)), "ended")
    hashes = about.get("sha256")
    has_hashes = isinstance(hashes, dict) and all(map(is_bare_name, hashes))
    if about.get(MADE_BY) != "hookkit" or not has_hashes:
        raise BadFile(foreign)
    return about


def _check_files(folder: Path, earlier: Mapping[str, Any]) -> None:
    """Raises `BadFile` if a file that would be replaced is not as a record wrote it."""
    hashes = earlier.get("sha256", {})
    changed = _changed_files(folder, hashes)
    if PAGE not in hashes and os.path.lexists(folder / PAGE):
        changed.append(PAGE)
    changed += _changed_last_files(folder, earlier)
    if changed:
        raise BadFile(
            f"{str(folder)!r} has {', '.join(changed)}, which no record wrote, or which was "
            "changed since: move that away, or record into another folder"
        )


def _changed_last_files(folder: Path, earlier: Mapping[str, Any]) -> list[str]:
    """The files in `.last` that moving a finished run there would overwrite, but must not."""
    last = folder / LAST
    if os.path.lexists(last) and (last.is_symlink() or not last.is_dir()):
        return [LAST]
    if earlier.get("ended") != "finished":
        return []
    hashes, last_hashes = earlier["sha256"], _read_about(last).get("sha256", {})
    names = set(_changed_files(last, last_hashes))
    names |= {name for name in hashes.keys() - last_hashes if os.path.lexists(last / name)}
    return [f"{LAST}/{name}" for name in sorted(names) if os.path.lexists(folder / name)]


def _changed_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files whose sha256 are not these."""
    return [name for name, value in hashes.items() if not _is_unchanged(folder / name, value)]


def _is_unchanged(path: Path, value: str) -> bool:
    """True if the file does not exist, or has this sha256."""
    return not os.path.lexists(path) or has_hash(path, (value,))


def _check_conditions(
    folder: Path, earlier: Mapping[str, Any], conditions: Mapping[str, Any]
) -> None:
    """Raises `OtherSettings` if a finished run had another model, seed or settings."""
    if earlier.get("ended") != "finished":
        return
    changes = _changed_conditions(earlier, conditions)
    if changes:
        raise OtherSettings(
            f"{folder} has results of other settings ({'; '.join(changes)}): record into another "
            "folder, or put these in their place with replace=True"
        )


def _changed_conditions(earlier: Mapping[str, Any], conditions: Mapping[str, Any]) -> list[str]:
    changes = []
    for name, words in FIXED.items():
        if earlier.get(name) != conditions.get(name):
            changes.append(words or _describe_changes([name], earlier, conditions))
    before, after = earlier.get("settings") or {}, conditions["settings"]
    if before != after:
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        changes.append(_describe_changes(names, before, after))
    return changes


def _describe_changes(
    names: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    return ", ".join(
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in names
    )


def _move_earlier_run(folder: Path, earlier: Mapping[str, Any]) -> None:
    """Move a finished run's files into `.last`; remove what a stopped run left.

    about.json is moved last: as long as it exists, it says which files are the record's.
    """
    if not earlier:
        return
    if earlier.get("ended") != "finished":
        _remove_run(folder, earlier)
        return
    last = folder / LAST
    _remove_run(last, _read_about(last))
    make_folder(last)
    if not os.path.lexists(last / ".gitignore"):
        write_text(last / ".gitignore", "*\n")
    with disk_errors_as_bad_file(last):
        for name in (*earlier["sha256"], ABOUT):
            if (folder / name).is_file():
                (folder / name).replace(last / name)


def _remove_run(folder: Path, about: Mapping[str, Any]) -> None:
    """Remove a record's unchanged files, and its about.json last."""
    if not about:
        return
    with disk_errors_as_bad_file(folder):
        for name, value in about["sha256"].items():
            if os.path.lexists(folder / name) and _is_unchanged(folder / name, value):
                (folder / name).unlink()
        (folder / ABOUT).unlink()


# ---- a folder that is replaced as a whole


def _aside(folder: Path) -> Path:
    """Returns where a folder is kept while another is made in its place."""
    return folder.with_name(f".{folder.name}.replaced")


def set_aside(folder: Path) -> None:
    """Moves a result's folder away, so that another can be made in its place.

    What a killed run left in that place is removed first. Raises `BadFile` for a folder that no
    record wrote.
    """
    put_back(folder)
    if os.path.lexists(folder):
        if not folder.is_dir() or folder.is_symlink() or not _read_about(folder):
            raise BadFile(
                f"{str(folder)!r} has no {ABOUT} of a record, and is not replaced: move it away"
            )
        with disk_errors_as_bad_file(folder):
            folder.replace(_aside(folder))


def put_back(folder: Path) -> None:
    """Moves a folder back that was set aside; what was made in its place is removed."""
    if _aside(folder).is_dir():
        with disk_errors_as_bad_file(folder):
            if folder.is_dir():
                shutil.rmtree(folder)
            _aside(folder).replace(folder)


def put_in_place(folder: Path) -> None:
    """Keeps the new folder. The earlier one is its folder `.last`, without its own `.last`.

    If the experiment made no folder, the earlier one is moved back.
    """
    earlier = _aside(folder)
    if not folder.is_dir():
        put_back(folder)
    elif earlier.is_dir():
        with disk_errors_as_bad_file(folder):
            if (earlier / LAST).is_dir():
                shutil.rmtree(earlier / LAST)
            write_text(earlier / ".gitignore", "*\n")
            if (folder / LAST).is_dir():
                shutil.rmtree(folder / LAST)
            earlier.replace(folder / LAST)


def _command() -> str:
    """The running command, without absolute paths of the machine."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main:
        words = ["python", "-m", main.name.removesuffix(".__main__")]
    else:
        words = ["python", Path(sys.argv[0]).name]
    arguments = [word for word in sys.argv[1:] if not os.path.isabs(word)]
    return shlex.join([*words, *arguments])
