"""hookkit shift: which tokens rose and fell under an edit, as tables or as the page on what moved, and why.

hookkit sweep: a standard grid of edits, as a table; hookkit patch: the most usual one, for a reader.

hookkit diff: two models on the same prompts, and what differs.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .app import INTERRUPTED, app, command, program
from .options import (
    Edits,
    Engine,
    Head,
    Layer,
    Position,
    Seed,
    Texts,
    Top,
    Watch,
    Which,
    one_prompt,
    watched,
    word,
)
from .output import Form, Shown, strongest, tell, tell_aside, tell_page, tell_text, write_out

if TYPE_CHECKING:
    import pandas as pd

    from ..models.lm import LM
    from ..tables.metrics import Metric


from .options import Device


@command(
    'hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3 --watch " tea" --out moved',
    panel="Change",
)
def shift(
    texts: Texts,
    which: Which,
    edits: Edits,
    form: Form,
    top: Top = 10,
    watch: Watch = None,
    movers: Annotated[
        int, typer.Option(min=0, help="How many of the largest movers to show, each way.")
    ] = 3,
    random: Annotated[
        bool, typer.Option("--random", help="On the page: a random edit of the same size.")
    ] = False,
    generate: Annotated[
        int, typer.Option(min=0, help="On the page: so many tokens of text, with and without.")
    ] = 0,
    seed: Seed = 0,
) -> None:
    """The next token's ranking without and with edits: the first ones, the largest movers, the watched ones.

    CSV and JSON have these tables. --html, and --out FOLDER, are the whole page: layers, parts, controls.
    """
    prompts, kind = texts.read(), form.kind
    if kind not in ("html", "folder") and (random or generate):
        from ..errors import BadHook

        raise BadHook("--random and --generate are of the page: add --html, or --out FOLDER")
    edits.check(needed="a shift is from a run without hooks to one with them")
    lm = which.load(quiet=form.quiet)
    ids = watched(lm, watch)
    hooks = edits.read(lm, form.note)
    if kind in ("html", "folder"):
        from ..reports.shift.shift_page import shift_report

        controls = "random" if random else None
        page = shift_report(
            lm, prompts, *hooks, controls=controls, watch=ids, top=top, generate=generate, seed=seed,
            title=f"What moved: {' + '.join(map(str, hooks))}"[:120],
        )  # fmt: skip
        tell_page(form, page)
        return
    from ..runs.forward import forward
    from ..tables.rank_tables import rank_shift, shift_summary

    before, after = forward(lm, prompts, logits="last"), forward(lm, prompts, *hooks, logits="last")
    moved = rank_shift(before, after, top=top, movers=movers, watch=ids)
    columns = (
        "row",
        "rank_before",
        "rank_after",
        "shift",
        "token",
        "prob_before",
        "prob_after",
        "logit_delta",
        "why",
    )
    names = ("row", "top1_before", "top1_after", "kl", "entropy_before", "entropy_after", "kept")
    parts = {
        "shifts": Shown(moved, columns, " + ".join(map(str, hooks))),
        "summary": Shown(
            shift_summary(before, after, top=top), names, "how far all of it moved (nats)"
        ),
    }
    tell(form, "Shift", parts, main="shifts")


GRIDS = "Grids and corpora"
grids = program()
app.add_typer(grids, name="sweep", help="A grid of edits and what each does to a token: a table as CSV.",
              rich_help_panel=GRIDS)  # fmt: skip

Clean: TypeAlias = Annotated[str, typer.Argument(help="The prompt that is patched from.")]
Corrupted: TypeAlias = Annotated[
    str, typer.Argument(help="The prompt that is patched, of as many tokens.")
]
Direction: TypeAlias = Annotated[
    str, typer.Option(help="denoise, or noise: clean prompts with what is corrupted.")
]
Save: TypeAlias = Annotated[
    Path | None, typer.Option(help="A folder in which it goes on if it is ended.")
]


@dataclass(frozen=True)
class Measure:
    """What is measured."""

    token: Annotated[str, typer.Option(help="The token that is measured, such as ' coffee'.")]
    against: Annotated[
        str | None, typer.Option(help="Another token: the difference of their logits.")
    ] = None

    def metric(self) -> "Metric":
        from ..tables.token_metrics import logit_diff, prob

        return (
            prob(word(self.token))
            if self.against is None
            else logit_diff(word(self.token), word(self.against))
        )


@dataclass(frozen=True)
class Grid:
    """Which places; all of each dimension that is left out."""

    layer: Layer = None
    head: Head = None
    pos: Position = None
    save: Save = None

    def settings(self) -> dict[str, Any]:
        from ..errors import BadFile

        if self.save is not None and self.save.exists() and not self.save.is_dir():
            raise BadFile(
                f"--save {str(self.save)!r} is a file: give a folder, or the name of one that is to be made"
            )
        places = {"layers": self.layer or None, "heads": self.head or None, "pos": self.pos or None}
        return {**places, "save": self.save}


@command(
    'hookkit sweep ablations "I like oat milk in my" z --token " coffee"', panel=GRIDS, within=grids
)
def ablations(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    what: Annotated[str, typer.Argument(help="A site such as z or mlp_out, or block.")],
    measure: Measure,
    grid: Grid,
    which: Which,
    engine: Engine,
    form: Form,
    to: Annotated[str, typer.Option(help="What is put in: zero, mean or resample.")] = "zero",
    over: Annotated[
        list[str] | None, typer.Option(help="A prompt of the mean or the draw; repeatable.")
    ] = None,
) -> None:
    """Each head, layer or block taken out by itself: what the token loses without it."""
    from ..sweeps.grids import ablations as swept

    form.check()
    text = one_prompt(prompt)
    given: dict[str, Any] = {
        "to": to,
        "over": over or None,
        **grid.settings(),
        "progress": form.progress,
    }
    given["engine"] = engine.chosen()
    lm = which.load(quiet=form.quiet)
    _say(lambda: swept(lm, [text], what, measure.metric(), **given), grid, form)


@command(
    'hookkit sweep patching "Mary gave tea to" "John gave tea to" resid_pre --token " John" --against " Mary"',
    panel=GRIDS,
    within=grids,
)
def patching(
    clean: Clean,
    corrupted: Corrupted,
    site: Annotated[
        list[str], typer.Argument(help="A site such as resid_pre or z; several are compared.")
    ],
    measure: Measure,
    grid: Grid,
    which: Which,
    engine: Engine,
    form: Form,
    direction: Direction = "denoise",
) -> None:
    """What each place of a clean prompt carries: put into the corrupted one, how much of the token comes back."""
    from ..sweeps.grids import patching as swept

    form.check()
    given: dict[str, Any] = {"direction": direction, **grid.settings(), "progress": form.progress}
    given["engine"] = engine.chosen()
    lm = which.load(quiet=form.quiet)
    _say(lambda: swept(lm, [clean], [corrupted], site, measure.metric(), **given), grid, form)


@command(
    'hookkit patch "Mary and John met; John thanked" "Mary and John met; Mary thanked"', panel=GRIDS
)
def patch(
    clean: Clean,
    corrupted: Corrupted,
    grid: Grid,
    which: Which,
    form: Form,
    site: Annotated[str, typer.Option(help="resid_pre, attn_out, mlp_out, z …")] = "resid_pre",
    token: Annotated[
        str | None, typer.Option(help="What is measured; the clean prompt's first if left out.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Against which; the corrupted one's first if left out.")
    ] = None,
    direction: Direction = "denoise",
    top: Annotated[
        int, typer.Option(min=1, help="How many places to show, the strongest first.")
    ] = 10,
    figure: Annotated[
        Path | None, typer.Option(help="A file for the figure: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Where a clean prompt has what a corrupted one lacks: the strongest places. CSV and JSON have all of them.

    The effect is 0 where a place changed nothing, and 1 where it brought all of the clean prompt's answer. Of one pair
    there is no interval, and the largest of many places is larger than it would be on another: hk.strongest chooses on
    half of several pairs and measures on the other half.
    """
    from ..sweeps.grids import patching as swept
    from ..tables.token_metrics import logit_diff

    _check_figure(figure)
    form.check()
    lm = which.load(quiet=form.quiet)
    right, wrong = _answers(lm, clean, corrupted, token, against)
    form.note(f"the logit of {lm.string(right)!r} minus that of {lm.string(wrong)!r}")
    metric = logit_diff(right, wrong)
    given: dict[str, Any] = {"direction": direction, **grid.settings(), "progress": form.progress}

    def tell_it(table: "pd.DataFrame") -> None:
        tokens = (
            [repr(lm.string(each)) for each in lm.tokenizer.encode(corrupted)]
            if lm.tokenizer
            else None
        )
        _tell_places(form, table, tokens, top, figure)

    _say(lambda: swept(lm, [clean], [corrupted], site, metric, **given), grid, form, tell_it)


def _answers(
    lm: "LM", clean: str, corrupted: str, token: str | None, against: str | None
) -> tuple[int, int]:
    """The two tokens whose logits are compared: those named, else the first of each prompt."""
    from ..errors import BadHook
    from ..runs.forward import forward
    from ..tables.rank_tables import ranks

    named = [None if each is None else lm.token(word(each)) for each in (token, against)]
    first = [
        int(ranks(forward(lm, text, logits="last"), top=1)["token_id"].iloc[0])
        if one is None
        else one
        for text, one in zip((clean, corrupted), named, strict=True)
    ]
    if first[0] == first[1]:
        raise BadHook(
            f"both prompts are answered with {lm.string(first[0])!r}: say what is measured, --token and --against"
        )
    return first[0], first[1]


def _check_figure(path: Path | None) -> None:
    from ..errors import BadFile

    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise BadFile(f"--figure {path}: give a file that ends in .png, .svg or .pdf")


def _tell_places(
    form: Form, table: "pd.DataFrame", tokens: list[str] | None, top: int, figure: Path | None
) -> None:
    """The places by their effect, the positions with their tokens."""
    from ..errors import BadFile
    from ..figures.sweeps import heat_map

    labels = tokens if tokens is not None and "pos" in table and "head" not in table else None
    if figure is not None:
        try:
            drawing, kind = heat_map(table, labels=labels), figure.suffix.removeprefix(".")
            write_out(figure, lambda making: drawing.savefig(making, dpi=150, format=kind))
        except BadFile:
            raise
        except OSError as error:
            raise BadFile(
                f"{str(figure)!r} cannot be written: {error.strerror or error}"
            ) from error
        form.note(f"wrote {figure}")
    shown = strongest(table, "logit_diff_effect", top)
    if tokens is not None and "pos" in shown:
        shown["token"] = [tokens[int(place)] for place in shown["pos"]]
    columns = (
        "site",
        "layer",
        "head",
        "pos",
        "token",
        "logit_diff_before",
        "logit_diff",
        "logit_diff_effect",
    )
    tell(
        form,
        "Patching",
        {"patching": Shown(table, columns, "", shown, lambda: heat_map(table, labels=labels))},
    )


def _say(
    sweep: Callable[[], "pd.DataFrame"],
    grid: Grid,
    form: Form,
    tell_it: "Callable[[pd.DataFrame], None] | None" = None,
) -> None:
    """Say the table, as CSV unless told otherwise, also one that Ctrl-C ended."""
    from ..errors import Interrupted

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Interrupted)  # it is said below
        try:
            table: pd.DataFrame | None = sweep()
        except KeyboardInterrupt:  # before the first cell
            table = None
    if table is not None and tell_it is not None:
        tell_it(table)
    elif table is not None and form.kind:
        tell(form, "Sweep", {"sweep": Shown(table)})
    elif table is not None:
        tell_text(table.to_csv(index=False, lineterminator="\n"))
    if table is None or not table.attrs["complete"]:
        on = (
            "with --save FOLDER it could go on" if grid.save is None else "the same command goes on"
        )
        tell_aside(f"interrupted; {on}")
        raise typer.Exit(INTERRUPTED)


@command('hookkit diff default ./tuned "I like oat milk in my" --out folder', panel="Change")
def diff(
    before: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_A", help="A Hugging Face id, a folder, a .gguf file; default."
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="MODEL_B", help="One of the same vocabulary.")],
    texts: Texts,
    form: Form,
    watch: Watch = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Such as resid_post; repeatable. All if left out.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="The relative difference beyond which they part.")
    ] = 1e-4,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the first model: float32, bfloat16 …")
    ] = None,
    dtype_after: Annotated[
        str | None, typer.Option(help="Of the second; that of the first if left out.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of the first model: a branch, tag or commit.")
    ] = None,
    revision_after: Annotated[str | None, typer.Option(help="Of the second.")] = None,
) -> None:
    """Compare two models on the same prompts: KL after each token, and the site where they part first."""
    prompts, kind = texts.read(), form.kind
    from ..reports.diff.model_diff import diff as compared

    first = Which(_named(before), revision, device, dtype).load(quiet=form.quiet)
    second = Which(_named(after), revision_after, device, dtype_after or dtype).load(
        quiet=form.quiet
    )
    found = compared(
        first,
        second,
        prompts,
        sites=site or None,
        watch=watched(first, watch) or (),
        tolerance=tolerance,
    )
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
