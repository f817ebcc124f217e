"""Calls: which cells of a forward a hook wants, against counting every cell of random masks one by one."""

import random

import pytest
import torch

from hookkit.errors import OutOfRange, Unsupported
from hookkit.models.batch_positions import ForwardPass, SequenceBatch, columns_of_mask
from hookkit.models.positions import GENERATED, PROMPT, Where, read_indices, read_position

WISHES = [
    {},
    {"pos": 0},
    {"pos": -1},
    {"pos": [2, 0]},
    {"pos": slice(1, None, 2)},
    {"pos": slice(-2, None)},
    {"pos": PROMPT},
    {"pos": GENERATED},
    {"step": 0},
    {"step": slice(1, None)},
    {"pos": 1, "rows": [0, 2]},
]


def text_of(mask: torch.Tensor) -> SequenceBatch:
    columns, lengths = columns_of_mask(mask, generating=False)
    return SequenceBatch(columns, lengths, lambda row: (7,) * lengths[row], lambda row, at: ())


def wanted(where: Where, position: int, length: int) -> bool:
    """What the words of the documentation mean, for one position of a row whose prompt has `length` tokens."""
    if where.step is not None:
        step = position - (length - 1)
        return step == where.step if isinstance(where.step, int) else step >= where.step.start
    if where.pos is None:
        return True
    if where.pos is PROMPT or where.pos is GENERATED:
        return (position < length) == (where.pos is PROMPT)
    if isinstance(where.pos, int):
        return position == (where.pos if where.pos >= 0 else length + where.pos)
    if isinstance(where.pos, tuple):
        return position in where.pos
    start = where.pos.start if where.pos.start >= 0 else max(0, length + where.pos.start)
    return position >= start and (position - start) % (where.pos.step or 1) == 0


def random_mask(side: str, draw: random.Random) -> torch.Tensor:
    width = draw.randint(6, 9)
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row in mask:
        length = draw.randint(3, width)
        places = {"left": range(width - length, width), "right": range(length)}.get(side)
        row[list(places or sorted(draw.sample(range(width), length)))] = True
    return mask


def counted(where: Where, mask: torch.Tensor, past: int) -> dict[tuple[int, int], int]:
    """The column of each (row, position) that is meant, by looking at every cell."""
    found = {}
    for row in range(4) if where.rows is None else where.rows:
        for position, column in enumerate(mask[row].nonzero()[:, 0].tolist()):
            if column >= past and wanted(where, position, int(mask[row].sum())):
                found[row, position] = column - past
    return found


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_the_cells_are_those_that_counting_one_by_one_finds(wish, side):
    draw = random.Random(f"{wish}{side}")
    where = Where(
        read_position(wish.get("pos")),
        read_indices(wish.get("rows"), "row"),
        read_indices(wish.get("step"), "step"),
    )
    for _ in range(20):
        mask, past = random_mask(side, draw), draw.randint(0, 2)
        width = mask.shape[1] - past
        values = torch.randn(4, width, 3)
        expected = counted(where, mask, past)
        cells = ForwardPass(text_of(mask), 0, past, 4, width, range(width), past).cells(
            where, False, False
        )
        assert (cells is None) == (not expected)
        if cells is None:
            continue

        gathered, seen = cells.gather(values), 0
        for index, row in enumerate(cells.rows):
            for place, position in enumerate(cells.positions[index].tolist()):
                real = position >= 0
                seen += real
                cell = values[row, expected[row, position]] if real else torch.zeros(3)
                assert torch.equal(gathered[index, place], cell)
        assert seen == len(expected)

        by_hand, written = values.clone(), values.clone()
        for (row, _position), column in expected.items():
            by_hand[row, column] += 1
        cells.scatter(written, gathered + 1)
        assert torch.equal(written, by_hand), "something was written where it was not wanted"


def test_a_row_of_padding_alone_is_refused():
    with pytest.raises(OutOfRange, match="a row of attention_mask is all zeros"):
        columns_of_mask(torch.tensor([[True, True], [False, False]]), generating=False)


def test_generation_from_rows_that_end_in_padding_is_refused():
    with pytest.raises(Unsupported, match="a row ends in padding: pad on the left"):
        columns_of_mask(torch.tensor([[True, True], [True, False]]), generating=True)
