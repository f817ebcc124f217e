"""Files of others, read with care: JSON, YAML, safetensors and CSV that may be damaged, huge or hostile.

Every function raises the error that it is given (`BadFile` where none is), in a second and in few words, for a file
that is missing, is a folder, is too large, is not UTF-8, or is not what it should be; and for numbers, nesting and
repeated keys that no file of hookkit's has.
"""

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeAlias

from ..errors import BadFile, BadHook, HookkitError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

LARGEST = 256 * 2**20  # bytes of a file that is read whole
LARGEST_YAML = 4 * 2**20  # which is read a hundred times more slowly
LARGEST_TABLE = 2**31
DEEPEST = 64  # lists and mappings in one another
DIGITS = 40  # of a whole number
SHORT = 120  # letters of another library's message

Kind: TypeAlias = type[HookkitError]


def bytes_of(path: str | os.PathLike[str], *, error: Kind = BadFile, most: int = LARGEST) -> bytes:
    """What is in a file. One that is larger than `most` is refused before it is read."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if (
                stat.S_ISREG(os.fstat(file.fileno()).st_mode)
                and os.fstat(file.fileno()).st_size > most
            ):
                raise error(_too_large(name, most))
            data = file.read(most + 1)  # a pipe and a device have no size
    except HookkitError:
        raise
    except (OSError, ValueError) as raised:  # ValueError: a name with a null byte
        raise error(f"{name!r} cannot be read: {reason(raised)}") from raised
    if len(data) > most:
        raise error(_too_large(name, most))
    return data


def _too_large(name: str, most: int) -> str:
    return f"{name!r} has more than {most / 2**20:,.0f} MB, and is not read: give a smaller file"


def text_of(path: str | os.PathLike[str], *, error: Kind = BadFile, most: int = LARGEST) -> str:
    """The text of a file in UTF-8. The mark that some programs put at its beginning is left out."""
    return decoded(bytes_of(path, error=error, most=most), repr(os.fspath(path)), error=error)


def decoded(data: bytes, name: str, *, error: Kind = BadFile) -> str:
    """Bytes as the text that they are in UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as raised:
        raise error(
            f"{name} is no text in UTF-8: byte {raised.start} is 0x{data[raised.start]:02x}; save it as UTF-8"
        ) from raised


def json_of(text: str | bytes, name: str, *, error: Kind = BadFile, finite: bool = True) -> Any:
    """The value of a text in JSON. `name` is what the text is, in the message.

    finite  refuse NaN and Infinity, which are no JSON, and numbers that are as good as infinite, such as 1e999
    """
    words = decoded(text, name, error=error) if isinstance(text, bytes) else text
    readers: dict[str, Any] = {"parse_int": _whole_number}
    if finite:
        readers |= {"parse_float": _finite_number, "parse_constant": _no_number}
    try:
        value = json.loads(words, object_pairs_hook=_once, **readers)
    except RecursionError:
        raise error(_too_deep(name)) from None
    except ValueError as raised:
        raise error(f"{name} is no JSON that can be read: {reason(raised)}") from raised
    if _is_deep(value):
        raise error(_too_deep(name))
    return value


def json_in(path: str | os.PathLike[str], *, error: Kind = BadFile, finite: bool = True) -> Any:
    """The value of a file in JSON."""
    return json_of(text_of(path, error=error), repr(os.fspath(path)), error=error, finite=finite)


def mapping_of(value: Any, name: str, *, error: Kind = BadFile) -> dict[str, Any]:
    """The value, where it is a mapping."""
    if not isinstance(value, dict):
        raise error(f"{name} holds a {type(value).__name__}, where names and values are meant")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:SHORT]} is larger than any number")
    return number


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of these pairs, in which no key stands twice: which of the values is meant cannot be known."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:SHORT]!r} stands twice")
        found[key] = value
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _too_deep(name: str) -> str:
    return f"{name} has more than {DEEPEST} lists and mappings in one another, and is not read"


def yaml_of(text: str, name: str, *, error: Kind = BadFile) -> Any:
    """The value of a text in YAML: of lists, mappings, texts, numbers, true, false and null, as JSON has them.

    Anchors and aliases are refused, since few of them can stand for more than memory holds; and so are tags, dates and
    numbers to the base of 60, which plain texts such as 1:30 are by YAML's own rules.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise error(
            f"{name} has more than {LARGEST_YAML / 2**20:,.0f} MB of YAML: write it as JSON, in a .json file"
        )
    try:
        return yaml.load(text, Loader=_plain_loader())  # a SafeLoader that knows less
    except RecursionError:
        raise error(_too_deep(name)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as raised:
        raise error(f"{name} is no YAML that can be read: {reason(raised)}") from raised


def hooks_listed(path: str | os.PathLike[str]) -> list[Any]:
    """The list in a file of hooks, in YAML or, where its name ends in .json, in JSON. Its entries are not read yet."""
    name = os.fspath(path)
    try:
        text = text_of(path)
    except BadFile as raised:
        why = raised.__cause__ or raised
        raise BadFile(f"{name!r} is no file of hooks that can be read: {reason(why)}") from raised
    try:
        listed = json_of(text, name) if name.endswith(".json") else yaml_of(text, name)
    except BadFile as raised:
        raise BadHook(f"{name!r} is neither YAML nor JSON: {raised}") from raised
    if not isinstance(listed, list) or not listed:
        raise BadHook(f'{name!r} has no list of hooks: write a line for each, - "ablate:z.9.3"')
    return listed


def _plain_loader() -> Any:
    """A loader of YAML for what JSON can say."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise yaml.YAMLError(
                    f"it has the anchor or alias {event.anchor!r}: write the value out where it is meant"
                )
            self.depth += 1
            if self.depth > DEEPEST:
                raise yaml.YAMLError(
                    f"it has more than {DEEPEST} lists and mappings in one another"
                )
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = []
            for key, value in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise yaml.YAMLError(f"the key {str(name)[:SHORT]!r} is no text")
                pairs.append((name, self.construct_object(value, deep=deep)))
            return _once(pairs)

    known = {
        name: Loader.yaml_constructors.get(f"tag:yaml.org,2002:{name}")
        for name in ("null", "bool", "str", "seq")
    }
    Loader.yaml_constructors = {f"tag:yaml.org,2002:{name}": made for name, made in known.items()}
    Loader.yaml_constructors["tag:yaml.org,2002:int"] = lambda loader, node: _whole_number(
        node.value
    )
    Loader.yaml_constructors["tag:yaml.org,2002:float"] = lambda loader, node: _finite_number(
        node.value
    )
    Loader.yaml_constructors["tag:yaml.org,2002:map"] = yaml.SafeLoader.yaml_constructors[
        "tag:yaml.org,2002:map"
    ]
    Loader.yaml_constructors[None] = yaml.SafeLoader.yaml_constructors[None]
    Loader.yaml_implicit_resolvers = {}
    for kind, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), first
        )
    return Loader


def tensors_in(
    path: str | os.PathLike[str], *, error: Kind = BadFile
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a safetensors file by name, mapped into memory, and the texts about them."""
    with opened_tensors(path, error=error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  no mapping


@contextmanager
def opened_tensors(path: str | os.PathLike[str], *, error: Kind = BadFile) -> Iterator[Any]:
    """A block with an open safetensors file. What cannot be read raises; safetensors itself checks sizes and places."""
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
        # the last three are of a dtype that this torch does not have
        raise error(f"{name!r} cannot be read as safetensors: {reason(raised)}") from raised


def table_of(
    source: str | os.PathLike[str] | IO[bytes], name: str = "", *, error: Kind = BadFile
) -> "pd.DataFrame":
    """The table of a CSV file, of a path or of an open file."""
    import pandas as pd

    if isinstance(source, str | os.PathLike):
        name = name or repr(os.fspath(source))
        source = io.BytesIO(bytes_of(source, error=error, most=LARGEST_TABLE))
    try:
        return pd.read_csv(source)
    except (ValueError, OverflowError, csv.Error) as raised:  # pandas' own are ValueErrors
        raise error(f"{name} is no table in CSV that can be read: {reason(raised)}") from raised


def is_bare_name(name: Any) -> bool:
    """True for the name of a file in a folder, which leads nowhere else on any system."""
    if not isinstance(name, str) or not name or name in (".", "..") or not name.isprintable():
        return False
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and ":" not in name


def inside(folder: Path, name: Any, *, error: Kind = BadFile) -> Path:
    """The path of a file in a folder. A name that leads out of it, and a link that does, are refused."""
    if not is_bare_name(name):
        raise error(
            f"{str(folder)!r} names the file {str(name)[:SHORT]!r}, which is no name of a file in that folder"
        )
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise error(
            f"{str(path)!r} is a link that leads out of its folder, and is not read: put the file itself there"
        )
    return path


def reason(raised: BaseException) -> str:
    """Why something could not be read, in few words and one line."""
    words = (
        (raised.strerror if isinstance(raised, OSError) else None)
        or str(raised)
        or type(raised).__name__
    )
    line = " ".join(words.split())
    return line if len(line) <= SHORT else f"{line[:SHORT]}…"


def plain_whole(value: Any) -> bool:
    """True for a whole number from 0 on that a tensor can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def strings_of(
    value: Any, names: tuple[str, ...], what: str, *, error: Kind = BadFile
) -> Mapping[str, Any]:
    """The mapping, in which what these names stand for are texts where they are there."""
    found = mapping_of(value, what, error=error)
    for name in names:
        if not isinstance(found.get(name, ""), str):
            raise error(
                f"{what} has {str(found[name])[:SHORT]!r} as its {name}, where a text is meant"
            )
    return found
