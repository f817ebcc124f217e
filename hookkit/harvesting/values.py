"""Values: what is at the sites at the positions wanted, a row for each, from one forward of a batch of texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ..errors import BadHook
from ..hooks.looking import capture
from ..model import LM
from ..positions import Where
from ..prompts import pad_id
from ..runs import forward
from ..sites import SQUARE, AnySite, ModuleSite, Sites, SitesLike
from .texts import Read

PROBE = 2, 3  # rows and tokens of the forward that shows what a site holds


@dataclass(frozen=True)
class Kind:
    """What a site holds at one position: the sizes of its axes and their numbers' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def probed(lm: LM, sites: SitesLike, what: str) -> dict[AnySite, Kind]:
    """What each site of a selection holds, every layer written out; found out by a forward of two short rows.

    `BadHook` where a site has no vector for each position: scores and pattern, or a module without rows and positions.
    """
    chosen = lm.expand(sites)
    for site in chosen:
        if not isinstance(site, ModuleSite) and site.name in SQUARE:
            raise BadHook(
                f"{what} keeps as many numbers for every token, and {site} has one for each query and key, more with "
                "every token: use hk.forward(lm, texts, hk.capture(site)) on texts at a time"
            )
    rows, width = PROBE
    run = forward(lm, [[pad_id(lm)] * width] * rows, capture(chosen), logits=False)
    kinds: dict[AnySite, Kind] = {}
    for site in chosen:
        found = run.captured(site)
        if found.positions is None or found.values.shape[:2] != PROBE:
            raise BadHook(
                f"{what} keeps a row for every token, and {site} has shape {list(found.values.shape)} for {rows} rows "
                f"of {width} tokens, without axes batch and pos: use hk.forward(lm, texts, hk.capture(site))"
            )
        kinds[site] = Kind(tuple(found.values.shape[2:]), found.values.dtype)
    return kinds


def at_sites(lm: LM, reads: Sequence[Read], sites: Sites, where: Where) -> dict[AnySite, Shaped[Tensor, "row ..."]]:
    """The values at each site, a row for every position wanted of these texts, in their order."""
    run = forward(lm, [read.ids for read in reads], capture(sites, pos=where.pos), logits=False)
    wanted = [place for read in reads for place in read.places]
    found = {}
    for site in sites:
        captured = run.captured(site)
        assert captured.positions is not None
        there = captured.positions >= 0
        assert captured.positions[there].tolist() == wanted, f"{site}: the positions are not those that were planned"
        found[site] = (
            captured.values.flatten(0, 1) if bool(there.all()) else captured.values[there.to(captured.values.device)]
        )
    return found


def row_numbers(reads: Sequence[Read], starts: Sequence[int]) -> Int[Tensor, " row"]:
    """Where each row of `at_sites` stands in the order of the texts, given where each text's rows begin."""
    return torch.cat([torch.arange(start, start + len(read.places)) for read, start in zip(reads, starts, strict=True)])


def as_stored(site: AnySite, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values on the CPU in the dtype of the shards. `BadHook` where a number is too large for it."""
    stored = values.to(dtype).cpu()
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        lost = torch.isinf(stored) & torch.isfinite(values).cpu()
        if bool(lost.any()):
            largest = values.abs().max().item()
            name = str(dtype).removeprefix("torch.")
            raise BadHook(
                f"dtype={name!r} holds numbers up to {torch.finfo(dtype).max:g}, and {site} has {largest:g}: use "
                "'bfloat16' or 'float32'"
            )
    return stored
