"""What to ask next: further commands about a prompt, with the places that a scan found in it."""

import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .options import Which
from .printing import Shown

if TYPE_CHECKING:
    from ..model import LM


class Scanned(Protocol):
    """What a scan is about."""

    @property
    def lm(self) -> "LM": ...
    @property
    def prompt(self) -> str: ...
    @cached_property
    def first(self) -> tuple[int, int]: ...


def questions(scan: Scanned, which: Which, parts: Mapping[str, Any]) -> list[str]:
    """A question and its command, by turns."""
    one, two = (_spelled(scan.lm, token) for token in scan.first)
    names = [scan.lm.string(token) for token in scan.first]
    asked: list[tuple[str, Sequence[str]]] = [
        (
            f"Which heads say {names[0]!r} rather than {names[1]!r}?",
            ["direct", "--token", one, "--against", two, "--heads"],
        ),
        ("Does it come from what is looked at?", _cut(parts)),
        (f"Is the strongest component needed for {names[0]!r}?", _without(parts, one)),
        (f"When does it come to say {names[0]!r}?", ["lens", "--watch", one, "--top", "1"]),
        ("What would it write, and why?", ["trace", "--watch", two, "--max-new-tokens", "12"]),
        (f"And without {names[0]!r}?", ["compare", "--ban", one, "--max-new-tokens", "12"]),
    ]
    lines = []
    for question, words in asked:
        if words:
            lines += [question, f"    {_line(words[0], scan.prompt, [*words[1:], *_model(which)])}"]
    if "Not to be had here" in parts:
        lines += ["Why is something not to be had?", f"    {shlex.join(['hookkit', 'doctor', *_doctor(which)])}"]
    return lines


def _spelled(lm: "LM", token: int) -> str:
    """A token as an option takes it: its text, or its id where that text is not this one token."""
    from ..errors import NotOneToken
    from ..spelling.writing import spelled_token

    try:
        found = lm.token(lm.string(token)) == token
    except NotOneToken:
        found = False
    return spelled_token(lm.string(token) if found else token)


def _line(command: str, prompt: str, words: Sequence[str]) -> str:
    return shlex.join(["hookkit", command, *(["--"] if prompt.startswith("-") else []), prompt, *words])


def _model(which: Which) -> list[str]:
    given = {"--model": which.model, "--revision": which.revision, "--device": which.device, "--dtype": which.dtype}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def _doctor(which: Which) -> list[str]:
    words = _model(which)
    return words[1:] if words[:1] == ["--model"] else words


def _cut(parts: Mapping[str, Any]) -> list[str]:
    """A knockout of the head that looks most at a token other than the first and the last one."""
    if "attention" not in parts:
        return []
    table: Any = parts["attention"].table.iloc[1:-1]
    if table.empty:
        return []
    best = table.loc[table["strongest"].idxmax()]
    return ["shift", "--hook", f"knockout:{best['head']}@query=-1,key={best['pos']}"]


def _without(parts: Mapping[str, Any], one: str) -> list[str]:
    """An ablation of the component that adds most."""
    found = parts.get("direct")
    if not isinstance(found, Shown):
        return []
    table: Any = found.table[found.table["kind"].isin(["attention", "mlp"])]
    if table.empty:
        return []
    return ["shift", "--ablate", str(table.loc[table["logit"].idxmax(), "component"]), "--watch", one]
