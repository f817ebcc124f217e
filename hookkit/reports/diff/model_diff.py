"""What two models, or two states of one, differ in on some prompts, as tables.

The page of two models beside one another.

hk.diff: two models on the same prompts, and all that differs.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ...arguments import checks_arguments, finite_number, read_tokens, whole_number
from ...display import records, shown
from ...errors import BadHook, OutOfRange, Unsupported
from ...figures.diff import stream_map, through_layers, token_bars
from ...hooks.logits import LogitEdit
from ...models.lm import LM, Token
from ...models.positions import PosLike, Where, as_pos
from ...models.prompts import Prompts, shortened
from ...models.provenance import about_model, git_commit, versions
from ...models.sites import AnySite, Site, SitesLike, parse
from ..page import Content, Folded, Part, Report, report
from ..shift.named_edits import Hooks, together
from .model_runs import Asked, Reading
from .pairing import STREAM, Around, Matched, Side, matched, reader_of, rows_of

FORMATS = ("csv", "json", "md", "tex")
SHIFT = ["token", "logit_before", "logit_after", "logit_delta", "prob_before", "prob_after", "prob_delta",
         "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip
SAID = ["pos", "read", "kl", "js", "entropy_before", "entropy_after", "entropy_delta", "loss_before", "loss_after",
        "loss_delta", "top1_before", "top1_after"]  # fmt: skip
SHOWN = [
    "site",
    "cosine",
    "cosine_min",
    "difference",
    "difference_max",
    "norm_before",
    "norm_after",
    "cka",
    "parts",
]
CAPTIONS = {
    "prompts": "each prompt", "tokens": "how far the distributions are apart, after each token",
    "shifts": "how the ranking of tokens moved", "sites": "how alike each site is",
    "parting": "where each prompt parts first", "stream": "the stream of the first prompts, token by token",
    "left_out": "what was not compared",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DiffTables:
    """What the page is about: the tables by their names, what the two are called, and how it was made."""

    tables: Mapping[str, pd.DataFrame]
    names: tuple[str, str]
    first: str  # the site where they part first, "" where they never do
    tolerance: float
    about: Mapping[str, Any]

    def of(self, name: str, row: int) -> pd.DataFrame:
        """The rows of a table that are about one prompt."""
        table = self.tables[name]
        return pd.DataFrame(table[table["row"] == row]).reset_index(drop=True)


def page_of(found: DiffTables, *, title: str, question: str, drawn: int) -> Report:
    """The page, with the tables as its files."""
    parts: list[Content] = [*_beginning(found, question), *_parting(found), *_alike(found)]
    for row in range(min(int(found.about["shown"]), len(found.tables["prompts"]))):
        parts += _of_prompt(found, row, drawn=row < drawn)
    parts += _left_out(found)
    parts += _made_again(found)
    footer = (
        f"Before is {found.names[0]}, after is {found.names[1]}; deltas are after minus before."
    )
    title = title or f"{found.names[0]} and {found.names[1]}"
    page = report(title, *parts, footer=footer)
    data = [
        Part(table, name, CAPTIONS[name]) for name, table in found.tables.items() if not table.empty
    ]
    said = {"title": title, "question": question, "answer": _answer(found)}
    about = json.dumps({**said, **found.about}, indent=1, ensure_ascii=False) + "\n"
    return Report(page.title, page.parts, page.footer, tuple(data), FORMATS, {"about.json": about})


def _answer(found: DiffTables) -> str:
    """What came of it, in sentences."""
    tokens, prompts = found.tables["tokens"], found.tables["prompts"]
    furthest = tokens.loc[tokens["kl"].idxmax()]
    said = (
        f"After {len(tokens):,} tokens of {len(prompts)} prompt{'s' * (len(prompts) > 1)} the two are "
        f"{tokens['kl'].mean():.3g} nats apart (KL, mean), at most {furthest['kl']:.3g}, after {furthest['read']} in "
        f"prompt {furthest['row']}. Another token comes first after {sum(tokens['top1_changed'])} of them "
        f"({tokens['top1_changed'].mean():.1%})."
    )
    losses = tokens[["loss_before", "loss_after"]].mean()
    if losses.notna().all():
        said += f" What follows costs {losses.iloc[0]:.3f} nats a token before and {losses.iloc[1]:.3f} after."
    return said


def _beginning(found: DiffTables, question: str) -> Iterable[Content]:
    """The question, what came of it, and the prompts."""
    prompts = found.tables["prompts"]
    yield from [question] if question else []
    yield _answer(found)
    yield "# The prompts"
    caption = "kl is the mean over a prompt's tokens, in nats; kl_max_pos is where it is largest. Losses are means."
    yield Part(
        prompts.assign(prompt=_texts(found, prompts)), "prompts_shown", caption, file="prompts"
    )


def _texts(found: DiffTables, prompts: pd.DataFrame) -> list[str]:
    return [f"“{shortened(found.about['prompts'][row])}”" for row in prompts["row"]]


def _parting(found: DiffTables) -> Iterable[Content]:
    yield "# Where they part"
    parting = found.tables["parting"]
    if parting.empty:
        yield (
            "That cannot be said of these two: "
            + _why(found, "the site where they part first")
            + "."
        )
        return
    if not found.first:
        yield f"Nowhere: at no site do a token's vectors differ by more than {found.tolerance:g} of their length."
        return
    count = parting["site"].tolist().count(found.first)
    yield (
        f"First at {found.first}, in {count} of {len(parting)} prompts: no site that is computed before it has a token "
        f"whose vectors differ by more than {found.tolerance:g} of their length."
    )
    caption = "The first site in the order of computation whose difference is beyond the tolerance, and its first token."
    yield Part(parting, "parting_shown", caption, file="parting")


def _why(found: DiffTables, what: str) -> str:
    left_out = found.tables["left_out"]
    return dict(zip(left_out["what"], left_out["why"], strict=True))[what]


def _alike(found: DiffTables) -> Iterable[Content]:
    yield "# How alike each site is"
    sites = found.tables["sites"]
    figure = through_layers(sites, found.tolerance, title="Through the layers")
    if figure is not None:
        yield Part(
            figure, "through_layers", "Means over all tokens, log axes. Dashed: the tolerance."
        )
    some = sites[sites["name"].isin(["embed", "resid_post", "final_norm", "logits"])]
    few = pd.DataFrame((some if len(some) > 1 else sites)[SHOWN])
    caption = (
        "cosine is a mean over the tokens, difference that of ‖after − before‖ / ‖before‖; cka is linear CKA "
        "(Kornblith et al. 2019), 1 where the one is the other turned and scaled."
    )
    yield Part(few, "sites_shown", caption, file="sites")


def _of_prompt(found: DiffTables, row: int, *, drawn: bool) -> Iterable[Content]:
    tokens, shifts, stream = (found.of(name, row) for name in ("tokens", "shifts", "stream"))
    yield f"# “{shortened(found.about['prompts'][row])}”"
    if drawn and not tokens.empty:
        yield Part(
            token_bars(tokens, title="How far apart they are after each token"), f"tokens_{row}"
        )
    yield Part(
        pd.DataFrame(tokens[SAID]), f"said_{row}", "Entropy and loss in nats.", file="tokens"
    )
    if not shifts.empty:
        caption = "The first tokens of each, the largest movers, and why each is here."
        yield Part(pd.DataFrame(shifts[["pos", *SHIFT]]), f"shifts_{row}", caption, file="shifts")
    figure = stream_map(stream, title="The stream behind each layer") if drawn else None
    if figure is not None:
        yield Part(figure, f"stream_{row}", "‖after − before‖ / ‖before‖ at resid_post.")


def _left_out(found: DiffTables) -> Iterable[Content]:
    table = found.tables["left_out"]
    if not table.empty:
        yield "# What was not compared"
        yield Part(table, "left_out_shown", "", file="left_out")


def _made_again(found: DiffTables) -> Iterable[Content]:
    yield "# How to make it again"
    lines = [f"{when.capitalize()}: {_model(found.about[when])}." for when in ("before", "after")]
    lines.append(
        ", ".join(f"{name} {number}" for name, number in found.about["versions"].items()) + "."
    )
    yield "\n".join([*lines, "about.json has all of it."])
    for when in ("before", "after"):
        if found.about[when]["hooks"]:
            hooks = json.dumps(found.about[when]["hooks"], indent=1, ensure_ascii=False)
            yield Folded(f"Hooks {when}, as JSON", hooks)


def _model(about: Mapping[str, Any]) -> str:
    """One of the two in words."""
    words = f"{about['model']} ({about['class']}, {', '.join(about['dtype'])}, {about['device']})"
    words += f" with adapters {', '.join(about['adapters'])}" if about["adapters"] else ""
    words += (
        f" with {len(about['hooks'])} hook{'s' * (len(about['hooks']) > 1)}"
        if about["hooks"]
        else ""
    )
    return words + (f" within {about['within']}" if about["within"] else "")


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """Two models beside one another. Made by `diff`; every table is a plain DataFrame, deltas are after minus before.

    tokens    one row a token that was read: row, pos, read; kl (KL(before‖after), nats), kl_reverse, js; entropy, loss
              (nats, of the token that follows in the prompt), each with _before, _after, _delta; top1_before,
              top1_after, top1_changed
    shifts    how the ranking of tokens moved, with the columns of `rank_shift`
    sites     one row a site, in the order of computation: site, name, layer, tokens; cosine (mean over the tokens) and
              cosine_min; difference (‖after - before‖ / ‖before‖ of a token, the mean) and difference_max; norm_before,
              norm_after (means); cka (empty where none was taken); parts (difference_max is beyond the tolerance)
    parting   one row a prompt: row, site, layer, pos, read, difference, of the first site in the order of computation
              at which a token's difference is beyond the tolerance, and of the first such token; empty where none is.
              Without rows where the models do not have the same sites
    stream    of the first prompts: row, pos, read, layer, difference, cosine at resid_post
    left_out  what, why: what was not compared, or has no meaning for these two
    names     what the two are called
    tolerance the relative difference beyond which they have parted
    about     how it was made; plain values
    """

    tokens: pd.DataFrame
    shifts: pd.DataFrame
    sites: pd.DataFrame
    parting: pd.DataFrame
    stream: pd.DataFrame
    left_out: pd.DataFrame
    names: tuple[str, str]
    tolerance: float
    about: Mapping[str, Any]

    @property
    def first(self) -> AnySite | None:
        """The first site at which any prompt parts, None where none does.

        `Unsupported` where the models' sites are not the same, so that there is no order that both follow.
        """
        if self.parting.empty:
            why = self.left_out.set_index("what").loc["the site where they part first", "why"]
            raise Unsupported(
                f"where the two part first cannot be said: {why}. found.sites has what they share"
            )
        parted = set(self.parting["site"]) - {""}
        return next((parse(site) for site in self.sites["site"] if site in parted), None)

    @property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt: row, tokens; kl (mean over its tokens), kl_max, and kl_max_pos, where that is; top1_changed
        (how many tokens); loss_before, loss_after, loss_delta (means); parts_at (the site, where that can be said)."""
        of = self.tokens.groupby("row", sort=True)
        found = of.agg(tokens=("pos", "size"), kl=("kl", "mean"), kl_max=("kl", "max"))
        found["kl_max_pos"] = self.tokens.loc[of["kl"].idxmax(), "pos"].to_numpy()
        found["top1_changed"] = of["top1_changed"].sum()
        for name in ("loss_before", "loss_after", "loss_delta"):
            found[name] = of[name].mean()
        found, at = (
            found.reset_index(),
            dict(zip(self.parting["row"], self.parting["site"], strict=True)),
        )
        return found.assign(parts_at=[at[row] for row in found["row"]]) if at else found

    def page(self, *, title: str = "", question: str = "", drawn: int = 1) -> Report:
        """One page of it; the first `drawn` prompts have figures. Its tables are written as CSV, JSON, Markdown and
        LaTeX beside it."""
        names = ("prompts", "tokens", "shifts", "sites", "parting", "stream", "left_out")
        tables: dict[str, pd.DataFrame] = {name: getattr(self, name) for name in names}
        first = "" if self.parting.empty else str(self.first or "")
        found = DiffTables(tables, self.names, first, self.tolerance, self.about)
        return page_of(found, title=title, question=question, drawn=drawn)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page and all tables to a folder; the page's path."""
        return self.page().write(folder)

    def _repr_html_(self) -> str:
        facts = {"part first at": self.first or "no site"} if len(self.parting) else {}
        return shown(
            f"Difference: {self.names[0]} and {self.names[1]}", facts, records(self.prompts)
        )

    def __repr__(self) -> str:
        kl, changed = self.tokens["kl"].mean(), self.tokens["top1_changed"].mean()
        where = (
            ""
            if self.parting.empty
            else f"; they part at {self.first}"
            if self.first
            else "; they never part"
        )
        return (
            f"Difference({self.names[0]} and {self.names[1]}: {len(self.tokens)} tokens, KL {kl:.3g} nats a token, "
            f"another first token after {changed:.0%}{where})"
        )


@checks_arguments
def diff(
    before: LM,
    after: LM,
    prompts: Prompts,
    *,
    hooks_before: Hooks = (),
    hooks_after: Hooks = (),
    while_before: Around | None = None,
    while_after: Around | None = None,
    sites: SitesLike | None = None,
    cka: SitesLike | bool = True,
    pos: PosLike = None,
    rank_pos: PosLike = -1,
    top: int = 10,
    watch: Iterable[Token] | Token = (),
    tolerance: float = 1e-4,
    shown: int = 3,
    names: tuple[str, str] | None = None,
    batch_tokens: int = 512,
    memory: int = 2**30,
) -> Difference:
    """Two models on the same prompts: what they say, where inside they part first, and how alike each site is.

    For a base model and a fine-tuned one, float32 and bfloat16, a model before and after an edit of its weights (of
    which one is a copy). Both read the same tokens: other vocabularies, tokenizers or token ids raise
    `OtherVocabulary`. One model in two states is given twice, with hooks on one side, or with a block around the
    forwards of one side: `while_before=model.disable_adapter` for an adapter of PEFT, off and on. Without either, the
    same model given twice raises `BadHook`.

    `sites` are compared, all vectors that both have unless given; `cka` chooses those whose linear CKA is taken (True:
    those of `sites`, or embed, attn_out, mlp_out, resid_post and final_norm; False: none). `pos` are the positions that
    are compared, all unless given, and `rank_pos` those of the table of shifts, with the `top` and `watch`ed tokens.
    Two models have parted where a token's vectors differ by more than `tolerance` of the first one's length: rounding
    in float32 gives about 1e-6, in bfloat16 4e-3. CKA is carried by the longest vectors, often those of the first
    token, which pos=slice(1, None) leaves out. Models of other depths or widths are compared as far as that means
    something, sites by name, and `left_out` says what is not.

    Forwards are of at most `batch_tokens` tokens (with hooks: one of all prompts, whose rows they then are), and hold
    at most about `memory` bytes of activations and sums beside the logits; what does not fit is read in another pass
    over the prompts. Of the first `shown` prompts the stream is kept token by token.

    >>> found = diff(lm, lm, "I like oat milk in my", hooks_after=skip_block(17), sites=["resid_post", "attn_out"])
    >>> str(found.first), round(float(found.tokens["kl"].iloc[-1]), 3)
    ('resid_post.17', 0.082)
    """
    _check(batch_tokens=batch_tokens, memory=memory, top=top, shown=shown)
    meaning = "a part of a vector's length, such as 1e-4,"
    tolerance = finite_number(tolerance, "tolerance", least=0.0, meaning=meaning, error=OutOfRange)
    sides = (
        Side(before, together(hooks_before, "hooks_before"), while_before or nullcontext),
        Side(after, together(hooks_after, "hooks_after"), while_after or nullcontext),
    )
    stated = [*sides[0].hooks, *sides[1].hooks, while_before, while_after]
    if before.root is after.root and not any(each is not None for each in stated):
        raise BadHook(
            "both are one model: an edit of its weights is in both. Give a copy, hk.LM(copy.deepcopy(model), "
            "tokenizer), hooks_after=, or a block around the forwards of one, while_before=model.disable_adapter"
        )
    rows = rows_of(before, after, prompts)
    reader = reader_of(before, after)
    together_ = matched(before, after, sites)
    watched = tuple(reader.token(token) for token in read_tokens(watch, "watch"))
    edited = dict.fromkeys(
        i
        for side in sides
        for h in side.hooks
        if isinstance(h, LogitEdit)
        for i in h.named(side.lm)
    )
    asked = Asked(
        Where(as_pos(pos)), Where(as_pos(rank_pos)), top, watched, tuple(edited),
        _cka_at(cka, together_, before, chosen=sites is not None), float(tolerance), shown, batch_tokens, memory,
    )  # fmt: skip
    reading = Reading(reader, *sides, rows, together_, asked)
    reading.read()
    found = reading.tables() | {
        "left_out": pd.DataFrame(together_.left_out, columns=["what", "why"])
    }
    return Difference(
        **found,
        names=names or _names(sides),
        tolerance=asked.tolerance,
        about=_about(sides, reading),
    )


def _check(**given: int) -> None:
    for name, value in given.items():
        least = 0 if name == "shown" else 1
        whole_number(value, name, least=least)


def _cka_at(cka: SitesLike | bool, there: Matched, lm: LM, *, chosen: bool) -> frozenset[AnySite]:
    """The sites whose CKA is taken; `BadHook` where one is not compared."""
    if isinstance(cka, bool):
        return frozenset(
            s for s in there.sites if cka and (chosen or (isinstance(s, Site) and s.name in STREAM))
        )
    found = lm.expand(cka)
    missing = [site for site in found if site not in there.kinds]
    if missing:
        raise BadHook(f"cka= names {missing[0]}, which is not compared: name it in sites= as well")
    return frozenset(found)


def _names(sides: tuple[Side, Side]) -> tuple[str, str]:
    """What the two are called: the models' names, and what tells them apart where these are the same."""
    about = [about_model(side.lm) for side in sides]
    found = [str(each["model"]) for each in about]
    if found[0] != found[1]:
        return found[0], found[1]
    dtypes = [" and ".join(each["dtype"]) for each in about]
    if dtypes[0] != dtypes[1]:
        return f"{found[0]} in {dtypes[0]}", f"{found[1]} in {dtypes[1]}"
    return f"{found[0]} before", f"{found[1]} after"


def _about(sides: tuple[Side, Side], reading: Reading) -> dict[str, Any]:
    """How it was made, for JSON."""
    about: dict[str, Any] = {}
    for name, side in zip(("before", "after"), sides, strict=True):
        hooks = [json.loads(hook.to_json(tensors="digest")) for hook in side.hooks]
        within = (
            ""
            if side.around is nullcontext
            else getattr(side.around, "__qualname__", type(side.around).__name__)
        )
        model = {word: value for word, value in about_model(side.lm).items() if word != "versions"}
        about[name] = {**model, "hooks": hooks, "within": within}
    asked, rows = reading.asked, reading.rows
    settings = {"pos": repr(asked.where.pos), "rank_pos": repr(asked.ranked.pos), "top": asked.top}
    settings |= {"watch": list(asked.watched), "tolerance": asked.tolerance, "shown": asked.shown}
    settings |= {"batch_tokens": asked.batch_tokens, "cka": sorted(map(str, asked.cka))}
    prompts = {
        "prompts": [reading.reader.text(row) for row in rows],
        "tokens": [list(row) for row in rows],
    }
    return {**about, "versions": versions(), "git_commit": git_commit(), **settings, **prompts}
