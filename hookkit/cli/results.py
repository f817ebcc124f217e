"""hookkit run: experiments, one after the other, and what moved. hookkit show: a result, or all of them."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .base import UNHEALTHY, app, interrupts_said, records, refusals_said

if TYPE_CHECKING:
    import pandas as pd

STANDARD_ERROR = 2  # its number, for what an experiment prints

Against: TypeAlias = Annotated[
    str | None, typer.Option(help="Compare with: last, the run before; a revision of git; or a folder.")
]
Tolerance: TypeAlias = Annotated[float, typer.Option(help="With --against: how far numbers may lie apart.")]


@app.command(epilog="Example: hookkit run experiments/oat_milk.py --against HEAD")
def run(
    scripts: Annotated[list[Path], typer.Argument(help="Experiments: files of Python.")],
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    folder: Annotated[Path, typer.Option(help="Where the results are written.")] = Path("results"),
) -> None:
    """Run experiments, each in a process of its own, write the index of the results, and say what moved.

    Ends with status 1 if one of them failed, or if with --against a table moved.
    """
    import pandas as pd

    from ..errors import BadHook

    with refusals_said(), interrupts_said("what was recorded stays"):
        missing = [str(path) for path in scripts if not path.is_file()]
        if missing:
            raise BadHook(f"there is no file {', '.join(missing)}: name experiments by their files")
        rows = [_ran(path, folder / path.stem, against, tolerance) for path in scripts]
        _indexed(folder)
    table = pd.DataFrame(rows)
    typer.echo(table.to_string(index=False))
    if (table["ended"] != "finished").any() or (against is not None and not table["same"].all()):
        raise typer.Exit(UNHEALTHY)


def _ran(path: Path, folder: Path, against: str | None, tolerance: float) -> dict[str, Any]:
    """Run one experiment: its time, how it ended, and what moved."""
    typer.echo(f"hookkit: {path}", err=True)
    started = time.perf_counter()
    status = subprocess.run([sys.executable, *_words(path)], check=False, stdout=STANDARD_ERROR).returncode
    row = {"experiment": path.stem, "seconds": round(time.perf_counter() - started)}
    row["ended"] = "finished" if status == 0 else f"status {status}"
    if against is None or status:
        return row
    from ..against import in_words

    table = _moved(folder, against, tolerance)
    said = in_words(table)
    typer.echo(f"hookkit: {folder} against {against}: {said}", err=True)
    return row | {"tables": len(table), "same": bool(table["same"].all()), "largest": table["largest"].max()}


def _words(path: Path) -> list[str]:
    """How Python is asked to run a file: as a module where it lies below the folder one works in."""
    inside = path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else None
    parts = inside.with_suffix("").parts if inside else ()
    return ["-m", ".".join(parts)] if parts and all(part.isidentifier() for part in parts) else [str(path)]


def _indexed(folder: Path) -> None:
    from ..errors import BadHook
    from ..gallery import index

    try:
        typer.echo(f"hookkit: the index is {index(folder)}", err=True)
    except BadHook as error:  # an experiment need not record anything
        typer.echo(f"hookkit: no index: {error}", err=True)


@app.command(epilog="Example: hookkit show results/oat_milk --against last")
def show(
    folder: Annotated[Path, typer.Argument(help="A result, or a folder of results.")],
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of each table to show.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a result: question, answer, tables; or list a folder of results; or say what moved.

    Ends with status 1 if with --against a table moved.
    """
    from ..gallery import results

    with refusals_said():
        if against is not None:
            _say_moved(_moved(folder, against, tolerance), as_json)
        elif (folder / "report.html").is_file():
            _say_result(folder, rows, as_json)
        else:
            _say_all(results(folder), as_json)


def _moved(folder: Path, against: str, tolerance: float) -> "pd.DataFrame":
    from ..against import LAST, moved
    from ..errors import BadHook

    if against == "last":
        if not (folder / LAST).is_dir():
            raise BadHook(f"{folder} keeps no run before this one: run the experiment again, and it will")
        return moved(folder / LAST, folder, tolerance=tolerance)
    before = against if Path(against).is_dir() else f"{folder}@{against}"
    return moved(before, folder, tolerance=tolerance)


def _say_moved(table: "pd.DataFrame", as_json: bool) -> None:
    typer.echo(_json(records(table)) if as_json else table.to_string(index=False))
    if not table["same"].all():
        raise typer.Exit(UNHEALTHY)


def _say_result(folder: Path, rows: int, as_json: bool) -> None:
    import json

    import pandas as pd

    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    if as_json:
        typer.echo(_json({"about": about, "tables": {name: records(table) for name, table in tables.items()}}))
        return
    for words in (about.get("title"), about.get("question"), about.get("answer")):
        if words:
            typer.echo(words)
    for name, table in tables.items():
        more = f", the first {rows} of {len(table)} rows" if len(table) > rows else ""
        typer.echo(f"\n{name}{more}\n{table.head(rows).to_string(index=False, max_colwidth=40)}")
    typer.echo(f"\nMade by {about.get('command', 'an unknown command')}; the page is {folder / 'report.html'}")


def _say_all(table: "pd.DataFrame", as_json: bool) -> None:
    found = records(table)
    if as_json:
        typer.echo(_json(found))
        return
    for each in found:
        typer.echo(f"{each['result']}\n  {each['question'] or each['title']}")
        if each["answer"]:
            typer.echo(f"  {each['answer']}")


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=1)
