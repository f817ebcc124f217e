"""The files of a harvest's folder.

    harvest.json        the model, the sites and all settings that decide the values; written first
    00000.safetensors   a shard: a tensor [row, ...] for each site, and the columns below; of the
                        features of a dictionary the three tensors of sparse_rows.py
    index.jsonl         a line for each complete shard, with its sha256; then a last line

Columns of a shard, [row]: text (the number of the text), piece (of the text, 0 unless it was
split), pos, token (its id), read (the number of the token sequence in the shard). `ids` has the
tokens of all sequences that the model read, one after another; those of sequence n are
`ids[starts[n] : starts[n + 1]]`.

Where actors write the shards, .00000.safetensors.json has the line of a complete shard until it is
in the index. At an address every new shard has such a note until the harvest is finished, since the
index cannot be added to: it is sent after every `CHECKPOINT` shards and at the end, and the notes
that follow it, one after another, belong to it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BadFile, DamagedHarvest, HarvestChanged, HookkitError
from ...files.address import Address
from ...files.atomic import (
    Ready,
    add_line,
    lock_folder,
    open_to_append,
    read_complete_lines,
    remove_leftovers,
    remove_partial_line,
    write_bytes,
)
from ...files.untrusted import (
    check_mapping,
    is_count,
    open_tensors,
    parse_json,
    path_inside,
    read_json,
)
from ...models.lm import LM
from ...models.provenance import about_model, config_hash, tokenizer_hash, weights_hash
from ...models.sites import parse_site
from .texts import COLUMNS, TOKENS

SETTINGS, INDEX, SHARD = "harvest.json", "index.jsonl", "{:05d}.safetensors"
FORMAT = 1
SHARD_NAME = re.compile(r"[0-9]{5,}\.safetensors")
NOTE_NAME = re.compile(r"\.[0-9]{5,}\.safetensors\.json")
CHECKPOINT = 100  # shards after which the index is sent to an address
REQUIRED_SETTINGS = {"format", "model", "sites", "pos", "context", "long"}
DTYPES = (
    "float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"
)  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers")  # whose versions decide the values


@dataclass(frozen=True)
class Shard:
    """A complete shard: its line of the index.

    `text` and `piece` are those of its last sequence, `stream` is the sha256 of all texts up to
    there.
    """

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
        _check_entry(numbers, (self.stream, self.sha256))
        if not isinstance(self.file, str) or not SHARD_NAME.fullmatch(self.file):
            name = str(self.file)[:80]
            raise ValueError(f"{name!r} is not the name of a shard, such as {SHARD.format(0)}")

    def exists(self, folder: Path) -> bool:
        """True if the file exists and has the recorded size."""
        path = self.path(folder)
        return path.is_file() and path.stat().st_size == self.bytes

    def path(self, folder: Path) -> Path:
        """Returns the path of the file. Raises `DamagedHarvest` for a link out of the folder."""
        return path_inside(folder, self.file, error=DamagedHarvest)


@dataclass(frozen=True)
class End:
    """The last line of the index of a finished harvest.

    `texts` is the number of all texts, and `left_out` the number of those after the last shard that
    have no row.
    """

    texts: int
    left_out: int
    stream: str

    def __post_init__(self) -> None:
        _check_entry((self.texts, self.left_out), (self.stream,))


def _check_entry(numbers: tuple[Any, ...], hashes: tuple[Any, ...]) -> None:
    if not all(map(is_count, numbers)) or set(map(type, hashes)) != {str}:
        raise ValueError("a number or a hash is invalid")


# ---- settings


def describe_model(lm: LM) -> dict[str, Any]:
    """Returns what has to be equal for equal values: the model, its tokenizer and the packages."""
    about = about_model(lm)
    names = ("class", "family", "dtype", "device", "attention", "adapters", "engine")
    return {
        "name": about["model"],
        **{name: about[name] for name in names if name in about},
        "config_sha256": config_hash(lm),
        "weights_sha256": weights_hash(lm),
        "tokenizer_sha256": tokenizer_hash(lm),
        **{package: about["versions"].get(package) for package in PACKAGES},
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings in harvest.json. Raises `DamagedHarvest` if they cannot be read."""
    path = path_inside(folder, SETTINGS, error=DamagedHarvest)
    if not path.exists():
        raise DamagedHarvest(
            f"{folder.name!r} has no {SETTINGS}, so it is no harvest: "
            "give the folder that hk.harvest wrote"
        )
    name = f"{SETTINGS} of {folder.name!r}"
    try:
        settings = check_mapping(read_json(path), name)
    except BadFile as error:
        raise DamagedHarvest(f"{name} cannot be read: {error}; harvest again") from error
    if settings.get("format") != FORMAT:
        raise DamagedHarvest(
            f"{folder.name!r} has format {settings.get('format')!r}, and this hookkit reads "
            f"{FORMAT}: read it with the hookkit that wrote it"
        )
    _check_entries(name, settings)
    return settings


def _check_entries(name: str, settings: Mapping[str, Any]) -> None:
    missing = sorted(REQUIRED_SETTINGS - settings.keys())
    if missing:
        raise DamagedHarvest(f"{name} has no {', '.join(missing)}: harvest again")
    if not isinstance(settings["sites"], dict) or not isinstance(settings["model"], dict):
        raise DamagedHarvest(f"{name} has invalid sites or an invalid model: harvest again")
    for site, kind in settings["sites"].items():
        _check_site(name, site, kind)


def _check_site(file: str, site: str, kind: Any) -> None:
    try:
        parse_site(site)
    except HookkitError as error:
        raise DamagedHarvest(f"{file} has an invalid site: {error}") from error
    if not isinstance(kind, dict):
        kind = {}
    shape = kind.get("shape")
    has_shape = isinstance(shape, list) and all(map(is_count, shape))
    if not has_shape or kind.get("dtype") not in DTYPES:
        raise DamagedHarvest(f"{file} has no shape or no dtype for {site!r}: harvest again")


@contextmanager
def folder_to_write(
    target: Path | Address, settings: Mapping[str, Any]
) -> Iterator[tuple[Path, Path | Address]]:
    """Yields a folder with the settings and the index, and the target, locked or claimed.

    They are the same on a disk. The folder of an address is a temporary one on this machine.
    """
    if isinstance(target, Path):
        with lock_folder(target, "is writing the harvest"):
            prepare_folder(target, settings, os.listdir(target))
            yield target, target
        return
    with target.claimed() as address, address.temporary_folder() as folder:
        names = download_index(address, folder)
        if prepare_folder(folder, settings, names):
            address.upload(folder / SETTINGS)
        yield folder, address


def prepare_folder(folder: Path, settings: Mapping[str, Any], names: Collection[str]) -> bool:
    """Writes or checks the settings, and removes partial files. Returns True if it wrote them.

    `names` are the names of all files of the harvest.
    """
    if SETTINGS in names:
        _check_settings(folder, read_settings(folder), settings)
    elif INDEX in names or any(map(SHARD_NAME.fullmatch, names)):
        raise DamagedHarvest(f"{folder.name!r} has shards and no {SETTINGS}: give an empty folder")
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    remove_leftovers(folder)
    remove_partial_line(folder / INDEX)
    path = folder / SETTINGS
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_bytes(path, text.encode())
    return True


def _check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    old_values, new_values = _comparable(old), _comparable(new)
    for name in ("long", "on_error"):
        if old.get(name) == "error":  # it raised for none of the texts so far
            new_values[name] = "error"
    refuse_other_settings(folder, "a harvest", old_values, new_values)


def refuse_other_settings(
    folder: Path, what: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Raises `HarvestChanged` if the settings that decide the values are not the same."""
    words: list[str] = []
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if before != after:
            words.append(f"{name} {_shorten(before)} there and {_shorten(after)} now")
    if words:
        raise HarvestChanged(
            f"{folder.name!r} has {what} of other settings: {'; '.join(words)}. "
            "Give the same ones to go on, or another folder"
        )


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide the values, by names such as "model.dtype"."""
    values = dict(flatten(settings))
    values.pop("model.name", None)  # the path of the model decides nothing
    return values | {"sites": ", ".join(settings["sites"])}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields settings by names such as "model.dtype"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shorten(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:8]}…" if is_hash else repr(value)


# ---- index


def read_index(folder: Path) -> tuple[list[Shard], End | None]:
    """Returns the complete shards in order, and the end of the harvest if it is finished."""
    shards: list[Shard] = []
    path = path_inside(folder, INDEX, error=DamagedHarvest)
    for number, line in enumerate(read_complete_lines(path), start=1):
        try:
            entry = check_mapping(parse_json(line, "it"), "it")
            if "texts" in entry:
                return shards, End(**entry)
            shards.append(Shard(**entry))
        except (BadFile, ValueError, TypeError) as error:
            raise DamagedHarvest(
                f"line {number} of {INDEX} in {folder.name!r} cannot be read ({error}): delete it "
                "and those after it and harvest again, which makes their shards anew"
            ) from error
    return shards, None


def append_to_index(folder: Path, entry: Shard | End) -> None:
    """Adds the line of a complete shard, or the last line, to the index."""
    with open_to_append(folder / INDEX) as file:
        add_line(file, json.dumps(dataclasses.asdict(entry)))


def finish_index(folder: Path, end: End) -> None:
    """Removes shards that are not in the index, and their notes; adds the last line."""
    shards, _ = read_index(folder)
    names = {shard.file for shard in shards}
    for path in _shard_paths(folder):
        if path.name not in names and _is_shard(path):
            path.unlink()
    for path in folder.glob(".*.json"):
        if NOTE_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
    append_to_index(folder, end)


def note_of(folder: Path, file: str) -> Path:
    """Returns the path of the file that has a shard's line until the line is in the index."""
    return folder / f".{file}.json"


def write_note(folder: Path, shard: Shard, ready: Ready | None = None) -> Path:
    """Writes a shard's line to its note, and returns the path."""
    path = note_of(folder, shard.file)
    write_bytes(path, json.dumps(dataclasses.asdict(shard)).encode(), ready=ready)
    return path


def read_note(path: Path) -> Shard | None:
    """Returns the shard of a note; None if there is no note, or none that can be read."""
    try:
        return Shard(**check_mapping(read_json(path), path.name))
    except (BadFile, ValueError, TypeError):
        return None


# ---- at an address


def download_index(address: Address, folder: Path) -> Collection[str]:
    """Copies the settings and the whole index to a folder. Returns the names of all files."""
    names = address.sizes()
    for name in {SETTINGS, INDEX} & names.keys():
        address.download(name, folder)
    remove_partial_line(folder / INDEX)
    shards, end = read_index(folder)
    file = SHARD.format(len(shards))
    while end is None and note_of(folder, file).name in names:
        shard = read_note(address.download(note_of(folder, file).name, folder))
        if shard is None or shard.file != file:
            break
        append_to_index(folder, shard)
        shards.append(shard)
        file = SHARD.format(len(shards))
    return names


def upload_shard(address: Address, folder: Path, shard: Shard, is_new: bool) -> None:
    """Sends a shard, and then the note of a new one; removes both from the folder."""
    files = [shard.path(folder)]
    if is_new:
        files.append(write_note(folder, shard))
    for file in files:
        address.upload(file)
        file.unlink()


def remove_other_files(address: Address, folder: Path) -> None:
    """Removes all notes, and shards that are not in the index."""
    indexed = {shard.file for shard in read_index(folder)[0]}
    others: list[str] = []
    for name in address.sizes():
        if NOTE_NAME.fullmatch(name):
            others.append(name)
        elif SHARD_NAME.fullmatch(name) and name not in indexed:
            with local_file(address, name) as path:
                if _is_shard(path):
                    others.append(name)
    address.remove(others)


@contextmanager
def local_file(folder: Path | Address, name: str) -> Iterator[Path]:
    """Yields the path of a file of a harvest, or of a copy of it in the block."""
    if isinstance(folder, Path):
        yield path_inside(folder, name, error=DamagedHarvest)
        return
    with folder.temporary_folder() as copies:
        yield folder.download(name, copies)


def shards_exist(folder: Path | Address, shards: list[Shard]) -> list[bool]:
    """Returns whether the file of each shard exists and has the recorded size."""
    if isinstance(folder, Path):
        return [shard.exists(folder) for shard in shards]
    sizes = folder.sizes()
    return [sizes.get(shard.file) == shard.bytes for shard in shards]


# ---- shards


def _shard_paths(folder: Path) -> Iterator[Path]:
    return (
        path for path in sorted(folder.glob("*.safetensors")) if SHARD_NAME.fullmatch(path.name)
    )


def _is_shard(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        with open_tensors(path) as file:
            return {*COLUMNS, *TOKENS} <= set(file.keys())
    except BadFile:
        return False
