"""Two models as a pair: whether they read the same tokens, and which sites they have in common."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...data.harvest.stored_values import ValueKind, probe_sites
from ...errors import BadHook, HookkitError, OtherVocabulary
from ...hooks.base import Hook
from ...hooks.capture import capture
from ...models.lm import LM
from ...models.prompts import Prompts, Row, as_batch, shorten
from ...models.sites import AXES, LOGIT_SITES, AnySite, Site, Sites, SitesLike, as_sites
from ...runs.forward import forward
from ...runs.run import Run
from ...tables.comparison import first_difference

Around: TypeAlias = Callable[[], AbstractContextManager[Any]]

NAME = "hookkit.diff"  # of the captures of a comparison
SKIPPED = {  # the sites that are compared only if sites= names them, and why
    "resid_pre": "is the stream that the block before leaves, resid_post or embed",
    "q_rot": "follows from q",
    "k_rot": "follows from k",
    "experts": "are numbers of experts, and no vectors",
    "lm_head": "is compared as logits",
    "scores": "have a number for each query and key, and no vector",
    "pattern": "has a number for each query and key, and no vector",
}
# The sites whose CKA is computed by default.
CKA_SITES = ("embed", "attn_out", "mlp_out", "resid_post", "final_norm")
ORDER = {name: number for number, name in enumerate(AXES)}
LAST_SITES = ("final_norm", *LOGIT_SITES)
FIRST_PARTING = "the site where they part first"  # in the table left_out


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models, the hooks that act in it, and a `with` block around its forwards."""

    lm: LM
    hooks: tuple[Hook, ...] = ()
    around: Around = nullcontext

    def run(self, rows: Sequence[Row], sites: Sites, *, logits: bool) -> Run:
        """One forward that captures these sites at every position."""
        captures = [capture(sites, name=NAME)] if len(sites) else []
        prompts = [list(row) for row in rows]
        which_logits = "all" if logits else "none"
        with torch.no_grad(), self.around():
            return forward(self.lm, prompts, *self.hooks, *captures, logits=which_logits)


def reader_of(before: LM, after: LM) -> LM:
    """The model that reads texts: the first, unless only the second has a tokenizer."""
    return after if before.tokenizer is None and after.tokenizer is not None else before


def rows_of(before: LM, after: LM, prompts: Prompts) -> tuple[Row, ...]:
    """The prompts' tokens. Raises `OtherVocabulary` if the models read them as different tokens."""
    _check_vocabularies(before, after)
    reader = reader_of(before, after)
    rows = as_batch(reader, prompts).rows
    other = after if reader is before else before
    if other.tokenizer is None:
        prompts = [list(row) for row in rows]
    other_rows = as_batch(other, prompts).rows
    for number, (row, other_row) in enumerate(zip(rows, other_rows, strict=True)):
        position = first_difference(row, other_row)
        if position is not None:
            token = _describe_token(reader, row, position)
            other_token = _describe_token(reader, other_row, position)
            raise OtherVocabulary(
                f"the models read prompt {number}, {shorten(reader.text(row))!r}, as different "
                f"tokens: at position {position} {token} and {other_token}. Give both the same "
                "tokenizer, or give token ids"
            )
    return rows


def _describe_token(reader: LM, row: Row, position: int) -> str:
    if position >= len(row):
        return "no token"
    return f"{reader.text(row[position : position + 1])!r} (id {row[position]})"


def _check_vocabularies(before: LM, after: LM) -> None:
    size_before, size_after = before.sizes["vocab"], after.sizes["vocab"]
    if size_before != size_after:
        raise OtherVocabulary(
            f"the models have vocabularies of {size_before} and {size_after} tokens, whose ranks "
            "and probabilities cannot be compared: give two with the same one, such as a model and "
            "its fine-tuned version with no token added"
        )
    if before.tokenizer is None or after.tokenizer is None or before.tokenizer is after.tokenizer:
        return
    words_before, words_after = _words_by_id(before), _words_by_id(after)
    different = sorted(dict(words_before.items() ^ words_after.items()))
    if different:
        first = different[0]
        raise OtherVocabulary(
            f"the tokenizers differ in {len(different)} tokens: id {first} is "
            f"{words_before.get(first, 'not there')!r} in the first and "
            f"{words_after.get(first, 'not there')!r} in the second. Give models that read the "
            "same tokens"
        )


def _words_by_id(lm: LM) -> dict[int, str]:
    return {number: word for word, number in lm.tokenizer.get_vocab().items()}


@dataclass(frozen=True, eq=False)
class SharedSites:
    """The sites that both models have, in the order of computation, and what is left out and why.

    `kinds` has what each site holds in the two models. `no_order` is "" or the reason why the first
    site where they part is not defined.
    """

    sites: tuple[AnySite, ...]
    kinds: dict[AnySite, tuple[ValueKind, ValueKind]]
    left_out: list[dict[str, str]]
    no_order: str

    def widths(self, site: AnySite) -> tuple[int, int]:
        """The number of elements that each model has for a token at this site."""
        before, after = self.kinds[site]
        return torch.Size(before.shape).numel(), torch.Size(after.shape).numel()


def shared_sites(before: LM, after: LM, sites: SitesLike | None) -> SharedSites:
    """The sites to compare: `sites`, which both models need to have, or all vectors of both."""
    left_out: list[dict[str, str]] = []
    sites_before = _select_sites(before, sites, "first")
    sites_after = _select_sites(after, sites, "second")
    lone_sites = {"first": sites_before - sites_after, "second": sites_after - sites_before}
    for which, lone in lone_sites.items():
        if lone:
            why = f"only the {which} model has it"
            left_out.append({"what": repr(_in_order(lone)), "why": why})
    if sites_before.isdisjoint(sites_after):
        raise BadHook(
            "the two models have no site in common: name some with sites=, such as hk.module(path) "
            "in both"
        )
    common = _in_order(sites_before & sites_after)
    kinds = _probe_kinds(before, after, common, named=sites is not None)
    if sites is None:
        names = {*before.layout.names} & {*after.layout.names}
        for name in sorted(names & {*SKIPPED}, key=list(SKIPPED).index):
            left_out.append({"what": name, "why": SKIPPED[name]})
    resized = [site for site, (one, other) in kinds.items() if one.shape != other.shape]
    if resized:
        size_before, size_after = (" x ".join(map(str, kind.shape)) for kind in kinds[resized[0]])
        why = f"they have other sizes, {size_before} and {size_after} at {resized[0]}"
        left_out.append({"what": f"cosine and difference at {Sites(tuple(resized))}", "why": why})
    same_sites = sites_before == sites_after and not resized
    no_order = _no_order(before, after, list(kinds), same_sites=same_sites)
    if no_order:
        left_out.append({"what": FIRST_PARTING, "why": no_order})
    return SharedSites(tuple(kinds), kinds, left_out, no_order)


def _in_order(sites: Iterable[AnySite]) -> Sites:
    """The sites in the order of computation."""
    return Sites(tuple(sorted(sites, key=order_of)))


def _probe_kinds(
    before: LM, after: LM, sites: Sites, *, named: bool
) -> dict[AnySite, tuple[ValueKind, ValueKind]]:
    """What the sites hold. Whole numbers have no cosine: they raise `BadHook` if `named`."""
    probed_before = probe_sites(before, sites, "hk.model_diff")
    probed_after = probe_sites(after, sites, "hk.model_diff")
    kinds, whole_numbers = {}, []
    for site in sites:
        pair = probed_before[site], probed_after[site]
        if all(kind.dtype.is_floating_point for kind in pair):
            kinds[site] = pair
        else:
            whole_numbers.append(site)
    if whole_numbers and named:
        raise BadHook(
            f"{Sites(tuple(whole_numbers))} hold whole numbers, which have no cosine: leave them "
            "out"
        )
    return kinds


def _select_sites(lm: LM, sites: SitesLike | None, which: str) -> set[AnySite]:
    """The named sites, or all vectors of a model. An error says which model lacks a site."""
    if sites is None:
        names = [name for name in lm.layout.names if name not in (*SKIPPED, "logits")]
        return set(lm.expand(names)) if names else set()
    try:
        return set(lm.expand(as_sites(sites)))
    except HookkitError as error:
        error.add_note(f"in the {which} model")
        raise


def _no_order(before: LM, after: LM, sites: Sequence[AnySite], *, same_sites: bool) -> str:
    """Why the first site where two models part is not defined; "" if it is."""
    if before.family.name != after.family.name:
        return f"they are of two families, {before.family.name} and {after.family.name}"
    if before.n_layers != after.n_layers:
        return f"they have {before.n_layers} and {after.n_layers} layers"
    if not same_sites:
        return "their sites differ, in which there are or how large they are"
    for site in sites:
        if not isinstance(site, Site):
            return f"{site} is a module, and what is computed before it is not known"
    return ""


def order_of(site: AnySite) -> tuple[object, ...]:
    """The key that sorts sites in the order of computation: by block, then as in the site table."""
    if not isinstance(site, Site):
        return (3, 0, 0, 0, str(site))
    layer = -1 if site.layer is None else site.layer
    head = -1 if site.head is None else site.head
    stage = 0 if site.layer is None else 1
    if site.name in LAST_SITES:
        stage = 2
    return (stage, layer, ORDER[site.name], head, "")
