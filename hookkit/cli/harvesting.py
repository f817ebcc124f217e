"""hookkit harvest: what is at some sites, for every text of a file, into a folder."""

import json
import os
from typing import Annotated

import typer

from .base import command, endings_said
from .engine import Engine
from .options import Which
from .printing import tell_text


@command("hookkit harvest texts.txt resid_post.6 z.9 --out folder --keep-as bfloat16", panel="Grids and corpora")
def harvest(
    texts: Annotated[str, typer.Argument(help="A file with a text a line: .txt, or .jsonl.")],
    sites: Annotated[list[str], typer.Argument(help="The sites, such as resid_post.6; resid_post means every layer.")],
    out: Annotated[str, typer.Option(help="The folder; one that was begun is gone on with.")],
    which: Which,
    engine: Engine,
    keep_as: Annotated[str | None, typer.Option(help="The dtype of what is kept; the model's if left out.")] = None,
    pos: Annotated[int | None, typer.Option(help="One position of each text, such as -1; all if left out.")] = None,
    context: Annotated[int | None, typer.Option(help="How many tokens of a text are read at most.")] = None,
    long: Annotated[str, typer.Option(help="What becomes of a longer text: error, truncate or split.")] = "error",
    unfit: Annotated[
        str, typer.Option(help="What becomes of a text that cannot be harvested: error or skip.")
    ] = "error",
    batch_tokens: Annotated[int, typer.Option(min=1, help="How many tokens run together.")] = 2048,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Rows of a shard; 128 MiB if left out.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line that says how far it is.")] = False,
) -> None:
    """Write what is at some sites, for every text of a file, to a folder; prints what it has, as JSON."""
    _check_files(texts, out)
    from ..harvesting import harvest as harvested

    with endings_said(f"what is in {out} stays, and the same command goes on"):
        where = engine.chosen()
        found = harvested(
            which.load(quiet=quiet),
            texts,
            sites,
            out,
            pos=pos,
            dtype=keep_as,
            context=context,
            long=long,  # pyright: ignore[reportArgumentType]
            unfit=unfit,  # pyright: ignore[reportArgumentType]
            batch_tokens=batch_tokens,
            shard_size=shard_size,
            progress=not quiet,
            engine=where,
        )
    said = {"folder": out, "rows": len(found), "texts": found.texts, "left_out": found.left_out}
    tell_text(json.dumps(said | {"sites": [str(site) for site in found.sites]}, ensure_ascii=False) + "\n")


def _check_files(texts: str, out: str) -> None:
    """Raise for a file of texts that is not there and a folder that is a file, before anything is loaded."""
    from ..errors import BadFile, BadPrompt

    if not os.path.isfile(texts):
        raise BadPrompt(f"{texts!r} is no file of texts: give the path of one with a text a line (.txt, .jsonl)")
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadFile(f"--out {out!r} is a file: give a folder, or the name of one that is to be made")
