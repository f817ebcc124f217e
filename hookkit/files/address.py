"""Folders at an address such as s3://bucket/name, in a file system of fsspec.

A store of objects has no locks, renames no file and adds nothing to one, and its files cannot be
mapped into memory. An `Address` sends and fetches whole files only. Since no program can lock an
address, the last one that claims it is the one that writes: it removes the marks of others, and a
program without its mark sends nothing more.
"""

from __future__ import annotations

import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BadArgument, BadFile, HookkitError, MissingExtra, Unsupported
from .untrusted import ADDRESS, check_folder, error_message, is_bare_name

PATTERN = re.compile(r"::|[*?\[]")  # what fsspec reads as a chain of file systems, or a pattern
USER = re.compile(r"(?<=//)[^/@]*@")  # the name and the password in an address
CLAIM = re.compile(r"\.writers\.[0-9a-f]{8}\.making")


def read_folder(value: object, name: str = "folder") -> Path | Address:
    """Returns the path of a folder that may not exist, or its address.

    Raises `MissingExtra` if the package for such addresses is not installed.
    """
    if not isinstance(value, str) or not ADDRESS.match(value):
        return check_folder(value, name)
    from fsspec.core import url_to_fs

    text = USER.sub("", value)
    if PATTERN.search(value):
        raise Unsupported(
            f"{name}={text!r} has '::', '*', '?' or '[', which fsspec reads as a chain of file "
            "systems or as a pattern: give the address of one folder"
        )
    try:
        file_system, root = url_to_fs(value)
    except ImportError as error:
        raise MissingExtra(
            f"{name}={text!r} needs a package that is not installed: {error_message(error)} "
            "(pip install), here and on every node"
        ) from error
    except ValueError as error:
        raise BadArgument(
            f"{name}={text!r} is no address that fsspec knows: {error_message(error)}"
        ) from error
    except Exception as error:  # each file system has classes of errors of its own
        raise BadFile(f"{text!r} cannot be reached: {error_message(error)}") from error
    options = file_system.storage_options  # with those of fsspec's configuration here
    connect = partial(type(file_system), *file_system.storage_args, **options)
    return Address(text, root.rstrip("/"), connect)


@dataclass(frozen=True, eq=False)
class Address:
    """A folder at an address. `text` is the address without a password.

    `connect` returns the file system, the same one as long as the process and thread are the same.
    `mark` is the file by which a program claimed the address, "" if this one did not.
    """

    text: str
    root: str
    connect: Callable[[], Any] = field(repr=False)  # it may hold a password
    mark: str = ""

    @property
    def name(self) -> str:
        """The last part of the address."""
        name = self.root.rpartition("/")[2]
        return name if is_bare_name(name) else "folder"

    def sizes(self) -> dict[str, int]:
        """Returns the size in bytes of each file. There is none if the folder does not exist."""
        with self._file_system("read") as file_system:
            try:
                entries = file_system.ls(self.root, detail=True)
            except FileNotFoundError:
                return {}
        files = [entry for entry in entries if entry["type"] == "file"]
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in files}

    def has(self, name: str) -> bool:
        """True if the file exists."""
        with self._file_system("read") as file_system:
            try:
                file_system.info(self._path(name))
            except FileNotFoundError:
                return False
        return True

    def download(self, name: str, folder: Path) -> Path:
        """Returns the path of a copy in a folder; no file is there if the original is missing."""
        path = folder / name
        with self._file_system("read") as file_system:
            try:
                file_system.get_file(self._path(name), str(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
        return path

    def upload(self, file: Path) -> None:
        """Sends a whole file. Raises `Unsupported` if another program has claimed the address."""
        if not self.has(self.mark):
            raise Unsupported(
                f"the program that writes to {self.text!r} has ended, or another one writes there "
                "now: wait for it, or give another address"
            )
        with self._file_system("written") as file_system:
            file_system.put_file(str(file), self._path(file.name))

    def remove(self, names: Sequence[str]) -> None:
        """Removes these files."""
        if names:
            with self._file_system("written") as file_system, suppress(FileNotFoundError):
                file_system.rm(list(map(self._path, names)))

    @contextmanager
    def claimed(self) -> Iterator[Address]:
        """Yields the address with a mark, for this program and its actors to write to."""
        mark = f".writers.{secrets.token_hex(4)}.making"
        with self._file_system("written") as file_system:
            file_system.makedirs(self.root, exist_ok=True)
            file_system.pipe_file(self._path(mark), b"hookkit\n")
        try:
            marks = [name for name in self.sizes() if CLAIM.fullmatch(name)]
            self.remove([name for name in marks if name != mark])
            yield replace(self, mark=mark)
        finally:
            with suppress(HookkitError):
                self.remove([mark])

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """Yields a folder of this machine, named as this one, for files on their way."""
        settings: dict[str, Any] = {"prefix": "hookkit-", "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**settings) as parent:
            folder = Path(parent) / self.name
            folder.mkdir()
            yield folder

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _file_system(self, action: str) -> Iterator[Any]:
        """Yields the file system without old listings; its errors are raised as `BadFile`."""
        try:
            file_system = self.connect()
            file_system.invalidate_cache(self.root)
            yield file_system
        except Exception as error:  # each file system has classes of errors of its own
            raise BadFile(f"{self.text!r} cannot be {action}: {error_message(error)}") from error
