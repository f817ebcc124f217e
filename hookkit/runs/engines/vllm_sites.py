"""The sites of a model inside vLLM: where each is in the modules of the engine's own model.

vLLM has two codes for a model. Its transformers backend runs the modules of transformers, with the
projections of queries, keys and values joined to one, and those of a gated MLP too. Its own code of
Llama and models like it has the same module paths, and passes the residual stream from module to
module as two tensors, whose sum is meant. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeAlias

from ...errors import Unsupported
from ...models.families.schema import FUSED, Family, ModuleLocation

Code: TypeAlias = Literal["transformers", "vllm"]
"""Which code of vLLM runs the model: its backend of transformers' modules, or its own."""

STREAM = "stream"  # the item of a location whose tensor is the sum of two
JOINED_PROJECTIONS: Mapping[str, tuple[str, str, int]] = {
    # the module in which a projection is, the parts of its output, and which of them it is
    "q_proj": ("qkv_proj", FUSED, 0),
    "k_proj": ("qkv_proj", FUSED, 1),
    "v_proj": ("qkv_proj", FUSED, 2),
    "gate_proj": ("gate_up_proj", "d_mlp | d_mlp", 0),
    "up_proj": ("gate_up_proj", "d_mlp | d_mlp", 1),
}
ONE_KERNEL = (
    "attention in vLLM is one kernel over pages of keys, in which scores, pattern and rotated "
    "queries and keys are never tensors of their own"
)
EXPERT_KERNEL = "vLLM computes router and experts in one kernel, which returns their sum only"
NO_HEAD = (
    "vLLM never calls the head as a module: its logits are at 'logits', after scaling and soft-cap"
)
# The paths that a block of vLLM's own code has if its stream is the sum of two tensors.
OWN_CODE = (
    ".input_layernorm",
    ".self_attn.qkv_proj",
    ".self_attn.o_proj",
    ".post_attention_layernorm",
    ".mlp.gate_up_proj",
    ".mlp.down_proj",
)
IN_OWN_CODE: Mapping[str, ModuleLocation] = {
    "resid_pre": ModuleLocation(".", "input", STREAM),
    "resid_mid": ModuleLocation(".post_attention_layernorm", "input", STREAM),
    "resid_post": ModuleLocation(".", "output", STREAM),
}
PROVED_IN_OWN_CODE = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # model types


@dataclass(frozen=True)
class Served:
    """What a process of vLLM knows of its model: the row of its family, and its sizes by block."""

    family: Family
    code: Code
    sizes: Mapping[int | None, Mapping[str, int | None]]


def served_family(served: Served, modules: Mapping[str, Any], kind: str) -> Family:
    """Returns the row of a family in the modules of vLLM's model, a `kind`, by their paths.

    Raises `Unsupported` if its code passes the stream in a way that hookkit does not know.
    """
    row = served.family
    has_module = modules.__contains__
    if served.code == "transformers":
        row = row.moved(_decoder_path(row), "lm_head")
    locations: dict[str, ModuleLocation] = {}
    missing = dict(row.missing)
    changes: Mapping[str, ModuleLocation] = {}
    if served.code == "vllm":
        changes = _in_own_code(row, modules, kind)
    for site, in_row in row.locations.items():
        candidates = (changes[site],) if site in changes else _as_tuple(in_row)
        location = None
        for candidate in candidates:
            location = location or _served_location(candidate, row.block, has_module)
        if site == "logits":
            location = ModuleLocation("logits_processor", item="logits")
        if site == "lm_head":
            location = None
        if location is None:
            missing[site] = _why_not_served(site, candidates)
        else:
            locations[site] = location
    sizes = served.sizes
    return replace(
        row, locations=locations, missing=missing, sizes=lambda config, layer: sizes[layer]
    )


def _decoder_path(row: Family) -> str:
    """Returns the path of the decoder, which is a part of `model` in vLLM's backend."""
    _, _, part = row.block.rsplit(".", 2)[0].partition(".")
    return f"model.{part}".removesuffix(".")


def _as_tuple(location: ModuleLocation | tuple[ModuleLocation, ...]) -> tuple[ModuleLocation, ...]:
    return (location,) if isinstance(location, ModuleLocation) else location


def _in_own_code(
    row: Family, modules: Mapping[str, Any], kind: str
) -> Mapping[str, ModuleLocation]:
    """Returns the locations of the stream in vLLM's own code of a model like Llama."""
    difference = _difference_from_llama(row, modules)
    if difference is not None:
        raise Unsupported(
            f"vLLM runs this model with its own code ({kind}), and hookkit knows only code whose "
            f"blocks are those of Llama: in this one, {difference}. Leave engine= out, or try "
            "model_impl='transformers': the modules of transformers, compared before the first run"
        )
    return IN_OWN_CODE


def _difference_from_llama(row: Family, modules: Mapping[str, Any]) -> str | None:
    """Returns how the blocks of vLLM's own code of a model differ from Llama's, or None."""
    block = row.block.format(layer=0)
    for path in OWN_CODE:
        if block + path not in modules:
            return f"a block has no module {path}"
    arguments = inspect.signature(type(modules[block]).forward).parameters
    if "residual" not in arguments:
        return "a block passes the residual stream on as one tensor, where Llama's passes two"
    locations = chain.from_iterable(map(_as_tuple, row.locations.values()))
    if any(location.times or location.over for location in locations):
        return "a block multiplies what it adds to the residual stream"
    if row.locations.get("resid_mid") != ModuleLocation(
        ".post_attention_layernorm", "input", shared=True
    ):
        return "post_attention_layernorm does not read the residual stream"
    return None


def _served_location(
    location: ModuleLocation, block: str, has_module: Callable[[str], bool]
) -> ModuleLocation | None:
    """Returns where a location is in vLLM's modules; None if it is not there."""
    if location.side == "inside" or location.item not in (0, STREAM):
        return None
    if has_module(_first_path(location.path, block)):
        return location
    parent, _, name = location.path.rpartition(".")
    if name not in JOINED_PROJECTIONS:
        return None
    joined, cut, part = JOINED_PROJECTIONS[name]
    if not has_module(_first_path(f"{parent}.{joined}", block)):
        return None
    return replace(location, path=f"{parent}.{joined}", cut=cut, part=part)


def _first_path(path: str, block: str) -> str:
    """Returns the path in the first block."""
    if not path.startswith("."):
        return path
    return f"{block.format(layer=0)}{path}".removesuffix(".")


def _why_not_served(site: str, locations: tuple[ModuleLocation, ...]) -> str:
    location: Any = locations[0]
    if site == "lm_head":
        return NO_HEAD
    if location.flat or location.item in (1, 2):
        return EXPERT_KERNEL
    if location.side == "inside":
        return ONE_KERNEL
    return f"vLLM's model has no module {location.path!r}"
