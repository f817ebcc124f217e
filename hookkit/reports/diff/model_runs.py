"""The forwards of a comparison of two models, and the tables that are computed from them.

Both models read the same batches, so that no difference comes from the padding. Sites are read in
groups whose values (of one batch) and sums fit into the allowed memory; the prompts are read once
more for each further group. Only sums are kept of a site's values.
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
from ...models.lm import LM
from ...models.next_token import (
    divergences,
    entropy_of,
    exact_logprobs,
    token_logits,
    values_at,
)
from ...models.positions import Where
from ...models.prompts import Row, batches_by_length, positions_of_text
from ...models.sites import AnySite, Site, Sites
from ...runs.run import Run
from ...tables.distributions import Distribution
from ...tables.rank_tables import shift_table
from ..shift.named_edits import token_literal
from .pairing import NAME, SharedSites, Side
from .similarity import (
    COLUMNS,
    RunningCKA,
    SiteSimilarity,
    TokenDistances,
    cka_bytes,
    layer_of,
    token_distances,
)

LOGITS = Site("logits")
LOGITS_AT_ONCE = 2**22  # logits in one piece of work: 32 MiB of float64
MOVERS = 3  # tokens that moved most, in the table of shifts
PARTING_COLUMNS = ["row", "site", "layer", "pos", "read", "difference"]
STREAM_COLUMNS = ["row", "pos", "read", "layer", "difference", "cosine"]
Logits = Float[Tensor, "token vocab"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of some prompts, as lists of equal length.

    Each token has its prompt's number, its position, its id, and the id of the token that follows
    in the prompt, -1 for the last.
    """

    row: list[int]
    pos: list[int]
    ids: list[int]
    following: list[int]

    def __len__(self) -> int:
        return len(self.row)


def distances(lm: LM, before: Logits, after: Logits, tokens: Tokens) -> pd.DataFrame:
    """How far apart two models' distributions are after each token.

    Columns: row, pos, read (the token at pos, the last one read); kl (KL(before‖after), nats),
    kl_reverse, js (nats, at most ln 2); entropy_before, _after, _delta (nats); top1_before,
    top1_after, top1_changed; loss_before, _after, _delta (nats, of the token that follows in the
    prompt; empty after its last).
    """
    step = max(1, LOGITS_AT_ONCE // before.shape[-1])
    following = torch.tensor(tokens.following)
    parts = []
    for start in range(0, len(tokens), step):
        piece = slice(start, start + step)
        parts.append(_compare_logits(lm, before[piece], after[piece], following[piece]))
    table = pd.concat(parts, ignore_index=True)
    table.insert(0, "row", tokens.row)
    table.insert(1, "pos", tokens.pos)
    table.insert(2, "read", [token_literal(lm, token) for token in tokens.ids])
    return table


def _compare_logits(
    lm: LM, before: Logits, after: Logits, following: Int[Tensor, " token"]
) -> pd.DataFrame:
    p, q = exact_logprobs(before.detach().cpu()), exact_logprobs(after.detach().cpu())
    distances = divergences(p, q)
    entropy_before, entropy_after = entropy_of(p), entropy_of(q)
    columns = {
        "kl": distances["kl"],
        "kl_reverse": distances["kl_reverse"],
        "js": distances["js"],
        "entropy_before": entropy_before,
        "entropy_after": entropy_after,
        "entropy_delta": entropy_after - entropy_before,
    }
    table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
    top_before, top_after = _top_tokens(lm, before), _top_tokens(lm, after)
    table["top1_before"] = [token_literal(lm, token) for token in top_before]
    table["top1_after"] = [token_literal(lm, token) for token in top_after]
    table["top1_changed"] = [one != other for one, other in zip(top_before, top_after, strict=True)]
    table["loss_before"] = _losses(p, following)
    table["loss_after"] = _losses(q, following)
    loss_before, loss_after = table["loss_before"], table["loss_after"]
    is_changed = (loss_after != loss_before) | loss_after.isna()
    table["loss_delta"] = (loss_after - loss_before).where(is_changed, 0.0)
    return table


def _top_tokens(lm: LM, logits: Logits) -> list[int]:
    return token_logits(logits, lm.n_tokens).argmax(-1).tolist()


def _losses(logprobs: Logits, following: Int[Tensor, " token"]) -> list[float]:
    """The loss of each following token, NaN where none follows."""
    losses = 0.0 - values_at(logprobs, following.clamp(min=0))
    return losses.masked_fill(following < 0, float("nan")).tolist()


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
    shown: int
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
    similarities: dict[AnySite, SiteSimilarity] = field(default_factory=dict)
    partings: dict[int, dict[str, Any]] = field(default_factory=dict)  # by prompt
    token_tables: list[pd.DataFrame] = field(default_factory=list)
    shift_tables: list[pd.DataFrame] = field(default_factory=list)
    stream_tables: list[pd.DataFrame] = field(default_factory=list)
    logit_distances: list[tuple[Tokens, TokenDistances]] = field(default_factory=list)

    def read(self) -> None:
        """Run all forwards."""
        request = self.request
        if not self.count:
            raise EmptySelection(
                f"pos={request.where.pos!r} means no token of these prompts: choose others"
            )
        batches = self.batches()
        for number, sites in enumerate(self.groups(batches)):
            for site in sites:
                cka = None
                if site in request.cka:
                    cka = RunningCKA(self.count, self.shared.widths(site))
                self.similarities[site] = SiteSimilarity(site, cka)
            for batch in batches:
                self._read_batch(batch, sites, logits=number == 0)
        # The logits are last in the order of computation.
        for tokens, token_differences in self.logit_distances:
            self._note_partings(LOGITS, tokens, token_differences.difference)

    @property
    def count(self) -> int:
        """The number of tokens that are compared."""
        rows = range(len(self.rows))
        return sum(len(self._positions(row, self.request.where)) for row in rows)

    def batches(self) -> list[list[int]]:
        """The prompts in batches of similar length.

        With hooks all prompts are in one batch, so that the hooks' rows are the prompts.
        """
        if self.before.hooks or self.after.hooks:
            return [list(range(len(self.rows)))]
        one_length = self.before.lm.config is None or self.after.lm.config is None
        lengths = list(map(len, self.rows))
        return batches_by_length(lengths, self.request.batch_tokens, one_length=one_length)

    def groups(self, batches: Sequence[Sequence[int]]) -> list[Sites]:
        """The sites in groups that fit into the memory, in the order of computation."""
        most_tokens = max(map(self._padded_size, batches))
        groups: list[list[AnySite]] = []
        free = 0  # bytes
        for site in self.shared.sites:
            needed = most_tokens * sum(kind.bytes for kind in self.shared.kinds[site])
            if site in self.request.cka:
                needed += cka_bytes(self.count, self.shared.widths(site))
            if not groups or needed > free:
                groups.append([])
                free = self.request.memory
            groups[-1].append(site)
            free -= needed
        return [Sites(tuple(group)) for group in groups]

    def _padded_size(self, batch: Sequence[int]) -> int:
        """The tokens of a batch with its padding."""
        return len(batch) * max(len(self.rows[row]) for row in batch)

    def _read_batch(self, batch: Sequence[int], sites: Sites, *, logits: bool) -> None:
        rows = [self.rows[row] for row in batch]
        before = self.before.run(rows, sites, logits=logits)
        after = self.after.run(rows, sites, logits=logits)
        tokens, index = self._tokens(batch, self.request.where)
        if not tokens:
            return
        for site in sites:
            values = _select_values(before, site, index), _select_values(after, site, index)
            token_differences = self.similarities[site].add(*values)
            if token_differences is not None:
                self._note_partings(site, tokens, token_differences.difference)
                self._keep_stream(site, tokens, token_differences)
        if logits:
            self._compare_logits(batch, before, after)

    def _compare_logits(self, batch: Sequence[int], before: Run, after: Run) -> None:
        reader, request = self.reader, self.request
        tokens, index = self._tokens(batch, request.where)
        logits_before, logits_after = _select_logits(before, index), _select_logits(after, index)
        self.token_tables.append(distances(reader, logits_before, logits_after, tokens))
        token_differences = token_distances(
            token_logits(logits_before, reader.n_tokens),
            token_logits(logits_after, reader.n_tokens),
        )
        similarity = self.similarities.setdefault(LOGITS, SiteSimilarity(LOGITS, None))
        similarity.add_distances(token_differences)
        self.logit_distances.append((tokens, token_differences))
        tokens, index = self._tokens(batch, request.rank_where)
        if tokens:
            pair = _select_logits(before, index), _select_logits(after, index)
            self.shift_tables.append(self._rank_shifts(*pair, tokens))

    def _rank_shifts(self, before: Logits, after: Logits, tokens: Tokens) -> pd.DataFrame:
        """The table of `rank_shift` after these tokens, with parts of characters as bytes."""
        pairs = []
        for number, (row, pos) in enumerate(zip(tokens.row, tokens.pos, strict=True)):
            position = {"row": row, "pos": pos}
            distributions = [
                Distribution(self.reader, position, logits[number].detach().float().cpu())
                for logits in (before, after)
            ]
            pairs.append((distributions[0], distributions[1]))
        watched, named = list(self.request.watched), list(self.request.named)
        table = shift_table(pairs, self.request.top, MOVERS, watched, named)
        return table.assign(
            token=[token_literal(self.reader, token) for token in table["token_id"]]
        )

    def _note_partings(
        self, site: AnySite, tokens: Tokens, difference: Float[Tensor, " token"]
    ) -> None:
        """Note the prompts that part at this site, and at no site before it."""
        is_beyond = ~(difference <= self.request.tolerance)  # true for NaN
        for number in is_beyond.nonzero().flatten().tolist():
            row = tokens.row[number]
            if row not in self.partings:
                self.partings[row] = {
                    "row": row,
                    "site": str(site),
                    "layer": layer_of(site),
                    "pos": tokens.pos[number],
                    "read": token_literal(self.reader, tokens.ids[number]),
                    "difference": float(difference[number]),
                }

    def _keep_stream(
        self, site: AnySite, tokens: Tokens, token_differences: TokenDistances
    ) -> None:
        """Keep the differences of the stream after each block for the shown prompts."""
        if not isinstance(site, Site) or site.name != "resid_post":
            return
        numbers = [number for number, row in enumerate(tokens.row) if row < self.request.shown]
        if numbers:
            columns = {
                "row": [tokens.row[number] for number in numbers],
                "pos": [tokens.pos[number] for number in numbers],
                "read": [token_literal(self.reader, tokens.ids[number]) for number in numbers],
                "layer": site.layer,
                "difference": token_differences.difference[numbers].tolist(),
                "cosine": token_differences.cosine[numbers].tolist(),
            }
            self.stream_tables.append(pd.DataFrame(columns))

    def _positions(self, row: int, where: Where) -> list[int]:
        """The selected positions of a prompt. Raises `OutOfRange` if it does not have one."""
        ids = self.rows[row]
        return list(
            positions_of_row(ids, where, lambda at: positions_of_text(self.reader, ids, at))
        )

    def _tokens(self, batch: Sequence[int], where: Where) -> tuple[Tokens, tuple[Tensor, Tensor]]:
        """The selected tokens of a batch, and their indices in it: rows and columns."""
        tokens = Tokens([], [], [], [])
        batch_rows = []
        for batch_row, row in enumerate(batch):
            ids = self.rows[row]
            for pos in self._positions(row, where):
                batch_rows.append(batch_row)
                tokens.row.append(row)
                tokens.pos.append(pos)
                tokens.ids.append(ids[pos])
                tokens.following.append(ids[pos + 1] if pos + 1 < len(ids) else -1)
        return tokens, (torch.tensor(batch_rows), torch.tensor(tokens.pos))

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables tokens, shifts, sites, parting and stream."""
        tables = {
            "tokens": _concatenate(self.token_tables, ["row", "pos"]),
            "shifts": pd.DataFrame(columns=["row", "pos"]),
            "stream": pd.DataFrame(columns=STREAM_COLUMNS),
        }
        if self.shift_tables:
            order = ["row", "pos", "rank_after", "token_id"]
            tables["shifts"] = _concatenate(self.shift_tables, order)
        if self.stream_tables:
            tables["stream"] = _concatenate(self.stream_tables, ["row", "layer", "pos"])
        records = [
            self.similarities[site].row(self.request.tolerance)
            for site in (*self.shared.sites, LOGITS)
        ]
        sites = pd.DataFrame(records, columns=list(COLUMNS))
        tables["sites"] = sites.astype({"layer": "Int64", "parts": "boolean"})
        tables["parting"] = self._parting_table()
        return tables

    def _parting_table(self) -> pd.DataFrame:
        never = {"site": "", "layer": None, "pos": None, "read": "", "difference": float("nan")}
        records = []
        if not self.shared.no_order:
            for row in range(len(self.rows)):
                records.append(self.partings.get(row, {"row": row} | never))
        table = pd.DataFrame(records, columns=PARTING_COLUMNS)
        return table.astype({"layer": "Int64", "pos": "Int64"})


def _concatenate(tables: list[pd.DataFrame], order: list[str]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True).sort_values(order, ignore_index=True)


def _select_values(run: Run, site: AnySite, index: tuple[Tensor, Tensor]) -> Tensor:
    values = run.captured(site, NAME).values
    return values[index[0].to(values.device), index[1].to(values.device)]


def _select_logits(run: Run, index: tuple[Tensor, Tensor]) -> Logits:
    logits = run.logits
    return logits[index[0].to(logits.device), index[1].to(logits.device)]
