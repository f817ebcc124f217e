"""Provenance of a result, as values for JSON: model, weights, tokenizer, versions and code."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import sha256
from .devices import count_parameters, weights_of
from .engine import Engine
from .lm import LM

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
PACKAGES = "hookkit torch transformers tokenizers numpy pandas matplotlib einops"


def about_model(lm: LM) -> dict[str, Any]:
    """Returns the model's name, revision, class, dtype, device, attention, size and versions."""
    config = lm.config
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in lm.root.parameters()}
    about = {
        "model": lm.name or getattr(config, "_name_or_path", "") or type(lm.root).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "class": type(lm.root).__name__,
        "family": lm.family.name,
        "dtype": sorted(dtypes),
        "device": lm.device.type,
        "attention": getattr(config, "_attn_implementation", None),
        "adapters": list(lm.adapters),
        "parameters": count_parameters(lm.root),
        "versions": versions(),
    }
    if lm.engine is not None:
        about |= _about_engine(lm.engine)
    if lm.dictionaries:
        about["dictionaries"] = [dictionary.about() for dictionary in lm.dictionaries]
    return about


def _about_engine(engine: Engine) -> dict[str, Any]:
    """What computes where a model is served, in place of what its modules here say."""
    facts = engine.facts
    code = {"model_impl": engine.arguments["model_impl"], "class": facts["class"]}
    return {
        "dtype": [facts["dtype"]],
        "device": facts["device"],
        "attention": "vllm",
        "engine": {"name": "vllm", "version": facts["version"], **code},
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that may change results."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES.split():
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def weights_hash(lm: LM) -> str:
    """Returns the sha256 of all weights, ordered by name; equal for models with equal weights.

    Weights that accelerate offloads to the disk are read one after another. Where a model is
    served, it is the hash of the weights' files, or of the name and the commit on the Hub.
    """
    digest = hashlib.sha256()
    if lm.engine is not None:
        commit = getattr(lm.config, "_commit_hash", None)
        return _source_hash(lm.engine.source, commit)
    for name, read in sorted(_plain_weights(lm), key=lambda item: item[0]):
        weight = read()
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        data: Any = weight.detach().cpu().contiguous()
        digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _source_hash(source: str, commit: str | None) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return hashlib.sha256(f"{source} {commit}".encode()).hexdigest()
    lines: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_FILES:
            lines.append(f"{path.name} {sha256(path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain_weights(lm: LM) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Yields the names of the plain tensors of all weights, and functions that return them."""
    for name, read, is_loaded in weights_of(lm.root):
        if not is_loaded:
            yield name, read
            continue
        value: Any = read()
        if hasattr(value, "full_tensor"):  # split among processes: joined when it is read
            yield name, value.full_tensor
            continue
        for part_name, part in _tensors_in(name, value):
            yield part_name, lambda part=part: part


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the plain tensors of a weight by name; a quantised weight also has scales."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors_in(f"{name}.{key}", part)
    elif isinstance(value, tuple | list):
        yield from _tensors_in(name, dict(enumerate(value)))
    elif hasattr(value, "__tensor_flatten__"):
        attributes = value.__tensor_flatten__()[0]
        yield from _tensors_in(name, {key: getattr(value, key) for key in attributes})
    elif isinstance(value, torch.Tensor):
        yield name, value.dequantize() if value.is_quantized else value


def tokenizer_hash(lm: LM) -> str | None:
    """Returns the sha256 of the tokenizer's vocabulary and rules, or None without a tokenizer."""
    if lm.tokenizer is None:
        return None
    backend = getattr(lm.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = repr(sorted(lm.tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def config_hash(lm: LM) -> str | None:
    """Returns the sha256 of the model's configuration, without the path that it was loaded from."""
    if lm.config is None or not hasattr(lm.config, "to_dict"):
        return None
    settings = {name: value for name, value in lm.config.to_dict().items() if name[0] != "_"}
    settings.pop("transformers_version", None)
    text = json.dumps(settings, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def git_commit() -> str | None:
    """Returns git's commit, with a plus sign if files differ from it; None outside of git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    return completed.stdout.strip()
