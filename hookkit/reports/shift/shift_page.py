"""The sections of the page: what was found, put into words, tables and figures.

hk.shift_report: one page on what edits did to what a model says next.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ...arguments import checks_arguments, read_tokens, whole_number
from ...errors import BadHook, OutOfRange
from ...figures.shift import PANELS, means_of, rank_against_rank, through_layers, what_made_it
from ...hooks.base import Hook
from ...models.lm import LM, Token
from ...models.prompts import Prompts, Row, as_batch, shortened
from ...models.provenance import about_model, git_commit
from ...sweeps.summary import over_prompts
from ...tables.intervals import DRAWN
from ...tables.rank_tables import shift_of
from ..page import Content, Folded, Part, Report, report
from ..typesetting import written
from .before_after import (
    NextTokenLogits,
    answered,
    distances_of,
    resuming,
    texts_of,
    watched_of,
    with_deltas,
)
from .inside import layers_of, looks_of, most_moved, why_of
from .named_edits import Controls, Edit, Hooks, controls_of, edits_of, literal, table_of, together

SHIFT = ["token", "logit_before", "logit_after", "logit_delta", "prob_before", "prob_after", "prob_delta",
         "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip
WATCHED = [name for name in SHIFT if name not in ("token_id", "why")]
NORM = (
    "The final norm is in every part, with the scale that it had, so that parts before the edit change where the scale "
    "does. rest.L is what block L's stream got beside attention and MLP: an edit of it."
)
PARTS = 10  # components that are shown


@dataclass(frozen=True, eq=False)
class ShiftTables:
    """All that was measured: edits and controls, and the tables by the names of their files."""

    lm: LM
    rows: tuple[Row, ...]
    edits: list[Edit]
    controls: list[Edit]
    tables: dict[str, pd.DataFrame]
    ranks: dict[
        tuple[int, str], tuple[Any, Any]
    ]  # of all tokens before and after, for each drawn prompt and edit
    refused: dict[str, str]

    def of(self, name: str, row: int, edit: str | None = None) -> pd.DataFrame:
        """The rows of a table that are about one prompt and edit; none where there is no table."""
        table = self.tables.get(name, pd.DataFrame())
        if table.empty:
            return table
        mine: Any = (
            table[table["row"] == row]
            if edit is None
            else table[(table["row"] == row) & (table["edit"] == edit)]
        )
        return mine.drop(columns=["row"] if edit is None else ["row", "edit"])


def beginning(found: ShiftTables, question: str, under: tuple[Hook, ...]) -> Iterable[Content]:
    """The question, what came of it in a sentence for each edit, and what was done."""
    count = len(found.rows)
    if question:
        yield question
    yield answer(found)
    beside = f" The baseline has {' + '.join(map(str, under))}." if under else ""
    yield "# The edits"
    yield Part(
        found.tables["edits"],
        "edits",
        f"What was done, over {count} prompt{'s' * (count > 1)}.{beside}",
    )


def answer(found: ShiftTables) -> str:
    """What came of it, in a sentence for each edit."""
    return "\n".join(_headline(found, edit) for edit in found.edits)


def _rank(rank: float) -> str:
    return "NaN" if rank != rank else f"{int(rank):,}"


def _headline(found: ShiftTables, edit: Edit) -> str:
    """What an edit did to the first watched token after the first prompt, in a sentence."""
    watched = found.of("watched", 0, edit.name).iloc[0]
    far = found.of("distances", 0, edit.name).iloc[0]
    text = shortened(found.lm.text(found.rows[0]))
    ranks, probs = (
        [watched[f"{name}_{side}"] for side in ("before", "after")] for name in ("rank", "prob")
    )
    if ranks[0] == ranks[1]:
        goes = f"stays at rank {_rank(ranks[0])} (probability {probs[0]:.3g}, then {probs[1]:.3g})"
    else:
        goes = f"goes from rank {_rank(ranks[0])} (probability {probs[0]:.3g}) to rank {_rank(ranks[1])} ({probs[1]:.3g})"
    if far["top1_after"] is None or far["top1_before"] is None:
        return f"{edit.name}: after “{text}” the token {watched['token']} {goes}; the model's logits are NaN there."
    first = f"; first is {far['top1_after']}, and was {far['top1_before']}"
    if far["top1_after"] == far["top1_before"]:
        first = "" if ranks[1] == 1 else f"; first is still {far['top1_after']}"
    return f"{edit.name}: after “{text}” the token {watched['token']} {goes}{first}."


def over_all(found: ShiftTables) -> Iterable[Content]:
    """Means over the prompts, where there are several."""
    if "summary" not in found.tables:
        return
    count, summary = len(found.rows), found.tables["summary"]
    yield f"# Over {count} prompts"
    says = f"Means over {count} prompts with 95 % intervals. decades: log10 of rank before over rank after."
    caption = f"{says} A control stands beside its edit, the mean of its draws; its dot is hollow in the figure."
    yield Part(
        _brief(summary, ["edit", "control", "watched", "n"]),
        "summary_shown",
        caption,
        file="summary",
    )
    few = count < DRAWN
    caption = "Small dots are the prompts." if few else "Intervals are of the mean."
    figure = means_of(summary, found.tables["watched"], title="What became more and less likely")
    yield Part(figure, "means", caption)
    far = found.tables["summary_distances"]
    caption = "kl: KL(before‖after) in nats. top1_changed: the part of the prompts with another first token."
    yield Part(
        _brief(far, ["edit", "control", "n"]), "distances_shown", caption, file="summary_distances"
    )


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


def of_prompt(found: ShiftTables, row: int, *, drawn: bool) -> Iterable[Content]:
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


def _watched(found: ShiftTables, row: int) -> pd.DataFrame:
    """Each token once, with every edit and control."""
    table = found.of("watched", row).drop_duplicates(["edit", "token_id"])
    order = {token: place for place, token in enumerate(dict.fromkeys(table["token_id"]))}
    places: Any = table["token_id"].map(lambda token: order[token])
    table = table.assign(_place=places).sort_values("_place", kind="stable")
    return pd.DataFrame(table[["token", "edit", *WATCHED[1:]]])


def _drawn_ranks(found: ShiftTables, row: int) -> Iterable[Content]:
    parts = {
        e.name: (found.of("shifts", row, e.name), *found.ranks[row, e.name])
        for e in found.edits[:PANELS]
    }
    says = "Every token of the vocabulary, the darker the more; on the dashed line nothing moved, above it tokens rose."
    yield Part(rank_against_rank(parts, title="Rank against rank"), f"ranks_{row}", says)


def _why(found: ShiftTables, row: int, *, drawn: bool) -> Iterable[Content]:
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
        yield Part(
            what_made_it(some, title="What made the change"),
            f"why_bars_{row}",
            "The last bar is the sum.",
        )


def _missed(why: pd.DataFrame) -> float:
    """What rounding left, at most."""
    rest: Any = why[why["kind"] == "residual"][["logit_before", "logit_after"]]
    return float(rest.abs().to_numpy().max())


def _texts(found: ShiftTables, row: int) -> Iterable[Content]:
    texts = found.of("texts", row)
    if not texts.empty:
        yield "## The text"
        shown: Any = texts[["edit", "parts_at", "both", "then_before", "then_after"]]
        says = "Greedy text, the same in both up to where it parts (a token, counted from 0), and how each goes on."
        words = {name: shown[name].map(repr) for name in ("both", "then_before", "then_after")}
        yield Part(shown.assign(**words), f"texts_{row}", says, file="texts")


def made_again(found: ShiftTables, about: dict[str, Any]) -> Iterable[Content]:
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
        texts = [
            json.dumps(json.loads(hook.to_json(tensors="digest")), indent=1, ensure_ascii=False)
            for hook in hooks
        ]
        yield Folded(f"{name}, as JSON", "\n".join(texts))


ALL = ("csv", "json", "md", "tex")
DRAWS = 5  # of a random control, each a forward over all prompts
INLINE = 200_000  # letters of a hook in JSON, up to which its tensors are written out
MOVED = ["logit_delta", "logprob_delta", "prob_delta", "decades"]
DISTANCES = ["kl", "entropy_delta", "top1_changed"]


@checks_arguments
def shift_report(
    lm: LM,
    prompts: Prompts,
    *edits: Hook | Mapping[str, Hooks],
    baseline: Hooks = (),
    controls: Controls = None,
    draws: int | None = None,
    watch: Iterable[Token] | Token = (),
    top: int = 10,
    heads: bool = False,
    generate: int = 0,
    shown: int = 3,
    drawn: int = 1,
    title: str = "",
    question: str = "",
    seed: int = 0,
) -> Report:
    """A page on what edits did to what the model says next: which tokens rose and fell, where inside, and why.

    `edits` are hooks, which act together, or one mapping {name: hook or hooks}. `baseline` are hooks of what they are
    compared with, nothing unless given. `controls` is "random" (for each edit changes of the same size at the same
    places, in random directions, drawn `draws` times: 5 unless given) or a mapping like that of edits. All is about the
    token after each prompt; with `generate` also about so many tokens of greedy text.

    Every prompt has its `watch`ed tokens, those that hooks name, and the token that was first. The first `shown`
    prompts have the `top` tokens and largest movers, the logit lens, and the exact sum of one token's change over
    components (with `heads` over heads): the first that is watched or named, else the one that came first. The first
    `drawn` have figures. Each edit and control takes one forward over all prompts, which are one batch; with many
    prompts it begins at the first block that the edit touches, where the model allows it.

    `tables` has edits, shifts, watched, distances, and where they can be made layers, why, texts, summary and
    summary_distances (means over prompts, of a control over its draws too, with the intervals of `over_prompts`);
    `write` writes each as CSV, JSON, Markdown and LaTeX, and about.json. Where a model allows no lens or no sum, the
    page says why.

    >>> made = shift_report(lm, "The capital of France is", force(" coffee"), watch=" Paris", drawn=0)
    >>> made.tables["watched"][["watched", "rank_before", "rank_after"]]
              watched  rank_before  rank_after
    0        ' Paris'            1           2
    1       ' coffee'         8827           1
    2  what was first            1           2
    """
    for name, value, least in (
        ("top", top, 1),
        ("generate", generate, 0),
        ("shown", shown, 1),
        ("drawn", drawn, 0),
    ):
        whole_number(value, name, least=least)
    named, under = edits_of(edits), together(baseline, "the baseline")
    if draws is not None and controls != "random":
        raise BadHook(f"draws={draws!r} goes with controls='random': other controls are not drawn")
    count = DRAWS if draws is None else draws
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OutOfRange(
            f"draws={draws!r}: give how many times a random control is drawn, at least 1"
        )
    beside = controls_of(controls, named, seed, count)
    if len({edit.name for edit in named}) < len(named):
        raise BadHook("two edits have one name: names stand once")
    rows = as_batch(lm, prompts).rows
    watched = [lm.token(token) for token in read_tokens(watch, "watch")]
    tokens = list(dict.fromkeys([*watched, *(i for edit in named for i in edit.named(lm))]))
    with torch.no_grad():
        found = _measured(
            lm, rows, under, named, beside, tokens, top, heads, min(shown, len(rows)), drawn
        )
        if generate:
            found.tables["texts"] = texts_of(lm, rows, under, named, generate)
    _sum_up(found, seed)
    settings = {
        "top": top,
        "heads": heads,
        "generate": generate,
        "shown": shown,
        "drawn": drawn,
        "seed": seed,
    }
    title, kind = title or "What moved, and why", controls if isinstance(controls, str) else None
    about = {
        "title": title,
        "question": question,
        "answer": answer(found),
        **_about(
            found, under, tokens, settings | {"controls": kind, "draws": count if kind else None}
        ),
    }
    parts: list[Content] = [*beginning(found, question, under), *over_all(found)]
    for row in range(min(shown, len(rows))):
        parts += of_prompt(found, row, drawn=row < drawn)
    parts += made_again(found, about)
    page = report(title, *parts, footer="Deltas are after minus before. Rank 1 is the likeliest.")
    return _with_files(page, found, about)


def _measured(
    lm: LM, rows: tuple[Row, ...], under: tuple[Hook, ...], edits: list[Edit], controls: list[Edit], watch: list[int],
    top: int, heads: bool, shown: int, drawn: int,
) -> ShiftTables:  # fmt: skip
    looks = looks_of(lm, heads=heads)
    every_edit = [*edits, *controls]
    later = resuming(lm, rows, [] if under else [edit.hooks for edit in every_edit])
    with later.noting():
        was = answered(lm, rows, under, None, looks.sites, shown)
    edited: list[NextTokenLogits] = []
    parts: dict[str, list[pd.DataFrame]] = {"shifts": [], "watched": [], "distances": [], "why": []}
    known: dict[tuple[int, ...], pd.DataFrame] = {}
    ranks, refused, every = {}, {}, torch.arange(lm.n_tokens or was.logits.shape[1])
    before = [was.said(row) for row in range(shown)]
    for place, edit in enumerate(every_edit):
        start, sites = later.starts.get(place, 0), [] if edit.control else looks.sites
        with later.resumed(start):
            now = answered(lm, rows, edit.hooks, edit, sites, shown, start, was.run.kept)
        parts["watched"].append(watched_of(was, now, watch))
        parts["distances"].append(distances_of(was, now))
        if edit.control:
            continue
        after = [now.said(row) for row in range(shown)]
        pairs = list(zip(before, after, strict=True))
        parts["shifts"].append(_shifts(shift_of(pairs, top, 5, watch, edit.named(lm)), now))
        for row in range(min(drawn, shown)):
            ranks[row, edit.name] = (
                before[row].ranks(every).numpy(),
                after[row].ranks(every).numpy(),
            )
        told = [watch[0] if watch else now.first[row] for row in range(shown)]
        why, refused[f"why {edit.name}"] = why_of(was, now, told, looks, known)
        parts["why"].append(why)
        edited.append(NextTokenLogits(edit, now.run, now.logits[:shown]))
    tables = {"edits": table_of([*edits, *controls])}
    tables |= {name: _joined(found) for name, found in parts.items()}
    tables["layers"], refused["layers"] = layers_of(was, edited, rows, looks, watch, shown)
    return ShiftTables(lm, rows, edits, controls, tables, ranks, refused)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    some = [table for table in tables if not table.empty]
    return pd.concat(some, ignore_index=True) if some else pd.DataFrame()


def _shifts(table: pd.DataFrame, now: NextTokenLogits) -> pd.DataFrame:
    """`rank_shift` with the edit's name, and with parts of characters as bytes."""
    assert now.edit is not None
    table = with_deltas(
        table.assign(edit=now.edit.name, token=[literal(now.lm, i) for i in table["token_id"]])
    )
    first = ["row", "pos", "edit"]
    return pd.DataFrame(
        table[[*first, *(name for name in table if name not in (*first, "why")), "why"]]
    )


def _sum_up(found: ShiftTables, seed: int) -> None:
    if len(found.rows) < 2:
        return
    watched, distances = found.tables["watched"], found.tables["distances"]
    found.tables["summary"] = over_prompts(
        watched, by=["edit", "control", "watched"], values=MOVED, seed=seed
    )
    found.tables["summary_distances"] = over_prompts(
        distances, by=["edit", "control"], values=DISTANCES, seed=seed
    )


def _about(
    found: ShiftTables, under: tuple[Hook, ...], watch: Sequence[int], settings: dict[str, Any]
) -> dict[str, Any]:
    every: dict[str, tuple[Hook, ...]] = {}
    for edit in (*found.edits, *found.controls):  # the draws of a control one after the other
        every[edit.name] = (*every.get(edit.name, ()), *edit.hooks)
    hooks = {
        name: [_json(hook) for hook in hooks]
        for name, hooks in {"baseline": under, **every}.items()
    }
    prompts = [found.lm.text(row) for row in found.rows]
    made = {"hooks": hooks, "prompts": prompts, "tokens": [list(row) for row in found.rows]}
    return {
        **about_model(found.lm),
        "git_commit": git_commit(),
        "watch": list(watch),
        **settings,
        **made,
    }


def _json(hook: Hook) -> Any:
    """A hook with its tensors, or with their hashes where they are large."""
    whole = hook.to_json()
    return json.loads(whole if len(whole) <= INLINE else hook.to_json(tensors="digest"))


def _with_files(page: Report, found: ShiftTables, about: dict[str, Any]) -> Report:
    captions = {
        "shifts": "first tokens before and after, and movers", "watched": "watched tokens of every prompt",
        "distances": "how far every prompt's distribution moved", "layers": "the logit lens before and after",
        "why": "the logit's parts before and after", "texts": "what was written",
        "summary": "means of the watched tokens", "summary_distances": "means of the distances",
    }  # fmt: skip
    data = [
        Part(t, name, captions[name])
        for name, t in found.tables.items()
        if name in captions and not t.empty
    ]
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    return Report(page.title, page.parts, page.footer, tuple(data), ALL, {"about.json": text})
