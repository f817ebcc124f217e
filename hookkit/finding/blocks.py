"""One block of each kind is studied, and what was found becomes the places of all blocks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..families import Place
from ..sites import AXES, WHOLE_MODEL
from .attending import HEADED, UNPROVED, Attention, attention_of
from .neurons import read_mlp
from .stream import Block, follow
from .watching import Visit, Watched

LAYERED = tuple(name for name in AXES if name not in WHOLE_MODEL)


def kinds(blocks: nn.ModuleList) -> list[int]:
    """For each block, the first block that is built like it: the same modules, sizes and settings."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_kind(block), number) for number, block in enumerate(blocks)]


def _kind(block: nn.Module) -> Any:
    modules = []
    for path, module in block.named_modules():
        shapes = tuple((name, tuple(weight.shape)) for name, weight in module.named_parameters(recurse=False))
        settings = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and "layer" not in name and name != "training"
        )
        modules.append((path, type(module), shapes, settings))
    return tuple(modules)


def studied(watched: Watched, visit: Visit) -> Block | str:
    """What was found of one block, or the reason why nothing was."""
    pre = watched.laid(visit.read)
    post = watched.laid(visit.result)
    if pre is None or post is None or pre.shape != post.shape or visit.read is None or visit.read.ndim != 3:
        return UNPROVED + "the block does not read and give the stream as [batch, pos, d_model]"
    attention = attention_of(watched, visit)
    block = Block(watched, visit, attention if isinstance(attention, Attention) else None, pre, post)
    block.places |= {"resid_pre": Place(visit.path, "input"), "resid_post": Place(visit.path)}
    if isinstance(attention, Attention):
        block.places |= attention.places
        block.missing |= attention.missing
    else:
        block.missing |= dict.fromkeys(("attn_in", *HEADED), attention)
    follow(block)
    read_mlp(block)
    _check_output(block)
    return block


def _check_output(block: Block) -> None:
    """z is what the output projection reads only if that projection gives what attention adds, or gives."""
    found = block.attention
    term = block.places.get("attn_out")
    if found is None or found.out is None or "z" not in found.places:
        return
    if term is None and block.watched.laid(found.out.result) is None:
        block.places.pop("z")
        block.missing["z"] = UNPROVED + "attention's last projection does not give what attention adds"


def merged(
    root: nn.Module, found: Mapping[int, Block | str], built: list[int], path: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The places of each site over all kinds of blocks, and why a kind has none.

    `found` is by the number of the block that was studied; `built` says for each block which one that is.
    """
    places: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in LAYERED:
        by_kind = {number: _relative(block, name, path.format(layer=number)) for number, block in found.items()}
        there = list(dict.fromkeys(place for place in by_kind.values() if place is not None))
        reasons = list(dict.fromkeys(_reason(block, name) for n, block in found.items() if by_kind[n] is None))
        if there:
            own = [by_kind[kind] for kind in built]
            alternatives = there if _told_apart(root, there, own, path) else [_only(place, own) for place in there]
            places[name] = alternatives[0] if len(alternatives) == 1 else tuple(alternatives)
        if reasons:
            missing[name] = "; or ".join(reasons)
    return places, missing


def _relative(block: Block | str, name: str, path: str) -> Place | None:
    place = None if isinstance(block, str) else block.places.get(name)
    return None if place is None else replace(place, path="." + place.path.removeprefix(path).removeprefix("."))


def _told_apart(root: nn.Module, there: list[Place], own: list[Place | None], path: str) -> bool:
    """True where the first of the places whose module a block has is its own."""
    for layer, place in enumerate(own):
        block = root.get_submodule(path.format(layer=layer))
        paths = {name for name, _ in block.named_modules()}
        if next((each for each in there if each.path.removeprefix(".") in paths), None) != place:
            return False
    return True


def _only(place: Place, own: list[Place | None]) -> Place:
    """The place in those blocks alone that have it."""
    return replace(place, layers=tuple(layer for layer, each in enumerate(own) if each == place))


def _reason(block: Block | str, name: str) -> str:
    return block if isinstance(block, str) else block.missing.get(name, UNPROVED + "nothing like it was seen")
