"""The sections of the page: what was found, put into words, tables and figures."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..hooks.base import Hook
from ..intervals import DRAWN
from ..model import LM
from ..prompts import Row, shortened
from ..reports import Content, Folded, Part
from ..typesetting import written
from .drawing import PANELS, means_of, rank_against_rank, through_layers, what_made_it
from .inside import most_moved
from .naming import Edit

SHIFT = ["token", "logit_before", "logit_after", "logit_delta", "prob_before", "prob_after", "prob_delta",
         "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip
WATCHED = [name for name in SHIFT if name not in ("token_id", "why")]
NORM = (
    "The final norm is in every part, with the scale that it had, so that parts before the edit change where the scale "
    "does. rest.L is what block L's stream got beside attention and MLP: an edit of it."
)
PARTS = 10  # components that are shown


@dataclass(frozen=True, eq=False)
class Found:
    """All that was measured: edits and controls, and the tables by the names of their files."""

    lm: LM
    rows: tuple[Row, ...]
    edits: list[Edit]
    controls: list[Edit]
    tables: dict[str, pd.DataFrame]
    ranks: dict[tuple[int, str], tuple[Any, Any]]  # of all tokens before and after, for each drawn prompt and edit
    refused: dict[str, str]

    def of(self, name: str, row: int, edit: str | None = None) -> pd.DataFrame:
        """The rows of a table that are about one prompt and edit; none where there is no table."""
        table = self.tables.get(name, pd.DataFrame())
        if table.empty:
            return table
        mine: Any = (
            table[table["row"] == row] if edit is None else table[(table["row"] == row) & (table["edit"] == edit)]
        )
        return mine.drop(columns=["row"] if edit is None else ["row", "edit"])


def beginning(found: Found, question: str, under: tuple[Hook, ...]) -> Iterable[Content]:
    """The question, what came of it in a sentence for each edit, and what was done."""
    count = len(found.rows)
    if question:
        yield question
    yield answer(found)
    beside = f" The baseline has {' + '.join(map(str, under))}." if under else ""
    yield "# The edits"
    yield Part(found.tables["edits"], "edits", f"What was done, over {count} prompt{'s' * (count > 1)}.{beside}")


def answer(found: Found) -> str:
    """What came of it, in a sentence for each edit."""
    return "\n".join(_headline(found, edit) for edit in found.edits)


def _rank(rank: float) -> str:
    return "NaN" if rank != rank else f"{int(rank):,}"


def _headline(found: Found, edit: Edit) -> str:
    """What an edit did to the first watched token after the first prompt, in a sentence."""
    watched = found.of("watched", 0, edit.name).iloc[0]
    far = found.of("distances", 0, edit.name).iloc[0]
    text = shortened(found.lm.text(found.rows[0]))
    ranks, probs = ([watched[f"{name}_{side}"] for side in ("before", "after")] for name in ("rank", "prob"))
    if ranks[0] == ranks[1]:
        goes = f"stays at rank {_rank(ranks[0])} (probability {probs[0]:.3g}, then {probs[1]:.3g})"
    else:
        goes = (
            f"goes from rank {_rank(ranks[0])} (probability {probs[0]:.3g}) to rank {_rank(ranks[1])} ({probs[1]:.3g})"
        )
    if far["top1_after"] is None or far["top1_before"] is None:
        return f"{edit.name}: after “{text}” the token {watched['token']} {goes}; the model's logits are NaN there."
    first = f"; first is {far['top1_after']}, and was {far['top1_before']}"
    if far["top1_after"] == far["top1_before"]:
        first = "" if ranks[1] == 1 else f"; first is still {far['top1_after']}"
    return f"{edit.name}: after “{text}” the token {watched['token']} {goes}{first}."


def over_all(found: Found) -> Iterable[Content]:
    """Means over the prompts, where there are several."""
    if "summary" not in found.tables:
        return
    count, summary = len(found.rows), found.tables["summary"]
    yield f"# Over {count} prompts"
    says = f"Means over {count} prompts with 95 % intervals. decades: log10 of rank before over rank after."
    caption = f"{says} A control stands beside its edit, the mean of its draws; its dot is hollow in the figure."
    yield Part(_brief(summary, ["edit", "control", "watched", "n"]), "summary_shown", caption, file="summary")
    few = count < DRAWN
    caption = "Small dots are the prompts." if few else "Intervals are of the mean."
    figure = means_of(summary, found.tables["watched"], title="What became more and less likely")
    yield Part(figure, "means", caption)
    far = found.tables["summary_distances"]
    caption = "kl: KL(before‖after) in nats. top1_changed: the part of the prompts with another first token."
    yield Part(_brief(far, ["edit", "control", "n"]), "distances_shown", caption, file="summary_distances")


def _brief(means: pd.DataFrame, places: list[str]) -> pd.DataFrame:
    """Each mean and its interval in one column, as text."""
    shown: Any = means[places].copy()
    for name in [name.removesuffix("_low") for name in means if str(name).endswith("_low")]:
        numbers = [means[f"{name}{end}"] for end in ("", "_low", "_high")]
        shown[name] = [
            written(mean) if pd.isna(low) else f"{mean:.3g}  [{low:.3g}, {high:.3g}]"
            for mean, low, high in zip(*numbers, strict=True)
        ]
    return shown


def of_prompt(found: Found, row: int, *, drawn: bool) -> Iterable[Content]:
    """All that is shown of one prompt."""
    yield f"# “{shortened(found.lm.text(found.rows[row]))}”"
    yield "## The watched tokens"
    says = "Every edit, and every control's first draw. The token that was first before stands here as well."
    yield Part(_watched(found, row), f"watched_{row}", f"Prompt {row}. {says}", file="watched")
    yield "## What rose and fell"
    for number, edit in enumerate(found.edits):
        table = pd.DataFrame(found.of("shifts", row, edit.name)[SHIFT])
        caption = f"{edit.name}: the first tokens before and after, the largest movers, and why each is here."
        yield Part(table, f"shifts_{row}_{number}", caption, file="shifts")
    watched = pd.DataFrame(found.of("watched", row)[["prob_before", "prob_after"]])
    if bool(watched.isna().to_numpy().any()):
        yield "The model's logits are NaN after this prompt, with an edit or without: there are no figures of it."
        drawn = False
    if drawn:
        yield from _drawn_ranks(found, row)
    yield "## Through the layers"
    if refused := found.refused["layers"]:
        yield f"There is no lens of this model: {refused}"
    elif drawn:
        first = [edit.name for edit in found.edits][:PANELS]
        figure = through_layers(found.of("layers", row), first, title="What each layer would say")
        says = "Logit lens: rank before (dashed) and after (drawn through). Shaded: blocks in which the edit acts."
        says += " An edit of the logits acts on what every layer would say."
        yield Part(figure, f"layers_{row}", f"{says} The table is layers.csv.")
    else:
        yield "The ranks at every layer are in layers.csv."
    yield from _why(found, row, drawn=drawn)
    yield from _texts(found, row)


def _watched(found: Found, row: int) -> pd.DataFrame:
    """Each token once, with every edit and control."""
    table = found.of("watched", row).drop_duplicates(["edit", "token_id"])
    order = {token: place for place, token in enumerate(dict.fromkeys(table["token_id"]))}
    places: Any = table["token_id"].map(lambda token: order[token])
    table = table.assign(_place=places).sort_values("_place", kind="stable")
    return pd.DataFrame(table[["token", "edit", *WATCHED[1:]]])


def _drawn_ranks(found: Found, row: int) -> Iterable[Content]:
    parts = {e.name: (found.of("shifts", row, e.name), *found.ranks[row, e.name]) for e in found.edits[:PANELS]}
    says = "Every token of the vocabulary, the darker the more; on the dashed line nothing moved, above it tokens rose."
    yield Part(rank_against_rank(parts, title="Rank against rank"), f"ranks_{row}", says)


def _why(found: Found, row: int, *, drawn: bool) -> Iterable[Content]:
    yield "## Why: the change as a sum"
    moved: dict[str, pd.DataFrame] = {}
    for number, edit in enumerate(found.edits):
        table = found.of("why", row, edit.name)
        if table.empty:
            yield f"{edit.name}: there is no sum. {found.refused[f'why {edit.name}']}"
            continue
        moved[edit.name] = most_moved(table, PARTS)
        sums = [table[f"logit_{when}"].sum() for when in ("before", "after", "delta")]
        caption = (
            f"{edit.name}: the logit of {table['token'].iloc[0]} is the sum of {len(table)} parts, {sums[0]:.4f} "
            f"before and {sums[1]:.4f} after: {sums[2]:+.4f}. Rounding left {_missed(table):.1e}. {NORM}"
        )
        yield Part(moved[edit.name], f"why_{row}_{number}", caption, file="why")
    if drawn and moved:
        some = dict(list(moved.items())[:PANELS])
        yield Part(what_made_it(some, title="What made the change"), f"why_bars_{row}", "The last bar is the sum.")


def _missed(why: pd.DataFrame) -> float:
    """What rounding left, at most."""
    rest: Any = why[why["kind"] == "residual"][["logit_before", "logit_after"]]
    return float(rest.abs().to_numpy().max())


def _texts(found: Found, row: int) -> Iterable[Content]:
    texts = found.of("texts", row)
    if not texts.empty:
        yield "## The text"
        shown: Any = texts[["edit", "parts_at", "both", "then_before", "then_after"]]
        says = "Greedy text, the same in both up to where it parts (a token, counted from 0), and how each goes on."
        words = {name: shown[name].map(repr) for name in ("both", "then_before", "then_after")}
        yield Part(shown.assign(**words), f"texts_{row}", says, file="texts")


def made_again(found: Found, about: dict[str, Any]) -> Iterable[Content]:
    """The model, the versions, and the hooks as JSON."""
    yield "# How to make it again"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield (
        f"Model {about['model']} ({about['class']}, {', '.join(about['dtype'])}, {about['device']}); "
        f"seed {about['seed']}.\n{versions}.\n"
        "about.json has all of it, the hooks with their tensors; hk.Hook.from_json reads them back."
    )
    every = {edit.name: edit.hooks for edit in (*found.edits, *found.controls) if edit.draw == 0}
    for name, hooks in every.items():
        texts = [json.dumps(json.loads(hook.to_json(tensors="digest")), indent=1, ensure_ascii=False) for hook in hooks]
        yield Folded(f"{name}, as JSON", "\n".join(texts))
