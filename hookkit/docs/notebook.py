"""Writes a script with cells (`# %%`) as a notebook.

python -m hookkit.docs.notebook experiments/tour.py tour.ipynb
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

CELL = re.compile(r"^# %%(.*)\n", flags=re.MULTILINE)
NOTES = re.compile(r"  # (?:noqa|pyright:).*$", flags=re.MULTILINE)  # for linters of the script


def notebook(script: str) -> dict[str, Any]:
    """Returns a script's notebook, without outputs, as the JSON of an .ipynb file."""
    cells = []
    _, *parts = CELL.split(script)
    for number, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if "[markdown]" in kind:
            cell |= {"cell_type": "markdown", "source": ast.literal_eval(body.strip()).strip()}
        else:
            source = NOTES.sub("", body.strip())
            cell |= {"cell_type": "code", "source": source, "outputs": [], "execution_count": None}
        cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}


def write_notebook(script: Path, path: Path) -> None:
    """Writes a script's notebook to a file."""
    text = json.dumps(notebook(script.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_notebook(Path(sys.argv[1]), Path(sys.argv[2]))
