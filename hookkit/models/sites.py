"""Sites: the named activations of a model, as values. Nothing here imports torch.

    hk.Site("resid_post", 6)                    the residual stream after block 6
    hk.Site("z", 9, 3)                          head 3 of block 9, before the output projection
    hk.module("model.layers.3.mlp.gate_proj")   the output of any module

    hk.Site("z", 2, stack="encoder")            all heads of block 2 of an encoder-decoder's encoder
    hk.Site("z", 2, stack="vision")             the same in the tower that reads images

    hk.Site("feat.resid_post", 12, 7)           feature 7 of the dictionary of `resid_post.12`

As text these are "resid_post.6", "z.9.3", "model.layers.3.mlp.gate_proj:output", "encoder.z.2",
"vision.z.2" and "feat.resid_post.12.7". A layered name without a layer, such as "resid_post",
stands for every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, TypeGuard, overload

from ..arguments import as_integer, check_fields, check_keywords, describe
from ..display import count_of, render_html
from ..errors import BadHook, EmptySelection, OutOfRange, UnknownSite, Unsupported, did_you_mean

# The axes of every site. k and v have the key-value heads of grouped-query attention, fewer than q.
# q, k and v are the projections' outputs; q_rot and k_rot are what attention multiplies, after a
# norm and the rotation by position. While generating, the cache stores an edited k or v. An edit of
# k_rot is not stored: it is applied again to the keys that each step reads. In a block with
# experts, mlp_pre and mlp_post are "batch pos choice d_mlp", with the choices of the site experts.
AXES: dict[str, str] = {
    "embed": "batch pos d_model",
    "pos_embed": "batch pos d_model",
    "resid_pre": "batch pos d_model",
    "attn_in": "batch pos d_model",
    "q": "batch pos head d_head",
    "k": "batch pos kv_head d_head",
    "v": "batch pos kv_head d_head",
    "q_rot": "batch pos head d_head",
    "k_rot": "batch pos kv_head d_head",
    "scores": "batch head query key",
    "pattern": "batch head query key",
    "z": "batch pos head d_head",
    "attn_out": "batch pos d_model",
    "resid_mid": "batch pos d_model",
    "cross_in": "batch pos d_model",
    "cross_q": "batch pos head d_head",
    "cross_k": "batch pos kv_head d_head",
    "cross_v": "batch pos kv_head d_head",
    "cross_scores": "batch head query key",
    "cross_pattern": "batch head query key",
    "cross_z": "batch pos head d_head",
    "cross_out": "batch pos d_model",
    "cross_mid": "batch pos d_model",
    "mlp_in": "batch pos d_model",
    "router_logits": "batch pos expert",
    "experts": "batch pos choice",
    "expert_weights": "batch pos choice",
    "mlp_pre": "batch pos d_mlp",
    "mlp_post": "batch pos d_mlp",
    "mlp_out": "batch pos d_model",
    "resid_post": "batch pos d_model",
    "final_norm": "batch pos d_model",
    "lm_head": "batch pos vocab",
    "logits": "batch pos vocab",
}
SITES_WITHOUT_LAYER = frozenset({"embed", "pos_embed", "final_norm", "lm_head", "logits"})
CROSS_SITES = frozenset(name for name in AXES if name.startswith("cross_"))
SITES_WITH_HEADS = frozenset(name for name, axes in AXES.items() if "head" in axes)
SITES_WITH_KEY_HEADS = frozenset({"k", "v", "k_rot", "cross_k", "cross_v"})
# Their positions are queries, each with a number for every key.
QUERY_KEY_SITES = frozenset({"scores", "pattern", "cross_scores", "cross_pattern"})
# Their positions, or those of their keys, are the source's, which an encoder reads.
SOURCE_SITES = frozenset({"cross_k", "cross_v"})
LOGIT_SITES = frozenset({"lm_head", "logits"})
# The features of a dictionary at a site, "feat.resid_post". An LM has them `with_dictionaries`.
FEATURE_PREFIX = "feat."
SITES_OF_DICTIONARIES = (
    *("resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "resid_mid"),
    *("mlp_in", "mlp_pre", "mlp_post", "mlp_out", "resid_post"),
)
FEATURE_AXES = dict.fromkeys(
    map(FEATURE_PREFIX.__add__, SITES_OF_DICTIONARIES), "batch pos feature"
)
# Other lists of blocks than the one that writes text, and what their positions are.
STACKS = {
    "encoder": "the tokens of the source",
    "vision": "the patches of the row's images",
    "audio": "the frames of the row's sounds",
}


@check_fields
@dataclass(frozen=True, order=True, repr=False)
class Site:
    """A named activation: `Site("z", 9, 3)` is head 3 of `z` in block 9.

    Layers and heads count from 0. At the features of a dictionary, such as "feat.resid_post",
    `head` is the number of a feature. `stack` is "encoder" for a site in the encoder of an
    encoder-decoder, whose positions are those of the source, and "vision" or "audio" for one in the
    tower that reads images or sound, whose positions are the patches of a row's images, or frames;
    "" is the stack that writes text.
    """

    name: str
    layer: int | None = None
    head: int | None = None
    stack: str = ""

    def __repr__(self) -> str:
        stack = f", stack={self.stack!r}" if self.stack else ""
        return f"Site(name={self.name!r}, layer={self.layer}, head={self.head}{stack})"

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.stack and self.stack not in STACKS:
            raise UnknownSite(
                f"stack={self.stack!r} of {self.name!r} is unknown: say {' or '.join(STACKS)}, or "
                "leave it out"
            )
        object.__setattr__(self, "layer", _read_index(self.name, "layer", self.layer))
        object.__setattr__(self, "head", _read_index(self.name, "head", self.head))
        if self.layer is not None and self.name in SITES_WITHOUT_LAYER:
            raise UnknownSite(
                f"{self.name!r} exists once in the model and has no layer {self.layer}: "
                "leave it out"
            )
        if self.head is not None:
            self._check_head()

    def _check_head(self) -> None:
        if not self.of_features and self.name not in SITES_WITH_HEADS:
            names = ", ".join(sorted(SITES_WITH_HEADS))
            hint = ""
            if "d_mlp" in AXES[self.name]:
                hint = "; neurons are named by units= of hk.ablate, or in a function of hk.edit"
            raise UnknownSite(f"{self.name!r} has no heads{hint}; the sites with heads are {names}")
        if self.layer is None:
            part = "feature" if self.of_features else "head"
            raise UnknownSite(
                f"{part} {self.head} of {self.name!r} needs a layer: "
                f"Site({self.name!r}, layer, {part})"
            )

    @property
    def axes(self) -> str:
        """The names of the axes, without the head axis if the site is one head or feature."""
        axes = axes_of(self.name)
        if self.head is None:
            return axes
        if self.of_features:
            return axes.removesuffix(" feature")
        return axes.replace("kv_head ", "").replace("head ", "", 1)

    @property
    def of_features(self) -> bool:
        """True for the features of a dictionary."""
        return self.name.startswith(FEATURE_PREFIX)

    @property
    def base_name(self) -> str:
        """The name without "feat.", which for features is the name of their dictionary's site."""
        return self.name.removeprefix(FEATURE_PREFIX)

    @property
    def position_stack(self) -> str:
        """The stack whose positions it has: "encoder", "vision", "audio", or "" for the text."""
        return "encoder" if self.name in SOURCE_SITES else self.stack

    @property
    def every_layer(self) -> bool:
        """True for a layered name without a layer, which stands for all of them."""
        return self.layer is None and self.name not in SITES_WITHOUT_LAYER

    def _repr_html_(self) -> str:
        return render_html(f"site {self}", {"axes": self.axes})

    def __str__(self) -> str:
        parts = (self.stack or None, self.name, self.layer, self.head)
        return ".".join(str(part) for part in parts if part is not None)


def check_name(name: object) -> None:
    """Raises `UnknownSite` if a value is not the name of a site."""
    if not isinstance(name, str):
        raise UnknownSite(f"a site's name is a text such as 'resid_post', and not {describe(name)}")
    if name.startswith(FEATURE_PREFIX) and name not in FEATURE_AXES:
        raise UnknownSite(
            f"there is no site {name!r}: the sites that may have a dictionary are "
            f"{', '.join(SITES_OF_DICTIONARIES)}"
        )
    if name not in AXES and name not in FEATURE_AXES:
        raise UnknownSite(
            f"there is no site {name!r}{did_you_mean(name, AXES)} The sites are: "
            f"{', '.join(AXES)}. Any other tensor is hk.module(path, side='output')."
        )


def axes_of(name: str) -> str:
    """Returns the names of the axes of a site, or of the features of a dictionary."""
    return FEATURE_AXES.get(name) or AXES[name]


def _read_index(name: str, word: str, index: object) -> int | None:
    """Returns a layer or head as a whole number from 0; None if it is left out."""
    if index is None:
        return None
    number = as_integer(index)
    if number is None:
        raise UnknownSite(
            f"the {word} of {name!r} is {describe(index)}: give a whole number, counted from 0"
        )
    if number < 0:
        raise OutOfRange(f"{word} {number} of {name!r} was asked for: {word}s count from 0 upwards")
    return number


@dataclass(frozen=True, order=True)
class ModuleSite:
    """The input or output of any module, by its path.

    `item` selects one of several tensors: an index, or the name of a keyword.
    """

    path: str
    side: Literal["input", "output"] = "output"
    item: int | str = 0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise UnknownSite(
                f"path={describe(self.path)}: give the path of a module as a text, such as "
                "'model.layers.3.mlp'"
            )
        if self.side not in ("input", "output"):
            raise UnknownSite(f"side={self.side!r}: a module has side='input' and side='output'")
        if isinstance(self.item, str) and self.item:
            return
        item = as_integer(self.item)
        if item is None or item < 0:
            raise UnknownSite(
                f"item={describe(self.item)}: give the number of the tensor, counted from 0, or "
                "a keyword's name"
            )
        object.__setattr__(self, "item", item)

    # the properties of a Site: a module's tensor has no name, no other stack and no dictionary
    every_layer: ClassVar[bool] = False
    of_features: ClassVar[bool] = False
    stack: ClassVar[str] = ""
    position_stack: ClassVar[str] = ""

    def __str__(self) -> str:
        text = f"{self.path}:{self.side}"
        return text if self.item == 0 else f"{text}:{self.item}"


AnySite: TypeAlias = Site | ModuleSite


def has_name(site: AnySite, *names: str) -> TypeGuard[Site]:
    """True for a site with one of these names; never for the input or output of a module."""
    return isinstance(site, Site) and site.name in names


@check_keywords
def module(
    path: str, *, side: Literal["input", "output"] = "output", item: int | str = 0
) -> ModuleSite:
    """Returns the input or output of the module at `path` as a site; any `nn.Module` has them.

    `item` selects one of several tensors: an index into the output (or the positional inputs), or
    the name of a keyword. The axes are those of the module's tensor; `pos=` and `rows=` use axis 0
    as batch and axis 1 as pos.

    >>> str(module("model.layers.3.mlp.gate_proj"))
    'model.layers.3.mlp.gate_proj:output'
    """
    return ModuleSite(path, side, item)


def parse_site(text: str) -> AnySite:
    """Returns the site that a text names.

    >>> parse_site("z.9.3")
    Site(name='z', layer=9, head=3)
    """
    if ":" in text:
        return _parse_module(text)
    stack, _, rest = text.partition(".")
    if stack not in STACKS:
        stack, rest = "", text
    prefix = FEATURE_PREFIX if rest.startswith(FEATURE_PREFIX) else ""
    name, *numbers = rest.removeprefix(prefix).split(".")
    if len(numbers) > 2 or not all(re.fullmatch(r"-?\d+", number) for number in numbers):
        hint = "a path of the module tree is meant? Write hk.module(path, side='output')"
        raise UnknownSite(
            f"{text!r} does not name a site; sites look like 'resid_post.6' or 'z.9.3' ({hint})"
        )
    layer, head = [*map(int, numbers), None, None][:2]
    return Site(prefix + name, layer, head, stack)


def _parse_module(text: str) -> ModuleSite:
    path, side, *items = text.split(":")
    if len(items) > 1:
        raise UnknownSite(
            f"{text!r} does not name a site: a module is written path:side or path:side:item, and "
            f"{':'.join(items[1:])!r} comes after them"
        )
    item: int | str = items[0] if items else 0
    if isinstance(item, str) and item.isdigit():
        item = int(item)
    return ModuleSite(path, side, item)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, repr=False)
class Sites(Sequence[AnySite]):
    """A selection of sites, in order. It can be counted, printed and added to another one."""

    sites: tuple[AnySite, ...]

    @overload
    def __getitem__(self, index: int) -> AnySite: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> AnySite | Sites:
        return Sites(self.sites[index]) if isinstance(index, slice) else self.sites[index]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[AnySite]:
        return iter(self.sites)

    def __add__(self, other: SitesLike) -> Sites:
        return Sites(self.sites + as_sites(other).sites)

    def _repr_html_(self) -> str:
        rows = [{"site": str(site), "axes": getattr(site, "axes", "")} for site in self.sites]
        return render_html(count_of(len(self), "site"), rows=rows)

    def __repr__(self) -> str:
        names = list(map(str, self.sites))
        if len(names) > 6:
            names = [*names[:3], "…", *names[-2:]]
        return f"{count_of(len(self), 'site')}: {', '.join(names)}"


SitesLike: TypeAlias = str | AnySite | Iterable[str | AnySite]


def as_sites(sites: SitesLike) -> Sites:
    """Returns the selection that any notation of sites means.

    Raises `EmptySelection` for an empty one, `BadHook` for one that names a site twice, and
    `UnknownSite` for values that are not sites.
    """
    if isinstance(sites, str | Site | ModuleSite):
        sites = [sites]
    elif not isinstance(sites, Iterable) or isinstance(sites, bytes | Mapping):
        raise UnknownSite(
            f"{describe(sites)} is not a site: give a name such as 'resid_post.6', "
            "hk.Site('resid_post', 6), or a list"
        )
    selected = tuple(map(as_site, sites))
    if not selected:
        raise EmptySelection(
            "no site was given: name at least one, such as 'resid_post.6' or lm.sites('z')"
        )
    if len(selected) > 1 and len(set(selected)) < len(selected):
        repeated = [site for site in selected if selected.count(site) > 1]
        raise BadHook(f"{repeated[0]} is named twice in one hook: name each site once")
    return Sites(selected)


def refuse_stacks(sites: Iterable[AnySite], what: str) -> None:
    """Raises `Unsupported` for a site of an encoder or a tower, which has other positions.

    `what` says which positions are needed.
    """
    for site in sites:
        if site.stack:
            raise Unsupported(
                f"{site} has {STACKS[site.stack]} as positions, and {what}: use hk.forward with "
                "hk.capture, or with each hook"
            )


def as_site(item: object) -> AnySite:
    """Returns the site that a name or a site means. Raises `UnknownSite` for any other value."""
    if isinstance(item, str):
        return parse_site(item)
    if not isinstance(item, Site | ModuleSite):
        raise UnknownSite(
            f"{describe(item)} is not a site: give a name such as 'resid_post.6', or "
            "hk.Site('resid_post', 6)"
        )
    return item
