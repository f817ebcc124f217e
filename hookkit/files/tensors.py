"""Tensors in safetensors files: `save_tensors` and `load_tensors`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..arguments import check_arguments, describe
from ..errors import BadArgument, BadFile, BadHook
from .atomic import Ready, write_tensors
from .untrusted import check_file, check_folder, check_path, open_tensors, read_tensors

MADE_BY = "made_by"  # the key in the metadata of files that hookkit wrote


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
    named, texts = _check_tensors(tensors, about)
    check_own(target)
    write_tensors(target, named, texts)
    return target


def save_new_tensors(
    tensors: Mapping[str, Tensor], path: Path, ready: Ready, about: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a new file. `ready` gets the complete file, as in `atomic_file`."""
    named, texts = _check_tensors(tensors, about)
    write_tensors(path, named, texts, ready=ready)


def _check_tensors(
    tensors: Mapping[str, Tensor], about: Mapping[str, str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the texts about them as they are written."""
    if not isinstance(tensors, Mapping):
        raise BadArgument(
            f"tensors={describe(tensors)}: give a mapping of tensors by name, or a run"
        )
    named = dict(tensors)
    if not named:
        raise BadHook("there are no tensors to save: capture something, or name at least one")
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadArgument(
                f"tensors has {describe(name)}: {describe(tensor)}; give tensors by name"
            )
        _check_dense(name, tensor)
    texts = {**(about or {}), MADE_BY: "hookkit"}
    for name, text in texts.items():
        if not isinstance(text, str) or not isinstance(name, str):
            raise BadHook(
                f"about= has {text!r} under {name!r}: give texts by names, which is all it can hold"
            )
    return named, texts


def _check_dense(name: str, tensor: Tensor) -> None:
    kind = ""
    if tensor.device.type == "meta":
        kind = "without values (on the device meta)"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "sparse or quantized"
    if kind:
        raise BadHook(
            f"{name!r} is a tensor {kind}, which safetensors cannot hold: "
            "give a dense one with values"
        )


def check_own(path: Path) -> None:
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


@check_arguments
def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file by name, on the CPU.

    Raises `BadFile` for another file.

    >>> path = run.save_tensors("run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    return read_tensors(check_file(path))[0]
