"""hookkit trace: generate, and show of every token what the model wanted and what became of it."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..displaying import printable
from .base import command, endings_said, is_terminal
from .options import Edits, Generation, Prompt, Top, Watch, Which, one_prompt, watched
from .printing import Form, records, tell_text

if TYPE_CHECKING:
    from rich.console import Group

    from ..hooks import Hook
    from ..model import LM
    from ..streaming import Now

BAR = 30  # characters of a bar that stands for probability 1


@command('hookkit trace "I like oat milk in my" --ban " coffee" --watch " tea" --max-new-tokens 12', panel="Write")
def trace(
    prompt: Prompt,
    which: Which,
    edits: Edits,
    generation: Generation,
    top: Top = 5,
    watch: Watch = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each step.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Generate, and show of every token what the model wanted, what became of it, and why it was chosen."""
    with endings_said("what stands above was recorded"):
        note = Form(quiet=quiet).note
        settings, text = generation.arguments(), one_prompt(prompt)
        edits.check()
        lm = which.load(quiet=quiet)
        _show(lm, text, edits.read(lm, note), settings, top, watched(lm, watch), as_json)


def _show(lm: "LM", prompt: str, hooks: list["Hook"], settings: Any, top: int, watch: list[int], as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from ..streaming import stream
    from ..tracing import trace as record

    steps = stream(lm, prompt, *hooks, trace=record(top=top, watch=watch), **settings)
    if as_json or not is_terminal(sys.stdout):
        for now in steps:
            tell_text(f"{_as_json(now) if as_json else _as_line(now)}\n")
        return
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        for now in steps:
            live.update(_as_panel(now), refresh=True)
            console.print(_line(now), highlight=False, markup=False, emoji=False)


def _as_json(now: "Now") -> str:
    shown = records(now.candidates.drop(columns=["row", "step", "pos"]))
    return json.dumps({**records(now.decisions)[0], "text": now.text[0], "candidates": shown}, ensure_ascii=False)


def _line(now: "Now") -> str:
    (decision,) = records(now.decisions)
    return f"{decision['step']:>4}  {decision['token']:<16} {decision['why']}"


def _as_line(now: "Now") -> str:
    last = records(now.candidates.query("stage == 'processed'"))
    shown = ", ".join(f"{found['token']} {found['prob']:.3f}" for found in last)
    return f"{_line(now)}  [{shown}]"


def _as_panel(now: "Now") -> "Group":
    """The text so far, and the last step's candidates as bars, the chosen one marked."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim")
    for name in ("", "token", "p model", "p now", ""):
        table.add_column(name, justify="right" if name.startswith("p") else "left")
    model = {found["token_id"]: found["prob"] for found in records(now.candidates.query("stage == 'model'"))}
    for found in records(now.candidates.query("stage == 'processed'")):
        drawn, was = found["drawn"], model.get(found["token_id"])
        bar = Text("█" * round(BAR * found["prob"]), style="green" if drawn else "blue")
        numbers = ("" if was is None else f"{was:.4f}", f"{found['prob']:.4f}")
        table.add_row("→" if drawn else "", Text(found["token"]), *numbers, bar, style="bold" if drawn else "")
    text = "\n".join(map(printable, now.text[0].split("\n")))
    return Group(Panel(Text(text), title="text", title_align="left"), table)
