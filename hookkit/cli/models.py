"""Commands about models and harvests.

hookkit sites     the sites of a model
hookkit doctor    what works with a model, what does not, and why
hookkit models    the models on this machine: list, fetch, remove
hookkit harvest   the activations of every text of a file, written to a folder
"""

import json
import os
import sys
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import hookkit as hk

from ..display import printable
from ..errors import BadFile, BadPrompt, ModelNotFound
from .app import DONE, FAILED, app, command, create_program, exit_cleanly
from .options import (
    Device,
    Dtype,
    EngineOptions,
    Json,
    ModelArgument,
    ModelOptions,
    Quiet,
    Revision,
    Texts,
)
from .output import (
    OutputOptions,
    TableView,
    is_terminal,
    print_line,
    print_message,
    print_table,
    print_text,
    rows_as_dicts,
)

if TYPE_CHECKING:
    import pandas as pd

PANEL = "Models"


@command("hookkit sites 'resid*' --model HuggingFaceTB/SmolLM2-135M", panel=PANEL)
def sites(
    model: ModelOptions,
    output: OutputOptions,
    names: Annotated[
        Texts, Argument(help="Names or patterns such as 'mlp_*'; z.9.3 for a single site.")
    ] = None,
    missing: Annotated[
        bool, Option("--missing", help="Only the sites that the model lacks, and why.")
    ] = False,
) -> None:
    """The sites of a model: axes, sizes, modules, what can be edited, why one is missing."""
    output.check()
    lm = model.load(quiet=output.quiet)
    table: Any = _describe_sites(lm, names or [])
    if missing:
        table = table[table["missing"] != ""]
    output.write("Sites", {"sites": TableView(table.reset_index(drop=True))})


def _describe_sites(lm: "hk.LM", names: list[str]) -> "pd.DataFrame":
    """Returns the rows of the table of sites that match the names; all rows without names."""
    import pandas as pd

    table: Any = lm.describe()
    if not names:
        return table
    parts = []
    for name in names:
        matches = table[[fnmatchcase(site, name) for site in table["site"]]]
        if matches.empty:
            matches = _describe_site(lm, table, name)
        parts.append(matches)
    return pd.concat(parts, ignore_index=True).drop_duplicates("site")


def _describe_site(lm: "hk.LM", table: Any, name: str) -> Any:
    """Returns a table of one row, for a single site such as z.9.3 or a module."""
    import pandas as pd

    from ..models.sites import QUERY_KEY_SITES, Site, parse_site

    site = parse_site(name)  # raises for a text that is not a site
    location = lm.location(site)
    row = table[table["site"] == getattr(site, "name", "")].assign(
        site=str(site), module=location.path
    )
    if isinstance(site, Site):
        sizes = site.axes
        if site.name not in QUERY_KEY_SITES:
            sizes = " ".join(["batch", "pos", *map(str, lm.shape(site))])
        row = row.assign(axes=site.axes, sizes=sizes, layers=1)
    if row.empty:
        columns = {"site": str(site), "module": location.path, "side": location.side}
        row = pd.DataFrame([columns | {"missing": ""}])
    return row


@command("hookkit doctor HuggingFaceTB/SmolLM2-135M --dtype bfloat16", panel=PANEL)
def doctor(
    model: ModelArgument = None,
    revision: Revision = None,
    device: Device = None,
    device_map: Annotated[
        str | None, Option(help="auto, to spread the model over the available devices.")
    ] = None,
    dtype: Dtype = None,
    attn_implementation: Annotated[
        str | None, Option(help="sdpa, eager, flash_attention_2 …")
    ] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    layer: Annotated[list[int] | None, Option(help="A layer to check; repeatable.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the laws on a model, and print what does not work and why.

    Ends with status 1 if there is a problem.
    """
    settings: dict[str, Any] = {
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code or None,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    lm = ModelOptions(model, revision, device, dtype).load(quiet=quiet, **settings)
    checkup = hk.doctor(lm, layers=layer or None)
    if as_json:
        print_text(checkup.to_json() + "\n")
    else:
        _print_checkup(checkup)
    raise typer.Exit(DONE if checkup.healthy else FAILED)


def _print_checkup(checkup: "hk.types.Checkup") -> None:
    width = max(map(len, checkup.facts))
    facts = [f"{name:<{width}}  {value}" for name, value in checkup.facts.items()]
    print_line("\n".join(facts) + "\n")
    print_table(_readable_sites(checkup))
    for note in checkup.notes:
        print_line(f"note: {printable(note)}")
    for problem in checkup.problems:
        print_line(f"problem: {printable(problem)}", bold=True)
    if checkup.healthy:
        print_line("nothing was found that does not work")


def _readable_sites(checkup: "hk.types.Checkup") -> "pd.DataFrame":
    """Returns the table of sites with yes and no, and with empty cells for missing sites."""
    import pandas as pd

    rows = []
    for site in rows_as_dicts(checkup.sites):
        row = {"site": site["site"], "blocks": site["blocks"], "editable": "", "proved": ""}
        if site["blocks"]:
            row["editable"] = "yes" if site["editable"] else "no"
            row["proved"] = "yes" if site["proved"] else "no"
        row["difference"] = ""
        if site["difference"] is not None:
            row["difference"] = f"{site['difference']:.1e}"
        row["why"] = site["why"]
        rows.append(row)
    return pd.DataFrame(rows)


models = create_program()
app.add_typer(models, name="models", help="The models on this machine.", rich_help_panel=PANEL)

COMMANDS_PANEL = "Commands"


@command("hookkit models list --json", panel=COMMANDS_PANEL, within=models, name="list")
def list_models(output: OutputOptions) -> None:
    """The models on this machine, with their revisions and sizes."""
    output.check()
    from ..models.cache import stored_models

    output.write("Models", {"models": TableView(stored_models())})


@command("hookkit models where", panel=COMMANDS_PANEL, within=models)
def where(output: OutputOptions) -> None:
    """The folders in which models are stored, and what sets them."""
    output.check()
    from ..models.cache import model_folders

    output.write("Where models are kept", {"where": TableView(model_folders())})


@command("hookkit models fetch HuggingFaceTB/SmolLM2-135M", panel=COMMANDS_PANEL, within=models)
def fetch(
    model: Annotated[
        str | None, Argument(help="A Hugging Face id; the default model if left out.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Download a model to this machine without loading it, and print its folder."""
    from ..models.cache import fetch_model

    print_text(f"{fetch_model(model, revision)}\n")


@command(
    "hookkit models remove HuggingFaceTB/SmolLM2-135M --yes", panel=COMMANDS_PANEL, within=models
)
def remove(
    model: Annotated[str, Argument(help="Its name, as in `hookkit models list`.")],
    revision: Annotated[str | None, Option(help="A commit; every one if left out.")] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from this machine. Asks first."""
    from ..models.cache import remove_model, stored_models

    if model not in set(stored_models()["model"]):
        remove_model(model, revision)  # raises
    if not yes:
        if not is_terminal(sys.stdin):
            raise ModelNotFound(f"{model!r} is not removed without confirmation: add --yes")
        if not typer.confirm(f"Delete {model} from this machine?", err=True):
            return
    print_message(f"removed {model}, {remove_model(model, revision):g} MB")


@command(
    "hookkit harvest texts.txt resid_post.6 z.9 --out folder --keep-as bfloat16",
    panel="Grids and corpora",
)
def harvest(
    texts: Annotated[str, Argument(help="A file with a text a line: .txt, or .jsonl.")],
    sites: Annotated[
        list[str], Argument(help="The sites, such as resid_post.6; resid_post means every layer.")
    ],
    out: Annotated[str, Option(help="The folder; an unfinished harvest is continued.")],
    model: ModelOptions,
    engine: EngineOptions,
    keep_as: Annotated[
        str | None, Option(help="The dtype of the stored values; the model's if left out.")
    ] = None,
    pos: Annotated[
        int | None, Option(help="One position of each text, such as -1; all if left out.")
    ] = None,
    context: Annotated[
        int | None, Option(help="How many tokens of a text are read at most.")
    ] = None,
    long: Annotated[
        str, Option(help="What to do with a longer text: error, truncate or split.")
    ] = "error",
    on_error: Annotated[
        str, Option(help="What to do with a text that cannot be harvested: error or skip.")
    ] = "error",
    batch_tokens: Annotated[int, Option(min=1, help="How many tokens run together.")] = 2048,
    shard_size: Annotated[
        int | None, Option(min=1, help="Rows of a shard; 128 MiB if left out.")
    ] = None,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Write the activations of every text of a file to a folder, and print a summary as JSON."""
    if not os.path.isfile(texts):
        raise BadPrompt(
            f"{texts!r} is not a file of texts: give a file with one text a line (.txt, .jsonl)"
        )
    if os.path.exists(out) and not os.path.isdir(out):
        raise BadFile(f"--out {out!r} is a file: give the name of a folder")
    with exit_cleanly(f"the results in {out} are kept, and the same command continues"):
        compute_engine = engine.create()
        results = hk.harvest(
            model.load(quiet=quiet),
            texts,
            sites,
            out,
            pos=pos,
            dtype=keep_as,
            context=context,
            long=long,  # pyright: ignore[reportArgumentType]
            on_error=on_error,  # pyright: ignore[reportArgumentType]
            batch_tokens=batch_tokens,
            shard_size=shard_size,
            progress=not quiet,
            engine=compute_engine,
        )
    summary = {
        "folder": out,
        "rows": len(results),
        "texts": results.texts,
        "left_out": results.left_out,
        "sites": [str(site) for site in results.sites],
    }
    print_text(json.dumps(summary, ensure_ascii=False) + "\n")
