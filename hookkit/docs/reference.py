"""The reference of `make docs`: every public name with its signature and docstring, as Markdown.

`reference_pages()` returns a page for each module of `hk`, and `llms_text()` all of them together.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import hookkit as hk

MODULES = ("metrics", "figures", "when", "datasets", "stats", "results", "types", "errors")
STUB = Path(hk.__file__).with_suffix(".pyi")
ROOMS = {
    "models": "Models, sites and positions",
    "hooks": "Hooks",
    "runs": "Running a model with hooks",
    "tables": "Tables",
    "sweeps": "Patching and sweeps",
    "attributions": "Attribution",
    "lenses": "Lenses and logits",
    "steering": "Directions",
    "features": "Dictionaries of features",
    "data": "Corpora",
    "reports": "Reports and results",
    "checks": "Checks",
}
FIRST = ("load", "LM", "Site", "at", "capture", "edit", "forward", "generate", "attach", "ranks")
LINE = 88  # characters of a signature on one line
FIELD = re.compile(r"(\S[^.]*?)  +(\S.*)")


def reference_pages() -> dict[str, str]:
    """Returns the Markdown of the reference, by page."""
    pages = {"index": _index_page()}
    for name in MODULES:
        pages[name] = _module_page(getattr(hk, name), f"hk.{name}")
    return pages


def llms_text() -> str:
    """Returns the whole of the public interface on one page, for assistants and for search."""
    pages = reference_pages()
    lead = "# hookkit\n\n> " + str(inspect.getdoc(hk)).partition("\n")[0]
    return "\n\n".join([lead, *pages.values()]) + "\n"


def _index_page() -> str:
    """Returns the page of the names that stand flat in `hk`, by subject."""
    parts = ["# Reference", "The names of `import hookkit as hk`, by subject."]
    links = ", ".join(f"[`hk.{name}`]({name}.md)" for name in MODULES)
    parts.append(f"The modules: {links}.")
    names_by_room = _names_by_room()
    for room, title in ROOMS.items():
        parts.append(f"## {title}")
        parts += [describe_name(f"hk.{name}", getattr(hk, name)) for name in names_by_room[room]]
    return "\n\n".join(parts)


def _names_by_room() -> dict[str, list[str]]:
    """Returns the flat names by the room of their module: `FIRST`, then as in the stub."""
    names: dict[str, list[str]] = {room: [] for room in ROOMS}
    for node in ast.parse(STUB.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        room = node.module.partition(".")[0]
        room = "results" if room == "files" else room
        values = [alias.name for alias in node.names]
        names[room] += [name for name in values if not isinstance(getattr(hk, name), ModuleType)]
    for values in names.values():
        values.sort(key=lambda name: [*FIRST, name].index(name))
    return names


def _module_page(module: ModuleType, path: str) -> str:
    parts = [f"# {path}", docstring_as_markdown(str(inspect.getdoc(module)))]
    for name in dir(module):
        if not name.startswith("_"):
            parts.append(describe_name(f"{path}.{name}", getattr(module, name)))
    return "\n\n".join(parts)


def describe_name(path: str, value: Any) -> str:
    """Returns the Markdown of one public name: its signature and its docstring."""
    parts = [f"### {path}"]
    if inspect.isfunction(value):
        parts.append(f"```python\n{path}{_format_signature(value)}\n```")
    elif not inspect.isclass(value):
        return f"### {path}\n\n`{value!r}`"
    parts.append(docstring_as_markdown(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        parts += _describe_methods(value)
    return "\n\n".join(parts)


def _describe_methods(kind: type) -> list[str]:
    """Returns the Markdown of the public methods and properties that a class defines itself."""
    parts = []
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else member
        function = getattr(function, "func", function)  # a cached property
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = "" if function is not member else _format_signature(function, method=True)
        parts.append(f"#### .{name}{call}")
        parts.append(docstring_as_markdown(str(inspect.getdoc(function))))
    return parts


class _Name:
    """An annotation that prints as it is written in the source, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _format_signature(function: Any, *, method: bool = False) -> str:
    """Returns the signature with the names of types, a parameter a line if it is long."""
    signature = inspect.signature(function)
    parameters = list(map(_with_names, signature.parameters.values()))
    returned = signature.return_annotation
    if isinstance(returned, str):
        returned = _Name(returned)
    parameters = parameters[1:] if method else parameters
    text = str(signature.replace(parameters=parameters, return_annotation=returned))
    if len(text) <= LINE:
        return text
    items = [f"    {item}," for item in _split_parameters(text)]
    return "\n".join(["(", *items, ")" + text.rpartition(")")[2]])


def _with_names(parameter: inspect.Parameter) -> inspect.Parameter:
    if isinstance(parameter.annotation, str):
        return parameter.replace(annotation=_Name(parameter.annotation))
    return parameter


def _split_parameters(signature: str) -> list[str]:
    """Splits a printed signature at the commas that are not in brackets or quotes."""
    inner = signature[1 : signature.rindex(")")]
    items, depth, quoted, start = [], 0, False, 0
    for index, letter in enumerate(inner):
        quoted ^= letter in "'\""
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quoted:
            items.append(inner[start:index].strip())
            start = index + 1
    return [*items, inner[start:].strip()]


def docstring_as_markdown(text: str) -> str:
    """Returns a docstring as Markdown: examples and indented code in fences, fields as a list."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if lines[0].startswith(">>>"):
            blocks.append("```pycon\n" + block + "\n```")
        elif all(line.startswith("    ") for line in lines):
            blocks.append("```python\n" + inspect.cleandoc(block) + "\n```")
        elif FIELD.fullmatch(lines[0]):
            blocks.append(_fields_as_list(lines))
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def _fields_as_list(lines: list[str]) -> str:
    """Returns lines such as `pos   the position` as a list; a line may go on below, indented."""
    items: list[str] = []
    for line in lines:
        field = FIELD.fullmatch(line)
        if field and not line.startswith(" "):
            items.append(f"- `{field[1]}`: {field[2]}")
        elif items:
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    return "\n".join(items)
