"""`hk.harvest`: writes the values at some sites, for any number of texts, to a folder.

A harvest that was interrupted continues after its last complete shard, and its files are then
equal, byte for byte, to those of a harvest without interruption.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from ...arguments import check_arguments, check_integer
from ...errors import BadHook, EmptySelection, HarvestChanged
from ...files.address import Address, read_folder
from ...files.atomic import mark_folder, remove_leftovers
from ...models.dictionaries import find_dictionary
from ...models.lm import LM
from ...models.positions import PosLike
from ...models.sites import AnySite, Site, SitesLike
from ...runs.engines.actors import Step, Steps, Work, run_steps
from ...runs.engines.ray import EngineLike, Ray, read_engine
from .folder import (
    CHECKPOINT,
    FORMAT,
    INDEX,
    End,
    Shard,
    append_to_index,
    describe_model,
    finish_index,
    folder_to_write,
    note_of,
    read_index,
    remove_other_files,
    shards_exist,
    upload_shard,
)
from .harvest import Harvest, open_harvest
from .shard_computation import (
    ShardComputation,
    ShardPlan,
    Stored,
    empty_values,
    store_batch,
    write_shard,
)
from .stored_values import Progress, ValueComputation, ValueKind, probe_sites
from .texts import (
    Batch,
    Long,
    OnError,
    TextReader,
    TextsLike,
    TokenSequence,
    Window,
    read_rules,
)

SHARD_BYTES = 128 * 2**20  # of the values in a shard, if shard_size is None
Writers: TypeAlias = Literal["driver", "actors"]
# the number of a shard and its line of the index -> steps, and False if no text is left
MakeShard: TypeAlias = Callable[[int, Shard | None], Generator[Step, None, bool]]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@check_arguments
def harvest(
    lm: LM,
    texts: TextsLike,
    sites: SitesLike,
    folder: str | os.PathLike[str],
    *,
    pos: PosLike = None,
    dtype: torch.dtype | str | None = None,
    context: int | None = None,
    long: Long = "error",
    on_error: OnError = "error",
    batch_tokens: int = 2048,
    shard_size: int | None = None,
    progress: bool = True,
    engine: EngineLike = None,
    writers: Writers = "driver",
) -> Harvest:
    """Writes the values at these sites, for every text, to a folder, and returns the harvest.

    `folder` is a path, or an address of fsspec such as s3://bucket/name, to which whole files are
    sent; a second harvest to the same address stops the first one.
    `texts` is a list or any other iterable of texts or rows of token ids (or of mappings with
    "text", as in the `datasets` package), or the path of a file with a text a line, .txt or .jsonl.
    The texts are read once, and never more than a few batches ahead. Each text is a prompt: `pos`
    selects the positions that are kept (all by default). The model runs no further than the last
    site. Of all features of a dictionary, such as "feat.resid_post.12", only the active ones are
    written.

    dtype         of the values on disk: "float32", "bfloat16", "float16"; by default the model's
    context       the largest number of tokens of a text; the model's own limit by default
    long          what happens to a longer text: "error", "truncate", or "split" into pieces
    on_error      what happens to a text that is empty or lacks a position: "error" or "skip"
    batch_tokens  the number of tokens that run together, padding included
    shard_size    the number of rows of a shard (by default 128 MiB); memory holds three at most
    engine        "ray", or `Ray(…)`: actors that hold the model each compute the batches
    writers       "driver": this process writes the shards; "actors": each actor computes and writes
                  whole shards, in a folder that all nodes share or at an address, and reads a few
                  shards ahead

    If the folder has an unfinished harvest, it continues after the last complete shard. The model,
    the settings and the texts up to there must be the same; else `HarvestChanged` is raised. The
    files are then the same, byte for byte, as without an interruption (on one machine, with as many
    threads).

    >>> texts = ["Tea with milk", "Coffee"]
    >>> made = harvest(lm, texts, "resid_post.6", "folder", dtype="bfloat16", progress=False)
    >>> made["resid_post.6"][-1].shape, made["pos"][:].tolist()
    (torch.Size([576]), [0, 1, 2, 3, 0, 1])
    """
    target, ray = read_folder(folder), read_engine(engine, lm)
    if writers == "actors" and ray is None:
        raise BadHook("writers='actors' needs actors: add engine='ray', or leave writers= out")
    rules = read_rules(lm, pos, context, long, on_error, batch_tokens)
    kinds = _stored_kinds(probe_sites(lm, sites, "a harvest"), dtype)
    if shard_size is None:
        shard_size = max(1, SHARD_BYTES // sum(kind.bytes for kind in kinds.values()))
    meaning = "how many rows a shard has,"
    check_integer(shard_size, "shard_size", least=1, meaning=meaning, error=BadHook)
    settings = {
        "format": FORMAT,
        "model": describe_model(lm) | _about_dictionaries(lm, kinds),
        "sites": {str(site): kind.as_json() for site, kind in kinds.items()},
        "pos": repr(rules.where.pos),
        "context": rules.context,
        "long": long,
        "on_error": on_error,
        "batch_tokens": batch_tokens,
        "shard_size": shard_size,
    }
    reader, progress = TextReader(lm, texts, rules), progress and lm.is_writer
    folders: AbstractContextManager[tuple[Path, Path | Address]] = nullcontext((Path(), target))
    if lm.is_writer:
        folders = folder_to_write(target, settings)
    with folders as (path, target), Progress(reader, progress) as bar:
        writer = HarvestWriter(lm, kinds, path, target, reader, shard_size, bar)
        if writers == "actors":
            writer.run_on_actors(ray)
        else:
            writer.run(ray)
    if lm.ranks is not None:
        lm.ranks.gather_values(None)  # waits for every rank
    return open_harvest(folder)


def _stored_kinds(
    kinds: dict[AnySite, ValueKind], dtype: torch.dtype | str | None
) -> dict[AnySite, ValueKind]:
    """Returns the shapes and dtypes in the shards: `dtype` applies to real numbers only."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise BadHook(f"dtype={dtype!r}: values are kept as {', '.join(map(repr, DTYPES))}")
    stored: dict[AnySite, ValueKind] = {}
    for site, kind in kinds.items():
        stored[site] = replace(kind, sparse=_is_sparse(site))
        if name is not None and kind.dtype.is_floating_point:
            stored[site] = replace(stored[site], dtype=getattr(torch, name))
    return stored


def _is_sparse(site: AnySite) -> bool:
    """True for all features of a dictionary."""
    return isinstance(site, Site) and site.of_features and site.head is None


def _about_dictionaries(lm: LM, sites: Iterable[AnySite]) -> dict[str, Any]:
    """Returns the dictionaries whose features are harvested, as values for JSON."""
    about: dict[str, Any] = {}
    for site in sites:
        if isinstance(site, Site) and site.of_features:
            dictionary = find_dictionary(lm.layout.dictionaries, replace(site, head=None))
            about[str(replace(site, head=None))] = dictionary.about()
    return {"dictionaries": about} if about else {}


@dataclass(eq=False)
class HarvestWriter:
    """Computes and writes the shards of a harvest, one after another.

    Every shard has the next windows of texts. A thread writes a shard while the next one is
    computed. `folder` has the index; `target` is the same folder, or the address to which the files
    are sent. `harvest` owns the writer.
    """

    lm: LM
    kinds: dict[AnySite, ValueKind]
    folder: Path
    target: Path | Address
    reader: TextReader
    shard_size: int
    progress: Progress
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _last_write: Future[None] | None = None
    _has_rows: bool = False

    def run(self, engine: Ray | None) -> None:
        """Makes the missing shards and finishes the index."""
        with self._thread:  # leaving the block waits until a shard is written
            end = self._run(engine, self._computation(), self._shard)
            self._wait()
        self._finish(end)

    def run_on_actors(self, engine: Ray | None) -> None:
        """Lets actors make the missing shards, and finishes the index."""
        work = partial(ShardComputation, self._computation(), self.reader.rules)
        if isinstance(self.target, Address):
            shards = work(self.target, self.target.mark)
            end = self._run(engine, shards, self._planned_shard)
        else:
            with mark_folder(self.folder, "writers") as mark:
                shards = work(self.folder.absolute(), mark.name)
                end = self._run(engine, shards, self._planned_shard)
            remove_leftovers(self.folder)  # of actors that were killed
        self._finish(end)

    def _computation(self) -> ValueComputation:
        return ValueComputation(self.lm, self.kinds, self.reader.rules.where)

    def _run(self, engine: Ray | None, work: Work, make: MakeShard) -> End | None:
        shards, end, exists = self._read_progress()
        self._has_rows = bool(shards)
        run_steps(engine, self.lm, work, self._steps(shards, exists, end, make))
        return end

    def _read_progress(self) -> tuple[list[Shard], End | None, list[bool]]:
        """Returns the index and whether each shard exists, as the writing process sees them."""
        shards, end = read_index(self.folder) if self.lm.is_writer else ([], None)
        progress = shards, end, shards_exist(self.target, shards) if shards else []
        if self.lm.ranks is None:
            return progress
        return self.lm.ranks.gather_values(progress)[0]

    def _steps(
        self, shards: list[Shard], exists: list[bool], end: End | None, make: MakeShard
    ) -> Steps:
        for number, shard in enumerate(shards):
            if exists[number]:
                self.reader.skip(shard.text, shard.piece, shard.stream)
                yield Step(None, lambda _, text=shard.text: self.progress.skip_to(text))
                continue
            is_complete = yield from make(number, shard)
            if not is_complete:
                raise self.reader.too_few_texts(shard.text + 1)
        number = len(shards)
        while end is None and (yield from make(number, None)):
            number += 1

    def _shard(self, number: int, expected: Shard | None) -> Generator[Step, None, bool]:
        """Yields the steps of a shard. Returns False, without a shard, after the last text."""
        sequences: list[TokenSequence] = []
        values: list[dict[AnySite, Stored]] = []
        for window in self._windows():
            stored = empty_values(self.kinds, window.rows)
            for batch in window.batches(self.reader.rules):
                yield Step(batch, partial(self._store, stored, batch))
            last_text = window.sequences[-1].text
            yield Step(None, lambda _, text=last_text: self.progress.advance_to(text))
            sequences += window.sequences
            values.append(stored)
        if not sequences:
            return False
        yield Step(None, lambda _: self._submit(number, expected, sequences, values))
        return True

    def _planned_shard(self, number: int, expected: Shard | None) -> Generator[Step, None, bool]:
        """Yields the one step of a shard that an actor makes. Returns False after the last text."""
        windows = tuple(self._windows())
        if not windows:
            return False
        plan = ShardPlan(number, windows, is_new=expected is None)
        yield Step(plan, partial(self._record_plan, plan, expected))
        return True

    def _windows(self) -> Iterator[Window]:
        """Reads the windows of the next shard."""
        rows = 0
        while rows < self.shard_size:
            window = self.reader.read_window(self.shard_size - rows)
            if window is None:
                return
            rows += window.rows
            yield window

    def _store(
        self, stored: dict[AnySite, Stored], batch: Batch, computed: dict[AnySite, Any]
    ) -> None:
        store_batch(stored, batch, computed)
        self.progress.add(batch)

    def _submit(self, *shard: Any) -> None:
        self._wait()
        self._has_rows = True
        self._last_write = self._thread.submit(self._write, *shard)

    def _wait(self) -> None:
        """Waits until the last shard is written. Raises the error of the thread if it failed."""
        if self._last_write is not None:
            self._last_write.result()

    def _write(
        self,
        number: int,
        expected: Shard | None,
        sequences: list[TokenSequence],
        values: list[dict[AnySite, Stored]],
    ) -> None:
        if self.lm.is_writer:
            shard = write_shard(self.folder, number, sequences, values)
            if isinstance(self.target, Address):
                upload_shard(self.target, self.folder, shard, is_new=expected is None)
            self._record(number, expected, shard)

    def _record_plan(self, plan: ShardPlan, expected: Shard | None, shard: Shard) -> None:
        self._has_rows = True
        self._record(plan.number, expected, shard)
        note_of(self.folder, shard.file).unlink(missing_ok=True)
        for window in plan.windows:
            self.progress.add(window)
        self.progress.advance_to(shard.text)

    def _record(self, number: int, expected: Shard | None, shard: Shard) -> None:
        """Adds a complete shard to the index, or compares it with its line there."""
        if expected is None:
            append_to_index(self.folder, shard)
            if isinstance(self.target, Address) and (number + 1) % CHECKPOINT == 0:
                self.target.upload(self.folder / INDEX)
        elif shard != expected:
            raise HarvestChanged(
                f"{shard.file} was missing and was made again, and is not what the index says: "
                "other texts were given, or this machine computes other last digits. "
                "Harvest into another folder"
            )

    def _finish(self, end: End | None) -> None:
        """Finishes the index, or checks that a finished harvest has the same texts."""
        if end is not None and (self.reader.read() is not None or self.reader.digest != end.stream):
            raise HarvestChanged(
                f"the harvest in {self.target.name!r} is finished and has {end.texts} texts, and "
                "others or more were given: harvest them into another folder"
            )
        texts = self.reader.text + 1
        if not self._has_rows:
            problem = "no text was given: the stream of texts is empty"
            if texts:
                pos = self.reader.rules.where.pos
                problem = f"none of the {texts} texts has a position at pos={pos!r}: give others"
            raise EmptySelection(problem)
        if end is None and self.lm.is_writer:
            finish_index(self.folder, End(texts, self.reader.left_out, self.reader.digest))
            if isinstance(self.target, Address):
                self.target.upload(self.folder / INDEX)
        if isinstance(self.target, Address) and self.lm.is_writer:
            remove_other_files(self.target, self.folder)
        self.progress.advance_to(texts - 1)
