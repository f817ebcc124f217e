"""hookkit ranks, lens, direct, surprisal: what a model says of a prompt, and where that comes from."""

from typing import Annotated

import typer

from .app import command
from .options import Edits, Pos, Prompt, Texts, Top, Watch, Which, one_prompt, place, watched, word
from .output import Form, Shown, strongest, tell

LOOK = "Look"


@command('hookkit ranks "I like oat milk in my" --watch " tea" --ban " coffee"', panel=LOOK)
def ranks(
    texts: Texts,
    which: Which,
    edits: Edits,
    form: Form,
    top: Top = 10,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """The most likely next tokens after each prompt, and where the watched ones stand."""
    form.check()
    prompts, where = texts.read(), place(pos)
    edits.check()
    from ..runs.forward import forward
    from ..tables.rank_tables import ranks as ranked

    lm = which.load(quiet=form.quiet)
    ids = watched(lm, watch)
    run = forward(lm, prompts, *edits.read(lm, form.note), logits="last" if where == -1 else "all")
    table = ranked(run, pos=where, top=top, watch=ids)
    columns = ("row", "pos", "rank", "token", "prob", "logit")
    tell(form, "Ranks", {"ranks": Shown(table, columns)})


@command('hookkit lens "The Eiffel Tower is in the city of" --watch " Paris" --top 1', panel=LOOK)
def lens(
    texts: Texts,
    which: Which,
    edits: Edits,
    form: Form,
    site: Annotated[
        str, typer.Option(help="The stream: resid_post, resid_mid …; or attn_out, mlp_out.")
    ] = "resid_post",
    top: Top = 3,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """What each layer would say (the logit lens): its state through the model's own final norm and head."""
    form.check()
    prompts, where = texts.read(), place(pos)
    edits.check()
    from ..figures.lenses import lens_map
    from ..lenses.logit_lens import logit_lens

    lm = which.load(quiet=form.quiet)
    ids = watched(lm, watch)
    table = logit_lens(
        lm, prompts, *edits.read(lm, form.note), sites=site, pos=where, top=top, watch=ids
    )
    columns = ("row", "pos", "site", "rank", "token", "prob", "entropy", "kl")
    drawn = (lambda: lens_map(table)) if len(prompts) == 1 else None
    tell(form, "Logit lens", {"lens": Shown(table, columns, figure=drawn)})


@command(
    'hookkit direct "When Mary and John went out, John thanked" --token " Mary" --against " John"',
    panel=LOOK,
)
def direct(
    prompt: Prompt,
    which: Which,
    edits: Edits,
    form: Form,
    token: Annotated[
        str | None, typer.Option(help="The token; the most likely one if left out.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another token: the difference of their logits.")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Each head, in place of attention as a whole.")
    ] = False,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Each neuron, in place of MLPs as a whole.")
    ] = False,
    top: Annotated[
        int, typer.Option(min=1, help="How many components to show, the largest first.")
    ] = 15,
    pos: Annotated[int, typer.Option(help="The position: -1 the last token.")] = -1,
) -> None:
    """A token's logit as an exact sum over components. CSV and JSON have all of them."""
    form.check()
    text = one_prompt(prompt)
    edits.check()
    from ..figures.lenses import logit_bars
    from ..lenses.direct import direct_logits
    from ..runs.forward import forward
    from ..tables.rank_tables import ranks as ranked

    lm = which.load(quiet=form.quiet)
    named = None if token is None else lm.token(word(token))
    other = None if against is None else lm.token(word(against))
    run = forward(lm, text, *edits.read(lm, form.note))
    chosen = int(ranked(run, pos=pos, top=1)["token_id"].iloc[0]) if named is None else named
    table = direct_logits(run, chosen, against=other, pos=pos, heads=heads, neurons=neurons)
    beside = "" if other is None else f" minus that of {table.attrs['against']}"
    words = f"the logit of {table.attrs['token']}{beside}: {table['logit'].sum():.4g}, the sum of {len(table)} parts"
    shown = Shown(
        table,
        ("component", "logit"),
        words,
        strongest(table, "logit", top),
        lambda: logit_bars(table, top=top),
    )
    form.note(words)
    tell(form, "Direct logits", {"direct": shown})


@command('hookkit surprisal "We love deep learning" --top 3', panel=LOOK)
def surprisal(
    texts: Texts,
    which: Which,
    edits: Edits,
    form: Form,
    top: Annotated[
        int, typer.Option(min=0, help="How many tokens that were expected instead to show.")
    ] = 3,
) -> None:
    """What each token of a text cost the model: its loss in nats, its rank, and what was expected instead."""
    form.check()
    prompts = texts.read()
    edits.check()
    from ..figures.surprisal import surprisal_strip
    from ..runs.forward import forward
    from ..tables.surprisal import surprisal as surprised

    lm = which.load(quiet=form.quiet)
    table = surprised(forward(lm, prompts, *edits.read(lm, form.note)), top=top)
    drawn = (lambda: surprisal_strip(table)) if len(prompts) == 1 else None
    columns = ("row", "pos", "token", "loss", "rank", "prob", "mean_loss", "alternatives")
    tell(form, "Surprisal", {"surprisal": Shown(table, columns, figure=drawn)})
