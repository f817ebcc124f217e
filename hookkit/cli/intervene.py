"""Commands that change what a model computes and print the differences.

hookkit shift     which tokens rise and fall under hooks
hookkit sweep     ablations or patching over a grid of sites, as a table
hookkit patch     patching between two prompts, with the strongest effects for a reader
hookkit diff      the differences between two models on the same prompts
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Argument, Option

import hookkit as hk

from ..errors import BadFile, BadHook, Interrupted
from .app import INTERRUPTED, app, command, create_program
from .options import (
    Against,
    Device,
    EngineOptions,
    HookedModelOptions,
    ModelOptions,
    PromptOptions,
    Texts,
    Top,
    Watch,
    parse_token,
    read_prompt,
    token_ids,
)
from .output import (
    OutputOptions,
    TableView,
    as_csv,
    largest_rows,
    print_message,
    print_text,
    write_file,
)

if TYPE_CHECKING:
    import pandas as pd

SHIFT_COLUMNS = (
    "row", "rank_before", "rank_after", "rank_delta", "token", "prob_before", "prob_after",
    "logit_delta", "why"
)  # fmt: skip
SUMMARY_COLUMNS = (
    "row", "top1_before", "top1_after", "kl", "entropy_before", "entropy_after", "top_overlap"
)  # fmt: skip
EFFECT_COLUMNS = (
    "site", "layer", "head", "pos", "token", "logit_diff_before", "logit_diff",
    "logit_diff_effect"
)  # fmt: skip


@command(
    'hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3 --watch " tea" '
    "--out moved",
    panel="Change",
)
def shift(
    prompts: PromptOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    top: Top = 10,
    watch: Watch = None,
    movers: Annotated[
        int, Option(min=0, help="How many of the largest movers to show, each way.")
    ] = 3,
    random: Annotated[
        bool, Option("--random", help="On the page: a random edit of the same size.")
    ] = False,
    generate: Annotated[
        int, Option(min=0, help="On the page: so many tokens of text, with and without.")
    ] = 0,
    seed: Annotated[int, Option(help="The seed of the random draws.")] = 0,
) -> None:
    """The next token's ranking without and with hooks: top tokens, largest movers, watched tokens.

    CSV and JSON have these tables. --html, and --out FOLDER, are the whole page: layers, parts,
    controls.
    """
    texts, as_page = prompts.read(), output.format in ("html", "folder")
    if not as_page and (random or generate):
        raise BadHook(
            "--random and --generate are options of the page: add --html, or --out FOLDER"
        )
    purpose = "a shift compares a run without hooks with a run with them"
    lm, edits, watched_ids = model.load_with_hooks(output, watch, purpose=purpose)
    title = " + ".join(map(str, edits))
    if as_page:
        page = hk.shift_report(
            lm,
            texts,
            *edits,
            controls="random" if random else None,
            watch=watched_ids,
            top=top,
            generate=generate,
            seed=seed,
            title=f"What moved: {title}"[:120],
        )
        output.write_page(page)
        return
    before = hk.forward(lm, texts, logits="last")
    after = hk.forward(lm, texts, *edits, logits="last")
    shifts = hk.rank_shift(before, after, top=top, movers=movers, watch=watched_ids)
    summary = hk.shift_summary(before, after, top=top)
    parts = {
        "shifts": TableView(shifts, SHIFT_COLUMNS, title),
        "summary": TableView(summary, SUMMARY_COLUMNS, "how far all of it moved (nats)"),
    }
    output.write("Shift", parts, main="shifts")


GRIDS_PANEL = "Grids and corpora"
grids = create_program()
app.add_typer(
    grids,
    name="sweep",
    help="A grid of edits and the effect of each on a token: a table as CSV.",
    rich_help_panel=GRIDS_PANEL,
)

Clean: TypeAlias = Annotated[str, Argument(help="The prompt that is patched from.")]
Corrupted: TypeAlias = Annotated[
    str, Argument(help="The prompt that is patched, of as many tokens.")
]
Direction: TypeAlias = Annotated[
    str, Option(help="denoise, or noise: patch the clean prompt from the corrupted one.")
]


@dataclass(frozen=True)
class MetricOptions:
    """The options for the metric of a sweep."""

    token: Annotated[str, Option(help="The token that is measured, such as ' coffee'.")]
    against: Against = None

    def metric(self) -> "hk.metrics.Metric":
        """Returns the token's probability, or its logit minus that of the other token."""
        if self.against is None:
            return hk.metrics.prob(parse_token(self.token))
        return hk.metrics.logit_diff(parse_token(self.token), parse_token(self.against))


@dataclass(frozen=True)
class GridOptions:
    """The options for the cells of a sweep; all along each dimension that is left out."""

    layer: Annotated[list[int] | None, Option(help="A layer; repeatable. All if left out.")] = None
    head: Annotated[list[int] | None, Option(help="A head; repeatable. All if left out.")] = None
    pos: Annotated[list[int] | None, Option(help="A position of the prompt; repeatable.")] = None
    save: Annotated[
        Path | None, Option(help="A folder from which an interrupted sweep continues.")
    ] = None

    def arguments(self, output: OutputOptions) -> dict[str, Any]:
        """Returns the arguments of a sweep, or raises `BadFile` if --save names a file."""
        output.check()
        if self.save is not None and self.save.exists() and not self.save.is_dir():
            raise BadFile(f"--save {str(self.save)!r} is a file: give the name of a folder")
        return {
            "layers": self.layer or None,
            "heads": self.head or None,
            "pos": self.pos or None,
            "save": self.save,
            "progress": False if output.quiet else None,
        }


@command(
    'hookkit sweep ablations "I like oat milk in my" z --token " coffee"',
    panel=GRIDS_PANEL,
    within=grids,
)
def ablations(
    prompt: Annotated[str, Argument(help="The prompt.")],
    what: Annotated[str, Argument(help="A site such as z or mlp_out, or block.")],
    metric: MetricOptions,
    grid: GridOptions,
    model: ModelOptions,
    engine: EngineOptions,
    output: OutputOptions,
    to: Annotated[str, Option(help="The replacement: zero, mean or resample.")] = "zero",
    over: Annotated[Texts, Option(help="A prompt of the mean or the draw; repeatable.")] = None,
) -> None:
    """Each head, layer or block ablated by itself: what the token loses without it."""
    text = read_prompt(prompt)
    arguments = grid.arguments(output)
    arguments |= {"to": to, "over": over or None, "engine": engine.create()}
    lm = model.load(quiet=output.quiet)
    sweep = partial(hk.ablations, lm, [text], what, metric.metric(), **arguments)
    _run_sweep(sweep, partial(_write_sweep, output), grid.save)


@command(
    'hookkit sweep patching "Mary gave tea to" "John gave tea to" resid_pre --token " John" '
    '--against " Mary"',
    panel=GRIDS_PANEL,
    within=grids,
)
def patching(
    clean: Clean,
    corrupted: Corrupted,
    site: Annotated[
        list[str], Argument(help="A site such as resid_pre or z; several are compared.")
    ],
    metric: MetricOptions,
    grid: GridOptions,
    model: ModelOptions,
    engine: EngineOptions,
    output: OutputOptions,
    direction: Direction = "denoise",
) -> None:
    """Each site of a clean prompt patched into the corrupted one: how much of the token returns."""
    arguments = grid.arguments(output)
    arguments |= {"direction": direction, "engine": engine.create()}
    lm = model.load(quiet=output.quiet)
    sweep = partial(hk.patching, lm, [clean], [corrupted], site, metric.metric(), **arguments)
    _run_sweep(sweep, partial(_write_sweep, output), grid.save)


@command(
    'hookkit patch "Mary and John met; John thanked" "Mary and John met; Mary thanked"',
    panel=GRIDS_PANEL,
)
def patch(
    clean: Clean,
    corrupted: Corrupted,
    grid: GridOptions,
    model: ModelOptions,
    output: OutputOptions,
    site: Annotated[str, Option(help="resid_pre, attn_out, mlp_out, z …")] = "resid_pre",
    token: Annotated[
        str | None, Option(help="The token; the clean prompt's first if left out.")
    ] = None,
    against: Annotated[
        str | None, Option(help="Another token; the corrupted one's first if left out.")
    ] = None,
    direction: Direction = "denoise",
    top: Annotated[int, Option(min=1, help="How many cells to show, the strongest first.")] = 10,
    figure: Annotated[
        Path | None, Option(help="A file for the figure: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """The strongest effects of patching a clean prompt into a corrupted one. CSV and JSON have all.

    The effect is 0 if the patch changed nothing, and 1 if it restored the clean prompt's answer.
    One pair has no confidence interval, and the largest of many effects would be smaller on
    another pair: hk.stats.strongest selects on half of several pairs and measures on the other
    half.
    """
    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise BadFile(f"--figure {figure}: give a file that ends in .png, .svg or .pdf")
    arguments = {"direction": direction, **grid.arguments(output)}
    lm = model.load(quiet=output.quiet)
    right, wrong = _answers(lm, (clean, corrupted), (token, against))
    output.note(f"the logit of {lm.string(right)!r} minus that of {lm.string(wrong)!r}")
    tokens = None
    if lm.tokenizer is not None:
        tokens = [repr(lm.string(token_id)) for token_id in lm.tokenizer.encode(corrupted)]
    metric = hk.metrics.logit_diff(right, wrong)
    sweep = partial(hk.patching, lm, [clean], [corrupted], site, metric, **arguments)
    write = partial(_write_patching, output, tokens=tokens, top=top, figure=figure)
    _run_sweep(sweep, write, grid.save)


def _answers(
    lm: "hk.LM", prompts: tuple[str, str], tokens: tuple[str | None, str | None]
) -> tuple[int, int]:
    """Returns the two tokens whose logits are compared: the given ones, or the most likely ones."""
    named_ids = [None if token is None else lm.token(parse_token(token)) for token in tokens]
    answers: list[int] = []
    for prompt, token_id in zip(prompts, named_ids, strict=True):
        if token_id is None:
            table = hk.ranks(hk.forward(lm, prompt, logits="last"), top=1)
            token_id = int(table["token_id"].iloc[0])
        answers.append(token_id)
    first, second = answers
    if first == second:
        raise BadHook(
            f"both prompts are answered with {lm.string(first)!r}: "
            "give the tokens to measure, --token and --against"
        )
    return first, second


def _write_patching(
    output: OutputOptions,
    table: "pd.DataFrame",
    *,
    tokens: list[str] | None,
    top: int,
    figure: Path | None,
) -> None:
    """Writes the effects of patching; `tokens` label the positions."""
    labels = tokens if "pos" in table and "head" not in table else None
    if figure is not None:
        drawing, file_format = (
            hk.figures.heat_map(table, labels=labels),
            figure.suffix.removeprefix("."),
        )
        write_file(figure, lambda target: drawing.savefig(target, dpi=150, format=file_format))
        output.note(f"wrote {figure}")
    reader_table = largest_rows(table, "logit_diff_effect", top)
    if tokens is not None and "pos" in reader_table:
        reader_table["token"] = [tokens[int(pos)] for pos in reader_table["pos"]]
    view = TableView(
        table, EFFECT_COLUMNS, "", reader_table, lambda: hk.figures.heat_map(table, labels=labels)
    )
    output.write("Patching", {"patching": view})


def _write_sweep(output: OutputOptions, table: "pd.DataFrame") -> None:
    """Writes the table of a sweep, by default as CSV."""
    if output.format:
        output.write("Sweep", {"sweep": TableView(table)})
    else:
        print_text(as_csv(table))


def _run_sweep(
    sweep: "Callable[[], pd.DataFrame]", write: "Callable[[pd.DataFrame], None]", save: Path | None
) -> None:
    """Runs a sweep and writes its table; after Ctrl-C, the cells so far."""
    table = None
    with warnings.catch_warnings(), suppress(KeyboardInterrupt):  # before the first cell
        warnings.simplefilter("ignore", Interrupted)  # reported below
        table = sweep()
    if table is not None:
        write(table)
    if table is None or not table.attrs["complete"]:
        advice = "the same command continues the sweep"
        if save is None:
            advice = "with --save FOLDER the sweep can be continued"
        print_message(f"interrupted; {advice}")
        raise typer.Exit(INTERRUPTED)


@command('hookkit diff default ./tuned "I like oat milk in my" --out folder', panel="Change")
def diff(
    before: Annotated[
        str, Argument(metavar="MODEL_A", help="A Hugging Face id, a folder, a .gguf file; default.")
    ],
    after: Annotated[str, Argument(metavar="MODEL_B", help="One of the same vocabulary.")],
    prompts: PromptOptions,
    output: OutputOptions,
    watch: Watch = None,
    site: Annotated[Texts, Option(help="Such as resid_post; repeatable. All if left out.")] = None,
    tolerance: Annotated[
        float, Option(min=0, help="The relative difference beyond which they part.")
    ] = 1e-4,
    device: Device = None,
    dtype: Annotated[str | None, Option(help="Of the first model: float32, bfloat16 …")] = None,
    dtype_after: Annotated[
        str | None, Option(help="Of the second; that of the first if left out.")
    ] = None,
    revision: Annotated[
        str | None, Option(help="Of the first model: a branch, tag or commit.")
    ] = None,
    revision_after: Annotated[str | None, Option(help="Of the second.")] = None,
) -> None:
    """Compare two models on prompts: KL after each token, and the first site where they part."""
    texts, output_format = prompts.read(), output.format
    first = ModelOptions(_name_or_none(before), revision, device, dtype).load(quiet=output.quiet)
    second_model = ModelOptions(_name_or_none(after), revision_after, device, dtype_after or dtype)
    second = second_model.load(quiet=output.quiet)
    watched_ids = token_ids(first, watch)
    comparison = hk.model_diff(
        first, second, texts, sites=site or None, watch=watched_ids, tolerance=tolerance
    )
    output.note(repr(comparison))
    if output_format in ("html", "folder"):
        output.write_page(comparison.page())
        return
    columns = ("row", "pos", "read", "kl", "top1_before", "top1_after")
    parts = {"tokens": TableView(comparison.tokens, columns)}
    if output_format == "json":
        for name in ("prompts", "shifts", "sites", "parting", "left_out"):
            parts[name] = TableView(getattr(comparison, name))
    output.write("Two models", parts, main="tokens")


def _name_or_none(model: str) -> str | None:
    return None if model == "default" else model
