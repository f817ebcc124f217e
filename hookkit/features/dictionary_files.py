"""hk.load_dictionary: a dictionary of features from a folder, the Hub or an object of SAELens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import check_keywords, describe
from ..errors import BadFile, BadHook, ModelNotFound
from ..models.cache import DEFAULT, WHEEL_SHA256, cache_folder
from ..models.loading import explain_load_error
from ..models.sites import Site
from . import other_formats, sae_lens
from .dictionary import Dictionary
from .dictionary_parts import DictionaryParts, build_dictionary

DEFAULT_SITE = "resid_post.12"  # of the default model's dictionary
# The file by which a format is recognised, and the reader of the format. The readers of formats
# that do not record whether a dictionary is a transcoder have an argument for it.
FORMATS: dict[str, Callable[..., DictionaryParts]] = {
    sae_lens.WEIGHTS: sae_lens.read_folder,
    other_formats.SPARSIFY: other_formats.read_sparsify,
    other_formats.NPZ: other_formats.read_npz,
    other_formats.PICKLE: other_formats.read_dictionary_learning,
}


@check_keywords
def load_dictionary(
    source: Any = None, *, at: str | Site | None = None, reads: str | Site | None = None
) -> Dictionary:
    """Returns a dictionary of features: a sparse autoencoder or a transcoder, as a frozen value.

    source=None                   the default model's own, which `hookkit dictionary` trains once
    source="path/to/folder"       a folder of SAELens (cfg.json and sae_weights.safetensors), of
                                  sparsify (sae.safetensors), of dictionary_learning (ae.pt), or
                                  of Gemma Scope (params.npz, which needs `at`)
    source="owner/name/folder"    a folder in a repository of the Hugging Face Hub
    source=sae                    an object of SAELens

    `at` is the site that the dictionary is of, such as "resid_post.12"; a file that names its
    site needs none, and one that names another site is refused. A transcoder reads one site,
    `reads`, and writes another, `at`, such as "mlp_in.12" and "mlp_out.12".

    SAELens' architectures standard, topk, batchtopk, jumprelu, gated, matryoshka_batchtopk,
    transcoder and skip_transcoder (also with jumprelu) are read, with their normalizations. A
    setting or a tensor whose meaning is not known raises `BadFile` and is named. SAELens itself is
    not needed. Weights of less than 32 bits are computed in float32.

    >>> load_dictionary(folder)
    Dictionary(resid_post.12: 32 features of 576, topk k=4)
    """
    if hasattr(source, "cfg") and hasattr(source, "state_dict"):
        return build_dictionary(sae_lens.read_object(source), at, reads)
    if source is None:
        source = _default_folder()
    if not isinstance(source, str | os.PathLike):
        raise BadHook(
            f"load_dictionary was given {describe(source)}: give a folder, the name of a "
            "repository on the Hub, or an object of SAELens"
        )
    parts = _read(_folder(os.fspath(source)), transcoder=reads is not None)
    return build_dictionary(parts, at, reads)


def default_dictionary_folder() -> Path:
    """Returns the folder of the default model's dictionary, which may not exist."""
    return cache_folder() / "dictionaries" / f"{DEFAULT}-{WHEEL_SHA256[:8]}-{DEFAULT_SITE}"


def _default_folder() -> Path:
    folder = default_dictionary_folder()
    if not (folder / sae_lens.CONFIG).is_file():
        raise ModelNotFound(
            f"the default model's dictionary of {DEFAULT_SITE} is not on this machine: train it "
            "once with the command `hookkit dictionary`, which takes less than an hour, or give a "
            "folder or a name on the Hub"
        )
    return folder


def _read(folder: Path, *, transcoder: bool) -> DictionaryParts:
    for name, read in FORMATS.items():
        if (folder / name).is_file():
            return read(folder, transcoder=transcoder)
    names = sorted(entry.name for entry in folder.iterdir())
    raise BadFile(
        f"{str(folder)!r} has none of the files {', '.join(FORMATS)}, by which a dictionary is "
        f"known: it has {', '.join(names[:8]) or 'no file'}"
    )


def _folder(name: str) -> Path:
    """Returns a folder of this machine, or one of the Hub, which is fetched."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        return path.parent
    parts = name.split("/")
    is_path = path.is_absolute() or name.startswith((".", "~"))
    if is_path or len(parts) < 2 or not all(parts):
        raise ModelNotFound(
            f"there is no folder {name!r}: give the folder of a dictionary, or a name on the Hub, "
            "such as 'owner/name/folder'"
        )
    return _fetch("/".join(parts[:2]), "/".join(parts[2:]))


def _fetch(repository: str, folder: str) -> Path:
    from huggingface_hub import snapshot_download

    names = ("cfg.json", "config.json", *FORMATS)
    prefix = f"{folder}/" if folder else ""
    try:
        root = snapshot_download(repository, allow_patterns=[prefix + name for name in names])
    except Exception as error:  # the Hub's client has many classes of errors
        raise explain_load_error(repository, error) from error
    path = Path(root) / folder
    if not path.is_dir():
        raise ModelNotFound(f"{repository!r} on the Hub has no dictionary in {folder!r}")
    return path
