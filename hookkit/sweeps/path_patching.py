"""Path patching: the effect of one component on another along the direct path alone.

(Wang et al. 2022; Goldowsky-Dill et al. 2023.) On the clean prompts,

1. a sender has the value that it has on the corrupted prompts, and every other component behind it is held at its clean
   value, so that the receivers read the sender's change and nothing that others made of it;
2. what the receivers then read is put into them in a second run, in which all else is free.

With no receivers the logits themselves are what receives.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import pandas as pd

from ..arguments import checks_arguments
from ..errors import BadHook
from ..hooks.ablation import patch
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, CapturedChunk, Captures, LazyCapture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import AnySite, Site, Sites, SitesLike
from ..runs.forward import forward
from ..runs.run import Run
from ..runs.taps import planned
from ..tables.token_metrics import logit
from .cells import as_hooks
from .execute import Running
from .grids import Metrics, Places, Positions, check_pairs, grid_of, positions_of
from .journal import Journal
from .plan import Plan
from .sweep import Settings, plan, sweep

ORDER = ("z", "attn_out", "mlp_out")  # of what adds to the stream, within a block


@checks_arguments
def path_patching(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metrics: Metrics,
    *,
    senders: str = "z",
    receivers: SitesLike | None = None,
    freeze: Sequence[str] = ("z",),
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    pos: Positions = None,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """What each sender does to the receivers directly: the metric when only that path carries corrupted values.

    senders     a site: each of its heads ("z"), or each layer of it ("mlp_out")
    receivers   what heads read, such as lm.sites("q", layers=[9], heads=[3]); left out, the logits
    freeze      what is held at its clean value: ("z",) lets the MLPs pass the change on, as in the paper on indirect
                objects; ("z", "mlp_out") leaves the residual stream alone
    pos         positions at which the sender is patched; left out, all at once

    The prompts that run are the clean ones; the effect is 0 where nothing changed and 1 where the metric came to be
    that of the corrupted prompts. Columns: layer, head, pos, and those of `sweep`.
    """
    for name in (senders, *freeze):
        if name not in ORDER:
            raise BadHook(
                f"{name!r} adds nothing to the residual stream by itself: name some of {', '.join(ORDER)}"
            )
    wanted = Sites(()) if receivers is None else lm.expand(receivers)
    if not freeze and not wanted:
        raise BadHook(
            "freeze=() holds nothing, so that every path carries the change: that is hk.patching"
        )
    whole = list(dict.fromkeys(_whole(site) for site in wanted))
    held = [Site(name, layer) for name in freeze for layer in lm.layout.layers(name) or []]
    lengths = check_pairs(lm, corrupted, clean)
    under = as_hooks(settings.get("under", ()))
    run = forward(lm, clean, *under, capture(list(dict.fromkeys([*held, *whole]))), logits=False)
    other = forward(lm, corrupted, *under, capture(lm.sites(senders)), logits=False)
    everywhere: Places = {None: [(None, None)]}
    places = everywhere if pos is None else positions_of(lengths, [senders], pos) or everywhere
    grid, _ = grid_of(lm, [senders], layers, heads, places if pos is not None else None)

    def sent(layer: int, head: int | None = None, pos: Any = None) -> list[Hook]:
        behind = [site for site in held if _behind(site, senders, layer)]
        patches = [patch(Site(senders, layer, head), other, pos=p, rows=r) for p, r in places[pos]]
        return [*([patch(behind, run)] if behind else []), *patches]

    if not wanted:
        return sweep(lm, clean, grid, sent, metrics, target=corrupted, **settings)
    first_run = plan(lm, clean, grid, sent, logit(0), under=under, memory=settings.get("memory"))
    read = _received(first_run, run, whole)

    def received(**at: Any) -> list[Hook]:
        source, first = read[tuple(at.values())]
        if source is None:
            return []
        return [
            patch(wanted, source, pos=slice(first, length), rows=rows)
            for length, rows in _by_length(lengths, first)
        ]

    return sweep(lm, clean, grid, received, metrics, target=corrupted, **settings)


def _by_length(lengths: Sequence[int], longer: int) -> list[tuple[int, list[int]]]:
    """The rows of each length that is larger than a number."""
    found = sorted({length for length in lengths if length > longer})
    return [
        (length, [row for row, each in enumerate(lengths) if each == length]) for length in found
    ]


def _whole(site: AnySite) -> Site:
    if not isinstance(site, Site) or site.layer is None or site.name in ORDER:
        raise BadHook(
            f"{site} is no receiver: name what a block reads, such as 'q.9.3' or 'mlp_in.12'"
        )
    return Site(site.name, site.layer)


def _behind(site: Site, senders: str, layer: int) -> bool:
    """True where a site adds to the stream after the sender in this layer."""
    assert site.layer is not None
    return (site.layer, ORDER.index(site.name)) > (layer, ORDER.index(senders)) and not (
        site.layer == layer and site.name in ("z", "attn_out") and senders in ("z", "attn_out")
    )


def _received(
    made: Plan, run: Run, whole: Sequence[Site]
) -> Mapping[tuple[Any, ...], tuple[Captures | None, int]]:
    """What the receivers read in each cell, and from which position on it is something else than in the clean run."""
    for cell in made.cells:
        cell.taps = [*cell.taps, *planned(made.lm, [capture(whole)], _no_reference)]
    Running(made, Journal(), lambda count: None, made.budget).run()
    found: dict[tuple[Any, ...], tuple[Captures | None, int]] = {}
    for cell in made.cells:
        looking = {action.site: action.pieces for action in cell.actions if action.change is None}
        places = [
            place for pieces in looking.values() for piece in pieces for place in _places(piece)
        ]
        slots = [
            LazyCapture(site, None, None, _with(run.captured(site), pieces))
            for site, pieces in looking.items()
        ]
        found[tuple(cell.at.values())] = (
            (Captures(tuple(slots)), min(places)) if places else (None, 0)
        )
    return found


def _places(piece: CapturedChunk) -> list[int]:
    assert piece.cells is not None
    return [places[0] for places in piece.cells.places]


def _with(clean: Captured, pieces: Sequence[CapturedChunk]) -> Captured:
    """A capture of the clean prompts with what some rows had at some positions instead."""
    values = clean.values.clone()
    for piece in pieces:
        assert piece.cells is not None
        for number, (prompt, places) in enumerate(
            zip(piece.cells.prompts, piece.cells.places, strict=True)
        ):
            values[clean.row(prompt), list(places)] = piece.values[number, : len(places)]
    unknown = tuple(
        (-1,) * len(prompt) for prompt in clean.prompts
    )  # it is no longer what these tokens say
    return replace(clean, values=values, prompts=unknown)


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("a capture has no reference")
