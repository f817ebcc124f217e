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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BadFile, DamagedHarvest, HarvestChanged, HookkitError
from ...files.atomic import (
    add_line,
    added_to,
    cut_to_whole_lines,
    remove_leftovers,
    whole_lines,
    write_bytes,
    write_tensors,
)
from ...files.untrusted import inside, json_in, json_of, mapping_of, opened_tensors, plain_whole
from ...models.lm import LM
from ...models.provenance import about_model, config_hash, tokenizer_hash, weights_hash
from ...models.sites import parse
from .texts import Window

SETTINGS, INDEX, SHARD = "harvest.json", "index.jsonl", "{:05d}.safetensors"
FORMAT = 1
COLUMNS = ("text", "piece", "pos", "token", "read")
NUMBERED = re.compile(r"[0-9]{5,}\.safetensors")
OWN = (
    "format",
    "model",
    "sites",
    "pos",
    "context",
    "long",
)  # what is read of the settings, besides being compared
DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
DECIDING = (
    "torch",
    "transformers",
    "tokenizers",
)  # the packages whose versions decide what numbers come out


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

    def __post_init__(self) -> None:
        numbers = (self.rows, self.tokens, self.left_out, self.text, self.piece, self.bytes)
        if (
            not all(map(plain_whole, numbers))
            or not isinstance(self.stream, str)
            or not isinstance(self.sha256, str)
        ):
            raise ValueError("a number or a hash is none")
        if not isinstance(self.file, str) or not NUMBERED.fullmatch(self.file):
            raise ValueError(
                f"{str(self.file)[:80]!r} is no name of a shard, such as {SHARD.format(0)}"
            )

    def is_there(self, folder: Path) -> bool:
        """True where the file is there in its size."""
        path = self.path(folder)
        return path.is_file() and path.stat().st_size == self.bytes

    def path(self, folder: Path) -> Path:
        """Where the file is; `DamagedHarvest` for a link that leads out of the folder."""
        return inside(folder, self.file, error=DamagedHarvest)


@dataclass(frozen=True)
class End:
    """The last line of the index: how many texts there were, and how many of them behind the last shard gave no row."""

    texts: int
    left_out: int
    stream: str

    def __post_init__(self) -> None:
        if (
            not plain_whole(self.texts)
            or not plain_whole(self.left_out)
            or not isinstance(self.stream, str)
        ):
            raise ValueError("a number or a hash is none")


def model_of(lm: LM) -> dict[str, Any]:
    """What has to be the same for the same numbers to come out."""
    about = about_model(lm)
    said = {
        name: about[name]
        for name in ("class", "family", "dtype", "device", "attention", "adapters")
    }
    hashes = {
        "config": config_hash(lm),
        "weights": weights_hash(lm),
        "tokenizer": tokenizer_hash(lm),
    }
    known = {name: about["versions"].get(name) for name in DECIDING}
    return {
        "name": about["model"],
        **said,
        **{f"{name}_sha256": found for name, found in hashes.items()},
        **known,
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """What harvest.json says."""
    path = inside(folder, SETTINGS, error=DamagedHarvest)
    if not path.exists():
        raise DamagedHarvest(
            f"{folder.name!r} has no {SETTINGS}, so it is no harvest: give the folder that hk.harvest wrote"
        )
    try:
        settings = mapping_of(json_in(path), f"{SETTINGS} of {folder.name!r}")
    except BadFile as error:
        raise DamagedHarvest(
            f"{SETTINGS} of {folder.name!r} cannot be read: {error}; harvest again"
        ) from error
    if settings.get("format") != FORMAT:
        raise DamagedHarvest(
            f"{folder.name!r} has format {settings.get('format')!r}, and this hookkit reads {FORMAT}: read it with the "
            "hookkit that wrote it"
        )
    lacking = [name for name in OWN if name not in settings]
    if (
        lacking
        or not isinstance(settings["sites"], dict)
        or not isinstance(settings["model"], dict)
    ):
        words = f"has no {', '.join(lacking)}" if lacking else "has sites or a model that are none"
        raise DamagedHarvest(f"{SETTINGS} of {folder.name!r} {words}: harvest again")
    for name, kind in settings["sites"].items():
        _check_kind(folder, name, kind)
    return settings


def _check_kind(folder: Path, name: str, kind: Any) -> None:
    """Raise `DamagedHarvest` for what is no site, no shape or no dtype."""
    try:
        parse(name)
    except HookkitError as error:
        raise DamagedHarvest(
            f"{SETTINGS} of {folder.name!r} has a site that is none: {error}"
        ) from error
    words = kind if isinstance(kind, dict) else {}
    sizes = words.get("shape")
    if (
        not isinstance(sizes, list)
        or not all(map(plain_whole, sizes))
        or words.get("dtype") not in DTYPES
    ):
        raise DamagedHarvest(
            f"{SETTINGS} of {folder.name!r} has no shape or no dtype for {name!r}: harvest again"
        )


def read_index(folder: Path) -> tuple[list[Shard], End | None]:
    """The shards that are done, in order, and how the harvest ended, if it has."""
    shards: list[Shard] = []
    path = inside(folder, INDEX, error=DamagedHarvest)
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            entry = mapping_of(json_of(line, "it"), "it")
            if "texts" in entry:
                return shards, End(**entry)
            shards.append(Shard(**entry))
        except (BadFile, ValueError, TypeError) as error:
            raise DamagedHarvest(
                f"line {number} of {INDEX} in {folder.name!r} cannot be read ({error}): delete it and those "
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
    remove_leftovers(folder)
    path = folder / SETTINGS
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode())
    cut_to_whole_lines(folder / INDEX)


def finish(folder: Path, end: End) -> None:
    """Say in the index that all is done, and take away shards of texts that were never said to be done."""
    done = {shard.file for shard in read_index(folder)[0]}
    for path in _numbered(folder):
        if path.name not in done and _is_shard(path):
            path.unlink()
    append(folder, end)


def _numbered(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*.safetensors")) if NUMBERED.fullmatch(path.name))


def _is_shard(path: Path) -> bool:
    """True for a file that a harvest wrote, which has the columns of one."""
    if path.is_symlink():
        return False
    try:
        with opened_tensors(path) as file:
            return {*COLUMNS, "ids", "starts"} <= set(file.keys())
    except BadFile:
        return False


def _check_same(folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `HarvestChanged` with all that differs."""
    old, new = dict(_flat(there)), dict(_flat(asked))
    if there.get("sites") != asked.get("sites"):
        old["sites"], new["sites"] = (", ".join(each["sites"]) for each in (there, asked))
    differing = [
        name
        for name in {**old, **new}
        if old.get(name) != new.get(name) and not _may_differ(name, old)
    ]
    if differing:
        words = [
            f"{name} {_short(old.get(name))} there and {_short(new.get(name))} now"
            for name in differing
        ]
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
    return {
        name: torch.tensor(n, dtype=torch.int64 if name in wide else torch.int32)
        for name, n in numbers.items()
    }


def write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor], **said: Any) -> Shard:
    """Write a shard's file; its line of the index."""
    file = SHARD.format(number)
    size, found = write_tensors(folder / file, tensors, tidy=False)
    return Shard(file=file, bytes=size, sha256=found, **said)


def append(folder: Path, entry: Shard | End) -> None:
    """Say in the index that a shard is done, or all of them."""
    with added_to(folder / INDEX) as file:
        add_line(file, json.dumps(dataclasses.asdict(entry)))
