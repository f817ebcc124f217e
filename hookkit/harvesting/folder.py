"""The folder of a harvest: harvest.json says how it is made, index.jsonl which shards are done, and each is a file.

    harvest.json        the model, the sites and all settings that decide what the numbers are; written first
    00000.safetensors   a shard: a tensor [row, ...] for each site, and the columns below
    index.jsonl         a line for each shard that is done, with its sha256; the last one says that all is

Columns of a shard, [row]: text (the number of the text), piece (of the text, 0 unless it was split), pos, token (its
id), read (the number of the row of tokens in the shard). The tokens that the model read stand one row behind the other
in `ids`, those of read n from `starts[n]` to `starts[n + 1]`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..about import about_model, config_hash, tokenizer_hash, weights_hash
from ..errors import DamagedHarvest, HarvestChanged
from ..model import LM
from . import disk
from .windows import Window

SETTINGS, INDEX, SHARD = "harvest.json", "index.jsonl", "{:05d}.safetensors"
FORMAT = 1
COLUMNS = ("text", "piece", "pos", "token", "read")
DECIDING = ("torch", "transformers", "tokenizers")  # the packages whose versions decide what numbers come out


@dataclass(frozen=True)
class Shard:
    """A shard that is done. `text` and `piece` are its last ones, `stream` the sha256 of all texts up to there."""

    file: str
    rows: int
    tokens: int
    left_out: int
    text: int
    piece: int
    stream: str
    bytes: int
    sha256: str

    def is_there(self, folder: Path) -> bool:
        """True where the file is there in its size."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.bytes


@dataclass(frozen=True)
class End:
    """The last line of the index: how many texts there were, and how many of them behind the last shard gave no row."""

    texts: int
    left_out: int
    stream: str


def model_of(lm: LM) -> dict[str, Any]:
    """What has to be the same for the same numbers to come out."""
    about = about_model(lm)
    said = {name: about[name] for name in ("class", "family", "dtype", "device", "attention", "adapters")}
    hashes = {"config": config_hash(lm), "weights": weights_hash(lm), "tokenizer": tokenizer_hash(lm)}
    known = {name: about["versions"].get(name) for name in DECIDING}
    return {"name": about["model"], **said, **{f"{name}_sha256": found for name, found in hashes.items()}, **known}


def read_settings(folder: Path) -> dict[str, Any]:
    """What harvest.json says."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedHarvest(
            f"{folder.name!r} has no {SETTINGS}, so it is no harvest: give the folder that hk.harvest wrote"
        ) from None
    except ValueError as error:
        raise DamagedHarvest(f"{SETTINGS} of {folder.name!r} cannot be read: {error}; harvest again") from error
    if found.get("format") != FORMAT:
        raise DamagedHarvest(
            f"{folder.name!r} has format {found.get('format')!r}, and this hookkit reads {FORMAT}: read it with the "
            "hookkit that wrote it"
        )
    return found


def read_index(folder: Path) -> tuple[list[Shard], End | None]:
    """The shards that are done, in order, and how the harvest ended, if it has."""
    shards: list[Shard] = []
    for line in disk.whole_lines(folder / INDEX):
        try:
            found = json.loads(line)
            if "texts" in found:
                return shards, End(**found)
            shards.append(Shard(**found))
        except (ValueError, TypeError) as error:
            raise DamagedHarvest(
                f"line {len(shards) + 1} of {INDEX} in {folder.name!r} cannot be read ({error}): delete it and those "
                "after it and harvest again, which makes their shards anew"
            ) from error
    return shards, None


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder ready to go on: its settings are these, and nothing half-made is in it."""
    if (folder / SETTINGS).exists():
        _check_same(folder, read_settings(folder), settings)
    elif (folder / INDEX).exists() or any(_numbered(folder)):
        raise DamagedHarvest(f"{folder.name!r} has shards and no {SETTINGS}: give an empty folder")
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    if not (folder / SETTINGS).exists() or (folder / SETTINGS).read_text(encoding="utf-8") != text:
        disk.write_bytes(folder / SETTINGS, text.encode())
    disk.cut_to_whole_lines(folder / INDEX)
    for path in folder.glob(disk.MAKING.format("*")):
        path.unlink()


def finish(folder: Path, end: End) -> None:
    """Say in the index that all is done, and take away shards of texts that were never said to be done."""
    done = {shard.file for shard in read_index(folder)[0]}
    for path in _numbered(folder):
        if path.name not in done:
            path.unlink()
    append(folder, end)


def _numbered(folder: Path) -> Iterator[Path]:
    return folder.glob("[0-9][0-9][0-9][0-9][0-9]*.safetensors")


def _check_same(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `HarvestChanged` with all that differs."""
    old, new = dict(_flat(there)), dict(_flat(asked))
    if there.get("sites") != asked.get("sites"):
        old["sites"], new["sites"] = (", ".join(each["sites"]) for each in (there, asked))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name) and not _may_differ(name, old)]
    if differing:
        words = [f"{name} {_short(old.get(name))} there and {_short(new.get(name))} now" for name in differing]
        raise HarvestChanged(
            f"{folder.name!r} has a harvest of other settings: {'; '.join(words)}. Give the same ones to go on, or "
            "another folder"
        )


def _may_differ(name: str, old: Mapping[str, Any]) -> bool:
    """A model may have moved; and what "error" refused may be allowed, since what is done was not refused."""
    return name == "model.name" or (name in ("long", "unfit") and old.get(name) == "error")


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _short(value: Any) -> str:
    return f"{value[:8]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def columns(windows: list[Window]) -> dict[str, Tensor]:
    """Which token each row of a shard is of, and all tokens that the model read for it."""
    reads = [read for window in windows for read in window.reads]
    lengths = [0, *(len(read.ids) for read in reads)]
    numbers = {
        "text": [read.text for read in reads for _ in read.places],
        "piece": [read.piece for read in reads for _ in read.places],
        "pos": [place for read in reads for place in read.places],
        "token": [read.ids[place] for read in reads for place in read.places],
        "read": [number for number, read in enumerate(reads) for _ in read.places],
        "ids": [token for read in reads for token in read.ids],
        "starts": list(accumulate(lengths)),
    }
    wide = ("text", "starts")
    return {name: torch.tensor(n, dtype=torch.int64 if name in wide else torch.int32) for name, n in numbers.items()}


def write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor], **said: Any) -> Shard:
    """Write a shard's file; its line of the index."""
    file = SHARD.format(number)
    size, found = disk.write_tensors(folder / file, tensors)
    return Shard(file=file, bytes=size, sha256=found, **said)


def append(folder: Path, entry: Shard | End) -> None:
    """Say in the index that a shard is done, or all of them."""
    disk.append_line(folder / INDEX, json.dumps(dataclasses.asdict(entry)))
