"""hookkit trace: generate, and show of every token what the model wanted and what became of it."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import app, interrupts_said, loaded, records, refusals_said

if TYPE_CHECKING:
    from rich.console import Group

    from ..hooks import Hook
    from ..model import LM
    from ..streaming import Now

BAR = 30  # characters of a bar that stands for probability 1


@app.command(epilog='Example: hookkit trace "I like oat milk in my" --ban " coffee" --watch " tea" --max-new-tokens 12')
def trace(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from standard input.")],
    model: Annotated[str | None, typer.Option(help="A Hugging Face id, a folder or a .gguf file.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 …")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 20,
    sample: Annotated[bool, typer.Option(help="Draw, instead of the most likely token each time.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many candidates to show.")] = 5,
    watch: Annotated[list[str] | None, typer.Option(help="A token to show wherever it stands; repeatable.")] = None,
    force: Annotated[list[str] | None, typer.Option(help="TOKEN, or TOKEN@STEP; a phrase from that step on.")] = None,
    ban: Annotated[list[str] | None, typer.Option(help="A token, or a phrase, that is never to be said.")] = None,
    boost: Annotated[list[str] | None, typer.Option(help="TOKEN=AMOUNT in logits.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Any hook as JSON, as Hook.to_json() writes it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each step.")] = False,
) -> None:
    """Generate, and show of every token what the model wanted, what became of it, and why it was chosen."""
    with refusals_said(), interrupts_said("what stands above was recorded"):
        settings = _settings(max_new_tokens, sample, seed, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
        lm = loaded({"model": model, "revision": revision, "device": device, "dtype": dtype})
        hooks = [*_edits(lm, force or [], ban or [], boost or []), *map(_read, hook or [])]
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        _show(lm, text, hooks, settings, top, watch or [], as_json)


def _settings(max_new_tokens: int, sample: bool, seed: int | None, rules: dict[str, Any]) -> dict[str, Any]:
    """What generate is given."""
    from ..errors import BadHook

    given = {name: value for name, value in rules.items() if value is not None}
    if given and not sample:
        raise BadHook("--temperature, --top-k and --top-p are rules of drawing: add --sample")
    return {"max_new_tokens": max_new_tokens, "do_sample": sample, "seed": seed, **given}


def _edits(lm: "LM", force: list[str], ban: list[str], boost: list[str]) -> Iterator["Hook"]:
    from .. import hooks
    from ..errors import BadHook

    for words in force:
        text, _, step = words.rpartition("@")
        at = int(step) if text and step.isdecimal() else None
        yield hooks.force(_token_or_phrase(lm, words if at is None else text), step=at)
    if ban:
        yield hooks.ban(*(_token_or_phrase(lm, words) for words in ban))
    for words in boost:
        text, _, amount = words.rpartition("=")
        try:
            yield hooks.boost(text, by=float(amount))
        except ValueError:
            raise BadHook(f"--boost {words!r} is no amount for a token: write --boost ' tea=2.5'") from None


def _token_or_phrase(lm: "LM", words: str) -> Any:
    from ..hooks import phrase

    return words if lm.tokenizer is not None and len(lm.encode(words)) == 1 else phrase(words)


def _read(words: str) -> "Hook":
    from ..hooks import Hook

    return Hook.from_json(words)


def _show(lm: "LM", prompt: str, hooks: list["Hook"], settings: Any, top: int, watch: list[str], as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from ..streaming import stream
    from ..tracing import trace as record

    steps = stream(lm, prompt, *hooks, trace=record(top=top, watch=watch), **settings)
    console = Console()
    if as_json or not console.is_terminal:
        for now in steps:
            typer.echo(_as_json(now) if as_json else _as_line(now))
        return
    with Live(console=console, auto_refresh=False) as live:
        for now in steps:
            live.update(_as_panel(now), refresh=True)
            console.print(_line(now), highlight=False, markup=False)


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
    return Group(Panel(Text(now.text[0]), title="text", title_align="left"), table)
