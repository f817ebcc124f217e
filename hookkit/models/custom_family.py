"""A row of the families' table made by hand: for a model whose family hookkit does not know, or has found out wrongly.

row = hk.family("mine", like=lm, places={"attn_out": hk.place(".post_norm")})
lm = hk.LM(model, tokenizer, row=row)
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from ..arguments import checks_arguments
from ..errors import BadHook, UnknownSite, did_you_mean
from .families.schema import Family, ModuleLocation
from .families.table import FAMILIES
from .layout import Layout
from .lm import LM
from .sites import AXES

SIDES = ("input", "output", "inside")
INSIDE = ("query", "key", "value", "scores", "pattern", "router")
WORDS = (
    "d_model",
    "head",
    "kv_head",
    "d_head",
    "d_qk",
    "d_v",
    "d_mlp",
    "expert",
    "choice",
    "vocab",
    "share",
    "quarter",
)

PlaceLike: TypeAlias = ModuleLocation | tuple[ModuleLocation, ...]


@checks_arguments
def place(
    path: str,
    *,
    side: Literal["input", "output", "inside"] = "output",
    item: int | str = 0,
    cut: str = "",
    part: int = 0,
    shared: bool = False,
    flat: bool = False,
    times: str = "",
    over: str = "",
    layers: tuple[int, ...] = (),
) -> ModuleLocation:
    """Where a site is, for `hk.family`: a module, one of its sides, and the part of its tensor.

    A path that begins with a dot is counted from the block, "." being the block itself. The other words are those of
    `ModuleLocation`. `BadHook` for a side, an item or a cut that no place has.

    >>> place(".self_attn.q_proj", cut="head d_head").path
    '.self_attn.q_proj'
    """
    if side not in SIDES:
        raise BadHook(
            f"side={side!r}: a place is at side='input', 'output' or 'inside' of its module"
        )
    if side == "inside" and item not in INSIDE:
        raise BadHook(f"item={item!r} inside a module: name one of {', '.join(INSIDE)}")
    for word in cut.replace("|", " ").replace(":", " ").split():
        if not word.isdecimal() and word not in WORDS:
            raise BadHook(
                f"cut={cut!r} has the word {word!r}{did_you_mean(word, WORDS)} The words: {', '.join(WORDS)}."
            )
    parts = cut.rpartition(":")[2].count("|") + 1
    if not 0 <= part < parts:
        raise BadHook(f"part={part} was asked for, and cut={cut!r} has {parts}: 0 to {parts - 1}")
    return ModuleLocation(path, side, item, cut, part, shared, flat, times, over, layers)


@checks_arguments
def family(
    name: str,
    *,
    like: str | Family | LM | None = None,
    places: Mapping[str, PlaceLike] | None = None,
    missing: Mapping[str, str] | None = None,
    block: str | None = None,
    attention: Literal["interface", "own"] | None = None,
    sizes: Mapping[str, int] | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> Family:
    """A row of the families' table, to be given as `hk.LM(model, tokenizer, row=row)`.

    `like` is the row to begin with: a model type of the table, another row, or a model with its row, whose modules the
    new places are then checked against. `places` are added to it, and `missing` takes sites away, each with the reason.
    `block` is the path of the blocks, with `{layer}` for the number; `sizes` corrects what the configuration says of
    d_head, kv_head and so on. `UnknownSite` for a name that is no site, or a path that the model does not have.

    >>> row = family("mine", like="llama", places={"attn_out": place(".post_norm")})
    >>> row.places["attn_out"].path
    '.post_norm'
    """
    begun = _row(like)
    given, gone = dict(places or {}), dict(missing or {})
    _check_sites(given, gone)
    if block is not None and "{layer}" not in block:
        raise BadHook(
            f"block={block!r} does not say where the number stands: write for example 'model.layers.{{layer}}'"
        )
    if attention not in (None, "interface", "own"):
        raise BadHook(
            f"attention={attention!r}: it is reached through transformers' 'interface', or in its 'own' code"
        )
    kept = {site: at for site, at in begun.places.items() if site not in gone} | given
    row = Family(
        name,
        kept,
        {site: why for site, why in begun.missing.items() if site not in given} | gone,
        block=block or begun.block,
        attention=attention or begun.attention,
        sizes=begun.sizes if sizes is None else _corrected(begun, sizes),
        exceptions={**begun.exceptions, **(exceptions or {})},
    )
    if isinstance(like, LM):
        _check_paths(like, row, given)
    return row


def _row(like: str | Family | LM | None) -> Family:
    """The row to begin with."""
    if like is None:
        return Family("", {"logits": ModuleLocation("", item="logits")})
    if isinstance(like, LM):
        return like.family
    if isinstance(like, Family):
        return like
    if not isinstance(like, str) or like not in FAMILIES:
        known = did_you_mean(like, FAMILIES) if isinstance(like, str) else "."
        raise BadHook(
            f"like={like!r} is no model type of hookkit's table{known} Give one of {', '.join(FAMILIES)}; "
            "or a row; or the model, hk.LM(model)"
        )
    row = FAMILIES[like]
    if isinstance(row, Family):
        return row
    raise BadHook(
        f"the row of {like!r} depends on the configuration: give a model of it, like=hk.LM(model)"
    )


def _check_sites(given: Mapping[str, Any], gone: Mapping[str, str]) -> None:
    for site in (*given, *gone):
        if site not in AXES:
            raise UnknownSite(
                f"there is no site {site!r}{did_you_mean(site, AXES)} The sites are: {', '.join(AXES)}."
            )
    for site, at in given.items():
        if site in gone:
            raise BadHook(f"{site!r} is given a place and said to be missing: say one of them")
        if (
            not all(
                isinstance(each, ModuleLocation)
                for each in (at if isinstance(at, tuple) else (at,))
            )
            or at == ()
        ):
            raise BadHook(
                f"the place of {site!r} is {at!r}: make one with hk.place(path, side=…), or a tuple of them"
            )
    for site, why in gone.items():
        if not isinstance(why, str) or not why:
            raise BadHook(f"the reason why {site!r} is missing is {why!r}: give a sentence")


def _corrected(begun: Family, sizes: Mapping[str, int]) -> Any:
    for word, size in sizes.items():
        if word not in WORDS or isinstance(size, bool) or not isinstance(size, int):
            raise BadHook(
                f"sizes={{{word!r}: {size!r}}}: give whole numbers for {', '.join(WORDS)}"
            )
    return lambda config, layer: {**begun.sizes(config, layer), **sizes}


def _check_paths(lm: LM, row: Family, given: Mapping[str, PlaceLike]) -> None:
    """`UnknownSite` for a place that no block of the model has."""
    layout = Layout(lm.root, lm.config, row)
    for site in given:
        if layout.layers(site) == []:
            layout.submodule(row.at(site, 0)[0].path)  # raises, with the paths that are near
            raise UnknownSite(
                f"no block of the model has the module that {site!r} is said to be at"
            )
