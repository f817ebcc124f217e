"""The models on this machine: the default one, and those that the Hugging Face Hub's client keeps.

Nothing is loaded to list, fetch or remove a model.
"""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import BadFile, ModelNotFound, did_you_mean
from .loading import DEFAULT, PACKAGE, cache_folder, default_folder, reading_failed

COLUMNS = ("model", "revision", "megabytes", "files", "used", "path")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def stored() -> pd.DataFrame:
    """The models that are kept on this machine, one row for each revision.

    Columns: model (its name for `load`; the default model needs none), revision (a commit), megabytes, files, used
    (when it was last read, as a date), path.
    """
    rows = [_default_row(folder) for folder in _defaults()]
    for repo in _hub():
        for revision in sorted(repo.revisions, key=lambda each: each.last_modified, reverse=True):
            used = pd.Timestamp(repo.last_accessed, unit="s").date().isoformat()
            size, count = round(revision.size_on_disk / 1e6, 1), len(revision.files)
            path = str(revision.snapshot_path)
            rows.append([repo.repo_id, revision.commit_hash, size, count, used, path])
    return pd.DataFrame(rows, columns=list(COLUMNS))


def places() -> pd.DataFrame:
    """The folders in which models are kept. Columns: of (what), path, set_by (the variable that says another)."""
    rows = [
        [DEFAULT, str(cache_folder()), "HOOKKIT_CACHE"],
        ["the Hub", str(_hub_folder()), "HF_HOME, HF_HUB_CACHE"],
    ]
    return pd.DataFrame(rows, columns=["of", "path", "set_by"])


def fetch(name: str | None = None, revision: str | None = None) -> Path:
    """Bring a model onto this machine, the default one if none is named; its folder.

    `ModelNotFound` for a name that the Hub does not know, `DownloadFailed` where it does not answer.
    """
    if name is None:
        return default_folder()
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [
            each.rfilename for each in HfApi().model_info(name, revision=revision).siblings or []
        ]
        kind = "*.safetensors" if any(each.endswith(".safetensors") for each in files) else None
        ignored = [each for each in WEIGHTS if kind is not None and each != kind]
        ignored += ["*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "*/*.bin"]
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # the Hub's client fails in many ways
        raise reading_failed(name, error) from error


def remove(name: str, revision: str | None = None) -> float:
    """Delete a model, or one revision of it, from this machine; the megabytes that came free. `ModelNotFound` if it is
    not there."""
    if name == DEFAULT and revision is None:
        return _remove_default()
    found = [repo for repo in _hub() if repo.repo_id == name]
    hashes = [each.commit_hash for repo in found for each in repo.revisions]
    wanted = [each for each in hashes if revision is None or each.startswith(revision)]
    if not wanted:
        known = [DEFAULT, *(repo.repo_id for repo in _hub())]
        said = f" of revision {revision!r}" if found else ""
        raise ModelNotFound(
            f"no model {name!r}{said} is kept on this machine{did_you_mean(name, known)}"
        )
    plan = _hub_info().delete_revisions(*wanted)
    plan.execute()
    left = {each.commit_hash for repo in _hub() for each in repo.revisions} & {*wanted}
    if left:  # the Hub's client logs that, and goes on
        raise BadFile(
            f"{name} cannot be removed from {_hub_folder()}: allow it, or remove the folder yourself"
        )
    return round(plan.expected_freed_size / 1e6, 1)


def _defaults() -> list[Path]:
    folder = cache_folder()
    return (
        sorted(path for path in folder.glob(f"{DEFAULT}-*") if path.is_dir())
        if folder.is_dir()
        else []
    )


def _default_row(folder: Path) -> list[Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    used = max((path.stat().st_atime for path in files), default=0.0)
    size = round(sum(path.stat().st_size for path in files) / 1e6, 1)
    date = pd.Timestamp(used, unit="s").date().isoformat()
    return [DEFAULT, folder.name.rpartition("-")[2], size, len(files), date, str(folder)]


def _remove_default() -> float:
    found = _defaults()
    if not found:
        raise ModelNotFound(
            f"the default model, {DEFAULT} of the package {PACKAGE}, is not kept on this machine"
        )
    freed = sum(float(_default_row(folder)[2]) for folder in found)
    for folder in found:
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


def _hub() -> list[Any]:
    """The models in the Hub's cache; none where there is no such folder yet."""
    if not _hub_folder().is_dir():
        return []
    return sorted(
        (repo for repo in _hub_info().repos if repo.repo_type == "model"),
        key=lambda repo: repo.repo_id,
    )
