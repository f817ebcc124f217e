"""What two models say after each token of the same texts: distances of the distributions, and shifts of the ranks.

The forwards of a comparison: a batch of prompts and some sites at a time, of which sums alone are kept.

Both models read the same batch, so that what differs between them is never the padding. Sites go in groups whose
values, of one batch, and sums fit the memory that is allowed: the prompts are read once more for each further group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...data.harvest.texts import places
from ...errors import EmptySelection
from ...models.lm import LM
from ...models.positions import Where
from ...models.prompts import Row, cover
from ...models.sites import AnySite, Site, Sites
from ...runs.run import Run
from ...tables.distributions import Distribution, expected
from ...tables.rank_tables import shift_of
from ..shift.named_edits import literal
from .pairing import NAME, Matched, Side
from .similarity import COLUMNS, Alike, Apart, RunningCKA, apart, layer_of, room

NUMBERS_AT_ONCE = 2**22  # logits in one piece of work: 32 MiB of float64
MOVERS = 3
Logits = Float[Tensor, "token vocab"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of some prompts, one a row: the prompt's number, the position, its id, and the id that follows or -1."""

    row: list[int]
    pos: list[int]
    ids: list[int]
    following: list[int]

    def __len__(self) -> int:
        return len(self.row)


def distances(lm: LM, before: Logits, after: Logits, tokens: Tokens) -> pd.DataFrame:
    """How far apart two models' distributions are after each token.

    Columns: row, pos, read (the token there, the last one read); kl (KL(before‖after), nats), kl_reverse, js (nats, at
    most ln 2); entropy_before, _after, _delta (nats); top1_before, top1_after, top1_changed; loss_before, _after,
    _delta (nats, of the token that follows in the prompt; empty after its last).
    """
    step = max(1, NUMBERS_AT_ONCE // before.shape[-1])
    following = torch.tensor(tokens.following)
    parts = [
        _numbers(
            lm,
            before[start : start + step],
            after[start : start + step],
            following[start : start + step],
        )
        for start in range(0, len(tokens), step)
    ]
    table = pd.concat(parts, ignore_index=True)
    for place, name in enumerate(("row", "pos")):
        table.insert(place, name, getattr(tokens, name))
    table.insert(2, "read", [literal(lm, token) for token in tokens.ids])
    return table


def _numbers(
    lm: LM, before: Logits, after: Logits, following: Int[Tensor, " token"]
) -> pd.DataFrame:
    p, q = (logits.detach().cpu().double().log_softmax(-1) for logits in (before, after))
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    found = {"kl": expected(p, p - q), "kl_reverse": expected(q, q - p)}
    found["js"] = (expected(p, p - middle) + expected(q, q - middle)) / 2
    found = {
        name: values.clamp(min=0.0) for name, values in found.items()
    }  # rounding can leave -1e-17
    entropies = 0.0 - expected(p, p), 0.0 - expected(q, q)
    found |= {
        "entropy_before": entropies[0],
        "entropy_after": entropies[1],
        "entropy_delta": entropies[1] - entropies[0],
    }
    table = pd.DataFrame({name: values.tolist() for name, values in found.items()})
    firsts = [said[:, : lm.n_tokens or None].argmax(-1).tolist() for said in (before, after)]
    table["top1_before"], table["top1_after"] = (
        [literal(lm, token) for token in tokens] for tokens in firsts
    )
    table["top1_changed"] = [one != other for one, other in zip(*firsts, strict=True)]
    losses = [0.0 - said.gather(1, following.clamp(min=0)[:, None])[:, 0] for said in (p, q)]
    known = (following >= 0).tolist()
    for when, loss in zip(("before", "after"), losses, strict=True):
        table[f"loss_{when}"] = [
            value if there else float("nan")
            for value, there in zip(loss.tolist(), known, strict=True)
        ]
    was, now = table["loss_before"], table["loss_after"]
    table["loss_delta"] = (now - was).where((now != was) | now.isna(), 0.0)
    return table


def rank_shifts(
    lm: LM,
    before: Logits,
    after: Logits,
    tokens: Tokens,
    top: int,
    watched: Sequence[int],
    named: Sequence[int],
) -> pd.DataFrame:
    """`rank_shift` of what two models say after these tokens, with parts of characters as bytes."""
    places = [{"row": row, "pos": pos} for row, pos in zip(tokens.row, tokens.pos, strict=True)]
    pairs = [
        tuple(
            Distribution(lm, place, logits[number].detach().float().cpu())
            for logits in (before, after)
        )
        for number, place in enumerate(places)
    ]
    table = shift_of(pairs, top, MOVERS, list(watched), list(named))  # pyright: ignore[reportArgumentType]
    return table.assign(token=[literal(lm, token) for token in table["token_id"]])


LOGITS = Site("logits")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be found out, and how much may be held at once."""

    where: Where  # the positions that are compared
    ranked: Where  # those whose ranks are
    top: int
    watched: tuple[int, ...]
    named: tuple[int, ...]
    cka: frozenset[AnySite]
    tolerance: float
    shown: int
    batch_tokens: int
    memory: int


@dataclass(eq=False)
class Reading:
    """Two models on the same prompts, as it goes."""

    reader: LM
    before: Side
    after: Side
    rows: tuple[Row, ...]
    matched: Matched
    asked: Asked
    alike: dict[AnySite, Alike] = field(default_factory=dict)
    parted: dict[int, dict[str, Any]] = field(
        default_factory=dict
    )  # by prompt, where it parts first
    parts: dict[str, list[pd.DataFrame]] = field(
        default_factory=lambda: {"tokens": [], "shifts": [], "stream": []}
    )
    at_logits: list[tuple[Tokens, Apart]] = field(default_factory=list)

    def read(self) -> None:
        """All forwards."""
        if not self.count:
            raise EmptySelection(
                f"pos={self.asked.where.pos!r} means no token of these prompts: choose others"
            )
        batches = self.batches()
        for number, sites in enumerate(self.groups(batches)):
            for site in sites:
                taken = (
                    RunningCKA(self.count, self.matched.widths(site))
                    if site in self.asked.cka
                    else None
                )
                self.alike[site] = Alike(site, taken)
            for batch in batches:
                self._batch(batch, sites, logits=number == 0)
        for tokens, found in self.at_logits:
            self._part(LOGITS, tokens, found.difference)

    @property
    def count(self) -> int:
        """How many tokens are compared."""
        return sum(len(self._places(row, self.asked.where)) for row in range(len(self.rows)))

    def batches(self) -> list[list[int]]:
        """The prompts in batches of like length; all in one where hooks act, whose rows are the prompts."""
        if self.before.hooks or self.after.hooks:
            return [list(range(len(self.rows)))]
        one_length = self.before.lm.config is None or self.after.lm.config is None
        found: list[list[int]] = []
        for number in sorted(range(len(self.rows)), key=lambda number: -len(self.rows[number])):
            width = len(self.rows[found[-1][0]]) if found else 0
            fits = bool(found) and width * (len(found[-1]) + 1) <= self.asked.batch_tokens
            fits = fits and (not one_length or width == len(self.rows[number]))
            found[-1].append(number) if fits else found.append([number])
        return found

    def groups(self, batches: Sequence[Sequence[int]]) -> list[Sites]:
        """The sites in groups that fit the memory, in the order of computation."""
        most = max(len(batch) * max(len(self.rows[row]) for row in batch) for batch in batches)
        found: list[list[AnySite]] = []
        left = 0
        for site in self.matched.sites:
            needs = most * sum(kind.bytes for kind in self.matched.kinds[site])
            needs += room(self.count, self.matched.widths(site)) if site in self.asked.cka else 0
            if not found or needs > left:
                found.append([])
                left = self.asked.memory
            found[-1].append(site)
            left -= needs
        return [Sites(tuple(group)) for group in found]

    def _batch(self, batch: Sequence[int], sites: Sites, *, logits: bool) -> None:
        rows = [self.rows[row] for row in batch]
        runs = [side.run(rows, sites, logits=logits) for side in (self.before, self.after)]
        tokens, index = self._tokens(batch, self.asked.where)
        if not tokens:
            return
        for site in sites:
            found = self.alike[site].add(*(_at(run, site, index) for run in runs))
            if found is not None:
                self._part(site, tokens, found.difference)
                self._keep_stream(site, tokens, found)
        if logits:
            self._said(batch, runs)

    def _said(self, batch: Sequence[int], runs: Sequence[Run]) -> None:
        tokens, index = self._tokens(batch, self.asked.where)
        before, after = (
            run.logits[index[0].to(run.logits.device), index[1].to(run.logits.device)]
            for run in runs
        )
        self.parts["tokens"].append(distances(self.reader, before, after, tokens))
        real = self.reader.n_tokens or None
        found = apart(before[:, :real], after[:, :real])
        self.at_logits.append(
            (tokens, self.alike.setdefault(LOGITS, Alike(LOGITS, None)).told(found))
        )
        ranked, index = self._tokens(batch, self.asked.ranked)
        before, after = (
            run.logits[index[0].to(run.logits.device), index[1].to(run.logits.device)]
            for run in runs
        )
        asked = self.asked
        if not ranked:
            return
        self.parts["shifts"].append(
            rank_shifts(self.reader, before, after, ranked, asked.top, asked.watched, asked.named)
        )

    def _part(self, site: AnySite, tokens: Tokens, difference: Float[Tensor, " token"]) -> None:
        """Note the prompts that part here, and have parted at no site before."""
        for number in (~(difference <= self.asked.tolerance)).nonzero().flatten().tolist():
            row = tokens.row[number]
            if row not in self.parted:
                read = literal(self.reader, tokens.ids[number])
                self.parted[row] = {"row": row, "site": str(site), "layer": layer_of(site), "pos": tokens.pos[number],
                                    "read": read, "difference": float(difference[number])}  # fmt: skip

    def _keep_stream(self, site: AnySite, tokens: Tokens, found: Apart) -> None:
        """The stream behind each block, token by token, of the prompts that are shown."""
        shown = [number for number, row in enumerate(tokens.row) if row < self.asked.shown]
        if shown and isinstance(site, Site) and site.name == "resid_post":
            numbers = {
                "difference": found.difference[shown].tolist(),
                "cosine": found.cosine[shown].tolist(),
            }
            where = {
                name: [getattr(tokens, name)[number] for number in shown] for name in ("row", "pos")
            }
            read = [literal(self.reader, tokens.ids[number]) for number in shown]
            self.parts["stream"].append(
                pd.DataFrame(where | {"read": read, "layer": site.layer} | numbers)
            )

    def _places(self, row: int, where: Where) -> list[int]:
        """The positions of a prompt that are meant; `OutOfRange` for one that it does not have."""
        return list(
            places(self.rows[row], where, lambda at: cover(self.reader, self.rows[row], at))
        )

    def _tokens(self, batch: Sequence[int], where: Where) -> tuple[Tokens, tuple[Tensor, Tensor]]:
        """The tokens that are wanted of a batch, and where they stand in it: rows and columns."""
        there = [
            (column, row, pos)
            for column, row in enumerate(batch)
            for pos in self._places(row, where)
        ]
        ids = [self.rows[row][pos] for _, row, pos in there]
        after = [
            self.rows[row][pos + 1] if pos + 1 < len(self.rows[row]) else -1
            for _, row, pos in there
        ]
        tokens = Tokens([row for _, row, _ in there], [pos for _, _, pos in there], ids, after)
        return tokens, (torch.tensor([n for n, _, _ in there]), torch.tensor(tokens.pos))

    # ---- the tables

    def tables(self) -> dict[str, pd.DataFrame]:
        """tokens, shifts, sites, parting and stream."""
        found = {
            name: pd.concat(parts, ignore_index=True) for name, parts in self.parts.items() if parts
        }
        orders = {
            "tokens": ["row", "pos"],
            "shifts": ["row", "pos", "rank_after", "token_id"],
            "stream": ["row", "layer", "pos"],
        }
        sorted_ = {
            name: table.sort_values(orders[name], ignore_index=True)
            for name, table in found.items()
        }
        if "stream" not in sorted_:
            sorted_["stream"] = pd.DataFrame(
                columns=["row", "pos", "read", "layer", "difference", "cosine"]
            )
        order = [*self.matched.sites, LOGITS]
        sites = pd.DataFrame(
            [self.alike[site].row(self.asked.tolerance) for site in order], columns=list(COLUMNS)
        )
        sorted_["sites"] = sites.astype({"layer": "Int64", "parts": "boolean"})
        sorted_["parting"] = self._parting()
        return sorted_

    def _parting(self) -> pd.DataFrame:
        never = {"site": "", "layer": None, "pos": None, "read": "", "difference": float("nan")}
        rows = [self.parted.get(row, {"row": row} | never) for row in range(len(self.rows))]
        columns = ["row", "site", "layer", "pos", "read", "difference"]
        table = pd.DataFrame([] if self.matched.one_plan else rows, columns=columns)
        return table.astype({"layer": "Int64", "pos": "Int64"})


def _at(run: Run, site: AnySite, index: tuple[Tensor, Tensor]) -> Tensor:
    """The values at a site for these rows and positions."""
    values = run.captured(site, NAME).values
    return values[index[0].to(values.device), index[1].to(values.device)]
