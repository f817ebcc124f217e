"""Grids over sites, their layers, heads and positions; and the sweep that ablates each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from typing import Any, TypeAlias, Unpack

import pandas as pd

from ..arguments import as_items, check_arguments, check_text, describe
from ..errors import BadHook, BadPrompt, EmptySelection, Unsupported
from ..hooks.ablation import ablate
from ..hooks.base import Hook
from ..hooks.edits import skip_block
from ..models.lm import LM
from ..models.positions import IndicesLike, Pos, PosLike, read_position
from ..models.prompts import Prompts, as_batch
from ..models.sites import (
    SITES_WITH_HEADS,
    SITES_WITH_KEY_HEADS,
    SITES_WITHOUT_LAYER,
    Site,
    refuse_stacks,
)
from ..tables.metrics.metric import MetricLike
from .cells import list_values
from .sweep import Settings, sweep

Metrics: TypeAlias = MetricLike | Sequence[MetricLike]
Positions: TypeAlias = Iterable[PosLike] | Mapping[str, PosLike | Sequence[int]] | None
"""The positions of a grid: a list, or names for them, each with one position or one per prompt."""

RowPositions: TypeAlias = list[tuple[Pos, IndicesLike]]
"""The positions at a point of a grid, as `pos` and `rows` of one hook or several."""

GridPositions: TypeAlias = Mapping[Any, RowPositions]
"""The positions of a grid, by their value in the dimension `pos`."""

AT_ONCE: GridPositions = {None: [(None, None)]}
"""All positions at once, so that the grid has no dimension of positions."""


class GridSettings(Settings, total=False):
    """The keywords of a grid over sites: which layers and heads, and those of `sweep`."""

    layers: Iterable[int] | None
    heads: Iterable[int] | None


def split_settings(
    settings: GridSettings,
) -> tuple[Iterable[int] | None, Iterable[int] | None, Settings]:
    """Returns the layers and heads of a grid (None: all), and the settings of its sweep."""
    names = Settings.__annotations__
    of_sweep: Any = {name: value for name, value in settings.items() if name in names}
    return settings.get("layers"), settings.get("heads"), of_sweep


@check_arguments
def ablations(
    lm: LM,
    prompts: Prompts,
    what: str,
    metrics: Metrics,
    *,
    to: Any = "zero",
    over: Any = None,
    units: Mapping[int, Iterable[int]] | Iterable[int] | None = None,
    pos: Positions = None,
    **settings: Unpack[GridSettings],
) -> pd.DataFrame:
    """Returns what the metric loses without each head, neuron or block.

    `what` is a site. A site with heads is ablated head by head ("z"), "mlp_post" neuron by neuron
    if `units` names them (for each layer, or for all layers), and any other site layer by layer.
    "block" skips each block. `to` and `over` are those of `ablate`: zeros, the mean or a draw of
    other prompts, or a run. All positions are ablated at once, or each of `pos`. `layers` and
    `heads` select some of them; by default all are ablated. Other settings are those of `sweep`.
    """
    layers, heads, sweep_settings = split_settings(settings)
    if what == "block":
        if to != "zero" or any(option is not None for option in (over, pos, heads, units)):
            raise BadHook(
                "a block is left out as a whole: leave to=, over=, pos=, heads= and units= out, or "
                "ablate 'attn_out' and 'mlp_out'"
            )
        axes = {"layer": range(lm.n_layers) if layers is None else layers}
        return sweep(lm, prompts, axes, lambda layer: skip_block(layer), metrics, **sweep_settings)
    positions = AT_ONCE
    if pos is not None:
        positions = grid_positions(as_batch(lm, prompts).lengths, [what], pos)
    grid = create_site_grid(lm, [what], layers, heads, positions)
    ablated = partial(ablate, to=to, over=over)
    whole = grid.hooks(lambda site, pos, rows: ablated(site, pos=pos, rows=rows))
    if units is None:
        return sweep(lm, prompts, grid.axes, whole, metrics, **sweep_settings)
    if "layer" not in grid.axes:
        raise BadHook(
            f"units= selects units in each layer, and {what!r} has no layers: sweep over "
            f"hk.ablate({what!r}, units=[unit]) with hk.sweep"
        )
    units_by_layer = _units_by_layer(units, grid.axes["layer"])
    axes = {**grid.axes, "unit": sorted(set().union(*units_by_layer.values()))}

    def by_unit(unit: int, **point: Any) -> list[Hook] | None:
        if unit not in units_by_layer[point["layer"]]:
            return None
        at_point = grid.hooks(
            lambda site, pos, rows: ablated(site, pos=pos, rows=rows, units=[unit])
        )
        return at_point(**point)

    return sweep(lm, prompts, axes, by_unit, metrics, **sweep_settings)


def _units_by_layer(
    units: Mapping[int, Iterable[int]] | Iterable[int], layers: Sequence[int]
) -> dict[int, list[int]]:
    if not isinstance(units, Mapping):
        return dict.fromkeys(layers, list_values(units, "units"))
    for layer in units:
        if layer not in layers:
            raise BadHook(f"units= names layer {layer}, and the grid has the layers {list(layers)}")
    return {layer: list_values(units.get(layer, ()), f"units[{layer}]") for layer in layers}


def site_names(sites: str | Sequence[str]) -> list[str]:
    """Returns the names of a grid's sites. Raises `BadHook` if there are none."""
    items = [sites] if isinstance(sites, str) else as_items(sites)
    if not items:
        raise BadHook(f"sites={describe(sites)}: name a site, such as 'z', or several in a list")
    meaning = "the name of a site, such as 'z'"
    return [check_text(item, "sites", meaning) for item in items]


def check_pairs(lm: LM, source: Prompts, target: Prompts) -> list[int]:
    """Returns the lengths of prompts in pairs. Raises if numbers or lengths differ."""
    source_lengths = as_batch(lm, source).lengths
    target_lengths = as_batch(lm, target).lengths
    if source_lengths != target_lengths:
        raise BadPrompt(
            f"prompts of {source_lengths} tokens are to be patched into prompts of "
            f"{target_lengths} tokens: patching pairs positions, so give as many clean as "
            "corrupted ones, as long as one another"
        )
    return target_lengths


@dataclass(frozen=True, eq=False)
class SiteGrid:
    """A grid over sites: its dimensions, and the site and positions at each of its points.

    axes       the values of each dimension: site if there are several, layer, head, pos
    layers     the layers of each site; [None] for a site that is not in the blocks
    all_heads  True if the heads are those of each layer, of which some layers may have fewer
    """

    lm: LM
    axes: dict[str, list[Any]]
    layers: dict[str, list[int | None]]
    all_heads: bool
    positions: GridPositions

    def at(self, point: Mapping[str, Any]) -> tuple[Site, RowPositions] | None:
        """Returns the site and the positions at a point; None if the model has no such site."""
        name = point.get("site", next(iter(self.layers)))
        layer, head = point.get("layer"), point.get("head")
        if layer not in self.layers[name]:
            return None
        if self.all_heads and head is not None and head >= _count_heads(self.lm, name, layer):
            return None
        return Site(name, layer, head), self.positions[point.get("pos")]

    def hooks(
        self, edit: Callable[[Site, Pos, IndicesLike], Hook]
    ) -> Callable[..., list[Hook] | None]:
        """Returns the function of the grid's values that makes an edit at each of the positions."""

        def at_point(**point: Any) -> list[Hook] | None:
            selection = self.at(point)
            if selection is None:
                return None
            site, row_positions = selection
            return [edit(site, pos, rows) for pos, rows in row_positions]

        return at_point

    def sites(self) -> list[Site]:
        """Returns all sites of the grid, with all heads."""
        return list(starmap(Site, _names_with_layers(self.layers)))


def create_site_grid(
    lm: LM,
    names: Sequence[str],
    layers: Iterable[int] | None,
    heads: Iterable[int] | None,
    positions: GridPositions,
) -> SiteGrid:
    """Returns the grid over sites. Raises if some of them have heads or layers and some do not."""
    has_heads = _same_for_all(names, SITES_WITH_HEADS, "heads")
    no_layers = _same_for_all(names, SITES_WITHOUT_LAYER, "no layers")
    head_values = _read_values(heads, "heads", names, exist=has_heads)
    layer_values = _read_values(layers, "layers", names, exist=not no_layers)
    site_layers = {name: _layers_of_site(lm, name, layer_values) for name in names}
    axes: dict[str, list[Any]] = {}
    if len(names) > 1:
        axes["site"] = list(names)
    if not no_layers:
        axes["layer"] = sorted(set().union(*site_layers.values()))
    if head_values is not None:
        axes["head"] = head_values
    elif has_heads:
        counts = starmap(partial(_count_heads, lm), _names_with_layers(site_layers))
        axes["head"] = list(range(max(counts, default=0)))
    if positions is not AT_ONCE:
        axes["pos"] = list(positions)
    return SiteGrid(lm, axes, site_layers, head_values is None, positions)


def _names_with_layers(
    layers: Mapping[str, Sequence[int | None]],
) -> Iterator[tuple[str, int | None]]:
    """Yields the name of each site with each of its layers."""
    for name, site_layers in layers.items():
        yield from product([name], site_layers)


def _same_for_all(names: Sequence[str], group: Collection[str], word: str) -> bool:
    """Returns whether all sites are of a group. Raises if some are and some are not."""
    are_in_group = {name in group for name in names}
    if len(are_in_group) > 1:
        raise Unsupported(
            f"of {', '.join(names)} some have {word} and some do not: make a grid of each"
        )
    return are_in_group == {True}


def _read_values(
    values: Iterable[int] | None, word: str, names: Sequence[str], *, exist: bool
) -> list[int] | None:
    """Returns the values of a dimension; None for all. Raises if the sites have no such thing."""
    if values is None:
        return None
    items = list_values(values, word)
    if not exist:
        raise BadHook(f"{word}={items}: {', '.join(names)} has no {word}; leave {word}= out")
    return items


def _layers_of_site(lm: LM, name: str, layers: Sequence[int] | None) -> list[int | None]:
    if name in SITES_WITHOUT_LAYER:
        lm.location(Site(name))
        return [None]
    # raises if the model has none
    refuse_stacks(lm.sites(name), "a grid has those of the prompts' tokens")
    if layers is None:
        return list(lm.layout.layers(name) or [])
    return [layer for layer in layers if lm.location(Site(name, layer))]


def _count_heads(lm: LM, name: str, layer: int | None) -> int:
    return lm.layout.sizes_of(layer)["kv_head" if name in SITES_WITH_KEY_HEADS else "head"] or 0


def grid_positions(lengths: Sequence[int], names: Sequence[str], pos: Positions) -> GridPositions:
    """Returns the positions of a grid; all at once for sites with heads without `pos`."""
    if pos is None and names[0] in SITES_WITH_HEADS:
        return AT_ONCE
    if pos is None:
        # every position that all prompts have, counted from the end if lengths differ
        shortest = min(lengths)
        pos = range(shortest) if max(lengths) == shortest else range(-shortest, 0)
    positions: dict[Any, RowPositions] = {}
    if isinstance(pos, Mapping):
        for name, value in pos.items():
            positions[name] = _named_position(name, value, len(lengths))
    else:
        for position in map(read_position, list_values(pos, "pos")):
            positions[position] = [(position, None)]
    if not positions:
        raise EmptySelection("the grid's dimension 'pos' is empty: give at least one position")
    return positions


def _named_position(name: Any, value: Any, count: int) -> RowPositions:
    """Returns a named position: one for all prompts, or one of each prompt, grouped."""
    if not isinstance(value, list | tuple):
        return [(read_position(value), None)]
    if len(value) != count:
        raise BadPrompt(
            f"the position {name!r} is given for {len(value)} prompts, and there are {count}"
        )
    rows: dict[Pos, list[int]] = {}
    for row, position in enumerate(value):
        rows.setdefault(read_position(position), []).append(row)
    return list(rows.items())
