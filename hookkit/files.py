"""Files: tensors as safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .arguments import checks_arguments, described, file_of, folder_of, path_of, reading_file
from .errors import BadArgument, BadFile, BadHook
from .runs import Run
from .sharding import writes


@checks_arguments
def save_tensors(
    tensors: Mapping[str, Tensor] | Run, path: str | os.PathLike[str], *, about: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors, or all that a run captured, to a safetensors file, with words about them; the file's path.

    >>> save_tensors({"direction": vector}, "direction.safetensors", about={"site": "resid_post.6"}).name
    'direction.safetensors'
    """
    from safetensors.torch import save_file

    if isinstance(tensors, Run):
        found = {f"{each.site}" + (f"/{each.name}" if each.name else ""): each.values for each in tensors.kept.all}
        made = {name: value for name, value in tensors.about.items() if name != "seconds"}  # same run, same bytes
        about = {"about": json.dumps(made), **(about or {})}
    else:
        found = dict(tensors)
    if not found:
        raise BadHook("there are no tensors to save: capture something, or name at least one")
    target = Path(path_of(path))
    if target.is_dir():
        raise BadFile(f"path={str(target)!r} is a folder: give the path of the file to write")
    folder_of(target.parent, "the folder of path")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadArgument(f"tensors has {described(name)}: {described(tensor)}; give tensors by name")
    target.parent.mkdir(parents=True, exist_ok=True)
    making = target.with_name(f".{target.name}.making")
    if writes():
        save_file(separate(found), making, dict(about or {}))
        making.replace(target)
    return target


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors writes them: in memory, in one piece, each with memory of its own."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise BadHook(f"{name!r} is a {type(tensor).__name__} and no tensor: give torch.as_tensor(...) of it")
        if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            kind = "without values (on the device meta)" if tensor.device.type == "meta" else "sparse or quantized"
            raise BadHook(f"{name!r} is a tensor {kind}, which safetensors cannot hold: give a dense one with values")
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() > plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        taken.add(plain.untyped_storage().data_ptr())
        made[name] = plain
    return made


@checks_arguments
def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, by name, on the CPU.

    >>> path = save_tensors(run, "run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    from safetensors.torch import load_file

    source = file_of(path)
    with reading_file(source, "tensors that save_tensors wrote"):
        return load_file(source)
