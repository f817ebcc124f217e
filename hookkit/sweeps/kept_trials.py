"""The results of trials on disk, so that a model is tried once, and not once in each process.

The file's name is a hash of all that a trial depends on: the code (versions, and the files of
hookkit and of the model's classes), the configuration, the numbers and texts in every module, and
the weights. The weights count because a branch of the code that a shortcut breaks can be invisible
in a model whose weights are zero there. Of each weight every byte is summed and 64 numbers are
hashed, which takes a tenth of a second for 0.5 GB, where a sha256 takes longer than the trial.

A trial is kept only where the hash covers the whole model: a large model of transformers' own
classes, on one device, in one process. Adapters, hooks, replaced forwards, quantised or offloaded
weights and a row of the user's own for the family are reasons to try again in each process.

Nothing depends on these files: one that is damaged, or that cannot be written, only means a trial
more. Where two processes write at once, the last one wins. `hookkit models where` names the folder,
which may be deleted.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import BadFile
from ..files.atomic import write_text
from ..models.cache import trials_folder
from ..models.lm import LM
from ..models.prompts import pad_id
from ..models.provenance import config_hash, versions

MIN_PARAMETERS = 10_000_000  # a smaller model is tried as fast as its weights are summed
MAX_FILES = 100  # the oldest ones are removed
N_NUMBERS = 64  # of each weight that are hashed

PACKAGE = Path(__file__).parents[1]
ROOMS = ("hooks", "models", "runs", "sweeps")  # a trial runs code of these rooms
LIBRARIES = ("torch.nn.", "transformers.")  # whose classes are known by their version
KNOWN_CODE = tuple(
    str(Path(str(module.__file__)).parent) + os.sep for module in (torch, transformers)
)
PYTHON = str(Path(os.__file__).parent) + os.sep


def file_of_model(lm: LM) -> Path | None:
    """Returns the file for the results of a model's trials; None if they are not kept."""
    if not _is_plain_model(lm):
        return None
    modules = dict(lm.root.named_modules())
    tensors = _tensors_of(lm.root)
    sources = {sys.modules[type(module).__module__] for module in modules.values()}
    if not all(map(_is_known_code, _functions_of(sources, modules))):
        return None
    device = next(iter(tensors.values())).device
    about = [versions(), _hash_of_hookkit(), config_hash(lm), lm.n_tokens, pad_id(lm)]
    about += [device.type, *sorted(map(_hash_of_source, sources))]
    about += [[path, *_describe_module(module)] for path, module in modules.items()]
    digest = hashlib.sha256(json.dumps(about).encode())
    _add_weights(digest, tensors)
    return trials_folder() / f"{digest.hexdigest()}.json"


def read_results(file: Path | None) -> dict[str, Any]:
    """Returns the results in a file, by name; none if the file does not exist or is damaged."""
    try:
        stored = json.loads(file.read_text()) if file is not None else {}
        results = stored["results"]
        return dict(results) if stored["sha256"] == _hash_of_results(results) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def add_result(file: Path | None, name: str, result: Any) -> None:
    """Adds a result, as values for JSON, to those in a file."""
    if file is None:
        return
    results = read_results(file) | {name: result}
    stored = {"results": results, "sha256": _hash_of_results(results)}
    try:
        write_text(file, json.dumps(stored))
        files = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in files[:-MAX_FILES]:
            old.unlink()
    except (OSError, BadFile):  # another process removed a file, or the disk is full or read-only
        return


def _hash_of_results(results: Any) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def _is_plain_model(lm: LM) -> bool:
    """True for a large model as transformers loads it, on one device and in one process.

    It has no adapters, no row of the user's own, no hooks, and plain weights only.
    """
    if lm.model is not lm.root or lm.adapters or lm.row is not None or lm.ranks is not None:
        return False
    count = sum(weight.numel() for weight in lm.root.parameters())
    if count < MIN_PARAMETERS or nn.modules.module._has_any_global_hook():
        return False
    tensors = _tensors_of(lm.root).values()
    is_on_one_device = len({tensor.device for tensor in tensors}) == 1
    are_tensors_plain = all(map(_is_plain_tensor, tensors))
    return is_on_one_device and are_tensors_plain and all(map(_is_plain_module, lm.root.modules()))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights and the buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_plain_tensor(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return type(tensor) in (Tensor, nn.Parameter) and is_dense


def _is_plain_module(module: nn.Module) -> bool:
    """True for a module of a library's class, without hooks and with the forward of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    is_changed = any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None
    return type(module).__module__.startswith(LIBRARIES) and not is_changed


def _functions_of(sources: set[ModuleType], modules: dict[str, nn.Module]) -> Iterator[Any]:
    """Yields the functions that a model runs: those of its classes and of their files, and the
    functions of attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for source in sources:
        yield from vars(source).values()
    kinds = set(map(type, modules.values()))
    for kind in set(chain.from_iterable(kind.__mro__ for kind in kinds)):
        yield from vars(kind).values()
    for module in modules.values():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        yield ALL_ATTENTION_FUNCTIONS.get(str(attention))
        yield ALL_MASK_ATTENTION_FUNCTIONS.get(str(attention))


def _is_known_code(value: Any) -> bool:
    """False for a function whose code is not torch's, transformers' or Python's.

    Methods of dataclasses are in "<string>", and some of Python's modules in "<frozen abc>" etc.
    """
    if not isinstance(value, FunctionType):
        return True
    file = value.__code__.co_filename
    is_pythons = file.startswith((PYTHON, "<string>", "<frozen ")) and "-packages" not in file
    return is_pythons or file.startswith(KNOWN_CODE)


def _describe_module(module: nn.Module) -> list[Any]:
    """Returns a module's class, its attributes that are plain values, and its attention."""
    values: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None):
            values[name] = value
    config = getattr(module, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    return [type(module).__module__, type(module).__qualname__, values, str(attention)]


def _hash_of_source(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.cache
def _hash_of_hookkit() -> str:
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((PACKAGE / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _add_weights(digest: Any, tensors: dict[str, Tensor]) -> None:
    """Adds all weights to a hash: the sum of each one's bytes, in words of 8, and some numbers."""
    sums: list[Tensor] = []
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        numbers = tensor.detach().reshape(-1)
        some = numbers[:: max(1, len(numbers) // N_NUMBERS)].contiguous()
        digest.update(some.cpu().view(torch.uint8).numpy().tobytes())
        is_in_words = numbers.nbytes % 8 == 0 and numbers.data_ptr() % 8 == 0
        sums.append(numbers.view(torch.int64 if is_in_words else torch.uint8).sum())
    digest.update(json.dumps(torch.stack(sums).tolist()).encode())
