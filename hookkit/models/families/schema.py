"""The types of the table of families, and the parts that its rows share.

First the types: module locations, and a row with the facts of one family. Then the locations of the
residual stream, attention, the MLP and a router, as most families have them, and the reasons why a
site is missing, by site. Nothing here imports torch.
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
            pattern or router, or mlp_pre or mlp_post of experts
    cut     the structure of the last axis, in names of sizes: "head d_head" are heads, "head d_head
            | kv_head d_head" two parts one after the other, "head: d_head | d_head" two parts per
            head
    part    the index of the part that is the site
    shared  True for an input that the block uses after the module too: an edit is written into the
            tensor itself, because a replacement would reach the module only
    flat    True if rows and positions are one axis; inside attention, that each image, or each
            window of it, has a call of its own
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
    lengths = list(map(math.prod, parts))
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
class Tower:
    """How a stack that reads images or sound lays out their positions.

    path        the path of its module
    counts      what says how many positions an image has: the size of its "pixels", of which a
                processor may give several "crops" or a "pixel mask"; the "image sizes" in pixels;
                the "grid" of its patches; its "patch positions"; or the "frames" of a sound
    before      the number of class tokens before the patches of each image
    after       the number of class tokens after them
    packed      True if the positions of all images of a batch are one axis
    last_block  the last block that the text model reads, counted from the end
    """

    path: str
    counts: str
    before: int = 0
    after: int = 0
    packed: bool = False
    last_block: int = -1


CROSS_SITES = ("in", "q", "k", "v", "scores", "pattern", "z", "out", "mid")
NO_SOURCE: Mapping[str, str] = {
    f"cross_{name}": "these blocks attend to no other text: they are those of no encoder-decoder's "
    "decoder"
    for name in CROSS_SITES
}


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
    stacks      the rows of other lists of blocks, such as the encoder of an encoder-decoder
    tower       for a stack that reads images or sound, how its positions are laid out
    stream_norms  where a block normalises the stream itself after an addition: by the site that is
                the stream then ("resid_mid", "resid_post"), the path of that norm in the block
    found       True if the row was derived by a dry run of the model and is not in the table
    """

    name: str
    locations: SiteLocations
    missing: Mapping[str, str] = field(default_factory=dict)
    block: str = "model.layers.{layer}"
    attention: Literal["interface", "own"] = "interface"
    sizes: SizeCorrections = lambda config, layer: {}
    exceptions: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, "Family"] = field(default_factory=dict)
    stream_norms: Mapping[str, str] = field(default_factory=dict)
    tower: Tower | None = None
    found: bool = False

    def __post_init__(self) -> None:
        if self.locations.keys().isdisjoint(NO_SOURCE):
            object.__setattr__(self, "missing", {**NO_SOURCE, **self.missing})

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

    def moved(self, decoder: str, head: str) -> "Family":
        """Returns the row for a model whose decoder and head are at these paths.

        A model that reads images too has the decoder of a language model as one of its parts.
        """
        own_decoder = self.block.rsplit(".", 2)[0]
        paths = {own_decoder: decoder, "lm_head": head}
        locations: dict[str, ModuleLocation | tuple[ModuleLocation, ...]] = {}
        for site, location in self.locations.items():
            if isinstance(location, ModuleLocation):
                locations[site] = _move(location, paths)
            else:
                locations[site] = tuple(_move(one, paths) for one in location)
        block = decoder + self.block.removeprefix(own_decoder)
        return replace(self, locations=locations, block=block)

    def why_missing(self, site: str) -> str:
        """Returns the reason why the family does not have a site."""
        return self.missing.get(
            site, f"hookkit's table has no place for it in the {self.name} family"
        )


def _move(location: ModuleLocation, paths: Mapping[str, str]) -> ModuleLocation:
    """Returns a location with the beginning of its path replaced, if it is one of `paths`."""
    for old, new in paths.items():
        if location.path == old or location.path.startswith(f"{old}."):
            return replace(location, path=new + location.path.removeprefix(old))
    return location


# ---- locations that rows share


def output_of(path: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a module's output."""
    return ModuleLocation(path, "output", **fields)


def input_of(path: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a module's input."""
    return ModuleLocation(path, "input", **fields)


def inside(path: str, item: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a tensor inside a module's forward."""
    return ModuleLocation(path, "inside", item, **fields)


HEAD: Mapping[str, ModuleLocation] = {
    "lm_head": output_of("lm_head"),
    "logits": output_of("", item="logits"),
}
STREAM: Mapping[str, ModuleLocation] = {"resid_pre": input_of("."), "resid_post": output_of(".")}
HEADS, KEY_HEADS = "head d_head", "kv_head d_head"
FUSED = "head d_head | kv_head d_head | kv_head d_head"  # all queries, all keys, all values
BY_HEAD = "head: d_head | d_head | d_head"  # query, key and value of one head after another


def attention_sites(path: str, projection: str = "o_proj") -> dict[str, ModuleLocation]:
    """Returns the sites that every attention module has."""
    return {
        "attn_in": input_of(path),
        "scores": inside(path, "scores"),
        "pattern": inside(path, "pattern"),
        "z": input_of(f"{path}.{projection}", cut=HEADS),
        "attn_out": output_of(path),
    }


def rotary_sites(path: str) -> dict[str, ModuleLocation]:
    """Returns queries and keys after the rotation, as the attention interface receives them."""
    return {"q_rot": inside(path, "query"), "k_rot": inside(path, "key")}


def separate_qkv(path: str) -> dict[str, ModuleLocation]:
    """Returns the sites of separate projections of queries, keys and values."""
    return {
        "q": output_of(f"{path}.q_proj", cut=HEADS),
        "k": output_of(f"{path}.k_proj", cut=KEY_HEADS),
        "v": output_of(f"{path}.v_proj", cut=KEY_HEADS),
    }


def fused_qkv(path: str, cut: str = FUSED, order: str = "qkv") -> dict[str, ModuleLocation]:
    """Returns the sites of one projection whose output has queries, keys and values in `order`."""
    return {name: output_of(path, cut=cut, part=order.index(name)) for name in "qkv"}


def mlp_sites(path: str, pre: str, post: str) -> dict[str, ModuleLocation]:
    """Returns the sites of an MLP with a projection before its neurons and one after them."""
    return {
        "mlp_in": input_of(path),
        "mlp_pre": output_of(f"{path}.{pre}"),
        "mlp_post": input_of(f"{path}.{post}"),
        "mlp_out": output_of(path),
    }


def mixture_sites(
    router: str = ".mlp.gate", pre: str = "gate_proj", post: str = "down_proj"
) -> dict[str, ModuleLocation | tuple[ModuleLocation, ...]]:
    """Returns the sites of a router and of its experts' neurons.

    In a block with a plain MLP, which has no router, neurons are between its matrices `pre` and
    `post`.
    """
    mlp = router.rpartition(".")[0]
    plain, experts = mlp_sites(mlp, pre, post), f"{mlp}.experts"
    return {
        "router_logits": inside(router, "router", flat=True),
        "experts": output_of(router, item=2, flat=True),
        "expert_weights": output_of(router, item=1, flat=True),
        "mlp_pre": (plain["mlp_pre"], inside(experts, "mlp_pre", flat=True)),
        "mlp_post": (plain["mlp_post"], inside(experts, "mlp_post", flat=True)),
    }


def multi_head_sizes(config: Any, layer: int | None) -> dict[str, int]:
    """Returns as many key-value heads as heads."""
    return {"kv_head": config.num_attention_heads}


# ---- reasons why a site is missing

ROTARY = {"pos_embed": "positions are rotary: they turn q and k and are never added to the stream"}
ALIBI = {
    "pos_embed": "positions are ALiBi, a slope added to the attention scores, and are never added "
    "to the stream"
}
NOT_ROTARY = {
    "q_rot": "positions are not rotary: q is what goes into attention",
    "k_rot": "positions are not rotary: k is what goes into attention",
}
NO_ROUTER = dict.fromkeys(
    ("router_logits", "experts", "expert_weights"), "the MLP is one network, without a router"
)
PARALLEL_BLOCK = {
    "resid_mid": "attention and MLP run in parallel: nothing of the stream stands between them"
}
OWN_ATTENTION = dict.fromkeys(
    ("q_rot", "k_rot"),
    "this family turns q and k inside its own attention code, which has no boundary there",
)
EXPERT_NEURONS = dict.fromkeys(
    ("mlp_pre", "mlp_post"),
    "the experts are not computed through transformers' common interface, in which the neurons of "
    "the chosen experts are seen; see router_logits, mlp_in and mlp_out",
)
NO_ATTENTION = dict.fromkeys(
    ("attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "attn_out", "resid_mid"),
    "a state-space block has no attention; its mixer is hk.module('backbone.layers.L.mixer')",
)
LATENT_KEYS = {
    "k": "each head's keys are expanded, in the attention's own code, from a latent that all heads "
    "share and a rotary part; see k_rot"
}
