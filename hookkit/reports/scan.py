"""`hk.scan`: what the model predicts after a prompt, how sure it is, and where that comes from.

hk.scan(lm, "The Eiffel Tower is in the city of").write("eiffel")

The tables are those of the functions that have them alone: `ranks`, `uncertainty`, `logit_lens`,
`direct_logits`, `surprisal` and `token_attribution`. All are about the token after each prompt, and
compare the most likely token with the second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import figures
from ..arguments import check_arguments, check_integer
from ..attributions.input_tokens import token_attribution
from ..display import count_of, describe_outcome, first_rows, render_html
from ..errors import EmptySelection, MissingSite, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..lenses.direct import direct_logits
from ..lenses.logit_lens import lens_summary, logit_lens
from ..models.lm import LM, Token
from ..models.prompts import Prompts
from ..models.tokens import prompt_text
from ..runs.forward import forward
from ..runs.run import Run
from ..tables.metrics.token_metrics import logit_diff
from ..tables.rank_tables import ranks, uncertainty, watched_ids
from ..tables.show import largest_rows
from ..tables.surprisal import surprisal
from .comparison_page import name_prompt
from .page import Report, report
from .parts import Content, Part

MAX_PROMPTS = 10  # that have a part of their own on the page; the tables have all prompts
MAX_COMPONENTS = 8  # of a logit, for a reader


@dataclass(frozen=True, eq=False)
class Section:
    """What a reader sees of one table of a scan, for one prompt."""

    name: str
    caption: str
    table: pd.DataFrame
    figure: Callable[[], Figure] | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """What one look at some prompts shows. Made by `scan`.

    run      the forward of all prompts
    tables   by name: summary (one row for each prompt), ranks, uncertainty, lens, direct,
             surprisal, attention, attribution
    missing  why a table cannot be had of this model, by the name of the table
    pairs    the ids of the two most likely next tokens of each prompt
    """

    run: Run
    tables: Mapping[str, pd.DataFrame]
    missing: Mapping[str, str]
    pairs: Sequence[tuple[int, int]]
    hooks: tuple[Hook, ...] = field(default=())

    @property
    def summary(self) -> pd.DataFrame:
        """One row for each prompt: see `scan`."""
        return self.tables["summary"]

    def texts(self, row: int) -> tuple[str, str]:
        """Returns the two most likely next tokens of a prompt as texts."""
        first, second = self.pairs[row]
        return self.run.lm.string(first), self.run.lm.string(second)

    def prompt(self, row: int) -> str:
        """Returns a prompt as a sentence quotes it; of a chat its messages."""
        return name_prompt(self.run.lm, prompt_text(self.run.lm, self.run.prompts[row]))

    def page(self, title: str = "") -> Report:
        """Returns a page with a summary, and with tables and figures for the first 10 prompts."""
        count = len(self.run.text)
        title = title or f"Scan: {self.prompt(0)}"
        parts: list[Content] = [Part(self.summary, "summary", "One row for each prompt.")]
        for row in range(min(count, MAX_PROMPTS)):
            parts += self._write_prompt(row)
        if self.missing:
            reasons = map("{}: {}".format, self.missing, self.missing.values())
            parts += ["# What is not available for this model", "\n".join(reasons)]
        page = report(title, *parts)
        data = []
        for name, table in self.tables.items():
            if name != "summary":
                data.append(Part(table, name, f"{name}, for all prompts"))
        return Report(page.title, page.parts, page.footer, tuple(data), page.formats)

    def _write_prompt(self, row: int) -> Iterator[Content]:
        yield f"# After “{self.prompt(row)}”"
        for section in self.sections(row):
            yield f"## {section.caption}"
            if section.figure is not None:
                yield Part(section.figure(), f"{section.name}_{row}_figure")
            yield Part(section.table, f"{section.name}_{row}", file=section.name)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the page, its figures and all tables to a folder. Returns the page's path."""
        return self.page().write(folder)

    def sections(self, row: int) -> Iterator[Section]:
        """Yields what a reader sees of each table, for one prompt."""
        first, second = self.texts(row)
        for name, describe in SECTIONS.items():
            if name in self.tables:
                table: Any = self.tables[name]
                part = table[table["row"] == row]  # with the attributes of the table
                if len(part):
                    yield describe(self, name, part, f"{first!r} rather than {second!r}")

    def __repr__(self) -> str:
        lines = [f"Scan({count_of(len(self.pairs), 'prompt')}; {', '.join(self.tables)})"]
        for number in range(min(3, len(self.pairs))):
            line = self.summary.iloc[number]
            lines.append(
                f"  {self.prompt(number)!r} → {line['token']!r} ({line['prob']:.1%}), "
                f"then {line['top2']!r} ({line['top2_prob']:.1%})"
            )
        calls = ("hk.show(scan.summary)", "scan.tables[name]", "scan.write(folder)")
        return describe_outcome("\n".join(lines), *calls)

    def _repr_html_(self) -> str:
        facts = {"tables": ", ".join(self.tables), "page": "scan.write(folder)"}
        title = f"Scan of {count_of(len(self.pairs), 'prompt')}"
        return render_html(title, {**facts, **self.missing}, first_rows(self.summary))


@check_arguments
def scan(
    lm: LM, prompts: Prompts, *hooks: Hook, top: int = 5, watch: Iterable[Token] | Token = ()
) -> Scan:
    """Returns what the model predicts after each prompt, how sure it is, and where it comes from.

    The result has tables of all prompts, and writes a page with figures. `summary` has one row for
    each prompt: row, token (the most likely next token), token_id, prob, top2 and top2_prob (the
    second), entropy (nats), scenario, since (the block from which the logit lens has the token
    first to the end), component and component_logit (the component that adds most to the token's
    logit minus that of the second), input_token and input_attribution (the token of the prompt with
    the largest attribution: gradient times input, in logits). `watch` are tokens that the tables
    have beside the `top` most likely ones.

    Hooks act as in `forward`. With hooks there is no attribution, which is of the model without
    them. A table that this model does not allow is left out; `missing` has the reason.

    >>> look = scan(lm, "The Eiffel Tower is in the city of")
    >>> look.summary["token"].tolist(), look.summary["since"].tolist()
    ([' Paris'], ['resid_post.28'])
    """
    check_integer(top, "top", least=1, meaning="how many next tokens to show,")
    watched = watched_ids(lm, watch)
    run = forward(lm, prompts, *hooks)
    tables = {
        "ranks": ranks(run, top=top, watch=watched),
        "uncertainty": uncertainty(run, pos=-1),
    }
    leading = ranks(run, top=2).groupby("row")["token_id"]
    pairs = [tuple(ids.tolist()[:2]) for _, ids in leading]
    request = _Request(lm, prompts, run, hooks, pairs, watched)
    missing = {}
    for name, compute in OPTIONAL_TABLES.items():
        try:
            tables[name] = compute(request)
        except (EmptySelection, MissingSite, Unsupported) as error:
            missing[name] = str(error)
    return Scan(run, {"summary": _summary(tables, pairs), **tables}, missing, pairs, hooks)


@dataclass(frozen=True, eq=False)
class _Request:
    """The arguments of a scan, its run, and the two most likely next tokens of each prompt."""

    lm: LM
    prompts: Any
    run: Run
    hooks: tuple[Hook, ...]
    pairs: Sequence[tuple[int, int]]
    watched: Sequence[int]

    @property
    def firsts(self) -> list[Any]:
        return [first for first, _ in self.pairs]

    @property
    def seconds(self) -> list[Any]:
        return [second for _, second in self.pairs]


def _lens(request: _Request) -> pd.DataFrame:
    """Returns each layer's first token, and its two candidates and the watched tokens there."""
    ids = list(dict.fromkeys((*request.firsts, *request.seconds, *request.watched)))
    table: Any = logit_lens(request.lm, request.prompts, *request.hooks, top=1, watch=ids)
    is_shown = table["rank"] == 1
    is_shown |= table["token_id"].isin(request.watched)
    for row, pair in enumerate(request.pairs):
        is_shown |= (table["row"] == row) & table["token_id"].isin(pair)
    return table[is_shown].reset_index(drop=True)


def _direct(request: _Request) -> pd.DataFrame:
    return direct_logits(request.run, request.firsts, against=request.seconds)


def _surprisal(request: _Request) -> pd.DataFrame:
    return surprisal(request.run, top=2)


def _attention(request: _Request) -> pd.DataFrame:
    """Returns how much of the last token's attention goes to each position.

    Columns: row, pos, token, token_id, mean (over all heads of all layers, 0 to 1), strongest (the
    largest value of a head), head (that head: LAYER.HEAD).
    """
    pattern = capture("pattern", pos=-1)
    run = forward(request.lm, request.prompts, *request.hooks, pattern, logits=False)
    names: list[str] = []
    heads_of_layers = []
    for site in run.sites:
        weights: Any = run[site][:, :, 0].double().cpu()  # [row, head, key]
        heads_of_layers.append(weights)
        layer: Any = site.layer  # pyright: ignore[reportAttributeAccessIssue]
        names += [f"{layer}.{head}" for head in range(weights.shape[1])]
    heads = torch.cat(heads_of_layers, dim=1)
    parts = []
    for row, length in enumerate(run.lengths):
        ids = run.tokens[row, run.mask[row]].tolist()
        largest = heads[row, :, :length].max(dim=0)
        columns = {
            "row": row,
            "pos": range(length),
            "token": list(map(request.lm.string, ids)),
            "token_id": ids,
            "mean": heads[row, :, :length].mean(dim=0).tolist(),
            "strongest": largest.values.tolist(),
            "head": list(map(names.__getitem__, largest.indices.tolist())),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _attribution(request: _Request) -> pd.DataFrame:
    if request.hooks:
        raise Unsupported("gradients are those of the model without hooks: leave the hooks out")
    metric = logit_diff(request.firsts, request.seconds)
    return token_attribution(request.lm, request.prompts, metric)


OPTIONAL_TABLES: Mapping[str, Callable[[_Request], pd.DataFrame]] = {  # some models lack them
    "lens": _lens,
    "direct": _direct,
    "surprisal": _surprisal,
    "attention": _attention,
    "attribution": _attribution,
}


def _summary(tables: Mapping[str, pd.DataFrame], pairs: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Returns one row for each prompt, with what is most important in each table."""
    sure = tables["uncertainty"].rename(columns={"top1": "token", "top1_prob": "prob"})
    table: Any = sure[["row", "token", "prob", "top2", "top2_prob", "entropy", "scenario"]].copy()
    table.insert(2, "token_id", [first for first, _ in pairs])
    if "lens" in tables:
        since: Any = lens_summary(tables["lens"]).set_index(["row", "token_id"])["since"]
        table["since"] = [since.get((row, first)) for row, (first, _) in enumerate(pairs)]
    if "direct" in tables:
        table = table.merge(_largest(tables["direct"], "component", "logit"), on="row", how="left")
    if "attribution" in tables:
        largest = _largest(tables["attribution"], "token", "attribution")
        names = {"token": "input_token", "token_attribution": "input_attribution"}
        table = table.merge(largest.rename(columns=names), on="row", how="left")
    return table


def _largest(table: Any, name: str, value: str) -> pd.DataFrame:
    """Returns the row of each prompt with the largest value: row, its name, and NAME_VALUE."""
    order = table.sort_values(value, ascending=False, kind="stable").drop_duplicates("row")
    return order[["row", name, value]].rename(columns={value: f"{name}_{value}"})


# ---- what a reader sees of each table


def leading_tokens(lens: pd.DataFrame, token_id: int) -> pd.DataFrame:
    """Returns the spans of layers in which one token has rank 1, in the order of the layers.

    Columns: layers, token, prob (in the last layer of the span), and rank: that of `token_id` in
    the first and in the last layer of the span.
    """
    table: Any = lens
    leaders = table[table["rank"] == 1].drop_duplicates("site")
    ranks_of_token = table[table["token_id"] == token_id].set_index("site")["rank"]
    leaders = leaders.assign(rank=leaders["site"].map(ranks_of_token))
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


def _ranks_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    return Section(name, "What comes next", table[["rank", "token", "prob", "logit"]])


def _uncertainty_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    columns = ["entropy", "perplexity", "margin", "top1_prob", "nucleus_90", "scenario"]
    return Section(name, "How sure it is (entropy in nats)", table[columns])


def _lens_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    first = scan.pairs[table["row"].iloc[0]][0]
    caption = (
        "The logit lens: what leads in which layers, and the rank of "
        f"{scan.run.lm.string(first)!r} there"
    )
    return Section(name, caption, leading_tokens(table, first), partial(figures.lens_map, table))


def _direct_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    caption = f"Which components say {choice}: {table['logit'].sum():.4g} of logit in all"
    largest: Any = largest_rows(table, "logit", MAX_COMPONENTS)[["component", "logit"]]
    return Section(name, caption, largest, partial(figures.logit_bars, table, top=12))


def _surprisal_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    mean_loss = f"{table['loss'].mean():.3g}"
    caption = f"What each token of the prompt cost (nats; {mean_loss} on average)"
    columns: Any = table[[*_position_columns(table), "loss", "rank", "alternatives"]]
    draw = partial(figures.surprisal_strip, table, row=table["row"].iloc[0])
    return Section(name, caption, columns, draw)


def _attention_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    caption = "What the last token attends to: over all heads, and the head that attends most"
    return Section(name, caption, table[["pos", "token", "mean", "strongest", "head"]])


def _attribution_section(scan: Scan, name: str, table: Any, choice: str) -> Section:
    caption = f"Which tokens speak for {choice} (gradient times input, in logits)"
    return Section(name, caption, table[[*_position_columns(table), "attribution"]])


def _position_columns(table: pd.DataFrame) -> list[str]:
    """Returns the columns that say where a token is, with its role in a chat."""
    return [name for name in ("pos", "role", "token") if name in table]


SECTIONS: Mapping[str, Callable[[Scan, str, Any, str], Section]] = {
    "ranks": _ranks_section,
    "uncertainty": _uncertainty_section,
    "lens": _lens_section,
    "direct": _direct_section,
    "surprisal": _surprisal_section,
    "attention": _attention_section,
    "attribution": _attribution_section,
}
