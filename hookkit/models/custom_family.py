"""Rows of the table of families that users write.

They are for a model whose family hookkit does not know, or for which the dry run derived a wrong
row.

row = hk.family("mine", like=lm, locations={"attn_out": hk.location(".post_norm")})
lm = hk.LM(model, tokenizer, row=row)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from ..arguments import check_arguments
from ..errors import BadHook, UnknownSite, did_you_mean
from .families.schema import HEAD_SIZES, Family, ModuleLocation, SizeCorrections
from .families.table import TABLE
from .layout import Layout
from .lm import LM
from .sites import check_name

INSIDE = ("query", "key", "value", "scores", "pattern", "router", "mlp_pre", "mlp_post")
WORDS = ("d_model", *HEAD_SIZES, "d_mlp", "expert", "choice", "vocab", "share", "quarter")

LocationLike: TypeAlias = ModuleLocation | tuple[ModuleLocation, ...]


class LocationFields(TypedDict, total=False):
    """Further fields of `ModuleLocation`, for tensors of an unusual form."""

    shared: bool
    flat: bool
    times: str
    over: str
    layers: tuple[int, ...]


@check_arguments
def location(
    path: str,
    *,
    side: Literal["input", "output", "inside"] = "output",
    item: int | str = 0,
    cut: str = "",
    part: int = 0,
    **others: Unpack[LocationFields],
) -> ModuleLocation:
    """Returns the location of a site for `hk.family`: a module, a side, and a part of its tensor.

    A path that begins with a dot is relative to the block, and "." is the block itself. The other
    arguments are the fields of `ModuleLocation`. Raises `BadHook` for a side, an item or a cut that
    does not exist.

    >>> location(".self_attn.q_proj", cut="head d_head").path
    '.self_attn.q_proj'
    """
    if side == "inside" and item not in INSIDE:
        raise BadHook(f"item={item!r} inside a module: name one of {', '.join(INSIDE)}")
    for word in cut.replace("|", " ").replace(":", " ").split():
        if not word.isdecimal() and word not in WORDS:
            raise BadHook(
                f"cut={cut!r} has the word {word!r}{did_you_mean(word, WORDS)} "
                f"The words: {', '.join(WORDS)}."
            )
    parts = cut.rpartition(":")[2].count("|") + 1
    if not 0 <= part < parts:
        raise BadHook(f"part={part} was asked for, and cut={cut!r} has {parts}: 0 to {parts - 1}")
    return ModuleLocation(path, side, item, cut, part, **others)


@check_arguments
def family(
    name: str,
    *,
    like: str | Family | LM | None = None,
    locations: Mapping[str, LocationLike] | None = None,
    missing: Mapping[str, str] | None = None,
    block: str | None = None,
    attention: Literal["interface", "own"] | None = None,
    sizes: Mapping[str, int] | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> Family:
    """Returns a row of the table of families, for `hk.LM(model, tokenizer, row=row)`.

    `like` is the row to begin with: a model type of the table, another row, or a model. `locations`
    are added to this row, and checked against the modules of `like` if it is a model. `missing`
    removes sites, each with a reason. `block` is the path of the blocks, with `{layer}` for the
    number. `sizes` corrects the sizes in the configuration: d_head, kv_head and so on. Raises
    `UnknownSite` for a name that is no site, or a path that the model does not have.

    >>> row = family("mine", like="llama", locations={"attn_out": location(".post_norm")})
    >>> row.locations["attn_out"].path
    '.post_norm'
    """
    base = _base_row(like)
    added, removed = dict(locations or {}), dict(missing or {})
    _check_added(added, removed)
    _check_removed(removed)
    if block is not None and "{layer}" not in block:
        raise BadHook(
            f"block={block!r} does not say where the number stands: write for example "
            "'model.layers.{layer}'"
        )
    row = Family(
        name,
        _without(base.locations, removed) | added,
        _without(base.missing, added) | removed,
        block=block or base.block,
        attention=attention or base.attention,
        sizes=_correct_sizes(base, sizes or {}),
        exceptions={**base.exceptions, **(exceptions or {})},
        stream_norms=base.stream_norms,
    )
    if isinstance(like, LM):
        _check_paths(like, row, added)
    return row


def _without(sites: Mapping[str, Any], excluded: Collection[str]) -> dict[str, Any]:
    return {site: value for site, value in sites.items() if site not in excluded}


def _base_row(like: str | Family | LM | None) -> Family:
    """Returns the row to begin with."""
    if like is None:
        return Family("", {"logits": ModuleLocation("", item="logits")})
    if isinstance(like, LM):
        return like.family
    if isinstance(like, Family):
        return like
    if like not in TABLE:
        raise BadHook(
            f"like={like!r} is no model type of hookkit's table{did_you_mean(like, TABLE)} "
            f"Give one of {', '.join(TABLE)}; or a row; or the model, hk.LM(model)"
        )
    row = TABLE[like]
    if isinstance(row, Family):
        return row
    raise BadHook(
        f"the row of {like!r} depends on the configuration: give a model of it, like=hk.LM(model)"
    )


def _check_added(added: Mapping[str, Any], removed: Collection[str]) -> None:
    for site, value in added.items():
        check_name(site)
        if site in removed:
            raise BadHook(f"{site!r} is in locations= and in missing=: say one of them")
        locations = value if isinstance(value, tuple) else (value,)
        if set(map(type, locations)) != {ModuleLocation}:
            raise BadHook(
                f"the location of {site!r} is {value!r}: give hk.location(path, side=…), or a "
                "tuple of them"
            )


def _check_removed(removed: Mapping[str, str]) -> None:
    for site, reason in removed.items():
        check_name(site)
        if not isinstance(reason, str) or not reason:
            raise BadHook(f"the reason why {site!r} is missing is {reason!r}: give a sentence")


def _correct_sizes(base: Family, corrections: Mapping[str, int]) -> SizeCorrections:
    for word, size in corrections.items():
        if word not in WORDS or isinstance(size, bool) or not isinstance(size, int):
            raise BadHook(
                f"sizes={{{word!r}: {size!r}}}: give whole numbers for {', '.join(WORDS)}"
            )

    def sizes(config: Any, layer: int | None) -> Mapping[str, int | None]:
        return {**base.sizes(config, layer), **corrections}

    return sizes


def _check_paths(lm: LM, row: Family, added: Mapping[str, LocationLike]) -> None:
    """Raises `UnknownSite` for a location that no block of the model has."""
    layout = Layout(lm.root, lm.config, row)
    for site in added:
        if layout.layers(site) == []:
            layout.submodule(row.at(site, 0)[0].path)  # raises, with similar paths
            raise UnknownSite(f"no block of the model has the module at the place of {site!r}")
