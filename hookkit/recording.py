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
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from .about import about_model, git_commit, tokenizer_hash, versions, weights_hash
from .against import LAST, in_words, moved
from .arguments import checks_arguments, folder_of
from .errors import BadHook, OtherSettings
from .files import save_tensors
from .model import LM
from .reports import NAME, Part, Report, report, save_part
from .runs import Run
from .sharding import writes

ABOUT = "about.json"
SAME = ("weights_sha256", "tokenizer_sha256", "dtype", "seed", "settings")  # in all runs of a folder


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
    _made_with: dict[str, Any] = field(default_factory=dict)
    _started: float = 0.0

    def __enter__(self) -> "Record":
        self._started = time.perf_counter()
        self._made_with = {"seed": self.seed, "settings": dict(self.settings)}
        if self.lm is not None:
            self._made_with |= about_model(self.lm)
            self._made_with |= {"weights_sha256": weights_hash(self.lm), "tokenizer_sha256": tokenizer_hash(self.lm)}
        earlier = _earlier(self.folder)
        if not self.replace:
            _check_same(self.folder, earlier, self._made_with)
        if writes():
            self.folder.mkdir(parents=True, exist_ok=True)
            _put_aside(self.folder, earlier)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            footer = f"Made by {_command()} in {time.perf_counter() - self._started:.0f} s; about.json says how."
            self.report(footer).write_page(self.folder)
            self.files.append("report.html")
        self._write_about("finished" if kind is None else f"stopped: {kind.__name__}: {error}")
        if kind is None and writes() and (self.folder / LAST).is_dir():
            tqdm.write(f"{self.folder}, against the run before: {in_words(self.moved())}", file=sys.stderr)

    def moved(self) -> pd.DataFrame:
        """What differs from the run before, as `hk.moved` tells it; raises `BadHook` if there was none."""
        return moved(self.folder / LAST, self.folder)

    def answer(self, words: str) -> None:
        """Say in a sentence what came out: it stands under the question, and on the index of all results."""
        if self.answered:
            raise BadHook(f"this record has its answer already: {self.answered!r}; say all of it at once")
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
        _check_name(name)
        path = save_tensors(tensors, self.folder / f"{name}.safetensors")
        self.files.append(path.name)
        return path

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
        _check_name(part.name)
        if any(isinstance(other, Part) and other.name == part.name for other in self.parts):
            raise BadHook(f"{part.name!r} is recorded already: names stand once")
        self.parts.append(part)
        self.files.append(save_part(part, self.folder).name)  # at once, so that nothing is lost if a later step fails

    def _write_about(self, ended: str) -> None:
        about: dict[str, Any] = {"title": self.title, "question": self.question, "answer": self.answered}
        about |= {"ended": ended, "command": _command(), "git_commit": git_commit(), "versions": versions()}
        about |= self._made_with
        shared = set(about)
        about["runs"] = {n: {k: v for k, v in run.about.items() if k not in shared} for n, run in self.runs.items()}
        about |= {"files": self.files, "seconds": round(time.perf_counter() - self._started, 1)}
        target = self.folder / ABOUT
        making = target.with_name(".about.json.making")
        if writes():
            making.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            making.replace(target)


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

    >>> with record("results/oat_milk", lm=lm, seed=0) as results:
    ...     table = results.table("ranks", ranks(run))
    """
    path = folder_of(folder)
    title = title or path.name.replace("_", " ").capitalize()
    try:
        plain = json.loads(json.dumps(dict(settings or {})))
    except (TypeError, ValueError) as error:
        raise BadHook(f"settings are kept as JSON, and these cannot be: {error}; give plain values") from None
    return Record(path, title, lm, seed, question, plain, replace)


def _earlier(folder: Path) -> dict[str, Any]:
    """What about.json says of the run that stands in a folder."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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
    """Move a finished run's files into the folder of the last run; what a stopped run left is removed."""
    names = [name for name in (*earlier.get("files", ()), ABOUT) if Path(name).name == name]
    old = [folder / name for name in names if (folder / name).is_file()]
    if earlier.get("ended") != "finished":
        for path in old:
            path.unlink()
        return
    last = folder / LAST
    shutil.rmtree(last, ignore_errors=True)
    last.mkdir()
    (last / ".gitignore").write_text("*\n")
    for path in old:
        path.replace(last / path.name)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise BadHook(f"{name!r} cannot name a file here: use letters, digits, '-' and '_'")


def _command() -> str:
    """The command that is running, without the machine's own paths."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = ["python", "-m", main.name.removesuffix(".__main__")] if main else ["python", Path(sys.argv[0]).name]
    return shlex.join([*words, *(word for word in sys.argv[1:] if not os.path.isabs(word))])
