"""LM: a model, its tokenizer, and the names of its places.

lm = hk.LM(model, tokenizer)      # what you already hold, untouched
lm.describe()                     # every site, with sizes, and why one is missing
lm.sites("z", layers=[3, 4])      # a selection that can be counted and printed

`lm.sites`: called, it selects sites; and it has each name that the model has, for a notebook to complete.

What `LM.describe` says beside the table of sites: whose adapters, where the weights are, how it is split.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..arguments import checks_construction, checks_keywords, whole_numbers
from ..arguments import described as shown_value
from ..display import records, shown
from ..errors import BadArgument, BadHook, HookkitError
from .devices import count, device_of, place_at, places_of, told
from .discovery.discover import row_of
from .families.schema import Family, ModuleLocation
from .layout import Layout, text_config
from .sites import AXES, WHOLE_MODEL, AnySite, Site, Sites, SitesLike, as_sites
from .tensor_parallel import Ranks, ranks_of
from .tokens import Token, Vocabulary
from .wrappers import adapters, adapters_of, unwrapped

Expand = Callable[[SitesLike], Sites]


class SiteNames:
    """The sites of a model by name: `lm.sites("z", layers=[3])` is a selection, `lm.sites.z` that of all layers."""

    def __init__(self, names: Callable[[], list[str]], expand: Expand) -> None:
        self._names, self._expand = names, expand

    def __call__(
        self,
        names: str | Iterable[str] | None = None,
        *,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        **unknown: Any,
    ) -> Sites:
        return sites(self, names, layers=layers, heads=heads, **unknown)

    def __getattr__(self, name: str) -> Sites:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._expand(name)
        except HookkitError as error:
            raise AttributeError(str(error)) from error

    def __getitem__(self, site: str) -> Sites:
        return self._expand(site)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names()]

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers behind `lm.sites["`: every name, and every layer of each."""
        every = self._expand(self._names())
        return [*self._names(), *(str(site) for site in every if str(site) not in self._names())]

    def __repr__(self) -> str:
        return f"sites {', '.join(self._names())}: lm.sites(names, layers=, heads=) selects some"

    def _repr_html_(self) -> str:
        names = self._names()
        return shown(
            "sites", rows=[{"site": name, "axes": AXES[name]} for name in names], most=len(names)
        )


@checks_keywords
def sites(
    of: SiteNames,
    names: str | Iterable[str] | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Sites:
    """The selection of sites with these names, in the layers and heads given (all, where left out)."""
    if layers is not None:
        layers = whole_numbers(layers, "layers", least=0, meaning="the layers, counted from 0,")
    if heads is not None:
        heads = whole_numbers(heads, "heads", least=0, meaning="the heads, counted from 0,")
    if names is None:
        names = [name for name in of._names() if layers is None or name not in WHOLE_MODEL]
    chosen: list[AnySite] = []
    for site in as_sites(names):
        for each in of._expand([site] if layers is None else _in_layers(site, layers)):
            chosen += [each] if heads is None else _of_heads(each, heads)
    return of._expand(chosen)


def _in_layers(site: AnySite, layers: Iterable[int]) -> list[AnySite]:
    if not isinstance(site, Site) or site.layer is not None:
        raise BadHook(
            f"{site} says its own place: leave layers= out, or give the site's name alone"
        )
    return [Site(site.name, layer) for layer in layers]


def _of_heads(site: AnySite, heads: Iterable[int]) -> list[AnySite]:
    if not isinstance(site, Site) or site.head is not None:
        raise BadHook(f"{site} says its own place: leave heads= out, or give the site's name alone")
    return [Site(site.name, site.layer, head) for head in heads]


def described(lm: Any) -> pd.DataFrame:
    """The table of all sites; see `LM.describe`."""
    table = lm.layout.describe()
    places = lm.places
    if len(set(places.values())) > 1:
        table["place"] = [_place(lm, name, places) for name in table["site"]]
    if lm.ranks is not None:
        table["split"] = [_split(lm, name) for name in table["site"]]
    if lm.adapters:
        table["adapters"] = [_adapters(lm, name) for name in table["site"]]
    return table


def _place(lm: Any, name: str, places: dict[str, str]) -> str:
    """Where the weights are of the modules that have a site; of the logits, those of the head."""
    if name not in lm.layout.names:
        return ""
    layers = lm.layout.layers(name)
    if layers is None:
        return place_at(places, lm.place(Site(name)).path or lm.head_path() or "")
    return told((layer, place_at(places, lm.place(Site(name, layer)).path)) for layer in layers)


def _split(lm: Any, name: str) -> str:
    """Along which axis the tensor of a site is split among processes, and how much of it each has."""
    assert lm.ranks is not None
    found: list[str] = []
    for site, place in lm.located(lm.sites(name)).items() if name in lm.layout.names else ():
        split = lm.ranks.splits.get((place.path, place.side, place.item))
        if split is not None and isinstance(site, Site):
            axis = next(
                axis for axis in site.axes.split() if axis not in ("batch", "pos", "query", "key")
            )
            one = max(
                1, sum(split.sizes) // (lm.layout.sizes_of(site.layer)[axis] or sum(split.sizes))
            )
            found.append(f"{axis} {'+'.join(str(size // one) for size in split.sizes)}")
    return "; ".join(dict.fromkeys(found))


def _adapters(lm: Any, name: str) -> str:
    places = lm.located(lm.sites(name)).values() if name in lm.layout.names else ()
    found = [adapter for place in places for adapter in adapters_of(lm.submodule(place.path))]
    return ", ".join(dict.fromkeys(found))


@checks_construction
@dataclass(frozen=True, eq=False, repr=False)
class LM:
    """A causal language model of transformers and its tokenizer, both left as they are.

    With `tokenizer=None`, prompts are token ids. Any other `nn.Module` can be given too: it has no named sites, and
    its modules are reached with `hk.module(path)`. `row` says where its sites are; it is looked up by the model's type
    where it is left out.
    """

    model: nn.Module
    tokenizer: Any = None
    name: str = ""
    row: Family | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            swapped = (
                "; the model comes first, then the tokenizer"
                if isinstance(self.tokenizer, nn.Module)
                else ""
            )
            raise BadArgument(
                f"LM needs the model itself, an nn.Module, and was given {type(self.model).__name__} "
                f"{str(self.model)[:60]!r}; to load one by name, use hk.load(name){swapped}"
            )
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))
        if not isinstance(self.name, str):
            raise BadArgument(
                f"LM has name={shown_value(self.name)}: give a text, by which results call the model"
            )
        if self.row is not None and not isinstance(self.row, Family):
            raise BadArgument(
                f"LM has row={shown_value(self.row)}: give a row of the families' table, hk.family(…)"
            )

    # ---- the model

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: the model and its tokenizer; what was found out about them is found out again."""
        return {name: getattr(self, name) for name in ("model", "tokenizer", "name", "row")}

    @cached_property
    def wrapping(self) -> tuple[nn.Module, ...]:
        """The model, and what it wraps: that of `torch.compile`, or of PEFT."""
        return unwrapped(self.model)

    @cached_property
    def root(self) -> nn.Module:
        """The model that paths are counted from: transformers' own, whatever it is wrapped in."""
        return self.wrapping[-1]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of PEFT's adapters."""
        return tuple(adapters(self.wrapping))

    @cached_property
    def decoder(self) -> tuple[nn.Module, ...]:
        """The model without its head, where it can be run by itself; else nothing."""
        find = getattr(self.root, "get_decoder", None)
        found = find() if callable(find) else None
        return (found,) if isinstance(found, nn.Module) and found is not self.root else ()

    @cached_property
    def ranks(self) -> Ranks | None:
        """The processes that hold the model together, by tensor parallelism; None where it is whole in this one."""
        return ranks_of(self.root)

    @property
    def is_writer(self) -> bool:
        """True where this process writes the files of the model; of the ranks of a split model only the first does."""
        return self.ranks is None or self.ranks.rank == 0

    @cached_property
    def config(self) -> Any:
        return getattr(self.root, "config", None)

    @cached_property
    def family(self) -> Family:
        """The row of the families' table that says where this model's sites are.

        For a causal language model whose family is not in the table, the row is found out by one dry run of a few
        tokens, at the first use; see `Family.found`.
        """
        return (
            self.row if self.row is not None else row_of(self.root, self.config, self.head_path())
        )

    @property
    def two_texts(self) -> bool:
        """True for an encoder-decoder, which reads one text and writes another: a position may be of either."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def head_path(self) -> str | None:
        find = getattr(self.root, "get_output_embeddings", None)
        head = find() if find else None
        return (
            next((path for path, found in self.root.named_modules() if found is head), None)
            if head
            else None
        )

    @cached_property
    def layout(self) -> Layout:
        """That row, laid over this model's modules."""
        return Layout(self.root, text_config(self.config), self.family)

    @property
    def sizes(self) -> dict[str, int | None]:
        """The length of each axis that the model fixes; None where the family has no such axis."""
        return self.layout.sizes

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return self.layout.n_layers

    @cached_property
    def n_tokens(self) -> int:
        """How many rows of the vocabulary are real tokens; the rows after them are padding, and are never ranked."""
        return self._vocabulary.n_tokens

    @cached_property
    def context(self) -> int | None:
        """How many tokens the model can read at once, where its configuration says."""
        return getattr(text_config(self.config), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the token ids have to be."""
        found = device_of(self._first)
        return getattr(self.root, "device", found) if found.type == "meta" else found

    @cached_property
    def _first(self) -> nn.Module:
        find = getattr(self.root, "get_input_embeddings", None)
        return find() if callable(find) else self.root  # pyright: ignore[reportReturnType]

    @cached_property
    def takes(self) -> frozenset[str]:
        """The names of the arguments of the model's forward."""
        return frozenset(inspect.signature(self.root.forward).parameters)

    @cached_property
    def _takes_any(self) -> bool:
        parameters = inspect.signature(self.root.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def accepts(self, name: str) -> bool:
        """True if the model's forward can be given an argument of this name."""
        return name in self.takes or self._takes_any

    def accepted(self, **settings: Any) -> dict[str, Any]:
        """Those of some settings of a forward that the model knows: the others would mean nothing to it."""
        known = {name: value for name, value in settings.items() if name in self.takes}
        if "logits_to_keep" in known:
            known["logits_to_keep"] = self.logits_to_keep(known["logits_to_keep"])
        if (
            "return_dict" in settings and self._takes_any
        ):  # transformers takes it wherever a forward is its own
            known["return_dict"] = settings["return_dict"]
        return known

    def logits_to_keep(self, last: int) -> int | list[int]:
        """The argument of a forward that has the logits of the last so many positions computed; 0 for all.

        A model whose last blocks share the keys of earlier ones (Gemma 4) takes a number as leave to run these blocks
        at those positions only, where hooks at the others would find nothing. Positions it takes for the logits alone.
        """
        shares = getattr(self.config, "num_kv_shared_layers", 0)
        return list(range(-last, 0)) if shares and last else last

    def __repr__(self) -> str:
        size = count(self.root) / 1e6
        name = self.name or type(self.root).__name__
        adapted = f"; adapters: {', '.join(self.adapters)}" if self.adapters else ""
        family = f"{self.family.name}{' (found out by a dry run)' if self.family.found else ''}"
        size = f"{self.n_layers} layers, {size:.1f} M parameters"
        return f"LM({name}: {family}, {size}, on {self.device}{adapted})"

    def _repr_html_(self) -> str:
        words = ("d_model", "head", "kv_head", "d_head", "d_mlp", "expert", "vocab")
        sizes = {name: self.sizes[name] for name in words if self.sizes.get(name) is not None}
        facts = {
            "class": type(self.root).__name__,
            "sizes": ", ".join(f"{n} {size}" for n, size in sizes.items()),
        }
        there = self.describe()
        columns = ("site", "axes", "layers", "editable")
        rows = records(there[there["missing"] == ""], *columns, most=len(there))
        return shown(repr(self), facts, rows, most=len(there))

    # ---- its sites

    @property
    def sites(self) -> SiteNames:
        """Called, the selection of sites with these names, in the layers and heads given (all, where left out).

        `lm.sites.z` is that of all layers of one name, and what a notebook completes behind `lm.sites.` or
        `lm.sites["` are the names that the model has.

        >>> lm.sites("z", layers=[17, 18], heads=[2])
        2 sites: z.17.2, z.18.2
        >>> lm.sites.resid_post[-1], lm.sites["z.3"]
        (Site(name='resid_post', layer=29, head=None), 1 site: z.3)
        """
        return SiteNames(lambda: self.layout.names, self.expand)

    def located(self, sites: Sites) -> dict[AnySite, ModuleLocation]:
        """Where each site of a selection is, with every layer written out."""
        if sites not in self._located:
            self._located[sites] = {site: self.place(site) for site in self.expand(sites)}
        return self._located[sites]

    @cached_property
    def _located(self) -> dict[Sites, dict[AnySite, ModuleLocation]]:
        return {}

    @cached_property
    def learnt(self) -> dict[Any, Any]:
        """What was found out about this model by trial, to be tried once only."""
        return {}

    def expand(self, sites: SitesLike) -> Sites:
        """The same selection with every layer written out, checked against this model."""
        chosen: list[AnySite] = []
        for site in as_sites(sites):
            spread: list[AnySite] = [site]
            if isinstance(site, Site) and site.every_layer:
                spread = [Site(site.name, layer) for layer in self._layers(site)]
            for each in spread:
                self.place(each)
            chosen += spread
        return as_sites(chosen)

    def _layers(self, site: Site) -> list[int]:
        """The blocks that a layered name without a layer stands for: those that have the site."""
        if site.name not in self.layout.names:
            self.place(Site(site.name, 0))  # raises, with the reason
        return self.layout.layers(site.name) or []

    def shape(self, site: Site) -> tuple[int, ...]:
        """The sizes of a site's axes behind batch and pos."""
        return self.layout.shape(site)

    def place(self, site: AnySite) -> ModuleLocation:
        """Where a site is in this model's module tree. `MissingSite` or `OutOfRange` where it has none."""
        return self.layout.place(site)

    def submodule(self, path: str) -> nn.Module:
        """The module at a path, or `UnknownSite` with the nearest paths."""
        return self.layout.submodule(path)

    def describe(self) -> pd.DataFrame:
        """The table of all sites, one row each.

        Columns: site, axes, sizes (numbers where the model fixes them), layers (how many have it), module, side,
        editable, missing (the reason, empty where the site is there); where the model has adapters, adapters: the
        names of those in the module; and where its weights are in more than one place, place: where those of the site's
        module are between forwards, such as "cuda:0 in 0-3, disk in 4-7" (blocks), "cpu" or "disk". Where processes
        hold it together, split: along which axis, and how much of it each has, as far as a hook has been there.
        """
        return described(self)

    @property
    def places(self) -> dict[str, str]:
        """Where each weight is between forwards, by its name: "cpu", "cuda:0" …, or "disk"."""
        return places_of(self.root)

    # ---- its tokens

    def token(self, token: Token) -> int:
        """The id of one token, given as text or as the id itself.

        Text that is not exactly one token raises `NotOneToken`, which shows the pieces and the nearest spellings that
        are one.
        """
        return self._vocabulary.token(token)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens, without the special tokens that begin a prompt."""
        return self._vocabulary.encode(text)

    def continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on from another one: the space that it begins with is its own, also where the
        tokenizer puts a space before every text."""
        return self._vocabulary.continuation(text)

    def added(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that tokens add behind others, so that the two texts together are the text of all of them."""
        return self._vocabulary.added(before, ids)

    def string(self, token_id: int) -> str:
        """The text of one token, its leading space kept. Without a tokenizer, the id in angle brackets."""
        return self._vocabulary.string(token_id)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a row of tokens, special tokens included."""
        return self._vocabulary.text(ids)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, lambda: self.sizes["vocab"])


def tokenizer_of(tokenizer: Any) -> Any:
    """The tokenizer itself, also where a processor that holds one is given; `BadArgument` for anything else."""
    for candidate in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if all(
            callable(getattr(candidate, name, None))
            for name in ("encode", "decode", "convert_ids_to_tokens")
        ):
            return candidate
    raise BadArgument(
        f"{shown_value(tokenizer)} is no tokenizer of transformers, and no processor that holds one: give "
        "AutoTokenizer.from_pretrained(name), or leave it out and give token ids as prompts"
    )


def as_lm(model: LM | nn.Module) -> LM:
    """The LM itself, or one around a bare module."""
    return model if isinstance(model, LM) else LM(model)  # raises where it is no model
