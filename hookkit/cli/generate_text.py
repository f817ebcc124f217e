"""Commands that generate text.

hookkit generate  the text of a model under hooks
hookkit compare   generation with and without hooks, side by side
hookkit steer     generation along a direction, at several doses
hookkit trace     each generated token, with the model's candidates and the reason of the choice
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import hookkit as hk

from ..display import printable, quote_token
from ..errors import BadFile, BadHook
from .app import command, exit_cleanly
from .options import (
    GenerationOptions,
    HookedModelOptions,
    ModelOptions,
    PromptOption,
    PromptOptions,
    Quiet,
    ServingOptions,
    Texts,
    Top,
    Watch,
)
from .output import OutputOptions, TableView, is_terminal, print_line, print_text, rows_as_dicts

if TYPE_CHECKING:
    from rich.console import Group

    from ..tables.decoding import StreamStep

PANEL = "Write"
SUMMARY_COLUMNS = (
    "row", "step", "kl", "top1_before", "top1_after", "entropy_before", "entropy_after",
    "top_overlap",
)  # fmt: skip


@command(
    'hookkit generate "I like oat milk in my" --ban " coffee" --max-new-tokens 12', panel=PANEL
)
def generate(
    prompts: PromptOptions,
    model: HookedModelOptions,
    generation: GenerationOptions,
    serving: ServingOptions,
    output: OutputOptions,
    only_new: Annotated[
        bool, Option("--only-new", help="Print the generated text without the prompt.")
    ] = False,
) -> None:
    """Continue each prompt, with hooks. CSV and JSON have a column for each text."""
    texts, settings = prompts.read(), generation.arguments()
    lm, edits, _ = model.load_with_hooks(output, **serving.settings())
    import pandas as pd

    from ..models.tokens import prompt_text

    run = hk.generate(lm, texts, *edits, logits=False, **settings)
    if not output.format:
        for prompt, generated in zip(texts, run.generated, strict=True):
            is_text = isinstance(prompt, str) and not only_new
            print_line(f"{prompt}{generated}" if is_text else generated)
        return
    shown = [prompt_text(lm, row) for row in run.prompts]
    table = pd.DataFrame({"row": range(len(texts)), "prompt": shown, "generated": run.generated})
    output.write("Generated", {"generated": TableView(table)})


@command(
    'hookkit compare "I like oat milk in my" --ablate mlp_out.12 --max-new-tokens 8', panel=PANEL
)
def compare(
    prompts: PromptOptions,
    model: HookedModelOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    along: Annotated[
        str, Option(help="The text along which steps are compared: baseline or edited.")
    ] = "baseline",
    top: Top = 5,
    watch: Watch = None,
) -> None:
    """Generate with and without hooks, with the same random numbers: where and how the texts part.

    CSV has the shift of each token at each step; JSON also the texts and the distances.
    """
    texts, settings = prompts.read(), {**generation.arguments(), "along": along}
    purpose = "a comparison needs a text with hooks and a text without"
    lm, edits, watched_ids = model.load_with_hooks(output, watch, purpose=purpose)
    comparison = hk.compare_generations(lm, texts, *edits, top=top, watch=watched_ids, **settings)
    caption = f"at each step of the {along} text (nats)"
    summary = TableView(comparison.summary, SUMMARY_COLUMNS, caption)
    if output.format:
        parts = {
            "texts": TableView(comparison.texts),
            "summary": summary,
            "shifts": TableView(comparison.shifts, caption="every token's shift"),
        }
    else:
        parts = {
            "texts": TableView(comparison.texts, caption=" + ".join(map(str, edits))),
            "summary": summary,
        }
    output.write("Comparison", parts, main="shifts")


@dataclass(frozen=True)
class DirectionOptions:
    """The options for a direction: from a file, or the mean difference between texts."""

    vector: Annotated[Path | None, Option(help="A file that Vector.save, or --save, wrote.")] = None
    toward: Annotated[Texts, Option(help="A text that has it; repeatable.")] = None
    away: Annotated[Texts, Option(help="A text that has the opposite; repeatable.")] = None
    site: Annotated[
        str | None, Option(help="Where it is read and added; the middle layer if left out.")
    ] = None
    save: Annotated[
        Path | None, Option(help="A .safetensors file to which the vector is saved.")
    ] = None

    def check(self) -> None:
        """Raises the errors that can be found without a model."""
        sources = [self.vector is not None, bool(self.toward), bool(self.away)]
        if sources not in ([True, False, False], [False, True, True]):
            raise BadHook(
                "a direction is --vector FILE, or --toward TEXT and --away TEXT: give one of them"
            )
        if self.vector is None:
            return
        if self.site is not None:
            raise BadHook(
                "--site goes with --toward and --away: the file of a vector names its site"
            )
        if not self.vector.is_file():
            raise BadFile(f"{_unreadable(self.vector)}: there is no such file")

    def build(self, lm: "hk.LM") -> "hk.Vector":
        """Returns the vector of the file, or the mean difference between the texts."""
        if self.vector is not None:
            try:
                return hk.load_vector(lm, self.vector)
            except BadFile as error:
                raise BadFile(f"{_unreadable(self.vector)}: {error}") from error
        site = self.site or f"resid_post.{lm.n_layers // 2}"
        vectors = hk.mean_difference(lm, self.toward or [], self.away or [], site)
        if len(vectors) > 1:
            raise BadHook(
                f"--site {site} is a site in every layer: name a layer, such as {vectors[0].site}"
            )
        return vectors[0]


def _unreadable(path: Path) -> str:
    return f"{str(path)!r} cannot be read as the file of a vector"


DOSES = (-0.4, -0.2, 0.0, 0.2, 0.4)


@command(
    'hookkit steer "I think the film was" --toward "I love it" --away "I hate it" '
    "--site resid_post.16",
    panel=PANEL,
)
def steer(
    prompts: PromptOptions,
    model: ModelOptions,
    direction: DirectionOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    dose: Annotated[
        list[float] | None, Option(help="The dose, as a fraction of the stream's norm; repeatable.")
    ] = None,
) -> None:
    """Generate with a direction added to the stream, at several doses.

    A negative dose adds the opposite direction.
    """
    output.check()
    direction.check()
    texts, settings = prompts.read(), generation.arguments()
    lm = model.load(quiet=output.quiet)
    import pandas as pd

    vector = direction.build(lm)
    output.note(str(vector))
    if direction.save is not None:
        vector.save(direction.save)
        output.note(f"wrote {direction.save}")
    tables = []
    for amount in dose or DOSES:
        edits = [vector.steer(dose=amount)] if amount else []
        run = hk.generate(lm, texts, *edits, logits=False, **settings)
        columns = {"row": range(len(texts)), "dose": amount, "generated": run.generated}
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables).sort_values(["row", "dose"], ignore_index=True, kind="stable")
    output.write("Steering", {"steering": TableView(table)})


BAR_WIDTH = 30  # characters of the bar for probability 1


@command(
    'hookkit trace "I like oat milk in my" --ban " coffee" --watch " tea" --max-new-tokens 12',
    panel=PANEL,
)
def trace(
    prompt: PromptOption,
    model: HookedModelOptions,
    generation: GenerationOptions,
    top: Top = 5,
    watch: Watch = None,
    as_json: Annotated[bool, Option("--json", help="A line of JSON for each step.")] = False,
    quiet: Quiet = False,
) -> None:
    """Generate, and show for each token the model's candidates and why it was chosen."""
    with exit_cleanly("the steps above were recorded"):
        settings, text = generation.arguments(), prompt.read()
        output = OutputOptions(quiet=quiet)
        lm, edits, watched_ids = model.load_with_hooks(output, watch)
        recording = hk.trace(top=top, watch=watched_ids)
        steps = hk.stream(lm, text, *edits, trace=recording, **settings)
        if is_terminal(sys.stdout) and not as_json:
            _show_live(steps)
            return
        as_line = _step_as_json if as_json else _step_as_line
        for step in steps:
            print_text(f"{as_line(step)}\n")


def _show_live(steps: "Iterable[StreamStep]") -> None:
    """Shows the text and the last step's candidates while the model generates."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        for step in steps:
            live.update(_step_as_panel(step), refresh=True)
            console.print(_decision_line(step), highlight=False, markup=False, emoji=False)


def _candidates(step: "StreamStep", stage: str) -> list[dict[str, Any]]:
    """Returns the candidates of a step as the model gave them, or after the hooks and sampling."""
    return rows_as_dicts(step.candidates[step.candidates["stage"] == stage])


def _step_as_json(step: "StreamStep") -> str:
    (decision,) = rows_as_dicts(step.decisions)
    candidates = rows_as_dicts(step.candidates.drop(columns=["row", "step", "pos"]))
    contents = {**decision, "text": step.text[0], "candidates": candidates}
    return json.dumps(contents, ensure_ascii=False)


def _decision_line(step: "StreamStep") -> str:
    (decision,) = rows_as_dicts(step.decisions)
    return f"{decision['step']:>4}  {decision['token']!r:<16} {decision['why']}"


def _step_as_line(step: "StreamStep") -> str:
    candidates = _candidates(step, "processed")
    texts = [f"{candidate['token']!r} {candidate['prob']:.3f}" for candidate in candidates]
    return f"{_decision_line(step)}  [{', '.join(texts)}]"


def _step_as_panel(step: "StreamStep") -> "Group":
    """Returns the text so far, and the step's candidates as bars, with the drawn one marked."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim")
    for name in ("", "token", "p model", "p now", ""):
        table.add_column(name, justify="right" if name.startswith("p") else "left")
    probs = {row["token_id"]: f"{row['prob']:.4f}" for row in _candidates(step, "model")}
    for candidate in _candidates(step, "processed"):
        marker, bar_style, row_style = "", "blue", ""
        if candidate["drawn"]:
            marker, bar_style, row_style = "→", "green", "bold"
        prob = candidate["prob"]
        bar = Text("█" * round(BAR_WIDTH * prob), style=bar_style)
        model_prob = probs.get(candidate["token_id"], "")
        token = Text(quote_token(candidate["token"]))
        table.add_row(marker, token, model_prob, f"{prob:.4f}", bar, style=row_style)
    text = "\n".join(map(printable, step.text[0].split("\n")))
    return Group(Panel(Text(text), title="text", title_align="left"), table)
