"""Where the sites of one model are: a row of the table of families, applied to its modules.

A `Layout` has the module location and the sizes of each site. `views` says how a site is stored in
the tensor there.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import pandas as pd
from torch import nn

from ..errors import MissingSite, OutOfRange, UnknownSite, did_you_mean
from .dictionaries import SiteDictionary, find_dictionary
from .experts import NEURONS, count_neurons
from .families.schema import AxisSplit, Family, ModuleLocation, split_axis
from .sites import (
    AXES,
    CROSS_SITES,
    FEATURE_AXES,
    SITES_WITH_KEY_HEADS,
    SITES_WITHOUT_LAYER,
    AnySite,
    ModuleSite,
    Site,
)


@dataclass(frozen=True, eq=False)
class Layout:
    """The module locations of one model's sites.

    `root` is the model and `config` its configuration, or None. `stacks` are the layouts of its
    other lists of blocks, such as an encoder, and `dictionaries` those of the LM by the site of
    their features. The `LM` owns the layout. The fields after `dictionaries` are caches; `verified`
    belongs to `hookkit.models.attention`, and `views` to `view_of`.
    """

    root: nn.Module
    config: Any
    family: Family
    stacks: Mapping[str, "Layout"] = field(default_factory=dict)
    dictionaries: Mapping[Site, SiteDictionary] = field(default_factory=dict)
    _locations: dict[tuple[str, int | None], ModuleLocation | None] = field(default_factory=dict)
    _sizes: dict[int | None, dict[str, int | None]] = field(default_factory=dict)
    verified: dict[nn.Module, set[str]] = field(default_factory=dict)
    views: dict[AnySite, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Layout({self.family.name}: {', '.join(self.names)})"

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """The length of each axis that the model fixes; None where the family has no such axis."""
        return self.sizes_of(None)

    def sizes_of(self, layer: int | None) -> dict[str, int | None]:
        """Returns the same for one block, because blocks may differ."""
        if layer not in self._sizes:
            self._sizes[layer] = self._read_sizes(layer)
        return self._sizes[layer]

    def _read_sizes(self, layer: int | None) -> dict[str, int | None]:
        config = self.config
        block_configs = getattr(config, "per_layer_config", None)
        if block_configs and layer is not None:
            config = block_configs[layer]
        corrections: Mapping[str, int | None] = {}
        if config is not None:
            corrections = self.family.sizes(config, layer)
        heads, d_model = (
            read_integer(config, "num_attention_heads"),
            read_integer(config, "hidden_size"),
        )
        d_head = read_integer(config, "head_dim") or _divide(d_model, heads)
        d_head = corrections.get("d_head", d_head)
        sizes: dict[str, int | None] = {
            "d_model": d_model,
            "head": heads,
            "kv_head": read_integer(config, "num_key_value_heads") or heads,
            "d_head": d_head,
            "d_qk": d_head,
            "d_v": d_head,
            "d_mlp": self._mlp_width(layer),
            "expert": read_integer(config, "num_local_experts", "num_experts", "n_routed_experts"),
            "choice": read_integer(config, "num_experts_per_tok"),
            "vocab": read_integer(config, "vocab_size") or self._embedding_rows(),
            **corrections,
        }
        # `share` is the number of query heads per key-value head.
        sizes["share"] = _divide(sizes["head"], sizes["kv_head"])
        sizes["quarter"] = _divide(sizes["head"], 4)
        return sizes

    def _embedding_rows(self) -> int | None:
        """Returns the number of embeddings, for a configuration that does not say it."""
        find = getattr(self.root, "get_input_embeddings", lambda: None)
        try:
            return read_integer(find(), "num_embeddings")
        except NotImplementedError:  # transformers raises it for a model without token embeddings
            return None

    def _mlp_width(self, layer: int | None) -> int | None:
        """Returns the input size of the MLP's output projection, as its weight says.

        Configurations have many names for it.
        """
        if "mlp_post" not in self.family.locations:
            return None
        layers = range(self.n_layers) if layer is None else (layer,)
        locations = map(partial(self.find, "mlp_post"), layers)
        location = next(filter(None, locations), None)
        if location is None:
            return None
        module = self.submodule(location.path)
        return count_neurons(module) if location.side == "inside" else _input_size(module)

    @cached_property
    def n_layers(self) -> int:
        """The number of blocks."""
        return read_integer(self.config, "num_hidden_layers") or 0

    @cached_property
    def names(self) -> list[str]:
        """The names of the sites that the model has in at least one block."""
        return [name for name in AXES if name in self.family.locations and self.layers(name) != []]

    def layers(self, name: str) -> list[int] | None:
        """Returns the blocks that have a site; None for a site that exists once in the model."""
        if name in FEATURE_AXES:
            return self.layers_of_features(Site(name))
        if name in SITES_WITHOUT_LAYER:
            if self.find(name, None) is None:
                return []
            return None
        return [layer for layer in range(self.n_layers) if self.find(name, layer) is not None]

    def layers_of_features(self, site: Site) -> list[int]:
        """Returns the blocks that have a dictionary at the site of these features."""
        layers: list[int] = []
        for other in self.dictionaries:
            if other.layer is not None and replace(other, layer=None) == site:
                layers.append(other.layer)
        return sorted(layers)

    def find(self, name: str, layer: int | None) -> ModuleLocation | None:
        """Returns the first location of a site in a block whose module exists, or None."""
        key = name, layer
        if key not in self._locations:
            locations = self.family.at(name, layer)
            existing = (item for item in locations if self._module(item.path) is not None)
            self._locations[key] = next(existing, None)
        return self._locations[key]

    def location(self, site: AnySite) -> ModuleLocation:
        """Returns the module location of a site.

        Raises `MissingSite` or `OutOfRange` if the model does not have it.
        """
        if isinstance(site, ModuleSite):
            self.submodule(site.path)
            return ModuleLocation(site.path, site.side, site.item)
        if site.of_features:
            return self.location(find_dictionary(self.dictionaries, site).site)
        if site.stack:
            return self.of_stack(site).location(replace(site, stack=""))
        family = self.family
        if site.name not in self.names:
            raise MissingSite(
                f"this {family.name} model has no {site.name!r}: {family.why_missing(site.name)}. "
                f"It has: {', '.join(self.names) or 'modules only'}."
            )
        self._check_layer(site)
        location = self.find(site.name, site.layer)
        if location is None:
            raise MissingSite(
                f"block {site.layer} of this {family.name} model has no {site.name!r}: "
                f"{family.why_missing(site.name)}. "
                f"The blocks that have it: {self.layers(site.name)}."
            )
        self._check_head(site)
        return location

    def _check_layer(self, site: Site) -> None:
        if site.layer is not None and site.layer >= self.n_layers:
            raise OutOfRange(
                f"{site} was asked for, and the model has {self.n_layers} layers: "
                f"0 to {self.n_layers - 1}"
            )
        if site.every_layer:
            raise UnknownSite(
                f"{site} is in several blocks, and one is needed: say "
                f"'{site}.LAYER', or give lm.sites({site.name!r}) where "
                "several are taken"
            )

    def _check_head(self, site: Site) -> None:
        axis, word = "head", "heads"
        if site.name in SITES_WITH_KEY_HEADS:
            axis, word = "kv_head", "key-value heads"
        heads = self.sizes_of(site.layer)[axis] or 0
        if site.head is not None and site.head >= heads:
            raise OutOfRange(
                f"{site} was asked for, and {site.name!r} has {heads} {word}: 0 to {heads - 1}"
            )

    def of_stack(self, site: Site) -> "Layout":
        """Returns the layout of the stack of a site. Raises `MissingSite` if there is no such."""
        if not site.stack:
            return self
        if site.stack not in self.stacks:
            reason = f"has no {site.stack}"
            part = getattr(self.root.config, f"{site.stack}_config", None)
            if part is not None:
                kind = getattr(part, "model_type", "of another type")
                reason = (
                    f"has a tower ({kind}) whose sites have no names yet: name its modules, "
                    "hk.module(path)"
                )
            raise MissingSite(f"{site} was asked for, and this {self.family.name} model {reason}")
        return self.stacks[site.stack]

    def cut(self, site: Site) -> AxisSplit | None:
        """Returns which part of the tensor's last axis a site is; None if it is the whole axis."""
        location = self.location(site)
        if not location.cut:
            return None
        return split_axis(location, self.of_stack(site).sizes_of(site.layer))

    def axes(self, site: Site) -> str:
        """Returns the names of a site's axes; neurons of experts have a choice before them."""
        if site.name not in NEURONS or self.location(site).side != "inside":
            return site.axes
        return site.axes.replace("d_mlp", "choice d_mlp")

    def shape(self, site: Site) -> tuple[int, ...]:
        """Returns the sizes of a site's axes after batch and pos.

        The size of query and key is 0, because it depends on the number of tokens.
        """
        if site.of_features:
            n_features = find_dictionary(self.dictionaries, site).n_features
            return (n_features,) if site.head is None else ()
        if site.stack:
            return self.of_stack(site).shape(replace(site, stack=""))
        part = self.cut(site)
        if part is not None:
            is_one_of_heads = site.head is not None and part.inner is not None
            return part.shape[1:] if is_one_of_heads else part.shape
        # Some models project between the embedding and the residual stream.
        if site.name in ("embed", "pos_embed", "final_norm"):
            width = self._module_width(self.location(site))
            if width is not None:
                return (width,)
        sizes = dict(self.sizes_of(site.layer))
        sizes["d_head"] = sizes["d_v" if site.name == "v" else "d_qk"]  # of sites inside attention
        axes = self.axes(site).removeprefix("batch ").removeprefix("pos ").split()
        return tuple(sizes.get(axis) or 0 for axis in axes)

    def _module_width(self, location: ModuleLocation) -> int | None:
        """The numbers that a module has for each position there; None if it does not say."""
        module = self.submodule(location.path)
        width = read_integer(module, "embedding_dim", "out_features")
        if location.side == "input":
            width = _input_size(module)
        weight: Any = getattr(module, "weight", None)
        if width is None and getattr(weight, "ndim", 0) == 1:  # a norm, which may be narrower
            return len(weight)
        return width

    def factor(self, site: Site) -> float:
        """Returns the number by which the module's tensor is multiplied to give the site."""
        if site.stack:
            return self.of_stack(site).factor(replace(site, stack=""))
        location = self.location(site)
        factor = 1.0
        if location.times:
            block = self.submodule(self.family.block.format(layer=site.layer))
            factor = float(getattr(block, location.times))
        if location.over:
            factor /= float(getattr(self.config, location.over))
        return factor

    def submodule(self, path: str) -> nn.Module:
        """Returns the module at a path. Raises `UnknownSite` with similar paths for others."""
        module = self._module(path)
        if module is None:
            paths = list(filter(None, dict(self.root.named_modules())))
            raise UnknownSite(
                f"the model has no module {path!r}{did_you_mean(path, paths)} "
                f"Its first modules are: {', '.join(dict(self.root.named_children()))}."
            )
        return module

    def _module(self, path: str) -> nn.Module | None:
        module: nn.Module | None = self.root
        for name in filter(None, path.split(".")):  # faster than torch's get_submodule
            if module is None:
                return None
            module = module._modules.get(name)
        return module

    def describe(self) -> pd.DataFrame:
        """Returns the table of all sites, one row each; see `LM.describe`."""
        names = [name for name in AXES if name in self.names or name not in CROSS_SITES]
        tables = [pd.DataFrame(list(map(self._describe_site, names)))]
        for stack, layout in self.stacks.items():
            table = layout.describe()
            tables.append(table.assign(site=stack + "." + table["site"]))
        if self.dictionaries:
            tables.append(pd.DataFrame(list(map(self._describe_features, self.dictionaries))))
        return pd.concat(tables, ignore_index=True)

    def _describe_site(self, name: str) -> dict[str, object]:
        sizes = self._size_texts(AXES[name], None)
        row: dict[str, object] = {"site": name, "axes": AXES[name], "sizes": sizes}
        row |= {"layers": 0, "module": "", "side": "", "editable": False, "missing": ""}
        if name not in self.names:
            return row | {"missing": self.family.why_missing(name)}
        layers = self.layers(name) or [None]
        if name in NEURONS:  # blocks with a plain MLP have fewer axes than those with experts
            layers_by_axes = {self.axes(Site(name, layer)): layer for layer in reversed(layers)}
            kinds = sorted(layers_by_axes.items(), key=itemgetter(1))
            row["axes"] = " or ".join(axes for axes, _ in kinds)
            row["sizes"] = " or ".join(itertools.starmap(self._size_texts, kinds))
        location = self.location(Site(name, layers[0]))
        module = location.path.replace(f".{layers[0]}", ".{layer}", 1) or "(the model)"
        facts = {"layers": len(layers), "module": module, "side": location.side, "editable": True}
        return row | facts

    def _describe_features(self, site: Site) -> dict[str, object]:
        location, count = self.location(site), self.dictionaries[site].n_features
        sizes = site.axes.replace("feature", str(count))
        row: dict[str, object] = {"site": str(site), "axes": site.axes, "sizes": sizes}
        row |= {"layers": 1, "module": location.path, "side": location.side}
        return row | {"editable": True, "missing": ""}

    def _size_texts(self, axes: str, layer: int | None) -> str:
        sizes = self.sizes_of(layer)
        return " ".join(str(sizes.get(axis) or axis) for axis in axes.split())


def text_config(config: Any, stack: str = "decoder") -> Any:
    """Returns the configuration of the stack that writes text, or of another stack.

    For a model that reads images or sound too, it is a part of the model's configuration.
    """
    if stack in ("vision", "audio"):
        return getattr(config, f"{stack}_config")
    if not hasattr(config, "get_text_config"):
        return config
    if not getattr(config, "is_encoder_decoder", False):
        return config.get_text_config()
    return _config_of_two(config, stack)


def _config_of_two(config: Any, stack: str) -> Any:
    """Returns the configuration of the encoder or the decoder of an encoder-decoder."""
    if stack == "encoder":
        part = config.get_text_config(encoder=True)
        encoder = getattr(config, "encoder", None)
        return encoder if hasattr(encoder, "num_hidden_layers") else part
    part = config.get_text_config(decoder=True)
    # T5 names the number of the decoder's blocks in its own way.
    n_blocks = getattr(config, "num_decoder_layers", None)
    if n_blocks is not None and n_blocks != part.num_hidden_layers:
        part = copy.deepcopy(part)
        part.num_hidden_layers = n_blocks
    return part


def is_masked_lm(model: nn.Module) -> bool:
    """True for a masked language model: it reads a whole text at once and fills its masks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_named_so = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return is_named_so and not hasattr(model, "generate")


def read_integer(config: Any, *names: str) -> int | None:
    """Returns the first of several attributes of a configuration that is a whole number."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # noqa: BLE001  where blocks differ, there is no one number for all
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _divide(size: int | None, parts: int | None) -> int | None:
    """Returns the size of each part, or None if a number is not known."""
    if not size or not parts:
        return None
    return size // parts


def _input_size(module: nn.Module) -> int | None:
    """Returns how many numbers a linear module reads at each position."""
    in_features = read_integer(module, "in_features")
    if in_features is not None:
        return in_features
    inner = getattr(module, "linear", None)  # as in a linear module of Gemma 4 that clips
    if isinstance(inner, nn.Linear):
        return inner.in_features
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "ndim", 0) != 2:
        return None
    # The weight of transformers' Conv1D has its input on the first axis.
    return weight.shape[0] if hasattr(module, "nf") else weight.shape[1]
