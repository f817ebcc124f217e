"""The edits and controls of a report, with their names and descriptions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import pandas as pd

from ...arguments import check_integer
from ...errors import BadHook
from ...hooks.base import Hook, as_tuple
from ...hooks.capture import Capture
from ...hooks.edits import Knockout
from ...hooks.grammar import Grammar
from ...hooks.logits import LogitEdit
from ...hooks.sources import SourceEdit
from ...models.positions import TextPart, is_named
from ...models.prompts import shorten
from ...sweeps.cells import Randomised
from ..control_draws import DRAWS, ControlMaker

Hooks: TypeAlias = Hook | Sequence[Hook]
Controls: TypeAlias = int | Mapping[str, Hooks] | None

PARTS = {
    TextPart.PROMPT: "every token of the prompt",
    TextPart.GENERATED: "every generated token",
    TextPart.TEMPLATE: "the tokens that the chat's template added",
    TextPart.IMAGE: "the tokens of images",
    TextPart.AUDIO: "the tokens of sound",
}
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
    "toward": "moves the logits toward",
    "away_from": "moves the logits away from",
    "swap_concept": "exchanges two tokens in the stream at",
    "grammar": "allows only texts of",
    "randomised": "changes by as much, in a random direction,",
}


@dataclass(frozen=True)
class Edit:
    """Hooks that act together, with a name.

    `control` is the name of the edit that this is the control of, "" for an edit, and "all" for a
    control that the user named. A random control is drawn several times; all draws have the same
    name, and `description` says what they are.
    """

    name: str
    hooks: tuple[Hook, ...]
    control: str = ""
    draw: int = 0
    description: str = ""

    @property
    def layers(self) -> list[int]:
        """The blocks in which it acts."""
        sites = chain.from_iterable(hook.sites for hook in self.hooks)
        layers: list[Any] = [getattr(site, "layer", None) for site in sites]
        return sorted({*layers} - {None})


def as_edit_hooks(hooks: Hooks, what: str) -> tuple[Hook, ...]:
    """One or several hooks as a tuple. Raises `BadHook` for anything else, and for a capture."""
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
    edits = _edits_of(hooks)
    if not edits:
        raise BadHook("there is no edit to report on: give hooks, or {'name': hook or hooks}")
    for edit in edits:
        if not edit.hooks:
            raise BadHook(
                f"the edit {edit.name!r} has no hook: give one, several, or "
                "{'name': hook or hooks}"
            )
        if edit.name == "base_hooks":
            raise BadHook(
                "an edit is named 'base_hooks', as about.json names the hooks that act in "
                "both runs: give it another name"
            )
    if len({edit.name for edit in edits}) < len(edits):
        raise BadHook("two edits have one name: names stand once")
    return edits


def _edits_of(hooks: Sequence[Hook | Mapping[str, Hooks]]) -> list[Edit]:
    mappings = [hook for hook in hooks if isinstance(hook, Mapping)]
    if not mappings:
        edit_hooks = as_edit_hooks(hooks, "the edit")  # pyright: ignore[reportArgumentType]
        return [Edit(shorten(" + ".join(map(str, edit_hooks))), edit_hooks)]
    if len(hooks) > 1:
        raise BadHook(
            "hooks and a mapping were given: put all edits into one mapping, "
            "{'name': hook or hooks}"
        )
    edits = []
    for name, value in mappings[0].items():
        edits.append(Edit(str(name), as_edit_hooks(value, f"the edit {name!r}")))
    return edits


def count_draws(controls: Controls) -> int:
    """How often the control of each edit is drawn: 0 for named controls."""
    if controls is None:
        return DRAWS
    if isinstance(controls, Mapping):
        return 0
    meaning = "how many random controls to draw for each edit,"
    return check_integer(controls, "controls", least=0, meaning=meaning)


def named_controls(controls: Controls, edits: Sequence[Edit]) -> list[Edit]:
    """The controls that the user named."""
    if not isinstance(controls, Mapping):
        return []
    result = []
    for name, hooks in controls.items():
        control_hooks = as_edit_hooks(hooks, f"the control {name!r}")
        result.append(Edit(str(name), control_hooks, "all"))
    names = Counter(edit.name for edit in (*edits, *result))
    for control in result:
        if names[control.name] > 1 or not control.hooks:
            raise BadHook(
                f"the control {control.name!r} has no hook, or the name of another: give each "
                "hooks and a name"
            )
    return result


def random_controls(maker: ControlMaker, edit: Edit, count: int, seed: int) -> list[Edit]:
    """The draws of the control of one edit. Raises `Unsupported` if it has none."""
    control = maker.draw(edit.hooks, count, seed)
    name = f"{edit.name} (random)"
    result = []
    for number, hooks in enumerate(control.draws):
        result.append(Edit(name, hooks, edit.name, number, control.description))
    return result


def describe_hook(hook: Hook) -> str:
    """What a hook does, as a sentence without a full stop."""
    if isinstance(hook, Knockout):
        blocks = _describe_layers(Edit("", (hook,)).layers)
        return f"keeps attention from seeing {_describe_pos(hook.key)}, in blocks {blocks}"
    verb = DESCRIPTIONS.get(hook.verb, hook.verb)
    if isinstance(hook, SourceEdit):
        return f"{verb} {hook.source.in_words()}"
    if isinstance(hook, Grammar):
        return f"{verb} {hook}"
    if isinstance(hook, LogitEdit) and not isinstance(hook, Randomised):
        tokens = chain.from_iterable(as_tuple(getattr(hook, name)) for name in hook.names)
        return f"{verb} {', '.join(map(repr, tokens))} at the logits"
    text = f"{verb} {hook._sites()}"
    if hook.where.pos is not None:
        text += f", at {_describe_pos(hook.where.pos)}"
    return text


def _describe_layers(layers: list[int]) -> str:
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _describe_pos(pos: object) -> str:
    if pos is None:
        return "every position"
    if isinstance(pos, TextPart):
        return PARTS[pos]
    if is_named(pos):
        return f"the tokens of {pos!r}"
    return "the last position" if pos == -1 else f"position {pos}"


def table_of(edits: Sequence[Edit]) -> pd.DataFrame:
    """Columns: edit, control (of which edit), draws, does (in words), hooks (of the first draw)."""
    draws = Counter(edit.name for edit in edits)
    records = []
    for edit in edits:
        if edit.draw > 0:
            continue
        record = {"edit": edit.name, "control": edit.control, "draws": draws[edit.name]}
        record["does"] = edit.description or "; ".join(map(describe_hook, edit.hooks))
        record["hooks"] = " + ".join(map(str, edit.hooks))
        records.append(record)
    return pd.DataFrame(records)
