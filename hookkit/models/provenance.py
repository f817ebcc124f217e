"""How a result came to be: the model, its weights and tokenizer, versions, code, machine; plain values for JSON."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .devices import count, weights_of
from .lm import LM
from .tensor_parallel import whole_weight

PACKAGES = (
    "hookkit",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pandas",
    "matplotlib",
    "einops",
)


def about_model(lm: LM) -> dict[str, Any]:
    """The model in words: name, revision, class, dtype, device, attention implementation, size, versions."""
    config = lm.config
    return {
        "model": lm.name or getattr(config, "_name_or_path", "") or type(lm.root).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(lm.root).__name__,
        "family": lm.family.name,
        "dtype": sorted(
            {str(weight.dtype).removeprefix("torch.") for weight in lm.root.parameters()}
        ),
        "device": lm.device.type,
        "attention": getattr(config, "_attn_implementation", None),
        "adapters": list(lm.adapters),
        "parameters": count(lm.root),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what numbers come out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def weights_hash(lm: LM) -> str:
    """The sha256 of all weights, by name: equal for two models that compute the same.

    Weights that accelerate keeps on the disk are read one after the other.
    """
    total = hashlib.sha256()
    for name, read in sorted(_parts(lm), key=lambda named: named[0]):
        weight = read()
        total.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        data: Any = weight.detach().cpu().contiguous()
        total.update(data.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _parts(lm: LM) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The plain tensors that all weights are made of, by name, and what gives each."""
    for name, read, there in weights_of(lm.root):
        value: Any = read() if there else None
        if hasattr(value, "full_tensor"):  # split among processes: put together when its turn comes
            yield name, lambda value=value: whole_weight(value)
        elif there:
            for part, plain in _numbers(name, value):
                yield part, lambda plain=plain: plain
        else:
            yield name, read


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain tensors that a weight is made of, by name: one that is quantised has scales beside its numbers."""
    if isinstance(value, Mapping):
        for word, part in value.items():
            yield from _numbers(f"{name}.{word}" if name else word, part)
    elif isinstance(value, tuple | list):
        yield from _numbers(name, dict(enumerate(value)))
    elif hasattr(value, "__tensor_flatten__"):
        yield from _numbers(
            name, {word: getattr(value, word) for word in value.__tensor_flatten__()[0]}
        )
    elif isinstance(value, torch.Tensor):
        yield name, value.dequantize() if value.is_quantized else value


def tokenizer_hash(lm: LM) -> str | None:
    """The sha256 of the tokenizer's vocabulary and rules."""
    if lm.tokenizer is None:
        return None
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)
    words = (
        backend.to_str() if backend is not None else repr(sorted(lm.tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(words.encode()).hexdigest()


def config_hash(lm: LM) -> str | None:
    """The sha256 of the model's configuration, without where it was loaded from."""
    if lm.config is None or not hasattr(lm.config, "to_dict"):
        return None
    words = {name: value for name, value in lm.config.to_dict().items() if name[0] != "_"}
    words.pop("transformers_version", None)
    text = json.dumps(words, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def git_commit() -> str | None:
    """The commit of the folder one works in, with a plus sign where files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], capture_output=True, text=True, check=True
    ).stdout.strip()
