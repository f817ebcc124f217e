"""`hk.model_diff`: two models, or two states of one, on the same prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...arguments import check_arguments, check_integer, check_number
from ...display import count_of, describe_outcome, first_rows, render_html
from ...errors import BadHook, OutOfRange, Unsupported
from ...figures.reports import diff_through_layers, stream_map, token_bars
from ...hooks.logits import named_tokens
from ...models.lm import LM
from ...models.positions import PosLike, Where, read_position
from ...models.prompt_row import row_as_json
from ...models.prompts import Prompts, shorten
from ...models.provenance import about_model, git_commit, versions
from ...models.sites import AnySite, SitesLike, parse_site
from ...models.words import WordLike
from ...tables.intervals import MIN_FOR_INTERVAL
from ...tables.rank_tables import watched_ids
from ..comparison_page import (
    SHIFT_COLUMNS,
    compose_page,
    describe_model,
    hook_as_json,
    indented_json,
    write_settings,
)
from ..control_draws import DRAWS
from ..page import Report
from ..parts import Content, Part
from ..shift.named_edits import Hooks, as_edit_hooks
from .diff_control import attempt_control
from .paired_models import (
    CKA_SITES,
    FIRST_PARTING,
    Around,
    DiffRequest,
    PairedRuns,
    SharedSites,
    Side,
    reader_of,
    rows_of,
    shared_sites,
)

TOKEN_COLUMNS = ["pos", "read", "kl", "js", "entropy_before", "entropy_after", "entropy_delta",
                 "loss_before", "loss_after", "loss_delta",
                 "top1_before", "top1_after"]  # fmt: skip
SITE_COLUMNS = ["site", "cosine", "cosine_min", "difference", "difference_max",
                "norm_before", "norm_after", "cka", "parts"]  # fmt: skip
STREAM_SITES = ["embed", "resid_post", "final_norm", "logits"]
CAPTIONS = {
    "prompts": "each prompt",
    "tokens": "how far the distributions are apart, after each token",
    "shifts": "how the ranking of tokens moved",
    "sites": "how alike each site is",
    "parting": "where each prompt parts first",
    "stream": "the stream of the first prompts, token by token",
    "left_out": "what was not compared",
    "control": "the draws of the random control",
    "against_control": "the two models beside the control",
}


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """The comparison of two models. `model_diff` returns it. Tables are plain DataFrames.

    Deltas are after minus before.

    tokens    one row for each compared token: row, pos, read; kl (KL(before‖after), nats),
              kl_reverse, js; entropy, loss (nats, of the token that follows in the prompt), each
              with _before, _after, _delta; top1_before, top1_after, top1_changed
    shifts    how the ranking of tokens moved, with the columns of `rank_shift`
    sites     one row for each site, in the order of computation: site, name, layer, tokens; cosine
              (mean over the tokens) and cosine_min; difference (‖after - before‖ / ‖before‖ of a
              token, the mean) and difference_max; norm_before, norm_after (means); cka (empty if it
              was not computed); parts (whether difference_max is beyond the tolerance)
    parting   one row for each prompt: row, site, layer, pos, read, difference, of the first site in
              the order of computation at which a token's difference is beyond the tolerance, and of
              the first such token; empty if there is none. No rows if the models do not have the
              same sites
    stream    of the first prompts: row, pos, read, layer, difference, cosine at resid_post
    left_out  what, why: what was not compared, or has no meaning for these two models
    control   the draws of the random control: row, draw, kl after the prompt's last token
    against_control  one row: the mean kl there beside that of the draws (see `shift_report`); no
              rows if there is no control
    names     the names of the two models
    tolerance the relative difference beyond which they have parted
    about     how it was made, as plain values
    """

    tokens: pd.DataFrame
    shifts: pd.DataFrame
    sites: pd.DataFrame
    parting: pd.DataFrame
    stream: pd.DataFrame
    left_out: pd.DataFrame
    control: pd.DataFrame
    against_control: pd.DataFrame
    names: tuple[str, str]
    tolerance: float
    about: Mapping[str, Any]

    @property
    def first(self) -> AnySite | None:
        """The first site at which any prompt parts, None if there is none.

        Raises `Unsupported` if the models' sites differ, so that they have no common order.
        """
        if self.parting.empty:
            raise Unsupported(
                f"where the two part first cannot be said: {self._no_order}. "
                "sites has what they share"
            )
        parting_sites = set(self.parting["site"])
        for site in self.sites["site"]:
            if site in parting_sites:
                return parse_site(site)
        return None

    @property
    def _no_order(self) -> str:
        """Why the first site where the two part is not defined."""
        return str(self.left_out.set_index("what").loc[FIRST_PARTING, "why"])

    @property
    def prompts(self) -> pd.DataFrame:
        """One row for each prompt.

        Columns: row, tokens; kl (mean over its tokens), kl_max, and kl_max_pos, where that is;
        top1_changed (number of tokens); loss_before, loss_after, loss_delta (means); parts_at (the
        site, if it is defined). Of a prompt with logits that are NaN, the means and kl_max are NaN
        too, and kl_max_pos is the first such position.
        """
        tokens = self.tokens.assign(order=self.tokens["kl"].fillna(np.inf))
        groups = tokens.groupby("row", sort=True)
        table = groups.agg(tokens=("pos", "size"))
        table["kl"] = groups["kl"].agg(lambda values: values.mean(skipna=False))
        table["kl_max"] = groups["kl"].agg(lambda values: values.max(skipna=False))
        table["kl_max_pos"] = tokens.loc[groups["order"].idxmax(), "pos"].to_numpy()
        table["top1_changed"] = groups["top1_changed"].sum()
        losses: Any = groups[["loss_before", "loss_after", "loss_delta"]].mean()
        table = table.join(losses.where(table["kl"].notna()))
        if not self.parting.empty:
            table["first_difference"] = self.parting.set_index("row")["site"]
        return table.reset_index()

    def page(
        self, *, title: str = "", question: str = "", answer: str = "", figures: int = 1
    ) -> Report:
        """One page of the comparison; the first `figures` prompts have figures.

        Without an `answer` the page says what the numbers are. `write` writes its tables as CSV,
        JSON, Markdown and LaTeX beside it.
        """
        prompts = self.prompts
        parts = [*_write_prompts(self, prompts), *_write_parting(self), *_write_sites(self)]
        for row in prompts["row"].head(int(self.about["details"])):
            parts += _write_prompt(self, row, with_figures=row < figures)
        if not self.left_out.empty:
            parts.append("# What was not compared")
            parts.append(Part(self.left_out, "left_out_shown", "", file="left_out"))
        parts += _write_settings(self.about)
        before, after = self.names
        title = title or f"{before} and {after}"
        about = {"title": title, "question": question, "answer": answer or _write_answer(self)}
        about |= self.about
        footer = f"Before is {before}, after is {after}; deltas are after minus before."
        tables = {name: getattr(self, name) for name in CAPTIONS}
        return compose_page(parts, tables, CAPTIONS, about, footer)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page and all tables to a folder. Returns the page's path."""
        return self.page().write(folder)

    def _repr_html_(self) -> str:
        facts = {"part first at": self.first or "no site"} if len(self.parting) else {}
        before, after = self.names
        return render_html(f"Difference: {before} and {after}", facts, first_rows(self.prompts))

    def __repr__(self) -> str:
        kl, changed = self.tokens["kl"].mean(skipna=False), self.tokens["top1_changed"].mean()
        parting = ""
        if not self.parting.empty:
            parting = f"; they part at {self.first}" if self.first else "; they never part"
        text = (
            f"Difference({self.names[0]} and {self.names[1]}: {len(self.tokens)} tokens, "
            f"KL {kl:.3g} nats a token, another first token after {changed:.0%}{parting})"
        )
        calls = ("difference.write(folder)", "difference.prompts", "difference.tokens")
        return describe_outcome(text, *calls)


def _write_answer(difference: Difference) -> str:
    tokens = difference.tokens
    count, prompts = len(tokens), count_of(len(set(tokens["row"])), "prompt")
    unknown = tokens[tokens["kl"].isna()]
    if not unknown.empty:
        return (
            f"The two cannot be compared after {len(unknown):,} of {count:,} tokens of "
            f"{prompts}, first after {unknown.iloc[0]['read']!r} in prompt "
            f"{unknown.iloc[0]['row']}: "
            "the logits of one of them are NaN there."
        )
    furthest = tokens.loc[tokens["kl"].idxmax()]
    changed = sum(tokens["top1_changed"])
    text = (
        f"The two predict another most likely token after {changed:,} of {count:,} tokens "
        f"({changed / count:.1%}) of {prompts}. Their predictions are {tokens['kl'].mean():.3g} "
        f"nats apart on average (KL), and at most {furthest['kl']:.3g}, after {furthest['read']!r} "
        f"in prompt {furthest['row']}."
    )
    losses = tokens[["loss_before", "loss_after"]].mean()
    if not np.isnan(losses.to_numpy(float)).any():
        text += (
            f" The tokens that follow cost {losses.iloc[0]:.3f} nats each before and "
            f"{losses.iloc[1]:.3f} after."
        )
    return f"{text}\n{_write_control_sentence(difference)}".strip()


def _write_control_sentence(difference: Difference) -> str:
    about = difference.about["control"]
    if difference.against_control.empty:
        return f"There is no control: {about['why_none']}." if about["why_none"] else ""
    row = difference.against_control.iloc[0]
    n, draws = int(row["n"]), int(row["draws"])
    text = (
        f"The control is {about['description']}, drawn {draws} times. After the last token of "
        f"{count_of(n, 'prompt')} the two are {row['effect']:.3g} nats apart, and the control is "
        f"{row['control']:.3g} nats from the first"
    )
    as_large = int(row["as_large"])
    many = "none" if as_large == 0 else str(as_large)
    if n < MIN_FOR_INTERVAL or np.isnan(row["gain_low"]):
        return (
            f"{text}, a single draw {row['control_min']:.3g} to {row['control_max']:.3g}; {many} "
            f"of the draws are as far away as the two. With fewer than {MIN_FOR_INTERVAL} prompts "
            "there is no interval."
        )
    verdict = "is not distinguished from"
    if row["gain_low"] > 0 or row["gain_high"] < 0:
        verdict = "differs from"
    return (
        f"{text} (95 % of such draws: {row['control_low']:.3g} to {row['control_high']:.3g}); "
        f"{many} of the draws are as far away as the two. So their difference {verdict} that of "
        f"the control: {row['gain']:+.3g} nats (95 % interval {row['gain_low']:+.3g} to "
        f"{row['gain_high']:+.3g})."
    )


def _write_prompts(difference: Difference, prompts: pd.DataFrame) -> Iterable[Content]:
    yield "# The prompts"
    caption = (
        "kl is the mean over a prompt's tokens, in nats; kl_max_pos is where it is largest. Losses "
        "are means."
    )
    texts = prompts["row"].map(partial(_quote_prompt, difference))
    yield Part(prompts.assign(prompt=texts), "prompts_shown", caption, file="prompts")


def _quote_prompt(difference: Difference, row: int) -> str:
    return f"“{shorten(difference.about['prompts'][row])}”"


def _write_parting(difference: Difference) -> Iterable[Content]:
    yield "# Where they part"
    parting, tolerance = difference.parting, difference.tolerance
    if parting.empty:
        yield f"That cannot be said of these two: {difference._no_order}."
        return
    first = str(difference.first or "")
    if not first:
        yield (
            f"Nowhere: at no site do a token's vectors differ by more than {tolerance:g} of their "
            "length."
        )
        return
    count = parting["site"].tolist().count(first)
    yield (
        f"First at {first}, in {count} of {len(parting)} prompts: no site that is computed before "
        f"it has a token whose vectors differ by more than {tolerance:g} of their length."
    )
    caption = (
        "The first site in the order of computation whose difference is beyond the tolerance, and "
        "its first token."
    )
    yield Part(parting, "parting_shown", caption, file="parting")


def _write_sites(difference: Difference) -> Iterable[Content]:
    yield "# How alike each site is"
    sites = difference.sites
    figure = diff_through_layers(sites, difference.tolerance, title="Through the layers")
    if figure is not None:
        caption = "Means over all tokens, log axes. Dashed: the tolerance."
        yield Part(figure, "through_layers", caption)
    table = sites[sites["name"].isin(STREAM_SITES)]
    if len(table) < 2:
        table = sites
    caption = (
        "cosine is a mean over the tokens, difference that of ‖after − before‖ / ‖before‖; cka is "
        "linear CKA (Kornblith et al. 2019), 1 where the one is the other turned and scaled."
    )
    yield Part(pd.DataFrame(table[SITE_COLUMNS]), "sites_shown", caption, file="sites")


def _write_prompt(difference: Difference, row: int, *, with_figures: bool) -> Iterable[Content]:
    tokens = _select_row(difference.tokens, row)
    shifts = _select_row(difference.shifts, row)
    stream = _select_row(difference.stream, row)
    yield f"# {_quote_prompt(difference, row)}"
    if with_figures and not tokens.empty:
        figure = token_bars(tokens, title="How far apart they are after each token")
        yield Part(figure, f"tokens_{row}")
    table = pd.DataFrame(tokens[TOKEN_COLUMNS])
    yield Part(table, f"said_{row}", "Entropy and loss in nats.", file="tokens")
    if not shifts.empty:
        caption = "The first tokens of each, the largest movers, and why each is here."
        table = pd.DataFrame(shifts[["pos", *SHIFT_COLUMNS]])
        yield Part(table, f"shifts_{row}", caption, file="shifts")
    if with_figures:
        figure = stream_map(stream, title="How far apart the streams are after each block")
        if figure is not None:
            caption = "‖after − before‖ / ‖before‖ at resid_post."
            yield Part(figure, f"stream_{row}", caption)


def _select_row(table: pd.DataFrame, row: int) -> pd.DataFrame:
    return pd.DataFrame(table[table["row"] == row]).reset_index(drop=True)


def _write_settings(about: Mapping[str, Any]) -> Iterable[Content]:
    models = f"Before: {_describe_side(about['before'])}.\nAfter: {_describe_side(about['after'])}"
    hooks = {}
    for when in ("before", "after"):
        if about[when]["hooks"]:
            hooks[f"Hooks {when}"] = indented_json(about[when]["hooks"])
    return write_settings(models, about, hooks)


def _describe_side(about: Mapping[str, Any]) -> str:
    text = describe_model(about)
    if about["adapters"]:
        text += f" with adapters {', '.join(about['adapters'])}"
    if about["hooks"]:
        text += f" with {count_of(len(about['hooks']), 'hook')}"
    if about["within"]:
        text += f" within {about['within']}"
    return text


@check_arguments
def model_diff(
    before: LM,
    after: LM,
    prompts: Prompts,
    *,
    base_hooks: Hooks = (),
    hooks_after: Hooks = (),
    while_before: Around | None = None,
    while_after: Around | None = None,
    sites: SitesLike | None = None,
    cka: SitesLike | bool = True,
    pos: PosLike = None,
    rank_pos: PosLike = -1,
    top: int = 10,
    watch: Iterable[WordLike] | WordLike = (),
    tolerance: float = 1e-4,
    details: int = 3,
    names: tuple[str, str] | None = None,
    batch_tokens: int = 512,
    memory: int = 2**30,
    controls: int | None = None,
    seed: int = 0,
) -> Difference:
    """Two models on the same prompts: what they predict, where they part, how alike each site is.

    For example a base model and a fine-tuned one, float32 and bfloat16, or a model before and after
    an edit of its weights (one of the two is a copy). Both have to read the same tokens: other
    vocabularies, tokenizers or token ids raise `OtherVocabulary`. One model in two states is given
    twice, with hooks on one side, or with a `with` block around the forwards of one side:
    `while_before=model.disable_adapter` for an adapter of PEFT, off and on. `base_hooks` act in the
    runs of both sides, before `hooks_after`. Without a hook or a block on one side, the
    same model given twice raises `BadHook`.

    `sites` are compared, by default all vectors that both models have. `cka` selects the sites
    whose linear CKA is computed (True: `sites`, or embed, attn_out, mlp_out, resid_post and
    final_norm; False: none). `pos` are the positions that are compared, by default all, and
    `rank_pos` those of the table of shifts, with the `top` and `watch`ed tokens. Two models have
    parted where a token's vectors differ by more than `tolerance` of the first one's length:
    rounding in float32 gives about 1e-6, in bfloat16 4e-3. CKA is dominated by the longest vectors,
    often those of the first token, which pos=slice(1, None) leaves out. Models of other depths or
    widths are compared as far as that has a meaning, sites by name, and `left_out` says what is not
    compared.

    Forwards have at most `batch_tokens` tokens (with hooks: one forward of all prompts, so that the
    hooks' rows are the prompts), and keep at most about `memory` bytes of activations and sums
    beside the logits; further sites are read in another pass over the prompts. The stream is kept
    token by token for the first `details` prompts.

    `controls` is how often a random control is drawn (by default 20; 0 for none), with `seed`. With
    hooks on one side of one model it is that of `shift_report`; else it is the first model with the
    difference of the two streams after the last block turned in a random direction. It is measured
    after each prompt's last token, in few forwards, which together cost at most about `controls`
    forwards of the first model. The page has the mean KL there beside that of the draws.

    >>> sites = ["resid_post", "attn_out"]
    >>> prompt, edit = "I like oat milk in my", skip_block(17)
    >>> result = model_diff(lm, lm, prompt, sites=sites, hooks_after=edit)
    >>> str(result.first), round(float(result.tokens["kl"].iloc[-1]), 3)
    ('resid_post.17', 0.082)
    """
    check_integer(batch_tokens, "batch_tokens", least=1)
    check_integer(memory, "memory", least=1)
    check_integer(top, "top", least=1)
    check_integer(details, "details", least=0)
    meaning = "a part of a vector's length, such as 1e-4,"
    if controls is not None:
        check_integer(controls, "controls", least=0, meaning="how many random controls to draw,")
    tolerance = check_number(tolerance, "tolerance", least=0.0, meaning=meaning, error=OutOfRange)
    in_both = as_edit_hooks(base_hooks, "base_hooks")
    edits = as_edit_hooks(hooks_after, "hooks_after")
    side_before = Side(before, in_both, while_before or nullcontext)
    side_after = Side(after, (*in_both, *edits), while_after or nullcontext)
    is_stated = edits or while_before or while_after
    if before.root is after.root and not is_stated:
        raise BadHook(
            "both are one model: an edit of its weights is in both. Give a copy, "
            "hk.LM(copy.deepcopy(model), tokenizer), hooks_after=, or a block around the forwards "
            "of one, while_before=model.disable_adapter"
        )
    rows = rows_of(before, after, prompts)
    reader = reader_of(before, after)
    shared = shared_sites(before, after, sites)
    watched = tuple(watched_ids(reader, watch))
    named = [*named_tokens(before, side_before.hooks), *named_tokens(after, side_after.hooks)]
    cka_sites = _select_cka_sites(cka, shared, before, all_sites=sites is not None)
    request = DiffRequest(
        Where(read_position(pos)), Where(read_position(rank_pos)), top, watched,
        tuple(dict.fromkeys(named)), cka_sites, float(tolerance), details, batch_tokens, memory,
    )  # fmt: skip
    runs = PairedRuns(reader, side_before, side_after, rows, shared, request)
    runs.read()
    tables = runs.tables()
    control = attempt_control(runs, edits, tables["tokens"], controls, seed, DRAWS)
    about_control = {"description": control.description, "why_none": control.why_none}
    return Difference(
        **tables,
        left_out=pd.DataFrame(shared.left_out.items(), columns=["what", "why"]),
        control=control.table,
        against_control=control.summary,
        names=names or _default_names(before, after),
        tolerance=request.tolerance,
        about=_build_about(runs) | {"control": about_control | {"seed": seed}},
    )


def _select_cka_sites(
    cka: SitesLike | bool, shared: SharedSites, lm: LM, *, all_sites: bool
) -> frozenset[AnySite]:
    """The sites whose CKA is computed. Raises `BadHook` if one of them is not compared."""
    if cka is False:
        return frozenset()
    if cka is True:
        is_selected = [all_sites or getattr(site, "name", "") in CKA_SITES for site in shared.kinds]
        return frozenset(compress(shared.kinds, is_selected))
    selected = lm.expand(cka)
    for site in selected:
        if site not in shared.kinds:
            raise BadHook(f"cka= names {site}, which is not compared: name it in sites= as well")
    return frozenset(selected)


def _default_names(before: LM, after: LM) -> tuple[str, str]:
    """The models' names. If they are equal, the dtypes or "before" and "after" are added."""
    about_before, about_after = about_model(before), about_model(after)
    name_before, name_after = str(about_before["model"]), str(about_after["model"])
    if name_before != name_after:
        return name_before, name_after
    dtype_before = " and ".join(about_before["dtype"])
    dtype_after = " and ".join(about_after["dtype"])
    if dtype_before != dtype_after:
        return f"{name_before} in {dtype_before}", f"{name_after} in {dtype_after}"
    return f"{name_before} before", f"{name_after} after"


def _build_about(runs: PairedRuns) -> dict[str, Any]:
    request = runs.request
    return {
        "before": _about_side(runs.before),
        "after": _about_side(runs.after),
        "versions": versions(),
        "git_commit": git_commit(),
        "pos": repr(request.where.pos),
        "rank_pos": repr(request.rank_where.pos),
        "top": request.top,
        "watch": list(request.watched),
        "tolerance": request.tolerance,
        "details": request.details,
        "batch_tokens": request.batch_tokens,
        "cka": sorted(map(str, request.cka)),
        "prompts": list(map(runs.reader.text, runs.rows)),
        "tokens": list(map(row_as_json, runs.rows)),
    }


def _about_side(side: Side) -> dict[str, Any]:
    about = dict(about_model(side.lm))
    about.pop("versions", None)
    within = ""
    if side.around is not nullcontext:
        within = getattr(side.around, "__qualname__", type(side.around).__name__)
    return about | {"hooks": list(map(hook_as_json, side.hooks)), "within": within}
