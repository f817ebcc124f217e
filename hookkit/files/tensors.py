"""Files: tensors as safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..arguments import checks_arguments, described, file_of, folder_of, path_of
from ..errors import BadArgument, BadFile, BadHook
from .atomic import Ready, write_tensors
from .untrusted import opened_tensors, tensors_in

MADE_BY = "made_by"  # in the words of a file: who wrote it


@runtime_checkable
class SavesTensors(Protocol):
    """A Run: something that knows which tensors it has, and writes them."""

    def save_tensors(
        self, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
    ) -> Path: ...


@checks_arguments
def save_tensors(
    tensors: Mapping[str, Tensor] | SavesTensors,
    path: str | os.PathLike[str],
    *,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Writes named tensors to a safetensors file, with texts about them, and returns the file's path.

    For a run, all that it captured, as `run.save_tensors` does. A file that hookkit wrote is
    replaced. Raises `BadFile` for another one, and where the file cannot be written.

    >>> save_tensors({"direction": vector}, "direction.safetensors", about={"site": "resid_post.6"}).name
    'direction.safetensors'
    """
    if isinstance(tensors, SavesTensors):
        return tensors.save_tensors(path, about=about)
    target = Path(path_of(path))
    if target.is_dir():
        raise BadFile(f"path={str(target)!r} is a folder: give the path of the file to write")
    folder_of(target.parent, "the folder of path")
    named, words = _named(tensors, about)
    check_own(target)
    write_tensors(target, named, words)
    return target


def save_new_tensors(
    tensors: Mapping[str, Tensor], path: Path, ready: Ready, about: Mapping[str, str] | None = None
) -> None:
    """Writes tensors as `save_tensors` does, to a file that is not there yet; `ready` as `whole_file` has it."""
    named, words = _named(tensors, about)
    write_tensors(path, named, words, ready=ready)


def _named(
    tensors: Mapping[str, Tensor], about: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name as they are written, and the texts about them."""
    if not isinstance(tensors, Mapping):
        raise BadArgument(f"tensors={described(tensors)}: give a mapping of tensors by name, or a run")
    named = dict(tensors)
    if not named:
        raise BadHook("there are no tensors to save: capture something, or name at least one")
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadArgument(
                f"tensors has {described(name)}: {described(tensor)}; give tensors by name"
            )
    words = {**(about or {}), MADE_BY: "hookkit"}
    wrong = [
        name
        for name, text in words.items()
        if not isinstance(text, str) or not isinstance(name, str)
    ]
    if wrong:
        raise BadHook(
            f"about= has {words[wrong[0]]!r} under {wrong[0]!r}: give texts by names, which is all it can hold"
        )
    return separate(named), words


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors writes them: in memory, in one piece, each with memory of its own."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise BadHook(
                f"{name!r} is a {type(tensor).__name__} and no tensor: give torch.as_tensor(...) of it"
            )
        if (
            tensor.layout is not torch.strided
            or tensor.device.type == "meta"
            or tensor.is_quantized
        ):
            kind = (
                "without values (on the device meta)"
                if tensor.device.type == "meta"
                else "sparse or quantized"
            )
            raise BadHook(
                f"{name!r} is a tensor {kind}, which safetensors cannot hold: give a dense one with values"
            )
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() > plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        taken.add(plain.untyped_storage().data_ptr())
        made[name] = plain
    return made


def check_own(path: Path) -> None:
    """Raise `BadFile` where a file is there that hookkit did not write."""
    if path.is_symlink() or not path.exists():  # a link is replaced, and what it points to stays
        return
    try:
        with opened_tensors(path) as file:
            words = file.metadata() or {}
    except BadFile:
        words = {}
    if words.get(MADE_BY) != "hookkit":
        raise BadFile(
            f"{str(path)!r} is there, and was not written by hookkit: give another name, or move it away"
        )


@checks_arguments
def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, by name, on the CPU. `BadFile` for what is no safetensors file.

    >>> path = run.save_tensors("run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    return tensors_in(file_of(path))[0]
