"""Reading untrusted files: JSON, YAML, safetensors and CSV that may be damaged, huge or hostile.

Every function raises `error` (by default `BadFile`), quickly and with a short message, for a file
that is missing, is a folder, is too large, is not UTF-8 or is invalid; and for numbers, nesting and
repeated keys that no file of hookkit has. `name` is the name of the file or the text in the
message.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..arguments import check_arguments, describe
from ..display import TOKEN_COLUMNS
from ..errors import BadArgument, BadFile, BadHook, HookkitError, Unsupported

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

LARGEST = 256 * 2**20  # bytes of a file that is read into memory
LARGEST_YAML = 4 * 2**20  # characters; YAML is read a hundred times more slowly
LARGEST_TABLE = 2**31  # bytes of a CSV file
DEEPEST = 64  # nested lists and mappings
MAX_DIGITS = 40  # of a whole number
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MAX_MESSAGE = 120  # characters of another library's message

Error: TypeAlias = type[HookkitError]


# ---- bytes and texts


def read_bytes(
    path: str | os.PathLike[str], *, error: Error = BadFile, most: int = LARGEST
) -> bytes:
    """Returns the bytes of a file. A file larger than `most` is refused before it is read."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            is_large = stat.S_ISREG(status.st_mode) and status.st_size > most
            data = b"" if is_large else file.read(most + 1)  # a pipe and a device have no size
    except (OSError, ValueError) as raised:  # ValueError: a name with a null byte
        raise error(f"{name!r} cannot be read: {error_message(raised)}") from raised
    if is_large or len(data) > most:
        size = f"{most / 2**20:,.0f} MB"
        raise error(f"{name!r} has more than {size}, and is not read: give a smaller file")
    return data


def read_text(path: str | os.PathLike[str], *, error: Error = BadFile, most: int = LARGEST) -> str:
    """Returns the text of a file in UTF-8, without a byte order mark."""
    return decode_text(read_bytes(path, error=error, most=most), repr(os.fspath(path)), error=error)


def decode_text(data: bytes, name: str, *, error: Error = BadFile) -> str:
    """Returns the text that bytes encode in UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as raised:
        byte = data[raised.start]
        raise error(
            f"{name} is no text in UTF-8: byte {raised.start} is 0x{byte:02x}; save it as UTF-8"
        ) from raised


# ---- JSON


def parse_json(text: str | bytes, name: str, *, error: Error = BadFile, finite: bool = True) -> Any:
    """Returns the value of a text in JSON.

    `finite` refuses NaN and Infinity, which are not JSON, and numbers that overflow, such as 1e999.
    """
    if isinstance(text, bytes):
        text = decode_text(text, name, error=error)
    parsers: dict[str, Any] = {"parse_int": _parse_integer}
    if finite:
        parsers |= {"parse_float": _parse_finite, "parse_constant": _refuse_constant}
    try:
        value = json.loads(text, object_pairs_hook=_mapping_of_pairs, **parsers)
    except RecursionError:
        raise error(_too_deep(name)) from None
    except ValueError as raised:
        raise error(f"{name} is no JSON that can be read: {error_message(raised)}") from raised
    if _is_deep(value):
        raise error(_too_deep(name))
    return value


def read_json(path: str | os.PathLike[str], *, error: Error = BadFile, finite: bool = True) -> Any:
    """Returns the value of a JSON file."""
    return parse_json(
        read_text(path, error=error), repr(os.fspath(path)), error=error, finite=finite
    )


def check_mapping(value: Any, name: str, *texts: str, error: Error = BadFile) -> dict[str, Any]:
    """Returns the value if it is a mapping whose values of the names in `texts` are texts."""
    if not isinstance(value, dict):
        raise error(f"{name} holds a {type(value).__name__}, where names and values are meant")
    for key in texts:
        if not isinstance(value.get(key, ""), str):
            value_text = str(value[key])[:MAX_MESSAGE]
            raise error(f"{name} has {value_text!r} as its {key}, where a text is meant")
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:MAX_MESSAGE]} is larger than any number")
    return number


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _mapping_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the mapping of these pairs. A repeated key is refused: its value is ambiguous."""
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key[:MAX_MESSAGE]!r} occurs twice")
        mapping[key] = value
    return mapping


def _is_deep(value: Any, depth: int = 1) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth > DEEPEST or any(_is_deep(item, depth + 1) for item in items)


def _too_deep(name: str) -> str:
    return f"{name} has more than {DEEPEST} nested lists and mappings, and is not read"


# ---- YAML

YAML_TAG = "tag:yaml.org,2002:"
YAML_TYPES = ("null", "bool", "str", "seq", "map")
YAML_PATTERNS = (  # a type, its pattern, and the first characters of its values
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


def parse_yaml(text: str, name: str, *, error: Error = BadFile) -> Any:
    """Returns the value of a text in YAML, of the types that JSON has.

    Anchors and aliases are refused, since a few of them can stand for more than the memory holds,
    and so are tags. Dates, and numbers to the base of 60 such as 1:30, are read as texts.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise error(
            f"{name} has more than {LARGEST_YAML / 2**20:,.0f} MB of YAML: "
            "write it as JSON, in a .json file"
        )
    try:
        return yaml.load(text, Loader=_json_loader())  # a subclass of SafeLoader
    except RecursionError:
        raise error(_too_deep(name)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as raised:
        raise error(f"{name} is no YAML that can be read: {error_message(raised)}") from raised


def read_hook_list(path: str | os.PathLike[str]) -> list[Any]:
    """Returns the unchecked entries of a file of hooks: YAML, or JSON if its name ends in .json."""
    name = os.fspath(path)
    try:
        text = read_text(path)
    except BadFile as raised:
        cause = raised.__cause__ or raised
        raise BadFile(
            f"{name!r} is no file of hooks that can be read: {error_message(cause)}"
        ) from raised
    parse = parse_json if name.endswith(".json") else parse_yaml
    try:
        hooks = parse(text, name)
    except BadFile as raised:
        raise BadHook(f"{name!r} is neither YAML nor JSON: {raised}") from raised
    if not isinstance(hooks, list) or not hooks:
        raise BadHook(f'{name!r} has no list of hooks: write a line for each, - "ablate:z.9.3"')
    return hooks


def _json_loader() -> Any:
    """Returns a YAML loader for the types that JSON has."""
    import yaml

    loader = _strict_loader()
    safe = yaml.SafeLoader.yaml_constructors
    constructors: dict[Any, Any] = {YAML_TAG + name: safe[YAML_TAG + name] for name in YAML_TYPES}
    constructors[None] = safe[None]
    constructors[YAML_TAG + "int"] = lambda loader, node: _parse_integer(node.value)
    constructors[YAML_TAG + "float"] = lambda loader, node: _parse_finite(node.value)
    loader.yaml_constructors = constructors
    loader.yaml_implicit_resolvers = {}
    for name, pattern, first in YAML_PATTERNS:
        loader.add_implicit_resolver(YAML_TAG + name, re.compile(rf"(?:{pattern})\Z"), first)
    return loader


def _strict_loader() -> Any:
    """Returns a YAML loader that refuses anchors, deep nesting, and keys that are no texts."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise yaml.YAMLError(
                    f"it has the anchor or alias {event.anchor!r}: "
                    "write the value out where it is meant"
                )
            self.depth += 1
            if self.depth > DEEPEST:
                raise yaml.YAMLError(f"it has more than {DEEPEST} nested lists and mappings")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = []
            for key, value in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise yaml.YAMLError(f"the key {str(name)[:MAX_MESSAGE]!r} is no text")
                pairs.append((name, self.construct_object(value, deep=deep)))
            return _mapping_of_pairs(pairs)

    return Loader


# ---- tensors and tables


@check_arguments
def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name, on the CPU.

    Raises `BadFile` for another file.

    >>> path = run.save_tensors("run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    return read_tensors(check_file(path))[0]


def read_tensors(
    path: str | os.PathLike[str], *, error: Error = BadFile
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, mapped into memory, and its metadata."""
    with open_tensors(path, error=error) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


@contextmanager
def open_tensors(path: str | os.PathLike[str], *, error: Error = BadFile) -> Iterator[Any]:
    """Yields an open safetensors file. safetensors itself checks sizes and offsets."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise error(f"{name!r} is no plain file, and no safetensors can be read from it")
        with safe_open(name, "pt") as file:
            yield file
    except HookkitError:
        raise
    except (OSError, ValueError, SafetensorError, AttributeError, KeyError, RuntimeError) as raised:
        # AttributeError, KeyError and RuntimeError: a dtype that this torch does not have
        raise error(f"{name!r} cannot be read as safetensors: {error_message(raised)}") from raised


def read_table(
    source: str | os.PathLike[str] | IO[bytes], name: str = "", *, error: Error = BadFile
) -> pd.DataFrame:
    """Returns the table of a CSV file. `source` is a path or an open file.

    A token is read as the text that it is: "NA", "nan" and "1" are tokens, and a space counts.
    """
    import pandas as pd

    if isinstance(source, str | os.PathLike):
        name = name or repr(os.fspath(source))
        data = read_bytes(source, error=error, most=LARGEST_TABLE)
    else:
        data = source.read()
    try:
        table = pd.read_csv(io.BytesIO(data))
        texts = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, na_values=[""])
    except (ValueError, OverflowError, csv.Error) as raised:  # pandas raises ValueErrors
        raise error(
            f"{name} is no table in CSV that can be read: {error_message(raised)}"
        ) from raised
    for column in texts.columns:
        kind = pd.api.types.infer_dtype(table[column])
        if column in TOKEN_COLUMNS or kind in ("string", "mixed"):
            table[column] = texts[column]
    return table


# ---- paths, names and numbers in files


def check_path(value: object, name: str = "path") -> Path:
    """Returns the path of a file or folder, which is a text or a `pathlib.Path`.

    Raises `Unsupported` for an address such as s3://bucket/name.
    """
    if isinstance(value, str) and ADDRESS.match(value):
        raise Unsupported(
            f"{name}={value!r} is an address, and this needs files on a disk, which are locked and "
            "renamed: mount the store, or copy to and from it (hk.harvest writes to an address)"
        )
    if isinstance(value, str | os.PathLike) and str(value) and "\0" not in str(value):
        return Path(value)
    raise BadArgument(
        f"{name}={describe(value)} is no path: give the path of a file or folder, "
        "as a text or a pathlib.Path"
    )


def check_file(value: object) -> Path:
    """Returns the path of an existing file. Raises `BadFile` if there is none, or a folder."""
    path = check_path(value)
    if path.is_dir():
        raise BadFile(
            f"path={str(path)!r} is a folder, and a file is meant: give the path of one in it"
        )
    if not path.exists():
        raise BadFile(f"path={str(path)!r} does not exist: give the path of a file")
    return path


def check_folder(value: object, name: str = "folder") -> Path:
    """Returns the path of a folder that may not exist. Raises `BadFile` if part of it is a file."""
    path = check_path(value, name)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise BadFile(
                f"{name}={str(path)!r}: {part.name!r} is a file, and a folder is meant: "
                "give another name"
            )
    return path


def is_bare_name(name: Any) -> bool:
    """True for the name of a file without folders, on every operating system."""
    if not isinstance(name, str) or not name or name in (".", "..") or not name.isprintable():
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and ":" not in name


def path_inside(folder: Path, name: Any, *, error: Error = BadFile) -> Path:
    """Returns the path of a file in a folder. Names and links that lead out of it are refused."""
    if not is_bare_name(name):
        raise error(
            f"{str(folder)!r} names the file {str(name)[:MAX_MESSAGE]!r}, "
            "which is no name of a file in that folder"
        )
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise error(
            f"{str(path)!r} is a link that leads out of its folder, and is not read: "
            "put the file itself there"
        )
    return path


def is_count(value: Any) -> bool:
    """True for an int from 0 upwards that fits into a tensor."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def error_message(raised: BaseException) -> str:
    """Returns the message of an error in one short line."""
    message = getattr(raised, "strerror", None) or str(raised) or type(raised).__name__
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}…"
