"""hookkit scan: one page about one prompt.

`PromptScan` computes the tables. The functions after it select what a reader sees of each table,
and suggest further commands about the sites that the tables point at.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from .app import command
from .options import HookOptions, ModelOptions, Prompt, Top, Watch, read_prompt, token_ids
from .output import OutputOptions, TableView, largest_rows, write_result

if TYPE_CHECKING:
    import pandas as pd

    from ..hooks.base import Hook
    from ..models.lm import LM
    from ..runs.run import Run

Tables: TypeAlias = "dict[str, pd.DataFrame]"


@command(
    'hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel="Look"
)
def scan(
    prompt: Prompt,
    model: ModelOptions,
    hooks: HookOptions,
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
    hooks.check()
    lm = model.load(quiet=output.quiet)
    watched_ids = token_ids(lm, watch)
    prompt_scan = PromptScan(lm, text, tuple(hooks.read(lm, output.note)), top, tuple(watched_ids))
    tables, refusals = prompt_scan.compute_tables()
    parts: dict[str, TableView | str] = {}
    for name, table in tables.items():
        parts[name] = VIEWS[name](prompt_scan, table)
    if refusals:
        parts["Not available here"] = "\n".join(refusals)
    suggestions = _suggest_commands(prompt_scan, model, tables, has_refusals=bool(refusals))
    parts["What to ask next"] = "\n".join(suggestions)
    write_result(output, f"Scan: {text}"[:120], parts)


@dataclass(frozen=True, eq=False)
class PromptScan:
    """A prompt with its hooks, and the tables about its next token.

    A call of `scan` owns it. Its run is computed when it is first read, and kept.
    """

    lm: "LM"
    prompt: str
    hooks: "tuple[Hook, ...]"
    top: int
    watch: tuple[int, ...]

    @cached_property
    def run(self) -> "Run":
        """A forward pass over the prompt."""
        from ..runs.forward import forward

        return forward(self.lm, self.prompt, *self.hooks)

    @cached_property
    def first_tokens(self) -> tuple[int, int]:
        """The ids of the two most likely next tokens."""
        from ..tables.rank_tables import ranks

        first, second = ranks(self.run, top=2)["token_id"].tolist()[:2]
        return first, second

    @property
    def first_texts(self) -> tuple[str, str]:
        """The texts of the two most likely next tokens."""
        first, second = self.first_tokens
        return self.lm.string(first), self.lm.string(second)

    def compute_tables(self) -> tuple[Tables, list[str]]:
        """Returns the tables by name, and the reasons why the model does not allow some of them."""
        from ..errors import EmptySelection, MissingSite, Unsupported

        tables = {"ranks": self.ranks(), "uncertainty": self.uncertainty()}
        optional_tables = {
            "lens": self.lens,
            "direct": self.direct,
            "surprisal": self.surprisal,
            "attention": self.attention,
            "attribution": self.attribution,
        }
        refusals: list[str] = []
        for name, compute in optional_tables.items():
            try:
                tables[name] = compute()
            except (EmptySelection, MissingSite, Unsupported) as error:
                refusals.append(f"{name}: {error}")
        return tables, refusals

    def ranks(self) -> "pd.DataFrame":
        """Returns the most likely next tokens, and the watched ones."""
        from ..tables.rank_tables import ranks

        return ranks(self.run, top=self.top, watch=self.watch)

    def uncertainty(self) -> "pd.DataFrame":
        """Returns the uncertainty of the next token."""
        from ..tables.rank_tables import uncertainty

        return uncertainty(self.run, pos=-1)

    def lens(self) -> "pd.DataFrame":
        """Returns the logit lens of each layer, with the two first tokens and the watched ones."""
        from ..lenses.logit_lens import logit_lens

        ids = list(dict.fromkeys((*self.first_tokens, *self.watch)))
        return logit_lens(self.lm, self.prompt, *self.hooks, top=1, watch=ids)

    def direct(self) -> "pd.DataFrame":
        """Returns what each component adds to the logit difference of the two first tokens."""
        from ..lenses.direct import direct_logits

        first, second = self.first_tokens
        return direct_logits(self.run, first, against=second)

    def surprisal(self) -> "pd.DataFrame":
        """Returns the loss of each token of the prompt."""
        from ..tables.surprisal import surprisal

        return surprisal(self.run, top=2)

    def attention(self) -> "pd.DataFrame":
        """Returns how much of the last token's attention goes to each position.

        Columns: pos, token, mean (over all heads of all layers, 0 to 1), strongest (the largest
        value of a head), head (that head: LAYER.HEAD).
        """
        import pandas as pd
        import torch

        from ..hooks.capture import capture
        from ..runs.forward import forward

        pattern = capture("pattern", pos=-1)
        run = forward(self.lm, self.prompt, *self.hooks, pattern, logits=False)
        rows_of_layers: list[Any] = []
        head_names: list[str] = []
        for site in run.sites:
            layer: Any = site.layer  # pyright: ignore[reportAttributeAccessIssue]
            attention_rows = run[site][0, :, 0].double().cpu()  # [head, key]
            rows_of_layers.append(attention_rows)
            head_names += [f"{layer}.{head}" for head in range(len(attention_rows))]
        heads = torch.cat(rows_of_layers)
        largest = heads.max(dim=0)
        tokens = [repr(self.lm.string(token_id)) for token_id in run.tokens[0].tolist()]
        columns = {
            "pos": range(len(tokens)),
            "token": tokens,
            "mean": heads.mean(dim=0).tolist(),
            "strongest": largest.values.tolist(),
            "head": [head_names[index] for index in largest.indices.tolist()],
        }
        return pd.DataFrame(columns)

    def attribution(self) -> "pd.DataFrame":
        """Returns the attribution of the logit difference to each token of the prompt."""
        from ..attributions.input_tokens import token_attribution
        from ..errors import Unsupported
        from ..tables.token_metrics import logit_diff

        if self.hooks:
            raise Unsupported("gradients are those of the model without hooks: leave the hooks out")
        return token_attribution(self.lm, self.prompt, logit_diff(*self.first_tokens))


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


# What a reader sees of each table.


def _ranks_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    columns = ("rank", "token", "prob", "logit")
    return TableView(table, columns, f"What comes after {scan.prompt!r}")


def _uncertainty_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    columns = ("entropy", "perplexity", "margin", "top1_prob", "nucleus_90", "scenario")
    return TableView(table, columns, "How sure it is (entropy in nats)")


def _lens_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    from ..figures.lenses import lens_map

    first = scan.first_texts[0]
    caption = f"The logit lens: what leads in which layers, and the rank of {first!r} there"
    reader_table = leading_tokens(table, scan.first_tokens[0])
    return TableView(table, (), caption, reader_table, lambda: lens_map(table))


def _direct_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    from ..figures.lenses import logit_bars

    first, second = scan.first_texts
    total = f"{table['logit'].sum():.4g} of logit in all"
    caption = f"Which components say {first!r} rather than {second!r}: {total}"
    reader_table = largest_rows(table, "logit", 8)
    columns = ("component", "logit")
    return TableView(table, columns, caption, reader_table, lambda: logit_bars(table, top=12))


def _surprisal_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    from ..figures.surprisal import surprisal_strip

    columns = ("pos", "token", "loss", "rank", "alternatives")
    mean_loss = f"{table['loss'].mean():.3g}"
    caption = f"What each token of the prompt cost (nats; {mean_loss} on average)"
    return TableView(table, columns, caption, figure=lambda: surprisal_strip(table))


def _attention_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    columns = ("pos", "token", "mean", "strongest", "head")
    caption = "What the last token attends to: over all heads, and the head that attends most"
    return TableView(table, columns, caption)


def _attribution_view(scan: PromptScan, table: "pd.DataFrame") -> TableView:
    first, second = scan.first_texts
    method = "gradient times input, in logits"
    caption = f"Which tokens speak for {first!r} rather than {second!r} ({method})"
    return TableView(table, ("pos", "token", "attribution"), caption)


VIEWS: "dict[str, Callable[[PromptScan, pd.DataFrame], TableView]]" = {
    "ranks": _ranks_view,
    "uncertainty": _uncertainty_view,
    "lens": _lens_view,
    "direct": _direct_view,
    "surprisal": _surprisal_view,
    "attention": _attention_view,
    "attribution": _attribution_view,
}


# What to ask next.


def _suggest_commands(
    scan: PromptScan, model: ModelOptions, tables: Tables, *, has_refusals: bool
) -> list[str]:
    """Returns questions, each followed by the command that answers it."""
    first, second = (_option_text(scan.lm, token_id) for token_id in scan.first_tokens)
    first_text, second_text = scan.first_texts
    heads = ["direct", "--token", first, "--against", second, "--heads"]
    suggestions: list[tuple[str, list[str]]] = [
        (f"Which heads say {first_text!r} rather than {second_text!r}?", heads),
        ("Does it come from what is attended to?", _knockout_command(tables)),
        (
            f"Is the strongest component needed for {first_text!r}?",
            _ablation_command(tables, first),
        ),
        (f"When does it come to say {first_text!r}?", ["lens", "--watch", first, "--top", "1"]),
        ("What would it write, and why?", ["trace", "--watch", second, "--max-new-tokens", "12"]),
        (f"And without {first_text!r}?", ["compare", "--ban", first, "--max-new-tokens", "12"]),
    ]
    lines = []
    for question, words in suggestions:
        if words:
            name, *arguments = words
            lines += [
                question,
                _command_line(name, scan.prompt, [*arguments, *_model_words(model)]),
            ]
    if has_refusals:
        words = ["hookkit", "doctor", *_model_words(model)]
        if model.model is not None:
            words.remove("--model")  # the model is an argument of doctor
        lines += ["Why is something not available?", f"    {shlex.join(words)}"]
    return lines


def _option_text(lm: "LM", token_id: int) -> str:
    """Returns a token as an option reads it: its text, or its id if the text is not this token."""
    from ..errors import NotOneToken
    from ..hooks.text import format_token

    text = lm.string(token_id)
    try:
        is_this_token = lm.token(text) == token_id
    except NotOneToken:
        is_this_token = False
    return format_token(text if is_this_token else token_id)


def _command_line(name: str, prompt: str, arguments: Sequence[str]) -> str:
    words = ["hookkit", name]
    if prompt.startswith("-"):
        words.append("--")
    return f"    {shlex.join([*words, prompt, *arguments])}"


def _model_words(model: ModelOptions) -> list[str]:
    words: list[str] = []
    for name in ("model", "revision", "device", "dtype"):
        value = getattr(model, name)
        if value is not None:
            words += [f"--{name}", value]
    return words


def _knockout_command(tables: Tables) -> list[str]:
    """Returns a knockout of the head with the strongest attention, first and last token apart."""
    if "attention" not in tables:
        return []
    table: Any = tables["attention"].iloc[1:-1]
    if table.empty:
        return []
    strongest = table.loc[table["strongest"].idxmax()]
    return ["shift", "--hook", f"knockout:{strongest['head']}@query=-1,key={strongest['pos']}"]


def _ablation_command(tables: Tables, token: str) -> list[str]:
    """Returns an ablation of the attention or MLP that adds most to the logit."""
    if "direct" not in tables:
        return []
    table: Any = tables["direct"]
    table = table[table["kind"].isin(["attention", "mlp"])]
    if table.empty:
        return []
    component = str(table.loc[table["logit"].idxmax(), "component"])
    return ["shift", "--ablate", component, "--watch", token]
