"""The edits and controls of a report, with their names and descriptions, and tokens as literals."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import pandas as pd

from ...errors import BadHook
from ...hooks.base import EditHook, Hook, require_vectors
from ...hooks.capture import Capture
from ...hooks.knockout import Knockout
from ...hooks.logits import LogitEdit
from ...models.lm import LM
from ...models.prompts import shorten
from ...models.sites import Site
from ...sweeps.cells import SEED_STRIDE, Randomised

Hooks: TypeAlias = Hook | Sequence[Hook]
Controls: TypeAlias = str | Mapping[str, Hooks] | None

DESCRIPTIONS = {
    "ablate": "replaces what is at",
    "patch": "puts what another run had at",
    "steer": "adds a vector to",
    "scale": "multiplies",
    "project_out": "takes a direction out of",
    "skip_block": "passes by the blocks that end in",
    "edit": "puts a function of its own at",
    "force": "makes sure of",
    "ban": "makes impossible",
    "restrict": "allows nothing but",
    "boost": "adds to the logits of",
    "cap": "holds down",
    "swap": "exchanges",
    "set_rank": "gives its rank to",
    "randomised": "changes by as much, in a random direction,",
}


@dataclass(frozen=True)
class Edit:
    """Hooks that act together, with a name.

    `control` is the name of the edit that this is the control of, "" for an edit. A random control
    is drawn several times; all draws have the same name.
    """

    name: str
    hooks: tuple[Hook, ...]
    control: str = ""
    draw: int = 0

    @property
    def layers(self) -> list[int]:
        """The blocks in which it acts."""
        layers = set()
        for hook in self.hooks:
            for site in hook.sites:
                if isinstance(site, Site) and site.layer is not None:
                    layers.add(site.layer)
        return sorted(layers)

    def named_tokens(self, lm: LM) -> list[int]:
        """The tokens that its hooks name."""
        return tokens_named_by(self.hooks, lm)


def tokens_named_by(hooks: Iterable[Hook], lm: LM) -> list[int]:
    """The tokens that these hooks name, without duplicates."""
    tokens: list[int] = []
    for hook in hooks:
        if isinstance(hook, LogitEdit):
            tokens += hook.named(lm)
    return list(dict.fromkeys(tokens))


def as_edit_hooks(hooks: Hooks, what: str) -> tuple[Hook, ...]:
    """One or several hooks as a tuple.

    Raises `BadHook` for anything else, and for a capture, which changes nothing.
    """
    if isinstance(hooks, Hook) or not isinstance(hooks, Iterable):
        hooks = (hooks,)
    hooks = tuple(hooks)
    for hook in hooks:
        if not isinstance(hook, Hook) or isinstance(hook, Capture):
            raise BadHook(
                f"{what} has {shorten(str(hook))}, which changes nothing: give hooks that edit"
            )
    return hooks


def named_edits(hooks: Sequence[Hook | Mapping[str, Hooks]]) -> list[Edit]:
    """The edits of a report: hooks act together as one edit; a mapping has a name for each edit."""
    edits = []
    if len(hooks) == 1 and isinstance(hooks[0], Mapping):
        for name, value in hooks[0].items():
            edits.append(Edit(str(name), as_edit_hooks(value, f"the edit {name!r}")))
    else:
        if any(isinstance(hook, Mapping) for hook in hooks):
            raise BadHook(
                "hooks and a mapping were given: put all edits into one mapping, "
                "{'name': hook or hooks}"
            )
        edit_hooks = as_edit_hooks(hooks, "the edit")  # pyright: ignore[reportArgumentType]
        edits.append(Edit(shorten(" + ".join(map(str, edit_hooks))), edit_hooks))
    for edit in edits:
        if not edit.hooks:
            raise BadHook(
                f"the edit {edit.name!r} has no hook: give one, several, or "
                "{'name': hook or hooks}"
            )
    if not edits:
        raise BadHook("there is no edit to report on: give hooks, or {'name': hook or hooks}")
    return edits


def named_controls(controls: Controls, edits: Sequence[Edit], seed: int, draws: int) -> list[Edit]:
    """The controls: the user's, or for "random" each edit's random changes of the same size."""
    if controls is None:
        return []
    result = []
    if isinstance(controls, Mapping):
        for name, hooks in controls.items():
            control_hooks = as_edit_hooks(hooks, f"the control {name!r}")
            result.append(Edit(str(name), control_hooks, "all"))
    elif controls == "random":
        for edit in edits:
            for draw in range(draws):
                hooks = _randomise(edit, seed * SEED_STRIDE + draw)
                result.append(Edit(f"{edit.name} (random)", hooks, edit.name, draw))
    else:
        raise BadHook(
            f"controls={controls!r} is unknown: say 'random', or give {{'name': hook or hooks}}"
        )
    names = Counter(edit.name for edit in (*edits, *result) if edit.draw == 0)
    for control in result:
        if names[control.name] > 1 or not control.hooks:
            raise BadHook(
                f"the control {control.name!r} has no hook, or the name of another: give each "
                "hooks and a name"
            )
    return result


def _randomise(edit: Edit, seed: int) -> tuple[Hook, ...]:
    hooks = []
    for hook in edit.hooks:
        assert isinstance(hook, EditHook)
        require_vectors(
            hook.sites,
            "controls='random' needs vectors (give controls={'name': hook} instead), and changes",
        )
        hooks.append(Randomised(hook.sites, hook.where, hook, seed))
    return tuple(hooks)


def describe_hook(hook: Hook) -> str:
    """What a hook does, as a sentence without a full stop."""
    if isinstance(hook, Knockout):
        layers = _list_numbers(Edit("", (hook,)).layers)
        return f"keeps attention from seeing {_describe_pos(hook.key)}, in blocks {layers}"
    verb = DESCRIPTIONS.get(hook.verb, hook.verb)
    if isinstance(hook, LogitEdit) and not isinstance(hook, Randomised):
        tokens = []
        for name in hook.names:
            value = getattr(hook, name)
            tokens += value if isinstance(value, tuple) else [value]
        return f"{verb} {', '.join(map(repr, tokens))} at the logits"
    text = f"{verb} {hook._sites()}"
    if hook.where.pos is not None:
        text += f", at {_describe_pos(hook.where.pos)}"
    return text


def _describe_pos(pos: object) -> str:
    if pos is None:
        return "every position"
    return "the last position" if pos == -1 else f"position {pos}"


def _list_numbers(numbers: Sequence[int]) -> str:
    """Numbers as a list, or as "3 to 7" if they are three or more without a gap."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, numbers))


def table_of(edits: Sequence[Edit]) -> pd.DataFrame:
    """Columns: edit, control (of which edit), draws, does (in words), hooks (of the first draw)."""
    draws = Counter(edit.name for edit in edits)
    records = []
    for edit in edits:
        if edit.draw == 0:
            records.append(
                {
                    "edit": edit.name,
                    "control": edit.control,
                    "draws": draws[edit.name],
                    "does": "; ".join(map(describe_hook, edit.hooks)),
                    "hooks": " + ".join(map(str, edit.hooks)),
                }
            )
    return pd.DataFrame(records)


def token_literal(lm: LM, token_id: int) -> str:
    """A token as a Python literal: its text, or its bytes if it is a part of a character."""
    text = lm.string(token_id)
    if "\ufffd" in text and lm.tokenizer is not None and token_id < lm.n_tokens:
        piece = lm.tokenizer.convert_ids_to_tokens(token_id)
        data = _bytes_of(piece) if isinstance(piece, str) else None
        if data is not None:
            return repr(data)
    return repr(text)


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a piece of a byte-level vocabulary, or of sentencepiece's <0xF0>."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    bytes_by_letter = _byte_letters()
    if all(letter in bytes_by_letter for letter in piece):
        return bytes(bytes_by_letter[letter] for letter in piece)
    return None


@cache
def _byte_letters() -> dict[str, int]:
    """The byte of each letter of GPT-2's vocabulary.

    A printable byte is its own letter. The other bytes are the letters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(unprintable):
        letters[chr(256 + number)] = byte
    return letters
