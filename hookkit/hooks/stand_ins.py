"""Values of other texts, put in the place of what a site has: another run's, a mean of them, one that is drawn."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..captured import Captured
from ..errors import BadHook
from ..forms import unseen_value
from ..positions import Where, wish
from ..prompts import cover
from ..sites import SQUARE, ModuleSite
from .base import Binding, Change, Here
from .fitting import moved
from .rounding import converted

Per: TypeAlias = Literal["position", "all"]


def from_run(source: Captured, where: Where, binding: Binding) -> Change:
    """Put in what another run had at the positions that the same words mean in its text."""
    if source.positions is None:
        raise BadHook(
            f"the tensor at {source.site} has no rows and positions of its own: it cannot be patched by place"
        )

    check_width(source, binding)

    def apply(values: Tensor, here: Here) -> Tensor:
        rows = [source.row(prompt) for prompt in here.rows]
        columns = _columns(source, where, rows, here, binding)
        found = source.by_place[torch.tensor(rows)[:, None], columns]
        found = converted(found, values, f"what the source has at {source.site}")
        if isinstance(source.site, ModuleSite) or source.site.name not in SQUARE:
            _check_sizes(source, found.shape[2:], values.shape[2:])
            return found
        _check_sizes(source, found.shape[2:-1], values.shape[2:-1])
        missing = values.shape[-1] - found.shape[-1]  # keys that come behind the source's last are not looked at
        closed = unseen_value(found.dtype, source.site.name == "scores")
        return nn.functional.pad(found, (0, missing), value=closed) if missing > 0 else found[..., : values.shape[-1]]

    return apply


def check_width(source: Captured, binding: Binding) -> None:
    """Raises `BadHook` where another model's values can never stand at a site of this one."""
    if binding.shape is not None:
        _check_sizes(source, source.values.shape[2:], binding.shape)


def _check_sizes(source: Captured, sizes: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(sizes) != tuple(wanted):
        raise BadHook(
            f"the source of {source.site} has values of shape {list(sizes)} behind row and pos, and this model has "
            f"{list(wanted)} there: give a run of a model of the same size"
        )


def _columns(source: Captured, where: Where, rows: list[int], here: Here, binding: Binding) -> Tensor:
    """The column of the source's values for each cell: the place in the source's text that the same words mean."""
    wishes = here.cells.text.wishes(where)
    columns = torch.zeros_like(here.positions)
    for number, (row, prompt) in enumerate(zip(rows, here.rows, strict=True)):
        ids = source.prompts[row]
        mine, theirs = wishes[prompt], wish(where, len(ids), lambda at, ids=ids: cover(binding.lm, ids, at))
        assert mine is not None
        length = here.cells.text.lengths[prompt]
        if len(mine) != len(theirs) or (where.pos is None and length != len(ids)):
            raise BadHook(
                f"row {prompt} has {length} tokens and the source of {source.site} has {len(ids)}, "
                f"so pos={where.pos!r} does not pair their positions: say which are meant, with pos="
            )
        places = [theirs[mine.index(place)] for place in here.cells.places[number]]
        columns[number, : len(places)] = torch.tensor([source.column(row, place) for place in places])
    return columns


def mean(source: Captured, per: Per) -> Change:
    """Put in the mean of other prompts, at the same position or over all of theirs."""
    assert source.positions is not None
    there = source.positions >= 0
    if per == "all":
        overall = moved(source.values[there].double().mean(0), f"the reference's mean at {source.site}")
        return lambda values, here: overall(values).expand_as(values).clone()
    means = _by_position(source, lambda cells: cells.double().mean(0))

    def apply(values: Tensor, here: Here) -> Tensor:
        found = torch.stack([means(here, row) for row in range(len(here.rows))])
        return converted(found, values, f"the reference's mean at {source.site}")

    return apply


def _by_position(source: Captured, reduce: Callable[[Tensor], Tensor]) -> Callable[[Here, int], Tensor]:
    """For each position of a row of cells, the reference's values there, reduced over its rows."""
    assert source.positions is not None
    places = sorted({place for place in source.positions.flatten().tolist() if place >= 0})
    table = {place: reduce(source.values[source.positions == place]) for place in places}
    nothing = torch.zeros_like(table[places[0]])

    def look_up(here: Here, row: int) -> Tensor:
        width = here.positions.shape[1]
        wanted = list(here.cells.places[row])
        _need(table, wanted, source)
        return torch.stack([table[place] for place in wanted] + [nothing] * (width - len(wanted)))

    return look_up


def _need(table: Any, wanted: list[int], source: Captured) -> None:
    missing = [place for place in wanted if place not in table]
    if missing:
        raise BadHook(
            f"position {missing[0]} of {source.site} is to be replaced, and no prompt of the reference is that long "
            f"(its positions: {min(table)} to {max(table)}): give longer ones, fewer positions, or per='all'"
        )


def resample(source: Captured, per: Per, seed: int) -> Change:
    """Put in what one of other prompts has, drawn by the seed, the prompt's own tokens and the position.

    The draws are the same alone and in a batch.
    """
    assert source.positions is not None
    cells = [(row, column) for row, column in (source.positions >= 0).nonzero().tolist()]
    columns: dict[int, list[tuple[int, int]]] = {}
    for row, column in cells:
        columns.setdefault(int(source.positions[row, column]), []).append((row, column))

    def draw(prompt: tuple[int, ...], place: int) -> tuple[int, int]:
        digest = hashlib.sha256(repr((seed, prompt)).encode()).hexdigest()
        if per == "all":
            return random.Random(f"{digest}{place}").choice(cells)
        donors = random.Random(digest).sample(range(len(source.rows)), len(source.rows))
        return min(
            columns[place], key=lambda cell: donors.index(cell[0])
        )  # one donor for a row, where it is long enough

    def apply(values: Tensor, here: Here) -> Tensor:
        new = torch.zeros_like(values)
        for row, (prompt, places) in enumerate(zip(here.rows, here.cells.places, strict=True)):
            if per == "position":
                _need(columns, list(places), source)
            drawn = [draw(here.cells.text.prompt(prompt), place) for place in places]
            picked = torch.tensor([d[0] for d in drawn]), torch.tensor([d[1] for d in drawn])
            drawn_values = source.values[picked]
            new[row, : len(places)] = converted(drawn_values, values, f"what the reference has at {source.site}")
        return new

    return apply
