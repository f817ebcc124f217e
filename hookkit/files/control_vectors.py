"""Control vectors of llama.cpp: GGUF files that hold a direction for some blocks of a model.

llama.cpp adds `direction.L` to what block L gives, counted from 0, and has none for block 0
(`llama_adapter_cvec` in src/llama-adapter.cpp, `common_control_vector_load_one` in
common/common.cpp). So `direction.L` acts at the site resid_post.L.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile
from .atomic import atomic_file
from .untrusted import check_path, error_message

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "controlvector"
ABOUT = "hookkit.vectors"  # what more hookkit knows of the directions; llama.cpp ignores it
DIRECTION = re.compile(r"direction\.([1-9][0-9]{0,5})\Z")


def write_control_vector(
    path: str | os.PathLike[str], directions: Mapping[int, Tensor], model: str, about: str
) -> Path:
    """Writes directions by block to a GGUF file, and returns the path."""
    from gguf import GGUFWriter

    target = check_path(path)
    with atomic_file(target) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(ABOUT, about)
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", directions[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def read_control_vector(path: Path) -> tuple[dict[int, Tensor], str | None]:
    """Returns the directions of a GGUF file by block, and what hookkit wrote about them."""
    from gguf import GGUFReader

    name = f"{str(path)!r}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFile(f"{name} is no plain file, and no control vector can be read from it")
        reader = GGUFReader(path)
        architecture = _text_of(reader, "general.architecture")
        about = _text_of(reader, ABOUT)
        directions = dict(map(_direction, reader.tensors))
    except BadFile:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise BadFile(f"{name} cannot be read as GGUF: {error_message(error)}") from error
    if architecture != ARCHITECTURE or not directions:
        raise BadFile(
            f"{name} is no control vector of llama.cpp: its architecture is {architecture!r}, and "
            f"it has {len(directions)} directions"
        )
    return directions, about


def _text_of(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    value = None if field is None else field.contents()
    return value if isinstance(value, str) else None


def _direction(tensor: Any) -> tuple[int, Tensor]:
    """Returns the block of a tensor and a copy of its numbers."""
    import torch

    match = DIRECTION.match(tensor.name)
    if match is None or tensor.tensor_type.name != "F32" or tensor.data.ndim != 1:
        raise BadFile(
            f"its tensor {tensor.name!r} ({tensor.tensor_type.name}, {list(tensor.data.shape)}) is "
            "no direction of a block from 1 on, in F32"
        )
    return int(match[1]), torch.from_numpy(tensor.data.copy())
