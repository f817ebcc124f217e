"""Files: tensors as safetensors, and the folder of a result with how to make it again.

with hk.record("results/oat_milk", title="Oat milk", lm=lm, seed=0) as record:
    record.run("forced", run)
    record.table("shift", hk.rank_shift(baseline, run), caption="after minus before")
    record.figure("bump", hk.rank_bump(shift))
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .about import about_model, git_commit, tokenizer_hash, versions, weights_hash
from .errors import BadHook, checks_keywords
from .model import LM
from .reports import NAME, Part, Report, report, save_part
from .runs import Run
from .sharding import writes


@checks_keywords
def save_tensors(
    tensors: Mapping[str, Tensor] | Run, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors, or all that a run captured, to a safetensors file, with words about them; the file's path.

    >>> save_tensors({"direction": vector}, "direction.safetensors", about={"site": "resid_post.6"}).name
    'direction.safetensors'
    """
    from safetensors.torch import save_file

    if isinstance(tensors, Run):
        found = {f"{each.site}" + (f"/{each.name}" if each.name else ""): each.values for each in tensors.kept.all}
        made = {name: value for name, value in tensors.about.items() if name != "seconds"}  # same run, same bytes
        about = {"about": json.dumps(made), **(about or {})}
    else:
        found = dict(tensors)
    if not found:
        raise BadHook("there are no tensors to save: capture something, or name at least one")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    making = target.with_name(f".{target.name}.making")
    if writes():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, making, dict(about or {})
        )
        making.replace(target)
    return target


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, by name, on the CPU.

    >>> path = save_tensors(run, "run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    from safetensors.torch import load_file

    return load_file(path)


@dataclass(eq=False)
class Record:
    """A result's folder while it is being made. Made by `record`."""

    folder: Path
    title: str
    lm: LM | None = None
    seed: int | None = None
    question: str = ""
    parts: list[str | Part] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    _started: float = 0.0

    def __enter__(self) -> "Record":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            footer = f"Made by {_command()} in {time.perf_counter() - self._started:.0f} s; about.json says how."
            self.report(footer).write(self.folder)
            self.files.append("report.html")
        self._write_about("finished" if kind is None else f"stopped: {kind.__name__}: {error}")

    def text(self, words: str) -> None:
        """Add a paragraph to the page; "# words" is a heading."""
        self.parts.append(words)

    def table(self, name: str, table: pd.DataFrame, *, caption: str = "") -> pd.DataFrame:
        """Write a table as NAME.csv, put it on the page, and give it back."""
        self._add(Part(table, name, caption))
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
        return report(self.title, *([self.question] if self.question else []), *self.parts, footer=footer)

    def _add(self, part: Part) -> None:
        _check_name(part.name)
        if any(isinstance(other, Part) and other.name == part.name for other in self.parts):
            raise BadHook(f"{part.name!r} is recorded already: names stand once")
        self.parts.append(part)
        self.files.append(save_part(part, self.folder).name)  # at once, so that nothing is lost if a later step fails

    def _write_about(self, ended: str) -> None:
        about: dict[str, Any] = {"title": self.title, "question": self.question, "ended": ended, "command": _command()}
        about |= {"seed": self.seed, "git_commit": git_commit(), "versions": versions()}
        if self.lm is not None:
            about |= about_model(self.lm)
            about |= {"weights_sha256": weights_hash(self.lm), "tokenizer_sha256": tokenizer_hash(self.lm)}
        shared = set(about)
        about["runs"] = {n: {k: v for k, v in run.about.items() if k not in shared} for n, run in self.runs.items()}
        about |= {"files": self.files, "seconds": round(time.perf_counter() - self._started, 1)}
        target = self.folder / "about.json"
        making = target.with_name(".about.json.making")
        if writes():
            making.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            making.replace(target)


@checks_keywords
def record(
    folder: str | os.PathLike[str],
    *,
    title: str = "",
    question: str = "",
    lm: LM | None = None,
    seed: int | None = None,
) -> Record:
    """A block that writes a result's folder: tables, figures, tensors, report.html, and about.json at the end.

    about.json has the model with the hashes of its weights and tokenizer, versions, dtype, device, attention, seed,
    command, git commit, seconds, and of each recorded run its prompts and hooks. A block that ends in an exception
    keeps what was written, and about.json says how it ended.

    >>> with record("results/oat_milk", lm=lm, seed=0) as results:
    ...     table = results.table("ranks", ranks(run))
    """
    path = Path(folder)
    return Record(path, title or path.name.replace("_", " ").capitalize(), lm, seed, question)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise BadHook(f"{name!r} cannot name a file here: use letters, digits, '-' and '_'")


def _command() -> str:
    """The command that is running, without the machine's own paths."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = ["python", "-m", main.name.removesuffix(".__main__")] if main else ["python", Path(sys.argv[0]).name]
    return shlex.join([*words, *(word for word in sys.argv[1:] if not os.path.isabs(word))])
