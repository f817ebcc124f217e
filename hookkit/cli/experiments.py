"""hookkit new: an experiment that runs, with its test, to be rewritten.

hookkit run: experiments, one after the other, and what moved. hookkit show: a result, or all of them.
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

from .app import UNHEALTHY, command
from .output import Form, Shown, tell, tell_aside, tell_text

if TYPE_CHECKING:
    import pandas as pd


EXPERIMENT = '''\
"""{said}

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
    with hk.record("results/{name}", question=QUESTION, lm=lm, seed=SEED, settings=settings) as results:
        before = results.run("before", hk.forward(lm, PROMPT))
        after = results.run("after", hk.forward(lm, PROMPT, hk.ablate(f"mlp_out.{{layer}}")))
        shift = results.table("shift", hk.rank_shift(before, after, watch=[TOKEN]), caption="After minus before.")
        results.figure("bump", hk.rank_bump(shift), caption="Ranks before and after.")
        token = shift[shift["token_id"] == lm.token(TOKEN)].iloc[0]
        results.answer(
            f"Without block {{layer}}'s MLP, {{token['token']}} goes from rank {{token['rank_before']}} "
            f"to {{token['rank_after']}}; its logit moves by {{token['logit_delta']:+.2f}}."
        )
    print(results.answered)


if __name__ == "__main__":
    main()
'''

TEST = '''\
"""{said}"""

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


@command(
    'hookkit new oat_milk --prompt "I like oat milk in my" --token " coffee"', panel="Experiments"
)
def new(
    name: Annotated[
        str, typer.Argument(help="What the experiment is called: letters, digits and _.")
    ],
    question: Annotated[str, typer.Option(help="What it asks.")] = "",
    prompt: Annotated[
        str, typer.Option(help="The prompt that it begins with.")
    ] = "I like oat milk in my",
    token: Annotated[str, typer.Option(help="The token that it watches.")] = " coffee",
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face id, a folder or a .gguf file.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where experiments/ and tests/ are, or shall be.")
    ] = Path(),
) -> None:
    """Write a running experiment of some thirty lines, and its test."""
    from ..errors import BadHook
    from ..files.atomic import write_new

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadHook(
            f"{name!r} cannot name an experiment: use small letters, digits and _, as in oat_milk"
        )
    asked = (
        " ".join(question.split())
        or f"What does the middle block's MLP do for {token!r} after {prompt!r}?"
    )
    if not asked.endswith("?"):
        raise BadHook(
            f"{asked!r} is no question: an experiment asks one, and it ends in a question mark"
        )
    words = {
        "name": name,
        "question": asked,
        "said": _said(asked),
        "prompt": prompt,
        "token": token,
    }
    words["model"] = (
        "" if model is None else repr(str(Path(model).resolve()) if Path(model).exists() else model)
    )
    files = {
        folder / "experiments" / f"{name}.py": EXPERIMENT,
        folder / "tests" / f"test_{name}.py": TEST,
    }
    there = [str(path) for path in files if os.path.lexists(path)]
    if there:
        raise BadHook(
            f"{' and '.join(there)} stand there already: choose another name, or move them away"
        )
    for path, template in files.items():
        write_new(path, template.format(**words))
    for path in files:
        tell_text(f"{path}\n")
    run, test = files
    tell_aside(f"run it with `hookkit run {run}`, and test it with `python -m pytest {test}`")


def _said(question: str) -> str:
    """A question as it stands in a docstring."""
    return question.replace("\\", "\\\\").replace('"""', "'''")


STANDARD_ERROR = 2  # its number, for what an experiment prints

Against: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Compare with: last, the run before; a revision of git; or a folder."),
]
Tolerance: TypeAlias = Annotated[
    float, typer.Option(help="With --against: how far numbers may lie apart.")
]


@command("hookkit run experiments/oat_milk.py --against HEAD", panel="Experiments")
def run(
    scripts: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Experiments: files of Python.")
    ],
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
    table = pd.DataFrame(
        [_ran(form, path, folder / path.stem, against, tolerance) for path in scripts]
    )
    _indexed(form, folder)
    tell(form, "Experiments", {"experiments": Shown(table)})
    if set(table["ended"]) != {"finished"} or (
        against is not None and not all(table["same"].tolist())
    ):
        raise typer.Exit(UNHEALTHY)


def _ran(
    form: Form, path: Path, folder: Path, against: str | None, tolerance: float
) -> dict[str, Any]:
    """Run one experiment: its time, how it ended, and what moved."""
    form.note(str(path))
    started = time.perf_counter()
    status = subprocess.run(
        [sys.executable, *_words(path)], check=False, stdout=STANDARD_ERROR
    ).returncode
    row = {"experiment": path.stem, "seconds": round(time.perf_counter() - started)}
    row["ended"] = "finished" if status == 0 else f"status {status}"
    if against is None or status:
        return row
    from ..errors import BadHook
    from ..reports.results_diff import in_words

    if not folder.is_dir():
        form.note(f"{path} writes no {folder}")
        return row | {"tables": 0, "same": True, "largest": 0.0}
    try:
        table = _moved(folder, against, tolerance)
    except BadHook as error:  # there is nothing to compare with; the others go on
        form.note(str(error))
        return row | {"tables": 0, "same": False, "largest": float("nan")}
    form.note(f"{folder} against {against}: {in_words(table)}")
    return row | {
        "tables": len(table),
        "same": bool(table["same"].all()),
        "largest": table["largest"].max(),
    }


def _words(path: Path) -> list[str]:
    """How Python is asked to run a file: as a module where it lies below the folder one works in."""
    inside = (
        path.resolve().relative_to(Path.cwd())
        if path.resolve().is_relative_to(Path.cwd())
        else None
    )
    parts = inside.with_suffix("").parts if inside else ()
    return (
        ["-m", ".".join(parts)]
        if parts and all(part.isidentifier() for part in parts)
        else [str(path)]
    )


def _indexed(form: Form, folder: Path) -> None:
    from ..errors import BadHook
    from ..reports.gallery import index

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
    from ..reports.gallery import results

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
    from ..errors import BadHook
    from ..reports.results_diff import LAST, moved

    if against == "last":
        if not (folder / LAST).is_dir():
            raise BadHook(
                f"{folder} keeps no run before this one: run the experiment again, and it will"
            )
        return moved(folder / LAST, folder, tolerance=tolerance)
    before = against if Path(against).is_dir() else f"{folder}@{against}"
    return moved(before, folder, tolerance=tolerance)


def _result(folder: Path, kind: str, rows: int) -> dict[str, Shown | str]:
    """What a result says, and its tables; so many rows of each for a reader."""
    import pandas as pd

    from ..errors import BadFile
    from ..files.untrusted import inside, json_in, strings_of, table_of

    names = ("title", "question", "answer", "command")
    path = inside(folder, "about.json")
    try:
        about = strings_of(json_in(path, finite=False), names, repr(str(path)))
    except BadFile as error:
        raise BadFile(f"{error}; run the experiment again") from error
    said = {name: about[name] for name in names if about.get(name)}
    parts: dict[str, Shown | str] = (
        {"about": Shown(pd.DataFrame([said]))} if kind == "json" else {**said}
    )
    for path in sorted(folder.glob("*.csv")):
        table = table_of(inside(folder, path.name))
        cut = not kind and len(table) > rows
        caption = path.stem + (f", the first {rows} of {len(table)} rows" if cut else "")
        parts[path.stem] = Shown(table, caption=caption, reader=table.head(rows) if cut else None)
    return parts
