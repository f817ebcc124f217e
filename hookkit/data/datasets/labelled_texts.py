"""Texts with labels, for probes: the sets of the package sae-probes (MIT; Kantamneni et al. 2025).

    table = hk.datasets.labelled("96_spam_is", 200)
    hk.fit_probe(lm, table["text"], table["label"], "resid_post")

The package is fetched from PyPI once, verified by checksum, and kept in the cache folder; nothing
of it is installed. Reading its files needs the package zstandard, of `hookkit[probes]`.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from random import Random

import pandas as pd

from ...arguments import check_arguments, check_integer, check_seed
from ...errors import BadHook, MissingExtra, TooFew, did_you_mean
from ...models.cache import Wheel, cache_folder, create_once, fetch_wheel

WHEEL = Wheel(
    "sae-probes",
    "0.4.2",
    "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
    "155 sets of labelled texts",
    45,
)
REQUIRED_SPACE = 100_000_000  # bytes that fetching takes temporarily
INSIDE = "sae_probes/data/cleaned_data/"  # the folder of the sets in the package
ENDING = ".csv.zst"


@check_arguments
def labelled_names() -> list[str]:
    """Returns the names of the sets that `labelled` reads, sorted by their numbers.

    >>> "96_spam_is" in hk.datasets.labelled_names()
    True
    """
    names = [path.name.removesuffix(ENDING) for path in _folder().glob(f"*{ENDING}")]
    return sorted(names, key=lambda name: int(name.split("_")[0]))


@check_arguments
def labelled(name: str, n: int | None = None, *, seed: int = 0) -> pd.DataFrame:
    """Returns a set of labelled texts as a table, or `n` of them drawn with the seed.

    Columns: text, label. The labels are those of the set: 0 and 1, True and False, or words. Some
    sets have more than two classes, or numbers such as a year; choose two classes for a probe, or
    compare with one: `table["label"] == "Physics"`. The sets have as many texts of each class.

    Raises `BadHook` for an unknown name, `TooFew` if the set is smaller, `DownloadFailed` if pip
    cannot fetch the package, and `MissingExtra` without zstandard.

    >>> table = hk.datasets.labelled("96_spam_is", 50)
    >>> list(table), len(table), sorted(set(table["label"]))
    (['text', 'label'], 50, [0, 1])
    """
    check_seed(seed)
    path = _folder() / f"{name}{ENDING}"
    names = labelled_names()
    if name not in names:
        raise BadHook(
            f"there is no set of labelled texts {name!r}{_similar(name, names)} "
            f"hk.datasets.labelled_names() has all {len(names)}"
        )
    table = pd.read_csv(io.BytesIO(_decompress(path)), keep_default_na=False)
    table = pd.DataFrame({"text": table["prompt"].astype(str), "label": table["target"]})
    if n is not None:
        check_integer(n, "n", least=1, meaning="how many texts to draw,", error=BadHook)
        if n > len(table):
            raise TooFew(f"{name} has {len(table)} texts, and {n} were asked for: draw fewer")
        rows = Random(seed).sample(range(len(table)), n)
        table = table.iloc[rows].reset_index(drop=True)
    table.attrs = {"source": f"{name} of {WHEEL.package} {WHEEL.version}", "licence": "MIT"}
    return table


def _similar(name: str, names: list[str]) -> str:
    """Returns the end of a message: names with this word in them, or else similar ones."""
    with_word = [other for other in names if name.lower() in other.lower()]
    return did_you_mean(with_word[0], with_word[:3]) if with_word else did_you_mean(name, names)


def _folder() -> Path:
    """Returns the folder of the sets, and fetches them if it does not exist."""
    folder = cache_folder() / "texts" / WHEEL.folder_name
    if not folder.is_dir():
        create_once(folder, _fill, WHEEL.contents, REQUIRED_SPACE)
    return folder


def _fill(temporary: Path, new: Path) -> None:
    new.mkdir()
    with zipfile.ZipFile(fetch_wheel(WHEEL, temporary)) as wheel:
        for member in wheel.namelist():
            is_set = member.startswith(INSIDE) and member.endswith(ENDING)
            if is_set or member.endswith("/LICENSE"):
                with wheel.open(member) as source, open(new / Path(member).name, "wb") as file:
                    shutil.copyfileobj(source, file)


def _decompress(path: Path) -> bytes:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(
            f"hk.datasets.labelled needs zstandard, which cannot be imported ({error}): "
            "pip install 'hookkit[probes]'"
        ) from error
    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()
