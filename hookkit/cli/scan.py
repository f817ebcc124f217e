"""hookkit scan: one page about one prompt.

A `PromptScan` is the prompt with its hooks. `VIEWS` has a function for each table about its next
token: it computes the table, and selects what a reader sees of it. Suggestions of further commands
about the sites that the tables point at follow.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import hookkit as hk

from ..errors import EmptySelection, MissingSite, NotOneToken, Unsupported
from .app import command
from .options import HookedModelOptions, ModelOptions, Prompt, Top, Watch, read_prompt
from .output import OutputOptions, TableView, largest_rows

if TYPE_CHECKING:
    import pandas as pd


@command(
    'hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel="Look"
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
    refusals: list[str] = []
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


# ---- the tables, and what a reader sees of each


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
    leaders = table[table["rank"] == 1].drop_duplicates("site").set_index("site")
    ranks = table[table["token_id"] == token_id].set_index("site")["rank"]
    spans: list[list[str]] = []
    for site in leaders.index:
        if spans and leaders.loc[spans[-1][-1], "token_id"] == leaders.loc[site, "token_id"]:
            spans[-1].append(site)
        else:
            spans.append([site])
    rows = []
    for span in spans:
        ends = [span[0], span[-1]] if len(span) > 1 else span
        row = {
            "layers": " to ".join(str(leaders.loc[site, "layer"]) for site in ends),
            "token": leaders.loc[span[-1], "token"],
            "prob": leaders.loc[span[-1], "prob"],
            "rank": " to ".join(str(ranks[site]) for site in ends),
        }
        rows.append(row)
    return pd.DataFrame(rows)


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
    tokens = [repr(scan.lm.string(token_id)) for token_id in run.tokens[0].tolist()]
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
    model_words: list[str] = []
    for name in ("model", "revision", "device", "dtype"):
        if getattr(model, name) is not None:
            model_words += [f"--{name}", getattr(model, name)]
    lines = []
    for question, words in suggestions.items():
        if words:
            command_name, *arguments = words
            separator = ["--"] if scan.prompt.startswith("-") else []
            line = [command_name, *separator, scan.prompt, *arguments, *model_words]
            lines += [question, f"    {shlex.join(['hookkit', *line])}"]
    if has_refusals:
        words = ["hookkit", "doctor", *model_words]
        if model.model is not None:
            words.remove("--model")  # the model is an argument of doctor
        lines += ["Why is something not available?", f"    {shlex.join(words)}"]
    return lines


def _option_text(lm: "hk.LM", token_id: int) -> str:
    """Returns a token as an option reads it: its text, or its id if the text is not this token."""
    from ..hooks.text import format_token

    text = lm.string(token_id)
    try:
        is_this_token = lm.token(text) == token_id
    except NotOneToken:
        is_this_token = False
    return format_token(text if is_this_token else token_id)


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
