"""hookkit ranks, lens, direct and surprisal: what a model predicts for a prompt, and why."""

from typing import Annotated

import typer

from .app import command
from .options import (
    HookOptions,
    ModelOptions,
    Pos,
    Prompt,
    PromptOptions,
    Top,
    Watch,
    parse_positions,
    parse_token,
    read_prompt,
    token_ids,
)
from .output import OutputOptions, TableView, largest_rows, write_result

PANEL = "Look"


@command('hookkit ranks "I like oat milk in my" --watch " tea" --ban " coffee"', panel=PANEL)
def ranks(
    prompts: PromptOptions,
    model: ModelOptions,
    hooks: HookOptions,
    output: OutputOptions,
    top: Top = 10,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """The most likely next tokens after each prompt, and the ranks of the watched tokens."""
    output.check()
    texts, positions = prompts.read(), parse_positions(pos)
    hooks.check()
    from ..runs.forward import forward
    from ..tables.rank_tables import ranks as compute_ranks

    lm = model.load(quiet=output.quiet)
    watched_ids = token_ids(lm, watch)
    logits = "last" if positions == -1 else "all"
    run = forward(lm, texts, *hooks.read(lm, output.note), logits=logits)
    table = compute_ranks(run, pos=positions, top=top, watch=watched_ids)
    columns = ("row", "pos", "rank", "token", "prob", "logit")
    write_result(output, "Ranks", {"ranks": TableView(table, columns)})


@command('hookkit lens "The Eiffel Tower is in the city of" --watch " Paris" --top 1', panel=PANEL)
def lens(
    prompts: PromptOptions,
    model: ModelOptions,
    hooks: HookOptions,
    output: OutputOptions,
    site: Annotated[
        str, typer.Option(help="The stream: resid_post, resid_mid …; or attn_out, mlp_out.")
    ] = "resid_post",
    top: Top = 3,
    watch: Watch = None,
    pos: Pos = "-1",
) -> None:
    """The prediction of each layer (the logit lens): its state through the final norm and head."""
    output.check()
    texts, positions = prompts.read(), parse_positions(pos)
    hooks.check()
    from ..figures.lenses import lens_map
    from ..lenses.logit_lens import logit_lens

    lm = model.load(quiet=output.quiet)
    watched_ids = token_ids(lm, watch)
    edits = hooks.read(lm, output.note)
    table = logit_lens(lm, texts, *edits, sites=site, pos=positions, top=top, watch=watched_ids)
    columns = ("row", "pos", "site", "rank", "token", "prob", "entropy", "kl")
    figure = (lambda: lens_map(table)) if len(texts) == 1 else None
    write_result(output, "Logit lens", {"lens": TableView(table, columns, figure=figure)})


@command(
    'hookkit direct "When Mary and John went out, John thanked" --token " Mary" --against " John"',
    panel=PANEL,
)
def direct(
    prompt: Prompt,
    model: ModelOptions,
    hooks: HookOptions,
    output: OutputOptions,
    token: Annotated[
        str | None, typer.Option(help="The token; the most likely one if left out.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another token: the difference of their logits.")
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Each head, instead of attention as a whole.")
    ] = False,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Each neuron, instead of MLPs as a whole.")
    ] = False,
    top: Annotated[
        int, typer.Option(min=1, help="How many components to show, the largest first.")
    ] = 15,
    pos: Annotated[int, typer.Option(help="The position: -1 the last token.")] = -1,
) -> None:
    """A token's logit as an exact sum over components. CSV and JSON have all of them."""
    output.check()
    text = read_prompt(prompt)
    hooks.check()
    from ..figures.lenses import logit_bars
    from ..lenses.direct import direct_logits
    from ..runs.forward import forward
    from ..tables.rank_tables import ranks as compute_ranks

    lm = model.load(quiet=output.quiet)
    token_id = None if token is None else lm.token(parse_token(token))
    against_id = None if against is None else lm.token(parse_token(against))
    run = forward(lm, text, *hooks.read(lm, output.note))
    if token_id is None:
        token_id = int(compute_ranks(run, pos=pos, top=1)["token_id"].iloc[0])
    table = direct_logits(run, token_id, against=against_id, pos=pos, heads=heads, neurons=neurons)
    subject = f"the logit of {table.attrs['token']}"
    if against_id is not None:
        subject += f" minus that of {table.attrs['against']}"
    caption = f"{subject}: {table['logit'].sum():.4g}, the sum of {len(table)} parts"
    view = TableView(
        table,
        ("component", "logit"),
        caption,
        largest_rows(table, "logit", top),
        lambda: logit_bars(table, top=top),
    )
    output.note(caption)
    write_result(output, "Direct logits", {"direct": view})


@command('hookkit surprisal "We love deep learning" --top 3', panel=PANEL)
def surprisal(
    prompts: PromptOptions,
    model: ModelOptions,
    hooks: HookOptions,
    output: OutputOptions,
    top: Annotated[
        int, typer.Option(min=0, help="How many tokens that were expected instead to show.")
    ] = 3,
) -> None:
    """The loss of each token of a text in nats, its rank, and the tokens expected instead."""
    output.check()
    texts = prompts.read()
    hooks.check()
    from ..figures.surprisal import surprisal_strip
    from ..runs.forward import forward
    from ..tables.surprisal import surprisal as compute_surprisal

    lm = model.load(quiet=output.quiet)
    table = compute_surprisal(forward(lm, texts, *hooks.read(lm, output.note)), top=top)
    figure = (lambda: surprisal_strip(table)) if len(texts) == 1 else None
    columns = ("row", "pos", "token", "loss", "rank", "prob", "mean_loss", "alternatives")
    write_result(output, "Surprisal", {"surprisal": TableView(table, columns, figure=figure)})
