"""Builds the documentation as pages that need no network.

    python -m hookkit.docs.build build/docs

Writes the guide, the reference of every public name, llms.txt, and the tour as a notebook.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

# The theme prints an announcement of its authors at every build.
os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.utils import CountHandler

from .notebook import write_notebook
from .reference import llms_text, reference_pages

HERE = Path(__file__).parent
PAGES = HERE / "pages"
TOUR = HERE.parent.parent / "experiments" / "tour.py"
# The theme loads this script from the network; it lets search run in pages that are files.
WORKER = HERE / "iframe-worker.js"
WORKER_ADDRESS = "https://unpkg.com/iframe-worker/shim"
LINK = re.compile(r"(!?)\[([^]]*)\]\((\.\./[^)#\s]+)\)")


def build_docs(folder: Path) -> Path:
    """Writes the documentation into a folder, and returns the path of its first page.

    Raises `SystemExit` if a link or the navigation is broken.
    """
    folder = folder.absolute()
    with tempfile.TemporaryDirectory() as name:
        sources = Path(name)
        write_sources(sources, folder)
        config = load_config(str(HERE / "mkdocs.yml"), docs_dir=str(sources), site_dir=str(folder))
        warnings = CountHandler()
        warnings.setLevel(logging.WARNING)
        logging.getLogger("mkdocs").addHandler(warnings)
        build(config)
        if warnings.get_counts():
            raise SystemExit("the documentation has broken links, see above")
    _use_local_worker(folder)
    return folder / "index.html"


def write_sources(sources: Path, folder: Path) -> None:
    """Writes the sources of the pages: the guide, the reference, and two files to download."""
    shutil.copytree(PAGES, sources, dirs_exist_ok=True)
    for path in sources.glob("*.md"):
        text = _with_pictures(path.read_text(encoding="utf-8"), sources, folder)
        path.write_text(text, encoding="utf-8")
    (sources / "reference").mkdir()
    for name, text in reference_pages().items():
        (sources / "reference" / f"{name}.md").write_text(text, encoding="utf-8")
    (sources / "llms.txt").write_text(llms_text(), encoding="utf-8")
    write_notebook(TOUR, sources / "tour.ipynb")


def _with_pictures(text: str, sources: Path, folder: Path) -> str:
    """Copies the pictures of results to the pages, and links other files where they are."""

    def link(match: re.Match[str]) -> str:
        kind, label, target = match.groups()
        path = (PAGES / target).resolve()
        if not kind:
            return f'<a href="{os.path.relpath(path, folder)}">{label}</a>'
        copy = Path("images", f"{path.parent.name}_{path.name}")
        shutil.copy(path, sources / copy)
        return f"![{label}]({copy})"

    return LINK.sub(link, text)


def _use_local_worker(folder: Path) -> None:
    shutil.copy(WORKER, folder / "assets" / WORKER.name)
    for path in folder.rglob("*.html"):
        address = os.path.relpath(folder / "assets" / WORKER.name, path.parent)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(WORKER_ADDRESS, address), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(build_docs(Path(sys.argv[1])))
