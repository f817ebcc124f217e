"""What features do over a corpus, in two passes over a harvest of them, without the model.

The first pass counts, and keeps for each feature the texts at which it is largest, and a sample of
all tokens at which it is active. The second pass makes the histogram, and reads the tokens around
each example. Memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pandas.util import hash_array
from torch import Tensor

from ..data.harvest.columns import SparseColumn
from ..data.harvest.harvest import Harvest, rows_at_positions
from ..errors import BadHook, EmptySelection
from ..models.positions import Where
from ..models.sites import Site

BINS = 20  # of a histogram
SAMPLE = 100  # active tokens of each feature, from which its quantiles are taken
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
BEFORE, AFTER = 16, 8  # tokens around an example
NO_TOKEN = -1
EXAMPLE_COLUMNS = ["feature", "value", "row", "text", "piece", "pos", "token_id"]


@dataclass(frozen=True, eq=False)
class FeatureCorpus:
    """The activations of some features over a corpus; `slot` is the index of a feature in them.

    n_tokens     the number of tokens that were read
    counts       [slot] tokens at which it is active
    sums         [slot] the sum of its activations
    maxima       [slot] its largest activation, 0 if it is never active
    histogram    [slot, bin] how many activations are in each of equal parts of 0 to the maximum
    examples     columns feature, kind ("top", "quantile 0.9" …), activation, row, text, piece, pos,
                 token_id
    tokens       [example, offset] the ids of the tokens around each, -1 beyond the text
    activations  [example, offset] the feature there, NaN where it was not harvested
    """

    n_tokens: int
    counts: Int[Tensor, " slot"]
    sums: Float[Tensor, " slot"]
    maxima: Float[Tensor, " slot"]
    histogram: Int[Tensor, "slot bin"]
    examples: pd.DataFrame
    tokens: Int[Tensor, "example offset"]
    activations: Float[Tensor, "example offset"]


def read_corpus(
    harvest: Harvest, site: Site, features: Sequence[int], where: Where, top: int
) -> FeatureCorpus:
    """Returns what some features of a harvested dictionary do at these positions of all texts."""
    column = harvest[site]
    if not isinstance(column, SparseColumn):
        raise BadHook(f"{site} was harvested as one feature: harvest all of them")
    shards = _Shards(harvest, column, torch.tensor(features), where)
    count = len(features)
    counts = torch.zeros(count, dtype=torch.int64)
    sums, maxima = torch.zeros(count, dtype=torch.float64), torch.zeros(count)
    top_entries = sample = pd.DataFrame(columns=EXAMPLE_COLUMNS)
    n_tokens = 0
    for entries in shards.entries():
        slots, values = entries.slots, entries.values.float()
        n_tokens += entries.n_tokens
        counts += torch.bincount(slots, minlength=count)
        sums.index_add_(0, slots, values.double())
        maxima.scatter_reduce_(0, slots, values, "amax")
        table = entries.table()
        top_entries = _keep_first(top_entries, table, _by_value, ["feature", "text"], top)
        sample = _keep_first(sample, table, _by_chance, ["feature", "row"], SAMPLE)
    if not n_tokens:
        raise EmptySelection(f"none of the {len(harvest)} rows is at pos={where.pos!r}")
    examples = _examples(top_entries, sample)
    histogram = torch.zeros(count, BINS, dtype=torch.int64)
    tokens = torch.full((len(examples), BEFORE + 1 + AFTER), NO_TOKEN)
    activations = torch.full(tokens.shape, torch.nan)
    example_rows = torch.tensor(examples["row"].tolist(), dtype=torch.int64)
    example_features = torch.tensor(examples["feature"].tolist(), dtype=torch.int64)
    for entries in shards.entries():
        parts = entries.values.float() / maxima[entries.slots] * BINS
        bins = parts.long().clamp(max=BINS - 1)
        flat = torch.bincount(entries.slots * BINS + bins, minlength=count * BINS)
        histogram += flat.reshape(count, BINS)
        index = entries.indices_in_shard(example_rows)
        windows = entries.windows(example_rows[index], example_features[index])
        tokens[index], activations[index] = windows
    return FeatureCorpus(n_tokens, counts, sums, maxima, histogram, examples, tokens, activations)


@dataclass(frozen=True, eq=False)
class _Shards:
    """The shards of a harvest, and the features and positions that are read in them."""

    harvest: Harvest
    column: SparseColumn
    features: Int[Tensor, " slot"]
    where: Where

    def entries(self) -> Iterator[_Entries]:
        """Yields the activations of the features in each shard."""
        slot_of_feature = torch.full((self.column.n_features,), -1)
        slot_of_feature[self.features] = torch.arange(len(self.features))
        shards = self.harvest.shards
        for number, start in enumerate(shards.starts[:-1]):
            shards.close_before(start)
            tensors = shards.tensors(number)
            rows = self.column.in_shard(number)
            is_read = torch.zeros(len(rows.counts), dtype=torch.bool)
            is_read[rows_at_positions(tensors, self.where)] = True
            slots = slot_of_feature[rows.features.long()]
            is_entry = (slots >= 0) & is_read[rows.rows]
            keys = rows.rows * self.column.n_features + rows.features  # in ascending order
            yield _Entries(
                start,
                self.column.n_features,
                int(is_read.sum()),
                slots[is_entry],
                rows.features[is_entry],
                rows.rows[is_entry],
                rows.values[is_entry],
                tensors,
                (keys, rows.values),
            )


@dataclass(frozen=True, eq=False)
class _Entries:
    """The activations of some features in one shard. `rows` count from 0 in the shard."""

    start: int
    n_features: int
    n_tokens: int
    slots: Int[Tensor, " entry"]
    features: Int[Tensor, " entry"]
    rows: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    tensors: Mapping[str, Tensor]
    all_entries: tuple[Tensor, Tensor]  # of every feature: row * n_features + feature, and values

    def table(self) -> pd.DataFrame:
        """Returns the activations with their tokens. Here rows count from the first shard."""
        columns = {"feature": self.features, "value": self.values.float()}
        columns["row"] = self.rows + self.start
        for name in ("text", "piece", "pos"):
            columns[name] = self.tensors[name][self.rows]
        columns["token_id"] = self.tensors["token"][self.rows]
        return pd.DataFrame({name: values.numpy() for name, values in columns.items()})

    def indices_in_shard(self, rows: Int[Tensor, " example"]) -> Int[Tensor, " selected"]:
        """Returns the indices of those `rows` that are in this shard."""
        end = self.start + len(self.tensors["pos"])
        return ((rows >= self.start) & (rows < end)).nonzero().flatten()

    def windows(
        self, rows: Int[Tensor, " example"], features: Int[Tensor, " example"]
    ) -> tuple[Tensor, Tensor]:
        """Returns the token ids around rows of this shard, and the activations of a feature."""
        tensors, rows = self.tensors, rows - self.start
        offsets = torch.arange(-BEFORE, AFTER + 1)
        positions = tensors["pos"][rows][:, None] + offsets
        sequence = tensors["read"][rows].long()
        first, end = tensors["starts"][sequence], tensors["starts"][sequence + 1]
        index = first[:, None] + positions
        is_token = (positions >= 0) & (index < end[:, None])
        last = len(tensors["ids"]) - 1
        ids = tensors["ids"][index.clamp(0, last)].long().masked_fill(~is_token, NO_TOKEN)
        neighbours = (rows[:, None] + offsets).clamp(0, len(tensors["pos"]) - 1)
        is_harvested = is_token & (tensors["pos"][neighbours] == positions)
        is_harvested &= tensors["read"][neighbours] == sequence[:, None]
        values = self._values(neighbours * self.n_features + features[:, None])
        return ids, values.masked_fill(~is_harvested, torch.nan)

    def _values(self, keys: Int[Tensor, "example offset"]) -> Float[Tensor, "example offset"]:
        """Returns the activations at row * n_features + feature; 0 where it is not active."""
        all_keys, all_values = self.all_entries
        if not len(all_keys):
            return torch.zeros(keys.shape)
        index = torch.searchsorted(all_keys, keys).clamp(max=len(all_keys) - 1)
        is_active = all_keys[index] == keys
        return all_values[index].float().masked_fill(~is_active, 0.0)


# ---- which tokens are kept


def _keep_first(
    earlier: pd.DataFrame,
    table: pd.DataFrame,
    order: Callable[[pd.DataFrame], Any],
    unique: list[str],
    most: int,
) -> pd.DataFrame:
    """Returns at most `most` entries of each feature, the first ones in an order.

    Of entries with equal values in the columns `unique` only the first is taken. Ties are in the
    order of the rows, so that the result does not depend on the division into shards.
    """
    entries: Any = pd.concat([earlier, table]) if len(earlier) else table
    entries = entries.assign(order=order(entries))
    entries = entries.sort_values(["feature", "order", "row"], kind="stable")
    entries = entries.drop_duplicates(unique).groupby("feature", sort=False).head(most)
    return entries.drop(columns="order")


def _by_value(table: pd.DataFrame) -> Any:
    return -table["value"]


def _by_chance(table: pd.DataFrame) -> Any:
    """Returns numbers that look random, and are the same for the same row and feature."""
    rows, features = (table[name].to_numpy(np.int64) for name in ("row", "feature"))
    hash_numbers: Any = hash_array
    return hash_numbers(hash_numbers(rows) ^ features.astype(np.uint64))


def _examples(top: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """Returns the largest activations, and those at the quantiles of the sample."""
    ordered: Any = sample.sort_values(["feature", "value", "row"], ascending=[True, False, True])
    groups = ordered.groupby("feature")
    number, size = groups.cumcount(), groups["value"].transform("size")
    parts = [top.assign(kind="top")]
    for quantile in QUANTILES:
        is_quantile = number == ((1 - quantile) * (size.astype(float) - 1)).round()
        parts.append(ordered[is_quantile].assign(kind=f"quantile {quantile:g}"))
    examples: Any = pd.concat(parts)
    examples = examples.drop_duplicates(["feature", "row"])
    examples = examples.assign(is_sample=examples["kind"] != "top")
    order = ["feature", "is_sample", "value", "row"]
    examples = examples.sort_values(order, ascending=[True, True, False, True], kind="stable")
    examples = examples.drop(columns="is_sample").rename(columns={"value": "activation"})
    return examples.reset_index(drop=True)
