"""hookkit models: those on this machine; to fetch one, and to remove one."""

import sys
from typing import Annotated

import typer

from .base import app, command, is_terminal, program
from .printing import Form, Shown, tell, tell_aside, tell_text

models = program()
app.add_typer(models, name="models", help="The models on this machine.", rich_help_panel="Models")

PANEL = "Commands"


@command("hookkit models list --json", panel=PANEL, within=models, name="list")
def list_models(form: Form) -> None:
    """The models that are kept here, with their revisions and sizes."""
    form.check()
    from ..stored import stored

    tell(form, "Models", {"models": Shown(stored())})


@command("hookkit models where", panel=PANEL, within=models)
def where(form: Form) -> None:
    """The folders in which models are kept, and what sets them."""
    form.check()
    from ..stored import places

    tell(form, "Where models are kept", {"where": Shown(places())})


@command("hookkit models fetch HuggingFaceTB/SmolLM2-135M", panel=PANEL, within=models)
def fetch(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face id; the default model if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the model.")] = None,
) -> None:
    """Bring a model onto this machine, without loading it; prints its folder."""
    from ..stored import fetch as fetched

    tell_text(f"{fetched(model, revision)}\n")


@command("hookkit models remove HuggingFaceTB/SmolLM2-135M --yes", panel=PANEL, within=models)
def remove(
    model: Annotated[str, typer.Argument(help="Its name, as `hookkit models list` has it.")],
    revision: Annotated[str | None, typer.Option(help="A commit; every one if left out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from this machine. Asks first."""
    from ..errors import ModelNotFound
    from ..stored import remove as removed
    from ..stored import stored

    if model not in set(stored()["model"]):
        removed(model, revision)  # raises
    if not yes:
        if not is_terminal(sys.stdin):
            raise ModelNotFound(f"{model!r} is not removed without a word: add --yes")
        if not typer.confirm(f"Delete {model} from this machine?", err=True):
            return
    tell_aside(f"removed {model}, {removed(model, revision):g} MB")
