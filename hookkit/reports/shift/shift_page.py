"""`hk.shift_report`: a page on what edits did to the tokens that a model predicts next.

`shift_report` measures, by `shift_tables`, and writes the sections of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...arguments import check_arguments, check_integer
from ...display import count_of
from ...errors import Unsupported
from ...figures import reports as figures
from ...hooks.base import Hook
from ...hooks.logits import named_tokens
from ...models.lm import LM
from ...models.prompt_row import row_as_json
from ...models.prompts import Prompts, as_batch
from ...models.provenance import about_model, git_commit
from ...models.tokens import turn_texts
from ...models.words import WordLike
from ...tables.intervals import MIN_FOR_INTERVAL
from ...tables.rank_tables import watched_ids
from ...tables.show import largest_rows
from ..comparison_page import (
    SHIFT_COLUMNS,
    compose_page,
    describe_model,
    hook_as_json,
    indented_json,
    write_settings,
)
from ..page import Report
from ..parts import Content, Part
from ..typesetting import format_value
from . import before_after
from .headline import FEW_PROMPTS, Headline, control_table
from .inside import feature_sites, most_moved
from .named_edits import (
    Controls,
    Edit,
    Hooks,
    as_edit_hooks,
    count_draws,
    named_controls,
    named_edits,
)
from .shift_tables import DrawRequest, ShiftTables, add_means, measure

NUMBER_COLUMNS = SHIFT_COLUMNS[1:-2]  # without token, why and token_id
NORM_NOTE = (
    "The final norm is in every part, with the scale that it had, so that parts before the edit "
    "change where the scale does. rest.L is what block L's stream got beside attention and MLP: an "
    "edit of it."
)
COMPONENTS = 10  # that are shown by name
LONGEST_JSON = 200_000  # letters of a hook in JSON; a longer one has its tensors as digests
CAPTIONS = {
    "shifts": "first tokens before and after, and movers",
    "watched": "watched tokens of every prompt",
    "distances": "how far every prompt's distribution moved",
    "why": "the logit's parts before and after",
    "features": "the logit by the features of dictionaries, before and after",
    "layers": "the logit lens before and after",
    "texts": "what was written",
    "against_control": "every edit beside the draws of its control",
    "summary": "means of the watched tokens",
    "summary_distances": "means of the distances",
}


def _write_opening(measured: ShiftTables) -> Iterable[Content]:
    n_prompts = len(measured.rows)
    yield "# The edits"
    plural = "s" if n_prompts > 1 else ""
    caption = f"What was done, over {n_prompts} prompt{plural}."
    if measured.base_hooks:
        caption += f" Every run has the base hooks {' + '.join(map(str, measured.base_hooks))}."
    yield Part(measured.tables["edits"], "edits", caption)


def _write_headline(measured: ShiftTables, edit: Edit) -> str:
    """The sentences about one edit over all prompts, beside its control."""
    watched: Any = measured.tables["watched"]
    distances: Any = measured.tables["distances"]
    watched = watched[watched["edit"] == edit.name]
    first = watched["watched"].iloc[0]
    control, description = None, ""
    table: Any = measured.tables["against_control"]
    if not table.empty:
        is_shown = (table["edit"] == edit.name) & (table["watched"] == first)
        rows = table[is_shown & (table["measure"] == "logprob_delta")].to_dict("records")
        control = rows[0] if rows else None
    for drawn in measured.controls:
        if drawn.control == edit.name:
            description = drawn.description
    return Headline(
        edit.name,
        watched[watched["watched"] == first],
        distances[distances["edit"] == edit.name],
        control,
        description,
        measured.refusals.get(f"control {edit.name}", ""),
        measured.prompt(0),
    ).text()


def _write_controls(measured: ShiftTables) -> Iterable[Content]:
    """The section of the random controls."""
    table = measured.tables["against_control"]
    if table.empty:
        return
    n_prompts = len(measured.rows)
    yield "# Beside the control"
    kinds: dict[str, list[str]] = {}
    for edit in measured.controls:
        if edit.draw == 0 and edit.description:
            kinds.setdefault(edit.description, []).append(edit.control)
    for description, names in kinds.items():
        yield f"The control of {', '.join(names)}: {description}."
    yield (
        "An edit that is special differs from its control. The interval of the difference is over "
        "prompts and draws. If an edit is only one more draw, the interval excludes 0 in 5 of 100 "
        "experiments."
    )
    if n_prompts < MIN_FOR_INTERVAL:
        yield FEW_PROMPTS
    caption = f"Means over {count_of(n_prompts, 'prompt')} of each edit and of its control."
    yield Part(control_table(table), "control_shown", caption, file="against_control")


def _write_means(measured: ShiftTables) -> Iterable[Content]:
    if "summary" not in measured.tables:
        return
    n_prompts, summary = len(measured.rows), measured.tables["summary"]
    yield f"# Over {n_prompts} prompts"
    with_what = "with 95 % intervals"
    if n_prompts < MIN_FOR_INTERVAL:
        with_what = "with the values of the prompts in brackets"
    caption = (
        f"Means over {n_prompts} prompts {with_what}. log10_rank_ratio: log10 of rank before over "
        "rank after, 1 for a rise from rank 100 to rank 10."
    )
    watched = measured.tables["watched"]
    table = _merge_intervals(summary, watched, ["edit", "watched"])
    yield Part(table, "summary_shown", caption, file="summary")
    # The points of a random control are its draws, and those of an edit the prompts.
    is_random = ~watched["control"].isin(["", "all"])
    points = watched.assign(row=watched["row"].where(~is_random, watched["draw"]))
    figure = figures.mean_changes(summary, points, title="What became more and less likely")
    caption = (
        "Mean change of each watched token's log-probability, with its 95 % interval. A control is "
        "hollow: the mean of its draws, and the line on which 95 % of further draws lie."
    )
    if n_prompts < MIN_FOR_INTERVAL:
        caption = (
            "Mean change of each watched token's log-probability. Small dots are the prompts. A "
            "control is hollow: the mean of its draws, which are its small dots."
        )
    yield Part(figure, "means", caption)
    caption = (
        "kl: KL(before‖after) in nats. top1_changed: the part of the prompts with another first "
        "token."
    )
    distances = measured.tables["distances"]
    table = _merge_intervals(measured.tables["summary_distances"], distances, ["edit"])
    yield Part(table, "distances_shown", caption, file="summary_distances")


def _merge_intervals(means: pd.DataFrame, values: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Each mean and its interval in one column, as text; of few prompts their values.

    `values` is the table of which these are the means. Random controls are left out.
    """
    of_edits: Any = means[means["control"].isin(["", "all"])].reset_index(drop=True)
    values_of: Any = dict(list(values.groupby(keys, sort=False)))
    table = of_edits[keys].copy()
    for name in means.columns:
        if f"{name}_low" not in means:
            continue
        texts = []
        for row in of_edits.to_dict("records"):
            if row["n"] < MIN_FOR_INTERVAL:
                points = values_of[tuple(map(row.__getitem__, keys))][name].astype(float)
                texts.append(_write_points(row[name], points))
            else:
                texts.append(_write_interval(row[name], row[f"{name}_low"], row[f"{name}_high"]))
        table[name] = texts
    return table


def _write_interval(mean: float, low: float, high: float) -> str:
    return format_value(mean) if np.isnan(low) else f"{mean:.3g}  [{low:.3g}, {high:.3g}]"


def _write_points(mean: float, points: Iterable[float]) -> str:
    return f"{format_value(mean)}  ({', '.join(map(format_value, points))})"


def _write_prompt(measured: ShiftTables, row: int, *, with_figures: bool) -> Iterable[Content]:
    """The section of one prompt, with figures if `with_figures`."""
    yield f"# “{measured.prompt(row)}”"
    turns = turn_texts(measured.lm, measured.rows[row])
    if turns:
        caption = "The messages of the chat, without the tokens of its template."
        yield Part(pd.DataFrame(turns, columns=["role", "text"]), f"chat_{row}", caption)
    yield "## The watched tokens"
    caption = (
        f"Prompt {row}. Every edit, and every control's first draw. The token that was first "
        "before stands here as well."
    )
    table = measured.of("watched", row).drop_duplicates(["edit", "token_id"])
    order, _ = pd.factorize(table["token_id"])
    table = table.assign(_order=order).sort_values("_order", kind="stable")
    table = pd.DataFrame(table[["token", "edit", *NUMBER_COLUMNS]])
    yield Part(table, f"watched_{row}", caption, file="watched")
    yield "## What rose and fell"
    for number, edit in enumerate(measured.edits):
        table = pd.DataFrame(measured.of("shifts", row, edit.name)[SHIFT_COLUMNS])
        caption = (
            f"{edit.name}: the first tokens before and after, the largest movers, and why each is "
            "here."
        )
        yield Part(table, f"shifts_{row}_{number}", caption, file="shifts")
    probs = measured.of("watched", row)[["prob_before", "prob_after"]]
    if bool(probs.isna().to_numpy().any()):
        yield (
            "The model's logits are NaN after this prompt, with an edit or without: there are no "
            "figures of it."
        )
        with_figures = False
    if with_figures:
        yield _draw_ranks(measured, row)
    yield from _write_layers(measured, row, with_figures=with_figures)
    yield from _write_components(measured, row, with_figures=with_figures)
    if feature_sites(measured.lm):
        yield from _write_features(measured, row)
    yield from _write_texts(measured, row)


def _draw_ranks(measured: ShiftTables, row: int) -> Part:
    parts = {}
    for edit in measured.edits[: figures.PANELS]:
        ranks_before, ranks_after = measured.ranks[row, edit.name]
        parts[edit.name] = (measured.of("shifts", row, edit.name), ranks_before, ranks_after)
    caption = (
        "Every token of the vocabulary, the darker the more; on the dashed line nothing moved, "
        "above it tokens rose."
    )
    return Part(
        figures.rank_against_rank(parts, title="Rank against rank"), f"ranks_{row}", caption
    )


def _write_layers(measured: ShiftTables, row: int, *, with_figures: bool) -> Iterable[Content]:
    yield "## Through the layers"
    refusal = measured.refusals["layers"]
    if refusal:
        yield f"There is no lens of this model: {refusal}"
    elif with_figures:
        names = [edit.name for edit in measured.edits[: figures.PANELS]]
        table = measured.of("layers", row)
        figure = figures.shift_through_layers(table, names, title="What each layer would say")
        caption = (
            "Logit lens: rank before (dashed) and after (drawn through). Shaded: blocks in which "
            "the edit acts. An edit of the logits acts on what every layer would say. The table is "
            "layers.csv."
        )
        yield Part(figure, f"layers_{row}", caption)
    else:
        yield "The ranks at every layer are in layers.csv."


def _write_features(measured: ShiftTables, row: int) -> Iterable[Content]:
    yield "## Which features moved it"
    for number, edit in enumerate(measured.edits):
        table: Any = measured.of("features", row, edit.name)
        if table.empty:
            yield f"{edit.name}: there is no sum. {measured.refusals[f'features {edit.name}']}"
            continue
        is_feature, is_error = table["kind"] == "feature", table["kind"] == "error"
        count, change = int(is_feature.sum()), table[is_feature]["logit_delta"].sum()
        largest = largest_rows(table[is_feature], "logit_delta", COMPONENTS)
        columns = ["component", "logit_before", "logit_after", "logit_delta"]
        caption = (
            f"{edit.name}: the change of the logit of {table['token'].iloc[0]!r} through the "
            f"{count} features that are active before or after, {change:+.4f} in all; the largest, "
            "and the error of the dictionary. Later blocks read features too: see features.csv."
        )
        shown: Any = pd.concat([largest, table[is_error]])[columns]
        yield Part(shown, f"features_{row}_{number}", caption, file="features")


def _write_components(measured: ShiftTables, row: int, *, with_figures: bool) -> Iterable[Content]:
    yield "## Why: the change as a sum"
    largest: dict[str, pd.DataFrame] = {}
    for number, edit in enumerate(measured.edits):
        table = measured.of("why", row, edit.name)
        if table.empty:
            yield f"{edit.name}: there is no sum. {measured.refusals[f'why {edit.name}']}"
            continue
        largest[edit.name] = most_moved(table, COMPONENTS)
        before, after = table["logit_before"].sum(), table["logit_after"].sum()
        residuals: Any = table[table["kind"] == "residual"][["logit_before", "logit_after"]]
        caption = (
            f"{edit.name}: the logit of {table['token'].iloc[0]!r} is the sum of "
            f"{len(table)} parts, "
            f"{before:.4f} before and {after:.4f} after: {table['logit_delta'].sum():+.4f}. "
            f"Rounding left {residuals.abs().to_numpy().max():.1e}. {NORM_NOTE}"
        )
        yield Part(largest[edit.name], f"why_{row}_{number}", caption, file="why")
    if with_figures and largest:
        panels = dict(list(largest.items())[: figures.PANELS])
        figure = figures.component_bars(panels, title="What made the change")
        yield Part(figure, f"why_bars_{row}", "The last bar is the sum.")


def _write_texts(measured: ShiftTables, row: int) -> Iterable[Content]:
    texts = measured.of("texts", row)
    if texts.empty:
        return
    yield "## The text"
    table: Any = texts[["edit", "first_difference", "both", "then_before", "then_after"]]
    caption = (
        "Greedy text, the same in both up to where it parts (a token, counted from 0), and how "
        "each goes on."
    )
    yield Part(table, f"texts_{row}", caption, file="texts")


def _write_settings(measured: ShiftTables, about: dict[str, Any]) -> Iterable[Content]:
    hooks = {}
    for edit in (*measured.edits, *measured.controls):
        if edit.draw == 0:
            texts = [indented_json(hook_as_json(hook)) for hook in edit.hooks]
            hooks[edit.name] = "\n".join(texts)
    model = f"Model {describe_model(about)}; seed {about['seed']}"
    note = ", the hooks with their tensors; hk.types.Hook.from_json reads them back"
    if measured.controls:
        note += ". Of the draws of a control, the first has tensors, the others their sha256"
    return write_settings(model, about, hooks, note)


@check_arguments
def shift_report(
    lm: LM,
    prompts: Prompts,
    *edits: Hook | Mapping[str, Hooks],
    base_hooks: Hooks = (),
    controls: Controls = None,
    watch: Iterable[WordLike] | WordLike = (),
    top: int = 10,
    heads: bool = False,
    generate: int = 0,
    details: int = 3,
    figures: int = 1,
    title: str = "",
    question: str = "",
    seed: int = 0,
) -> Report:
    """A page on what edits did to the next token: which tokens rose and fell, where, and why.

    `edits` are hooks, which act together, or one mapping {name: hook or hooks}. `base_hooks`
    act in every run, also in the one that edits are compared with; none by default. The page is
    about the token after each prompt; with `generate` also about that many tokens of greedy text.

    `controls` is how often the random control of each edit is drawn (by default 20; 0 for none), or
    a mapping like that of edits. The control of an edit of logits edits other tokens, of similar
    rank after these prompts. That of an ablation, a patch from a prompt, a scaling or a knockout of
    components edits other components of the same kind; that of units, other units. That of any
    other edit makes changes of the same length at the same sites, positions and prompts, all turned
    by one random rotation: a steering vector becomes a random vector. If an edit has no such
    control, the page says why, and a given number raises `Unsupported`. The first sentences and the
    table against_control set each edit beside its draws. With 10 prompts or more they have the 95 %
    interval of the difference, with fewer the range of the draws. The draws share forwards, and
    together cost about as much as `controls` forwards over all prompts, less for late edits.

    Every prompt has its `watch`ed tokens, the tokens that hooks name, and its most likely token
    before. The first `details` prompts also have the `top` tokens and largest movers, the logit
    lens, and the exact sum of one token's change over components (with `heads` over heads). That
    token is the first that is watched or named, else the most likely one after the edit. The first
    `figures` prompts have figures. Each edit and control takes one forward over all prompts, which
    are one batch. With many prompts it begins at the first block that the edit touches, if the
    model allows it.

    `tables` of the result has edits, shifts, watched and distances, and where they can be made
    layers, why, texts, summary and summary_distances (means over prompts, of a control over its
    draws too, with the intervals of `mean_over_prompts`). `write` writes each as CSV, JSON,
    Markdown and LaTeX, and about.json. If a model allows no lens or no sum, the page says why.

    >>> prompt = "The capital of France is"
    >>> page = shift_report(lm, prompt, force(" coffee"), watch=" Paris", figures=0)
    >>> watched = page.tables["watched"].query("control == ''")
    >>> watched[["watched", "rank_before", "rank_after"]]
               watched  rank_before  rank_after
    0         ' Paris'            1           2
    1        ' coffee'         8827           1
    2   what was first            1           2
    """
    check_integer(top, "top", least=1)
    check_integer(generate, "generate", least=0)
    check_integer(details, "details", least=1)
    check_integer(figures, "figures", least=0)
    if lm.is_masked:
        raise Unsupported(
            f"a shift report is about the token after each prompt, and {type(lm.root).__name__} is "
            "a masked language model, which writes none: compare two runs at a mask with "
            "hk.rank_shift(before, after, pos=hk.at('[MASK]'))"
        )
    all_edits = named_edits(edits)
    all_base_hooks = as_edit_hooks(base_hooks, "base_hooks")
    n_draws = count_draws(controls)
    all_controls = named_controls(controls, all_edits)
    rows = as_batch(lm, prompts).rows
    tokens = watched_ids(lm, watch)
    for edit in all_edits:
        tokens += named_tokens(lm, edit.hooks)
    measured = ShiftTables(
        lm, rows, all_base_hooks, all_edits, all_controls, list(dict.fromkeys(tokens)), top, heads,
        min(details, len(rows)), figures,
    )  # fmt: skip
    request = DrawRequest(n_draws, seed, is_required=controls is not None)
    with torch.no_grad():
        measure(measured, request)
        if generate:
            measured.tables["texts"] = before_after.texts_of(
                lm, rows, all_base_hooks, all_edits, generate
            )
    if len(rows) > 1:
        add_means(measured.tables, seed)
    title = title or "What moved, and why"
    settings = {"top": top, "heads": heads, "generate": generate, "details": details,
                "figures": figures, "seed": seed, "controls": n_draws}  # fmt: skip
    answer = "\n".join(map(partial(_write_headline, measured), measured.edits))
    about = {"title": title, "question": question, "answer": answer}
    about |= _build_about(measured, settings)
    parts: list[Content] = [
        *_write_opening(measured),
        *_write_controls(measured),
        *_write_means(measured),
    ]
    for row in range(measured.details):
        parts += _write_prompt(measured, row, with_figures=row < figures)
    parts += _write_settings(measured, about)
    footer = "Deltas are after minus before. Rank 1 is the likeliest."
    return compose_page(parts, measured.tables, CAPTIONS, about, footer)


def _build_about(measured: ShiftTables, settings: dict[str, Any]) -> dict[str, Any]:
    """The values of about.json: the model, the settings, the hooks and the prompts."""
    edit_hooks: dict[str, list[Any]] = {}
    for edit in (*measured.edits, *measured.controls):  # the draws of a control in one list
        # All draws have the tensors of the edit, so that only the first is written with them.
        encode = hook_as_json if edit.draw else _json_of
        edit_hooks.setdefault(edit.name, []).extend(map(encode, edit.hooks))
    return {
        **about_model(measured.lm),
        "git_commit": git_commit(),
        "watch": list(measured.watch),
        **settings,
        "hooks": {"base_hooks": list(map(_json_of, measured.base_hooks)), **edit_hooks},
        "prompts": list(map(measured.lm.text, measured.rows)),
        "tokens": list(map(row_as_json, measured.rows)),
    }


def _json_of(hook: Hook) -> Any:
    """A hook with its tensors, or with their digests if they are large."""
    if len(hook.to_json()) > LONGEST_JSON:
        return hook_as_json(hook)
    return hook_as_json(hook, "inline")
