"""hookkit sweep: a standard grid of edits, as a table."""

import warnings
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .base import INTERRUPTED, app, loaded, refusals_said
from .engine import Actors, Address, Cpus, Engine, Gpus, chosen

if TYPE_CHECKING:
    import pandas as pd

    from ..metrics import Metric

grids = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(grids, name="sweep", help="A grid of edits and what each does to a token: a table as CSV.")

Token: TypeAlias = Annotated[str, typer.Option(help="The token that is measured, such as ' coffee'.")]
Against: TypeAlias = Annotated[str | None, typer.Option(help="Another token: the difference of their logits.")]
Layer: TypeAlias = Annotated[list[int] | None, typer.Option(help="A layer; repeatable. All if left out.")]
Head: TypeAlias = Annotated[list[int] | None, typer.Option(help="A head; repeatable. All if left out.")]
Position: TypeAlias = Annotated[list[int] | None, typer.Option(help="A position of the prompt; repeatable.")]
Save: TypeAlias = Annotated[str | None, typer.Option(help="A folder in which it goes on if it is ended.")]
Model: TypeAlias = Annotated[str | None, typer.Option(help="A Hugging Face id, a folder or a .gguf file.")]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="A branch, tag or commit of the model.")]
Device: TypeAlias = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is if left out.")]
Dtype: TypeAlias = Annotated[str | None, typer.Option(help="float32, bfloat16 …")]


@grids.command(epilog='Example: hookkit sweep ablations "I like oat milk in my" z --token " coffee"')
def ablations(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    what: Annotated[str, typer.Argument(help="A site such as z or mlp_out, or block.")],
    token: Token,
    against: Against = None,
    to: Annotated[str, typer.Option(help="What is put in: zero, mean or resample.")] = "zero",
    over: Annotated[list[str] | None, typer.Option(help="A prompt of the mean or the draw; repeatable.")] = None,
    layer: Layer = None,
    head: Head = None,
    pos: Position = None,
    save: Save = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    actors: Actors = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    address: Address = None,
) -> None:
    """Each head, layer or block taken out by itself: what the token loses without it."""
    from ..sweeps import ablations as swept

    with refusals_said():
        given: dict[str, Any] = {"to": to, "over": over or None, **_places(layer, head, pos), "save": save}
        given["engine"] = chosen(engine, actors, cpus, gpus, address)
        lm = loaded({"model": model, "revision": revision, "device": device, "dtype": dtype})
        _say(lambda: swept(lm, [prompt], what, _metric(token, against), **given), save)


@grids.command(
    epilog='Example: hookkit sweep patching "Mary gave tea to" "John gave tea to" resid_pre --token " John" '
    '--against " Mary"'
)
def patching(
    clean: Annotated[str, typer.Argument(help="The prompt that is patched from.")],
    corrupted: Annotated[str, typer.Argument(help="The prompt that is patched, of as many tokens.")],
    site: Annotated[list[str], typer.Argument(help="A site such as resid_pre or z; several are compared.")],
    token: Token,
    against: Against = None,
    direction: Annotated[
        str, typer.Option(help="denoise, or noise: clean prompts with what is corrupted.")
    ] = "denoise",
    layer: Layer = None,
    head: Head = None,
    pos: Position = None,
    save: Save = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    actors: Actors = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    address: Address = None,
) -> None:
    """What each place of a clean prompt carries: put into the corrupted one, how much of the token comes back."""
    from ..sweeps import patching as swept

    with refusals_said():
        given: dict[str, Any] = {"direction": direction, **_places(layer, head, pos), "save": save}
        given["engine"] = chosen(engine, actors, cpus, gpus, address)
        lm = loaded({"model": model, "revision": revision, "device": device, "dtype": dtype})
        _say(lambda: swept(lm, [clean], [corrupted], site, _metric(token, against), **given), save)


def _places(layer: list[int] | None, head: list[int] | None, pos: list[int] | None) -> dict[str, Any]:
    """The dimensions of the grid; all of each that was left out."""
    return {"layers": layer or None, "heads": head or None, "pos": pos or None}


def _metric(token: str, against: str | None) -> "Metric":
    from ..metrics import logit_diff, prob

    return prob(token) if against is None else logit_diff(token, against)


def _say(sweep: Any, save: str | None) -> None:
    """Print a table as CSV, also one that Ctrl-C ended."""
    from ..errors import Interrupted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Interrupted)  # it is said below
        try:
            table: pd.DataFrame | None = sweep()
        except KeyboardInterrupt:  # before the first cell
            table = None
    if table is not None:
        typer.echo(table.to_csv(index=False), nl=False)
    if table is None or not table.attrs["complete"]:
        on = "with --save FOLDER it could go on" if save is None else "the same command goes on"
        typer.echo(f"hookkit: interrupted; {on}", err=True)
        raise typer.Exit(INTERRUPTED)
