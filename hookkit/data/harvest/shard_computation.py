"""The computation of a whole shard: the values of its windows, its tensors, and its file.

`ShardComputation` is what Ray's actors run where they write the shards themselves. A `ShardPlan`
has the token sequences of a shard, in the windows in which one process reads them. Batches follow
from the windows, so that the bytes are those of one process. An actor writes a shard's line of the
index to a note beside the shard, and the user's process removes the note when the line is in the
index: if that process is killed, complete shards are not computed again. To an address an actor
sends the shard and its note, one after the other.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ...errors import Unsupported
from ...files.address import Address
from ...files.atomic import Ready, sha256, write_tensors
from ...models.sites import AnySite
from .folder import SHARD, Shard, local_file, note_of, read_note, upload_shard, write_note
from .sparse_rows import SparseWindow, join_sparse
from .stored_values import ValueComputation, ValueKind
from .texts import Batch, Rules, TokenSequence, Window, token_columns

Stored: TypeAlias = Tensor | SparseWindow  # the values of a window of texts at a site
PATIENCE = 5  # seconds within which a new file is visible on every node of a network disk
COMPUTING = threading.Lock()  # held while an actor computes; meanwhile it may write another shard


# ---- values and files


def empty_values(kinds: Mapping[AnySite, ValueKind], rows: int) -> dict[AnySite, Stored]:
    """Returns the values of a window of so many rows, before they are computed."""
    stored: dict[AnySite, Stored] = {}
    for site, kind in kinds.items():
        if kind.sparse:
            stored[site] = SparseWindow(rows)
        else:
            stored[site] = torch.empty((rows, *kind.shape), dtype=kind.dtype)
    return stored


def store_batch(stored: dict[AnySite, Stored], batch: Batch, computed: dict[AnySite, Any]) -> None:
    """Writes the values of a batch to their rows of the window."""
    for site, values in computed.items():
        stored[site][batch.rows] = values


def write_shard(
    folder: Path,
    number: int,
    sequences: Sequence[TokenSequence],
    windows: list[dict[AnySite, Stored]],
    ready: Ready | None = None,
) -> Shard:
    """Writes a shard, empties `windows`, and returns the shard's line of the index."""
    tensors = token_columns(sequences)
    for site in list(windows[0]):
        parts: list[Any] = [stored.pop(site) for stored in windows]
        if isinstance(parts[0], SparseWindow):
            tensors |= join_sparse([part.join() for part in parts]).stored(str(site))
        else:
            tensors[str(site)] = torch.cat(parts)
    path = folder / SHARD.format(number)
    size, digest = write_tensors(path, tensors, tidy=False, ready=ready)
    return describe_shard(number, sequences, size, digest)


def describe_shard(
    number: int, sequences: Sequence[TokenSequence], size: int, digest: str
) -> Shard:
    """Returns the line of the index for a shard with these sequences."""
    last = sequences[-1]
    return Shard(
        SHARD.format(number),
        rows=sum(sequence.rows for sequence in sequences),
        tokens=sum(map(len, sequences)),
        left_out=sum(sequence.left_out for sequence in sequences),
        text=last.text,
        piece=last.piece,
        stream=last.stream,
        bytes=size,
        sha256=digest,
    )


# ---- on an actor


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """What a shard has. `is_new` is False if it was in the folder before and is made again."""

    number: int
    windows: tuple[Window, ...]
    is_new: bool

    @property
    def sequences(self) -> list[TokenSequence]:
        """The token sequences of all windows."""
        return list(chain.from_iterable(window.sequences for window in self.windows))

    def __str__(self) -> str:
        first, last = self.windows[0].sequences[0], self.windows[-1].sequences[-1]
        return f"shard {self.number}, of texts {first.text} to {last.text}"


@dataclass(frozen=True, eq=False)
class ShardComputation:
    """Computes and writes whole shards, in a folder that all nodes share, or at an address.

    `mark` is a file there that the user's process holds while it harvests.
    """

    values: ValueComputation
    rules: Rules
    folder: Path | Address
    mark: str
    units_at_once: ClassVar[int] = 2  # a shard is computed while the one before it is written

    def prepare(self) -> None:
        """Raises `Unsupported` if this node does not see the folder of the user's process."""
        end = time.monotonic() + PATIENCE
        while not self._sees_mark():
            if time.monotonic() > end:
                raise Unsupported(
                    f"the node {platform.node()!r} does not see the files that the user's process "
                    f"writes to {self._name!r}: give a folder on a disk that all nodes share under "
                    "the same path, or an address that all reach, or leave writers='actors' out"
                )
            time.sleep(0.1)
        if isinstance(self.folder, Path) and not os.access(self.folder, os.W_OK):
            raise Unsupported(
                f"the node {platform.node()!r} must not write to {self._name!r}: change the "
                "permissions of the folder, or leave writers='actors' out"
            )

    def compute(self, plan: ShardPlan) -> Shard:
        """Makes the file of a shard, and returns its line of the index."""
        if plan.is_new and (shard := self._complete_shard(plan)):
            return shard
        with COMPUTING:
            windows = list(map(self._window_values, plan.windows))
        shard = (plan.number, plan.sequences, windows, self._check_mark)
        if isinstance(self.folder, Address):
            with self.folder.temporary_folder() as folder:
                written = write_shard(folder, *shard)
                upload_shard(self.folder, folder, written, plan.is_new)
            return written
        written = write_shard(self.folder, *shard)
        if plan.is_new:
            write_note(self.folder, written, self._check_mark)
        return written

    def _window_values(self, window: Window) -> dict[AnySite, Stored]:
        stored = empty_values(self.values.kinds, window.rows)
        for batch in window.batches(self.rules):
            try:
                store_batch(stored, batch, self.values.compute(batch))
            except Exception as error:  # whatever it is, its batch is named
                error.add_note(f"in {batch}")
                raise
        return stored

    def _complete_shard(self, plan: ShardPlan) -> Shard | None:
        """Returns the line of a shard that an actor completed before, if it has these texts."""
        expected = describe_shard(plan.number, plan.sequences, 0, "")
        with local_file(self.folder, note_of(Path(), expected.file).name) as note:
            shard = read_note(note)
        if shard is None:
            return None
        if describe_shard(plan.number, plan.sequences, shard.bytes, shard.sha256) != shard:
            return None
        with local_file(self.folder, shard.file) as path:
            return shard if path.is_file() and sha256(path) == shard.sha256 else None

    @property
    def _name(self) -> str:
        return self.folder.text if isinstance(self.folder, Address) else str(self.folder)

    def _sees_mark(self) -> bool:
        if isinstance(self.folder, Address):
            return self.folder.has(self.mark)
        return os.path.lexists(self.folder / self.mark)

    def _check_mark(self, _: object) -> None:
        """Raises `Unsupported` in an actor whose harvest has ended, before it renames a file."""
        if not self._sees_mark():
            raise Unsupported(
                f"the harvest that writes to {self._name!r} has ended, or another process "
                "harvests into the folder: wait for it, or give another folder"
            )
