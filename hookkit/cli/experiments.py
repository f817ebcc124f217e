"""Commands about experiments and their results.

hookkit new    writes an experiment that runs, with its test, as a starting point
hookkit run    runs experiments, and compares their results with earlier ones
hookkit show   prints a result, or lists a folder of results
"""

import keyword
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Argument, Option

from ..errors import BadFile, BadHook
from ..files.atomic import write_new
from ..files.untrusted import check_mapping, path_inside, read_json, read_table
from .app import FAILED, command
from .options import ModelName
from .output import OutputOptions, TableView, print_message, print_text

if TYPE_CHECKING:
    pass

PANEL = "Experiments"
PROMPT = "I like oat milk in my"

EXPERIMENT = '''\
"""{docstring}

It is answered if … (say here what would count as an answer, before you look).

hookkit run experiments/{name}.py        seconds; writes results/{name}/
"""

import hookkit as hk

PROMPT, TOKEN, SEED = {prompt!r}, {token!r}, 0
QUESTION = {question!r}


def main() -> None:
    lm = hk.load({model})
    layer = lm.n_layers // 2
    settings = {{"prompt": PROMPT, "token": TOKEN, "layer": layer}}
    with hk.record(
        "results/{name}", question=QUESTION, lm=lm, seed=SEED, settings=settings
    ) as results:
        before = results.run("before", hk.forward(lm, PROMPT))
        after = results.run("after", hk.forward(lm, PROMPT, hk.ablate(f"mlp_out.{{layer}}")))
        table = hk.rank_shift(before, after, watch=[TOKEN])
        shift = results.table("shift", table, caption="After minus before.")
        results.figure("bump", hk.figures.rank_bump(shift), caption="Ranks before and after.")
        token = shift[shift["token_id"] == lm.token(TOKEN)].iloc[0]
        results.answer(
            f"Without block {{layer}}'s MLP, {{token['token']!r}} goes from rank "
            f"{{token['rank_before']}} to {{token['rank_after']}}; "
            f"its logit moves by {{token['logit_delta']:+.2f}}."
        )
    print(results.answered)


if __name__ == "__main__":
    main()
'''

TEST = '''\
"""{docstring}"""

import importlib

import pandas as pd


def test_{name}_gives_the_same_table_twice(tmp_path, monkeypatch):
    experiment = importlib.import_module("experiments.{name}")
    tables = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        experiment.main()
        tables.append(pd.read_csv("results/{name}/shift.csv"))
    assert tables[0].equals(tables[1])
    assert len(tables[0]) >= 10
'''


@command('hookkit new oat_milk --prompt "I like oat milk in my" --token " coffee"', panel=PANEL)
def new(
    name: Annotated[str, Argument(help="The name of the experiment: letters, digits and _.")],
    question: Annotated[str, Option(help="The question that it asks.")] = "",
    prompt: Annotated[str, Option(help="The prompt that it begins with.")] = PROMPT,
    token: Annotated[str, Option(help="The token that it watches.")] = " coffee",
    model: ModelName = None,
    folder: Annotated[
        Path, Option(help="The folder that has, or will have, experiments/ and tests/.")
    ] = Path(),
) -> None:
    """Write an experiment of some thirty lines that runs, and its test."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadHook(
            f"{name!r} cannot name an experiment: use small letters, digits and _, as in oat_milk"
        )
    question = " ".join(question.split())
    question = question or f"What does the middle block's MLP do for {token!r} after {prompt!r}?"
    if not question.endswith("?"):
        raise BadHook(f"{question!r} is not a question: a question ends in a question mark")
    values = {
        "name": name,
        "question": question,
        "docstring": question.replace("\\", "\\\\").replace('"""', "'''"),
        "prompt": prompt,
        "token": token,
        "model": _as_argument(model),
    }
    script = folder / "experiments" / f"{name}.py"
    test = folder / "tests" / f"test_{name}.py"
    existing = [str(path) for path in (script, test) if os.path.lexists(path)]
    if existing:
        raise BadHook(
            f"{' and '.join(existing)} already exist: give another name, or move them away"
        )
    write_new(script, EXPERIMENT.format(**values))
    write_new(test, TEST.format(**values))
    print_text(f"{script}\n{test}\n")
    print_message(f"run it with `hookkit run {script}`, and test it with `python -m pytest {test}`")


def _as_argument(model: str | None) -> str:
    """Returns the argument of `hk.load` for a model; nothing for the default model."""
    if model is None:
        return ""
    if Path(model).exists():
        model = str(Path(model).resolve())
    return repr(model)


FINISHED = "finished"
STANDARD_ERROR = 2  # the file descriptor for what an experiment prints

Against: TypeAlias = Annotated[
    str | None, Option(help="Compare with: last, the run before; a revision of git; or a folder.")
]
Tolerance: TypeAlias = Annotated[
    float, Option(help="With --against: the largest difference of two numbers.")
]


@command("hookkit run experiments/oat_milk.py --against HEAD", panel=PANEL)
def run(
    scripts: Annotated[
        list[Path], Argument(metavar="FILE...", help="Experiments: files of Python.")
    ],
    output: OutputOptions,
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    folder: Annotated[Path, Option(help="The folder of the results.")] = Path("results"),
    replace: Annotated[
        bool, Option("--replace", help="Put the new folder of a result in the place of the old.")
    ] = False,
) -> None:
    """Run experiments, each in its own process, write the index of results, and print what changed.

    With --replace an experiment writes into an empty folder, so that no file of an earlier version
    stays. The earlier folder comes back if the experiment fails or is interrupted; else it is kept
    as .last in the new one.

    Ends with status 1 if an experiment failed, or if with --against a table changed.
    """
    import pandas as pd

    output.check()
    missing = [str(path) for path in scripts if not path.is_file()]
    if missing:
        raise BadFile(f"there is no file {', '.join(missing)}: name experiments by their files")
    rows = []
    for path in scripts:
        if replace:
            row = _run_replacing(output, path, folder / path.stem)
        else:
            row = _run_experiment(output, path)
        if against is not None and row["ended"] == FINISHED:
            row |= _compare(output, path, folder / path.stem, against, tolerance)
        rows.append(row)
    _write_index(output, folder)
    table = pd.DataFrame(rows)
    output.write("Experiments", {"experiments": TableView(table)})
    is_same = against is None or ("same" in table and all(table["same"]))
    if set(table["ended"]) != {FINISHED} or not is_same:
        raise typer.Exit(FAILED)


def _write_index(output: OutputOptions, folder: Path) -> None:
    from ..reports.gallery import write_index

    try:
        output.note(f"the index is {write_index(folder)}")
    except BadHook as error:  # an experiment does not have to record anything
        output.note(f"no index: {error}")


def _run_replacing(output: OutputOptions, path: Path, folder: Path) -> dict[str, Any]:
    """Runs an experiment whose folder of results is empty; a run that fails changes nothing."""
    from ..reports.record import put_back, put_in_place, set_aside

    set_aside(folder)
    row: dict[str, Any] = {"ended": "interrupted"}
    try:
        row = _run_experiment(output, path)
    finally:
        if row["ended"] == FINISHED:
            put_in_place(folder)
        else:
            put_back(folder)
    return row


def _run_experiment(output: OutputOptions, path: Path) -> dict[str, Any]:
    output.note(str(path))
    start = time.perf_counter()
    arguments = [sys.executable, *_python_arguments(path)]
    status = subprocess.run(arguments, check=False, stdout=STANDARD_ERROR).returncode
    return {
        "experiment": path.stem,
        "seconds": round(time.perf_counter() - start),
        "ended": f"status {status}" if status else FINISHED,
    }


def _compare(
    output: OutputOptions, path: Path, folder: Path, against: str, tolerance: float
) -> dict[str, Any]:
    """Compares the results of an experiment: number of tables, all the same, largest difference."""
    from ..reports.results_diff import compare_results, describe_changes

    if not folder.is_dir():
        output.note(f"{path} writes no {folder}")
        return {"tables": 0, "same": True, "largest": 0.0}
    try:
        table = compare_results(_folder_before(folder, against), folder, tolerance=tolerance)
    except BadHook as error:  # there is nothing to compare with; other experiments still run
        output.note(str(error))
        return {"tables": 0, "same": False, "largest": float("nan")}
    output.note(f"{folder} against {against}: {describe_changes(table)}")
    is_same, largest = bool(table["same"].all()), table["largest"].max()
    return {"tables": len(table), "same": is_same, "largest": largest}


def _python_arguments(path: Path) -> list[str]:
    """Returns the arguments of Python for a file: as a module if it is in the current folder."""
    full_path = path.resolve()
    if full_path.is_relative_to(Path.cwd()):
        parts = full_path.relative_to(Path.cwd()).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            return ["-m", ".".join(parts)]
    return [str(path)]


@command("hookkit show results/oat_milk --against last", panel=PANEL)
def show(
    folder: Annotated[Path, Argument(help="A result, or a folder of results.")],
    output: OutputOptions,
    against: Against = None,
    tolerance: Tolerance = 1e-4,
    rows: Annotated[int, Option(min=1, help="How many rows of each table to show.")] = 12,
) -> None:
    """Show a result: question, answer, tables; or list a folder of results; or what changed.

    With --against it names the tables, the settings and the cells that changed, the largest change
    first, and ends with status 1 if a table changed. A setting alone, such as the version of a
    package, is no reason for that.
    """
    output.check()
    from ..reports.gallery import list_results
    from ..reports.parts import README, is_own_readme

    if against is not None:
        _show_changes(output, _folder_before(folder, against), folder, tolerance, rows)
    elif (folder / "report.html").is_file() or (
        (folder / "about.json").is_file() and is_own_readme(folder / README)
    ):
        output.write(folder.name, _read_result(folder, output.format, rows))
    else:
        view = TableView(list_results(folder), ("result", "question", "answer"))
        output.write("Results", {"results": view})


def _show_changes(
    output: OutputOptions, before: Any, folder: Path, tolerance: float, rows: int
) -> None:
    """Writes which tables, settings and cells changed. Ends with status 1 if a table did."""
    from ..reports.results_diff import changed_cells, changed_settings, compare_results

    table = compare_results(before, folder, tolerance=tolerance)
    cells = changed_cells(before, folder, tolerance=tolerance)
    settings = changed_settings(before, folder)
    parts = {"moved": TableView(table, caption="Tables")}
    if len(settings) or output.format:
        parts["settings"] = TableView(settings, caption="Settings that changed")
    if len(cells) or output.format:
        caption = "Cells that changed, the largest change first"
        if len(cells) > rows:
            caption += f": {rows} of {len(cells)}; --rows shows more"
        parts["cells"] = TableView(cells, caption=caption, reader_table=cells.head(rows))
    output.write("What moved", parts)
    if not all(table["same"]):
        raise typer.Exit(FAILED)


def _folder_before(folder: Path, against: str) -> str | Path:
    """Returns the result that --against names, as `compare_results` takes it."""
    from ..reports.results_diff import LAST

    if against == "last":
        if not (folder / LAST).is_dir():
            raise BadHook(f"{folder} has no run before this one: run the experiment again first")
        return folder / LAST
    return against if Path(against).is_dir() else f"{folder}@{against}"


def _read_result(folder: Path, output_format: str, rows: int) -> dict[str, TableView | str]:
    """Returns the texts and the tables of a result; a reader sees the first rows of each table."""
    import pandas as pd

    names = ("title", "question", "answer", "command")
    path = path_inside(folder, "about.json")
    try:
        about = check_mapping(read_json(path, finite=False), repr(str(path)), *names)
    except BadFile as error:
        raise BadFile(f"{error}; run the experiment again") from error
    texts = {name: about[name] for name in names if about.get(name)}
    parts: dict[str, TableView | str] = {}
    if output_format == "json":
        parts["about"] = TableView(pd.DataFrame([texts]))
    else:
        parts.update(texts)
    for path in sorted(folder.glob("*.csv")):
        table = read_table(path_inside(folder, path.name))
        caption = path.stem
        if not output_format and len(table) > rows:
            caption += f", the first {rows} of {len(table)} rows"
        parts[path.stem] = TableView(table, caption=caption, reader_table=table.head(rows))
    return parts
