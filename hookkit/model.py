"""LM: a model, its tokenizer, and the names of its places.

lm = hk.LM(model, tokenizer)      # what you already hold, untouched
lm.describe()                     # every site, with sizes, and why one is missing
lm.sites("z", layers=[3, 4])      # a selection that can be counted and printed
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import nn

from .arguments import checks_construction
from .arguments import described as shown_value
from .describing import described
from .displaying import records, shown
from .errors import BadArgument
from .families import Family, Place
from .finding import row_of
from .layout import Layout, text_config
from .placement import count, device_of, places_of
from .selecting import SiteNames
from .sharding import Ranks, ranks_of
from .sites import AnySite, Site, Sites, SitesLike, as_sites
from .vocabulary import Token, Vocabulary
from .wrapped import adapters, unwrapped


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
            swapped = "; the model comes first, then the tokenizer" if isinstance(self.tokenizer, nn.Module) else ""
            raise BadArgument(
                f"LM needs the model itself, an nn.Module, and was given {type(self.model).__name__} "
                f"{str(self.model)[:60]!r}; to load one by name, use hk.load(name){swapped}"
            )
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", tokenizer_of(self.tokenizer))
        if not isinstance(self.name, str):
            raise BadArgument(f"LM has name={shown_value(self.name)}: give a text, by which results call the model")
        if self.row is not None and not isinstance(self.row, Family):
            raise BadArgument(f"LM has row={shown_value(self.row)}: give a row of the families' table, hk.family(…)")

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

    @cached_property
    def config(self) -> Any:
        return getattr(self.root, "config", None)

    @cached_property
    def family(self) -> Family:
        """The row of the families' table that says where this model's sites are.

        For a causal language model whose family is not in the table, the row is found out by one dry run of a few
        tokens, at the first use; see `Family.found`.
        """
        return self.row if self.row is not None else row_of(self.root, self.config, self.head_path())

    @property
    def two_texts(self) -> bool:
        """True for an encoder-decoder, which reads one text and writes another: a position may be of either."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def head_path(self) -> str | None:
        find = getattr(self.root, "get_output_embeddings", None)
        head = find() if find else None
        return next((path for path, found in self.root.named_modules() if found is head), None) if head else None

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
        if "return_dict" in settings and self._takes_any:  # transformers takes it wherever a forward is its own
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
        facts = {"class": type(self.root).__name__, "sizes": ", ".join(f"{n} {size}" for n, size in sizes.items())}
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

    def located(self, sites: Sites) -> dict[AnySite, Place]:
        """Where each site of a selection is, with every layer written out."""
        if sites not in self._located:
            self._located[sites] = {site: self.place(site) for site in self.expand(sites)}
        return self._located[sites]

    @cached_property
    def _located(self) -> dict[Sites, dict[AnySite, Place]]:
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

    def place(self, site: AnySite) -> Place:
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
        if all(callable(getattr(candidate, name, None)) for name in ("encode", "decode", "convert_ids_to_tokens")):
            return candidate
    raise BadArgument(
        f"{shown_value(tokenizer)} is no tokenizer of transformers, and no processor that holds one: give "
        "AutoTokenizer.from_pretrained(name), or leave it out and give token ids as prompts"
    )


def as_lm(model: LM | nn.Module) -> LM:
    """The LM itself, or one around a bare module."""
    return model if isinstance(model, LM) else LM(model)  # raises where it is no model
