"""Two models side by side: whether they read the same tokens, and which sites they have in common."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...data.harvest.stored_values import Kind, probed
from ...errors import BadHook, HookkitError, OtherVocabulary
from ...hooks.base import Hook
from ...hooks.capture import capture
from ...models.lm import LM
from ...models.prompts import Prompts, Row, as_batch, shortened
from ...models.sites import AXES, LOGITS, AnySite, Site, Sites, SitesLike, as_sites
from ...runs.forward import forward
from ...runs.run import Run

Around: TypeAlias = Callable[[], AbstractContextManager[Any]]

NAME = "hookkit.diff"  # of its captures
UNLESS_ASKED = {  # what is not compared unless it is asked for, and why
    "resid_pre": "is the stream that the block before leaves, resid_post or embed",
    "q_rot": "follows from q",
    "k_rot": "follows from k",
    "experts": "are numbers of experts, and no vectors",
    "lm_head": "is compared as logits",
    "logits": "",
    "scores": "have a number for each query and key, and no vector",
    "pattern": "has a number for each query and key, and no vector",
}
STREAM = (
    "embed",
    "attn_out",
    "mlp_out",
    "resid_post",
    "final_norm",
)  # whose CKA is taken unless others are asked for
ORDER = {name: place for place, name in enumerate(AXES)}
LAST = ("final_norm", *LOGITS)


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: a model, the hooks that act in it, and a block around each of its forwards."""

    lm: LM
    hooks: tuple[Hook, ...] = ()
    around: Around = nullcontext

    def run(self, rows: Sequence[Row], sites: Sites, *, logits: bool) -> Run:
        """One forward that keeps these sites at every position."""
        look = [capture(sites, name=NAME)] if len(sites) else []
        with torch.no_grad(), self.around():
            return forward(
                self.lm,
                [list(row) for row in rows],
                *self.hooks,
                *look,
                logits="all" if logits else "none",
            )


def reader_of(before: LM, after: LM) -> LM:
    """The one that reads texts: the first, or the one that has a tokenizer."""
    return after if before.tokenizer is None and after.tokenizer is not None else before


def rows_of(before: LM, after: LM, prompts: Prompts) -> tuple[Row, ...]:
    """The prompts' tokens, which both models read alike; `OtherVocabulary` where they do not."""
    _check_vocabularies(before, after)
    reader = reader_of(before, after)
    rows = as_batch(reader, prompts).rows
    other = after if reader is before else before
    given = prompts if other.tokenizer is not None else [list(row) for row in rows]
    for number, (one, two) in enumerate(zip(rows, as_batch(other, given).rows, strict=True)):
        if one != two:
            place = next(
                (n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
                min(len(one), len(two)),
            )
            said = [f"{reader.text(row[place : place + 1])!r} (id {row[place]})" if place < len(row) else "no token"
                    for row in (one, two)]  # fmt: skip
            raise OtherVocabulary(
                f"the models read prompt {number}, {shortened(reader.text(one))!r}, as different tokens: at position "
                f"{place} {said[0]} and {said[1]}. Give both the same tokenizer, or give token ids"
            )
    return rows


def _check_vocabularies(before: LM, after: LM) -> None:
    sizes = before.sizes["vocab"], after.sizes["vocab"]
    if sizes[0] != sizes[1]:
        raise OtherVocabulary(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens, whose ranks and probabilities cannot "
            "be compared: give two with the same one, such as a model and its fine-tuned version with no token added"
        )
    if before.tokenizer is None or after.tokenizer is None or before.tokenizer is after.tokenizer:
        return
    words = [
        {number: word for word, number in lm.tokenizer.get_vocab().items()}
        for lm in (before, after)
    ]
    different = sorted(
        number for number in {*words[0], *words[1]} if words[0].get(number) != words[1].get(number)
    )
    if different:
        said = [repr(each.get(different[0], "not there")) for each in words]
        raise OtherVocabulary(
            f"the tokenizers differ in {len(different)} tokens: id {different[0]} is {said[0]} in the first and "
            f"{said[1]} in the second. Give models that read the same tokens"
        )


@dataclass(frozen=True, eq=False)
class Matched:
    """The sites that both have, in the order in which they are computed; what each holds; and what is left out, why.

    `one_plan` is empty where the models have the same sites of the same sizes, so that one can say where they part
    first; else it says why not.
    """

    sites: tuple[AnySite, ...]
    kinds: dict[AnySite, tuple[Kind, Kind]]
    left_out: list[dict[str, str]]
    one_plan: str

    def widths(self, site: AnySite) -> tuple[int, int]:
        """How many numbers each model has there for a token."""
        return tuple(torch.Size(kind.shape).numel() for kind in self.kinds[site])  # pyright: ignore[reportReturnType]


def matched(before: LM, after: LM, sites: SitesLike | None) -> Matched:
    """The sites to compare: those asked for, which both need to have, or all vectors that both have."""
    left_out: list[dict[str, str]] = []
    chosen = [
        _all_of(lm) if sites is None else set(_asked(lm, sites, after)) for lm in (before, after)
    ]
    both = sorted(chosen[0] & chosen[1], key=place_of)
    for lone, which in ((chosen[0] - chosen[1], "first"), (chosen[1] - chosen[0], "second")):
        if lone:
            left_out.append(
                {
                    "what": repr(Sites(tuple(sorted(lone, key=place_of)))),
                    "why": f"only the {which} model has it",
                }
            )
    if not both:
        raise BadHook(
            "the two models have no site in common: name some with sites=, such as hk.module(path) in both"
        )
    kinds = [probed(lm, Sites(tuple(both)), "hk.diff") for lm in (before, after)]
    whole = [site for site in both if not all(kind[site].dtype.is_floating_point for kind in kinds)]
    if whole and sites is not None:
        raise BadHook(
            f"{Sites(tuple(whole))} hold whole numbers, which have no cosine: leave them out"
        )
    found = {site: (kinds[0][site], kinds[1][site]) for site in both if site not in whole}
    if sites is None:
        left_out += _left_aside(before, after)
    other = [site for site, (one, two) in found.items() if one.shape != two.shape]
    if other:
        one, two = found[other[0]]
        why = f"they have other sizes, {_size(one)} and {_size(two)} at {other[0]}"
        left_out.append({"what": f"cosine and difference at {Sites(tuple(other))}", "why": why})
    plan = _one_plan(
        before,
        after,
        bool(chosen[0] ^ chosen[1]),
        bool(other),
        [s for s in found if not isinstance(s, Site)],
    )
    if plan:
        left_out.append({"what": "the site where they part first", "why": plan})
    return Matched(tuple(found), found, left_out, plan)


def _size(kind: Kind) -> str:
    return " x ".join(map(str, kind.shape))


def _all_of(lm: LM) -> set[AnySite]:
    names = [name for name in lm.layout.names if name not in UNLESS_ASKED]
    return set(lm.expand(names)) if names else set()


def _asked(lm: LM, sites: SitesLike, after: LM) -> Sites:
    """The sites asked for, in one of the models; which of them has none is said."""
    try:
        return lm.expand(as_sites(sites))
    except HookkitError as error:
        error.add_note(f"in the {'second' if lm is after else 'first'} model")
        raise


def _left_aside(before: LM, after: LM) -> Iterable[dict[str, str]]:
    there = [
        name for name in UNLESS_ASKED if name in before.layout.names and name in after.layout.names
    ]
    return [{"what": name, "why": UNLESS_ASKED[name]} for name in there if UNLESS_ASKED[name]]


def _one_plan(before: LM, after: LM, lone: bool, sizes: bool, modules: Sequence[AnySite]) -> str:
    """Why one cannot say where two models part first; nothing where one can."""
    if before.family.name != after.family.name:
        return f"they are of two families, {before.family.name} and {after.family.name}"
    if before.n_layers != after.n_layers:
        return f"they have {before.n_layers} and {after.n_layers} layers"
    if lone or sizes:
        return "their sites differ, in which there are or how large they are"
    return (
        f"{modules[0]} is a module, and what is computed before it is not known" if modules else ""
    )


def place_of(site: AnySite) -> tuple[object, ...]:
    """Where a site comes in the order of computation: by block, and in a block as in the table of sites."""
    if not isinstance(site, Site):
        return (3, 0, 0, 0, str(site))
    stage = 2 if site.name in LAST else 0 if site.layer is None else 1
    return (
        stage,
        -1 if site.layer is None else site.layer,
        ORDER[site.name],
        -1 if site.head is None else site.head,
        "",
    )
