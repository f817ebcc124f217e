"""One block of each kind is studied, and what was found becomes the places of all blocks.

The row of a family that is not in the table: the sites that are there once, the blocks, the sizes.

The row for any model: of the table, found out, or one that says why there is none.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families.schema import Family, ModuleLocation
from ..families.table import FAMILIES
from ..layout import Layout, family_of, no_decoder
from ..sites import AXES, WHOLE_MODEL
from .attention_sites import HEADED, UNPROVED, Attention, attention_of
from .dry_run import Visit, Watched, dry_run
from .matching import ratio, same, sums
from .mlp_sites import read_mlp
from .residual_sites import Block, follow

LAYERED = tuple(name for name in AXES if name not in WHOLE_MODEL)


def kinds(blocks: nn.ModuleList) -> list[int]:
    """For each block, the first block that is built like it: the same modules, sizes and settings."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_kind(block), number) for number, block in enumerate(blocks)]


def _kind(block: nn.Module) -> Any:
    modules = []
    for path, module in block.named_modules():
        shapes = tuple(
            (name, tuple(weight.shape)) for name, weight in module.named_parameters(recurse=False)
        )
        settings = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str)
            and "layer" not in name
            and name != "training"
        )
        modules.append((path, type(module), shapes, settings))
    return tuple(modules)


def studied(watched: Watched, visit: Visit) -> Block | str:
    """What was found of one block, or the reason why nothing was."""
    pre = watched.laid(visit.read)
    post = watched.laid(visit.result)
    if (
        pre is None
        or post is None
        or pre.shape != post.shape
        or visit.read is None
        or visit.read.ndim != 3
    ):
        return UNPROVED + "the block does not read and give the stream as [batch, pos, d_model]"
    attention = attention_of(watched, visit)
    block = Block(
        watched, visit, attention if isinstance(attention, Attention) else None, pre, post
    )
    block.places |= {
        "resid_pre": ModuleLocation(visit.path, "input"),
        "resid_post": ModuleLocation(visit.path),
    }
    if isinstance(attention, Attention):
        block.places |= attention.places
        block.missing |= attention.missing
    else:
        block.missing |= dict.fromkeys(("attn_in", *HEADED), attention)
    follow(block)
    read_mlp(block)
    _check_output(block)
    return block


def _check_output(block: Block) -> None:
    """z is what the output projection reads only if that projection gives what attention adds, or gives."""
    found = block.attention
    term = block.places.get("attn_out")
    if found is None or found.out is None or "z" not in found.places:
        return
    if term is None and block.watched.laid(found.out.result) is None:
        block.places.pop("z")
        block.missing["z"] = (
            UNPROVED + "attention's last projection does not give what attention adds"
        )


def merged(
    root: nn.Module, found: Mapping[int, Block | str], built: list[int], path: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The places of each site over all kinds of blocks, and why a kind has none.

    `found` is by the number of the block that was studied; `built` says for each block which one that is.
    """
    places: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in LAYERED:
        by_kind = {
            number: _relative(block, name, path.format(layer=number))
            for number, block in found.items()
        }
        there = list(dict.fromkeys(place for place in by_kind.values() if place is not None))
        reasons = list(
            dict.fromkeys(_reason(block, name) for n, block in found.items() if by_kind[n] is None)
        )
        if there:
            own = [by_kind[kind] for kind in built]
            alternatives = (
                there
                if _told_apart(root, there, own, path)
                else [_only(place, own) for place in there]
            )
            places[name] = alternatives[0] if len(alternatives) == 1 else tuple(alternatives)
        if reasons:
            missing[name] = "; or ".join(reasons)
    return places, missing


def _relative(block: Block | str, name: str, path: str) -> ModuleLocation | None:
    place = None if isinstance(block, str) else block.places.get(name)
    return (
        None
        if place is None
        else replace(place, path="." + place.path.removeprefix(path).removeprefix("."))
    )


def _told_apart(
    root: nn.Module, there: list[ModuleLocation], own: list[ModuleLocation | None], path: str
) -> bool:
    """True where the first of the places whose module a block has is its own."""
    for layer, place in enumerate(own):
        block = root.get_submodule(path.format(layer=layer))
        paths = {name for name, _ in block.named_modules()}
        if next((each for each in there if each.path.removeprefix(".") in paths), None) != place:
            return False
    return True


def _only(place: ModuleLocation, own: list[ModuleLocation | None]) -> ModuleLocation:
    """The place in those blocks alone that have it."""
    return replace(place, layers=tuple(layer for layer, each in enumerate(own) if each == place))


def _reason(block: Block | str, name: str) -> str:
    return (
        block
        if isinstance(block, str)
        else block.missing.get(name, UNPROVED + "nothing like it was seen")
    )


ROWS, WIDTH = 2, 7


def found_out(model: nn.Module, config: Any) -> Family:
    """The row for a causal language model, found out by one dry run of a few tokens, without a cache.

    A site is offered where the run proves it by value: `resid_pre + attn_out + mlp_out` is `resid_post`, the value of
    a head is a part of what a projection gave, and so on. All others are missing, with the reason. The model is left
    as it was found.
    """
    name = getattr(config, "model_type", None) or "unknown"
    blocks, path = _blocks(model, config)
    built = kinds(blocks)
    left_out = [block for number, block in enumerate(blocks) if built[number] != number]
    watched = dry_run(model, _watched_modules(model, path, built), left_out, _ids(model, config))
    found = {number: _study(watched, path.format(layer=number)) for number in sorted(set(built))}
    known = [block for block in found.values() if isinstance(block, Block)]
    _turned(known)
    _one_style(known)
    places, missing = merged(model, found, built, path)
    once, why = _once(model, config, watched, path)
    family = Family(
        name,
        {**places, **once},
        {**missing, **why},
        block=path,
        attention=_style(known),
        exceptions={law: reason for block in known for law, reason in block.exceptions.items()},
        found=True,
    )
    return _explained(replace(family, sizes=_sizes(model, config, family, built, found)))


def _blocks(model: nn.Module, config: Any) -> tuple[nn.ModuleList, str]:
    """The list of the blocks, the shallowest of that length, and its path."""
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise LookupError(
            f"the model has no list of {count} blocks (the configuration's num_hidden_layers)"
        )
    path, found = min(lists, key=lambda each: each[0].count("."))
    return found, f"{path}.{{layer}}"


def _watched_modules(model: nn.Module, path: str, built: list[int]) -> dict[str, nn.Module]:
    """All modules outside the blocks, and those of one block of each kind."""
    left_out = [path.format(layer=number) for number, kind in enumerate(built) if kind != number]
    inside = tuple(f"{block}." for block in left_out)
    return {
        name: module
        for name, module in model.named_modules()
        if name and name not in left_out and not name.startswith(inside)
    }


def _ids(model: Any, config: Any) -> Tensor:
    """A few token ids, all different, none of them a special one where there is room."""
    embedding = model.get_input_embeddings()
    vocab = getattr(embedding, "num_embeddings", None) or config.vocab_size
    special = {
        getattr(config, f"{word}_token_id", None)
        for word in ("pad", "bos", "eos", "unk", "mask", "sep")
    }
    step = max(1, vocab // (ROWS * WIDTH + 3))
    ids = [number for number in range(step, vocab, step) if number not in special]
    ids = (ids * (ROWS * WIDTH))[: ROWS * WIDTH]
    return torch.tensor(ids, device=embedding.weight.device).view(ROWS, WIDTH)


def _study(watched: Watched, path: str) -> Block | str:
    visits = [visit for visit in watched.visits if visit.path == path]
    if len(visits) != 1:
        return f"{UNPROVED}the block {path!r} ran {len(visits)} times in one forward"
    return studied(watched, visits[0])


def _style(known: list[Block]) -> Any:
    styles = {block.attention.style for block in known if block.attention}
    return "own" if styles == {"own"} else "interface"


def _one_style(known: list[Block]) -> None:
    """Take out what is inside attention, where some blocks call transformers' interface and others do not."""
    if len({block.attention.style for block in known if block.attention}) < 2:
        return
    why = UNPROVED + "some blocks compute attention in their own code, and others do not"
    for block in known:
        for name in [
            name
            for name, place in block.places.items()
            if place.side == "inside" and name in HEADED
        ]:
            block.places.pop(name)
            block.missing[name] = why


def _turned(known: list[Block]) -> None:
    """Where some blocks turn q and k and others do not, q_rot and k_rot are there in all of them."""
    attentions = [(block, block.attention) for block in known if block.attention]
    if not any(attention.turned for _, attention in attentions):
        return
    for block, attention in attentions:
        if not attention.turned and attention.style == "interface":
            path = attention.visit.path
            block.places["q_rot"] = ModuleLocation(path, "inside", "query")
            if not attention.repeated:
                block.places["k_rot"] = ModuleLocation(path, "inside", "key")


def _explained(family: Family) -> Family:
    """Every site with a place or a reason, and no reason for what every block has."""
    missing = dict(family.missing)
    for name in AXES:
        if name not in family.places:
            missing.setdefault(name, UNPROVED + "nothing like it was seen")
    return replace(family, missing=missing)


# ---- the sites that are there once


def _once(
    model: Any, config: Any, watched: Watched, path: str
) -> tuple[dict[str, ModuleLocation], dict[str, str]]:
    """embed, pos_embed, final_norm, lm_head and logits."""
    embed, head = (
        watched.of(model.get_input_embeddings()),
        watched.of(model.get_output_embeddings()),
    )
    places: dict[str, ModuleLocation] = {"logits": ModuleLocation("", item="logits")}
    missing: dict[str, str] = {}
    first = next((v for v in watched.visits if v.path == path.format(layer=0)), None)
    stream = watched.laid(first.read) if first else None
    if (
        embed is not None
        and stream is not None
        and embed.result is not None
        and embed.result.shape == stream.shape
    ):
        places["embed"] = ModuleLocation(embed.path)
    else:
        why = "the token embedding does not run once, with as many numbers for each token as the stream has"
        missing["embed"] = UNPROVED + why
    in_blocks = [
        visit
        for visit in watched.visits
        if any(_is_block(each, path) for each in (visit, *visit.above))
    ]
    above = {id(visit) for each in in_blocks for visit in (each, *each.above)}
    outside = [visit for visit in watched.visits if id(visit) not in above and visit is not embed]
    _positions(watched, embed, first, outside, places, missing)
    if head is None:
        missing["lm_head"] = missing["final_norm"] = (
            UNPROVED + "the head does not run once in a forward"
        )
        return places, missing
    places["lm_head"] = ModuleLocation(head.path)
    if stream is not None and head.read is not None and head.read.shape[-1] == stream.shape[-1]:
        _final(watched, config, head, outside, places, missing)
    else:
        missing["final_norm"] = (
            UNPROVED + "the head does not read as many numbers of each token as the stream has"
        )
    return places, missing


def _is_block(visit: Visit, path: str) -> bool:
    before, _, after = path.partition("{layer}")
    return (
        visit.path.startswith(before) and visit.path.removeprefix(before).isdecimal() and not after
    )


def _positions(
    watched: Watched,
    embed: Visit | None,
    first: Visit | None,
    outside: list[Visit],
    places: dict[str, ModuleLocation],
    missing: dict[str, str],
) -> None:
    """pos_embed: what a module gives that, added to the token's embedding, is what the first block reads."""
    stream = watched.laid(first.read) if first else None
    token = watched.laid(embed.result) if embed else None
    if stream is None or token is None or stream.shape != token.shape:
        missing["pos_embed"] = (
            UNPROVED + "the first block does not read the token embedding and something more"
        )
        return
    if ratio(token, stream) is not None:
        missing["pos_embed"] = (
            "nothing is added to the token's embedding: positions act inside the blocks"
        )
        return
    for visit in outside:
        given = visit.result
        if (
            first is None
            or visit.start > first.start
            or given is None
            or given.shape[-1] != token.shape[-1]
        ):
            continue
        fits = given.ndim == 3 and watched.once(visit) and given.shape[1] == token.shape[1]
        if fits and sums([token, given.expand_as(token)], stream):
            places["pos_embed"] = ModuleLocation(visit.path)
            return
    missing["pos_embed"] = (
        UNPROVED
        + "no module's output, added to the token's embedding, is what the first block reads"
    )


def _final(
    watched: Watched,
    config: Any,
    head: Visit,
    outside: list[Visit],
    places: dict[str, ModuleLocation],
    missing: dict[str, str],
) -> None:
    """final_norm: the module outside the blocks whose output, perhaps divided by a number, the head reads."""
    reads = head.read
    for visit in [visit for visit in outside if visit.end < head.start and watched.once(visit)]:
        if reads is None or visit.result is None or visit.result.shape != reads.shape:
            continue
        if same(visit.result, reads):
            places["final_norm"] = ModuleLocation(visit.path)
            return
        factor = ratio(visit.result, reads)
        word = None if factor is None else _word(config, 1 / factor)
        if word is not None:
            places["final_norm"] = ModuleLocation(visit.path, over=word)
            return
    again = next(
        (v.path for v in outside if v.start < head.start and same(v.result, head.read)), None
    )
    why = (
        "no module outside the blocks gives"
        if again is None
        else f"{again!r}, which runs more than once, gives"
    )
    missing["final_norm"] = f"{UNPROVED}{why} what the head reads"


def _word(config: Any, number: float) -> str | None:
    """The configuration's word for a number."""
    names = [name for name in dir(config) if not name.startswith("_")]
    for name in names:
        value = inspect.getattr_static(config, name, None)
        value = getattr(config, name) if isinstance(value, property | float | int) else None
        if (
            isinstance(value, float | int)
            and not isinstance(value, bool)
            and abs(value - number) <= 1e-4 * abs(number)
        ):
            return name
    return None


# ---- sizes


def _sizes(
    model: nn.Module, config: Any, family: Family, built: list[int], found: dict[int, Block | str]
) -> Any:
    """The function that corrects the sizes which the configuration would give otherwise, block by block."""
    layout = Layout(model, config, family)
    by_kind: dict[int, dict[str, int | None]] = {}
    for number, block in found.items():
        known = layout.sizes_of(number)
        seen = {} if isinstance(block, str) else _seen(block)
        by_kind[number] = {name: size for name, size in seen.items() if known.get(name) != size}
    general: dict[str, int | None] = {}
    for sizes in by_kind.values():
        general = {**sizes, **general}
    return lambda config, layer: general if layer is None else by_kind[built[layer]]


def _seen(block: Block) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {"d_model": block.pre.shape[-1]}
    if block.attention:
        names = ("head", "kv_head", "d_head", "d_qk", "d_v")
        sizes |= {name: block.attention.sizes[name] for name in names}
    for name, axis in (("router_logits", "expert"), ("experts", "choice")):
        if name in block.places:
            router = next(
                visit for visit in block.watched.visits if visit.path == block.places[name].path
            )
            sizes[axis] = router.gave[2 if name == "experts" else 0].shape[-1]
    return sizes


def row_of(model: nn.Module, config: Any, head: str | None) -> Family:
    """The table's row for a model; for a causal language model that the table lacks, the row found out by a dry run.

    `head` is the path of the output embedding, or None where there is none. Encoders, encoder-decoders and models
    without a head have what can be said of them, and the reason why the rest is missing.
    """
    refused = no_decoder(model, config, head)
    if refused is not None:
        return refused
    known = family_of(config, head)
    listed = getattr(config, "model_type", None) in FAMILIES
    if head is None or listed or not _is_causal(model):
        return known
    try:
        return found_out(model, config)
    except Exception as error:  # noqa: BLE001  what a model of any kind may raise; it is told with each reason
        said = " ".join(str(error).split())[:200] or type(error).__name__
        reason = (
            f"no row of hookkit's table has this model type, and a dry run of it ended with: {said}"
        )
        return replace(
            known, missing=dict.fromkeys(known.missing, f"{reason}; use hk.module(path)")
        )


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = type(model).__name__
    return (
        "CausalLM" in kind or "LMHead" in kind or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
