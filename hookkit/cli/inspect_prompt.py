"""hookkit ranks, lens, direct and surprisal: what a model predicts for a prompt, and why."""

from typing import Annotated

from typer import Option

import hookkit as hk

from .app import command
from .options import (
    Against,
    HookedModelOptions,
    Pos,
    Prompt,
    PromptOptions,
    Top,
    Watch,
    parse_positions,
    parse_token,
    read_prompt,
)
from .output import OutputOptions, TableView, largest_rows

PANEL = "Look"


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
    figure = (lambda: hk.figures.lens_map(table)) if len(texts) == 1 else None
    output.write("Logit lens", {"lens": TableView(table, columns, figure=figure)})


@command(
    'hookkit direct "When Mary and John went out, John thanked" --token " Mary" --against " John"',
    panel=PANEL,
)
def direct(
    prompt: Prompt,
    model: HookedModelOptions,
    output: OutputOptions,
    token: Annotated[str | None, Option(help="The token; the most likely one if left out.")] = None,
    against: Against = None,
    heads: Annotated[
        bool, Option("--heads", help="Each head, instead of attention as a whole.")
    ] = False,
    neurons: Annotated[
        bool, Option("--neurons", help="Each neuron, instead of MLPs as a whole.")
    ] = False,
    top: Annotated[int, Option(min=1, help="How many components to show, the largest first.")] = 15,
    pos: Annotated[int, Option(help="The position: -1 the last token.")] = -1,
) -> None:
    """A token's logit as an exact sum over components. CSV and JSON have all of them."""
    text = read_prompt(prompt)
    lm, edits, _ = model.load_with_hooks(output)
    token_id = None if token is None else lm.token(parse_token(token))
    against_id = None if against is None else lm.token(parse_token(against))
    run = hk.forward(lm, text, *edits)
    if token_id is None:
        token_id = int(hk.ranks(run, pos=pos, top=1)["token_id"].iloc[0])
    table = hk.direct_logits(
        run, token_id, against=against_id, pos=pos, heads=heads, neurons=neurons
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
    columns = ("row", "pos", "token", "loss", "rank", "prob", "mean_loss", "alternatives")
    figure = (lambda: hk.figures.surprisal_strip(table)) if len(texts) == 1 else None
    output.write("Surprisal", {"surprisal": TableView(table, columns, figure=figure)})
