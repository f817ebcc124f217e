"""The row of a family that is not in the table: the sites that are there once, the blocks, the sizes."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Place
from ..layout import Layout
from ..sites import AXES
from .attending import HEADED, UNPROVED
from .blocks import kinds, merged, studied
from .matching import ratio, same, sums
from .stream import Block
from .watching import Visit, Watched, dry_run

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
        raise LookupError(f"the model has no list of {count} blocks (the configuration's num_hidden_layers)")
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
    special = {getattr(config, f"{word}_token_id", None) for word in ("pad", "bos", "eos", "unk", "mask", "sep")}
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
        for name in [name for name, place in block.places.items() if place.side == "inside" and name in HEADED]:
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
            block.places["q_rot"] = Place(path, "inside", "query")
            if not attention.repeated:
                block.places["k_rot"] = Place(path, "inside", "key")


def _explained(family: Family) -> Family:
    """Every site with a place or a reason, and no reason for what every block has."""
    missing = dict(family.missing)
    for name in AXES:
        if name not in family.places:
            missing.setdefault(name, UNPROVED + "nothing like it was seen")
    return replace(family, missing=missing)


# ---- the sites that are there once


def _once(model: Any, config: Any, watched: Watched, path: str) -> tuple[dict[str, Place], dict[str, str]]:
    """embed, pos_embed, final_norm, lm_head and logits."""
    embed, head = watched.of(model.get_input_embeddings()), watched.of(model.get_output_embeddings())
    places: dict[str, Place] = {"logits": Place("", item="logits")}
    missing: dict[str, str] = {}
    first = next((v for v in watched.visits if v.path == path.format(layer=0)), None)
    stream = watched.laid(first.read) if first else None
    if embed is not None and stream is not None and embed.result is not None and embed.result.shape == stream.shape:
        places["embed"] = Place(embed.path)
    else:
        why = "the token embedding does not run once, with as many numbers for each token as the stream has"
        missing["embed"] = UNPROVED + why
    in_blocks = [visit for visit in watched.visits if any(_is_block(each, path) for each in (visit, *visit.above))]
    above = {id(visit) for each in in_blocks for visit in (each, *each.above)}
    outside = [visit for visit in watched.visits if id(visit) not in above and visit is not embed]
    _positions(watched, embed, first, outside, places, missing)
    if head is None:
        missing["lm_head"] = missing["final_norm"] = UNPROVED + "the head does not run once in a forward"
        return places, missing
    places["lm_head"] = Place(head.path)
    if stream is not None and head.read is not None and head.read.shape[-1] == stream.shape[-1]:
        _final(watched, config, head, outside, places, missing)
    else:
        missing["final_norm"] = UNPROVED + "the head does not read as many numbers of each token as the stream has"
    return places, missing


def _is_block(visit: Visit, path: str) -> bool:
    before, _, after = path.partition("{layer}")
    return visit.path.startswith(before) and visit.path.removeprefix(before).isdecimal() and not after


def _positions(
    watched: Watched,
    embed: Visit | None,
    first: Visit | None,
    outside: list[Visit],
    places: dict[str, Place],
    missing: dict[str, str],
) -> None:
    """pos_embed: what a module gives that, added to the token's embedding, is what the first block reads."""
    stream = watched.laid(first.read) if first else None
    token = watched.laid(embed.result) if embed else None
    if stream is None or token is None or stream.shape != token.shape:
        missing["pos_embed"] = UNPROVED + "the first block does not read the token embedding and something more"
        return
    if ratio(token, stream) is not None:
        missing["pos_embed"] = "nothing is added to the token's embedding: positions act inside the blocks"
        return
    for visit in outside:
        given = visit.result
        if first is None or visit.start > first.start or given is None or given.shape[-1] != token.shape[-1]:
            continue
        fits = given.ndim == 3 and watched.once(visit) and given.shape[1] == token.shape[1]
        if fits and sums([token, given.expand_as(token)], stream):
            places["pos_embed"] = Place(visit.path)
            return
    missing["pos_embed"] = (
        UNPROVED + "no module's output, added to the token's embedding, is what the first block reads"
    )


def _final(
    watched: Watched, config: Any, head: Visit, outside: list[Visit], places: dict[str, Place], missing: dict[str, str]
) -> None:
    """final_norm: the module outside the blocks whose output, perhaps divided by a number, the head reads."""
    reads = head.read
    for visit in [visit for visit in outside if visit.end < head.start and watched.once(visit)]:
        if reads is None or visit.result is None or visit.result.shape != reads.shape:
            continue
        if same(visit.result, reads):
            places["final_norm"] = Place(visit.path)
            return
        factor = ratio(visit.result, reads)
        word = None if factor is None else _word(config, 1 / factor)
        if word is not None:
            places["final_norm"] = Place(visit.path, over=word)
            return
    again = next((v.path for v in outside if v.start < head.start and same(v.result, head.read)), None)
    why = "no module outside the blocks gives" if again is None else f"{again!r}, which runs more than once, gives"
    missing["final_norm"] = f"{UNPROVED}{why} what the head reads"


def _word(config: Any, number: float) -> str | None:
    """The configuration's word for a number."""
    names = [name for name in dir(config) if not name.startswith("_")]
    for name in names:
        value = inspect.getattr_static(config, name, None)
        value = getattr(config, name) if isinstance(value, property | float | int) else None
        if isinstance(value, float | int) and not isinstance(value, bool) and abs(value - number) <= 1e-4 * abs(number):
            return name
    return None


# ---- sizes


def _sizes(model: nn.Module, config: Any, family: Family, built: list[int], found: dict[int, Block | str]) -> Any:
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
            router = next(visit for visit in block.watched.visits if visit.path == block.places[name].path)
            sizes[axis] = router.gave[2 if name == "experts" else 0].shape[-1]
    return sizes
