"""hookkit new: an experiment that runs, with its test, to be rewritten."""

import keyword
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from .base import command
from .printing import tell_aside, tell_text

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


@command('hookkit new oat_milk --prompt "I like oat milk in my" --token " coffee"', panel="Experiments")
def new(
    name: Annotated[str, typer.Argument(help="What the experiment is called: letters, digits and _.")],
    question: Annotated[str, typer.Option(help="What it asks.")] = "",
    prompt: Annotated[str, typer.Option(help="The prompt that it begins with.")] = "I like oat milk in my",
    token: Annotated[str, typer.Option(help="The token that it watches.")] = " coffee",
    model: Annotated[str | None, typer.Option(help="A Hugging Face id, a folder or a .gguf file.")] = None,
    folder: Annotated[Path, typer.Option(help="Where experiments/ and tests/ are, or shall be.")] = Path(),
) -> None:
    """Write a running experiment of some thirty lines, and its test."""
    from ..errors import BadHook
    from ..whole_files import write_new

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadHook(f"{name!r} cannot name an experiment: use small letters, digits and _, as in oat_milk")
    asked = " ".join(question.split()) or f"What does the middle block's MLP do for {token!r} after {prompt!r}?"
    if not asked.endswith("?"):
        raise BadHook(f"{asked!r} is no question: an experiment asks one, and it ends in a question mark")
    words = {"name": name, "question": asked, "said": _said(asked), "prompt": prompt, "token": token}
    words["model"] = "" if model is None else repr(str(Path(model).resolve()) if Path(model).exists() else model)
    files = {folder / "experiments" / f"{name}.py": EXPERIMENT, folder / "tests" / f"test_{name}.py": TEST}
    there = [str(path) for path in files if os.path.lexists(path)]
    if there:
        raise BadHook(f"{' and '.join(there)} stand there already: choose another name, or move them away")
    for path, template in files.items():
        write_new(path, template.format(**words))
    for path in files:
        tell_text(f"{path}\n")
    run, test = files
    tell_aside(f"run it with `hookkit run {run}`, and test it with `python -m pytest {test}`")


def _said(question: str) -> str:
    """A question as it stands in a docstring."""
    return question.replace("\\", "\\\\").replace('"""', "'''")
