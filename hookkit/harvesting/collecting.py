"""hk.statistics: what the values at some sites are like over any number of texts, in one pass that keeps none."""

import torch

from ..about import about_model
from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection
from ..model import LM
from ..positions import PosLike, Where, as_pos
from ..sites import Sites, SitesLike
from .progress import Progress
from .summary import Statistics, Summing, summing
from .texts import Cursor, Long, Read, Rules, TextsLike, Unfit, context_of, how_many
from .values import at_sites, probed, row_numbers
from .windows import LOOK_AHEAD, Window, batches, next_window


@checks_arguments
def statistics(
    lm: LM,
    texts: TextsLike,
    sites: SitesLike,
    *,
    pos: PosLike = None,
    covariance: bool = False,
    top: int = 0,
    context: int | None = None,
    long: Long = "error",
    unfit: Unfit = "error",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Statistics:
    """The mean, variance and norms of what is at these sites over all texts, in float64 and in one pass.

    `covariance` adds the covariance of each site's last axis, and `top` the tokens at which each number of a site (a
    neuron, or a feature) is largest, so many of them; of equal ones the earlier. Every position that is wanted counts
    once. Mind that a model's first position is often an outlier: pos=slice(1, None) leaves it out. The other words are
    those of `harvest`; statistics of a harvest, without the model, are `Harvest.statistics`.

    >>> found = statistics(lm, ["Tea with milk", "Coffee with milk"], ["z.9", "mlp_post.3"], top=2, progress=False)
    >>> found["z.9.3"].mean.shape, found["mlp_post.3"].top(7)["text"].tolist()
    (torch.Size([64]), [...])
    >>> print(ablate("z.9.3", to=found))
    ablate(z.9.3, to=means)
    """
    rules = Rules(Where(as_pos(pos)), context_of(lm, context), long, unfit)
    kinds = probed(lm, sites, "a statistic")
    if batch_tokens < 1:
        raise BadHook(f"batch_tokens={batch_tokens!r}: give 1 or more")
    cursor, total = Cursor(lm, texts, rules), summing(covariance, top)
    rows = left_out = 0
    with Progress(how_many(texts) if progress else None, progress) as shown:
        while (window := next_window(cursor, room=float("inf"), tokens=LOOK_AHEAD * batch_tokens)) is not None:
            for batch in batches(window, batch_tokens, one_length=lm.config is None):
                _add(total, lm, window, batch, Sites(tuple(kinds)), rules.where, rows)
                shown.computed(window, batch)
            shown.reached(window.reads[-1].text)
            rows, left_out = rows + window.rows, left_out + window.left_out
    if not rows:
        raise EmptySelection(f"none of the {cursor.text + 1} texts has a position at pos={pos!r}: give others")
    about = {"model": about_model(lm), "pos": repr(rules.where.pos), "context": rules.context, "long": long}
    about |= {"texts": cursor.text + 1, "left_out": left_out + cursor.left_out, "stream": cursor.digest}
    return total.statistics(about)


def _add(total: Summing, lm: LM, window: Window, batch: list[int], sites: Sites, where: Where, before: int) -> None:
    """Take in a batch of a window, whose first row is number `before`."""
    starts = window.starts
    reads = [window.reads[number] for number in batch]
    rows = row_numbers(reads, [before + starts[number] for number in batch])
    total.add(at_sites(lm, reads, sites, where), rows, _places(reads))


def _places(reads: list[Read]) -> torch.Tensor:
    """Text, piece, position and token id of each row."""
    return torch.tensor([(r.text, r.piece, place, r.ids[place]) for r in reads for place in r.places])
