"""Files that are there whole or not at all, whenever the process is killed or the power fails."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from ..errors import Unsupported

MAKING = ".{}.making"  # the name of a file that is not ready


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, or replace one."""
    making = path.with_name(MAKING.format(path.name))
    with making.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    _put(making, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file; its size in bytes and its sha256."""
    from safetensors.torch import save_file

    making = path.with_name(MAKING.format(path.name))
    save_file(dict(tensors), making)
    with making.open("rb+") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = making.stat().st_size
    _put(making, path)
    return size, found


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. One that was cut off in the middle is no line, see `whole_lines`."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that end; none where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return data[: data.rfind(b"\n") + 1].decode().splitlines()


def cut_to_whole_lines(path: Path) -> None:
    """Take away the end of a line that was being added when the process was killed."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block in which no other process writes into the folder; the lock goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Unsupported(
            f"another process is writing the harvest in {folder.name!r}: wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / ".lock").unlink()
        lock.release()


def _put(making: Path, path: Path) -> None:
    making.replace(path)
    if os.name == "posix":  # the name itself, too, has to reach the disk
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
