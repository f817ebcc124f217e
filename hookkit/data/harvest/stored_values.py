"""The values that a harvest stores: computed by a forward of a batch, a row for each kept position.

`probe_sites` finds out which shape and dtype a site has at one position. `ValueComputation` is what
the engines run, in this process or in others. `Progress` shows how many texts are done.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import BadHook
from ...hooks.capture import capture
from ...models.lm import LM
from ...models.positions import Where
from ...models.prompts import pad_id
from ...models.sites import QUERY_KEY_SITES, AnySite, ModuleSite, Sites, SitesLike, refuse_stacks
from ...runs.forward import forward
from .sparse_rows import sparse_rows
from .texts import Batch, TextReader, TokenSequence, Window

SPARSITY = 16  # of so many features one is active, where the size of a shard is chosen
FEATURE_BYTES = 4  # of the number of an active feature
PROBE_SHAPE = 2, 3  # rows and tokens of the forward that shows the shapes of sites


@dataclass(frozen=True)
class ValueKind:
    """The shape and dtype of the values of a site at one position.

    Of `sparse` values only those that are not zero are stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sparse: bool = False

    @property
    def bytes(self) -> int:
        """The size on disk; of sparse values about the size, if few features are active."""
        count = torch.Size(self.shape).numel()
        if self.sparse:
            return max(1, count // SPARSITY) * (self.dtype.itemsize + FEATURE_BYTES)
        return self.dtype.itemsize * count

    def as_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"shape": list(self.shape)}
        facts["dtype"] = str(self.dtype).removeprefix("torch.")
        return facts | {"sparse": True} if self.sparse else facts


def probe_sites(lm: LM, sites: SitesLike, what: str) -> dict[AnySite, ValueKind]:
    """Returns the shape and dtype of each site, from a forward of two short rows.

    Raises `BadHook` for a site without a vector at each position: scores and pattern, or a module
    whose output has no rows and positions.
    """
    expanded = lm.expand(sites)
    refuse_stacks(expanded, f"{what} keeps a row for every token")
    for site in expanded:
        if not isinstance(site, ModuleSite) and site.name in QUERY_KEY_SITES:
            raise BadHook(
                f"{what} keeps as many numbers for every token, and {site} has one for each query "
                "and key, more with every token: use hk.forward(lm, texts, hk.capture(site)) on "
                "texts at a time"
            )
    rows, width = PROBE_SHAPE
    run = forward(lm, [[pad_id(lm)] * width] * rows, capture(expanded), logits=False)
    kinds: dict[AnySite, ValueKind] = {}
    for site in expanded:
        captured = run.captured(site)
        shape = captured.values.shape
        if captured.positions is None or shape[:2] != PROBE_SHAPE:
            raise BadHook(
                f"{what} keeps a row for every token, and {site} has shape {list(shape)} for "
                f"{rows} rows of {width} tokens, without axes batch and pos: "
                "use hk.forward(lm, texts, hk.capture(site))"
            )
        kinds[site] = ValueKind(tuple(shape[2:]), captured.values.dtype)
    return kinds


def compute_values(
    lm: LM,
    sequences: Sequence[TokenSequence],
    sites: Sites,
    where: Where,
    sparse: Collection[AnySite] = (),
) -> dict[AnySite, Any]:
    """Returns the values at each site, a row for each kept position of the sequences.

    They are a tensor [row, ...], and `SparseRows` at the sites of `sparse`.
    """
    prompts = [sequence.ids for sequence in sequences]
    captures = [capture(site, pos=where.pos, sparse=site in sparse) for site in sites]
    run = forward(lm, prompts, *captures, logits=False)
    expected: list[int] = []
    for sequence in sequences:
        expected += sequence.positions
    result: dict[AnySite, Any] = {}
    for site in sites:
        captured = run.captured(site)
        assert captured.positions is not None
        is_kept = captured.positions >= 0
        assert captured.positions[is_kept].tolist() == expected, (
            f"{site}: the positions are not those that were planned"
        )
        if site in sparse:
            result[site] = sparse_rows(captured.values, is_kept.to(captured.values.device))
        elif bool(is_kept.all()):
            result[site] = captured.values.flatten(0, 1)
        else:
            result[site] = captured.values[is_kept.to(captured.values.device)]
    return result


def to_stored_dtype(site: AnySite, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns values on the CPU in the dtype of the shards.

    Raises `BadHook` if a number is too large for the dtype.
    """
    stored = values.to(dtype).cpu()
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        overflowed = torch.isinf(stored) & torch.isfinite(values).cpu()
        if bool(overflowed.any()):
            largest = values.abs().max().item()
            name = str(dtype).removeprefix("torch.")
            raise BadHook(
                f"dtype={name!r} holds numbers up to {torch.finfo(dtype).max:g}, and {site} has "
                f"{largest:g}: use 'bfloat16' or 'float32'"
            )
    return stored


@dataclass(frozen=True, eq=False)
class ValueComputation:
    """Computes the values of a batch as they are stored."""

    lm: LM
    kinds: Mapping[AnySite, ValueKind]
    where: Where

    def compute(self, batch: Batch) -> dict[AnySite, Any]:
        """Returns the values at each site, a row for each kept position of the batch, in order."""
        sites = Sites(tuple(self.kinds))
        sparse = [site for site, kind in self.kinds.items() if kind.sparse]
        stored = compute_values(self.lm, batch.sequences, sites, self.where, sparse)
        for site, kind in self.kinds.items():
            values = stored[site]
            if kind.sparse:
                numbers = to_stored_dtype(site, values.values, kind.dtype)
                stored[site] = replace(values, values=numbers)
            else:
                stored[site] = to_stored_dtype(site, values, kind.dtype)
        return stored


class Progress:
    """A progress bar in the terminal, over the texts of a reader."""

    def __init__(self, reader: TextReader, is_visible: bool) -> None:
        total = reader.count if is_visible else None
        self._bar = tqdm(total=total, unit=" texts", disable=not is_visible, leave=True)
        self._start_time, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip_to(self, text: int) -> None:
        """Counts the texts up to this one as done, without effect on the speed."""
        self._bar.initial = self._bar.n = text + 1
        self._start_time = time.perf_counter()

    def add(self, batch: Batch | Window) -> None:
        """Counts the sequences of a batch or window."""
        self._tokens += sum(map(len, batch.sequences))
        speed = self._tokens / (time.perf_counter() - self._start_time)
        self._bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(sequence.piece == 0 for sequence in batch.sequences))

    def advance_to(self, text: int) -> None:
        """Counts all texts up to this one as done, also those that were left out."""
        self._bar.update(text + 1 - self._bar.n)
