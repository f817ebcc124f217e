"""Provenance of a result, as values for JSON: model, weights, tokenizer, versions and code."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import sha256
from ..files.untrusted import open_tensors
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
    """Returns the properties of an engine, in place of those of the modules in this process."""
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

    Weights that accelerate offloads to the disk are read one after another, and so are those of a
    model in an engine, from its files.
    """
    if lm.engine is not None:
        return _served_hash(lm, lm.engine)
    return _hash_of(_plain_weights(lm))


def _hash_of(weights: Iterable[tuple[str, Callable[[], torch.Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, read in sorted(weights, key=lambda item: item[0]):
        weight = read()
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        data: Any = weight.detach().cpu().contiguous()
        digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _served_hash(lm: LM, engine: Engine) -> str:
    """Returns the hash of the weights that an engine has read: that of the loaded model if the
    files have its weights by their names, else that of the files, or of the commit on the Hub."""
    folder = Path(engine.source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        commit = getattr(lm.config, "_commit_hash", None)
        try:
            folder = Path(snapshot_download(engine.source, revision=commit, local_files_only=True))
        except (OSError, ValueError):
            return hashlib.sha256(f"{engine.source} {commit}".encode()).hexdigest()
    paths = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    weights = _weights_in_files(lm, paths, getattr(torch, engine.facts["dtype"]))
    if weights is not None:
        return _hash_of(weights)
    lines = [f"{path.name} {sha256(path)}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _weights_in_files(
    lm: LM, paths: list[Path], dtype: torch.dtype
) -> list[tuple[str, Callable[[], torch.Tensor]]] | None:
    """Returns functions that read each weight of a model; None if one is not in the files."""
    path_of_name: dict[str, Path] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with open_tensors(path) as file:
                path_of_name |= dict.fromkeys(file.keys(), path)
    names_of_weight: dict[torch.Tensor, list[str]] = {}
    for prefix, module in lm.root.named_modules():
        buffers = module._non_persistent_buffers_set
        for name, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and name not in buffers:
                names_of_weight.setdefault(weight, []).append(f"{prefix}.{name}".lstrip("."))
    weights: list[tuple[str, Callable[[], torch.Tensor]]] = []
    for names in names_of_weight.values():
        stored = [name for name in names if name in path_of_name]
        if not stored:
            return None
        read = partial(_read_weight, path_of_name[stored[0]], stored[0], dtype)
        weights += [(name, read) for name in names]
    return weights


def _read_weight(path: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    with open_tensors(path) as file:
        weight = file.get_tensor(name)
    return weight.to(dtype) if weight.is_floating_point() else weight


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
