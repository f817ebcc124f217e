"""hookkit doctor: what works on a model, and what will not and why."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import UNHEALTHY, app, loaded, records, refusals_said

if TYPE_CHECKING:
    from ..doctor import Checkup


@app.command(epilog="Example: hookkit doctor HuggingFaceTB/SmolLM2-135M --dtype bfloat16")
def doctor(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face id, a folder or a .gguf file.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is if left out.")] = None,
    device_map: Annotated[str | None, typer.Option(help="auto, to spread the model over what there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 …")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    layer: Annotated[list[int] | None, typer.Option(help="A block to try; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that was found, as JSON.")] = False,
) -> None:
    """Prove the laws on a model, and say what will not work and why. Exit status 1 where something does not."""
    from ..doctor import doctor as examined

    given: dict[str, Any] = {"model": model, "revision": revision, "device": device, "device_map": device_map}
    given |= {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code or None,
    }
    with refusals_said():
        found = examined(loaded(given), layers=layer or None)
    if as_json:
        typer.echo(found.to_json())
    else:
        _print_checkup(found)
    raise typer.Exit(0 if found.healthy else UNHEALTHY)


def _print_checkup(found: "Checkup") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    about = Table(box=None, show_header=False)
    for name, value in found.facts.items():
        about.add_row(name, str(value))
    table = Table(box=None, header_style="dim")
    for name, side in (("site", "left"), ("blocks", "right"), ("editable", "left"), ("proved", "left")):
        table.add_column(name, justify=side)  # pyright: ignore[reportArgumentType]
    table.add_column("difference", justify="right")
    table.add_column("why")
    for row in records(found.sites):
        there = row["blocks"] != ""
        marks = ["yes" if row[name] else "no" if there else "" for name in ("editable", "proved")]
        number = "" if row["difference"] is None else f"{row['difference']:.1e}"
        style = "dim" if not there else "" if row["proved"] else "bold red"
        table.add_row(row["site"], row["blocks"], *marks, number, row["why"], style=style)
    console.print(about)
    console.print(table)
    for title, said in (("note", found.notes), ("problem", found.problems)):
        for words in said:
            console.print(f"{title}: {words}", style="bold red" if title == "problem" else "")
    console.print("nothing was found that does not work" if found.healthy else "", style="green")
