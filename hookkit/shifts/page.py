"""hk.shift_report: one page on what edits did to what a model says next."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from ..about import about_model, git_commit
from ..arguments import checks_arguments, read_tokens, whole_number
from ..errors import BadHook, OutOfRange
from ..hooks.base import Hook
from ..model import LM, Token
from ..prompts import Prompts, Row, as_batch
from ..reports import Content, Part, Report, report
from ..sweeps import over_prompts
from ..tables import shift_of
from .inside import layers_of, looks_of, why_of
from .measuring import Answers, answered, distances_of, watched_of, with_deltas
from .naming import Controls, Edit, Hooks, controls_of, edits_of, literal, table_of, together
from .resuming import resuming
from .sections import Found, answer, beginning, made_again, of_prompt, over_all
from .texts import texts_of

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
    for name, value, least in (("top", top, 1), ("generate", generate, 0), ("shown", shown, 1), ("drawn", drawn, 0)):
        whole_number(value, name, least=least)
    named, under = edits_of(edits), together(baseline, "the baseline")
    if draws is not None and controls != "random":
        raise BadHook(f"draws={draws!r} goes with controls='random': other controls are not drawn")
    count = DRAWS if draws is None else draws
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OutOfRange(f"draws={draws!r}: give how many times a random control is drawn, at least 1")
    beside = controls_of(controls, named, seed, count)
    if len({edit.name for edit in named}) < len(named):
        raise BadHook("two edits have one name: names stand once")
    rows = as_batch(lm, prompts).rows
    watched = [lm.token(token) for token in read_tokens(watch, "watch")]
    tokens = list(dict.fromkeys([*watched, *(i for edit in named for i in edit.named(lm))]))
    with torch.no_grad():
        found = _measured(lm, rows, under, named, beside, tokens, top, heads, min(shown, len(rows)), drawn)
        if generate:
            found.tables["texts"] = texts_of(lm, rows, under, named, generate)
    _sum_up(found, seed)
    settings = {"top": top, "heads": heads, "generate": generate, "shown": shown, "drawn": drawn, "seed": seed}
    title, kind = title or "What moved, and why", controls if isinstance(controls, str) else None
    about = {
        "title": title,
        "question": question,
        "answer": answer(found),
        **_about(found, under, tokens, settings | {"controls": kind, "draws": count if kind else None}),
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
) -> Found:  # fmt: skip
    looks = looks_of(lm, heads=heads)
    every_edit = [*edits, *controls]
    later = resuming(lm, rows, [] if under else [edit.hooks for edit in every_edit])
    with later.noting():
        was = answered(lm, rows, under, None, looks.sites, shown)
    edited: list[Answers] = []
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
            ranks[row, edit.name] = (before[row].ranks(every).numpy(), after[row].ranks(every).numpy())
        told = [watch[0] if watch else now.first[row] for row in range(shown)]
        why, refused[f"why {edit.name}"] = why_of(was, now, told, looks, known)
        parts["why"].append(why)
        edited.append(Answers(edit, now.run, now.logits[:shown]))
    tables = {"edits": table_of([*edits, *controls])}
    tables |= {name: _joined(found) for name, found in parts.items()}
    tables["layers"], refused["layers"] = layers_of(was, edited, rows, looks, watch, shown)
    return Found(lm, rows, edits, controls, tables, ranks, refused)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    some = [table for table in tables if not table.empty]
    return pd.concat(some, ignore_index=True) if some else pd.DataFrame()


def _shifts(table: pd.DataFrame, now: Answers) -> pd.DataFrame:
    """`rank_shift` with the edit's name, and with parts of characters as bytes."""
    assert now.edit is not None
    table = with_deltas(table.assign(edit=now.edit.name, token=[literal(now.lm, i) for i in table["token_id"]]))
    first = ["row", "pos", "edit"]
    return pd.DataFrame(table[[*first, *(name for name in table if name not in (*first, "why")), "why"]])


def _sum_up(found: Found, seed: int) -> None:
    if len(found.rows) < 2:
        return
    watched, distances = found.tables["watched"], found.tables["distances"]
    found.tables["summary"] = over_prompts(watched, by=["edit", "control", "watched"], values=MOVED, seed=seed)
    found.tables["summary_distances"] = over_prompts(distances, by=["edit", "control"], values=DISTANCES, seed=seed)


def _about(found: Found, under: tuple[Hook, ...], watch: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    every: dict[str, tuple[Hook, ...]] = {}
    for edit in (*found.edits, *found.controls):  # the draws of a control one after the other
        every[edit.name] = (*every.get(edit.name, ()), *edit.hooks)
    hooks = {name: [_json(hook) for hook in hooks] for name, hooks in {"baseline": under, **every}.items()}
    prompts = [found.lm.text(row) for row in found.rows]
    made = {"hooks": hooks, "prompts": prompts, "tokens": [list(row) for row in found.rows]}
    return {**about_model(found.lm), "git_commit": git_commit(), "watch": list(watch), **settings, **made}


def _json(hook: Hook) -> Any:
    """A hook with its tensors, or with their hashes where they are large."""
    whole = hook.to_json()
    return json.loads(whole if len(whole) <= INLINE else hook.to_json(tensors="digest"))


def _with_files(page: Report, found: Found, about: dict[str, Any]) -> Report:
    captions = {
        "shifts": "first tokens before and after, and movers", "watched": "watched tokens of every prompt",
        "distances": "how far every prompt's distribution moved", "layers": "the logit lens before and after",
        "why": "the logit's parts before and after", "texts": "what was written",
        "summary": "means of the watched tokens", "summary_distances": "means of the distances",
    }  # fmt: skip
    data = [Part(t, name, captions[name]) for name, t in found.tables.items() if name in captions and not t.empty]
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    return Report(page.title, page.parts, page.footer, tuple(data), ALL, {"about.json": text})
