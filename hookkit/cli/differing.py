"""hookkit diff: two models on the same prompts, and what differs."""

import sys
from typing import Annotated, Any

import typer

from .base import app, loaded, records, refusals_said


@app.command(epilog='Example: hookkit diff gpt2 ./my-gpt2 "I like oat milk in my" --out folder')
def diff(
    before: Annotated[
        str, typer.Argument(help="A Hugging Face id, a folder or a .gguf file; default for the default.")
    ],
    after: Annotated[str, typer.Argument(help="The model that is compared with it, of the same vocabulary.")],
    prompts: Annotated[list[str], typer.Argument(help="The prompts; - reads them from standard input, a line each.")],
    out: Annotated[str | None, typer.Option(help="A folder for the page and all tables.")] = None,
    watch: Annotated[list[str] | None, typer.Option(help="A token to watch, such as ' coffee'; repeatable.")] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="A site such as resid_post; repeatable. All if left out.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="The relative difference beyond which they part.")] = 1e-4,
    dtype: Annotated[str | None, typer.Option(help="Of the first model: float32, bfloat16 …")] = None,
    dtype_after: Annotated[str | None, typer.Option(help="Of the second; that of the first if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the first model: a branch, tag or commit.")] = None,
    revision_after: Annotated[str | None, typer.Option(help="Of the second.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All tables, as JSON.")] = False,
) -> None:
    """Compare two models on the same prompts: KL after each token, and the site where they part first."""
    from ..diffing import diff as compared

    with refusals_said():
        given: dict[str, Any] = {"device": device}
        first = loaded(given | {"model": _named(before), "dtype": dtype, "revision": revision})
        later = {"dtype": dtype_after or dtype, "revision": revision_after}
        second = loaded(given | {"model": _named(after), **later})
        texts = [line.rstrip("\n") for line in sys.stdin] if prompts == ["-"] else prompts
        found = compared(first, second, texts, sites=site or None, watch=watch or (), tolerance=tolerance)
        if out is not None:
            typer.echo(f"hookkit: {found.write(out)}", err=True)
    if as_json:
        import json

        names = ("prompts", "tokens", "shifts", "sites", "parting", "left_out")
        typer.echo(json.dumps({name: records(getattr(found, name)) for name in names}, ensure_ascii=False))
    else:
        typer.echo(
            found.tokens[["row", "pos", "read", "kl", "top1_before", "top1_after"]].to_csv(index=False), nl=False
        )
        typer.echo(f"hookkit: {found!r}", err=True)


def _named(model: str) -> str | None:
    return None if model == "default" else model
