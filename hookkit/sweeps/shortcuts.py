"""Which shortcuts a model allows: found out once, by a trial of a few tokens, and never assumed.

A small sweep is run with each shortcut and compared with one plain forward. What does not give the same logits, or does
not run at all, is left out, with the reason.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.edits import steer
from ..models.lm import LM
from ..models.overrides import Lent
from ..models.sites import ModuleSite, Site
from ..runs.forward import forward
from ..runs.manager import HookManager
from ..runs.partial import Path
from ..runs.taps import planned
from .forwards import CellPrompt, Shortcuts, kept, prefix, run_trunk, run_units
from .inputs import SweepInputs
from .reach import Start

LENGTHS = (5, 3, 4)
LIMITS = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PLACES = (-1, -2)


def shortcuts(lm: LM) -> Shortcuts:
    """What this model allows, as it is now."""
    config = lm.config
    key = (
        "shortcuts",
        getattr(config, "_attn_implementation", None),
        lm.root.training,
        getattr(lm.root, "dtype", None),
    )
    if key not in lm.learnt:
        lm.learnt[key] = _tried(lm)
    return lm.learnt[key]


def reads_ahead(lm: LM) -> bool:
    """True if what the model says at a position depends on a token behind it: then no position can be left out."""
    key = "reads_ahead", lm.root.training
    if key not in lm.learnt:
        first = list(_reading(lm).rows[0])
        other = [*first[:-1], (first[-1] + 1) % lm.n_tokens]
        one, again, another = forward(lm, [first, first, other]).logits[:, :-1].float()
        limit = LIMITS.get(_dtype(lm), 2e-5) * float(one.abs().max())
        steady = float((one - again).abs().max()) <= limit  # with dropout nothing can be told
        lm.learnt[key] = steady and float((one - another).abs().max()) > limit
    return lm.learnt[key]


def by_row(lm: LM, site: ModuleSite) -> bool:
    """True if the tensor at a module's side is [batch, pos, ...] whatever the batch."""
    key = "by_row", site
    if key not in lm.learnt:
        lm.learnt[key] = all(
            _shape(lm, site, count)[:2] == (count, max(LENGTHS)) for count in (2, 3)
        )
    return lm.learnt[key]


def is_called(lm: LM, site: ModuleSite) -> bool:
    """True if a forward calls the module; some are bypassed by fused code, or left out while the model evaluates."""
    key = "is_called", site.path, lm.root.training
    if key not in lm.learnt:
        watch = _Watch(lm, {0: lm.submodule(site.path)})
        _run(watch, lm, _reading(lm), range(len(LENGTHS)))
        lm.learnt[key] = 0 in watch.kinds
    return lm.learnt[key]


def _shape(lm: LM, site: ModuleSite, count: int) -> tuple[int, ...]:
    """The shape of the tensor in a trial of so many rows; empty where it is none, or the module does not run."""
    watch = _Watch(lm, {0: lm.submodule(site.path)})
    _run(watch, lm, _reading(lm), range(count))
    if site.side == "output":
        return watch.gives.get((0, site.item), ())
    names = [site.item, "hidden_states", "input", "x"] if site.item == 0 else [site.item]
    return next((watch.given[0, (name,)] for name in names if (0, (name,)) in watch.given), ())


def _tried(lm: LM) -> Shortcuts:
    if not lm.n_layers or "resid_pre" not in lm.layout.names:
        return no_shortcuts("the model's blocks are not known")
    reading = _reading(lm)
    try:
        factors, kinds = _watched(lm, reading)
        expected = _expected(lm, reading)
    except Exception as error:  # noqa: BLE001  whatever a model refuses, it can still be run cell by cell
        return no_shortcuts(_raised(error))
    why: dict[str, str] = {}
    may = Shortcuts(True, True, False, True, why, factors, kinds)
    for grow, last in product((True, False), repeat=2):
        may = replace(may, grow=grow, last=last)
        if not (reason := _differs(lm, reading, may, expected)):
            break
        why["last" if last else "grow"] = reason
    else:
        return no_shortcuts(why["grow"])
    why = {name: each for name, each in why.items() if not getattr(may, name)}
    whole = replace(may, prefix=True)
    if reason := _differs(lm, reading, whole, expected):
        why |= {"prefix": reason}
    return replace(may if reason else whole, why=why)


def _dtype(lm: LM) -> Any:
    return getattr(lm.root, "dtype", None)


def no_shortcuts(reason: str) -> Shortcuts:
    """Every cell by itself, for this reason."""
    return Shortcuts(
        False,
        False,
        False,
        False,
        dict.fromkeys(("batch", "grow", "prefix", "last"), reason),
        {},
        [],
    )


def _raised(error: Exception) -> str:
    return f"a trial raised {type(error).__name__}: {error}".split("\n")[0]


def _reading(lm: LM) -> SweepInputs:
    tokens = lm.n_tokens
    numbers = iter(range(3, 3 + sum(LENGTHS)))
    rows = tuple(
        tuple(next(numbers) ** 3 * 7919 % tokens for _ in range(length)) for length in LENGTHS
    )
    return SweepInputs(lm, rows, rows, (1,) * len(rows))


def _cells(lm: LM) -> list[tuple[int, int]]:
    """The blocks and positions at which the trial's rows are edited."""
    layers = lm.layout.layers("resid_pre") or []
    return [
        (layer, pos)
        for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        for pos in PLACES
    ]


def _edit(lm: LM, layer: int, pos: int, rows: Any = None) -> Any:
    site = Site("resid_pre", layer)
    vector = torch.randn(lm.shape(site), generator=torch.Generator().manual_seed(layer - pos))
    return steer(site, vector, pos=pos, rows=rows)


def _expected(lm: LM, reading: SweepInputs) -> Tensor:
    """The last logits of each cell and prompt [cell row, vocab], in one plain forward."""
    count = len(reading)
    cells = _cells(lm)
    prompts = [list(row) for _ in cells for row in reading.rows]
    edits = [
        _edit(lm, layer, pos, rows=list(range(number * count, (number + 1) * count)))
        for number, (layer, pos) in enumerate(cells)
    ]
    return forward(lm, prompts, *edits, logits="last").logits[:, -1]


def _differs(lm: LM, reading: SweepInputs, may: Shortcuts, expected: Tensor) -> str:
    """Why a shortcut does not do for this model; empty if it gives the same logits."""
    count, width = len(reading), -min(PLACES) if may.prefix else max(LENGTHS)
    cells = _cells(lm)
    taps = [planned(lm, [_edit(lm, layer, pos)], _no_reference) for layer, pos in cells]
    units = [
        CellPrompt(number, row, Start(layer, reading.lengths[row] + pos))
        for number, (layer, pos) in enumerate(cells)
        for row in range(count)
    ]
    units.sort(key=lambda unit: unit.order)
    try:
        trunk = run_trunk(
            reading, range(count), [], [layer for layer, _ in cells], width, cache=may.prefix
        )
        logits = run_units(trunk, reading, units, taps, width, may)[:, -1]
    except Exception as error:  # noqa: BLE001  a model that cannot be run so raises what it likes
        return _raised(error)
    wanted = expected[[unit.cell * count + unit.row for unit in units]]
    apart = float(
        (logits.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-9)
    )
    limit = LIMITS.get(expected.dtype, LIMITS[torch.float32])
    return (
        ""
        if apart <= limit
        else f"a trial gave other logits (by {apart:.1g} of the largest; {limit:.1g} is allowed)"
    )


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("the trial's edits have no reference")


def _items(output: Any) -> Iterable[tuple[int | str, Any]]:
    """What a module gives, with the word or number of each."""
    if isinstance(output, dict):
        return output.items()
    return enumerate(output) if isinstance(output, tuple | list) else [(0, output)]


class _Watch(HookManager):
    """Notes the shapes of what some modules are given, and what they give."""

    def __init__(self, lm: LM, modules: dict[int, nn.Module]) -> None:
        super().__init__(lm, ())
        self.modules = modules
        self.given: dict[tuple[int, Path], tuple[int, ...]] = {}
        self.gives: dict[tuple[int, int | str], tuple[int, ...]] = {}
        self.kinds: dict[int, int] = {}

    def _register(self, lent: Lent) -> None:
        super()._register(lent)
        for number, module in self.modules.items():
            lent.around(module, "forward", self._seen(number))

    def _seen(self, number: int) -> Any:
        def seen(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            self._note(number, args, ())
            self._note(number, kwargs, ())
            output = inner(*args, **kwargs)
            shapes = {
                (number, item): tuple(each.shape)
                for item, each in _items(output)
                if isinstance(each, Tensor)
            }
            self.gives |= shapes
            self.kinds[number] = len(output) if isinstance(output, tuple) else 0
            return output

        return seen

    def _note(self, number: int, value: Any, path: Path) -> None:
        if isinstance(value, Tensor):
            self.given[number, path] = tuple(value.shape)
        elif isinstance(value, tuple | list):
            for place, each in enumerate(value):
                self._note(number, each, (*path, place))
        elif type(value) is dict:
            for name, each in value.items():
                self._note(number, each, (*path, name))


def _watched(lm: LM, reading: SweepInputs) -> tuple[dict[tuple[int, Path], int], list[int]]:
    """Which of the things that blocks are given have rows, seen with two sizes of batch, with and without a cache."""
    blocks = {
        number: lm.submodule(lm.family.block.format(layer=number)) for number in range(lm.n_layers)
    }
    seen: dict[tuple[int, Path], list[set[int]]] = {}
    kinds: list[int] = []
    for turn, count in enumerate((2, 3)):
        for cached in (False, True):
            watch = _Watch(lm, blocks)
            try:
                _run(watch, lm, reading, range(count), cached=cached)
            except Exception:
                if not cached:
                    raise
            for place, shape in watch.given.items():
                seen.setdefault(place, [set(), set()])[turn].add(shape[0] if shape else 0)
            kinds = kinds or [watch.kinds[number] for number in blocks]
    factors = {place: _factor(*found) for place, found in seen.items() if all(found)}
    return {place: factor for place, factor in factors.items() if factor is not None}, kinds


def _factor(of_two: set[int], of_three: set[int]) -> int | None:
    """How many entries a row has, from the lengths of axis 0 with two rows and with three; None where it varies."""
    of_two, of_three = of_two - {1}, of_three - {1}  # one for all rows
    if not of_two and not of_three:
        return 0
    if len(of_two) != 1 or len(of_three) != 1:
        return None
    two, three = of_two.pop(), of_three.pop()
    if two == three:
        return 0
    return two // 2 if two % 2 == 0 and two // 2 * 3 == three else None


def _run(
    watch: _Watch, lm: LM, reading: SweepInputs, rows: Sequence[int], *, cached: bool = False
) -> None:
    """A forward of some rows of the trial, the last two positions of it where a cache has the others."""
    from transformers import DynamicCache

    columns = max(reading.lengths[row] for row in rows)
    given: dict[str, Any] = {}
    width = columns
    settings = lm.accepted(use_cache=cached, return_dict=True)
    if cached:
        given = {"past_key_values": DynamicCache()}
        with torch.no_grad():
            lm.model(**reading.inputs(rows, columns, columns), **settings, **given)
        width = 2
        known = kept(given["past_key_values"])
        given = {"past_key_values": prefix(known, columns - width, lambda: torch.arange(len(rows)))}
    inputs = reading.inputs(rows, columns, width)
    with torch.no_grad(), watch:
        lm.model(**inputs, **settings, **given)
