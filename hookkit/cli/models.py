"""Commands about models, harvests and benchmarks.

hookkit sites       the sites of a model
hookkit doctor      what works with a model, what does not, and why
hookkit models      the models on this machine: list, fetch, remove
hookkit harvest     the activations of every text of a file, written to a folder
hookkit dictionary  a sparse autoencoder of a site, trained on texts
hookkit feature     a page about features of a dictionary, over the texts of a file
hookkit eval        the score of a model with hooks on tasks of lm-evaluation-harness
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
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
    HookedModelOptions,
    Json,
    ModelArgument,
    ModelOptions,
    Quiet,
    Revision,
    ServingOptions,
    Texts,
    check_result_folder,
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
DICTIONARY_SITE = "resid_post.12"  # that of the default model's dictionary


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
        is_match = [fnmatchcase(site, name) for site in table["site"]]
        parts.append(table[is_match] if any(is_match) else _describe_site(lm, table, name))
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
        axes = sizes = lm.layout.of_stack(site).axes(replace(site, stack=""))
        if site.name not in QUERY_KEY_SITES:
            sizes = " ".join(["batch", "pos", *map(str, lm.shape(site))])
        row = row.assign(axes=axes, sizes=sizes, layers=1)
    if row.empty:
        columns = {"site": str(site), "module": location.path, "side": location.side}
        row = pd.DataFrame([columns | {"missing": ""}])
    return row


@dataclass(frozen=True)
class CheckedModelOptions:
    """The options for the model that is checked."""

    model: ModelArgument = None
    revision: Revision = None
    device: Device = None
    device_map: Annotated[
        str | None, Option(help="auto, to spread the model over the available devices.")
    ] = None
    dtype: Dtype = None
    attn_implementation: Annotated[str | None, Option(help="sdpa, eager, flash_attention_2 …")] = (
        None
    )
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False

    def load(self, *, quiet: bool, **settings: Any) -> "hk.LM":
        """Loads the model; `settings` are further arguments of `hk.load`."""
        own_settings: dict[str, Any] = {
            "device_map": self.device_map,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
        settings |= {name: value for name, value in own_settings.items() if value}
        model = ModelOptions(self.model, self.revision, self.device, self.dtype)
        return model.load(quiet=quiet, **settings)


@command("hookkit doctor HuggingFaceTB/SmolLM2-135M --dtype bfloat16", panel=PANEL)
def doctor(
    model: CheckedModelOptions,
    serving: ServingOptions,
    layer: Annotated[list[int] | None, Option(help="A layer to check; repeatable.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the laws on a model, and print what does not work and why.

    With --engine vllm, compares what vLLM computes with transformers instead. Ends with status 1 if
    there is a problem.
    """
    lm = model.load(quiet=quiet, **serving.settings())
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

    answers = {True: "yes", False: "no"}
    rows = []
    for site in rows_as_dicts(checkup.sites):
        row = {"site": site["site"], "blocks": site["blocks"], "editable": "", "proved": ""}
        if site["blocks"]:
            row |= {name: answers[site[name]] for name in ("editable", "proved")}
        number = site["difference"]
        row["difference"] = "" if number is None else f"{number:.1e}"
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


@dataclass(frozen=True)
class HarvestOptions:
    """The options for what of a text is harvested, and how it is stored."""

    keep_as: Annotated[
        str | None, Option(help="The dtype of the stored values; the model's if left out.")
    ] = None
    pos: Annotated[
        int | None, Option(help="One position of each text, such as -1; all if left out.")
    ] = None
    context: Annotated[int | None, Option(help="How many tokens of a text are read at most.")] = (
        None
    )
    long: Annotated[
        str, Option(help="What to do with a longer text: error, truncate or split.")
    ] = "error"
    on_error: Annotated[
        str, Option(help="What to do with a text that cannot be harvested: error or skip.")
    ] = "error"
    batch_tokens: Annotated[int, Option(min=1, help="How many tokens run together.")] = 2048
    shard_size: Annotated[
        int | None, Option(min=1, help="Rows of a shard; 128 MiB if left out.")
    ] = None
    writers: Annotated[str, Option(help="With ray: who writes the shards, driver or actors.")] = (
        "driver"
    )

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `harvest`."""
        arguments = asdict(self)
        return {"dtype": arguments.pop("keep_as"), **arguments}


def _check_text_file(path: str) -> None:
    if not os.path.isfile(path):
        raise BadPrompt(
            f"{path!r} is not a file of texts: give a file with one text a line (.txt, .jsonl)"
        )


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
    options: HarvestOptions,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Write the activations of every text of a file to a folder, and print a summary as JSON."""
    _check_text_file(texts)
    check_result_folder("--out", Path(out))
    with exit_cleanly(f"the results in {out} are kept, and the same command continues"):
        arguments = {**options.arguments(), "engine": engine.create(), "progress": not quiet}
        results = hk.harvest(model.load(quiet=quiet), texts, sites, out, **arguments)
    summary = {
        "folder": out,
        "rows": len(results),
        "texts": results.texts,
        "left_out": results.left_out,
        "sites": list(map(str, results.sites)),
    }
    print_text(json.dumps(summary, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class TrainingOptions:
    """The options for the training of a dictionary."""

    features: Annotated[
        int | None,
        Option(min=2, help="How many features; four times the site's width if left out."),
    ] = None
    k: Annotated[int, Option(min=1, help="How many features are kept at a token.")] = 32
    architecture: Annotated[str, Option(help="topk or batchtopk.")] = "topk"
    epochs: Annotated[int, Option(min=1, help="How often the values are read.")] = 6
    seed: Annotated[int, Option(help="The seed of all draws.")] = 0


@command(
    "hookkit dictionary --texts texts.txt --site resid_post.6 --out folder",
    panel="Grids and corpora",
)
def dictionary(
    model: ModelOptions,
    options: TrainingOptions,
    site: Annotated[str, Option(help="The site, in one block.")] = DICTIONARY_SITE,
    texts: Annotated[
        str | None,
        Option(metavar="FILE", help="A text a line: .txt, .jsonl; labelled texts if left out."),
    ] = None,
    out: Annotated[
        Path | None, Option(help="The folder; the cache, for the default model's own dictionary.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a sparse autoencoder, and print its quality on held-out texts.

    Without options it makes the one that hk.load_dictionary() loads, in less than an hour.
    The same command continues after an interruption.
    """
    is_default = model.model is None and texts is None and site == DICTIONARY_SITE
    _check_dictionary_options(texts, out, is_default=is_default)
    from ..features.default_dictionary import make_dictionary, mixed_texts, shuffled_texts
    from ..features.dictionary_files import default_dictionary_folder
    from ..features.training import QUALITY

    folder = default_dictionary_folder() if out is None else out
    check_result_folder("--out", folder)

    def report(text: str) -> None:
        if not quiet:
            print_message(text)

    with exit_cleanly(f"what is in {folder} is kept, and the same command continues"):
        lm = model.load(quiet=quiet)
        all_texts = mixed_texts() if texts is None else shuffled_texts(texts)
        settings = {"report": report, "progress": False if quiet else None, **asdict(options)}
        make_dictionary(lm, all_texts, site, folder, **settings)
    report(f"the dictionary is in {folder}")
    import pandas as pd

    table = pd.read_csv(folder / QUALITY)
    if as_json:
        print_text(json.dumps(rows_as_dicts(table)) + "\n")
    else:
        print_table(table.round(4))


def _check_dictionary_options(texts: str | None, out: Path | None, *, is_default: bool) -> None:
    if out is None and not is_default:
        raise BadFile("with --model, --texts or --site, say the folder of the dictionary: --out")
    if out is not None:
        check_result_folder("--out", out)
    if texts is not None:
        _check_text_file(texts)


@command(
    "hookkit feature feat.resid_post.12.7 --texts texts.txt --dictionary folder --out page",
    panel="Grids and corpora",
)
def feature(
    sites: Annotated[
        list[str], Argument(help="Features, such as feat.resid_post.12.7; feat.resid_post.12: all.")
    ],
    texts: Annotated[str, Option(help="A file with a text a line, .txt or .jsonl.")],
    model: ModelOptions,
    output: OutputOptions,
    dictionary: Annotated[
        str | None,
        Option(help="A folder, or owner/name/folder; the default model's own if left out."),
    ] = None,
    top: Annotated[int, Option(min=1, help="How many texts and tokens of a feature.")] = 10,
    effects: Annotated[
        int, Option(min=0, help="For how many features to measure what clamping does.")
    ] = 10,
) -> None:
    """What features do: when they are active, what they promote, and what clamping them changes.

    JSON has every table; --out FOLDER is a page with figures and tables.
    """
    output.check(several=True)
    _check_text_file(texts)
    sources = [] if dictionary is None else [dictionary]
    lm = model.load(quiet=output.quiet).with_dictionaries(hk.load_dictionary(*sources))
    settings: dict[str, Any] = {"top": top, "effects": effects, "progress": not output.quiet}
    results = hk.feature(lm, texts, sites, **settings)
    if output.format in ("html", "folder"):
        output.write_page(results.page())
        return
    parts = {}
    for name, table in results.tables.items():
        parts[name] = TableView(table, (), name)
    if not output.format:
        parts = {"summary": TableView(results.summary)}
    output.write(f"Features of {results.site}", parts)


@command(
    "hookkit eval arc_easy --scale 'mlp_out.12*0.5' --limit 100",
    panel="Grids and corpora",
    name="eval",
)
def evaluate(
    tasks: Annotated[list[str], Argument(help="Names of tasks, such as arc_easy.")],
    model: HookedModelOptions,
    output: OutputOptions,
    limit: Annotated[
        int | None, Option(min=1, help="How many documents of each task; all if left out.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Option(min=0, help="How many examples; the task's number if left out.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="How many texts run together.")] = 8,
    include_path: Annotated[
        str | None, Option(metavar="FOLDER", help="A folder with more tasks, as YAML.")
    ] = None,
) -> None:
    """Score a model, with hooks, on tasks of lm-evaluation-harness. Needs hookkit[eval]."""
    lm, hooks, _ = model.load_with_hooks(output)
    settings: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot}
    settings |= {"batch_size": batch_size, "include_path": include_path}
    table = hk.stats.evaluate(lm, tasks, *hooks, **settings)
    output.write("Evaluation", {"scores": TableView(table)})
