"""hookkit shift: which tokens rose and fell under an edit, as tables or as the page on what moved, and why."""

from typing import Annotated

import typer

from .base import command
from .options import Edits, Seed, Texts, Top, Watch, Which, watched
from .printing import Form, Shown, tell, tell_page


@command(
    'hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3 --watch " tea" --out moved', panel="Change"
)
def shift(
    texts: Texts,
    which: Which,
    edits: Edits,
    form: Form,
    top: Top = 10,
    watch: Watch = None,
    movers: Annotated[int, typer.Option(min=0, help="How many of the largest movers to show, each way.")] = 3,
    random: Annotated[bool, typer.Option("--random", help="On the page: a random edit of the same size.")] = False,
    generate: Annotated[int, typer.Option(min=0, help="On the page: so many tokens of text, with and without.")] = 0,
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
        from ..shifts import shift_report

        controls = "random" if random else None
        page = shift_report(
            lm, prompts, *hooks, controls=controls, watch=ids, top=top, generate=generate, seed=seed,
            title=f"What moved: {' + '.join(map(str, hooks))}"[:120],
        )  # fmt: skip
        tell_page(form, page)
        return
    from ..runs import forward
    from ..tables import rank_shift, shift_summary

    before, after = forward(lm, prompts, logits="last"), forward(lm, prompts, *hooks, logits="last")
    moved = rank_shift(before, after, top=top, movers=movers, watch=ids)
    columns = ("row", "rank_before", "rank_after", "shift", "token", "prob_before", "prob_after", "logit_delta", "why")
    names = ("row", "top1_before", "top1_after", "kl", "entropy_before", "entropy_after", "kept")
    parts = {
        "shifts": Shown(moved, columns, " + ".join(map(str, hooks))),
        "summary": Shown(shift_summary(before, after, top=top), names, "how far all of it moved (nats)"),
    }
    tell(form, "Shift", parts, main="shifts")
