"""The index of a folder of results: of each its question, its answer and a picture, and the way to its page."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from .arguments import checks_arguments
from .errors import BadHook
from .reports import rendered
from .sharding import writes

WIDTH, HEIGHT = 640, 360  # of a picture on the index, in pixels at most
COLUMNS = ["result", "title", "question", "answer", "made", "page"]


@checks_arguments
def results(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The results in a folder, and in folders below it: one row for each page that is there.

    Columns: result, its folder · title · question · answer · made, the command and how it ended · page. Raises
    `BadHook` for a folder that is not there, or has no results.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> results("results")[["result", "question", "answer"]]
         result          question   answer
    0  oat_milk  What comes next?  Coffee.
    """
    top = Path(folder)
    if not top.is_dir():
        raise BadHook(f"there is no folder {str(folder)!r}: name one with results in it")
    found = [_result(page.relative_to(top), top) for page in sorted(top.rglob("report.html")) if _shown(page, top)]
    if not found:
        raise BadHook(f"{str(folder)!r} has no results: a result is a folder with a report.html, as hk.record makes it")
    return pd.DataFrame(found, columns=COLUMNS)


@checks_arguments
def index(folder: str | os.PathLike[str], *, title: str = "Results") -> Path:
    """Write index.html into a folder of results: of each the question, the answer and a picture; the page's path.

    The picture is the first figure of a result; results that ask nothing stand at the end. The page is self-contained,
    and links to the pages of the results.
    Raises what `results` raises.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> index("results").name
    'index.html'
    """
    rows: list[Any] = sorted(results(folder).to_dict("records"), key=lambda row: not row["question"])
    shown = [row | {"picture": _picture(Path(folder) / row["result"])} for row in rows]
    page = Path(folder) / "index.html"
    if writes():
        page.write_text(rendered("gallery.html", title=title, results=shown), encoding="utf-8", newline="\n")
    return page


def _shown(page: Path, top: Path) -> bool:
    return not any(part.startswith(".") for part in page.relative_to(top).parts) and page.parent != top


def _result(page: Path, top: Path) -> dict[str, str]:
    about = _about(top / page.parent)
    ended = about.get("ended", "finished")
    made = about.get("command", "") + ("" if ended == "finished" else f" ({ended})")
    title = about.get("title") or page.parent.name.replace("_", " ").capitalize()
    words = {"title": title, "question": about.get("question", ""), "answer": about.get("answer", ""), "made": made}
    return {"result": page.parent.as_posix(), **words, "page": page.as_posix()}


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _picture(folder: Path) -> str:
    """The first figure of a result, made small, as an address that holds it; nothing if there is none."""
    from PIL import Image

    listed = [folder / name for name in _about(folder).get("files", ()) if name.endswith(".png")]
    path = next((path for path in (*listed, *sorted(folder.glob("*.png"))) if path.is_file()), None)
    if path is None:
        return ""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((WIDTH, HEIGHT))
    words = io.BytesIO()
    small.save(words, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(words.getvalue()).decode()}"
