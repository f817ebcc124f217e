"""Commands about what a model predicts for a prompt, and why.

hookkit scan       one page about one prompt
hookkit ranks      the most likely next tokens
hookkit lens       the prediction of each layer
hookkit direct     a token's logit as a sum over components
hookkit surprisal  the loss of each token of a text

A `PromptScan` is the prompt of a scan with its hooks. `OPTIONAL_VIEWS` has a function for each
table about its next token: it computes the table, and selects what a reader sees of it.
Suggestions of further commands about the sites that the tables point at follow.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import hookkit as hk

from ..errors import EmptySelection, MissingSite, NotOneToken, Unsupported
from .app import command
from .options import (
    Against,
    HookedModelOptions,
    ModelOptions,
    Pos,
    Prompt,
    PromptOptions,
    Top,
    Watch,
    optional_token_id,
    parse_positions,
    read_prompt,
)
from .output import OutputOptions, TableView, largest_rows

if TYPE_CHECKING:
    import pandas as pd

PANEL = "Look"


@command(
    'hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel=PANEL
)
def scan(
    prompt: Prompt,
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
    text = read_prompt(prompt)
    lm, edits, watched_ids = model.load_with_hooks(output, watch)
    prompt_scan = PromptScan(lm, text, edits, top, watched_ids)
    views = {"ranks": _ranks(prompt_scan), "uncertainty": _uncertainty(prompt_scan)}
    refusals = []
    for name, compute in OPTIONAL_VIEWS.items():
        try:
            views[name] = compute(prompt_scan)
        except (EmptySelection, MissingSite, Unsupported) as error:
            refusals.append(f"{name}: {error}")
    parts: dict[str, TableView | str] = {**views}
    if refusals:
        parts["Not available here"] = "\n".join(refusals)
    suggestions = _suggest_commands(prompt_scan, model, views, has_refusals=bool(refusals))
    parts["What to ask next"] = "\n".join(suggestions)
    output.write(f"Scan: {text}"[:120], parts)


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


def _if_one_prompt(texts: Sequence[str], figure: Callable[[], Any]) -> Callable[[], Any] | None:
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
    prompt: Prompt,
    model: HookedModelOptions,
    output: OutputOptions,
    logit: LogitOptions,
    top: Annotated[int, Option(min=1, help="How many components to show, the largest first.")] = 15,
    pos: Annotated[int, Option(help="The position: -1 the last token.")] = -1,
) -> None:
    """A token's logit as an exact sum over components. CSV and JSON have all of them."""
    text = read_prompt(prompt)
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
    columns = ("row", "pos", "token", "loss", "rank", "prob", "mean_loss", "alternatives")
    figure = _if_one_prompt(texts, lambda: hk.figures.surprisal_strip(table))
    output.write("Surprisal", {"surprisal": TableView(table, columns, figure=figure)})


# ---- the tables of a scan, and what a reader sees of each


@dataclass(frozen=True, eq=False)
class PromptScan:
    """A prompt with its hooks. A call of `scan` owns it. The run is computed when it is read."""

    lm: "hk.LM"
    prompt: str
    hooks: "Sequence[hk.types.Hook]"
    top: int
    watch: Sequence[int]

    @cached_property
    def run(self) -> "hk.types.Run":
        """A forward pass over the prompt."""
        return hk.forward(self.lm, self.prompt, *self.hooks)

    @cached_property
    def first_tokens(self) -> tuple[int, int]:
        """The ids of the two most likely next tokens."""
        first, second = hk.ranks(self.run, top=2)["token_id"].tolist()[:2]
        return first, second

    @property
    def first_texts(self) -> tuple[str, str]:
        """The texts of the two most likely next tokens."""
        first, second = self.first_tokens
        return self.lm.string(first), self.lm.string(second)


def _ranks(scan: PromptScan) -> TableView:
    table = hk.ranks(scan.run, top=scan.top, watch=scan.watch)
    columns = ("rank", "token", "prob", "logit")
    return TableView(table, columns, f"What comes after {scan.prompt!r}")


def _uncertainty(scan: PromptScan) -> TableView:
    columns = ("entropy", "perplexity", "margin", "top1_prob", "nucleus_90", "scenario")
    return TableView(hk.uncertainty(scan.run, pos=-1), columns, "How sure it is (entropy in nats)")


def _lens(scan: PromptScan) -> TableView:
    token_ids = list(dict.fromkeys((*scan.first_tokens, *scan.watch)))
    table = hk.logit_lens(scan.lm, scan.prompt, *scan.hooks, top=1, watch=token_ids)
    first = scan.first_texts[0]
    caption = f"The logit lens: what leads in which layers, and the rank of {first!r} there"
    reader_table = leading_tokens(table, scan.first_tokens[0])
    return TableView(table, (), caption, reader_table, lambda: hk.figures.lens_map(table))


def leading_tokens(lens: "pd.DataFrame", token_id: int) -> "pd.DataFrame":
    """Returns the spans of layers in which one token has rank 1, in the order of the layers.

    Columns: layers, token, prob (in the last layer of the span), and rank: that of `token_id` in
    the first and in the last layer of the span.
    """
    import pandas as pd

    table: Any = lens
    leaders = table[table["rank"] == 1].drop_duplicates("site")
    ranks = table[table["token_id"] == token_id].set_index("site")["rank"]
    leaders = leaders.assign(rank=leaders["site"].map(ranks))
    is_new = leaders["token_id"] != leaders["token_id"].shift()
    rows = []
    for _, span in leaders.groupby(is_new.cumsum()):
        last = span.iloc[-1]
        row = {
            "layers": _join_ends(span["layer"]),
            "token": last["token"],
            "prob": last["prob"],
            "rank": _join_ends(span["rank"]),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _join_ends(values: Any) -> str:
    """Returns the first and the last of the values of a span; one value alone."""
    ends = dict.fromkeys([0, len(values) - 1])
    return " to ".join(str(values.iloc[index]) for index in ends)


def _direct(scan: PromptScan) -> TableView:
    first_id, second_id = scan.first_tokens
    table = hk.direct_logits(scan.run, first_id, against=second_id)
    first, second = scan.first_texts
    total = f"{table['logit'].sum():.4g} of logit in all"
    caption = f"Which components say {first!r} rather than {second!r}: {total}"
    reader_table = largest_rows(table, "logit", 8)
    columns = ("component", "logit")
    return TableView(
        table, columns, caption, reader_table, lambda: hk.figures.logit_bars(table, top=12)
    )


def _surprisal(scan: PromptScan) -> TableView:
    table = hk.surprisal(scan.run, top=2)
    columns = ("pos", "token", "loss", "rank", "alternatives")
    mean_loss = f"{table['loss'].mean():.3g}"
    caption = f"What each token of the prompt cost (nats; {mean_loss} on average)"
    return TableView(table, columns, caption, figure=lambda: hk.figures.surprisal_strip(table))


def _attention(scan: PromptScan) -> TableView:
    """Returns how much of the last token's attention goes to each position.

    Columns: pos, token, mean (over all heads of all layers, 0 to 1), strongest (the largest value
    of a head), head (that head: LAYER.HEAD).
    """
    import pandas as pd
    import torch

    pattern = hk.capture("pattern", pos=-1)
    run = hk.forward(scan.lm, scan.prompt, *scan.hooks, pattern, logits=False)
    rows_of_layers: list[Any] = []
    head_names: list[str] = []
    for site in run.sites:
        layer: Any = site.layer  # pyright: ignore[reportAttributeAccessIssue]
        attention_rows = run[site][0, :, 0].double().cpu()  # [head, key]
        rows_of_layers.append(attention_rows)
        head_names += [f"{layer}.{head}" for head in range(len(attention_rows))]
    heads = torch.cat(rows_of_layers)
    largest = heads.max(dim=0)
    tokens = list(map(scan.lm.string, run.tokens[0].tolist()))
    columns = {
        "pos": range(len(tokens)),
        "token": tokens,
        "mean": heads.mean(dim=0).tolist(),
        "strongest": largest.values.tolist(),
        "head": [head_names[index] for index in largest.indices.tolist()],
    }
    caption = "What the last token attends to: over all heads, and the head that attends most"
    return TableView(pd.DataFrame(columns), caption=caption)


def _attribution(scan: PromptScan) -> TableView:
    if scan.hooks:
        raise Unsupported("gradients are those of the model without hooks: leave the hooks out")
    table = hk.token_attribution(scan.lm, scan.prompt, hk.metrics.logit_diff(*scan.first_tokens))
    first, second = scan.first_texts
    method = "gradient times input, in logits"
    caption = f"Which tokens speak for {first!r} rather than {second!r} ({method})"
    return TableView(table, ("pos", "token", "attribution"), caption)


OPTIONAL_VIEWS: Mapping[str, Callable[[PromptScan], TableView]] = {  # some models lack them
    "lens": _lens,
    "direct": _direct,
    "surprisal": _surprisal,
    "attention": _attention,
    "attribution": _attribution,
}


# ---- what to ask next


def _suggest_commands(
    scan: PromptScan, model: ModelOptions, views: Mapping[str, TableView], *, has_refusals: bool
) -> list[str]:
    first, second = (_option_text(scan.lm, token_id) for token_id in scan.first_tokens)
    first_text, second_text = scan.first_texts
    suggestions = {
        f"Which heads say {first_text!r} rather than {second_text!r}?": [
            "direct", "--token", first, "--against", second, "--heads"
        ],
        "Does it come from what is attended to?": _knockout_command(views),
        f"Is the strongest component needed for {first_text!r}?": _ablation_command(views, first),
        f"When does it come to say {first_text!r}?": ["lens", "--watch", first, "--top", "1"],
        "What would it write, and why?": ["trace", "--watch", second, "--max-new-tokens", "12"],
        f"And without {first_text!r}?": ["compare", "--ban", first, "--max-new-tokens", "12"]
    }  # fmt: skip
    separator = ["--"] if scan.prompt.startswith("-") else []
    lines = []
    for question, words in suggestions.items():
        if words:
            command_name, *arguments = words
            line = [command_name, *separator, scan.prompt, *arguments, *model.words()]
            lines += [question, _command_line(line)]
    if has_refusals:
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


def _knockout_command(views: Mapping[str, TableView]) -> list[str]:
    """Returns a knockout of the head with the strongest attention, first and last token apart."""
    if "attention" not in views:
        return []
    table: Any = views["attention"].table.iloc[1:-1]
    if table.empty:
        return []
    strongest = table.loc[table["strongest"].idxmax()]
    return ["shift", "--hook", f"knockout:{strongest['head']}@query=-1,key={strongest['pos']}"]


def _ablation_command(views: Mapping[str, TableView], token: str) -> list[str]:
    """Returns an ablation of the attention or MLP that adds most to the logit."""
    if "direct" not in views:
        return []
    table: Any = views["direct"].table
    table = table[table["kind"].isin(["attention", "mlp"])]
    if table.empty:
        return []
    component = str(table.loc[table["logit"].idxmax(), "component"])
    return ["shift", "--ablate", component, "--watch", token]
