"""Whether a patch puts in what the model itself has, up to where its text differs: looked at, and never assumed."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..captured import Captured, Piece
from ..sites import AnySite, Site
from ..taps import Action
from .planning import Plan
from .reach import Reach, source_of
from .trial import LIMITS

Sources: TypeAlias = dict[AnySite, list[tuple[Action, Captured]]]
"""Patches with their sources, by the site without its head; each source once."""


def sources_of(plan: Plan) -> Sources:
    """The patches whose source is taken to be this model's own up to where the texts differ."""
    found: Sources = {}
    known = set()
    for cell in plan.cells:
        for action in cell.actions:
            source = source_of(action)
            if source is None or cell.alone:
                continue
            values = source.values
            same = (action.site, values.data_ptr(), values.shape, values.stride(), source.rows, source.prompts)
            if same not in known:
                known.add(same)
                found.setdefault(_whole(action.site), []).append((action, source))
    return found


def _whole(site: AnySite) -> AnySite:
    return Site(site.name, site.layer) if isinstance(site, Site) else site


def not_its_own(reach: Reach, sources: Sources, pieces: dict[AnySite, Piece], rows: Sequence[int]) -> str:
    """The first patch whose source has, where the texts are the same, other values than this model; empty if none has.

    A source may come from another model, from before a change of weights, or from a run with edits.
    """
    for site, patches in sources.items():
        piece = pieces[site]
        assert piece.cells is not None
        sizes = _sizes(piece)
        for action, source in patches:
            head = action.site.head if isinstance(action.site, Site) else None
            for number, row in enumerate(rows):
                if len(source.rows) > 1 and row not in source.rows:
                    continue  # the patch leaves it alone
                until = reach.common(source, row)
                places = {place: column for column, place in enumerate(piece.cells.places[number]) if place < until}
                values = piece.values[number] if head is None else piece.values[number][:, head]
                if not _same(source, source.row(row), places, values, sizes[number]):
                    return str(action.hook)
    return ""


def _sizes(piece: Piece) -> Tensor:
    """The largest value at each row and position, over all heads; what is hidden from a query does not count."""
    values = piece.values.float()
    values = values.masked_fill(values.abs() > torch.finfo(piece.values.dtype).max / 16, 0)
    return values.abs().flatten(2).amax(-1)


def _same(source: Captured, theirs: int, places: Mapping[int, int], values: Tensor, sizes: Tensor) -> bool:
    """True if a source has in its row `theirs` what `values` [column, ...] has in the columns of these places.

    Each position is held against its own size: the first one's is often a thousand times that of the others.
    """
    assert source.positions is not None
    found = [(n, places[place]) for n, place in enumerate(source.positions[theirs].tolist()) if place in places]
    if not found:
        return True
    there, columns = map(list, zip(*found, strict=True))
    was = source.by_place[theirs, there].float()
    now = values[columns].float().to(was.device)
    if was.ndim > 1 and was.shape[-1] != now.shape[-1]:  # queries look at as many keys as there are
        width = min(was.shape[-1], now.shape[-1])
        was, now = was[..., :width], now[..., :width]
    apart = (was - now).abs().flatten(1).amax(-1)
    limit = LIMITS.get(source.values.dtype, LIMITS[torch.float32])
    return bool((apart <= limit * sizes[columns].to(was.device).clamp(min=1e-9)).all())
