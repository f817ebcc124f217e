"""Commands that change what a model computes and print the differences.

hookkit shift     which tokens rise and fall under hooks, after prompts or over a corpus
hookkit sweep     ablations or patching over a grid of sites, as a table
hookkit patch     patching between two prompts, with the strongest effects for a reader
hookkit diff      the differences between two models on the same prompts
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Argument, Option

import hookkit as hk

from ..display import quote_token
from ..errors import BadFile, BadHook, BadPrompt, Interrupted
from ..files.atomic import format_csv
from .app import INTERRUPTED, app, command, create_program, exit_cleanly
from .options import (
    Against,
    ChatOptions,
    Device,
    EngineOptions,
    HookedModelOptions,
    ModelOptions,
    PromptOption,
    PromptOptions,
    Texts,
    Top,
    Watch,
    check_result_folder,
    optional_token_id,
    parse_token,
    token_ids,
)
from .output import (
    OutputOptions,
    TableView,
    print_message,
    print_text,
    write_file,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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


MEANS = ("logprob_delta", "rank_delta")
MOVERS = 3  # the largest movers that are shown, each way


@dataclass(frozen=True)
class ShiftedTokens:
    """The options for which tokens a shift shows."""

    top: Top = 10
    watch: Watch = None
    movers: Annotated[
        int, Option(min=0, help="How many of the largest movers to show, each way.")
    ] = MOVERS


@dataclass(frozen=True)
class ShiftPageOptions:
    """The options for the page of a shift."""

    controls: Annotated[
        int | None,
        Option(min=0, help="On the page: how often each edit's random control is drawn."),
    ] = None
    generate: Annotated[
        int, Option(min=0, help="On the page: so many tokens of text, with and without.")
    ] = 0
    seed: Annotated[int, Option(help="The seed of the random draws.")] = 0

    def check(self, output: OutputOptions) -> bool:
        """Returns whether a page was requested; if not, its options raise `BadHook`."""
        is_page = output.format in ("html", "folder")
        if not is_page and (self.controls is not None or self.generate):
            raise BadHook(
                "--controls and --generate are options of the page: add --html, or --out FOLDER"
            )
        return is_page

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `shift_report`."""
        return {"controls": self.controls, "generate": self.generate, "seed": self.seed}

    def corpus_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `token_shifts`."""
        return {"seed": self.seed}


@dataclass(frozen=True)
class CorpusOptions:
    """The options for a shift over a corpus. All but `corpus` go with it only."""

    corpus: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="A file with a text a line (.txt, .jsonl), in place of prompts."
        ),
    ] = None
    against: Annotated[
        str | None,
        Option(metavar="MODEL", help="With --corpus: a model to compare with, in place of hooks."),
    ] = None
    context: Annotated[
        int | None, Option(help="With --corpus: how many tokens of a text are read at most.")
    ] = None
    long: Annotated[
        str | None, Option(help="With --corpus, for a longer text: error, truncate or split.")
    ] = None
    on_error: Annotated[
        str | None, Option(help="With --corpus, for a text that cannot be read: error or skip.")
    ] = None
    batch_tokens: Annotated[
        int | None, Option(min=1, help="With --corpus: how many tokens run together.")
    ] = None
    every: Annotated[
        int | None, Option(min=1, help="With --corpus: one position in so many has ranks.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `token_shifts` that are set."""
        arguments = {}
        for name in ("context", "long", "on_error", "batch_tokens", "every"):
            value = getattr(self, name)
            if value is not None:
                arguments[name] = value
        return arguments

    def check(self, other_options: Mapping[str, object]) -> bool:
        """Returns whether there is a corpus. Raises for options that would have no effect.

        `other_options` are those that a corpus has no use for, by their names.
        """
        if self.corpus is None:
            names = list(self.arguments())
            if self.against is not None:
                names.insert(0, "against")
            if names:
                option = names[0].replace("_", "-")
                raise BadHook(f"--{option} goes with a corpus: add --corpus FILE")
            return False
        for name, value in other_options.items():
            if value:
                raise BadHook(f"{name} cannot be given with --corpus: leave one of them out")
        if not self.corpus.is_file():
            raise BadPrompt(
                f"{str(self.corpus)!r} is not a file of texts: give a file with one text a line "
                "(.txt, .jsonl)"
            )
        return True


@command(
    'hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3 --watch " tea" '
    "--out moved",
    panel="Change",
)
def shift(
    *,
    prompts: PromptOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    tokens: ShiftedTokens,
    page: ShiftPageOptions,
    corpus: CorpusOptions,
    engine: EngineOptions,
) -> None:
    """The next token's ranking without and with hooks: top tokens, largest movers, watched tokens.

    CSV and JSON have these tables. --html, and --out FOLDER, are the whole page: layers, parts,
    controls. With --corpus FILE: which tokens move over all texts of a file, under hooks or in
    another model (--against); --out FOLDER keeps the state, and the same command continues.
    """
    top, prompts_given = tokens.top, prompts.prompt or prompts.prompts
    unused = {"a prompt": prompts_given, "--watch": tokens.watch, "--generate": page.generate}
    unused |= {"--chat": prompts.chat, "--system": prompts.system, "--image": prompts.image}
    unused["a control"] = page.arguments()["controls"]
    if corpus.check({**unused, "--movers": tokens.movers != MOVERS}):
        _shift_over_corpus(corpus, model, output, engine, {"top": top, **page.corpus_arguments()})
        return
    if engine.create() is not None:
        raise BadHook("--engine goes with a corpus: add --corpus FILE")
    texts, is_page = prompts.read(), page.check(output)
    purpose = "a shift compares a run without hooks with a run with them"
    lm, edits, watched_ids = model.load_with_hooks(output, tokens.watch, purpose=purpose)
    title = " + ".join(map(str, edits))
    if is_page:
        settings = {"watch": watched_ids, "top": top, **page.arguments()}
        settings["title"] = f"What moved: {title}"[:120]
        output.write_page(hk.shift_report(lm, texts, *edits, **settings))
        return
    before = hk.forward(lm, texts, logits="last")
    after = hk.forward(lm, texts, *edits, logits="last")
    shifts = hk.rank_shift(before, after, top=top, movers=tokens.movers, watch=watched_ids)
    summary = hk.stats.shift_summary(before, after, top=top)
    parts = {
        "shifts": TableView(shifts, SHIFT_COLUMNS, title),
        "summary": TableView(summary, SUMMARY_COLUMNS, "how far all of it moved (nats)"),
    }
    output.write("Shift", parts, main="shifts")


def _shift_over_corpus(
    corpus: CorpusOptions,
    model: HookedModelOptions,
    output: OutputOptions,
    engine: EngineOptions,
    settings: dict[str, Any],
) -> None:
    """Runs `token_shifts` over the file, and writes its tables."""
    output.check(several=output.format in ("md", "tex"))
    settings |= {**corpus.arguments(), "engine": engine.create(), "progress": not output.quiet}
    if output.format == "folder":
        assert output.out is not None
        check_result_folder("--out", output.out)
        settings["folder"] = output.out
    lm, change = _load_model_and_change(corpus, model, output)
    assert corpus.corpus is not None
    kept_state = f"the state in {output.out} is kept, and the same command continues"
    with exit_cleanly(kept_state if output.format == "folder" else ""):
        shifts = hk.token_shifts(lm, corpus.corpus, change, **settings)
    output.note(repr(shifts))
    if output.format in ("html", "folder"):
        output.write_page(shifts.page())
        return
    rose = shifts.table.head(settings["top"])
    fell = shifts.furthest("demoted").head(settings["top"])
    columns = ("token", "promoted", "share_promoted", "control_share_promoted", *MEANS)
    parts = {"token_shifts": TableView(shifts.table, columns, "the tokens that rose", rose)}
    if output.format == "json":
        parts["examples"] = TableView(shifts.examples)
        parts["summary"] = TableView(shifts.summary)
    elif output.format == "":
        columns = ("token", "demoted", "share_demoted", "control_share_demoted", *MEANS)
        parts["demoted"] = TableView(fell, columns, "the tokens that fell")
    output.write("Token shifts", parts, main="token_shifts")


def _load_model_and_change(
    corpus: CorpusOptions, model: HookedModelOptions, output: OutputOptions
) -> "tuple[hk.LM, list[hk.types.Hook] | hk.LM]":
    """Returns the model, and what is compared with it: the hooks, or the other model."""
    if corpus.against is None:
        purpose = "a corpus is read without hooks and with them, or by another model (--against)"
        lm, hooks, _ = model.load_with_hooks(output, purpose=purpose)
        return lm, hooks
    model.refuse_hooks("--against compares two models")
    lm = model.load(quiet=output.quiet)
    other = ModelOptions(corpus.against, None, model.device, model.dtype)
    return lm, other.load(quiet=output.quiet)


GRIDS_PANEL = "Grids and corpora"
grids = create_program()
app.add_typer(
    grids,
    name="sweep",
    help="A grid of edits and the effect of each on a token: a table as CSV.",
    rich_help_panel=GRIDS_PANEL,
)

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
class PromptPair(ChatOptions):
    """The two prompts of patching."""

    clean: Annotated[str, Argument(help="The prompt that is patched from.")]
    corrupted: Annotated[str, Argument(help="The prompt that is patched, of as many tokens.")]

    def read(self) -> list[Any]:
        """Returns the clean prompt and the corrupted one."""
        return [self.as_prompt(self.clean), self.as_prompt(self.corrupted)]


@dataclass(frozen=True)
class ReplacementOptions:
    """The options for what an ablation puts in place of a value."""

    to: Annotated[str, Option(help="The replacement: zero, mean or resample.")] = "zero"
    over: Annotated[Texts, Option(help="A prompt of the mean or the draw; repeatable.")] = None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `ablations`."""
        return {"to": self.to, "over": self.over or None}


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
        if self.save is not None:
            check_result_folder("--save", self.save)
        selections = {"layers": self.layer, "heads": self.head, "pos": self.pos}
        arguments: dict[str, Any] = {name: value or None for name, value in selections.items()}
        return arguments | {"save": self.save, "progress": False if output.quiet else None}


@command(
    'hookkit sweep ablations "I like oat milk in my" z --token " coffee"',
    panel=GRIDS_PANEL,
    within=grids,
)
def ablations(
    prompt: PromptOption,
    what: Annotated[str, Argument(help="A site such as z or mlp_out, or block.")],
    metric: MetricOptions,
    grid: GridOptions,
    model: ModelOptions,
    engine: EngineOptions,
    output: OutputOptions,
    replacement: ReplacementOptions,
) -> None:
    """Each head, layer or block ablated by itself: what the token loses without it."""
    text = prompt.read()
    arguments = {**grid.arguments(output), **replacement.arguments(), "engine": engine.create()}
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
    pair: PromptPair,
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
    arguments = {**grid.arguments(output), "direction": direction, "engine": engine.create()}
    clean, corrupted = pair.read()
    lm = model.load(quiet=output.quiet)
    sweep = partial(hk.patching, lm, [clean], [corrupted], site, metric.metric(), **arguments)
    _run_sweep(sweep, partial(_write_sweep, output), grid.save)


@dataclass(frozen=True)
class AnswerOptions:
    """The options for the two tokens whose logits are compared."""

    token: Annotated[
        str | None, Option(help="The token; the clean prompt's first if left out.")
    ] = None
    against: Annotated[
        str | None, Option(help="Another token; the corrupted one's first if left out.")
    ] = None

    def token_ids(self, lm: "hk.LM", pair: PromptPair) -> tuple[int, int]:
        """Returns the ids of the tokens, by default the most likely ones after the prompts."""
        named_ids = [optional_token_id(lm, text) for text in (self.token, self.against)]
        first, second = map(partial(_answer, lm), pair.read(), named_ids)
        if first == second:
            raise BadHook(
                f"both prompts are answered with {lm.string(first)!r}: "
                "give the tokens to measure, --token and --against"
            )
        return first, second


def _answer(lm: "hk.LM", prompt: Any, token_id: int | None) -> int:
    """Returns the token, or the most likely one after the prompt if it is None."""
    if token_id is not None:
        return token_id
    table = hk.ranks(hk.forward(lm, prompt, logits="last"), top=1)
    return int(table["token_id"].iloc[0])


@dataclass(frozen=True)
class PatchingOutput:
    """The options for what is shown of patching."""

    top: Annotated[int, Option(min=1, help="How many cells to show, the strongest first.")] = 10
    figure: Annotated[Path | None, Option(help="A file for the figure: .png, .svg or .pdf.")] = None

    def check(self) -> None:
        """Raises `BadFile` for a figure in another format."""
        if self.figure is not None and self.figure.suffix not in (".png", ".svg", ".pdf"):
            raise BadFile(f"--figure {self.figure}: give a file that ends in .png, .svg or .pdf")

    def write(self, output: OutputOptions, tokens: list[str], table: "pd.DataFrame") -> None:
        """Writes the effects of patching, and their figure. `tokens` label the positions."""
        labels = tokens if "pos" in table and "head" not in table else []

        def draw() -> "Figure":
            return hk.figures.heat_map(table, labels=list(map(quote_token, labels)) or None)

        if self.figure is not None:
            settings = {"dpi": 150, "format": self.figure.suffix.removeprefix(".")}
            drawing = draw()
            write_file(self.figure, lambda target: drawing.savefig(target, **settings))
            output.note(f"wrote {self.figure}")
        from ..tables.show import largest_rows

        reader_table = largest_rows(table, "logit_diff_effect", self.top)
        if tokens and "pos" in reader_table:
            reader_table["token"] = [tokens[int(pos)] for pos in reader_table["pos"]]
        view = TableView(table, EFFECT_COLUMNS, "", reader_table, draw)
        output.write("Patching", {"patching": view})


@command(
    'hookkit patch "Mary and John met; John thanked" "Mary and John met; Mary thanked"',
    panel=GRIDS_PANEL,
)
def patch(
    *,
    pair: PromptPair,
    grid: GridOptions,
    model: ModelOptions,
    output: OutputOptions,
    site: Annotated[str, Option(help="resid_pre, attn_out, mlp_out, z …")] = "resid_pre",
    answers: AnswerOptions,
    direction: Direction = "denoise",
    shown: PatchingOutput,
) -> None:
    """The strongest effects of patching a clean prompt into a corrupted one. CSV and JSON have all.

    The effect is 0 if the patch changed nothing, and 1 if it restored the clean prompt's answer.
    One pair has no confidence interval, and the largest of many effects would be smaller on
    another pair: hk.stats.strongest selects on half of several pairs and measures on the other
    half.
    """
    shown.check()
    arguments = {"direction": direction, **grid.arguments(output)}
    clean, corrupted = pair.read()
    lm = model.load(quiet=output.quiet)
    right, wrong = answers.token_ids(lm, pair)
    output.note(f"the logit of {lm.string(right)!r} minus that of {lm.string(wrong)!r}")
    tokens = []
    if lm.tokenizer is not None:
        from ..models.prompts import tokenize

        tokens = list(map(lm.string, tokenize(lm, corrupted)))
    metric = hk.metrics.logit_diff(right, wrong)
    sweep = partial(hk.patching, lm, [clean], [corrupted], site, metric, **arguments)
    _run_sweep(sweep, partial(shown.write, output, tokens), grid.save)


def _write_sweep(output: OutputOptions, table: "pd.DataFrame") -> None:
    """Writes the table of a sweep, by default as CSV."""
    if output.format:
        output.write("Sweep", {"sweep": TableView(table)})
    else:
        print_text(format_csv(table))


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


@dataclass(frozen=True)
class TwoModelsOptions:
    """The options for how the two models of a comparison are loaded."""

    device: Device = None
    dtype: Annotated[str | None, Option(help="Of the first model: float32, bfloat16 …")] = None
    dtype_after: Annotated[
        str | None, Option(help="Of the second; that of the first if left out.")
    ] = None
    revision: Annotated[str | None, Option(help="Of the first model: a branch, tag or commit.")] = (
        None
    )
    revision_after: Annotated[str | None, Option(help="Of the second.")] = None

    def load(self, before: str, after: str, *, quiet: bool) -> "tuple[hk.LM, hk.LM]":
        """Loads the two models; the name "default" is that of the default model."""
        dtypes = self.dtype, self.dtype_after or self.dtype
        revisions = self.revision, self.revision_after
        names = [None if name == "default" else name for name in (before, after)]
        first, second = map(ModelOptions, names, revisions, (self.device, self.device), dtypes)
        return first.load(quiet=quiet), second.load(quiet=quiet)


@command('hookkit diff default ./tuned "I like oat milk in my" --out folder', panel="Change")
def diff(
    *,
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
    models: TwoModelsOptions,
) -> None:
    """Compare two models on prompts: KL after each token, and the first site where they part."""
    texts, output_format = prompts.read(), output.format
    first, second = models.load(before, after, quiet=output.quiet)
    watched_ids = token_ids(first, watch)
    comparison = hk.model_diff(
        first, second, texts, sites=site or None, watch=watched_ids, tolerance=tolerance
    )
    output.note(repr(comparison).splitlines()[0])
    if output_format in ("html", "folder"):
        output.write_page(comparison.page())
        return
    columns = ("row", "pos", "read", "kl", "top1_before", "top1_after")
    parts = {"tokens": TableView(comparison.tokens, columns)}
    if output_format == "json":
        for name in ("prompts", "shifts", "sites", "parting", "left_out"):
            parts[name] = TableView(getattr(comparison, name))
    output.write("Two models", parts, main="tokens")
