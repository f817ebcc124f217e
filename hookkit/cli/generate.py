"""hookkit generate, compare, steer: what a model writes, edited, beside its unedited twin, and along a direction.

hookkit trace: generate, and show of every token what the model wanted and what became of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import command
from .options import Edits, Generation, Texts, Top, Watch, Which, watched
from .output import Form, Shown, said, tell

if TYPE_CHECKING:
    from ..hooks.vector import Vector
    from ..models.lm import LM
import json
import sys
from typing import TYPE_CHECKING

from ..display import printable
from .app import endings_said, is_terminal
from .options import Prompt, one_prompt
from .output import records, tell_text

if TYPE_CHECKING:
    from rich.console import Group

    from ..hooks.base import Hook
    from ..models.lm import LM
    from ..tables.streaming import StreamStep


WRITE = "Write"


@command(
    'hookkit generate "I like oat milk in my" --ban " coffee" --max-new-tokens 12', panel=WRITE
)
def generate(
    texts: Texts,
    which: Which,
    edits: Edits,
    generation: Generation,
    form: Form,
    only_new: Annotated[
        bool, typer.Option("--only-new", help="Without the prompt before it.")
    ] = False,
) -> None:
    """Let the model go on from each prompt, with hooks. CSV and JSON have prompt and generated text apart."""
    prompts, settings, kind = texts.read(), generation.arguments(), form.kind
    edits.check()
    import pandas as pd

    from ..runs.generate import generate as generated

    lm = which.load(quiet=form.quiet)
    run = generated(lm, prompts, *edits.read(lm, form.note), logits=False, **settings)
    if not kind:
        for prompt, text in zip(prompts, run.generated, strict=True):
            said(text if only_new else prompt + text)
        return
    table = pd.DataFrame(
        {"row": range(len(prompts)), "prompt": prompts, "generated": run.generated}
    )
    tell(form, "Generated", {"generated": Shown(table)})


@command(
    'hookkit compare "I like oat milk in my" --ablate mlp_out.12 --max-new-tokens 8', panel=WRITE
)
def compare(
    texts: Texts,
    which: Which,
    edits: Edits,
    generation: Generation,
    form: Form,
    along: Annotated[
        str, typer.Option(help="Along whose text steps are compared: baseline or edited.")
    ] = "baseline",
    top: Top = 5,
    watch: Watch = None,
) -> None:
    """Generate with hooks and without them, with the same random numbers: where the texts part, and how far.

    CSV has the shift of each token at each step; JSON also the texts and the distances.
    """
    form.check()
    prompts, settings = texts.read(), generation.arguments()
    edits.check(needed="a comparison is of a text with hooks and one without")
    from ..tables.comparison import compare as compared

    lm = which.load(quiet=form.quiet)
    ids = watched(lm, watch)
    hooks = edits.read(lm, form.note)
    both = compared(lm, prompts, *hooks, along=along, top=top, watch=ids, **settings)  # pyright: ignore
    names = (
        "row",
        "step",
        "kl",
        "top1_before",
        "top1_after",
        "entropy_before",
        "entropy_after",
        "kept",
    )
    parts: dict[str, Shown | str] = {
        "texts": Shown(_quoted(both.texts), caption=" + ".join(map(str, hooks))),
        "summary": Shown(both.summary, names, f"at each step of the {along} text (nats)"),
        "shifts": Shown(both.shifts, caption="every token's shift"),
    }
    if not form.kind:
        del parts["shifts"]
    tell(
        form,
        "Comparison",
        parts if not form.kind else parts | {"texts": Shown(both.texts)},
        main="shifts",
    )


def _quoted(table: Any) -> Any:
    """The texts as literals, so that a space at an end is seen."""
    return table.assign(**{name: table[name].map(repr) for name in ("baseline", "edited")})


@dataclass(frozen=True)
class Direction:
    """Along which direction: of a file, or from one kind of texts to another."""

    vector: Annotated[
        Path | None, typer.Option(help="A file that Vector.save, or --save, wrote.")
    ] = None
    toward: Annotated[list[str] | None, typer.Option(help="A text that has it; repeatable.")] = None
    away: Annotated[
        list[str] | None, typer.Option(help="A text that has the opposite; repeatable.")
    ] = None
    site: Annotated[
        str | None, typer.Option(help="Where it is read and added; a middle layer if left out.")
    ] = None
    save: Annotated[
        Path | None, typer.Option(help="Where the vector is kept, as .safetensors.")
    ] = None

    def check(self) -> None:
        """Raise what can be said before a model is loaded."""
        from ..errors import BadFile, BadHook

        made = bool(self.toward or self.away)
        if made == (self.vector is not None) or (made and not (self.toward and self.away)):
            raise BadHook(
                "a direction is --vector FILE, or --toward TEXT and --away TEXT: give one of them"
            )
        if self.site is not None and not made:
            raise BadHook(
                "--site goes with --toward and --away: a file says itself where its vector stands"
            )
        if self.vector is not None and not self.vector.is_file():
            raise BadFile(
                f"{str(self.vector)!r} is no file of a vector that can be read: there is no such file"
            )

    def found(self, lm: "LM") -> "Vector":
        """The vector, read from its file or from the texts."""
        found = self._of_file(lm) if self.vector is not None else self._between(lm)
        if self.save is not None:
            self._keep(found)
        return found

    def _between(self, lm: "LM") -> "Vector":
        from ..steering.directions import mean_difference

        site = self.site or f"resid_post.{lm.n_layers // 2}"
        found = mean_difference(lm, self.toward or [], self.away or [], site)
        if len(found) > 1:
            from ..errors import BadHook

            raise BadHook(
                f"--site {site} is one place in every layer: name a layer, such as {found[0].site}"
            )
        return found[0]

    def _of_file(self, lm: "LM") -> "Vector":
        from ..errors import BadFile
        from ..hooks.vector import load_vector

        try:
            return load_vector(lm, str(self.vector))
        except BadFile as error:
            raise BadFile(
                f"{str(self.vector)!r} is no file of a vector that can be read: {error}"
            ) from error

    def _keep(self, vector: "Vector") -> None:
        from ..errors import BadFile

        try:
            vector.save(str(self.save))
        except BadFile:
            raise
        except OSError as error:
            raise BadFile(
                f"{str(self.save)!r} cannot be written: {error.strerror or error}"
            ) from error


@command(
    'hookkit steer "I think the film was" --toward "I love it" --away "I hate it" --site resid_post.16',
    panel=WRITE,
)
def steer(
    texts: Texts,
    which: Which,
    direction: Direction,
    generation: Generation,
    form: Form,
    dose: Annotated[
        list[float] | None,
        typer.Option(help="How much, as a part of the stream's own length; repeatable."),
    ] = None,
) -> None:
    """What the model writes with a direction added to its stream, at several doses; a negative one is the opposite."""
    form.check()
    direction.check()
    prompts, settings = texts.read(), generation.arguments()
    import pandas as pd

    from ..runs.generate import generate as generated

    lm = which.load(quiet=form.quiet)
    vector = direction.found(lm)
    form.note(str(vector))
    if direction.save is not None:
        form.note(f"wrote {direction.save}")
    found = []
    for each in dose or (-0.4, -0.2, 0.0, 0.2, 0.4):
        hooks = [vector.steer(dose=each)] if each else []
        run = generated(lm, prompts, *hooks, logits=False, **settings)
        found += [
            {"row": row, "dose": each, "generated": text} for row, text in enumerate(run.generated)
        ]
    table = pd.DataFrame(found).sort_values(["row", "dose"], ignore_index=True, kind="stable")
    shown = table if form.kind else table.assign(generated=table["generated"].map(repr))
    tell(form, "Steering", {"steering": Shown(shown)})


BAR = 30  # characters of a bar that stands for probability 1


@command(
    'hookkit trace "I like oat milk in my" --ban " coffee" --watch " tea" --max-new-tokens 12',
    panel="Write",
)
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


def _show(
    lm: "LM",
    prompt: str,
    hooks: list["Hook"],
    settings: Any,
    top: int,
    watch: list[int],
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.live import Live

    from ..runs.trace import trace as record
    from ..tables.streaming import stream

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


def _as_json(now: "StreamStep") -> str:
    shown = records(now.candidates.drop(columns=["row", "step", "pos"]))
    return json.dumps(
        {**records(now.decisions)[0], "text": now.text[0], "candidates": shown}, ensure_ascii=False
    )


def _line(now: "StreamStep") -> str:
    (decision,) = records(now.decisions)
    return f"{decision['step']:>4}  {decision['token']:<16} {decision['why']}"


def _as_line(now: "StreamStep") -> str:
    last = records(now.candidates.query("stage == 'processed'"))
    shown = ", ".join(f"{found['token']} {found['prob']:.3f}" for found in last)
    return f"{_line(now)}  [{shown}]"


def _as_panel(now: "StreamStep") -> "Group":
    """The text so far, and the last step's candidates as bars, the chosen one marked."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim")
    for name in ("", "token", "p model", "p now", ""):
        table.add_column(name, justify="right" if name.startswith("p") else "left")
    model = {
        found["token_id"]: found["prob"]
        for found in records(now.candidates.query("stage == 'model'"))
    }
    for found in records(now.candidates.query("stage == 'processed'")):
        drawn, was = found["drawn"], model.get(found["token_id"])
        bar = Text("█" * round(BAR * found["prob"]), style="green" if drawn else "blue")
        numbers = ("" if was is None else f"{was:.4f}", f"{found['prob']:.4f}")
        table.add_row(
            "→" if drawn else "", Text(found["token"]), *numbers, bar, style="bold" if drawn else ""
        )
    text = "\n".join(map(printable, now.text[0].split("\n")))
    return Group(Panel(Text(text), title="text", title_align="left"), table)
