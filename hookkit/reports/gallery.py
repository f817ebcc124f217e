"""The index of a folder of results: of each its question, its answer and a picture, and the way to its page."""

import base64
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from ..arguments import checks_arguments
from ..errors import BadFile, BadHook
from ..files.atomic import write_text
from ..files.untrusted import inside, is_bare_name, json_in, strings_of
from .page import is_own_page, rendered

WIDTH, HEIGHT = 640, 360  # of a picture on the index, in pixels at most
LARGEST = 80_000_000  # pixels of a picture that is read
COLUMNS = ["result", "title", "question", "answer", "made", "page"]


@checks_arguments
def results(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The results in a folder, and in folders below it: one row for each page that is there.

    Columns: result, its folder · title · question · answer · made, the command and how it ended · page. Raises
    `BadHook` for a folder that is not there, or has no results, and `BadFile` for an about.json that cannot be read.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> results("results")[["result", "question", "answer"]]
         result          question   answer
    0  oat_milk  What comes next?  Coffee.
    """
    top = Path(folder)
    if not top.is_dir():
        raise BadHook(f"there is no folder {str(folder)!r}: name one with results in it")
    found = [
        _result(page.relative_to(top), top)
        for page in sorted(top.rglob("report.html"))
        if _shown(page, top)
    ]
    if not found:
        raise BadHook(
            f"{str(folder)!r} has no results: a result is a folder with a report.html, as hk.record makes it"
        )
    return pd.DataFrame(found, columns=COLUMNS)


@checks_arguments
def index(folder: str | os.PathLike[str], *, title: str = "Results") -> Path:
    """Write index.html into a folder of results: of each the question, the answer and a picture; the page's path.

    The picture is the first figure of a result; results that ask nothing stand at the end. The page is self-contained,
    and links to the pages of the results.
    Raises what `results` raises; and `BadFile` where the folder has an index.html that hookkit did not write, and for a
    picture that cannot be read.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> index("results").name
    'index.html'
    """
    rows: list[Any] = sorted(
        results(folder).to_dict("records"), key=lambda row: not row["question"]
    )
    from ..models.tensor_parallel import (
        is_writing_process,  # which brings torch, and results that are only listed need none
    )

    page = Path(folder) / "index.html"
    if os.path.lexists(page) and not is_own_page(page):
        raise BadFile(
            f"{str(page)!r} was not written by hk.index: move it away, or make the index of another folder"
        )
    shown = []
    for row in rows:
        address = quote(row["page"])  # the name of a folder may begin as "javascript:" does
        shown.append(row | {"picture": _picture(Path(folder) / row["result"]), "address": address})
    if is_writing_process():
        write_text(page, rendered("gallery.html", title=title, results=shown))
    return page


def _shown(page: Path, top: Path) -> bool:
    return (
        not any(part.startswith(".") for part in page.relative_to(top).parts) and page.parent != top
    )


def _result(page: Path, top: Path) -> dict[str, str]:
    about = _about(top / page.parent)
    ended = about.get("ended", "finished")
    made = about.get("command", "") + ("" if ended == "finished" else f" ({ended})")
    title = about.get("title") or page.parent.name.replace("_", " ").capitalize()
    words = {
        "title": title,
        "question": about.get("question", ""),
        "answer": about.get("answer", ""),
        "made": made,
    }
    return {"result": page.parent.as_posix(), **words, "page": page.as_posix()}


def _about(folder: Path) -> dict[str, Any]:
    path = inside(folder, "about.json")
    if not path.exists():
        return {}
    names = ("title", "question", "answer", "ended", "command")
    return dict(strings_of(json_in(path, finite=False), names, repr(str(path))))


def _picture(folder: Path) -> str:
    """The first figure of a result, made small, as an address that holds it; nothing if there is none."""
    from PIL import Image

    files = _about(folder).get("files", ())
    named = [name for name in files if is_bare_name(name)] if isinstance(files, list) else []
    names = [*named, *sorted(path.name for path in folder.glob("*.png"))]
    pictures = [inside(folder, name) for name in names if name.endswith(".png")]
    path = next((path for path in pictures if path.is_file()), None)
    if path is None:
        return ""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > LARGEST:
                raise BadFile(
                    f"{str(path)!r} is a picture of {image.width} x {image.height} pixels, and is not shown"
                )
            small = image.convert("RGB")
            small.thumbnail((WIDTH, HEIGHT))
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # PIL has no error of its own
        if isinstance(error, BadFile):
            raise
        raise BadFile(
            f"{str(path)!r} is no picture in PNG that can be read: {error}; make the result again"
        ) from error
    words = io.BytesIO()
    small.save(words, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(words.getvalue()).decode()}"
