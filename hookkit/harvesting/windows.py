"""Windows: the next rows of a stream, and the batches that they are computed in.

Rows of like length go together, so that little is padded, and no further ahead is looked than a window. Which rows
share a batch decides the last digits of what comes out: it follows from the texts and the settings alone.
"""

from dataclasses import dataclass
from itertools import accumulate

from .texts import Cursor, Read

LOOK_AHEAD = 16  # batches in a window


@dataclass(frozen=True)
class Window:
    """Rows in the order of the texts. `starts[i]` is the number of positions wanted before row i."""

    reads: tuple[Read, ...]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(len(read.places) for read in self.reads)][:-1]

    @property
    def rows(self) -> int:
        """How many positions are wanted, which is how many rows of values come of it."""
        return sum(len(read.places) for read in self.reads)

    @property
    def tokens(self) -> int:
        return sum(len(read.ids) for read in self.reads)

    @property
    def left_out(self) -> int:
        return sum(read.left_out for read in self.reads)


def next_window(cursor: Cursor, *, room: float, tokens: int) -> Window | None:
    """The next rows: until they have this many tokens, or fill the room for values. None behind the last text."""
    reads: list[Read] = []
    read_tokens = rows = 0
    while read_tokens < tokens and rows < room:
        read = cursor.read()
        if read is None:
            break
        reads.append(read)
        read_tokens, rows = read_tokens + len(read.ids), rows + len(read.places)
    return Window(tuple(reads)) if reads else None


def batches(window: Window, tokens: int, *, one_length: bool = False) -> list[list[int]]:
    """The numbers of the window's rows in batches of at most so many tokens, padding included, the longest rows first.

    A row that is longer than that has a batch of its own. `one_length` is for models that take no mask.
    """
    lengths = [len(read.ids) for read in window.reads]
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        width = lengths[found[-1][0]] if found else 0
        fits = bool(found) and width * (len(found[-1]) + 1) <= tokens and (not one_length or width == lengths[number])
        if fits:
            found[-1].append(number)
        else:
            found.append([number])
    return found
