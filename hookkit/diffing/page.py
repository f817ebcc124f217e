"""The page of two models beside one another."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..prompts import shortened
from ..reports import Content, Folded, Part, Report, report
from .drawing import stream_map, through_layers, token_bars

FORMATS = ("csv", "json", "md", "tex")
SHIFT = ["token", "logit_before", "logit_after", "logit_delta", "prob_before", "prob_after", "prob_delta",
         "rank_before", "rank_after", "rank_delta", "why", "token_id"]  # fmt: skip
SAID = ["pos", "read", "kl", "js", "entropy_before", "entropy_after", "entropy_delta", "loss_before", "loss_after",
        "loss_delta", "top1_before", "top1_after"]  # fmt: skip
SHOWN = ["site", "cosine", "cosine_min", "difference", "difference_max", "norm_before", "norm_after", "cka", "parts"]
CAPTIONS = {
    "prompts": "each prompt", "tokens": "how far the distributions are apart, after each token",
    "shifts": "how the ranking of tokens moved", "sites": "how alike each site is",
    "parting": "where each prompt parts first", "stream": "the stream of the first prompts, token by token",
    "left_out": "what was not compared",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Found:
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


def page_of(found: Found, *, title: str, question: str, drawn: int) -> Report:
    """The page, with the tables as its files."""
    parts: list[Content] = [*_beginning(found, question), *_parting(found), *_alike(found)]
    for row in range(min(int(found.about["shown"]), len(found.tables["prompts"]))):
        parts += _of_prompt(found, row, drawn=row < drawn)
    parts += _left_out(found)
    parts += _made_again(found)
    footer = f"Before is {found.names[0]}, after is {found.names[1]}; deltas are after minus before."
    title = title or f"{found.names[0]} and {found.names[1]}"
    page = report(title, *parts, footer=footer)
    data = [Part(table, name, CAPTIONS[name]) for name, table in found.tables.items() if not table.empty]
    said = {"title": title, "question": question, "answer": _answer(found)}
    about = json.dumps({**said, **found.about}, indent=1, ensure_ascii=False) + "\n"
    return Report(page.title, page.parts, page.footer, tuple(data), FORMATS, {"about.json": about})


def _answer(found: Found) -> str:
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


def _beginning(found: Found, question: str) -> Iterable[Content]:
    """The question, what came of it, and the prompts."""
    prompts = found.tables["prompts"]
    yield from [question] if question else []
    yield _answer(found)
    yield "# The prompts"
    caption = "kl is the mean over a prompt's tokens, in nats; kl_max_pos is where it is largest. Losses are means."
    yield Part(prompts.assign(prompt=_texts(found, prompts)), "prompts_shown", caption, file="prompts")


def _texts(found: Found, prompts: pd.DataFrame) -> list[str]:
    return [f"“{shortened(found.about['prompts'][row])}”" for row in prompts["row"]]


def _parting(found: Found) -> Iterable[Content]:
    yield "# Where they part"
    parting = found.tables["parting"]
    if parting.empty:
        yield "That cannot be said of these two: " + _why(found, "the site where they part first") + "."
        return
    if not found.first:
        yield f"Nowhere: at no site do a token's vectors differ by more than {found.tolerance:g} of their length."
        return
    count = parting["site"].tolist().count(found.first)
    yield (
        f"First at {found.first}, in {count} of {len(parting)} prompts: no site that is computed before it has a token "
        f"whose vectors differ by more than {found.tolerance:g} of their length."
    )
    caption = (
        "The first site in the order of computation whose difference is beyond the tolerance, and its first token."
    )
    yield Part(parting, "parting_shown", caption, file="parting")


def _why(found: Found, what: str) -> str:
    left_out = found.tables["left_out"]
    return dict(zip(left_out["what"], left_out["why"], strict=True))[what]


def _alike(found: Found) -> Iterable[Content]:
    yield "# How alike each site is"
    sites = found.tables["sites"]
    figure = through_layers(sites, found.tolerance, title="Through the layers")
    if figure is not None:
        yield Part(figure, "through_layers", "Means over all tokens, log axes. Dashed: the tolerance.")
    some = sites[sites["name"].isin(["embed", "resid_post", "final_norm", "logits"])]
    few = pd.DataFrame((some if len(some) > 1 else sites)[SHOWN])
    caption = (
        "cosine is a mean over the tokens, difference that of ‖after − before‖ / ‖before‖; cka is linear CKA "
        "(Kornblith et al. 2019), 1 where the one is the other turned and scaled."
    )
    yield Part(few, "sites_shown", caption, file="sites")


def _of_prompt(found: Found, row: int, *, drawn: bool) -> Iterable[Content]:
    tokens, shifts, stream = (found.of(name, row) for name in ("tokens", "shifts", "stream"))
    yield f"# “{shortened(found.about['prompts'][row])}”"
    if drawn and not tokens.empty:
        yield Part(token_bars(tokens, title="How far apart they are after each token"), f"tokens_{row}")
    yield Part(pd.DataFrame(tokens[SAID]), f"said_{row}", "Entropy and loss in nats.", file="tokens")
    if not shifts.empty:
        caption = "The first tokens of each, the largest movers, and why each is here."
        yield Part(pd.DataFrame(shifts[["pos", *SHIFT]]), f"shifts_{row}", caption, file="shifts")
    figure = stream_map(stream, title="The stream behind each layer") if drawn else None
    if figure is not None:
        yield Part(figure, f"stream_{row}", "‖after − before‖ / ‖before‖ at resid_post.")


def _left_out(found: Found) -> Iterable[Content]:
    table = found.tables["left_out"]
    if not table.empty:
        yield "# What was not compared"
        yield Part(table, "left_out_shown", "", file="left_out")


def _made_again(found: Found) -> Iterable[Content]:
    yield "# How to make it again"
    lines = [f"{when.capitalize()}: {_model(found.about[when])}." for when in ("before", "after")]
    lines.append(", ".join(f"{name} {number}" for name, number in found.about["versions"].items()) + ".")
    yield "\n".join([*lines, "about.json has all of it."])
    for when in ("before", "after"):
        if found.about[when]["hooks"]:
            hooks = json.dumps(found.about[when]["hooks"], indent=1, ensure_ascii=False)
            yield Folded(f"Hooks {when}, as JSON", hooks)


def _model(about: Mapping[str, Any]) -> str:
    """One of the two in words."""
    words = f"{about['model']} ({about['class']}, {', '.join(about['dtype'])}, {about['device']})"
    words += f" with adapters {', '.join(about['adapters'])}" if about["adapters"] else ""
    words += f" with {len(about['hooks'])} hook{'s' * (len(about['hooks']) > 1)}" if about["hooks"] else ""
    return words + (f" within {about['within']}" if about["within"] else "")
