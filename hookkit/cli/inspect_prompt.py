"""Commands about what a model predicts for a prompt, and why.

hookkit scan       one page about one prompt
hookkit ranks      the most likely next tokens
hookkit lens       the prediction of each layer
hookkit direct     a token's logit as a sum over components
hookkit surprisal  the loss of each token of a text

At the end are the further commands that `scan` suggests for what its tables show.
"""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

from typer import Option

import hookkit as hk

from ..errors import NotOneToken
from .app import command
from .options import (
    Against,
    HookedModelOptions,
    ModelOptions,
    Pos,
    PromptOption,
    PromptOptions,
    Top,
    Watch,
    optional_token_id,
    parse_positions,
)
from .output import OutputOptions, TableView

PANEL = "Look"


@command(
    'hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel=PANEL
)
def scan(
    prompt: PromptOption,
    model: HookedModelOptions,
    output: OutputOptions,
    top: Top = 5,
    watch: Watch = None,
) -> None:
    """One page about one prompt: the next tokens, where they come from, and what to ask next.

    All is about the token after the prompt. JSON has every table; --out FOLDER is a page with
    figures and tables.
    """
    output.check(several=True)
    text = prompt.read()
    lm, edits, watched_ids = model.load_with_hooks(output, watch)
    prompt_scan = hk.scan(lm, text, *edits, top=top, watch=watched_ids)
    suggestions = "\n".join(_suggest_commands(prompt_scan, prompt, model))
    if output.format in ("html", "folder"):
        page = prompt_scan.page()
        output.write_page(replace(page, parts=(*page.parts, "# What to ask next", suggestions)))
        return
    parts: dict[str, TableView | str] = {"summary": TableView(prompt_scan.summary)}
    if not output.format:
        parts = {}  # the sections below have more than the summary
    for section in prompt_scan.sections(0):
        table = prompt_scan.tables[section.name]
        parts[section.name] = TableView(table, (), section.caption, section.table, section.figure)
    if prompt_scan.missing:
        reasons = map("{}: {}".format, prompt_scan.missing, prompt_scan.missing.values())
        parts["Not available here"] = "\n".join(reasons)
    parts["What to ask next"] = suggestions
    output.write(f"Scan: {prompt_scan.prompt(0)}"[:120], parts)


@command('hookkit ranks "I like oat milk in my" --watch " tea" --ban " coffee"', panel=PANEL)
def ranks(
    prompts: PromptOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    top: Top = 10,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """The most likely next tokens after each prompt, and the ranks of the watched tokens."""
    texts, positions = prompts.read(), parse_positions(pos)
    lm, edits, watched_ids = model.load_with_hooks(output, watch)
    logits = "last" if positions == -1 else "all"
    run = hk.forward(lm, texts, *edits, logits=logits)
    table = hk.ranks(run, pos=positions, top=top, watch=watched_ids)
    columns = ("row", "pos", "rank", "token", "prob", "logit")
    output.write("Ranks", {"ranks": TableView(table, columns)})


@command('hookkit lens "The Eiffel Tower is in the city of" --watch " Paris" --top 1', panel=PANEL)
def lens(
    prompts: PromptOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    site: Annotated[
        str, Option(help="The stream: resid_post, resid_mid …; or attn_out, mlp_out.")
    ] = "resid_post",
    top: Top = 3,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """The prediction of each layer (the logit lens): its state through the final norm and head."""
    texts, positions = prompts.read(), parse_positions(pos)
    lm, edits, watched_ids = model.load_with_hooks(output, watch)
    table = hk.logit_lens(lm, texts, *edits, sites=site, pos=positions, top=top, watch=watched_ids)
    columns = ("row", "pos", "site", "rank", "token", "prob", "entropy", "kl")
    figure = _if_one_prompt(texts, lambda: hk.figures.lens_map(table))
    output.write("Logit lens", {"lens": TableView(table, columns, figure=figure)})


def _if_one_prompt(texts: Sequence[Any], figure: Callable[[], Any]) -> Callable[[], Any] | None:
    """Returns the figure of a table about one prompt; a table about several prompts has none."""
    return figure if len(texts) == 1 else None


@dataclass(frozen=True)
class LogitOptions:
    """The options for the logit that is decomposed, and for its components."""

    token: Annotated[str | None, Option(help="The token; the most likely one if left out.")] = None
    against: Against = None
    heads: Annotated[
        bool, Option("--heads", help="Each head, instead of attention as a whole.")
    ] = False
    neurons: Annotated[
        bool, Option("--neurons", help="Each neuron, instead of MLPs as a whole.")
    ] = False


@command(
    'hookkit direct "When Mary and John went out, John thanked" --token " Mary" --against " John"',
    panel=PANEL,
)
def direct(
    prompt: PromptOption,
    model: HookedModelOptions,
    output: OutputOptions,
    logit: LogitOptions,
    top: Annotated[int, Option(min=1, help="How many components to show, the largest first.")] = 15,
    pos: Annotated[int, Option(help="The position: -1 the last token.")] = -1,
) -> None:
    """A token's logit as an exact sum over components. CSV and JSON have all of them."""
    from ..tables.show import largest_rows

    text = prompt.read()
    lm, edits, _ = model.load_with_hooks(output)
    token_id = optional_token_id(lm, logit.token)
    against_id = optional_token_id(lm, logit.against)
    run = hk.forward(lm, text, *edits)
    if token_id is None:
        token_id = int(hk.ranks(run, pos=pos, top=1)["token_id"].iloc[0])
    table = hk.direct_logits(
        run, token_id, against=against_id, pos=pos, heads=logit.heads, neurons=logit.neurons
    )
    subject = f"the logit of {table.attrs['token']}"
    if against_id is not None:
        subject += f" minus that of {table.attrs['against']}"
    caption = f"{subject}: {table['logit'].sum():.4g}, the sum of {len(table)} parts"
    output.note(caption)
    view = TableView(
        table,
        ("component", "logit"),
        caption,
        largest_rows(table, "logit", top),
        lambda: hk.figures.logit_bars(table, top=top),
    )
    output.write("Direct logits", {"direct": view})


@command('hookkit surprisal "We love deep learning" --top 3', panel=PANEL)
def surprisal(
    prompts: PromptOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    top: Annotated[
        int, Option(min=0, help="How many tokens that were expected instead to show.")
    ] = 3,
) -> None:
    """The loss of each token of a text in nats, its rank, and the tokens expected instead."""
    texts = prompts.read()
    lm, edits, _ = model.load_with_hooks(output)
    table = hk.surprisal(hk.forward(lm, texts, *edits), top=top)
    names = ("row", "pos", "role", "token", "loss", "rank", "prob", "mean_loss", "alternatives")
    columns = tuple(name for name in names if name in table)
    figure = _if_one_prompt(texts, lambda: hk.figures.surprisal_strip(table))
    output.write("Surprisal", {"surprisal": TableView(table, columns, figure=figure)})


# ---- what to ask next


def _suggest_commands(
    scan: "hk.types.Scan", prompt: PromptOption, model: ModelOptions
) -> list[str]:
    """Returns questions that the tables raise, each with the command that answers it."""
    first, second = (_option_text(scan.run.lm, token_id) for token_id in scan.pairs[0])
    first_text, second_text = scan.texts(0)
    suggestions = {
        f"Which heads say {first_text!r} rather than {second_text!r}?": [
            "direct", "--token", first, "--against", second, "--heads"
        ],
        "Does it come from what is attended to?": _knockout_command(scan),
        f"Is the strongest component needed for {first_text!r}?": _ablation_command(scan, first),
        f"When does it come to say {first_text!r}?": ["lens", "--watch", first, "--top", "1"],
        "What would it write, and why?": ["trace", "--watch", second, "--max-new-tokens", "12"],
        f"And without {first_text!r}?": ["compare", "--ban", first, "--max-new-tokens", "12"]
    }  # fmt: skip
    separator = ["--"] if prompt.prompt.startswith("-") else []
    lines = []
    for question, words in suggestions.items():
        if words:
            command_name, *arguments = words
            options = [*arguments, *prompt.chat_words(), *model.words()]
            line = [command_name, *separator, prompt.prompt, *options]
            lines += [question, _command_line(line)]
    if scan.missing:
        words = ["doctor", *model.words()]
        if model.model is not None:
            words.remove("--model")  # the model is an argument of doctor
        lines += ["Why is something not available?", _command_line(words)]
    return lines


def _command_line(words: list[str]) -> str:
    return f"    {shlex.join(['hookkit', *words])}"


def _option_text(lm: "hk.LM", token_id: int) -> str:
    """Returns a token as an option reads it: its text, or its id if the text is not this token."""
    from ..hooks.text import format_token

    text = lm.string(token_id)
    with suppress(NotOneToken):
        if lm.token(text) == token_id:
            return format_token(text)
    return format_token(token_id)


def _knockout_command(scan: "hk.types.Scan") -> list[str]:
    """Returns the command that cuts the strongest attention to a token between first and last."""
    if "attention" not in scan.tables:
        return []
    table: Any = scan.tables["attention"].iloc[1:-1]
    if table.empty:
        return []
    strongest = table.loc[table["strongest"].idxmax()]
    return ["shift", "--hook", f"knockout:{strongest['head']}@query=-1,key={strongest['pos']}"]


def _ablation_command(scan: "hk.types.Scan", token: str) -> list[str]:
    """Returns the command that ablates the attention or MLP which adds most to the logit."""
    if "direct" not in scan.tables:
        return []
    table: Any = scan.tables["direct"]
    table = table[table["kind"].isin(["attention", "mlp"])]
    if table.empty:
        return []
    component = str(table.loc[table["logit"].idxmax(), "component"])
    return ["shift", "--ablate", component, "--watch", token]
