"""hookkit sites and doctor: where a model can be looked into; what works on it, and what will not and why.

hookkit models: those on this machine; to fetch one, and to remove one.

hookkit harvest: what is at some sites, for every text of a file, into a folder.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..display import printable
from .app import DONE, UNHEALTHY, command
from .options import Device, Which
from .output import Form, Shown, records, tell, tell_text

if TYPE_CHECKING:
    import pandas as pd

    from ..checks.doctor import Checkup
    from ..models.lm import LM
import json
import os
import sys

from .app import app, endings_said, is_terminal, program
from .options import Engine
from .output import tell_aside

MODELS = "Models"


@command("hookkit sites 'resid*' --model HuggingFaceTB/SmolLM2-135M", panel=MODELS)
def sites(
    which: Which,
    form: Form,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names or patterns such as 'mlp_*'; z.9.3 for one place alone."),
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Those alone that the model lacks, and why.")
    ] = False,
) -> None:
    """The named places of a model: axes, sizes, modules, what can be edited there, and why one is missing."""
    form.check()
    lm = which.load(quiet=form.quiet)
    table: Any = _chosen(lm, names or [])
    if missing:
        table = table[table["missing"] != ""]
    tell(form, "Sites", {"sites": Shown(table.reset_index(drop=True))})


def _chosen(lm: "LM", names: list[str]) -> "pd.DataFrame":
    """The rows of the table of sites that are asked for, one place alone with its own module."""
    from fnmatch import fnmatchcase

    import pandas as pd

    from ..models.sites import Site, parse

    table = lm.describe()
    parts = []
    for name in names:
        found: Any = table[[fnmatchcase(each, name) for each in table["site"]]]
        if found.empty:
            site = parse(name)  # raises for what is no site
            place = lm.place(site)
            found = table[table["site"] == getattr(site, "name", "")].assign(
                site=str(site), module=place.path
            )
            if isinstance(site, Site):
                found = found.assign(axes=site.axes, sizes=_sizes(lm, site), layers=1)
            if found.empty:
                found = pd.DataFrame(
                    [{"site": str(site), "module": place.path, "side": place.side, "missing": ""}]
                )
        parts.append(found)
    return pd.concat(parts, ignore_index=True).drop_duplicates("site") if parts else table


def _sizes(lm: "LM", site: Any) -> str:
    from ..models.sites import SQUARE

    if site.name in SQUARE:
        return site.axes
    return " ".join(["batch", "pos", *map(str, lm.shape(site))])


@command("hookkit doctor HuggingFaceTB/SmolLM2-135M --dtype bfloat16", panel=MODELS)
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face id, a folder or a .gguf file.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the model.")
    ] = None,
    device: Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto, to spread the model over what there is.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …")] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 …")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    layer: Annotated[list[int] | None, typer.Option(help="A block to try; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that was found, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Prove the laws on a model, and say what will not work and why. Exit status 1 where something does not."""
    from ..checks.doctor import doctor as examined

    more = {"device_map": device_map, "attn_implementation": attn_implementation}
    more |= {"trust_remote_code": trust_remote_code or None}
    lm = Which(model, revision, device, dtype).load(quiet=quiet, **more)
    found = examined(lm, layers=layer or None)
    if as_json:
        tell_text(found.to_json() + "\n")
    else:
        _print_checkup(found)
    raise typer.Exit(DONE if found.healthy else UNHEALTHY)


def _print_checkup(found: "Checkup") -> None:
    from .output import said, show

    width = max(map(len, found.facts))
    said("\n".join(f"{name:<{width}}  {value}" for name, value in found.facts.items()) + "\n")
    show(_readable(found))
    for title, notes in (("note", found.notes), ("problem", found.problems)):
        for words in notes:
            said(f"{title}: {printable(words)}", style="bold" if title == "problem" else "")
    if found.healthy:
        said("nothing was found that does not work")


def _readable(found: "Checkup") -> "pd.DataFrame":
    """The sites with words for what holds, and nothing where a site is missing."""
    import pandas as pd

    rows = []
    for row in records(found.sites):
        there = row["blocks"] != ""
        marks = {
            name: ("yes" if row[name] else "no") if there else "" for name in ("editable", "proved")
        }
        number = "" if row["difference"] is None else f"{row['difference']:.1e}"
        rows.append(
            {
                "site": row["site"],
                "blocks": row["blocks"],
                **marks,
                "difference": number,
                "why": row["why"],
            }
        )
    return pd.DataFrame(rows)


models = program()
app.add_typer(models, name="models", help="The models on this machine.", rich_help_panel="Models")

PANEL = "Commands"


@command("hookkit models list --json", panel=PANEL, within=models, name="list")
def list_models(form: Form) -> None:
    """The models that are kept here, with their revisions and sizes."""
    form.check()
    from ..models.cache import stored

    tell(form, "Models", {"models": Shown(stored())})


@command("hookkit models where", panel=PANEL, within=models)
def where(form: Form) -> None:
    """The folders in which models are kept, and what sets them."""
    form.check()
    from ..models.cache import places

    tell(form, "Where models are kept", {"where": Shown(places())})


@command("hookkit models fetch HuggingFaceTB/SmolLM2-135M", panel=PANEL, within=models)
def fetch(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face id; the default model if left out.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the model.")
    ] = None,
) -> None:
    """Bring a model onto this machine, without loading it; prints its folder."""
    from ..models.cache import fetch as fetched

    tell_text(f"{fetched(model, revision)}\n")


@command("hookkit models remove HuggingFaceTB/SmolLM2-135M --yes", panel=PANEL, within=models)
def remove(
    model: Annotated[str, typer.Argument(help="Its name, as `hookkit models list` has it.")],
    revision: Annotated[str | None, typer.Option(help="A commit; every one if left out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from this machine. Asks first."""
    from ..errors import ModelNotFound
    from ..models.cache import remove as removed
    from ..models.cache import stored

    if model not in set(stored()["model"]):
        removed(model, revision)  # raises
    if not yes:
        if not is_terminal(sys.stdin):
            raise ModelNotFound(f"{model!r} is not removed without a word: add --yes")
        if not typer.confirm(f"Delete {model} from this machine?", err=True):
            return
    tell_aside(f"removed {model}, {removed(model, revision):g} MB")


@command(
    "hookkit harvest texts.txt resid_post.6 z.9 --out folder --keep-as bfloat16",
    panel="Grids and corpora",
)
def harvest(
    texts: Annotated[str, typer.Argument(help="A file with a text a line: .txt, or .jsonl.")],
    sites: Annotated[
        list[str],
        typer.Argument(help="The sites, such as resid_post.6; resid_post means every layer."),
    ],
    out: Annotated[str, typer.Option(help="The folder; one that was begun is gone on with.")],
    which: Which,
    engine: Engine,
    keep_as: Annotated[
        str | None, typer.Option(help="The dtype of what is kept; the model's if left out.")
    ] = None,
    pos: Annotated[
        int | None, typer.Option(help="One position of each text, such as -1; all if left out.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="How many tokens of a text are read at most.")
    ] = None,
    long: Annotated[
        str, typer.Option(help="What becomes of a longer text: error, truncate or split.")
    ] = "error",
    unfit: Annotated[
        str, typer.Option(help="What becomes of a text that cannot be harvested: error or skip.")
    ] = "error",
    batch_tokens: Annotated[int, typer.Option(min=1, help="How many tokens run together.")] = 2048,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a shard; 128 MiB if left out.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No line that says how far it is.")
    ] = False,
) -> None:
    """Write what is at some sites, for every text of a file, to a folder; prints what it has, as JSON."""
    _check_files(texts, out)
    from ..data.harvest.writing import harvest as harvested

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
    tell_text(
        json.dumps(said | {"sites": [str(site) for site in found.sites]}, ensure_ascii=False) + "\n"
    )


def _check_files(texts: str, out: str) -> None:
    """Raise for a file of texts that is not there and a folder that is a file, before anything is loaded."""
    from ..errors import BadFile, BadPrompt

    if not os.path.isfile(texts):
        raise BadPrompt(
            f"{texts!r} is no file of texts: give the path of one with a text a line (.txt, .jsonl)"
        )
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadFile(
            f"--out {out!r} is a file: give a folder, or the name of one that is to be made"
        )
