"""Edits and controls by name and in words, and tokens as they are shown."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import pandas as pd

from ...errors import BadHook
from ...hooks.base import EditHook, Hook, not_square
from ...hooks.capture import Capture
from ...hooks.knockout import Knockout
from ...hooks.logits import LogitEdit
from ...models.lm import LM
from ...models.prompts import shortened
from ...models.sites import Site
from ...sweeps.cells import SEEDS, Randomised

Hooks: TypeAlias = Hook | Sequence[Hook]
Controls: TypeAlias = str | Mapping[str, Hooks] | None

DOES = {
    "ablate": "replaces what is at", "patch": "puts what another run had at", "steer": "adds a vector to",
    "scale": "multiplies", "project_out": "takes a direction out of", "skip_block": "passes by the blocks that end in",
    "edit": "puts a function of its own at", "force": "makes sure of", "ban": "makes impossible",
    "restrict": "allows nothing but", "boost": "adds to the logits of", "cap": "holds down", "swap": "exchanges",
    "set_rank": "gives its rank to", "randomised": "changes by as much, in a random direction,",
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """Hooks that act together, by name. `control` says of which edit it is the control; "" for an edit.

    A random control is drawn several times, each draw under the same name.
    """

    name: str
    hooks: tuple[Hook, ...]
    control: str = ""
    draw: int = 0

    @property
    def layers(self) -> list[int]:
        """The blocks in which it acts."""
        found = {site.layer for hook in self.hooks for site in hook.sites if isinstance(site, Site)}
        return sorted(layer for layer in found if layer is not None)

    def named(self, lm: LM) -> list[int]:
        """The tokens that its hooks name."""
        return list(
            dict.fromkeys(
                i for hook in self.hooks if isinstance(hook, LogitEdit) for i in hook.named(lm)
            )
        )


def together(hooks: Hooks, what: str) -> tuple[Hook, ...]:
    """One hook or several as a tuple; `BadHook` for anything else, and for a capture, which changes nothing."""
    found = (
        (hooks,)
        if isinstance(hooks, Hook)
        else tuple(hooks)
        if isinstance(hooks, Iterable)
        else (hooks,)
    )
    for hook in found:
        if not isinstance(hook, Hook) or isinstance(hook, Capture):
            raise BadHook(
                f"{what} has {shortened(str(hook))}, which changes nothing: give hooks that edit"
            )
    return found


def edits_of(given: Sequence[Hook | Mapping[str, Hooks]]) -> list[Edit]:
    """The edits: hooks are one edit together, named by their calls; a mapping has a name for each."""
    if len(given) == 1 and isinstance(given[0], Mapping):
        found = [
            Edit(str(name), together(hooks, f"the edit {name!r}"))
            for name, hooks in given[0].items()
        ]
    elif any(isinstance(each, Mapping) for each in given):
        raise BadHook(
            "hooks and a mapping were given: put all edits into one mapping, {'name': hook or hooks}"
        )
    else:
        hooks = together(
            [hook for hook in given if isinstance(hook, Hook) or not isinstance(hook, Mapping)],
            "the edit",
        )
        found = [Edit(shortened(" + ".join(map(str, hooks))), hooks)]
    for edit in found:
        if not edit.hooks:
            raise BadHook(
                f"the edit {edit.name!r} has no hook: give one, several, or {{'name': hook or hooks}}"
            )
    if not found:
        raise BadHook("there is no edit to report on: give hooks, or {'name': hook or hooks}")
    return found


def controls_of(controls: Controls, edits: Sequence[Edit], seed: int, draws: int) -> list[Edit]:
    """The controls: random changes of the same size for each edit, so many draws of them, or what the user gives."""
    if controls is None:
        return []
    if isinstance(controls, Mapping):
        made = [
            Edit(str(name), together(hooks, f"the control {name!r}"), "all")
            for name, hooks in controls.items()
        ]
    elif controls == "random":
        made = []
        for edit in edits:
            for draw in range(draws):
                hooks = _random(edit, seed * SEEDS + draw)
                made.append(Edit(f"{edit.name} (random)", hooks, edit.name, draw))
    else:
        raise BadHook(
            f"controls={controls!r} is unknown: say 'random', or give {{'name': hook or hooks}}"
        )
    names = [each.name for each in (*edits, *made) if each.draw == 0]
    for each in made:
        if names.count(each.name) > 1 or not each.hooks:
            raise BadHook(
                f"the control {each.name!r} has no hook, or the name of another: give each hooks and a name"
            )
    return made


def _random(edit: Edit, seed: int) -> tuple[Hook, ...]:
    found = []
    for hook in edit.hooks:
        assert isinstance(hook, EditHook)
        not_square(
            hook.sites,
            "controls='random' needs vectors (give controls={'name': hook} instead), and changes",
        )
        found.append(Randomised(hook.sites, hook.where, hook, seed))
    return tuple(found)


def in_words(hook: Hook) -> str:
    """What a hook does, as a sentence without an end."""
    if isinstance(hook, Knockout):
        return f"keeps attention from seeing {_where(hook.key)}, in blocks {_ranges(Edit('', (hook,)).layers)}"
    if isinstance(hook, Randomised) or not isinstance(hook, LogitEdit):
        places = (
            hook._sites()
            if hook.where.pos is None
            else f"{hook._sites()}, at {_where(hook.where.pos)}"
        )
        return f"{DOES.get(hook.verb, hook.verb)} {places}"
    named = [value for name in hook.names for value in _several(getattr(hook, name))]
    return f"{DOES.get(hook.verb, hook.verb)} {', '.join(map(repr, named))} at the logits"


def _several(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _where(pos: object) -> str:
    return (
        "every position" if pos is None else "the last position" if pos == -1 else f"position {pos}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    whole = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def table_of(edits: Sequence[Edit]) -> pd.DataFrame:
    """Columns: edit, control (of which edit), draws, does (in words), hooks (as calls, of the first draw)."""
    draws = Counter(edit.name for edit in edits)
    edits = [edit for edit in edits if edit.draw == 0]
    return pd.DataFrame(
        {
            "edit": [edit.name for edit in edits],
            "control": [edit.control for edit in edits],
            "draws": [draws[edit.name] for edit in edits],
            "does": ["; ".join(map(in_words, edit.hooks)) for edit in edits],
            "hooks": [" + ".join(map(str, edit.hooks)) for edit in edits],
        }
    )


def literal(lm: LM, token_id: int) -> str:
    """A token as a Python literal: its text in quotes, or its bytes where they are only a part of a character."""
    text = lm.string(token_id)
    if "\ufffd" not in text or lm.tokenizer is None or token_id >= lm.n_tokens:
        return repr(text)
    piece = lm.tokenizer.convert_ids_to_tokens(token_id)
    found = _bytes_of(piece) if isinstance(piece, str) else None
    return repr(text) if found is None else repr(found)


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece of a byte-level vocabulary, or of sentencepiece's <0xF0>."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    letters = _letters()
    return (
        bytes(letters[letter] for letter in piece)
        if all(letter in letters for letter in piece)
        else None
    )


@cache
def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte: its own where that can be printed, else one from beyond 255."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
