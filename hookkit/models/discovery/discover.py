"""Discovery of the sites of a language model that is not in the table of families.

A dry run records one block of each kind. What is proved about it by value gives the locations of
all blocks. `resolve_family` returns the family of any model: from the table, by discovery, or one
that says why there are no sites.
"""

import inspect
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...arguments import as_number
from ..families.encoder_decoders import ENCODER_DECODERS
from ..families.encoders import ENCODERS
from ..families.schema import HEAD_SIZES, Family, ModuleLocation, SizeCorrections
from ..families.table import FAMILIES, MULTIMODAL_EXCEPTIONS, TEXT_MODELS, Row
from ..families.towers import TOWERS
from ..layout import Layout, is_masked_lm, text_config
from ..sites import AXES, CROSS_SITES, SITES_WITHOUT_LAYER
from .attention_sites import (
    HEADED,
    UNPROVED,
    Attention,
    FoundSites,
    find_attention,
    locate_attention_sites,
    locate_rotated_sites,
)
from .block_sites import Block, locate_mlp_sites, locate_residual_sites
from .dry_run import ROWS, WIDTH, ModuleCall, Recording, dry_run, equal_values, is_sum, scale_factor

LAYER_SITES = tuple(name for name in AXES if name not in SITES_WITHOUT_LAYER | CROSS_SITES)
MODULES = "name its modules with hk.module(path)"


def resolve_family(model: nn.Module, config: Any, head: str | None) -> Family:
    """Returns the family of a model: its row of the table, or one found by discovery.

    `head` is the path of the output embedding, or None. Encoders, encoder-decoders and models
    without a head get the sites that they have, and the reason why others are missing.
    """
    kind, model_type = type(model).__name__, getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        family = _family_in(ENCODER_DECODERS, config, model_type)
        if family is not None:
            return family
        reason = f"no row of hookkit's table has the encoder-decoder {model_type!r}; {MODULES}"
        return Family(model_type or "module", {}, dict.fromkeys(AXES, reason))
    if head is None:
        return Family("module", {}, dict.fromkeys(AXES, _why_no_head(kind, model_type)))
    text = text_config(config)
    rows = ENCODERS if is_masked_lm(model) else {**FAMILIES, **TEXT_MODELS}
    family = _family_in(rows, text, model_type)
    if family is not None:
        if text is config:
            return family
        exceptions = {**family.exceptions, **MULTIMODAL_EXCEPTIONS.get(model_type, {})}
        moved = family.moved(decoder_path(model), head)
        return replace(moved, exceptions=exceptions, stacks=find_towers(model, config))
    family = _try_discovery(model, config)
    if isinstance(family, Family):
        return family
    locations = {"lm_head": ModuleLocation(head), "logits": ModuleLocation("", item="logits")}
    return Family(model_type or "unknown", locations, dict.fromkeys(AXES, family))


def _family_in(rows: Mapping[str, Row], config: Any, name: Any) -> Family | None:
    """Returns the row of the type of a config, under the name of the model; None without a row."""
    row = rows.get(str(getattr(config, "model_type", None)))
    if row is None:
        return None
    return replace(row if isinstance(row, Family) else row(config), name=name)


def find_towers(model: nn.Module, config: Any) -> dict[str, Family]:
    """Returns the rows of the towers of a model that reads images or sound, by stack."""
    towers: dict[str, Family] = {}
    for stack in ("vision", "audio"):
        part = getattr(config, f"{stack}_config", None)
        row = TOWERS.get(str(getattr(part, "model_type", None)))
        if row is None:
            continue
        for path, module in model.named_modules():
            if type(getattr(module, "config", None)) is type(part):
                towers[stack] = row(config, path)
                break
    return towers


def decoder_path(model: nn.Module) -> str:
    """Returns the path of the innermost decoder, which reads the embedded text."""
    decoder: Any = model
    while True:
        inner = getattr(decoder, "get_decoder", lambda: None)()
        if not isinstance(inner, nn.Module) or inner is decoder:
            break
        decoder = inner
    inner = getattr(decoder, "model", None)  # Llama 4 gives the decoder with its head
    if not hasattr(decoder, "layers") and isinstance(inner, nn.Module):
        decoder = inner
    return next(path for path, module in model.named_modules() if module is decoder)


def _why_no_head(kind: str, model_type: str | None) -> str:
    hint = " (a ...ForCausalLM has one)"
    if model_type is not None and not kind.endswith("ForCausalLM"):
        hint = f": it is a {kind}, load it with AutoModelForCausalLM"
    return f"the model has no unembedding head{hint}; {MODULES}"


def _try_discovery(model: nn.Module, config: Any) -> Family | str:
    """Returns the family of a language model, or the reason why discovery has none."""
    reason = _why_not_causal(type(model).__name__, config)
    if reason and not is_masked_lm(model):
        return reason
    try:
        return discover_family(model, config)
    except Exception as error:  # noqa: BLE001  a model may raise anything; the reason says it
        message = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            "no row of hookkit's table has this model type, and a dry run of it ended with: "
            f"{message}; use hk.module(path)"
        )


def _why_not_causal(kind: str, config: Any) -> str:
    """Returns the reason why a model is no causal language model, or "" if it is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not kind.endswith("ForCausalLM") and getattr(config, "is_decoder", None) is False:
        return (
            f"{kind} is an encoder, and named sites beside head and logits are those of decoders; "
            f"{MODULES}"
        )
    is_named_so = "CausalLM" in kind or "LMHead" in kind
    if is_named_so or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return ""
    model_type = getattr(config, "model_type", None)
    return f"no family in hookkit's table has model type {model_type!r}; use hk.module(path)"


def discover_family(model: nn.Module, config: Any) -> Family:
    """Returns the family of a language model, found by a dry run of a few tokens.

    A site is offered if the run proves it by value: `resid_pre + attn_out + mlp_out` is
    `resid_post`, the value of a head is part of a projection's output, and so on. All others are
    missing, with the reason. The model is not changed.
    """
    blocks, path = _find_blocks(model, config)
    kinds = _block_kinds(blocks)
    repeated = {path.format(layer=number) for number, kind in enumerate(kinds) if kind != number}
    recording = dry_run(model, repeated, _token_ids(model, config))
    blocks_of_kinds, sites_of_kinds = _study_kinds(recording, kinds, path)
    attention_style = _unify_attention(list(blocks_of_kinds.values()))
    locations, missing = _merge_blocks(sites_of_kinds, kinds, path)
    for name, site in _locate_whole_model_sites(model, config, recording, path).items():
        if isinstance(site, str):
            missing[name] = site
        else:
            locations[name] = site
    exceptions: dict[str, str] = {}
    stream_norms: dict[str, str] = {}
    for block in blocks_of_kinds.values():
        exceptions |= block.exceptions
        stream_norms |= block.stream_norms
    family = Family(
        getattr(config, "model_type", None) or "unknown",
        locations,
        missing,
        block=path,
        attention=attention_style,
        exceptions=exceptions,
        stream_norms=stream_norms,
        found=True,
    )
    layout = Layout(model, config, family)
    return replace(family, sizes=_corrected_sizes(layout, kinds, blocks_of_kinds))


# ---- what is run


def _find_blocks(model: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    """Returns the list of the blocks, the shallowest of its length, and the path of a block."""
    count = getattr(config, "num_hidden_layers", None)
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            lists[path] = module
    if not lists:
        raise LookupError(
            f"the model has no list of {count} blocks (the configuration's num_hidden_layers)"
        )
    path = min(lists, key=lambda path: path.count("."))
    return lists[path], f"{path}.{{layer}}"


def _block_kinds(blocks: nn.ModuleList) -> list[int]:
    """Returns for each block the number of the first one with equal modules, sizes and settings."""
    signatures = list(map(_signature, blocks))
    return list(map(signatures.index, signatures))


def _signature(block: nn.Module) -> str:
    """Returns a text that is the same for blocks of one kind."""
    parts = []
    for path, module in block.named_modules():
        weights = module.named_parameters(recurse=False)
        shapes = [(name, weight.shape) for name, weight in weights]
        parts.append((path, type(module), shapes, _settings_of(module)))
    return repr(parts)


def _settings_of(module: nn.Module) -> list[tuple[str, bool | int | float | str]]:
    """Returns the attributes that say how a module computes, without the number of its block."""
    settings = []
    for name, value in sorted(vars(module).items()):
        is_setting = isinstance(value, bool | int | float | str)
        if is_setting and "layer" not in name and name != "training":
            settings.append((name, value))
    return settings


def _token_ids(model: Any, config: Any) -> Tensor:
    """Returns a few token ids.

    If the vocabulary is large enough, they differ and none is a special token.
    """
    embedding = model.get_input_embeddings()
    vocab = getattr(embedding, "num_embeddings", None) or config.vocab_size
    words = ("pad", "bos", "eos", "unk", "mask", "sep")
    special = {getattr(config, f"{word}_token_id", None) for word in words}
    count = ROWS * WIDTH
    step = max(1, vocab // (count + 3))
    ids = [number for number in range(step, vocab, step) if number not in special]
    ids = (ids * count)[:count]
    return torch.tensor(ids, device=embedding.weight.device).view(ROWS, WIDTH)


# ---- one block of each kind


def _study_kinds(
    recording: Recording, kinds: list[int], path: str
) -> tuple[dict[int, Block], dict[int, FoundSites]]:
    """Returns the first block of each kind, where it can be studied, and its sites, by number."""
    blocks: dict[int, Block] = {}
    sites: dict[int, FoundSites] = {}
    for number in sorted(set(kinds)):
        block = _study_block(recording, path.format(layer=number))
        if isinstance(block, Block):
            blocks[number], sites[number] = block, block.sites
        else:
            sites[number] = dict.fromkeys(LAYER_SITES, block)
    return blocks, sites


def _study_block(recording: Recording, path: str) -> Block | str:
    """Returns what was found in one block, or the reason why nothing was."""
    calls = recording.calls_at(path)
    if len(calls) != 1:
        return f"{UNPROVED}the block {path!r} ran {len(calls)} times in one forward"
    (call,) = calls
    pre, post = call.input_by_token, call.output_by_token
    if pre is None or post is None or pre is not call.input or pre.shape != post.shape:
        return UNPROVED + "the block does not read and give the stream as [batch, pos, d_model]"
    block = Block(call, pre, post)
    attention = find_attention(call)
    if isinstance(attention, Attention):
        block.attention = attention
        block.sites |= locate_attention_sites(attention, recording.attention_error)
    else:
        block.sites |= dict.fromkeys(("attn_in", *HEADED), attention)
    block.sites["resid_pre"] = ModuleLocation(path, "input")
    block.sites["resid_post"] = ModuleLocation(path)
    locate_residual_sites(block)
    locate_mlp_sites(block)
    return block


# ---- from the studied blocks to all blocks


def _unify_attention(blocks: list[Block]) -> Literal["own", "interface"]:
    """Makes the sites of all blocks' attention agree, and returns its style."""
    attentions = {block: block.attention for block in blocks if block.attention}
    styles = {attention.style for attention in attentions.values()}
    any_rotates = any(attention.rotates for attention in attentions.values())
    for block, attention in attentions.items():
        block.sites |= locate_rotated_sites(attention, any_rotates)
    if len(styles) == 2:
        _remove_sites_inside_attention(blocks)
    return "own" if styles == {"own"} else "interface"


def _remove_sites_inside_attention(blocks: list[Block]) -> None:
    """Removes these sites, because not all blocks compute attention in the same style."""
    reason = UNPROVED + "some blocks compute attention in their own code, and others do not"
    for block in blocks:
        for name in HEADED:
            site = block.sites[name]
            if isinstance(site, ModuleLocation) and site.side == "inside":
                block.sites[name] = reason


def _merge_blocks(
    sites_of_kinds: Mapping[int, FoundSites], kinds: list[int], path: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the locations of each site over all blocks, and why a kind of block has none.

    `kinds` gives for each block the number of the block of its kind in `sites_of_kinds`.
    """
    locations: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in LAYER_SITES:
        layers, reasons = _layers_by_location(sites_of_kinds, kinds, path, name)
        if reasons:
            missing[name] = "; or ".join(reasons)
        if len(layers) == 1 and not reasons:
            (locations[name],) = layers
        elif layers:
            locations[name] = tuple(
                replace(location, layers=tuple(numbers)) for location, numbers in layers.items()
            )
    return locations, missing


def _layers_by_location(
    sites_of_kinds: Mapping[int, FoundSites], kinds: list[int], path: str, name: str
) -> tuple[dict[ModuleLocation, list[int]], dict[str, None]]:
    """Returns the blocks that have a site at each location, relative to the block, and the reasons
    why other blocks have none."""
    layers: dict[ModuleLocation, list[int]] = {}
    reasons: dict[str, None] = {}
    for layer, kind in enumerate(kinds):
        site = sites_of_kinds[kind][name]
        if isinstance(site, str):
            reasons[site] = None
            continue
        relative = site.path.removeprefix(path.format(layer=kind)).removeprefix(".")
        layers.setdefault(replace(site, path=f".{relative}"), []).append(layer)
    return layers, reasons


# ---- the sites that a model has once


def _locate_whole_model_sites(
    model: Any, config: Any, recording: Recording, path: str
) -> FoundSites:
    """Locates embed, pos_embed, final_norm, lm_head and logits."""
    embed = recording.only_call(model.get_input_embeddings())
    head = recording.only_call(model.get_output_embeddings())
    first_block = next(iter(recording.calls_at(path.format(layer=0))), None)
    stream = first_block.input_by_token if first_block else None
    outside = _calls_outside_blocks(recording, path, embed)
    sites = _locate_embeddings(embed, first_block, outside)
    if head is None:
        reason = UNPROVED + "the head does not run once in a forward"
        sites |= dict.fromkeys(("final_norm", "lm_head"), reason)
    else:
        sites["final_norm"] = _locate_final_norm(config, outside, head, stream)
        sites["lm_head"] = ModuleLocation(head.path)
    sites["logits"] = ModuleLocation("", item="logits")
    return sites


def _calls_outside_blocks(
    recording: Recording, path: str, embed: ModuleCall | None
) -> list[ModuleCall]:
    """Returns the calls that are not in a block and contain none, without the token embedding."""
    excluded: set[ModuleCall | None] = {embed}
    prefix = path.removesuffix("{layer}")
    for call in recording.calls:
        if call.path.startswith(prefix):
            excluded.update((*call.enclosing, call, *call.inner))
    return [call for call in recording.calls if call not in excluded]


def _locate_embeddings(
    embed: ModuleCall | None, first_block: ModuleCall | None, outside: list[ModuleCall]
) -> FoundSites:
    """Locates embed and pos_embed. `outside` are the calls outside the blocks."""
    sites: FoundSites = {
        "embed": UNPROVED
        + "the token embedding does not run once, with as many numbers for each token as the "
        "stream has",
        "pos_embed": UNPROVED
        + "the first block does not read the token embedding and something more",
    }
    if embed is None or first_block is None:
        return sites
    token, stream = embed.output_by_token, first_block.input_by_token
    if token is None or stream is None or token.shape != stream.shape:
        return sites
    if token is embed.output:
        sites["embed"] = ModuleLocation(embed.path)
    earlier = [call for call in outside if call.start < first_block.start]
    sites["pos_embed"] = _locate_pos_embed(earlier, token, stream)
    return sites


def _locate_pos_embed(
    calls: list[ModuleCall], token: Tensor, stream: Tensor
) -> ModuleLocation | str:
    """Locates what is added to the token embedding before the first block."""
    if scale_factor(token, stream) is not None:
        return "nothing is added to the token's embedding: positions act inside the blocks"
    for call in calls:
        output = call.output
        if output is None or output.shape[1:] != token.shape[1:] or not call.runs_once:
            continue
        if is_sum([token, output.expand_as(token)], stream):
            return ModuleLocation(call.path)
    return UNPROVED + (
        "no module's output, added to the token's embedding, is what the first block reads"
    )


def _locate_final_norm(
    config: Any, calls: list[ModuleCall], head: ModuleCall, stream: Tensor | None
) -> ModuleLocation | str:
    """Locates the module whose output, perhaps divided by a setting, the head reads."""
    head_input = head.input
    if stream is None or head_input is None or head_input.shape[-1] != stream.shape[-1]:
        return UNPROVED + "the head does not read as many numbers of each token as the stream has"
    subject = "no module outside the blocks"
    for call in calls:
        if call.end > head.start:
            continue
        divisor = _find_divisor(config, call.output, head_input)
        if divisor is not None and call.runs_once:
            return ModuleLocation(call.path, over=divisor)
        if divisor is not None:
            subject = f"{call.path!r}, which runs more than once,"
    return f"{UNPROVED}{subject} gives what the head reads"


def _find_divisor(config: Any, output: Tensor | None, quotient: Tensor) -> str | None:
    """Returns the setting by which the output is divided; "" for none; None if it is not so."""
    if output is None or output.shape != quotient.shape:
        return None
    if equal_values(output, quotient):
        return ""
    factor = scale_factor(quotient, output)
    if factor is None:
        return None
    for name, value in _numeric_settings(config):
        if abs(value - factor) <= 1e-4 * abs(factor):
            return name
    return None


def _numeric_settings(config: Any) -> Iterator[tuple[str, float]]:
    for name in dir(config):
        static_value = inspect.getattr_static(config, name, None)
        if name.startswith("_") or not isinstance(static_value, property | float | int):
            continue
        value = as_number(getattr(config, name))
        if value is not None:
            yield name, value


# ---- sizes


def _corrected_sizes(
    layout: Layout, kinds: list[int], blocks: Mapping[int, Block]
) -> SizeCorrections:
    """Returns a function that gives the sizes of a block in which its configuration is wrong."""
    by_kind: dict[int, dict[str, int | None]] = {kind: {} for kind in kinds}
    for kind, block in blocks.items():
        configured, measured = layout.sizes_of(kind), _measured_sizes(block)
        corrected = {name for name, size in measured.items() if configured.get(name) != size}
        if "d_head" in corrected:  # the layout reads the other widths of a head from this one
            corrected |= {"d_qk", "d_v"}
        by_kind[kind] = {name: measured[name] for name in corrected}
    general = dict(ChainMap(*by_kind.values()))  # the sizes of the first block that has them

    def sizes(config: Any, layer: int | None) -> dict[str, int | None]:
        return general if layer is None else by_kind[kinds[layer]]

    return sizes


def _measured_sizes(block: Block) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {"d_model": block.pre.shape[-1]}
    if block.attention:
        sizes |= {name: block.attention.sizes[name] for name in HEAD_SIZES}
    calls = {call.path: call for call in block.call.inner}
    for site, axis, item in (("router_logits", "expert", 0), ("experts", "choice", 2)):
        location = block.sites[site]
        if isinstance(location, ModuleLocation):
            sizes[axis] = calls[location.path].outputs[item].shape[-1]
    return sizes
