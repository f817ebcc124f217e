"""Two models as a pair: whether they read the same tokens, their common sites, their forwards.

Both models read the same batches, so that no difference comes from the padding. Sites are read in
groups whose values (of one batch) and sums fit into the allowed memory; the prompts are read once
more for each further group. Only sums are kept of a site's values.

The tokens that are compared are DataFrames. Columns: batch_row, row (its prompt), pos, token_id,
read (the token), following (the id of the next token of the prompt, -1 for the
last).
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ...data.harvest.stored_values import ValueKind, probe_sites
from ...data.harvest.texts import positions_of_row
from ...errors import BadHook, EmptySelection, HookkitError, OtherVocabulary
from ...hooks.base import Hook
from ...hooks.capture import capture
from ...models import next_token
from ...models.lm import LM
from ...models.named_positions import find_positions
from ...models.positions import Where
from ...models.prompts import Prompts, Row, as_batch, batches_by_length, shorten
from ...models.sites import (
    AXES,
    FEATURE_AXES,
    LOGIT_SITES,
    AnySite,
    Site,
    Sites,
    SitesLike,
    as_sites,
    has_name,
)
from ...models.tokens import different_tokens
from ...runs.forward import forward
from ...runs.run import Run
from ...tables.counterfactuals import first_difference
from ...tables.distributions import Distribution, token_texts
from ...tables.rank_tables import shift_table
from . import similarity

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
ORDER = {name: number for number, name in enumerate((*AXES, *FEATURE_AXES))}
LAST_SITES = ("final_norm", *LOGIT_SITES)
FIRST_PARTING = "the site where they part first"  # in the table left_out
LOGITS = Site("logits")
MOVERS = 3  # tokens that moved most, in the table of shifts
TOKEN_COLUMNS = ["batch_row", "row", "pos", "token_id", "following"]
PARTING_COLUMNS = ["row", "site", "layer", "pos", "read", "difference"]
STREAM_COLUMNS = ["row", "pos", "read", "layer", "difference", "cosine"]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models, the hooks that act in it, and a `with` block around its forwards."""

    lm: LM
    hooks: tuple[Hook, ...] = ()
    around: Around = nullcontext

    def run(self, rows: Sequence[Row], sites: Sites, *, logits: bool) -> Run:
        """One forward that captures these sites at every position."""
        captures = [capture(sites, name=NAME)] if len(sites) else []
        with torch.no_grad(), self.around():
            return forward(self.lm, list(rows), *self.hooks, *captures, logits=logits)


def reader_of(before: LM, after: LM) -> LM:
    """The model that reads texts: the first, unless only the second has a tokenizer."""
    return after if before.tokenizer is None and after.tokenizer is not None else before


def rows_of(before: LM, after: LM, prompts: Prompts) -> tuple[Row, ...]:
    """The prompts' tokens. Raises `OtherVocabulary` if the models read them as different tokens."""
    check_vocabularies(before, after)
    reader = reader_of(before, after)
    rows = as_batch(reader, prompts).rows
    other = after if reader is before else before
    if other.tokenizer is None:
        prompts = list(rows)
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


def check_vocabularies(before: LM, after: LM) -> None:
    """Raises `OtherVocabulary` if a token's id does not mean the same in both models."""
    size_before, size_after = before.sizes["vocab"], after.sizes["vocab"]
    if size_before != size_after:
        raise OtherVocabulary(
            f"the models have vocabularies of {size_before} and {size_after} tokens, whose ranks "
            "and probabilities cannot be compared: give two with the same one, such as a model and "
            "its fine-tuned version with no token added"
        )
    different = different_tokens(before, after)
    if different:
        first, (word_before, word_after) = next(iter(different.items()))
        raise OtherVocabulary(
            f"the tokenizers differ in {len(different)} tokens: id {first} is {word_before!r} in "
            f"the first and {word_after!r} in the second. Give models that read the same tokens"
        )


@dataclass(frozen=True, eq=False)
class SharedSites:
    """The sites that both models have, in the order of computation, and what is left out and why.

    `kinds` has each site, and what it holds in the two models. `no_order` is "" or the reason why
    the first site where they part is not defined.
    """

    kinds: dict[AnySite, tuple[ValueKind, ValueKind]]
    left_out: dict[str, str]
    no_order: str

    def widths(self, site: AnySite) -> tuple[int, int]:
        """The number of elements that each model has for a token at this site."""
        before, after = self.kinds[site]
        return torch.Size(before.shape).numel(), torch.Size(after.shape).numel()


def shared_sites(before: LM, after: LM, sites: SitesLike | None) -> SharedSites:
    """The sites to compare: `sites`, which both models need to have, or all vectors of both."""
    sites_before = _select_sites(before, sites, "first")
    sites_after = _select_sites(after, sites, "second")
    common = sites_before & sites_after
    if not common:
        raise BadHook(
            "the two models have no site in common: name some with sites=, such as hk.module(path) "
            "in both"
        )
    left_out = _lone_sites(sites_before, sites_after)
    kinds = _probe_kinds(before, after, _in_order(common), named=sites is not None)
    if sites is None:
        names = {*before.layout.names} & {*after.layout.names}
        left_out |= {name: why for name, why in SKIPPED.items() if name in names}
    resized = [site for site, (one, other) in kinds.items() if one.shape != other.shape]
    if resized:
        sizes = [" x ".join(map(str, kind.shape)) for kind in kinds[resized[0]]]
        left_out[f"cosine and difference at {Sites(tuple(resized))}"] = (
            f"they have other sizes, {sizes[0]} and {sizes[1]} at {resized[0]}"
        )
    same_sites = sites_before == sites_after and not resized
    no_order = _no_order(before, after, list(kinds), same_sites=same_sites)
    if no_order:
        left_out[FIRST_PARTING] = no_order
    return SharedSites(kinds, left_out, no_order)


def _lone_sites(before: set[AnySite], after: set[AnySite]) -> dict[str, str]:
    """The sites that only one model has, as texts, and which model that is."""
    result = {}
    for which, lone in (("first", before - after), ("second", after - before)):
        if lone:
            result[repr(_in_order(lone))] = f"only the {which} model has it"
    return result


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
        return "their sites have other names or sizes"
    for site in sites:
        if not isinstance(site, Site):
            return f"{site} is a module, and what is computed before it is not known"
    return ""


def order_of(site: AnySite) -> tuple[object, ...]:
    """The key that sorts sites in the order of computation: by block, then as in the site table."""
    if not isinstance(site, Site):
        return (2, str(site))  # modules are last
    layer, head = (-1 if number is None else number for number in (site.layer, site.head))
    return (int(site.name in LAST_SITES), layer, ORDER[site.name], head)


@dataclass(frozen=True, eq=False)
class DiffRequest:
    """What to compare, and how much memory it may need."""

    where: Where  # the positions that are compared
    rank_where: Where  # the positions whose ranks are compared
    top: int
    watched: tuple[int, ...]
    named: tuple[int, ...]  # tokens that hooks name
    cka: frozenset[AnySite]
    tolerance: float
    details: int
    batch_tokens: int
    memory: int  # bytes


@dataclass(eq=False)
class PairedRuns:
    """The forwards of two models over the same prompts. Owns the sums and tables while it runs."""

    reader: LM
    before: Side
    after: Side
    rows: tuple[Row, ...]
    shared: SharedSites
    request: DiffRequest
    similarities: dict[AnySite, similarity.SiteSimilarity] = field(default_factory=dict)
    partings: dict[int, dict[str, Any]] = field(default_factory=dict)  # by prompt
    token_tables: list[pd.DataFrame] = field(default_factory=list)
    shift_tables: list[pd.DataFrame] = field(default_factory=list)
    stream_tables: list[pd.DataFrame] = field(default_factory=list)
    logit_distances: list[tuple[pd.DataFrame, similarity.TokenDistances]] = field(
        default_factory=list
    )

    def read(self) -> None:
        """Run all forwards."""
        batches = self.batches()
        tokens = [self._tokens(batch, self.request.where) for batch in batches]
        count = sum(map(len, tokens))
        if not count:
            raise EmptySelection(
                f"pos={self.request.where.pos!r} means no token of these prompts: choose others"
            )
        self.similarities[LOGITS] = similarity.SiteSimilarity(LOGITS, None)
        for number, sites in enumerate(self.groups(batches, count)):
            self.similarities |= {site: self._new_sums(site, count) for site in sites}
            for batch, batch_tokens in zip(batches, tokens, strict=True):
                self._read_batch(batch, batch_tokens, sites, logits=number == 0)
        # The logits are last in the order of computation.
        for batch_tokens, token_differences in self.logit_distances:
            self._note_partings(LOGITS, batch_tokens, token_differences.difference)

    def _new_sums(self, site: AnySite, count: int) -> similarity.SiteSimilarity:
        cka = None
        if site in self.request.cka:
            cka = similarity.RunningCKA(count, self.shared.widths(site))
        return similarity.SiteSimilarity(site, cka)

    def batches(self) -> list[list[int]]:
        """The prompts in batches of similar length. With hooks there is one: rows are prompts."""
        if self.before.hooks or self.after.hooks:
            return [list(range(len(self.rows)))]
        one_length = self.before.lm.config is None or self.after.lm.config is None
        lengths = list(map(len, self.rows))
        return batches_by_length(lengths, self.request.batch_tokens, one_length=one_length)

    def groups(self, batches: Sequence[Sequence[int]], count: int) -> list[Sites]:
        """The sites in groups that fit into the memory, for `count` tokens that are compared."""
        n_tokens = max(map(self._padded_size, batches))
        groups: list[list[AnySite]] = []
        free = 0  # bytes
        for site, (kind_before, kind_after) in self.shared.kinds.items():
            needed = n_tokens * (kind_before.bytes + kind_after.bytes)
            if site in self.request.cka:
                needed += similarity.cka_bytes(count, self.shared.widths(site))
            if not groups or needed > free:
                groups.append([])
                free = self.request.memory
            groups[-1].append(site)
            free -= needed
        return [Sites(tuple(group)) for group in groups]

    def _padded_size(self, batch: Sequence[int]) -> int:
        """The number of tokens of a batch with its padding."""
        return len(batch) * max(len(self.rows[row]) for row in batch)

    def _tokens(self, batch: Sequence[int], where: Where) -> pd.DataFrame:
        """The selected tokens of a batch. Raises `OutOfRange` for a position without a token."""
        records = []
        for batch_row, row in enumerate(batch):
            ids = self.rows[row]
            followings = [*ids[1:], -1]
            find = partial(find_positions, self.reader, ids)
            for pos in positions_of_row(ids, where, find):
                records.append((batch_row, row, pos, ids[pos], followings[pos]))
        tokens = pd.DataFrame(records, columns=TOKEN_COLUMNS)
        return tokens.assign(read=token_texts(self.reader, tokens["token_id"]))

    def _read_batch(
        self, batch: Sequence[int], tokens: pd.DataFrame, sites: Sites, *, logits: bool
    ) -> None:
        rows = [self.rows[row] for row in batch]
        before = self.before.run(rows, sites, logits=logits)
        after = self.after.run(rows, sites, logits=logits)
        if tokens.empty:
            return
        for site in sites:
            values_before = _select(before.captured(site, NAME).values, tokens)
            values_after = _select(after.captured(site, NAME).values, tokens)
            token_differences = self.similarities[site].add(values_before, values_after)
            if token_differences is not None:
                self._note_partings(site, tokens, token_differences.difference)
                self._keep_stream(site, tokens, token_differences)
        if logits:
            self._compare_logits(batch, tokens, before, after)

    def _compare_logits(
        self, batch: Sequence[int], tokens: pd.DataFrame, before: Run, after: Run
    ) -> None:
        reader = self.reader
        pair = _select(before.logits, tokens), _select(after.logits, tokens)
        self.token_tables.append(similarity.prediction_distances(reader, *pair, tokens))
        real_pair = [next_token.token_logits(logits, reader.n_tokens) for logits in pair]
        token_differences = similarity.token_distances(*real_pair)
        self.similarities[LOGITS].add_distances(token_differences)
        self.logit_distances.append((tokens, token_differences))
        ranked_tokens = self._tokens(batch, self.request.rank_where)
        if not ranked_tokens.empty:
            self._compare_ranks(ranked_tokens, before, after)

    def _compare_ranks(self, tokens: pd.DataFrame, before: Run, after: Run) -> None:
        locations: Any = pd.DataFrame(tokens[["row", "pos"]]).to_dict("records")
        sides = []
        for run in (before, after):
            logits = _select(run.logits, tokens).detach().float().cpu()
            sides.append(map(partial(Distribution, self.reader), locations, logits))
        pairs = list(zip(*sides, strict=True))
        watched, named = list(self.request.watched), list(self.request.named)
        table = shift_table(pairs, self.request.top, MOVERS, watched, named)
        self.shift_tables.append(table)

    def _note_partings(
        self, site: AnySite, tokens: pd.DataFrame, difference: Float[Tensor, " token"]
    ) -> None:
        """Note the prompts that part at this site, and at no site before it."""
        layer = similarity.layer_of(site)
        table = tokens.assign(site=str(site), layer=layer, difference=difference.tolist())
        parting: Any = table[~(table["difference"] <= self.request.tolerance)]  # with NaN
        for record in parting.drop_duplicates("row").to_dict("records"):
            self.partings.setdefault(record["row"], record)

    def _keep_stream(
        self, site: AnySite, tokens: pd.DataFrame, token_differences: similarity.TokenDistances
    ) -> None:
        """Keep the differences of the stream after each block for the first `details` prompts."""
        is_shown = (tokens["row"] < self.request.details).to_numpy()
        if has_name(site, "resid_post") and is_shown.any():
            table = tokens.assign(
                layer=site.layer,
                difference=token_differences.difference.tolist(),
                cosine=token_differences.cosine.tolist(),
            )
            self.stream_tables.append(pd.DataFrame(table[is_shown][STREAM_COLUMNS]))

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables tokens, shifts, sites, parting and stream."""
        order = ["row", "pos", "rank_after", "token_id"]
        tables = {
            "tokens": _concatenate(self.token_tables, ["row", "pos"], []),
            "shifts": _concatenate(self.shift_tables, order, ["row", "pos"]),
            "stream": _concatenate(self.stream_tables, ["row", "layer", "pos"], STREAM_COLUMNS),
        }
        tolerance = self.request.tolerance
        sites = (*self.shared.kinds, LOGITS)
        records = [self.similarities[site].row(tolerance) for site in sites]
        table = pd.DataFrame(records, columns=list(similarity.COLUMNS))
        tables["sites"] = table.astype({"layer": "Int64", "parts": "boolean"})
        never = {"site": "", "layer": None, "pos": None, "read": "", "difference": float("nan")}
        rows = [] if self.shared.no_order else range(len(self.rows))
        records = [self.partings.get(row, {"row": row, **never}) for row in rows]
        parting = pd.DataFrame(records, columns=PARTING_COLUMNS)
        tables["parting"] = parting.astype({"layer": "Int64", "pos": "Int64"})
        return tables


def _concatenate(tables: list[pd.DataFrame], order: list[str], columns: list[str]) -> pd.DataFrame:
    """The tables in one, sorted by `order`; a table without rows that has `columns` for none."""
    if not tables:
        return pd.DataFrame(columns=columns)
    return pd.concat(tables, ignore_index=True).sort_values(order, ignore_index=True)


def _select(values: Float[Tensor, "row pos ..."], tokens: pd.DataFrame) -> Tensor:
    """The values at these tokens of a batch."""
    index = torch.tensor(tokens[["batch_row", "pos"]].to_numpy(), device=values.device)
    return values[index[:, 0], index[:, 1]]
