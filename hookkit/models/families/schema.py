"""What a row of the families' table is made of: places in the module tree, and the reasons why one is missing.

Nothing here knows torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

Side: TypeAlias = Literal["input", "output", "inside"]


@dataclass(frozen=True)
class ModuleLocation:
    """Where a site is: a module, one of its sides, and the part of the tensor there.

    path    the module; one that begins with a dot is counted from the block, "." being the block itself
    side    "input", "output", or "inside": a tensor in the midst of its forward, which `item` names
    item    which of several tensors: an index or a keyword; inside: query, key, value, scores, pattern or router
    cut     what the last axis is made of, in names of sizes: "head d_head" are heads, "head d_head | kv_head d_head"
            two parts behind one another, "head: d_head | d_head" two parts for each head in turn
    part    which of those parts is meant
    shared  an input that the block goes on using beside the module: an edit is written into the tensor itself, since a
            replacement would reach the module only
    flat    rows and positions are one axis
    times   the block's attribute by which what the module gives is multiplied before it is added to the stream
    over    the configuration's word by which it is divided before the head reads it
    layers  the numbers of the blocks in which it is there; empty: all that have the module
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
        """The place of the whole tensor, which sites that are parts of it share."""
        return replace(self, cut="", part=0, times="", over="")


@dataclass(frozen=True)
class AxisSplit:
    """A `ModuleLocation.cut` in numbers: `outer` groups of `total` numbers each, of which those from `start` to `stop` are
    `inner` heads of `width`. `inner` is None where the part has no heads."""

    outer: int
    total: int
    start: int
    stop: int
    inner: int | None
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the site's axes behind batch and pos."""
        return (self.width,) if self.inner is None else (self.outer * self.inner, self.width)


def cut(place: ModuleLocation, sizes: Mapping[str, int | None]) -> AxisSplit:
    """The numbers that a place's cut stands for, with these sizes."""
    group, _, rest = place.cut.rpartition(":")
    parts = [
        [int(word) if word.isdecimal() else sizes[word] or 0 for word in part.split()]
        for part in rest.split("|")
    ]
    lengths = [_product(part) for part in parts]
    start = sum(lengths[: place.part])
    chosen = parts[place.part]
    outer = _product(
        [int(word) if word.isdecimal() else sizes[word] or 0 for word in group.split()]
    )
    headed = len(chosen) > 1 or bool(group)
    inner = _product(chosen[:-1]) if headed else None
    return AxisSplit(outer, sum(lengths), start, start + lengths[place.part], inner, chosen[-1])


def _product(numbers: list[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


Places: TypeAlias = Mapping[str, ModuleLocation | tuple[ModuleLocation, ...]]
"""Places by site. Of several, the first whose module a block has is its place: blocks of one model may differ."""

Sizes: TypeAlias = Callable[[Any, int | None], Mapping[str, int | None]]
"""From a configuration and a block's number (None: any) to the sizes that its row corrects."""


@dataclass(frozen=True)
class Family:
    """The facts about one family.

    places      where each site is
    missing     why a site is not there, or not in every block
    block       the path of the blocks; `{layer}` stands for the number
    attention   how `scores` and `pattern` are reached: through transformers' attention "interface", or in the
                family's "own" arithmetic
    sizes       sizes that the configuration says in another way than most
    exceptions  laws ("sum"), or laws at one site ("batch scores"), that do not hold here, each with the reason
    found       whether the row was found out by a dry run of the model, and is none of the table's
    """

    name: str
    places: Places
    missing: Mapping[str, str] = field(default_factory=dict)
    block: str = "model.layers.{layer}"
    attention: Literal["interface", "own"] = "interface"
    sizes: Sizes = lambda config, layer: {}
    exceptions: Mapping[str, str] = field(default_factory=dict)
    found: bool = False

    def at(self, site: str, layer: int | None) -> list[ModuleLocation]:
        """The places that a site may have in a block, with their paths written out."""
        found = self.places.get(site, ())
        block = self.block.format(layer=layer)
        return [
            replace(
                place,
                path=f"{block}{place.path}".removesuffix(".")
                if place.path[:1] == "."
                else place.path,
                layers=(),
            )
            for place in (found if isinstance(found, tuple) else (found,))
            if not place.layers or layer in place.layers
        ]

    def why_missing(self, site: str) -> str:
        """The reason why the family has no such site, in words for the user."""
        return self.missing.get(
            site, f"hookkit's table has no place for it in the {self.name} family"
        )
