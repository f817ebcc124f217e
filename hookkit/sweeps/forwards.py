"""The forwards of a sweep: the unedited rows once, then many cells at a time.

The positions before the first that an edit reaches: their keys and values, computed once, shared by all rows.

Behind the last attention no position reads another: there only those where the metric looks have to run.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, cat

from ..errors import Unsupported
from ..hooks.captured_values import CapturedChunk
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM
from ..models.overrides import Lent
from ..models.padding import logits_of
from ..models.sites import AnySite, Site
from ..runs.partial import CellRows, Factors, JoinSchedule, Recorder, SharedForward
from ..runs.taps import BoundHook, HookPoint
from .inputs import SweepInputs
from .reach import BEHIND_ATTENTION, INPUT, Start, inside_a_block, together

KeysAndValues = Sequence[tuple[Tensor, Tensor] | None]
"""For each layer of a cache its keys and values [row, head, pos, d_head]; None where a layer keeps nothing."""


def kept(cache: Any) -> KeysAndValues:
    """What transformers' cache holds after a forward."""
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


def prefix(known: KeysAndValues, columns: int, rows: Callable[[], Tensor]) -> Any:
    """A cache of transformers that has the first `columns` columns of what is known.

    It keeps nothing: each layer's update gives the prefix of the rows that are there at that moment, `rows()`, with
    the new keys and values behind it. So the batch may grow from layer to layer, and a prefix is never stored twice.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Prefix(DynamicLayer):
        """One layer of it."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            return _behind(self.keys, rows(), key_states), _behind(
                self.values, rows(), value_states
            )

    cache: Any = DynamicCache()
    cache.layers = [DynamicLayer() if each is None else Prefix(*each) for each in known]
    return cache


def _behind(known: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """New keys or values behind those that are known, of which some rows are meant."""
    alone = len(known) == 1  # and need not be copied twice
    first = (
        known.expand(len(rows), *known.shape[1:])
        if alone
        else known.index_select(0, rows.to(known.device))
    )
    return cat([first, new], dim=-2)


ENTERED = (
    "z",
    "mlp_in",
)  # what the last block's modules are given that work on each position by itself
INSIDE = frozenset(
    {"mlp_pre", "mlp_post", "router_logits", "experts", "expert_weights"}
)  # such modules


def may_narrow(lm: LM, taps: Sequence[HookPoint]) -> bool:
    """True where nothing that is done needs the last block's other positions behind its attention."""
    return all(_may(lm, action) for tap in taps for action in tap.actions)


def _may(lm: LM, action: BoundHook) -> bool:
    site: AnySite = action.site
    if not isinstance(site, Site):
        return False
    if site.layer is not None and site.layer < lm.n_layers - 1:
        return True
    return site.name not in INSIDE and not (site.name in BEHIND_ATTENTION and together(action))


@contextmanager
def narrowed(lm: LM, looks: int) -> Iterator[None]:
    """A block in which those modules run over the last `looks` positions only, and give zeros for the others."""
    with Lent() as lent:
        for name in ENTERED:
            place = lm.layout.find(name, lm.n_layers - 1)
            if place is not None and place.side == "input":
                lent.around(lm.submodule(place.path), "forward", partial(_over_the_last, looks))
        yield


def _over_the_last(looks: int, inner: Any, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    shape = hidden.shape[:2]
    if hidden.ndim != 3:
        raise Unsupported(
            f"what the last block's modules are given is no [batch, pos, d]: {list(hidden.shape)}"
        )

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        return value[:, -looks:].contiguous()  # modules may take a view of what they are given

    output = inner(
        cut(hidden), *map(cut, args), **{name: cut(value) for name, value in kwargs.items()}
    )
    found, *others = output if isinstance(output, tuple) else (output,)
    if not isinstance(found, Tensor) or found.shape[:2] != (shape[0], looks):
        raise Unsupported("what the last block's modules give is no [batch, pos, d]")
    whole = found.new_zeros(*shape, found.shape[-1])
    whole[:, -looks:] = found
    return (whole, *others) if isinstance(output, tuple) else whole


@dataclass(frozen=True)
class CellPrompt:
    """One prompt of one cell, and where it begins to differ from the unedited prompt."""

    cell: int
    row: int
    start: Start

    @property
    def order(self) -> tuple[int, int, int]:
        return self.start.block, self.cell, self.row


@dataclass(frozen=True, eq=False)
class BaseForward:
    """The unedited rows: what later forwards start from.

    known   keys and values of every position; None where they were not kept
    states  what enters the blocks at which a row may join: the last `width` positions
    logits  [row, look, vocab]
    """

    rows: tuple[int, ...]
    columns: int
    known: KeysAndValues | None
    states: Mapping[int, Tensor]
    logits: Float[Tensor, "row look vocab"]

    def places(self, units: Sequence[CellPrompt]) -> list[int]:
        """The number, among its rows, of each unit's prompt."""
        number = {row: place for place, row in enumerate(self.rows)}
        return [number[unit.row] for unit in units]


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """What a model was seen to allow, and the facts that this needs.

    batch   cells may share a forward, each on rows of its own
    grow    rows may join at the block where they begin to differ
    prefix  positions before the first that differs may come from a cache
    last    behind the last attention only the metric's positions need to run
    why     for each that is not allowed, the reason
    """

    batch: bool
    grow: bool
    prefix: bool
    last: bool
    why: Mapping[str, str]
    factors: Factors
    kinds: Sequence[int]


def run_trunk(
    reading: SweepInputs,
    rows: Sequence[int],
    taps: Sequence[HookPoint],
    blocks: Sequence[int],
    width: int,
    *,
    cache: bool,
) -> BaseForward:
    """Run some prompts without a cell's edits. `taps` act on all of them; the last `width` positions are recorded."""
    from transformers import DynamicCache

    columns = max(reading.lengths[row] for row in rows)
    computed = reading.logits_of(rows, columns)
    lane = _lane(reading.text(columns), tuple(rows), 0, 0, columns, computed)
    recorder = Recorder(blocks, width)
    given: dict[str, Any] = {"past_key_values": DynamicCache()} if cache else {}
    wave = SharedForward(
        reading.lm, [(lane, taps)], recorder=recorder, rows=len(rows), width=columns
    )
    logits = _called(wave, reading, rows, columns, columns, given, rows)
    known = kept(given["past_key_values"]) if cache else None
    return BaseForward(tuple(rows), columns, known, recorder.states, logits)


def run_units(
    trunk: BaseForward,
    reading: SweepInputs,
    units: Sequence[CellPrompt],
    taps: Sequence[Sequence[HookPoint]],
    width: int,
    may: Shortcuts,
    under: Sequence[HookPoint] = (),
) -> Float[Tensor, "row look vocab"]:
    """Run units, sorted by `CellPrompt.order`, over the last `width` columns.

    `taps` are those of each cell, and `under` those of them that act in every cell: what the blocks read beside the
    stream (the per-layer inputs of Gemma, say) may be made of what these change before the blocks.
    """
    past, places, looked = trunk.columns - width, trunk.places(units), [unit.row for unit in units]
    grows = may.grow and units[0].start.block > INPUT
    rows = trunk.rows if grows else looked
    computed = reading.logits_of(looked, width)
    lanes = [
        (lane, taps[cell]) for cell, lane in _lanes(reading, units, trunk.columns, width, computed)
    ]
    growth = _growth(trunk, reading.lm, units, places, width, may) if grows else None
    wave = SharedForward(reading.lm, lanes, growth, rows=len(rows), width=width)
    if grows and under:
        lane = _lane(reading.text(trunk.columns), trunk.rows, 0, past, width, computed)
        wave.act_before_the_blocks(lane, _outside_the_blocks(reading.lm, under))
    given: dict[str, Any] = {}
    if past:
        assert trunk.known is not None
        numbers = torch.tensor(places)
        given["past_key_values"] = prefix(trunk.known, past, lambda: numbers[: wave.count])
    narrow = (
        may.last and computed < width and all(may_narrow(reading.lm, taps) for _, taps in lanes)
    )
    with narrowed(reading.lm, computed) if narrow else nullcontext():
        return _called(wave, reading, rows, trunk.columns, width, given, looked)


def _called(
    wave: SharedForward,
    reading: SweepInputs,
    rows: Sequence[int],
    columns: int,
    width: int,
    given: dict[str, Any],
    looked: Sequence[int],
) -> Float[Tensor, "row look vocab"]:
    """The logits of a forward that is given `rows`, and gives something of the rows `looked`."""
    lm, looks = reading.lm, max(reading.looks[row] for row in looked)
    computed = reading.logits_of(looked, width)
    known = lm.accepted(use_cache=bool(given), return_dict=True, logits_to_keep=computed)
    inputs = reading.inputs(rows, columns, width)
    with torch.no_grad(), wave:
        output = lm.model(**inputs, **known, **given)
    logits = logits_of(output)[:, -looks:]
    return logits.clone() if looks < computed else logits  # the others are not kept


def _lanes(
    reading: SweepInputs, units: Sequence[CellPrompt], columns: int, width: int, computed: int
) -> Iterator[tuple[int, CellRows]]:
    """The rows of each cell, those that join at one block together."""
    start, text = (
        0,
        reading.text(columns),
    )  # what hooks wish of the prompts is worked out once for all lanes
    for (_, cell), found in groupby(units, key=lambda unit: (unit.start.block, unit.cell)):
        rows = tuple(unit.row for unit in found)
        yield cell, _lane(text, rows, start, columns - width, width, computed)
        start += len(rows)


def _lane(
    text: SequenceBatch, rows: tuple[int, ...], start: int, past: int, width: int, computed: int
) -> CellRows:
    """Some rows in a forward that computes the logits of the last `computed` positions."""
    head = range(width - computed, width)
    call = ForwardPass(replace(text, numbers=rows), 0, past, len(rows), width, head, past)
    return CellRows(rows, start, start + len(rows), call)


def _outside_the_blocks(lm: LM, taps: Sequence[HookPoint]) -> list[HookPoint]:
    return [tap for tap in taps if not inside_a_block(lm, tap.place.path)]


def _growth(
    trunk: BaseForward,
    lm: LM,
    units: Sequence[CellPrompt],
    places: list[int],
    width: int,
    may: Shortcuts,
) -> JoinSchedule:
    blocks = [unit.start.block for unit in units]
    counts = [bisect_right(blocks, number) for number in range(lm.n_layers)]

    def states(number: int) -> Tensor:
        found = trunk.states[number]
        joining = places[bisect_left(blocks, number) : bisect_right(blocks, number)]
        return found[torch.tensor(joining, device=found.device), -width:]

    return JoinSchedule(blocks[0], counts, states, places, len(trunk.rows), may.kinds, may.factors)


def run_captures(
    reading: SweepInputs, rows: Sequence[int], taps: Sequence[HookPoint]
) -> dict[BoundHook, CapturedChunk]:
    """What the captures among these taps keep of some prompts."""
    run_trunk(reading, rows, taps, (), 1, cache=False)
    return {
        action: action.pieces[0] for tap in taps for action in tap.actions if action.change is None
    }
