"""hookkit diff: two models on the same prompts, and what differs."""

from typing import Annotated

import typer

from .base import command
from .options import Device, Texts, Watch, Which, watched
from .printing import Form, Shown, tell, tell_page


@command('hookkit diff default ./tuned "I like oat milk in my" --out folder', panel="Change")
def diff(
    before: Annotated[
        str, typer.Argument(metavar="MODEL_A", help="A Hugging Face id, a folder, a .gguf file; default.")
    ],
    after: Annotated[str, typer.Argument(metavar="MODEL_B", help="One of the same vocabulary.")],
    texts: Texts,
    form: Form,
    watch: Watch = None,
    site: Annotated[list[str] | None, typer.Option(help="Such as resid_post; repeatable. All if left out.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="The relative difference beyond which they part.")] = 1e-4,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of the first model: float32, bfloat16 …")] = None,
    dtype_after: Annotated[str | None, typer.Option(help="Of the second; that of the first if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the first model: a branch, tag or commit.")] = None,
    revision_after: Annotated[str | None, typer.Option(help="Of the second.")] = None,
) -> None:
    """Compare two models on the same prompts: KL after each token, and the site where they part first."""
    prompts, kind = texts.read(), form.kind
    from ..diffing import diff as compared

    first = Which(_named(before), revision, device, dtype).load(quiet=form.quiet)
    second = Which(_named(after), revision_after, device, dtype_after or dtype).load(quiet=form.quiet)
    found = compared(first, second, prompts, sites=site or None, watch=watched(first, watch) or (), tolerance=tolerance)
    form.note(repr(found))
    if kind in ("html", "folder"):
        tell_page(form, found.page())
        return
    columns = ("row", "pos", "read", "kl", "top1_before", "top1_after")
    names = ("prompts", "shifts", "sites", "parting", "left_out")
    rest = {name: Shown(getattr(found, name)) for name in names} if kind == "json" else {}
    tell(form, "Two models", {"tokens": Shown(found.tokens, columns), **rest}, main="tokens")


def _named(model: str) -> str | None:
    return None if model == "default" else model
