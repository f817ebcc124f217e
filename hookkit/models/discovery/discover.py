"""Discovery of the sites of a causal language model that is not in the table of families.

A dry run records one block of each kind. What is proved about it by value gives the locations of
all blocks. `resolve_family` returns the family of any model: from the table, by discovery, or one
that says why there are no sites.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families.schema import HEAD_SIZES, Family, ModuleLocation, SizeCorrections
from ..families.table import FAMILIES
from ..layout import Layout
from ..sites import AXES, SITES_WITHOUT_LAYER
from .attention_sites import (
    HEADED,
    UNPROVED,
    FoundSites,
    find_attention,
    locate_attention_sites,
    locate_rotated_sites,
)
from .dry_run import ROWS, WIDTH, ModuleCall, Recording, dry_run
from .matching import equal_values, is_sum, scale_factor
from .mlp_sites import locate_mlp_sites
from .residual_sites import Block, locate_residual_sites

LAYER_SITES = tuple(name for name in AXES if name not in SITES_WITHOUT_LAYER)
MODULES = "name its modules with hk.module(path)"
NOT_SEEN = UNPROVED + "nothing like it was seen"

Findings = Mapping[int, Block | str]
"""By the number of a block: what was found in it, or the reason why nothing was."""


def resolve_family(model: nn.Module, config: Any, head: str | None) -> Family:
    """Returns the family of a model: its row of the table, or one found by discovery.

    `head` is the path of the output embedding, or None. Encoders, encoder-decoders and models
    without a head get the sites that they have, and the reason why others are missing.
    """
    kind, model_type = type(model).__name__, getattr(config, "model_type", None)
    is_causal_lm = kind.endswith("ForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        reason = f"{kind} is an encoder-decoder, and named sites are those of decoders; {MODULES}"
        return Family(model_type or "module", {}, dict.fromkeys(AXES, reason))
    if head is None:
        reason = "the model has no unembedding head"
        if model_type is not None and not is_causal_lm:
            reason += f": it is a {kind}, load it with AutoModelForCausalLM; {MODULES}"
        else:
            reason += f" (a ...ForCausalLM has one); {MODULES}"
        return Family("module", {}, dict.fromkeys(AXES, reason))
    row = FAMILIES.get(str(model_type))
    if row is not None:
        return replace(row if isinstance(row, Family) else row(config), name=model_type)
    if not is_causal_lm and getattr(config, "is_decoder", None) is False:
        reason = (
            f"{kind} is an encoder, and named sites beside head and logits are those of decoders; "
            f"{MODULES}"
        )
    else:
        family = _try_discovery(model, config)
        if isinstance(family, Family):
            return family
        reason = family
    locations = {"lm_head": ModuleLocation(head), "logits": ModuleLocation("", item="logits")}
    return Family(model_type or "unknown", locations, dict.fromkeys(AXES, reason))


def _try_discovery(model: nn.Module, config: Any) -> Family | str:
    """Returns the family of a causal language model, or the reason why discovery has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, model_type = type(model).__name__, getattr(config, "model_type", None)
    is_named_so = "CausalLM" in kind or "LMHead" in kind
    if not is_named_so and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return f"no family in hookkit's table has model type {model_type!r}; use hk.module(path)"
    try:
        return discover_family(model, config)
    except Exception as error:  # noqa: BLE001  a model may raise anything; the reason says it
        message = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            "no row of hookkit's table has this model type, and a dry run of it ended with: "
            f"{message}; use hk.module(path)"
        )


def discover_family(model: nn.Module, config: Any) -> Family:
    """Returns the family of a causal language model, found by a dry run of a few tokens.

    A site is offered if the run proves it by value: `resid_pre + attn_out + mlp_out` is
    `resid_post`, the value of a head is part of a projection's output, and so on. All others are
    missing, with the reason. The model is not changed.
    """
    blocks, path = _find_blocks(model, config)
    kinds = _block_kinds(blocks)
    repeated = {path.format(layer=number) for number, kind in enumerate(kinds) if kind != number}
    recording = dry_run(model, repeated, _token_ids(model, config))
    findings: dict[int, Block | str] = {}
    for number in sorted(set(kinds)):
        findings[number] = _study_block(recording, path.format(layer=number))
    studied = [block for block in findings.values() if isinstance(block, Block)]
    styles = {block.attention.style for block in studied if block.attention}
    _add_rotated_sites(studied)
    if len(styles) == 2:
        _remove_sites_inside_attention(studied)
    locations, missing = _merge_blocks(findings, kinds, path)
    for name, site in _locate_whole_model_sites(model, config, recording, path).items():
        if isinstance(site, str):
            missing[name] = site
        else:
            locations[name] = site
    exceptions: dict[str, str] = {}
    for block in studied:
        exceptions |= block.exceptions
    family = Family(
        getattr(config, "model_type", None) or "unknown",
        locations,
        missing,
        block=path,
        attention="own" if styles == {"own"} else "interface",
        exceptions=exceptions,
        found=True,
    )
    return replace(family, sizes=_corrected_sizes(model, config, family, kinds, findings))


# ---- what is run


def _find_blocks(model: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    """Returns the list of the blocks, the shallowest of its length, and the path of a block."""
    count = getattr(config, "num_hidden_layers", None)
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            lists.append((path, module))
    if not lists:
        raise LookupError(
            f"the model has no list of {count} blocks (the configuration's num_hidden_layers)"
        )
    path, blocks = min(lists, key=lambda item: item[0].count("."))
    return blocks, f"{path}.{{layer}}"


def _block_kinds(blocks: nn.ModuleList) -> list[int]:
    """Returns for each block the number of the first one with equal modules, sizes and settings."""
    signatures = [_signature(block) for block in blocks]
    return [signatures.index(signature) for signature in signatures]


def _signature(block: nn.Module) -> str:
    parts = []
    for path, module in block.named_modules():
        weights = module.named_parameters(recurse=False)
        shapes = {name: tuple(weight.shape) for name, weight in weights}
        settings = []
        for name, value in sorted(vars(module).items()):
            is_setting = isinstance(value, bool | int | float | str)
            if is_setting and "layer" not in name and name != "training":
                settings.append((name, value))
        parts.append((path, type(module), shapes, settings))
    return repr(parts)


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


# ---- one block


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
    if isinstance(attention, str):
        block.sites |= dict.fromkeys(("attn_in", *HEADED), attention)
    else:
        block.attention = attention
        block.sites |= locate_attention_sites(attention, recording.attention_error)
    block.sites["resid_pre"] = ModuleLocation(path, "input")
    block.sites["resid_post"] = ModuleLocation(path)
    locate_residual_sites(block)
    locate_mlp_sites(block)
    return block


# ---- from the studied blocks to all blocks


def _remove_sites_inside_attention(blocks: list[Block]) -> None:
    """Removes these sites, because not all blocks compute attention in the same style."""
    reason = UNPROVED + "some blocks compute attention in their own code, and others do not"
    for block in blocks:
        for name in HEADED:
            site = block.sites[name]
            if isinstance(site, ModuleLocation) and site.side == "inside":
                block.sites[name] = reason


def _add_rotated_sites(blocks: list[Block]) -> None:
    """Adds q_rot and k_rot to blocks without a rotation if other blocks have one."""
    attentions = [(block, block.attention) for block in blocks if block.attention]
    if not any(attention.rotates for _, attention in attentions):
        return
    for block, attention in attentions:
        if not attention.rotates and attention.style == "interface":
            attention.rotates = True
            block.sites |= locate_rotated_sites(attention)


def _merge_blocks(
    findings: Findings, kinds: list[int], path: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the locations of each site over all blocks, and why a kind of block has none.

    `kinds` gives for each block the number of the block of its kind in `findings`.
    """
    locations: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in LAYER_SITES:
        alternatives: dict[ModuleLocation, list[int]] = {}
        reasons: dict[str, None] = {}
        for layer, kind in enumerate(kinds):
            block = findings[kind]
            site = block.sites.get(name, NOT_SEEN) if isinstance(block, Block) else block
            if isinstance(site, str):
                reasons[site] = None
                continue
            relative = site.path.removeprefix(path.format(layer=kind)).removeprefix(".")
            alternatives.setdefault(replace(site, path=f".{relative}"), []).append(layer)
        if reasons:
            missing[name] = "; or ".join(reasons)
        if len(alternatives) == 1 and not reasons:
            (locations[name],) = alternatives
        elif alternatives:
            locations[name] = tuple(
                replace(location, layers=tuple(layers)) for location, layers in alternatives.items()
            )
    return locations, missing


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
    no_head = UNPROVED + "the head does not run once in a forward"
    sites: FoundSites = {
        "embed": UNPROVED
        + "the token embedding does not run once, with as many numbers for each token as the "
        "stream has",
        "pos_embed": UNPROVED
        + "the first block does not read the token embedding and something more",
        "final_norm": no_head,
        "lm_head": no_head,
        "logits": ModuleLocation("", item="logits"),
    }
    if head is not None:
        sites["lm_head"] = ModuleLocation(head.path)
        sites["final_norm"] = _locate_final_norm(config, outside, head, stream)
    token = embed.output_by_token if embed else None
    if embed is None or first_block is None or stream is None or token is None:
        return sites
    if token.shape == stream.shape:
        if token is embed.output:
            sites["embed"] = ModuleLocation(embed.path)
        earlier = [call for call in outside if call.start < first_block.start]
        sites["pos_embed"] = _locate_pos_embed(earlier, token, stream)
    return sites


def _calls_outside_blocks(
    recording: Recording, path: str, embed: ModuleCall | None
) -> list[ModuleCall]:
    """Returns the calls that are not in a block and contain none, without the token embedding."""
    excluded: set[ModuleCall | None] = {embed}
    prefix = path.removesuffix("{layer}")
    for call in recording.calls:
        chain = (*call.enclosing, call)
        if any(other.path.startswith(prefix) for other in chain):
            excluded.update(chain)
    return [call for call in recording.calls if call not in excluded]


def _locate_pos_embed(
    calls: list[ModuleCall], token: Tensor, stream: Tensor
) -> ModuleLocation | str:
    """Locates what is added to the token embedding before the first block."""
    if scale_factor(token, stream) is not None:
        return "nothing is added to the token's embedding: positions act inside the blocks"
    for call in calls:
        output = call.output
        if output is None or output.ndim != 3 or not call.runs_once:
            continue
        is_like_token = output.shape[1:] == token.shape[1:]
        if is_like_token and is_sum([token, output.expand_as(token)], stream):
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
        output = call.output
        if call.end > head.start or output is None or output.shape != head_input.shape:
            continue
        divisor = _find_divisor(config, output, head_input)
        if divisor is not None:
            if call.runs_once:
                return ModuleLocation(call.path, over=divisor)
            subject = f"{call.path!r}, which runs more than once,"
    return f"{UNPROVED}{subject} gives what the head reads"


def _find_divisor(config: Any, output: Tensor, quotient: Tensor) -> str | None:
    """Returns the setting by which the output is divided; "" for none; None if it is not so."""
    if equal_values(output, quotient):
        return ""
    factor = scale_factor(quotient, output)
    if factor is None:
        return None
    for name in dir(config):
        static_value = inspect.getattr_static(config, name, None)
        if name.startswith("_") or not isinstance(static_value, property | float | int):
            continue
        value = getattr(config, name)
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        if is_number and abs(value - factor) <= 1e-4 * abs(factor):
            return name
    return None


# ---- sizes


def _corrected_sizes(
    model: nn.Module, config: Any, family: Family, kinds: list[int], findings: Findings
) -> SizeCorrections:
    """Returns a function that gives the sizes of a block in which its configuration is wrong."""
    layout = Layout(model, config, family)
    general: dict[str, int | None] = {}
    by_kind: dict[int, dict[str, int | None]] = {}
    for number, block in findings.items():
        by_kind[number] = {}
        if isinstance(block, Block):
            configured = layout.sizes_of(number)
            for name, size in _measured_sizes(block).items():
                if configured.get(name) != size:
                    by_kind[number][name] = size
                    general.setdefault(name, size)

    def sizes(config: Any, layer: int | None) -> dict[str, int | None]:
        return general if layer is None else by_kind[kinds[layer]]

    return sizes


def _measured_sizes(block: Block) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {"d_model": block.pre.shape[-1]}
    if block.attention:
        for name in HEAD_SIZES:
            sizes[name] = block.attention.sizes[name]
    for site, axis, item in (("router_logits", "expert", 0), ("experts", "choice", 2)):
        location = block.sites[site]
        if isinstance(location, ModuleLocation):
            for call in block.call.inner:
                if call.path == location.path:
                    sizes[axis] = call.outputs[item].shape[-1]
    return sizes
