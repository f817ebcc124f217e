"""Files: tensors as safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .arguments import checks_arguments
from .errors import BadHook
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
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    making = target.with_name(f".{target.name}.making")
    if writes():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, making, dict(about or {})
        )
        making.replace(target)
    return target


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote, by name, on the CPU.

    >>> path = save_tensors(run, "run.safetensors")
    >>> load_tensors(path)["resid_post.6"].shape
    torch.Size([1, 6, 576])
    """
    from safetensors.torch import load_file

    return load_file(path)
