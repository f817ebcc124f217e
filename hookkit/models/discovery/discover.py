"""Discovery of the sites of a causal language model that is not in the table of families.

A dry run records one block of each kind. What is proved about it by value gives the locations of
all blocks. `resolve_family` returns the family of any model: from the table, by discovery, or one
that says why there are no sites.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families.schema import Family, ModuleLocation, SizeCorrections
from ..families.table import FAMILIES
from ..layout import Layout, family_of, non_decoder_family
from ..sites import AXES, SITES_WITHOUT_LAYER
from .attention_sites import HEADED, UNPROVED, find_attention
from .dry_run import ModuleCall, Recording, dry_run
from .matching import equal_values, is_sum, scale_factor
from .mlp_sites import locate_mlp_sites
from .residual_sites import Block, locate_residual_sites

LAYER_SITES = tuple(name for name in AXES if name not in SITES_WITHOUT_LAYER)
NOT_SEEN = UNPROVED + "nothing like it was seen"
ROWS, WIDTH = 2, 7  # of the token ids of the dry run

Findings = Mapping[int, Block | str]
"""By the number of a block: what was found in it, or the reason why nothing was."""


def resolve_family(model: nn.Module, config: Any, head: str | None) -> Family:
    """Returns the family of a model: its row of the table, or one found by discovery.

    `head` is the path of the output embedding, or None. Encoders, encoder-decoders and models
    without a head get the sites that they have, and the reason why others are missing.
    """
    without_decoder = non_decoder_family(model, config, head)
    if without_decoder is not None:
        return without_decoder
    family = family_of(config, head)
    is_in_table = getattr(config, "model_type", None) in FAMILIES
    if head is None or is_in_table or not _is_causal(model):
        return family
    try:
        return discover_family(model, config)
    except Exception as error:  # noqa: BLE001  a model may raise anything; the reasons below say it
        message = " ".join(str(error).split())[:200] or type(error).__name__
        reason = (
            "no row of hookkit's table has this model type, and a dry run of it ended with: "
            f"{message}; use hk.module(path)"
        )
        return replace(family, missing=dict.fromkeys(family.missing, reason))


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = type(model).__name__
    if "CausalLM" in name or "LMHead" in name:
        return True
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def discover_family(model: nn.Module, config: Any) -> Family:
    """Returns the family of a causal language model, found by a dry run of a few tokens.

    A site is offered if the run proves it by value: `resid_pre + attn_out + mlp_out` is
    `resid_post`, the value of a head is part of a projection's output, and so on. All others are
    missing, with the reason. The model is not changed.
    """
    blocks, path = _find_blocks(model, config)
    kinds = _block_kinds(blocks)
    repeated = [path.format(layer=number) for number, kind in enumerate(kinds) if kind != number]
    recording = dry_run(
        model,
        _modules_to_record(model, repeated),
        [model.get_submodule(repeated_path) for repeated_path in repeated],
        _token_ids(model, config),
    )
    findings: dict[int, Block | str] = {}
    for number in sorted(set(kinds)):
        findings[number] = _study_block(recording, path.format(layer=number))
    studied = [block for block in findings.values() if isinstance(block, Block)]
    _add_rotated_sites(studied)
    _remove_mixed_styles(studied)
    locations, missing = _merge_blocks(model, findings, kinds, path)
    whole_model = _locate_whole_model_sites(model, config, recording, path)
    locations |= whole_model.locations
    missing |= whole_model.missing
    exceptions: dict[str, str] = {}
    for block in studied:
        exceptions |= block.exceptions
    for name in AXES:
        if name not in locations:
            missing.setdefault(name, NOT_SEEN)
    family = Family(
        getattr(config, "model_type", None) or "unknown",
        locations,
        missing,
        block=path,
        attention="own" if _attention_styles(studied) == {"own"} else "interface",
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
    first_numbers: dict[Any, int] = {}
    return [
        first_numbers.setdefault(_signature(block), number) for number, block in enumerate(blocks)
    ]


def _signature(block: nn.Module) -> Any:
    modules = []
    for path, module in block.named_modules():
        weights = module.named_parameters(recurse=False)
        shapes = tuple((name, tuple(weight.shape)) for name, weight in weights)
        settings = []
        for name, value in sorted(vars(module).items()):
            is_setting = isinstance(value, bool | int | float | str)
            if is_setting and "layer" not in name and name != "training":
                settings.append((name, value))
        modules.append((path, type(module), shapes, tuple(settings)))
    return tuple(modules)


def _modules_to_record(model: nn.Module, repeated: list[str]) -> dict[str, nn.Module]:
    """Returns all modules by path, except those in blocks whose kind is recorded already."""
    prefixes = tuple(f"{path}." for path in repeated)
    modules = {}
    for path, module in model.named_modules():
        if path and not f"{path}.".startswith(prefixes):
            modules[path] = module
    return modules


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
    pre, post = recording.by_token(call.input), recording.by_token(call.output)
    reason = UNPROVED + "the block does not read and give the stream as [batch, pos, d_model]"
    if pre is None or post is None or pre.shape != post.shape:
        return reason
    if call.input is None or call.input.ndim != 3:
        return reason
    attention = find_attention(recording, call)
    if isinstance(attention, str):
        block = Block(recording, call, None, pre, post)
        block.missing |= dict.fromkeys(("attn_in", *HEADED), attention)
    else:
        block = Block(recording, call, attention, pre, post)
        block.locations |= attention.locations
        block.missing |= attention.missing
    block.locations["resid_pre"] = ModuleLocation(path, "input")
    block.locations["resid_post"] = ModuleLocation(path)
    locate_residual_sites(block)
    locate_mlp_sites(block)
    _check_output_projection(block)
    return block


def _check_output_projection(block: Block) -> None:
    """Removes z if the output projection gives no attn_out."""
    if block.attention is None or "z" not in block.locations or "attn_out" in block.locations:
        return
    projection = block.attention.output_projection
    if projection is not None and block.recording.by_token(projection.output) is None:
        block.locations.pop("z")
        block.missing["z"] = (
            UNPROVED + "attention's last projection does not give what attention adds"
        )


# ---- from the studied blocks to all blocks


def _attention_styles(blocks: list[Block]) -> set[str]:
    return {block.attention.style for block in blocks if block.attention}


def _remove_mixed_styles(blocks: list[Block]) -> None:
    """Removes the sites inside attention if not all blocks compute it in the same style."""
    if len(_attention_styles(blocks)) < 2:
        return
    reason = UNPROVED + "some blocks compute attention in their own code, and others do not"
    for block in blocks:
        for name in HEADED:
            if name in block.locations and block.locations[name].side == "inside":
                block.locations.pop(name)
                block.missing[name] = reason


def _add_rotated_sites(blocks: list[Block]) -> None:
    """Adds q_rot and k_rot to blocks without a rotation if other blocks have one."""
    attentions = [(block, block.attention) for block in blocks if block.attention]
    if not any(attention.rotates for _, attention in attentions):
        return
    for block, attention in attentions:
        if not attention.rotates and attention.style == "interface":
            path = attention.call.path
            block.locations["q_rot"] = ModuleLocation(path, "inside", "query")
            if not attention.repeats_keys:
                block.locations["k_rot"] = ModuleLocation(path, "inside", "key")


def _merge_blocks(
    root: nn.Module, findings: Findings, kinds: list[int], path: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the locations of each site over all blocks, and why a kind of block has none.

    `kinds` gives for each block the number of the block of its kind in `findings`.
    """
    locations: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in LAYER_SITES:
        by_kind: dict[int, ModuleLocation | None] = {}
        distinct: dict[ModuleLocation, None] = {}
        reasons: dict[str, None] = {}
        for number, block in findings.items():
            location = _relative_location(block, name, path.format(layer=number))
            by_kind[number] = location
            if location is not None:
                distinct[location] = None
            else:
                reasons[_reason(block, name)] = None
        if distinct:
            alternatives = tuple(distinct)
            by_layer = [by_kind[kind] for kind in kinds]
            if not _first_match_is_right(root, alternatives, by_layer, path):
                alternatives = tuple(
                    _restrict_to_layers(location, by_layer) for location in alternatives
                )
            locations[name] = alternatives[0] if len(alternatives) == 1 else alternatives
        if reasons:
            missing[name] = "; or ".join(reasons)
    return locations, missing


def _reason(block: Block | str, name: str) -> str:
    return block if isinstance(block, str) else block.missing.get(name, NOT_SEEN)


def _relative_location(block: Block | str, name: str, path: str) -> ModuleLocation | None:
    """Returns the location of a site with a path relative to its block, or None."""
    if isinstance(block, str) or name not in block.locations:
        return None
    location = block.locations[name]
    return replace(location, path="." + location.path.removeprefix(path).removeprefix("."))


def _first_match_is_right(
    root: nn.Module,
    locations: tuple[ModuleLocation, ...],
    by_layer: list[ModuleLocation | None],
    path: str,
) -> bool:
    """True if each block's location is the first one whose module the block has."""
    for layer, expected in enumerate(by_layer):
        block = root.get_submodule(path.format(layer=layer))
        paths = {name for name, _ in block.named_modules()}
        matches = [location for location in locations if location.path.removeprefix(".") in paths]
        first = matches[0] if matches else None
        if first != expected:
            return False
    return True


def _restrict_to_layers(
    location: ModuleLocation, by_layer: list[ModuleLocation | None]
) -> ModuleLocation:
    layers = tuple(layer for layer, other in enumerate(by_layer) if other == location)
    return replace(location, layers=layers)


# ---- the sites that a model has once


@dataclass(eq=False)
class _WholeModelSites:
    """The locations of embed, pos_embed, final_norm, lm_head and logits, or why they are missing.

    One discovery owns it and fills it.
    """

    recording: Recording
    outside: list[ModuleCall]  # the calls outside the blocks, without the token embedding
    locations: dict[str, ModuleLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def locate_embed(self, embed: ModuleCall | None, stream: Tensor | None) -> None:
        output = embed.output if embed else None
        if embed is None or output is None or stream is None or output.shape != stream.shape:
            self.missing["embed"] = UNPROVED + (
                "the token embedding does not run once, with as many numbers for each token as the "
                "stream has"
            )
            return
        self.locations["embed"] = ModuleLocation(embed.path)

    def locate_pos_embed(
        self, embed: ModuleCall | None, first_block: ModuleCall | None, stream: Tensor | None
    ) -> None:
        """Locates pos_embed: what is added to the token embedding before the first block."""
        token = self.recording.by_token(embed.output) if embed else None
        if first_block is None or stream is None or token is None or stream.shape != token.shape:
            self.missing["pos_embed"] = (
                UNPROVED + "the first block does not read the token embedding and something more"
            )
            return
        if scale_factor(token, stream) is not None:
            self.missing["pos_embed"] = (
                "nothing is added to the token's embedding: positions act inside the blocks"
            )
            return
        for call in self.outside:
            output = call.output
            if call.start > first_block.start or output is None or output.ndim != 3:
                continue
            if output.shape[1:] != token.shape[1:] or not self.recording.runs_once(call):
                continue
            if is_sum([token, output.expand_as(token)], stream):
                self.locations["pos_embed"] = ModuleLocation(call.path)
                return
        self.missing["pos_embed"] = UNPROVED + (
            "no module's output, added to the token's embedding, is what the first block reads"
        )

    def locate_final_norm(self, config: Any, head: ModuleCall) -> None:
        """Locates final_norm: the module whose output, perhaps divided, the head reads."""
        for call in self.outside:
            if call.end < head.start and self.recording.runs_once(call):
                location = _final_norm_location(config, call, head)
                if location is not None:
                    self.locations["final_norm"] = location
                    return
        subject = "no module outside the blocks"
        for call in self.outside:
            if call.start < head.start and equal_values(call.output, head.input):
                subject = f"{call.path!r}, which runs more than once,"
                break
        self.missing["final_norm"] = f"{UNPROVED}{subject} gives what the head reads"


def _final_norm_location(config: Any, call: ModuleCall, head: ModuleCall) -> ModuleLocation | None:
    """Returns the location of a module whose output the head reads, or None."""
    if head.input is None or call.output is None or call.output.shape != head.input.shape:
        return None
    if equal_values(call.output, head.input):
        return ModuleLocation(call.path)
    factor = scale_factor(call.output, head.input)
    if factor is None:
        return None
    name = _setting_with_value(config, 1 / factor)
    return None if name is None else ModuleLocation(call.path, over=name)


def _locate_whole_model_sites(
    model: Any, config: Any, recording: Recording, path: str
) -> _WholeModelSites:
    embed = recording.only_call(model.get_input_embeddings())
    head = recording.only_call(model.get_output_embeddings())
    first_block = next(iter(recording.calls_at(path.format(layer=0))), None)
    stream = recording.by_token(first_block.input) if first_block else None
    sites = _WholeModelSites(recording, _calls_outside_blocks(recording, path, embed))
    sites.locations["logits"] = ModuleLocation("", item="logits")
    sites.locate_embed(embed, stream)
    sites.locate_pos_embed(embed, first_block, stream)
    if head is None:
        reason = UNPROVED + "the head does not run once in a forward"
        sites.missing["lm_head"] = sites.missing["final_norm"] = reason
        return sites
    sites.locations["lm_head"] = ModuleLocation(head.path)
    if stream is not None and head.input is not None and head.input.shape[-1] == stream.shape[-1]:
        sites.locate_final_norm(config, head)
    else:
        sites.missing["final_norm"] = (
            UNPROVED + "the head does not read as many numbers of each token as the stream has"
        )
    return sites


def _calls_outside_blocks(
    recording: Recording, path: str, embed: ModuleCall | None
) -> list[ModuleCall]:
    """Returns the calls that are not in a block and contain none, without the token embedding."""
    excluded: set[ModuleCall | None] = {embed}
    for call in recording.calls:
        chain = (*call.enclosing, call)
        if any(_is_block(other.path, path) for other in chain):
            excluded.update(chain)
    return [call for call in recording.calls if call not in excluded]


def _is_block(path: str, block_path: str) -> bool:
    prefix = block_path.removesuffix("{layer}")
    return path.startswith(prefix) and path.removeprefix(prefix).isdecimal()


def _setting_with_value(config: Any, number: float) -> str | None:
    """Returns the name of a configuration's setting with this value, or None."""
    for name in dir(config):
        if name.startswith("_"):
            continue
        static_value = inspect.getattr_static(config, name, None)
        if not isinstance(static_value, property | float | int):
            continue
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, float | int):
            continue
        if abs(value - number) <= 1e-4 * abs(number):
            return name
    return None


# ---- sizes


def _corrected_sizes(
    model: nn.Module, config: Any, family: Family, kinds: list[int], findings: Findings
) -> SizeCorrections:
    """Returns a function that gives the sizes of a block in which its configuration is wrong."""
    layout = Layout(model, config, family)
    by_kind: dict[int, dict[str, int | None]] = {}
    for number, block in findings.items():
        by_kind[number] = {}
        if isinstance(block, Block):
            configured = layout.sizes_of(number)
            for name, size in _measured_sizes(block).items():
                if configured.get(name) != size:
                    by_kind[number][name] = size
    general: dict[str, int | None] = {}
    for corrections in by_kind.values():
        general = {**corrections, **general}

    def sizes(config: Any, layer: int | None) -> dict[str, int | None]:
        return general if layer is None else by_kind[kinds[layer]]

    return sizes


def _measured_sizes(block: Block) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {"d_model": block.pre.shape[-1]}
    if block.attention:
        for name in ("head", "kv_head", "d_head", "d_qk", "d_v"):
            sizes[name] = block.attention.sizes[name]
    for site, axis, item in (("router_logits", "expert", 0), ("experts", "choice", 2)):
        if site in block.locations:
            router = block.recording.calls_at(block.locations[site].path)[0]
            sizes[axis] = router.outputs[item].shape[-1]
    return sizes
