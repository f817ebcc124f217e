"""What `hk.token_shifts` returns, and its page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from ...display import count_of, describe_outcome, first_rows, render_html
from ...figures.reports import token_shares
from ...tables import intervals
from ..comparison_page import compose_page, describe_model, indented_json, write_settings
from ..page import Report
from ..parts import Content, Part

SHOWN = 20  # tokens of each table on the page
PAGE_COLUMNS = {
    "promoted": ["token", "promoted", "share_promoted", "control_share_promoted",
                 "logprob_delta", "rank_delta", "token_id"],
    "demoted": ["token", "demoted", "share_demoted", "control_share_demoted",
                "logprob_delta", "rank_delta", "token_id"],
}  # fmt: skip
CAPTIONS = {"token_shifts": "every token of the vocabulary", "examples": "where tokens moved most"}


@dataclass(frozen=True, eq=False, repr=False)
class TokenShifts:
    """Which tokens moved over a corpus. `token_shifts` returns it. Tables are plain DataFrames.

    Deltas are after minus before; rank_delta < 0 means that the token rose.

    table     one row for each token of the vocabulary, those first whose share among the promoted
              is furthest above the control's: token_id, token; promoted and demoted, the numbers of
              positions at which it was among the `top` tokens that rose or fell most;
              share_promoted and share_demoted, the shares of the positions; logprob_delta and
              rank_delta, means over positions (rank_delta over one in `every`). Each of these four
              has _low and _high, the 95 % interval over texts, and stands beside the control's,
              control_share_promoted and so on, whose _low and _high are the limits between which
              one more draw of the control is in 95 of 100 cases
    examples  the strongest positions of the first tokens of each direction: token_id, token, moved
              ("promoted", "demoted"), logprob_delta, text, piece, pos, context (the last tokens of
              the text up to this position)
    summary   one row: texts, left_out (texts without a position), positions, ranked (positions with
              ranks), kl (KL(before‖after), nats, mean over positions), kl_low, kl_high, draws,
              control_kl with _low and _high
    names     what is compared: before and after
    about     how it was made, as plain values
    """

    table: pd.DataFrame
    examples: pd.DataFrame
    summary: pd.DataFrame
    names: tuple[str, str]
    about: Mapping[str, Any]

    def furthest(self, name: Literal["promoted", "demoted"]) -> pd.DataFrame:
        """Returns the table with the tokens first whose share is furthest above the control's."""
        return furthest(self.table, name)

    def page(self, *, title: str = "", question: str = "") -> Report:
        """Returns a page of the tokens that moved most, with their contexts.

        `write` writes the whole table as CSV and JSON beside it.
        """
        parts = [*_write_tokens(self), *_write_examples(self), *_write_settings(self)]
        about = {
            "title": title or f"Which tokens moved: {self.names[1]}"[:120],
            "question": question,
            "answer": _write_answer(self),
            **self.about,
        }
        tables = {"token_shifts": self.table, "examples": self.examples}
        footer = (
            f"Before is {self.names[0]}, after is {self.names[1]}; deltas are after minus before. "
            "Rank 1 is the likeliest."
        )
        return compose_page(parts, tables, CAPTIONS, about, footer)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the page and the tables to a folder. Returns the page's path."""
        return self.page().write(folder)

    def _repr_html_(self) -> str:
        columns = ("token", "share_promoted", "control_share_promoted", "logprob_delta")
        facts = {"after": self.names[1], "KL": f"{self.summary['kl'].iloc[0]:.3g} nats"}
        return render_html("TokenShifts", facts, first_rows(self.table, *columns))

    def __repr__(self) -> str:
        counts, first = self.summary.iloc[0], ""
        if self.table["promoted"].iloc[0]:
            row = self.table.iloc[0]
            first = f"; {row['token']!r} is promoted at {row['share_promoted']:.1%}"
        text = (
            f"TokenShifts({self.names[1]}: {int(counts['positions']):,} positions of "
            f"{count_of(int(counts['texts']), 'text')}, KL {counts['kl']:.3g} nats{first})"
        )
        return describe_outcome(text, "shifts.table", "shifts.examples", "shifts.write(folder)")


def _write_answer(shifts: TokenShifts) -> str:
    counts = shifts.summary.iloc[0]
    where = f"{int(counts['positions']):,} positions of {count_of(int(counts['texts']), 'text')}"
    sentences = [
        f"{where} were compared.",
        _write_first(shifts, "promoted", "rose"),
        _write_first(shifts, "demoted", "fell"),
    ]
    if np.isinf(counts["kl"]):
        sentences.append("A token that was possible is impossible now, so the KL has no end.")
        return " ".join(sentences)
    kl = f"The predictions move by {counts['kl']:.3g} nats a position on average (KL)"
    if counts["draws"]:
        kl += f", and by {counts['control_kl']:.3g} under the control"
    return " ".join([*sentences, f"{kl}."])


def _write_first(shifts: TokenShifts, name: str, verb: str) -> str:
    """The sentence on the token that is furthest above the control in one direction."""
    first = furthest(shifts.table, name).iloc[0]
    if not first[name]:
        return f"No token {verb} more than the others."
    sentence = (
        f"The token {first['token']!r} is among the {shifts.about['top']} that {verb} most at "
        f"{first[f'share_{name}']:.1%} of them"
    )
    if shifts.summary["draws"].iloc[0]:
        sentence += f", and at {first[f'control_share_{name}']:.2%} under the control"
    return f"{sentence}."


def furthest(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Returns the table with the tokens first whose share is furthest above the control's."""
    share = f"share_{name}"
    excess = table[share] - table[f"control_{share}"].fillna(0.0)
    toward = table["logprob_delta"] * (-1 if name == "promoted" else 1)
    order = np.lexsort((table["token_id"], toward, -excess))
    return table.iloc[order]


def _write_tokens(shifts: TokenShifts) -> Iterable[Content]:
    top, counts = shifts.about["top"], shifts.summary.iloc[0]
    yield Part(shifts.summary, "summary", "All positions; KL in nats.")
    has_few_texts = counts["texts"] < intervals.MIN_FOR_INTERVAL
    if has_few_texts:
        yield (
            f"There are fewer than {intervals.MIN_FOR_INTERVAL} texts. The positions of a text "
            "depend on each other, so an interval over so few texts says little, and the figure "
            "has none."
        )
    if shifts.about["control"]:
        yield f"The control: {shifts.about['control']}"
    for name, verb in (("promoted", "rose"), ("demoted", "fell")):
        table: Any = furthest(shifts.table, name)
        table = table[table[name] > 0].head(SHOWN)
        yield f"# The tokens that {verb}"
        if table.empty:
            yield f"No token {verb} more than the others at any position."
            continue
        caption = (
            f"{name}: the number of positions at which the token is among the {top} that {verb} "
            "most. The share of the control stands beside it. The intervals are in "
            "token_shifts.csv."
        )
        selected = pd.DataFrame(table[PAGE_COLUMNS[name]])
        yield Part(selected, f"tokens_{name}", caption, file="token_shifts")
        if has_few_texts:
            table = table.assign(**dict.fromkeys(table.filter(regex="_(low|high)$"), np.nan))
        figure = token_shares(table, name, top, title=f"The tokens that {verb} most often")
        caption = "Grey: the control, and where one more draw of it would be in 95 of 100 cases."
        yield Part(figure, f"shares_{name}", caption)


def _write_examples(shifts: TokenShifts) -> Iterable[Content]:
    examples: Any = shifts.examples
    if examples.empty:
        return
    yield "# In which contexts"
    order: Any = examples.groupby("moved", sort=False)["token_id"].transform(_ordinals)
    selected = examples[order < SHOWN // 2]
    selected = selected[["token", "moved", "logprob_delta", "context", "text", "pos"]]
    caption = (
        "The strongest positions of each token, at most one in each text. The token comes after "
        "the context."
    )
    yield Part(pd.DataFrame(selected), "examples_shown", caption, file="examples")


def _ordinals(values: pd.Series) -> np.ndarray:
    """The place of each value among the different ones."""
    return pd.factorize(values)[0]


def _write_settings(shifts: TokenShifts) -> Iterable[Content]:
    about, hooks = shifts.about, {}
    for when in ("before", "after"):
        if about[when]["hooks"]:
            hooks[f"Hooks {when}"] = indented_json(about[when]["hooks"])
    models = f"Before: {describe_model(about['before'])}.\nAfter: {describe_model(about['after'])}"
    return write_settings(models, about, hooks)
