"""The index of a folder of results: the question, the answer and a picture of each, with links.

It is written as a page, and as README.md for a code host.
"""

from __future__ import annotations

import base64
import io
import os
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from ..arguments import check_arguments
from ..errors import BadFile, BadHook
from ..files.atomic import write_text
from ..files.untrusted import check_mapping, is_bare_name, path_inside, read_json
from .page import PAGE, is_own_page, render_page
from .parts import MARK, README, is_own_readme
from .typesetting import escape_markdown

PICTURE_SIZE = 640, 360  # pixels, the largest width and height of a picture on the index
MAX_PIXELS = 80_000_000  # of a picture that is read
COLUMNS = ["result", "title", "question", "answer", "made", "page"]


@check_arguments
def list_results(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """The results in a folder and in the folders below it, one row for each.

    A result is a folder with a report.html or a README.md, as `hk.record` writes them.

    Columns: result, its folder · title · question · answer · made, the command and how it ended ·
    page, report.html or else README.md. Raises `BadHook` for a folder that does not exist or has no
    results, and `BadFile` for an about.json that cannot be read.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> list_results("results")[["result", "question", "answer"]]
         result          question   answer
    0  oat_milk  What comes next?  Coffee.
    """
    top = Path(folder)
    if not top.is_dir():
        raise BadHook(f"there is no folder {str(folder)!r}: name one with results in it")
    records = []
    readmes = filter(is_own_readme, top.rglob(README))
    folders = {path.parent for path in (*top.rglob(PAGE), *readmes)} - {top}
    for result in sorted(folders):
        relative = result.relative_to(top)
        if not any(part.startswith(".") for part in relative.parts):
            records.append(_read_result(relative, top))
    if not records:
        raise BadHook(
            f"{str(folder)!r} has no results: a result is a folder with a report.html or a "
            "README.md, as hk.record makes them"
        )
    return pd.DataFrame(records, columns=COLUMNS)


@check_arguments
def write_index(folder: str | os.PathLike[str], *, title: str = "Results") -> Path:
    """Write index.html and README.md into a folder of results. Returns the path of index.html.

    Both have the question, the answer and the first figure of each result, and link to it. Results
    without a question are at the end. The page is self-contained; README.md is for a code host, and
    a README.md that hookkit did not write is not changed. Raises what `list_results` raises, and
    `BadFile` if the folder has an index.html that hookkit did not write, or for a picture that
    cannot be read.

    >>> with record("results/oat_milk", question="What comes next?", lm=lm) as oat_milk:
    ...     oat_milk.answer("Coffee.")
    >>> write_index("results").name
    'index.html'
    """
    rows: list[Any] = list_results(folder).to_dict("records")
    rows.sort(key=lambda row: not row["question"])
    # This import brings torch, which results that are only listed do not need.
    from ..models.devices import is_writing_process

    page = Path(folder) / "index.html"
    if os.path.lexists(page) and not is_own_page(page):
        raise BadFile(
            f"{str(page)!r} was not written by hk.results.write_index: move it away, or make "
            "the index of another folder"
        )
    for row in rows:
        row["picture"] = _encode_picture(Path(folder) / row["result"])
        row["address"] = quote(row["page"])  # a folder's name may begin with "javascript:"
    if is_writing_process():
        write_text(page, render_page("gallery.html", title=title, results=rows))
        readme = page.with_name(README)
        if is_own_readme(readme) or not os.path.lexists(readme):
            write_text(readme, _render_readme(title, rows, page.parent))
    return page


def _render_readme(title: str, rows: list[dict[str, str]], folder: Path) -> str:
    """The index in Markdown. The pictures are the files in the folders of the results."""
    blocks = [MARK, f"# {escape_markdown(title)}"]
    for row in rows:
        address = quote(row["result"])
        lines = [f"## [{escape_markdown(row['title'])}]({address}/)"]
        picture = _first_picture(folder / row["result"])
        if picture is not None:
            source = f"{address}/{quote(picture.name)}"
            alternative = escape(f"The first figure of {row['title']}")
            image = f'<img src="{source}" width="320" alt="{alternative}">'
            lines.append(f'<a href="{address}/">{image}</a>')
        lines += map(escape_markdown, (row["question"], row["answer"]))
        if row["made"]:
            lines.append(f"`{row['made']}`")
        blocks += filter(None, lines)
    return "\n\n".join(blocks) + "\n"


def _read_result(result: Path, top: Path) -> dict[str, str]:
    """The row of one result. `result` is its folder relative to `top`."""
    about = _read_about(top / result)
    page = PAGE if (top / result / PAGE).is_file() else README
    ended = about.get("ended", "finished")
    ending = "" if ended == "finished" else f" ({ended})"
    return {
        "result": result.as_posix(),
        "title": about.get("title") or result.name.replace("_", " ").capitalize(),
        "question": about.get("question", ""),
        "answer": about.get("answer", ""),
        "made": about.get("command", "") + ending,
        "page": (result / page).as_posix(),
    }


def _read_about(folder: Path) -> dict[str, Any]:
    path = path_inside(folder, "about.json")
    if not path.exists():
        return {}
    names = ("title", "question", "answer", "ended", "command")
    return check_mapping(read_json(path, finite=False), repr(str(path)), *names)


def _encode_picture(folder: Path) -> str:
    """The first figure of a result as a small data URL, "" if it has no figure."""
    path = _first_picture(folder)
    if path is None:
        return ""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadFile(
                    f"{str(path)!r} is a picture of {image.width} x {image.height} pixels, and is "
                    "not shown"
                )
            small = image.convert("RGB")
            small.thumbnail(PICTURE_SIZE)
    except BadFile:
        raise
    # PIL has no error class of its own.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFile(
            f"{str(path)!r} is no picture in PNG that can be read: {error}; make the result again"
        ) from error
    output = io.BytesIO()
    small.save(output, "WEBP", quality=80, method=6)
    return f"data:image/webp;base64,{base64.b64encode(output.getvalue()).decode()}"


def _first_picture(folder: Path) -> Path | None:
    """The first PNG in the order of about.json, else by name."""
    files = _read_about(folder).get("files")
    names = list(filter(is_bare_name, files)) if isinstance(files, list) else []
    names += sorted(path.name for path in folder.glob("*.png"))
    paths = [path_inside(folder, name) for name in names if name.endswith(".png")]
    return next(filter(Path.is_file, paths), None)
