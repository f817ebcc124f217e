"""The forwards of a comparison of two models, and the tables that are computed from them.

Both models read the same batches, so that no difference comes from the padding. Sites are read in
groups whose values (of one batch) and sums fit into the allowed memory; the prompts are read once
more for each further group. Only sums are kept of a site's values.

The tokens that are compared are DataFrames. Columns: batch_row, row (its prompt), pos, token_id,
read (the token as a Python literal), following (the id of the next token of the prompt, -1 for the
last).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...data.harvest.texts import positions_of_row
from ...errors import EmptySelection
from ...models import next_token
from ...models.lm import LM
from ...models.positions import Where
from ...models.prompts import Row, batches_by_length, positions_of_text
from ...models.sites import AnySite, Site, Sites
from ...runs.run import Run
from ...tables.distributions import Distribution
from ...tables.rank_tables import add_deltas
from ..comparison_page import literal_shifts, token_literal, token_literals
from . import similarity
from .pairing import NAME, SharedSites, Side

LOGITS = Site("logits")
LOGITS_AT_ONCE = 2**22  # logits in one piece of work: 32 MiB of float64
MOVERS = 3  # tokens that moved most, in the table of shifts
TOKEN_COLUMNS = ["batch_row", "row", "pos", "token_id", "following"]
PARTING_COLUMNS = ["row", "site", "layer", "pos", "read", "difference"]
STREAM_COLUMNS = ["row", "pos", "read", "layer", "difference", "cosine"]
Logits = Float[Tensor, "token vocab"]


def distances(lm: LM, before: Logits, after: Logits, tokens: pd.DataFrame) -> pd.DataFrame:
    """How far apart two models' distributions are after each token.

    Columns: row, pos, read (the token at pos, the last one read); kl (KL(before‖after), nats),
    kl_reverse, js (nats, at most ln 2); entropy_before, _after, _delta (nats); top1_before,
    top1_after, top1_changed; loss_before, _after, _delta (nats, of the token that follows in the
    prompt; empty after its last).
    """
    step = max(1, LOGITS_AT_ONCE // before.shape[-1])
    following = torch.tensor(tokens["following"].tolist())
    parts = []
    for start in range(0, len(tokens), step):
        piece = slice(start, start + step)
        parts.append(_compare_logits(lm, before[piece], after[piece], following[piece]))
    numbers = pd.concat(parts, ignore_index=True)
    return pd.concat([tokens[["row", "pos", "read"]], numbers], axis="columns")


def _compare_logits(
    lm: LM, before: Logits, after: Logits, following: Int[Tensor, " token"]
) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    logprobs = {}
    for when, logits in (("before", before), ("after", after)):
        logprobs[when] = next_token.exact_logprobs(logits.detach().cpu())
        columns[f"entropy_{when}"] = next_token.entropy_of(logprobs[when])
        scores = next_token.token_logits(logits, lm.n_tokens)
        unknown = scores.isnan().any(-1)  # no token is the first
        columns[f"top1_{when}"] = scores.argmax(-1).masked_fill(unknown, -1)
        losses = 0.0 - next_token.values_at(logprobs[when], following.clamp(min=0))
        columns[f"loss_{when}"] = losses.masked_fill(following < 0, float("nan"))
    apart = next_token.divergences(logprobs["before"], logprobs["after"])
    columns |= {name: apart[name] for name in ("kl", "kl_reverse", "js")}
    table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
    changed = table["top1_before"] != table["top1_after"]
    firsts: dict[str, list[str | None]] = {}
    for name in ("top1_before", "top1_after"):
        ids = table.pop(name).tolist()
        firsts[name] = [None if number < 0 else token_literal(lm, number) for number in ids]
    table = add_deltas(table, ["entropy"]).assign(**firsts, top1_changed=changed)
    return add_deltas(table, ["loss"])


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
            for site in sites:
                cka = None
                if site in self.request.cka:
                    cka = similarity.RunningCKA(count, self.shared.widths(site))
                self.similarities[site] = similarity.SiteSimilarity(site, cka)
            for batch, batch_tokens in zip(batches, tokens, strict=True):
                self._read_batch(batch, batch_tokens, sites, logits=number == 0)
        # The logits are last in the order of computation.
        for batch_tokens, token_differences in self.logit_distances:
            self._note_partings(LOGITS, batch_tokens, token_differences.difference)

    def batches(self) -> list[list[int]]:
        """The prompts in batches of similar length. With hooks there is one: rows are prompts."""
        if self.before.hooks or self.after.hooks:
            return [list(range(len(self.rows)))]
        one_length = self.before.lm.config is None or self.after.lm.config is None
        lengths = list(map(len, self.rows))
        return batches_by_length(lengths, self.request.batch_tokens, one_length=one_length)

    def groups(self, batches: Sequence[Sequence[int]], count: int) -> list[Sites]:
        """The sites in groups that fit into the memory, for `count` tokens that are compared."""
        padded_sizes = []
        for batch in batches:
            padded_sizes.append(len(batch) * max(len(self.rows[row]) for row in batch))
        groups: list[list[AnySite]] = []
        free = 0  # bytes
        for site in self.shared.sites:
            needed = max(padded_sizes) * sum(kind.bytes for kind in self.shared.kinds[site])
            if site in self.request.cka:
                needed += similarity.cka_bytes(count, self.shared.widths(site))
            if not groups or needed > free:
                groups.append([])
                free = self.request.memory
            groups[-1].append(site)
            free -= needed
        return [Sites(tuple(group)) for group in groups]

    def _tokens(self, batch: Sequence[int], where: Where) -> pd.DataFrame:
        """The selected tokens of a batch. Raises `OutOfRange` for a position without a token."""
        records = []
        for batch_row, row in enumerate(batch):
            ids = self.rows[row]
            followings = [*ids[1:], -1]
            for pos in positions_of_row(
                ids, where, lambda at, ids=ids: positions_of_text(self.reader, ids, at)
            ):
                records.append((batch_row, row, pos, ids[pos], followings[pos]))
        tokens = pd.DataFrame(records, columns=TOKEN_COLUMNS)
        return tokens.assign(read=token_literals(self.reader, tokens["token_id"]))

    def _read_batch(
        self, batch: Sequence[int], tokens: pd.DataFrame, sites: Sites, *, logits: bool
    ) -> None:
        rows = [self.rows[row] for row in batch]
        before = self.before.run(rows, sites, logits=logits)
        after = self.after.run(rows, sites, logits=logits)
        if tokens.empty:
            return
        for site in sites:
            values = [_select(run.captured(site, NAME).values, tokens) for run in (before, after)]
            token_differences = self.similarities[site].add(*values)
            if token_differences is not None:
                self._note_partings(site, tokens, token_differences.difference)
                self._keep_stream(site, tokens, token_differences)
        if logits:
            self._compare_logits(batch, tokens, before, after)

    def _compare_logits(
        self, batch: Sequence[int], tokens: pd.DataFrame, before: Run, after: Run
    ) -> None:
        reader, request = self.reader, self.request
        pair = _select(before.logits, tokens), _select(after.logits, tokens)
        self.token_tables.append(distances(reader, *pair, tokens))
        real_pair = [next_token.token_logits(logits, reader.n_tokens) for logits in pair]
        token_differences = similarity.token_distances(*real_pair)
        self.similarities[LOGITS].add_distances(token_differences)
        self.logit_distances.append((tokens, token_differences))
        tokens = self._tokens(batch, request.rank_where)
        if tokens.empty:
            return
        logits_before, logits_after = (
            _select(run.logits, tokens).detach().float().cpu() for run in (before, after)
        )
        locations: Any = pd.DataFrame(tokens[["row", "pos"]]).to_dict("records")
        pairs = []
        for location, *logits in zip(locations, logits_before, logits_after, strict=True):
            one, other = (Distribution(reader, location, vector) for vector in logits)
            pairs.append((one, other))
        watched, named = list(request.watched), list(request.named)
        self.shift_tables.append(literal_shifts(pairs, request.top, MOVERS, watched, named))

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
        if isinstance(site, Site) and site.name == "resid_post" and is_shown.any():
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
        records = []
        for site in (*self.shared.sites, LOGITS):
            records.append(self.similarities[site].row(self.request.tolerance))
        sites = pd.DataFrame(records, columns=list(similarity.COLUMNS))
        tables["sites"] = sites.astype({"layer": "Int64", "parts": "boolean"})
        never = {"site": "", "layer": None, "pos": None, "read": "", "difference": float("nan")}
        records = []
        if not self.shared.no_order:
            for row in range(len(self.rows)):
                records.append(self.partings.get(row, {"row": row} | never))
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
