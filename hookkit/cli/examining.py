"""hookkit sites and doctor: where a model can be looked into; what works on it, and what will not and why."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..displaying import printable
from .base import DONE, UNHEALTHY, command
from .options import Device, Which
from .printing import Form, Shown, records, tell, tell_text

if TYPE_CHECKING:
    import pandas as pd

    from ..checkups import Checkup
    from ..model import LM

MODELS = "Models"


@command("hookkit sites 'resid*' --model HuggingFaceTB/SmolLM2-135M", panel=MODELS)
def sites(
    which: Which,
    form: Form,
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or patterns such as 'mlp_*'; z.9.3 for one place alone.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Those alone that the model lacks, and why.")] = False,
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

    from ..sites import Site, parse

    table = lm.describe()
    parts = []
    for name in names:
        found: Any = table[[fnmatchcase(each, name) for each in table["site"]]]
        if found.empty:
            site = parse(name)  # raises for what is no site
            place = lm.place(site)
            found = table[table["site"] == getattr(site, "name", "")].assign(site=str(site), module=place.path)
            if isinstance(site, Site):
                found = found.assign(axes=site.axes, sizes=_sizes(lm, site), layers=1)
            if found.empty:
                found = pd.DataFrame([{"site": str(site), "module": place.path, "side": place.side, "missing": ""}])
        parts.append(found)
    return pd.concat(parts, ignore_index=True).drop_duplicates("site") if parts else table


def _sizes(lm: "LM", site: Any) -> str:
    from ..sites import SQUARE

    if site.name in SQUARE:
        return site.axes
    return " ".join(["batch", "pos", *map(str, lm.shape(site))])


@command("hookkit doctor HuggingFaceTB/SmolLM2-135M --dtype bfloat16", panel=MODELS)
def doctor(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face id, a folder or a .gguf file.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the model.")] = None,
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="auto, to spread the model over what there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 …")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    layer: Annotated[list[int] | None, typer.Option(help="A block to try; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that was found, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Prove the laws on a model, and say what will not work and why. Exit status 1 where something does not."""
    from ..checkups import doctor as examined

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
    from .printing import said, show

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
        marks = {name: ("yes" if row[name] else "no") if there else "" for name in ("editable", "proved")}
        number = "" if row["difference"] is None else f"{row['difference']:.1e}"
        rows.append({"site": row["site"], "blocks": row["blocks"], **marks, "difference": number, "why": row["why"]})
    return pd.DataFrame(rows)
