"""How far the texts are: a line in the terminal with tokens a second and the time that is left."""

import time
from types import TracebackType

from tqdm.auto import tqdm

from .windows import Window


class Progress:
    """A line that is told of each batch. `total` is the number of texts, where it is known."""

    def __init__(self, total: int | None, shown: bool) -> None:
        self._bar = tqdm(total=total, unit=" texts", disable=not shown, leave=True)
        self._started, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()

    def skipped(self, text: int) -> None:
        """The texts up to this one were done before, which says nothing of the speed."""
        self._bar.initial = self._bar.n = text + 1
        self._started = time.perf_counter()

    def computed(self, window: Window, batch: list[int]) -> None:
        """Some rows of a window are done."""
        reads = [window.reads[number] for number in batch]
        self._tokens += sum(len(read.ids) for read in reads)
        speed = self._tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(read.piece == 0 for read in reads))

    def reached(self, text: int) -> None:
        """All texts up to this one are done, those that were left out too."""
        self._bar.update(text + 1 - self._bar.n)
