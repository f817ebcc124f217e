"""LM: a model, its tokenizer, and the names of its sites.

lm = hk.LM(model, tokenizer)      # a model that the user already holds, unchanged
lm.describe()                     # every site, with sizes, and why one is missing
lm.sites("z", layers=[3, 4])      # a selection that can be counted and printed

`SiteNames` is the object at `lm.sites`: calling it selects sites, and its attributes are the names
that the model has, for a notebook to complete. The functions after it add columns to the table of
`LM.describe`: adapters, devices of the weights, and how the model is split among processes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_fields, check_integers, check_keywords, describe
from ..display import first_rows, render_html
from ..errors import BadArgument, BadHook, HookkitError, Unsupported
from ..files.untrusted import check_folder
from .devices import (
    Ranks,
    count_parameters,
    describe_storages,
    device_of,
    find_ranks,
    storage_under_path,
    weight_storages,
)
from .dictionaries import SiteDictionary, by_feature_site
from .discovery.discover import decoder_path, resolve_family
from .engine import Engine, not_in_engine
from .families.schema import Family, ModuleLocation
from .layout import Layout, is_masked_lm, text_config
from .model_setup import (
    adapter_names,
    layer_adapter_names,
    layers_without_gradient,
    warn_of_incomplete_attention,
    wrapper_chain,
)
from .sites import (
    AXES,
    SITES_WITHOUT_LAYER,
    AnySite,
    ModuleSite,
    Site,
    Sites,
    SitesLike,
    as_site,
    as_sites,
)
from .tokens import Token as Token
from .tokens import Vocabulary

UNSPLIT_AXES = ("batch", "pos", "query", "key")


class SiteNames:
    """The sites of a model by name.

    `lm.sites("z", layers=[3])` is a selection, and `lm.sites.z` the selection of all layers.
    """

    def __init__(self, lm: LM) -> None:
        self._lm = lm

    def __call__(
        self,
        names: str | Iterable[str] | None = None,
        *,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        **unknown: Any,
    ) -> Sites:
        return sites(self._lm, names, layers=layers, heads=heads, **unknown)

    def __getattr__(self, name: str) -> Sites:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._lm.expand(name)
        except HookkitError as error:
            raise AttributeError(str(error)) from error

    def __getitem__(self, site: str) -> Sites:
        return self._lm.expand(site)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._lm.layout.names]

    def _ipython_key_completions_(self) -> list[str]:
        """Completions after `lm.sites["`: every name, and every layer of each."""
        names = self._lm.layout.names
        all_sites = map(str, self._lm.expand(names))
        return list(dict.fromkeys([*names, *all_sites, *map(str, self._lm.layout.dictionaries)]))

    def __repr__(self) -> str:
        names = ", ".join(self._lm.layout.names)
        return f"sites {names}: lm.sites(names, layers=, heads=) selects some"

    def _repr_html_(self) -> str:
        rows = [{"site": name, "axes": AXES[name]} for name in self._lm.layout.names]
        return render_html("sites", rows=rows, most=len(rows))


@check_keywords
def sites(
    of: LM,
    names: str | Iterable[str] | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Sites:
    """Returns the selection of sites with these names, in these layers and heads (default all)."""
    if names is None:
        names = of.layout.names
        if layers is not None:
            names = [name for name in names if name not in SITES_WITHOUT_LAYER]
    selected = as_sites(names)
    if layers is not None:
        selected = _at_each(selected, "layer", layers)
    selected = of.expand(selected)
    if heads is not None:
        selected = of.expand(_at_each(selected, "head", heads))
    return selected


def _at_each(sites: Sites, axis: Literal["layer", "head"], numbers: Iterable[int]) -> Sites:
    """Returns each of the sites in these layers or heads."""
    meaning = f"the {axis}s, counted from 0,"
    numbers = check_integers(numbers, f"{axis}s", least=0, meaning=meaning)
    selected: list[AnySite] = []
    for site in sites:
        if not isinstance(site, Site) or getattr(site, axis) is not None:
            raise BadHook(
                f"{axis}s= does not apply to {site}: leave {axis}s= out, or give the site's name "
                "alone"
            )
        selected += [replace(site, **{axis: number}) for number in numbers]
    return as_sites(selected)


def _devices(lm: LM, weights: dict[str, str], name: str) -> str:
    """Returns where the weights of the modules of a site are; for the logits, those of the head."""
    storages: dict[int | None, str] = {}
    for site, location in _locations(lm, name).items():
        path = location.path or lm.head_path() or ""
        storages[site.layer] = storage_under_path(weights, path)
    return describe_storages(storages.items())


def _splits(lm: LM, ranks: Ranks, name: str) -> str:
    """Returns the axis along which a site is split among processes, and the size of each part."""
    texts: list[str] = []
    for site, location in _locations(lm, name).items():
        split = ranks.splits.get((location.path, location.side, location.item))
        if split is None:
            continue
        axes = [axis for axis in site.axes.split() if axis not in UNSPLIT_AXES]
        total = sum(split.sizes)
        # The tensor's axis may be a site's axis times another one, as heads times d_head.
        unit = max(1, total // (lm.layout.sizes_of(site.layer)[axes[0]] or total))
        sizes = "+".join(str(size // unit) for size in split.sizes)
        texts.append(f"{axes[0]} {sizes}")
    return "; ".join(dict.fromkeys(texts))


def _adapters(lm: LM, name: str) -> str:
    names: list[str] = []
    for location in _locations(lm, name).values():
        names += layer_adapter_names(lm.submodule(location.path))
    return ", ".join(dict.fromkeys(names))


def _locations(lm: LM, name: str) -> dict[Site, ModuleLocation]:
    """Returns the locations of the sites of one name; empty if the model does not have it."""
    if name not in lm.layout.names:
        return {}
    return lm.located(lm.sites(name))  # pyright: ignore[reportReturnType]  no module among them


@check_fields
@dataclass(frozen=True, eq=False, repr=False)
class LM(Vocabulary):
    """A causal language model of transformers and its tokenizer, both unchanged.

    With `tokenizer=None`, prompts are token ids. A processor, which reads images or sound too, is
    given in the tokenizer's place: it becomes `processor`, and its tokenizer `tokenizer`. What it
    returns is a prompt, and so is a chat with images. Any other `nn.Module` can be
    used too: it has no named sites, and its modules are selected with `hk.module(path)`. `row` says
    where the sites are; by default it is looked up by the model's type. With an `engine`, the model
    itself is in another process, and `model` has its modules without weights.

    The LM owns what it computes about the model once: its layout, its vocabulary and the results of
    trials.
    """

    model: nn.Module
    tokenizer: Any = None
    name: str = ""
    row: Family | None = None
    dictionaries: tuple[SiteDictionary, ...] = ()
    processor: Any = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        self._check_model()
        if self.tokenizer is not None:
            tokenizer = tokenizer_of(self.tokenizer)
            if tokenizer is not self.tokenizer:
                object.__setattr__(self, "processor", self.tokenizer)
            object.__setattr__(self, "tokenizer", tokenizer)
        if not isinstance(self.name, str):
            raise BadArgument(
                f"LM has name={describe(self.name)}: give a text, the model's name in results"
            )
        if self.row is not None and not isinstance(self.row, Family):
            raise BadArgument(
                f"LM has row={describe(self.row)}: give a row of the table of families, "
                "hk.family(…)"
            )
        if device_of(self.model).type != "meta":  # else an engine computes the attention
            warn_of_incomplete_attention(self.model)

    def _check_model(self) -> None:
        if isinstance(self.model, nn.Module):
            return
        hint = ""
        if isinstance(self.tokenizer, nn.Module):
            hint = "; the model comes first, then the tokenizer"
        raise BadArgument(
            f"LM needs the model itself, an nn.Module, and was given "
            f"{type(self.model).__name__} {str(self.model)[:60]!r}; to load one by name, use "
            f"hk.load(name){hint}"
        )

    # ---- the model

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields only: a copy computes the rest again."""
        if self.engine is not None:
            self.engine.refuse_copy()
        names = ("model", "tokenizer", "name", "row", "dictionaries", "processor", "engine")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def wrapping(self) -> tuple[nn.Module, ...]:
        """The model, and what `torch.compile` or PEFT wrapped in it, outermost first."""
        return wrapper_chain(self.model)

    @cached_property
    def root(self) -> nn.Module:
        """The transformers model inside all wrappers. Module paths are counted from it."""
        return self.wrapping[-1]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of PEFT's adapters."""
        return tuple(adapter_names(self.wrapping))

    @cached_property
    def decoder(self) -> tuple[nn.Module, ...]:
        """The model without its head as a tuple of one, or an empty tuple if it has none."""
        decoder = _call_method(self.root, "get_decoder")
        if isinstance(decoder, nn.Module) and decoder is not self.root:
            return (decoder,)
        return ()

    @cached_property
    def stack_modules(self) -> dict[nn.Module, str]:
        """The encoder or the towers, which `generate` may run by themselves, with their stacks."""
        modules: dict[nn.Module, str] = {}
        for stack, family in self.family.stacks.items():
            if family.tower is None:
                modules[_call_method(self.root, "get_encoder")] = stack
            else:
                modules[self.root.get_submodule(family.tower.path)] = stack
        return modules

    @property
    def towers(self) -> dict[str, Layout]:
        """The layouts of the stacks that read images or sound."""
        stacks = self.layout.stacks.items()
        return {stack: layout for stack, layout in stacks if layout.family.tower is not None}

    @cached_property
    def ranks(self) -> Ranks | None:
        """The processes of tensor parallelism; None if this process has the whole model."""
        return find_ranks(self.root)

    @property
    def is_writer(self) -> bool:
        """True if this process writes files; of several ranks only the first does."""
        return self.ranks is None or self.ranks.rank == 0

    @cached_property
    def config(self) -> Any:
        return getattr(self.root, "config", None)

    @cached_property
    def family(self) -> Family:
        """The row of the table of families that says where this model's sites are.

        For a causal language model whose family is not in the table, the first use runs the model
        once on a few tokens and derives the row; see `Family.found`.
        """
        if self.row is not None:
            return self.row
        return resolve_family(self.root, self.config, self.head_path())

    @property
    def two_texts(self) -> bool:
        """True for an encoder-decoder: it reads one text and writes another."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def decodes_in_pieces(self) -> bool:
        """True if the model's own `generate` calls transformers' for each piece of a long sound.

        It returns other tokens than the decoder reads.
        """
        return self.two_texts and "input_features" in self.takes

    def why_no_positions(self, site: AnySite) -> str:
        """Returns why the positions in a module's tensor are not known; "" if they are.

        They are those of the text, unless the model reads more than one text.
        """
        if not isinstance(site, ModuleSite):
            return ""
        if self.two_texts:
            return f"an encoder-decoder reads two texts, so a position at {site} may be of either"
        if self._text_modules is None or _is_along(site.path, self._text_modules):
            return ""
        stacks = " or ".join(f"{stack}.z" for stack in self.towers) or "resid_post"
        return (
            f"{site} is outside the text model, and its rows and positions are not those of the "
            f"text; named sites such as {stacks} have rows and positions"
        )

    @cached_property
    def _text_modules(self) -> tuple[str, ...] | None:
        """The paths of the decoder and the head of a language model that reads more than text.

        None for other models.
        """
        head = self.head_path()
        if self.two_texts or head is None or text_config(self.config) is self.config:
            return None
        return decoder_path(self.root), head

    @cached_property
    def is_masked(self) -> bool:
        """True for a masked language model, such as BERT, which fills masks and writes no text."""
        return is_masked_lm(self.root)

    def refuse_engine(self, what: str) -> None:
        """Raises `Unsupported` if the model computes in an engine, where `what` is impossible."""
        if self.engine is not None:
            raise not_in_engine(what)

    def refuse_next_token(self) -> None:
        """Raises `Unsupported` for a masked language model.

        It is for functions whose default is the position that chooses the next token.
        """
        if self.is_masked:
            mask = getattr(self.tokenizer, "mask_token", None) or "[MASK]"
            raise Unsupported(
                f"{type(self.root).__name__} is a masked language model, which writes no next "
                f"token: say which token of the text is meant, such as pos=hk.at({mask!r})"
            )

    def head_path(self) -> str | None:
        """Returns the path of the output embedding, or None if the model has none."""
        head = _call_method(self.root, "get_output_embeddings")
        return next((path for path, module in self.root.named_modules() if module is head), None)

    @cached_property
    def layout(self) -> Layout:
        """The locations of the family's sites in this model's modules."""
        stacks: dict[str, Layout] = {}
        for stack, family in self.family.stacks.items():
            stacks[stack] = Layout(self.root, text_config(self.config, stack), family)
        dictionaries = by_feature_site(self.dictionaries)
        return Layout(self.root, text_config(self.config), self.family, stacks, dictionaries)

    @property
    def sizes(self) -> dict[str, int | None]:
        """The length of each axis that the model fixes; None where the family has no such axis."""
        return self.layout.sizes

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.layout.n_layers

    @cached_property
    def context(self) -> int | None:
        """The number of tokens that the model can read at once, if its configuration says it."""
        if self.engine is not None:
            return self.engine.facts["context"] - 1  # vLLM never reads the last token
        return getattr(text_config(self.config), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """The device on which token ids have to be."""
        if self.engine is not None:
            return torch.device("cpu")
        device = device_of(self._embedding)
        if device.type == "meta":
            return getattr(self.root, "device", device)
        return device

    @cached_property
    def _embedding(self) -> nn.Module:
        return _call_method(self.root, "get_input_embeddings") or self.root

    @cached_property
    def takes(self) -> frozenset[str]:
        """The names of the parameters of the model's forward."""
        return frozenset(inspect.signature(self.root.forward).parameters)

    @cached_property
    def _takes_any(self) -> bool:
        parameters = inspect.signature(self.root.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def accepts(self, name: str) -> bool:
        """True if the model's forward accepts an argument of this name."""
        return name in self.takes or self._takes_any

    def accepted(self, **settings: Any) -> dict[str, Any]:
        """Returns those settings of a forward that are parameters of this model's forward."""
        accepted = {name: value for name, value in settings.items() if name in self.takes}
        if "logits_to_keep" in accepted:
            accepted["logits_to_keep"] = self.logits_to_keep(accepted["logits_to_keep"])
        # A transformers forward with keyword arguments accepts return_dict without naming it.
        if "return_dict" in settings and self._takes_any:
            accepted["return_dict"] = settings["return_dict"]
        return accepted

    def logits_to_keep(self, last: int) -> int | list[int]:
        """Returns the forward argument for the logits of the `last` positions only; 0 for all.

        With a number, a model whose last blocks share the keys of earlier ones (Gemma 4) runs these
        blocks at the last positions only, and hooks at the other positions would never fire. With a
        list of positions it restricts the logits alone.
        """
        if last and getattr(text_config(self.config), "num_kv_shared_layers", 0):
            return list(range(-last, 0))
        return last

    def __repr__(self) -> str:
        name = self.name or type(self.root).__name__
        family = self.family.name
        if self.family.found:
            family += " (found out by a dry run)"
        size = f"{self.n_layers} layers, {count_parameters(self.root) / 1e6:.1f} M parameters"
        place = f"on {self.device}" if self.engine is None else "in an engine of vLLM"
        text = f"{name}: {family}, {size}, {place}"
        if self.adapters:
            text += f"; adapters: {', '.join(self.adapters)}"
        if self.dictionaries:
            text += f"; dictionaries: {', '.join(map(str, self.dictionaries))}"
        return f"LM({text})"

    def _repr_html_(self) -> str:
        axes = ("d_model", "head", "kv_head", "d_head", "d_mlp", "expert", "vocab")
        sizes = [f"{axis} {self.sizes[axis]}" for axis in axes if self.sizes.get(axis) is not None]
        facts = {"class": type(self.root).__name__, "sizes": ", ".join(sizes)}
        table = self.describe()
        columns = ("site", "axes", "layers", "editable")
        rows = first_rows(table[table["missing"] == ""], *columns, most=len(table))
        return render_html(repr(self), facts, rows, most=len(table))

    # ---- its sites

    def with_dictionaries(
        self, *dictionaries: SiteDictionary, replace: bool = False, check: bool = True
    ) -> LM:
        """Returns an LM of the same model whose dictionaries' features are sites: "feat.SITE".

        Nothing is put on the model. `feat.resid_post.12` has the axes batch, pos and feature, and
        `feat.resid_post.12.7` is one feature. Edits there add the change of each feature times its
        decoder direction to the site, so that what the dictionary does not explain is kept, and a
        feature that does not change adds nothing.

        With `replace=True` the reconstruction is put in place of the site's values wherever an edit
        of its features acts, without the error; printing the LM shows what this costs in loss.

        Each dictionary is checked: its widths and its place, the name of its model, and in a first
        forward over a short text its share of active features and its reconstruction error. A share
        above a half, no active feature, or an error as large as the values themselves raises
        `OtherModel` with these figures, because a setting that is read wrongly shows so.
        `check=False` leaves the model's name and the forward out, for a dictionary that is not
        trained, such as a random one as a control.

        >>> lm.with_dictionaries(dictionary).sites["feat.resid_post.12"]
        1 site: feat.resid_post.12
        """
        for item in dictionaries:
            if not hasattr(item, "prepared"):
                raise BadArgument(
                    f"with_dictionaries takes dictionaries, hk.load_dictionary(…), and was given "
                    f"{describe(item)}"
                )
        for name, value in (("replace", replace), ("check", check)):
            check_bool(value, name, BadArgument)
        prepared = [item.prepared(self, replace=replace, check=check) for item in dictionaries]
        together = (*self.dictionaries, *prepared)
        by_feature_site(together)  # raises for two of one site
        fields = (self.model, self.tokenizer, self.name, self.row, together, self.processor)
        return LM(*fields, self.engine)

    @property
    def sites(self) -> SiteNames:
        """Called, returns the selection of sites with these names, layers and heads (default all).

        `lm.sites.z` is the selection of all layers of one name. After `lm.sites.` or `lm.sites["` a
        notebook completes the names that the model has.

        >>> lm.sites("z", layers=[17, 18], heads=[2])
        2 sites: z.17.2, z.18.2
        >>> lm.sites.resid_post[-1], lm.sites["z.3"]
        (Site(name='resid_post', layer=29, head=None), 1 site: z.3)
        """
        return SiteNames(self)

    def located(self, sites: Sites) -> dict[AnySite, ModuleLocation]:
        """Returns the module location of each site of a selection, with all layers written out."""
        if sites not in self._locations:
            self._locations[sites] = {site: self.location(site) for site in self.expand(sites)}
        return self._locations[sites]

    @cached_property
    def _locations(self) -> dict[Sites, dict[AnySite, ModuleLocation]]:
        return {}

    @cached_property
    def trial_results(self) -> dict[Any, Any]:
        """Results of trials of this model, so that each trial runs once. The LM owns the dict."""
        return {}

    def expand(self, sites: SitesLike) -> Sites:
        """Returns the selection with every layer written out, checked against this model."""
        expanded: list[AnySite] = []
        for site in as_sites(sites):
            if isinstance(site, Site) and site.every_layer:
                expanded += [replace(site, layer=layer) for layer in self._layers_with(site)]
            else:
                self.location(site)
                expanded.append(site)
        return as_sites(expanded)

    def _layers_with(self, site: Site) -> list[int]:
        """Returns the layers that have a site. Raises, with the reason, if the model has none."""
        if site.of_features:
            layers = self.layout.layers_of_features(site)
            if not layers:
                self.location(site)
            return layers
        layout = self.layout.of_stack(site)
        if site.name not in layout.names:
            self.location(replace(site, layer=0))
        return layout.layers(site.name) or []

    def shape(self, site: Site | str) -> tuple[int, ...]:
        """Returns the sizes of a site's axes after batch and pos.

        >>> lm.shape("z.9"), lm.shape("z.9.3")
        ((9, 64), (64,))
        """
        one_site = as_site(site)
        if isinstance(one_site, ModuleSite):
            raise Unsupported(
                f"the shape of {one_site} is known in a forward only: capture it, and read "
                "run[site].shape"
            )
        return self.layout.shape(one_site)

    def location(self, site: AnySite | str) -> ModuleLocation:
        """Returns the module location of a site.

        Raises `MissingSite` or `OutOfRange` if the model does not have it.
        """
        return self.layout.location(as_site(site))

    def submodule(self, path: str) -> nn.Module:
        """Returns the module at a path. Raises `UnknownSite` with similar paths for others."""
        return self.layout.submodule(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the model and its tokenizer as a Hugging Face folder, and returns the folder.

        transformers, `hk.load(folder)` and the programs that serve such folders read it.
        """
        self.refuse_engine("the weights were to be saved")
        target = check_folder(folder)
        if not hasattr(self.model, "save_pretrained"):
            raise Unsupported(
                f"{type(self.model).__name__} is no model of transformers: save it with torch.save"
            )
        if self.ranks is not None:
            raise Unsupported("the model is split among processes: load it whole to save it")
        self.model.save_pretrained(target)  # pyright: ignore[reportCallIssue]
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        return target

    def describe(self) -> pd.DataFrame:
        """Returns the table of all sites, one row each.

        Columns: site, axes, sizes (numbers where the model fixes them), layers (how many have it),
        module, side, editable, missing (the reason, empty where the model has the site).

        If the model has adapters, adapters: the names of those in the module. If its weights are in
        several devices, place: where those of the site's module are between forwards, such as
        "cuda:0 in 0-3, disk in 4-7" (blocks), "cpu" or "disk". If several processes hold the model,
        split: the axis along which it is split and the size of each part, at sites where a hook has
        run.
        """
        table = self.layout.describe()
        weights = self.places
        if len(set(weights.values())) > 1:
            table["place"] = table["site"].map(partial(_devices, self, weights))
        if self.ranks is not None:
            table["split"] = table["site"].map(partial(_splits, self, self.ranks))
        if self.adapters:
            table["adapters"] = table["site"].map(partial(_adapters, self))
        return table

    @property
    def places(self) -> dict[str, str]:
        """Where each weight is between forwards, by its name: "cpu", "cuda:0" …, or "disk"."""
        return weight_storages(self.root)


def _is_along(path: str, modules: Collection[str]) -> bool:
    """True if a path is that of a module inside one of these modules, or around one of them."""
    pairs = [(f"{path}.".lstrip("."), f"{module}.") for module in modules]
    return any(
        own_path.startswith(module) or module.startswith(own_path) for own_path, module in pairs
    )


def _call_method(module: nn.Module, name: str) -> Any:
    """Returns what a method without arguments returns; None if there is no such method."""
    return getattr(module, name, lambda: None)()


TOKENIZER_METHODS = ("encode", "decode", "convert_ids_to_tokens")


def tokenizer_of(tokenizer: Any) -> Any:
    """Returns a tokenizer, or the tokenizer of a processor. Raises `BadArgument` for others."""
    for candidate in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if all(map(partial(hasattr, candidate), TOKENIZER_METHODS)):
            return candidate
    raise BadArgument(
        f"{describe(tokenizer)} is no tokenizer of transformers, and no processor that holds one: "
        "give AutoTokenizer.from_pretrained(name), or leave it out and give token ids as prompts"
    )


def as_lm(model: LM | nn.Module) -> LM:
    """Returns the LM itself, or an LM of a bare module. Raises `BadArgument` for other values."""
    return model if isinstance(model, LM) else LM(model)


def refuse_no_gradient(lm: LM) -> None:
    """Raises `Unsupported` for layers without a gradient, such as dynamically quantised ones."""
    if "without gradient" not in lm.trial_results:
        lm.trial_results["without gradient"] = layers_without_gradient(lm.root)
    paths = lm.trial_results["without gradient"]
    if paths:
        kind = type(lm.root.get_submodule(paths[0])).__name__
        raise Unsupported(
            f"{paths[0]} ({kind}) and {len(paths) - 1} other layers give no gradient, as quantised "
            "layers do, so that what is asked for cannot be computed through them: load the model "
            "in float32 or bfloat16"
        )


def logits_of(output: Any) -> Tensor:
    """Returns an output's item `logits`, a tuple's first tensor, or the tensor itself."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(logits, Mapping):
        logits = logits.values()
    return next(value for value in logits if isinstance(value, Tensor))
