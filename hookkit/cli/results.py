"""hookkit run: experiments, one after the other, and what moved. hookkit show: a result, or all of them."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .base import UNHEALTHY, command
from .printing import Form, Shown, tell

if TYPE_CHECKING:
    import pandas as pd

STANDARD_ERROR = 2  # its number, for what an experiment prints

Against: TypeAlias = Annotated[
    str | None, typer.Option(help="Compare with: last, the run before; a revision of git; or a folder.")
]
Tolerance: TypeAlias = Annotated[float, typer.Option(help="With --against: how far numbers may lie apart.")]


@command("hookkit run experiments/oat_milk.py --against HEAD", panel="Experiments")
def run(
    scripts: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiments: files of Python.")],
    form: Form,
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    folder: Annotated[Path, typer.Option(help="Where the results are written.")] = Path("results"),
) -> None:
    """Run experiments, each in a process of its own, write the index of the results, and say what moved.

    Ends with status 1 if one of them failed, or if with --against a table moved.
    """
    _ = form.kind
    import pandas as pd

    from ..errors import BadFile

    missing = [str(path) for path in scripts if not path.is_file()]
    if missing:
        raise BadFile(f"there is no file {', '.join(missing)}: name experiments by their files")
    table = pd.DataFrame([_ran(form, path, folder / path.stem, against, tolerance) for path in scripts])
    _indexed(form, folder)
    tell(form, "Experiments", {"experiments": Shown(table)})
    if set(table["ended"]) != {"finished"} or (against is not None and not all(table["same"].tolist())):
        raise typer.Exit(UNHEALTHY)


def _ran(form: Form, path: Path, folder: Path, against: str | None, tolerance: float) -> dict[str, Any]:
    """Run one experiment: its time, how it ended, and what moved."""
    form.note(str(path))
    started = time.perf_counter()
    status = subprocess.run([sys.executable, *_words(path)], check=False, stdout=STANDARD_ERROR).returncode
    row = {"experiment": path.stem, "seconds": round(time.perf_counter() - started)}
    row["ended"] = "finished" if status == 0 else f"status {status}"
    if against is None or status:
        return row
    from ..against import in_words
    from ..errors import BadHook

    if not folder.is_dir():
        form.note(f"{path} writes no {folder}")
        return row | {"tables": 0, "same": True, "largest": 0.0}
    try:
        table = _moved(folder, against, tolerance)
    except BadHook as error:  # there is nothing to compare with; the others go on
        form.note(str(error))
        return row | {"tables": 0, "same": False, "largest": float("nan")}
    form.note(f"{folder} against {against}: {in_words(table)}")
    return row | {"tables": len(table), "same": bool(table["same"].all()), "largest": table["largest"].max()}


def _words(path: Path) -> list[str]:
    """How Python is asked to run a file: as a module where it lies below the folder one works in."""
    inside = path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else None
    parts = inside.with_suffix("").parts if inside else ()
    return ["-m", ".".join(parts)] if parts and all(part.isidentifier() for part in parts) else [str(path)]


def _indexed(form: Form, folder: Path) -> None:
    from ..errors import BadHook
    from ..gallery import index

    try:
        form.note(f"the index is {index(folder)}")
    except BadHook as error:  # an experiment need not record anything
        form.note(f"no index: {error}")


@command("hookkit show results/oat_milk --against last", panel="Experiments")
def show(
    folder: Annotated[Path, typer.Argument(help="A result, or a folder of results.")],
    form: Form,
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of each table to show.")] = 12,
) -> None:
    """Show a result: question, answer, tables; or list a folder of results; or say what moved.

    Ends with status 1 if with --against a table moved.
    """
    kind = form.kind
    from ..gallery import results

    if against is not None:
        table = _moved(folder, against, tolerance)
        tell(form, "What moved", {"moved": Shown(table)})
        if not all(table["same"].tolist()):
            raise typer.Exit(UNHEALTHY)
    elif (folder / "report.html").is_file():
        tell(form, folder.name, _result(folder, kind, rows))
    else:
        table = results(folder)
        tell(form, "Results", {"results": Shown(table, ("result", "question", "answer"))})


def _moved(folder: Path, against: str, tolerance: float) -> "pd.DataFrame":
    from ..against import LAST, moved
    from ..errors import BadHook

    if against == "last":
        if not (folder / LAST).is_dir():
            raise BadHook(f"{folder} keeps no run before this one: run the experiment again, and it will")
        return moved(folder / LAST, folder, tolerance=tolerance)
    before = against if Path(against).is_dir() else f"{folder}@{against}"
    return moved(before, folder, tolerance=tolerance)


def _result(folder: Path, kind: str, rows: int) -> dict[str, Shown | str]:
    """What a result says, and its tables; so many rows of each for a reader."""
    import pandas as pd

    from ..checked_files import inside, json_in, strings_of, table_of
    from ..errors import BadFile

    names = ("title", "question", "answer", "command")
    path = inside(folder, "about.json")
    try:
        about = strings_of(json_in(path, finite=False), names, repr(str(path)))
    except BadFile as error:
        raise BadFile(f"{error}; run the experiment again") from error
    said = {name: about[name] for name in names if about.get(name)}
    parts: dict[str, Shown | str] = {"about": Shown(pd.DataFrame([said]))} if kind == "json" else {**said}
    for path in sorted(folder.glob("*.csv")):
        table = table_of(inside(folder, path.name))
        cut = not kind and len(table) > rows
        caption = path.stem + (f", the first {rows} of {len(table)} rows" if cut else "")
        parts[path.stem] = Shown(table, caption=caption, reader=table.head(rows) if cut else None)
    return parts
