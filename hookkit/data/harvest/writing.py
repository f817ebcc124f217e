"""hk.harvest: the values at some sites for any number of texts, into a folder, which goes on where it was killed."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arguments import checks_arguments, folder_of
from ...errors import BadHook, EmptySelection, HarvestChanged
from ...files.atomic import locked
from ...models.lm import LM
from ...models.positions import PosLike, Where, as_pos
from ...models.sites import AnySite, SitesLike
from ...runs.engines.actors import computed
from ...runs.engines.ray import EngineLike, Ray, as_engine
from ...runs.engines.work import Step, Steps
from .folder import (
    FORMAT,
    End,
    Shard,
    append,
    begin,
    columns,
    finish,
    model_of,
    read_index,
    write_shard,
)
from .harvest import Harvest, open_harvest
from .stored_values import Batch, Computing, Kind, Progress, probed, row_numbers
from .texts import (
    LOOK_AHEAD,
    Cursor,
    Long,
    Rules,
    TextsLike,
    Unfit,
    Window,
    batches,
    context_of,
    how_many,
    next_window,
)

SHARD_BYTES = 128 * 2**20  # of the values in a shard, where shard_size is left out
DTYPES = ("float32", "bfloat16", "float16", "float64")


@checks_arguments
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
    unfit: Unfit = "error",
    batch_tokens: int = 2048,
    shard_size: int | None = None,
    progress: bool = True,
    engine: EngineLike = None,
) -> Harvest:
    """Write what is at these sites, for every text, to a folder of safetensors; the harvest to read.

    Texts are a list or any other iterable of texts or rows of token ids (or of mappings with "text", as the `datasets`
    package gives them), or the path of a file with a text a line, .txt or .jsonl. They are read once, and never more
    than a few batches ahead. Each text is a prompt: `pos` says which of its positions are kept (all, where left out).
    The model runs no further than the last site.

    dtype         of the numbers on the disk: "float32", "bfloat16", "float16"; as the model computes, where left out
    context       how many tokens of a text are read at most; the model's own limit, where left out
    long          what becomes of a longer text: "error", "truncate", or "split" into texts of their own, its pieces
    unfit         what becomes of a text that is empty or lacks a position that is wanted: "error" or "skip"
    batch_tokens  how many tokens run together, padding included
    shard_size    a shard is done when it has as many rows (128 MiB, where left out); memory holds three at most
    engine        "ray", or `Ray(…)`: batches are computed by actors that hold the model each, and written here

    A folder that is there already is gone on with, behind the last shard that is done, if the model, the settings and
    the texts up to there are the same; else `HarvestChanged`. What comes out is then the same, byte for byte, as if it
    had never been interrupted (on one machine, with as many threads).

    >>> made = harvest(lm, ["Tea with milk", "Coffee"], "resid_post.6", "folder", dtype="bfloat16", progress=False)
    >>> made["resid_post.6"][-1].shape, made["pos"][:].tolist()
    (torch.Size([576]), [0, 1, 2, 3, 0, 1])
    """
    chosen = as_engine(engine, lm)
    context = context_of(lm, context)
    rules = Rules(Where(as_pos(pos)), context, long, unfit)
    kinds = _stored(probed(lm, sites, "a harvest"), dtype)
    shard_size = shard_size or max(1, SHARD_BYTES // sum(kind.bytes for kind in kinds.values()))
    for word, value in (("batch_tokens", batch_tokens), ("shard_size", shard_size)):
        if value < 1:
            raise BadHook(f"{word}={value!r}: give 1 or more")
    settings: dict[str, Any] = {"format": FORMAT, "model": model_of(lm), "sites": _written(kinds)}
    settings |= {"pos": repr(rules.where.pos), "context": context, "long": long, "unfit": unfit}
    settings |= {"batch_tokens": batch_tokens, "shard_size": shard_size}
    path, cursor = folder_of(folder), Cursor(lm, texts, rules)
    progress = progress and lm.is_writer
    lock = locked(path, "is writing the harvest") if lm.is_writer else nullcontext()
    with lock, Progress(how_many(texts) if progress else None, progress) as shown:
        if lm.is_writer:
            begin(path, settings)
        Harvesting(lm, kinds, path, cursor, batch_tokens, shard_size, shown).run(chosen)
    if lm.ranks is not None:
        lm.ranks.together()
    return open_harvest(path)


def _stored(kinds: dict[AnySite, Kind], dtype: torch.dtype | str | None) -> dict[AnySite, Kind]:
    """What the shards hold: numbers that are no counts in the dtype that was asked for."""
    if dtype is None:
        return kinds
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadHook(f"dtype={dtype!r}: values are kept as {', '.join(map(repr, DTYPES))}")
    kind: torch.dtype = getattr(torch, name)
    return {
        s: Kind(each.shape, kind if each.dtype.is_floating_point else each.dtype)
        for s, each in kinds.items()
    }


def _written(kinds: dict[AnySite, Kind]) -> dict[str, Any]:
    return {
        str(site): {"shape": list(kind.shape), "dtype": str(kind.dtype).removeprefix("torch.")}
        for site, kind in kinds.items()
    }


@dataclass(eq=False)
class Writing:
    """Shards on their way to the disk: at most one is written while the next one is computed."""

    writer: ThreadPoolExecutor
    any: bool = False
    _last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        self.wait()
        self._last, self.any = self.writer.submit(write), True

    def wait(self) -> None:
        """Wait for a shard to be on the disk; what went wrong there is raised here."""
        if self._last is not None:
            self._last.result()


@dataclass(eq=False)
class Harvesting:
    """A harvest while it is being made: shard after shard, each from the windows that come next."""

    lm: LM
    kinds: dict[AnySite, Kind]
    folder: Path
    cursor: Cursor
    batch_tokens: int
    shard_size: int
    progress: Progress

    def run(self, engine: Ray | None) -> None:
        """Make the shards that are not there, and end the index."""
        done, end, there = self._known()
        work = Computing(self.lm, self.kinds, self.cursor.rules.where)
        with ThreadPoolExecutor(
            1
        ) as writer:  # which is waited for, whatever happens: what is computed gets written
            writing = Writing(writer)
            computed(engine, self.lm, work, self._steps(done, there, end, writing))
            writing.wait()
        self._finish(bool(done) or writing.any, end)

    def _known(self) -> tuple[list[Shard], End | None, list[bool]]:
        """The shards that are done, how the harvest ended, and which shards are there, as the one that writes sees."""
        done, end = read_index(self.folder) if self.lm.is_writer else ([], None)
        found = done, end, [each.is_there(self.folder) for each in done]
        return found if self.lm.ranks is None else self.lm.ranks.first(found)

    def _steps(
        self, done: list[Shard], there: list[bool], end: End | None, writing: "Writing"
    ) -> Steps:
        """Shard after shard, each from the windows that come next."""
        number = 0
        while number < len(done) or end is None:
            known = done[number] if number < len(done) else None
            if known is not None and there[number]:
                self.cursor.skip(known.text, known.piece, known.stream)
                yield Step(None, lambda _, text=known.text: self.progress.skipped(text))
            else:
                windows: list[Window] = []
                values: list[dict[AnySite, Tensor]] = []
                yield from self._shard(windows, values)
                if not windows and known is not None:
                    raise HarvestChanged(
                        f"the folder has a harvest of {known.text + 1} texts or more, and only "
                        f"{self.cursor.text + 1} were given: give the same texts to go on, or another folder"
                    )
                if not windows:
                    return
                write = partial(self._write, number, known, windows, values)
                yield Step(None, lambda _, write=write: writing.submit(write))
            number += 1

    def _shard(self, windows: list[Window], values: list[dict[AnySite, Tensor]]) -> Steps:
        """The windows of the next shard, and their values; none behind the last text."""
        rows = 0
        while rows < self.shard_size:
            look_ahead = LOOK_AHEAD * self.batch_tokens
            window = next_window(self.cursor, room=self.shard_size - rows, tokens=look_ahead)
            if window is None:
                return
            windows.append(window)
            values.append(self._empty(window))
            yield from self._window(window, values[-1])
            rows += window.rows

    def _empty(self, window: Window) -> dict[AnySite, Tensor]:
        return {
            site: torch.empty((window.rows, *kind.shape), dtype=kind.dtype)
            for site, kind in self.kinds.items()
        }

    def _window(self, window: Window, into: dict[AnySite, Tensor]) -> Steps:
        """The values of a window, in the order of the texts, computed in the order of their lengths."""
        starts = window.starts

        def put(found: dict[AnySite, Tensor], batch: list[int]) -> None:
            rows = row_numbers(
                [window.reads[number] for number in batch], [starts[number] for number in batch]
            )
            for site, values in found.items():
                into[site][rows] = values
            self.progress.computed(window, batch)

        for batch in batches(window, self.batch_tokens, one_length=self.lm.config is None):
            yield Step(
                Batch(tuple(window.reads[number] for number in batch)), partial(put, batch=batch)
            )
        yield Step(None, lambda _: self.progress.reached(window.reads[-1].text))

    def _write(
        self,
        number: int,
        known: Shard | None,
        windows: list[Window],
        values: list[dict[AnySite, Tensor]],
    ) -> None:
        if not self.lm.is_writer:
            return
        tensors = {str(site): torch.cat([each.pop(site) for each in values]) for site in self.kinds}
        last = windows[-1].reads[-1]
        shard = write_shard(
            self.folder,
            number,
            tensors | columns(windows),
            rows=sum(window.rows for window in windows),
            tokens=sum(window.tokens for window in windows),
            left_out=sum(window.left_out for window in windows),
            text=last.text,
            piece=last.piece,
            stream=last.stream,
        )
        if known is None:
            append(self.folder, shard)
        elif shard != known:
            raise HarvestChanged(
                f"{shard.file} was missing and was made again, and is not what the index says: other texts were given, "
                "or this machine computes other last digits. Harvest into another folder"
            )

    def _finish(self, any_rows: bool, end: End | None) -> None:
        """Say that all texts are done, or check that they are those of a harvest that was finished before."""
        if end is not None and (self.cursor.read() is not None or self.cursor.digest != end.stream):
            raise HarvestChanged(
                f"the harvest in {self.folder.name!r} is finished and has {end.texts} texts, and others or more were "
                "given: harvest them into another folder"
            )
        texts = self.cursor.text + 1
        if not any_rows:
            raise EmptySelection(
                f"none of the {texts} texts has a position at pos={self.cursor.rules.where.pos!r}: give others"
                if texts
                else "no text was given: the stream of texts is empty"
            )
        if end is None and self.lm.is_writer:
            finish(self.folder, End(texts, self.cursor.left_out, self.cursor.digest))
        self.progress.reached(texts - 1)
