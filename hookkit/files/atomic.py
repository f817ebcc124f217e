"""Atomic writes: a file has its new or its old content, whenever the program is killed or the power
fails.

hookkit writes all its files with these functions. A file is written under a temporary name, and
renamed when it is complete. The temporary name is new (O_EXCL), so that no link is followed. A link
with the file's name is replaced, and its target is not changed. At the end are the functions that
write tensors to safetensors files, among them `save_tensors`.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from ..arguments import check_arguments, describe
from ..errors import BadArgument, BadFile, BadHook, HookkitError, Unsupported
from .untrusted import check_folder, check_path, open_tensors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SUFFIX = ".making"  # of temporary names
TEMPORARY = re.compile(r"[0-9a-f]{8}\.making\Z")  # the end of a temporary name
MAX_PREFIX = 100  # bytes of a file's name in its temporary name
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR | PLAIN
APPEND = os.O_CREAT | os.O_APPEND | os.O_WRONLY | PLAIN

Ready: TypeAlias = Callable[[Path], object]


@contextmanager
def atomic_file(path: Path, *, tidy: bool = True, ready: Ready | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames that file to `path` at the end of the block.

    If the block raises, `path` is not changed. `tidy` removes temporary files of this file that
    killed programs left. `ready` is called with the complete temporary file before it is renamed.
    Raises `BadFile` if the file cannot be written.
    """
    with disk_errors_as_bad_file(path):
        make_folder(path.parent)
        if path.is_dir() and not path.is_symlink():
            raise BadFile(
                f"{str(path)!r} is a folder, where a file is to be written: give another name"
            )
        if tidy:
            remove_leftovers(path.parent, path.name)
        temporary = path.with_name(f"{_prefix(path.name)}{secrets.token_hex(4)}{SUFFIX}")
        descriptor = os.open(temporary, CREATE, 0o666)  # the umask takes permissions away
    try:
        with disk_errors_as_bad_file(path):
            _lock(descriptor)  # shows that the file is still being written
            _copy_mode(path, descriptor)
            yield temporary
            _sync(temporary)
            if ready is not None:
                ready(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)


@contextmanager
def mark_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yields an empty temporary file with a new name, by which other nodes recognise the folder.

    It is removed at the end of the block, or by `remove_leftovers` if this program is killed.
    """
    path = folder / f"{_prefix(name)}{secrets.token_hex(4)}{SUFFIX}"
    with disk_errors_as_bad_file(path):
        descriptor = os.open(path, CREATE, 0o666)
    try:
        _lock(descriptor)
        yield path
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, ready: Ready | None = None) -> None:
    """Writes a file atomically."""
    with atomic_file(path, ready=ready) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, ready: Ready | None = None) -> None:
    """Writes a text in UTF-8 atomically, with its own line ends."""
    data = text.encode("utf-8", errors="backslashreplace")  # lone surrogates are not UTF-8
    write_bytes(path, data, ready=ready)


def format_csv(table: pd.DataFrame, *, float_format: str | None = None) -> str:
    """Returns a table as CSV without its index. `read_table` reads the same texts from it."""
    settings: dict[str, Any] = {
        "index": False,
        "lineterminator": "\n",
        "float_format": float_format,
    }
    text = table.to_csv(**settings)
    if "\r" in text:  # the reader would take it for the end of a line where no quotes surround it
        text = table.to_csv(quoting=csv.QUOTE_NONNUMERIC, **settings)
    return text


def write_new(path: Path, text: str) -> None:
    """Writes a text to a new file. Raises `BadFile` if the name exists, also as a broken link."""
    with disk_errors_as_bad_file(path):
        make_folder(path.parent)
        try:
            file = path.open("xb")
        except FileExistsError:
            raise BadFile(
                f"{str(path)!r} exists already: choose another name, or move it away"
            ) from None
        try:
            with file:
                file.write(text.encode())
        except BaseException:
            path.unlink()
            raise


@contextmanager
def open_to_append(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file for `add_line`. Links are refused, because their targets are not hookkit's."""
    with disk_errors_as_bad_file(path):
        descriptor = _open_plain_file(path, APPEND)
    with open(path, "ab", buffering=0, opener=lambda *_: descriptor) as file:
        yield file


def add_line(file: IO[bytes], line: str) -> None:
    """Adds a line to a file, and returns when it is on the disk."""
    with disk_errors_as_bad_file(Path(file.name)):
        data = memoryview(line.encode() + b"\n")
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


def read_complete_lines(path: Path) -> list[bytes]:
    """Returns the complete lines of a file. There are none if the file does not exist."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadFile(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    return data.split(b"\n")[:-1]


def remove_partial_line(path: Path) -> None:
    """Removes an incomplete last line, which a killed process was writing."""
    if not os.path.lexists(path):
        return
    with disk_errors_as_bad_file(path):
        descriptor = _open_plain_file(path, os.O_RDWR | PLAIN)
        with os.fdopen(descriptor, "rb+") as file:
            data = file.read()
            length = data.rfind(b"\n") + 1
            if length != len(data):
                file.truncate(length)


def sha256(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Creates a folder if it does not exist. Raises `BadFile` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadFile(
            f"{str(folder)!r} is no folder, where one is needed: give another, or move that away"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _cannot_write(folder, error) from error


def remove_leftovers(folder: Path, *names: str) -> None:
    """Removes temporary files of these names (default all) that killed programs left."""
    prefixes = tuple(map(_prefix, names)) or (".",)
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefixes) and TEMPORARY.search(name):
                _remove_leftover(folder / name)


@contextmanager
def lock_folder(folder: Path, work: str) -> Iterator[None]:
    """Locks a folder against other processes that write into it. The lock ends with the process.

    `work` says in the message what the other process does: "is writing the harvest".
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    path = folder / ".lock"
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size):
        raise BadFile(
            f"{str(path)!r} is not a lock of hookkit's: move it away, or give another folder"
        )
    lock = FileLock(path, timeout=0)
    try:
        with disk_errors_as_bad_file(path):
            lock.acquire()
    except Timeout:
        raise Unsupported(
            f"another process {work} in {folder.name!r}: wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


@contextmanager
def disk_errors_as_bad_file(path: Path) -> Iterator[None]:
    """Raises errors of the disk in the block as `BadFile`, with the name of the file."""
    try:
        yield
    except (HookkitError, BrokenPipeError, TimeoutError):  # locks raise TimeoutError
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: BaseException) -> BadFile:
    reason = getattr(error, "strerror", None) or error
    bad_file = BadFile(f"{str(path)!r} cannot be written: {reason}")
    bad_file.errno = getattr(error, "errno", None)
    return bad_file


def _prefix(name: str) -> str:
    """Returns the beginning of a file's temporary names."""
    return f".{name.encode(errors='replace')[:MAX_PREFIX].decode(errors='ignore')}."


def _open_plain_file(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadFile(
            f"{str(path)!r} is a link, and what it points to is not changed: "
            "give another folder, or remove the link"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{str(path)!r} is no plain file: give another folder, or move it away")
    return descriptor


def _copy_mode(path: Path, descriptor: int) -> None:
    """Gives the new file the permissions of the old one."""
    with suppress(OSError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            os.fchmod(descriptor, stat.S_IMODE(mode) & 0o777)


def _lock(descriptor: int) -> None:
    # Windows has no such locks, and does not remove open files. Some network disks have none.
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftover(path: Path) -> None:
    """Removes a temporary file, unless a process is writing it."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError):
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return
            if os.name == "posix":
                import fcntl

                # raises OSError if a process is writing the file
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    """Flushes a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot flush folders
        os.fsync(descriptor)
    os.close(descriptor)


# ---- tensors in safetensors files

MADE_BY = "made_by"  # the key in the metadata of files that hookkit wrote
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip  # names in torch and in safetensors


@runtime_checkable
class SavesTensors(Protocol):
    """A run, which writes its own captured tensors."""

    def save_tensors(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
    ) -> Path: ...


@check_arguments
def save_tensors(
    tensors: Mapping[str, Tensor] | SavesTensors,
    path: str | os.PathLike[str],
    *,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Writes named tensors, with texts about them, to a safetensors file, and returns its path.

    Of a run, it writes all captured values, as `run.save_tensors` does. A file that hookkit wrote
    is replaced. Raises `BadFile` for another file, and if the file cannot be written.

    >>> about = {"site": "resid_post.6"}
    >>> save_tensors({"direction": vector}, "direction.safetensors", about=about).name
    'direction.safetensors'
    """
    if isinstance(tensors, SavesTensors):
        return tensors.save_tensors(path, about=about)
    target = check_path(path)
    if target.is_dir():
        raise BadFile(f"path={str(target)!r} is a folder: give the path of the file to write")
    check_folder(target.parent, "the folder of path")
    named, texts = _check_tensors(tensors), _check_texts(about)
    _check_own(target)
    write_tensors(target, named, texts)
    return target


def save_new_tensors(
    tensors: Mapping[str, Tensor], path: Path, ready: Ready, about: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a new file. `ready` gets the complete file, as in `atomic_file`."""
    write_tensors(path, _check_tensors(tensors), _check_texts(about), ready=ready)


def _check_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from torch import Tensor

    if not isinstance(tensors, Mapping):
        raise BadArgument(
            f"tensors={describe(tensors)}: give a mapping of tensors by name, or a run"
        )
    if not tensors:
        raise BadHook("there are no tensors to save: capture something, or name at least one")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadArgument(
                f"tensors has {describe(name)}: {describe(tensor)}; give tensors by name"
            )
        _check_dense(name, tensor)
    return dict(tensors)


def _check_texts(about: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the texts for the metadata of a file, which say that hookkit wrote it."""
    texts = {**(about or {}), MADE_BY: "hookkit"}
    for name, text in texts.items():
        if not isinstance(text, str) or not isinstance(name, str):
            raise BadHook(
                f"about= has {text!r} under {name!r}: give texts by names, which is all it can hold"
            )
    return texts


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        kind = "without values (on the device meta)"
    elif str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        kind = "sparse or quantized"
    else:
        return
    raise BadHook(
        f"{name!r} is a tensor {kind}, which safetensors cannot hold: give a dense one with values"
    )


def _check_own(path: Path) -> None:
    """Raises `BadFile` if the file exists and was not written by hookkit."""
    if path.is_symlink() or not path.exists():  # a link is replaced, its target is not changed
        return
    try:
        with open_tensors(path) as file:
            texts = file.metadata() or {}
    except BadFile:
        texts = {}
    if texts.get(MADE_BY) != "hookkit":
        raise BadFile(
            f"{str(path)!r} is there, and was not written by hookkit: "
            "give another name, or move it away"
        )


def write_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    about: Mapping[str, str] | None = None,
    *,
    tidy: bool = True,
    ready: Ready | None = None,
) -> tuple[int, str]:
    """Writes a safetensors file atomically, and returns its size in bytes and its sha256.

    safetensors itself writes to a temporary file that stays if the program is killed, and orders
    the metadata differently in every process.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _safetensors_header(ordered, about)
    with atomic_file(path, tidy=tidy, ready=ready) as temporary:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in ordered:
                if not tensor.numel():  # torch cannot view an empty tensor as bytes
                    continue
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(memoryview(data.numpy()))
        return temporary.stat().st_size, sha256(temporary)


def _safetensors_header(
    tensors: Sequence[tuple[str, Any]], about: Mapping[str, str] | None
) -> bytes:
    header: dict[str, Any] = {}
    if about:
        header["__metadata__"] = dict(sorted(about.items()))
    offset = 0
    for name, tensor in tensors:
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise BadFile(
                f"{name!r} is {tensor.dtype}, which no safetensors file holds: "
                "give it in another dtype"
            )
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return data + b" " * (-len(data) % 8)  # aligns the tensors in memory
