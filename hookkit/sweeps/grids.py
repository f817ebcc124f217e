"""The standard grids, each in one call: patching, ablation, steering dose.

hk.patching(lm, clean, corrupted, "resid_pre", hk.logit_diff(" Mary", " John"))     # layer x pos
hk.patching(lm, clean, corrupted, "z", metric)                                      # layer x head
hk.ablations(lm, prompts, "z", metric, to="mean", over=prompts)                     # layer x head
hk.dose(lm, prompts, "resid_post.12", vector, metric, scales=[0, 2, 4])
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, Unpack

import pandas as pd

from ..arguments import checks_arguments, described, items_of, text_of
from ..errors import BadHook, BadPrompt, EmptySelection, Unsupported
from ..hooks.ablation import ablate, patch
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import skip_block, steer
from ..models.lm import LM
from ..models.positions import CountLike, Pos, PosLike, as_pos
from ..models.prompts import Prompts, as_batch
from ..models.sites import HEADED, KEY_HEADED, WHOLE_MODEL, AnySite, Site
from ..runs.forward import forward
from ..tables.metrics import MetricLike
from .cells import as_hooks, listed
from .sweep import Settings, sweep

Metrics: TypeAlias = MetricLike | Sequence[MetricLike]
Positions: TypeAlias = Iterable[PosLike] | Mapping[str, PosLike | Sequence[int]] | None
"""The positions of a grid: a list of them, or names for them, each with one position or one for every prompt."""

Places: TypeAlias = Mapping[Any, list[tuple[Pos, CountLike]]]
"""The positions of a grid by name, each as hooks say them: where, and in which rows."""


@checks_arguments
def patching(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    sites: str | Sequence[str],
    metrics: Metrics,
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    pos: Positions = None,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """Activation patching of a whole site: what each place carries that the metric needs (Vig et al. 2020; Meng et al.
    2022; Heimersheim and Nanda 2024).

    "denoise" runs the corrupted prompts with what the clean ones have at one place: it finds what is enough. "noise"
    runs the clean prompts with what the corrupted ones have: it finds what is needed. The effect is 0 where nothing
    changed and 1 where the metric came to be that of the prompts patched from.

    A site without heads is patched at each layer and position, one with heads at each layer and head, at all positions
    at once; with `pos`, at each of those. Clean and corrupted prompts are as many, and as long as one another. Other
    settings are those of `sweep`. Columns: site where several were given, layer, head, pos, and those of `sweep`.

    >>> table = patching(lm, clean, corrupted, "attn_out", logit_diff(" Mary", " John"), layers=[9], pos=[-1])
    >>> list(table.columns)[:4]
    ['layer', 'pos', 'row', 'logit_diff']
    """
    if direction not in ("denoise", "noise"):
        raise BadHook(f"direction={direction!r} is unknown: say 'denoise' or 'noise'")
    names = names_of(sites)
    to, of = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    lengths = check_pairs(lm, of, to)
    grid, hooks_at = grid_of(lm, names, layers, heads, positions_of(lengths, names, pos))
    each = [Site(name, layer) for name in names for layer in grid.get("layer", [None])]
    places = [site for site in each if lm.layout.find(site.name, site.layer)]
    source = forward(lm, of, *as_hooks(settings.get("under", ())), capture(places), logits=False)

    def hooks(**at: Any) -> Sequence[Hook] | None:
        chosen = hooks_at(at)
        return (
            None
            if chosen is None
            else [patch(chosen[0], source, pos=p, rows=r) for p, r in chosen[1]]
        )

    return sweep(lm, to, grid, hooks, metrics, target=of, **settings)


def names_of(sites: str | Sequence[str]) -> list[str]:
    """The names of a grid's sites; `BadHook` for none, or for what is no name."""
    items = [sites] if isinstance(sites, str) else items_of(sites)
    if not items:
        raise BadHook(f"sites={described(sites)}: name a site, such as 'z', or several in a list")
    return [
        text_of(item, "sites", meaning="the name of a site, such as 'z'", error=BadHook)
        for item in items
    ]


def check_pairs(lm: LM, of: Prompts, to: Prompts) -> list[int]:
    """The lengths of prompts in pairs. Raises where they are not as many, or not as long as one another."""
    source, run = as_batch(lm, of).lengths, as_batch(lm, to).lengths
    if source != run:
        raise BadPrompt(
            f"prompts of {source} tokens are to be patched into prompts of {run} tokens: patching pairs positions, so "
            "give as many clean as corrupted ones, as long as one another"
        )
    return run


@checks_arguments
def ablations(
    lm: LM,
    prompts: Prompts,
    what: str,
    metrics: Metrics,
    *,
    to: Any = "zero",
    over: Any = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    units: Mapping[int, Iterable[int]] | Iterable[int] | None = None,
    pos: Positions = None,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """Each head, neuron or block taken out by itself: what the metric loses without it.

    `what` is a site: one with heads is ablated head by head ("z"), "mlp_post" neuron by neuron where `units` names
    them (for each layer, or for every layer), any other in each layer; "block" leaves each block out. `to` and `over`
    are those of `ablate`: zeros, the mean or a draw of other prompts, a run. All positions at once, or each of `pos`.
    """
    if what == "block":
        if to != "zero" or any(given is not None for given in (over, pos, heads, units)):
            raise BadHook(
                "a block is left out as a whole: leave to=, over=, pos=, heads= and units= out, or ablate 'attn_out' "
                "and 'mlp_out'"
            )
        chosen = range(lm.n_layers) if layers is None else layers
        return sweep(
            lm, prompts, {"layer": chosen}, lambda layer: skip_block(layer), metrics, **settings
        )
    positions = None if pos is None else positions_of(as_batch(lm, prompts).lengths, [what], pos)
    grid, hooks_at = grid_of(lm, [what], layers, heads, positions)
    wanted = _units(units, list(grid.get("layer", [])))
    grid |= {"unit": sorted({unit for each in wanted.values() for unit in each})} if wanted else {}

    def hooks(**at: Any) -> Sequence[Hook] | None:
        unit = at.pop("unit", None)
        chosen = hooks_at(at)
        if chosen is None or (unit is not None and unit not in wanted[at["layer"]]):
            return None
        given: Any = {} if unit is None else {"units": [unit]}
        return [ablate(chosen[0], to=to, over=over, pos=p, rows=r, **given) for p, r in chosen[1]]

    return sweep(lm, prompts, grid, hooks, metrics, **settings)


def _units(
    units: Mapping[int, Iterable[int]] | Iterable[int] | None, layers: Sequence[int]
) -> dict[int, list[int]]:
    if units is None:
        return {}
    if isinstance(units, Mapping):
        gone = [layer for layer in units if layer not in layers]
        if gone:
            raise BadHook(
                f"units= names layer {gone[0]}, and the grid has the layers {list(layers)}"
            )
        return {layer: listed(units.get(layer, ()), f"units[{layer}]") for layer in layers}
    every = listed(units, "units")
    return dict.fromkeys(layers, every)


@checks_arguments
def dose(
    lm: LM,
    prompts: Prompts,
    site: str | AnySite,
    vector: Any,
    metrics: Metrics,
    *,
    scales: Iterable[float] = (-8, -4, -2, -1, 0, 1, 2, 4, 8),
    pos: PosLike = None,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """A steering vector at several strengths: the metrics at each scale. Columns: scale, and those of `sweep`."""
    return sweep(
        lm,
        prompts,
        {"scale": scales},
        lambda scale: steer(site, vector, scale=scale, pos=pos),
        metrics,
        **settings,
    )


def _layers(lm: LM, name: str, layers: Iterable[int] | None) -> list[int | None]:
    if name in WHOLE_MODEL:
        lm.place(Site(name))
        return [None]
    lm.sites(name)  # raises where the model has none
    there = lm.layout.layers(name) or []
    return (
        list(there)
        if layers is None
        else [layer for layer in layers if lm.place(Site(name, layer))]
    )


def grid_of(
    lm: LM,
    names: Sequence[str],
    layers: Iterable[int] | None,
    heads: Iterable[int] | None,
    positions: Places | None,
) -> tuple[dict[str, list[Any]], Any]:
    """The dimensions of a grid over sites, and what gives the site and the positions at a point of it."""
    layers = None if layers is None else listed(layers, "layers")
    heads = None if heads is None else listed(heads, "heads")
    headed, whole = {name in HEADED for name in names}, {name in WHOLE_MODEL for name in names}
    for both, word in ((headed, "heads"), (whole, "no layers")):
        if len(both) > 1:
            raise Unsupported(
                f"of {', '.join(names)} some have {word} and some do not: make a grid of each"
            )
    for given, there, word in (
        (heads, headed == {True}, "heads"),
        (layers, whole == {False}, "layers"),
    ):
        if given is not None and not there:
            raise BadHook(f"{word}={given}: {', '.join(names)} has no {word}; leave {word}= out")
    found = {name: _layers(lm, name, layers) for name in names}
    grid: dict[str, list[Any]] = {"site": list(names)} if len(names) > 1 else {}
    each = sorted({layer for some in found.values() for layer in some if layer is not None})
    grid |= {"layer": each} if each else {}
    if headed == {True}:
        counts = [_heads(lm, name, layer) for name in names for layer in each]
        grid["head"] = list(range(max(counts))) if heads is None else list(heads)
    if positions is not None:
        grid["pos"] = list(positions)

    def at_point(at: Mapping[str, Any]) -> tuple[Site, list[tuple[Pos, CountLike]]] | None:
        name, layer, head = at.get("site", names[0]), at.get("layer"), at.get("head")
        if layer not in found[name] or (
            heads is None and head is not None and head >= _heads(lm, name, layer)
        ):
            return None
        return Site(name, layer, head), [(None, None)] if positions is None else positions[
            at["pos"]
        ]

    return grid, at_point


def _heads(lm: LM, name: str, layer: int | None) -> int:
    return lm.layout.sizes_of(layer)["kv_head" if name in KEY_HEADED else "head"] or 0


def positions_of(lengths: Sequence[int], names: Sequence[str], pos: Positions) -> Places | None:
    """The positions of a grid; None where a site with heads is meant at all positions at once."""
    if pos is None:
        if names[0] in HEADED:
            return None
        shortest = min(lengths)
        same = len(set(lengths)) == 1
        return {
            place: [(place, None)] for place in (range(shortest) if same else range(-shortest, 0))
        }
    if isinstance(pos, Mapping):
        found: Places = {name: _named(name, where, len(lengths)) for name, where in pos.items()}
    else:
        found = {place: [(place, None)] for place in map(as_pos, listed(pos, "pos"))}
    if not found:
        raise EmptySelection("the grid's dimension 'pos' is empty: give at least one position")
    return found


def _named(name: Any, where: Any, count: int) -> list[tuple[Pos, CountLike]]:
    """A named position as hooks: one for all prompts, or each prompt's own, those of one place together."""
    if not isinstance(where, list | tuple):
        return [(as_pos(where), None)]
    if len(where) != count:
        raise BadPrompt(
            f"the position {name!r} is given for {len(where)} prompts, and there are {count}"
        )
    rows: dict[Pos, list[int]] = {}
    for row, place in enumerate(where):
        rows.setdefault(as_pos(place), []).append(row)
    return list(rows.items())
