"""The types of the table of families: module locations, and a row with the facts of one family.

Nothing here imports torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

HEAD_SIZES = ("head", "kv_head", "d_head", "d_qk", "d_v")

Side: TypeAlias = Literal["input", "output", "inside"]


@dataclass(frozen=True)
class ModuleLocation:
    """Where a site is: a module, one of its sides, and the part of the tensor.

    path    the module; a path that begins with a dot is relative to the block, and "." is the block
    side    "input", "output", or "inside": a tensor inside its forward, which `item` names
    item    which of several tensors: an index or a keyword; inside: query, key, value, scores,
            pattern or router
    cut     the structure of the last axis, in names of sizes: "head d_head" are heads, "head d_head
            | kv_head d_head" two parts one after the other, "head: d_head | d_head" two parts per
            head
    part    the index of the part that is the site
    shared  True for an input that the block uses after the module too: an edit is written into the
            tensor itself, because a replacement would reach the module only
    flat    True if rows and positions are one axis
    times   the block's attribute by which the module's output is multiplied before it is added to
            the residual stream
    over    the configuration's attribute by which it is divided before the head reads it
    layers  the blocks that have the site here; empty: all blocks that have the module
    """

    path: str
    side: Side = "output"
    item: int | str = 0
    cut: str = ""
    part: int = 0
    shared: bool = False
    flat: bool = False
    times: str = ""
    over: str = ""
    layers: tuple[int, ...] = ()

    @cached_property
    def tensor(self) -> "ModuleLocation":
        """The location of the whole tensor, which sites that are parts of it share."""
        return replace(self, cut="", part=0, times="", over="")


@dataclass(frozen=True)
class AxisSplit:
    """A `ModuleLocation.cut` in numbers.

    The axis has `outer` groups of `total` numbers. In each group, the numbers from `start` to
    `stop` are `inner` heads of `width`. `inner` is None if the part has no heads.
    """

    outer: int
    total: int
    start: int
    stop: int
    inner: int | None
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the site's axes after batch and pos."""
        if self.inner is None:
            return (self.width,)
        return self.outer * self.inner, self.width


def split_axis(location: ModuleLocation, sizes: Mapping[str, int | None]) -> AxisSplit:
    """Returns the numbers of a location's `cut` with these sizes."""
    group, _, text = location.cut.rpartition(":")
    parts = [_numbers(words, sizes) for words in text.split("|")]
    lengths = [math.prod(part) for part in parts]
    start = sum(lengths[: location.part])
    stop = start + lengths[location.part]
    *heads, width = parts[location.part]
    inner = math.prod(heads) if heads or group else None
    return AxisSplit(math.prod(_numbers(group, sizes)), sum(lengths), start, stop, inner, width)


def _numbers(words: str, sizes: Mapping[str, int | None]) -> list[int]:
    """Returns each word of a split as a number: the number itself, or the size of that name."""
    numbers: list[int] = []
    for word in words.split():
        numbers.append(int(word) if word.isdecimal() else sizes[word] or 0)
    return numbers


SiteLocations: TypeAlias = Mapping[str, ModuleLocation | tuple[ModuleLocation, ...]]
"""Locations by site. Of several, a block uses the first whose module it has."""

SizeCorrections: TypeAlias = Callable[[Any, int | None], Mapping[str, int | None]]
"""Returns size corrections for a configuration and a block's number (None: any block)."""


@dataclass(frozen=True)
class Family:
    """The facts about one family.

    locations   the locations of each site
    missing     the reason why the family, or some of its blocks, does not have a site
    block       the path of the blocks; `{layer}` stands for the number
    attention   where `scores` and `pattern` are computed: in transformers' attention "interface",
                or in the family's "own" code
    sizes       sizes for which the family's configuration has other names than most
    exceptions  laws ("sum"), or laws at one site ("batch scores"), that do not hold for the family,
                with the reasons
    found       True if the row was derived by a dry run of the model and is not in the table
    """

    name: str
    locations: SiteLocations
    missing: Mapping[str, str] = field(default_factory=dict)
    block: str = "model.layers.{layer}"
    attention: Literal["interface", "own"] = "interface"
    sizes: SizeCorrections = lambda config, layer: {}
    exceptions: Mapping[str, str] = field(default_factory=dict)
    found: bool = False

    def at(self, site: str, layer: int | None) -> list[ModuleLocation]:
        """Returns the possible locations of a site in a block, with full paths."""
        locations = self.locations.get(site, ())
        if isinstance(locations, ModuleLocation):
            locations = (locations,)
        block = self.block.format(layer=layer)
        in_block: list[ModuleLocation] = []
        for location in locations:
            if location.layers and layer not in location.layers:
                continue
            path = location.path
            if path.startswith("."):
                path = f"{block}{path}".removesuffix(".")
            in_block.append(replace(location, path=path, layers=()))
        return in_block

    def why_missing(self, site: str) -> str:
        """Returns the reason why the family does not have a site."""
        return self.missing.get(
            site, f"hookkit's table has no place for it in the {self.name} family"
        )
