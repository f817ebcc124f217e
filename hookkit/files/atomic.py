"""Whole files: a file has what was written, or what it had before, whenever the program is killed or the power fails.

All that hookkit writes goes through here. A file is made under another name and takes its own name when it is whole.
The other name is new (O_EXCL), so that no link is followed; and a link that has the file's name is replaced itself, and
what it points to stays as it is.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

from ..errors import BadFile, HookkitError, Unsupported

MAKING = ".making"  # how the name of a file ends that is not whole yet
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
END = (
    os.O_CREAT
    | os.O_APPEND
    | os.O_WRONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_BINARY", 0)
)
DIGITS = re.compile(r"[0-9a-f]{8}\.making")
LONGEST = 100  # bytes of a file's name that stand in the name of its making
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip  # the words of safetensors for those of torch

Ready: TypeAlias = Callable[[Path], object]


@contextmanager
def whole_file(path: Path, *, tidy: bool = True, ready: Ready | None = None) -> Iterator[Path]:
    """A block that writes to the path that it gets; at its end, what is there takes the place of `path`.

    Where the block raises, `path` stays as it was. `tidy` removes what a killed program left of this file. `ready` is
    called with the file that is whole, before it takes its place. Raises `BadFile` where the file cannot be written.
    """
    with writing_to(path):
        make_folder(path.parent)
        if path.is_dir() and not path.is_symlink():
            raise BadFile(
                f"{str(path)!r} is a folder, where a file is to be written: give another name"
            )
        if tidy:
            remove_leftovers(path.parent, path.name)
        making = path.with_name(f"{_beginning(path.name)}{secrets.token_hex(4)}{MAKING}")
        descriptor = os.open(making, NEW, 0o666)  # less what the umask takes
    try:
        with writing_to(path):
            _lock(descriptor)  # which says that it is still being written
            _keep_mode(path, descriptor)
            yield making
            _to_disk(making)
            if ready is not None:
                ready(making)
            os.replace(making, path)
            _to_disk(path.parent, folder=True)
    except BaseException:
        with suppress(OSError):
            making.unlink()
        raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, tidy: bool = True, ready: Ready | None = None) -> None:
    """Write a whole file."""
    with whole_file(path, tidy=tidy, ready=ready) as making:
        making.write_bytes(data)


def write_text(path: Path, text: str, *, ready: Ready | None = None) -> None:
    """Write a whole file of text, in UTF-8 and with the line ends that the text has."""
    write_bytes(
        path, text.encode("utf-8", errors="backslashreplace"), ready=ready
    )  # a lone surrogate has no UTF-8


def write_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    about: Mapping[str, str] | None = None,
    *,
    tidy: bool = True,
    ready: Ready | None = None,
) -> tuple[int, str]:
    """Write a whole safetensors file; its size in bytes and its sha256.

    safetensors itself would write to a file of a third name, which stays where the program is killed, and would put the
    words about the tensors in another order in every process.
    """
    import torch

    kinds = {getattr(torch, name): word for name, word in DTYPES.items() if hasattr(torch, name)}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))} if about else {}
    place = 0
    for name, tensor in ordered:
        if tensor.dtype not in kinds:
            raise BadFile(
                f"{name!r} is {tensor.dtype}, which no safetensors file holds: give it in another dtype"
            )
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    words = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    words += b" " * (-len(words) % 8)  # the numbers begin where memory is aligned
    with whole_file(path, tidy=tidy, ready=ready) as making:
        with making.open("wb") as file:
            file.write(len(words).to_bytes(8, "little") + words)
            for _, tensor in ordered:
                numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(memoryview(numbers.numpy()))
        return making.stat().st_size, sha256(making)


def write_new(path: Path, text: str) -> None:
    """Write a file of text that is not there yet; `BadFile` where something has its name, also a link to nowhere."""
    with writing_to(path):
        make_folder(path.parent)
        try:
            descriptor = os.open(path, NEW, 0o666)
        except FileExistsError:
            raise BadFile(
                f"{str(path)!r} is there already: choose another name, or move it away"
            ) from None
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
        except BaseException:
            path.unlink()
            raise


@contextmanager
def added_to(path: Path) -> Iterator[IO[bytes]]:
    """A block with a file to which `add_line` adds. A link is refused: what it points to is not hookkit's."""
    with writing_to(path):
        descriptor = _opened(path, END)
    with open(path, "ab", buffering=0, opener=lambda *_: descriptor) as file:
        yield file


def add_line(file: IO[bytes], line: str) -> None:
    """Add a line to a file, on the disk before this returns. One that was cut off is no line, see `whole_lines`."""
    with writing_to(Path(file.name)):
        data = memoryview(line.encode() + b"\n")
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that end; none where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadFile(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    return data.split(b"\n")[:-1]


def cut_to_whole_lines(path: Path) -> None:
    """Take away the end of a line that was being added when the process was killed."""
    if not os.path.lexists(path):
        return
    with writing_to(path):
        descriptor = _opened(
            path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        with os.fdopen(descriptor, "rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder where there is none; `BadFile` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadFile(
            f"{str(folder)!r} is no folder, where one is needed: give another, or move that away"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _cannot_write(folder, error) from error


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed programs left of files of these names, or of any. What is being written now is left alone."""
    beginnings = tuple(_beginning(name) for name in names) or (".",)
    try:
        present = os.listdir(folder)
    except OSError:
        return
    for name in present:
        if name.startswith(beginnings) and DIGITS.fullmatch(name[-len(MAKING) - 8 :]):
            _remove_if_left(folder / name)


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """A block in which no other process writes into the folder; the lock goes with the process, however that ends.

    `work` is what another process does there, in words: "is writing the harvest".
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
        with writing_to(path):
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
def writing_to(path: Path) -> Iterator[None]:
    """A block in which an error of the disk is a `BadFile` that names the file."""
    try:
        yield
    except (HookkitError, BrokenPipeError, TimeoutError):  # the last one is of a lock
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: BaseException) -> BadFile:
    why = (error.strerror if isinstance(error, OSError) else None) or error
    found = BadFile(f"{str(path)!r} cannot be written: {why}")
    found.errno = getattr(error, "errno", None)
    return found


def _beginning(name: str) -> str:
    """How the name of a file that is being made begins."""
    return f".{name.encode(errors='replace')[:LONGEST].decode(errors='ignore')}."


def _opened(path: Path, flags: int) -> int:
    """A descriptor of a plain file."""
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadFile(
            f"{str(path)!r} is a link, and what it points to is not changed: give another folder, or remove the link"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{str(path)!r} is no plain file: give another folder, or move it away")
    return descriptor


def _keep_mode(path: Path, descriptor: int) -> None:
    """Give the new file who may read and write the old one."""
    with suppress(OSError):
        before = path.lstat().st_mode
        if stat.S_ISREG(before):
            os.fchmod(descriptor, stat.S_IMODE(before) & 0o777)


def _lock(descriptor: int) -> None:
    with suppress(
        ImportError, OSError
    ):  # not on Windows, which lets nobody remove an open file; not on all networks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_left(path: Path) -> None:
    """Remove a file that was being made, unless somebody still makes it."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError):
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return
            if os.name == "posix":
                import fcntl

                fcntl.flock(
                    descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # raises where it is being written
            path.unlink()
        finally:
            os.close(descriptor)


def _to_disk(path: Path, *, folder: bool = False) -> None:
    """Bring a file to the disk; of a folder the names in it, where the system lets one."""
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:  # some file systems bring no folder to the disk
            raise
    finally:
        os.close(descriptor)
