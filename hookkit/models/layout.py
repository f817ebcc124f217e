"""Where the sites of one model are: a row of the families' table, laid over the model's own module tree."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
from torch import nn

from ..errors import MissingSite, OutOfRange, UnknownSite, did_you_mean
from .families.schema import AxisSplit, Family, ModuleLocation, cut
from .families.table import FAMILIES
from .sites import AXES, KEY_HEADED, WHOLE_MODEL, AnySite, ModuleSite, Site


@dataclass(frozen=True, eq=False)
class Layout:
    """The places of one model. `root` is the model, `config` its configuration, if it has one."""

    root: nn.Module
    config: Any
    family: Family
    _found: dict[tuple[str, int | None], ModuleLocation | None] = field(default_factory=dict)
    _sizes: dict[int | None, dict[str, int | None]] = field(default_factory=dict)
    verified: dict[nn.Module, set[str]] = field(default_factory=dict)  # see `inside.opened`
    forms: dict[AnySite, Any] = field(default_factory=dict)  # see `forms.form_of`

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """The length of each axis that the model fixes; None where the family has no such axis."""
        return self.sizes_of(None)

    def sizes_of(self, layer: int | None) -> dict[str, int | None]:
        """The same for one block, where blocks differ."""
        if layer not in self._sizes:
            self._sizes[layer] = self._sizes_of(layer)
        return self._sizes[layer]

    def _sizes_of(self, layer: int | None) -> dict[str, int | None]:
        config = _of_block(self.config, layer)
        heads, d_model = _first(config, "num_attention_heads"), _first(config, "hidden_size")
        d_head = _first(config, "head_dim") or (d_model // heads if d_model and heads else None)
        corrected = {} if config is None else self.family.sizes(config, layer)
        d_head = corrected.get("d_head", d_head)
        known: dict[str, int | None] = {
            "d_model": d_model,
            "head": heads,
            "kv_head": _first(config, "num_key_value_heads") or heads,
            "d_head": d_head,
            "d_qk": d_head,
            "d_v": d_head,
            "d_mlp": self._neurons(layer),
            "expert": _first(config, "num_local_experts", "num_experts", "n_routed_experts"),
            "choice": _first(config, "num_experts_per_tok"),
            "vocab": _first(config, "vocab_size") or self._vocabulary(),
            **corrected,
        }
        heads, key_heads = known["head"], known["kv_head"]
        known["share"] = (
            heads // key_heads if heads and key_heads else None
        )  # query heads to a key-value head
        known["quarter"] = heads // 4 if heads else None
        return known

    def _vocabulary(self) -> int | None:
        """The rows of the table of embeddings, for a configuration that has no word for them."""
        find = getattr(self.root, "get_input_embeddings", None)
        try:
            count = getattr(find(), "num_embeddings", None) if callable(find) else None
        except NotImplementedError:  # a model of transformers without words
            return None
        return count if isinstance(count, int) else None

    def _neurons(self, layer: int | None) -> int | None:
        """The width of what the MLP's output projection reads, as its weight says: configurations have many words."""
        if "mlp_post" not in self.family.places:
            return None
        layers = range(self.n_layers) if layer is None else (layer,)
        place = next(
            (found for each in layers if (found := self.find("mlp_post", each)) is not None), None
        )
        return None if place is None else _width(self.submodule(place.path))

    @cached_property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return _first(self.config, "num_hidden_layers") or 0

    @cached_property
    def names(self) -> list[str]:
        """The sites that the model has, in some block at least."""
        return [name for name in AXES if name in self.family.places and self.layers(name) != []]

    def layers(self, name: str) -> list[int] | None:
        """The blocks that have a site; None for a site that is there once."""
        if name in WHOLE_MODEL:
            return None if self.find(name, None) is not None else []
        return [layer for layer in range(self.n_layers) if self.find(name, layer) is not None]

    def find(self, name: str, layer: int | None) -> ModuleLocation | None:
        """The place of a site in a block: the first of its row's whose module is there."""
        key = name, layer
        if key not in self._found:
            places = self.family.at(name, layer) if name in self.family.places else []
            self._found[key] = next(
                (place for place in places if self._module(place.path) is not None), None
            )
        return self._found[key]

    def place(self, site: AnySite) -> ModuleLocation:
        """The place of a site. `MissingSite` or `OutOfRange` where the model has none."""
        if isinstance(site, ModuleSite):
            self.submodule(site.path)
            return ModuleLocation(site.path, site.side, site.item)
        if site.name not in self.names:
            raise MissingSite(
                f"this {self.family.name} model has no {site.name!r}: {self.family.why_missing(site.name)}. "
                f"It has: {', '.join(self.names) or 'modules only'}."
            )
        if site.layer is not None and site.layer >= self.n_layers:
            raise OutOfRange(
                f"{site} was asked for, and the model has {self.n_layers} layers: 0 to {self.n_layers - 1}"
            )
        found = self.find(site.name, site.layer)
        if found is None:
            raise MissingSite(
                f"block {site.layer} of this {self.family.name} model has no {site.name!r}: "
                f"{self.family.why_missing(site.name)}. The blocks that have it: {self.layers(site.name)}."
            )
        self._check_head(site)
        return found

    def _check_head(self, site: Site) -> None:
        kind, word = (
            ("kv_head", "key-value heads") if site.name in KEY_HEADED else ("head", "heads")
        )
        heads = self.sizes_of(site.layer)[kind] or 0
        if site.head is not None and site.head >= heads:
            raise OutOfRange(
                f"{site} was asked for, and {site.name!r} has {heads} {word}: 0 to {heads - 1}"
            )

    def cut(self, site: Site) -> AxisSplit | None:
        """What part of the last axis a site is; None where it is all of it."""
        place = self.place(site)
        return cut(place, self.sizes_of(site.layer)) if place.cut else None

    def shape(self, site: Site) -> tuple[int, ...]:
        """The sizes of a site's axes behind batch and pos; 0 for queries and keys, which are as many as the tokens."""
        found = self.cut(site)
        if found is not None:
            return found.shape if site.head is None or found.inner is None else found.shape[1:]
        if site.name in (
            "embed",
            "final_norm",
        ):  # some models project between the embedding and the stream
            module = self.submodule(self.place(site).path)
            width = getattr(module, "embedding_dim", getattr(module, "out_features", None))
            if isinstance(width, int):
                return (width,)
        sizes = dict(self.sizes_of(site.layer))
        sizes["d_head"] = sizes[
            "d_v" if site.name == "v" else "d_qk"
        ]  # of the sites that stand inside attention
        return tuple(
            sizes.get(axis) or 0 for axis in site.axes.split() if axis not in ("batch", "pos")
        )

    def factor(self, site: AnySite) -> float:
        """What the module's tensor is multiplied by to give the site."""
        place = self.place(site)
        factor = 1.0
        if place.times and isinstance(site, Site):
            factor = float(
                getattr(self.submodule(self.family.block.format(layer=site.layer)), place.times)
            )
        return factor / float(getattr(self.config, place.over)) if place.over else factor

    def submodule(self, path: str) -> nn.Module:
        """The module at a path, or `UnknownSite` with the nearest paths."""
        found = self._module(path)
        if found is None:
            paths = [name for name, _ in self.root.named_modules() if name]
            children = ", ".join(name for name, _ in self.root.named_children())
            raise UnknownSite(
                f"the model has no module {path!r}{did_you_mean(path, paths)} Its first modules are: {children}."
            )
        return found

    def _module(self, path: str) -> nn.Module | None:
        module: nn.Module | None = self.root
        for name in path.split(".") if path else ():
            module = module._modules.get(name) if module is not None else None
        return module

    def describe(self) -> pd.DataFrame:
        """The table of all sites, one row each; see `LM.describe`."""
        rows = []
        for name, axes in AXES.items():
            layers = self.layers(name) if name in self.family.places else []
            place = self.find(name, layers[0] if layers else None) if layers != [] else None
            there = place is not None
            rows.append(
                {
                    "site": name,
                    "axes": axes,
                    "sizes": " ".join(str(self.sizes.get(axis) or axis) for axis in axes.split()),
                    "layers": (1 if layers is None else len(layers)) if there else 0,
                    "module": (place.path or "(the model)") if there else "",
                    "side": place.side if there else "",
                    "editable": there,
                    "missing": "" if there else self.family.why_missing(name),
                }
            )
            if layers and place is not None:
                rows[-1]["module"] = place.path.replace(f".{layers[0]}", ".{layer}", 1)
        return pd.DataFrame(rows)


def no_decoder(root: nn.Module, config: Any, head: str | None) -> Family | None:
    """The row for a model that is no decoder with a head, whose reasons say what it is; None for one that is.

    `head` is the path of the output embedding, if there is one.
    """
    kind, model_type = type(root).__name__, getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        reason = f"{kind} is an encoder-decoder, and named sites are those of decoders; {MODULES}"
        return Family(model_type or "module", {}, dict.fromkeys(AXES, reason))
    if head is None:
        reason = f"the model has no unembedding head (a ...ForCausalLM has one); {MODULES}"
        if model_type is not None and not kind.endswith("ForCausalLM"):
            reason = f"the model has no unembedding head: it is a {kind}, load it with AutoModelForCausalLM; {MODULES}"
        return Family("module", {}, dict.fromkeys(AXES, reason))
    undecided = model_type not in FAMILIES and not kind.endswith("ForCausalLM")
    if undecided and getattr(config, "is_decoder", None) is False:
        reason = f"{kind} is an encoder, and named sites beside head and logits are those of decoders; {MODULES}"
        return _head_only(model_type, head, reason)
    return None


MODULES = "name its modules with hk.module(path)"


def family_of(config: Any, head: str | None) -> Family:
    """The row for a configuration. For one without a row: the head and the logits, and a reason for all the rest.

    `head` is the path of the output embedding.
    """
    model_type = getattr(config, "model_type", None)
    row = FAMILIES.get(model_type or "")
    if row is not None:
        return replace(row if isinstance(row, Family) else row(config), name=model_type)
    reason = f"no family in hookkit's table has model type {model_type!r}; use hk.module(path)"
    return _head_only(model_type, head or "", reason)


def _head_only(model_type: str | None, head: str, reason: str) -> Family:
    places: Mapping[str, ModuleLocation] = {
        "lm_head": ModuleLocation(head),
        "logits": ModuleLocation("", item="logits"),
    }
    return Family(model_type or "unknown", places, dict.fromkeys(AXES, reason))


def text_config(config: Any) -> Any:
    """The configuration of the stack that writes text: a part of that of a model which reads images or sound, too."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config()


def _first(config: Any, *names: str) -> int | None:
    """The first of several words that a configuration knows and that is a number."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # noqa: BLE001  a configuration whose blocks differ refuses to say one number for all
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _of_block(config: Any, layer: int | None) -> Any:
    """The configuration of one block, where a model's blocks have their own; else the model's."""
    each = getattr(config, "per_layer_config", None) if layer is not None else None
    return each[layer] if each else config


def _width(module: nn.Module) -> int | None:
    """How many numbers a linear module reads of each position."""
    known = getattr(module, "in_features", None)
    if isinstance(known, int):
        return known
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2:
        return None
    return (
        weight.shape[0] if hasattr(module, "nf") else weight.shape[1]
    )  # transformers' Conv1D keeps in x out
