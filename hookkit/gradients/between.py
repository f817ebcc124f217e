"""Between two runs: the model with embeddings a part of the way from one text's to another's."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.edits import edit
from ..sites import AnySite, Site, SitesLike
from .backward import Derived, Question, derived

EMBED = Site("embed")


def put(values: Tensor) -> Hook:
    """The embeddings of a batch, in the place of its tokens'."""
    return edit("embed", lambda _: values)


def parts(steps: int) -> list[float]:
    """The middles of so many equal parts of the way, at which an integral is read with the smallest error."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadHook(f"steps={steps!r}: give a whole number, 1 or more")
    return [(number + 0.5) / steps for number in range(steps)]


def along(
    asked: Question,
    rows: Sequence[int],
    sites: SitesLike,
    hooks: Sequence[Hook],
    start: Tensor,
    end: Tensor,
    steps: int,
    *,
    keep_graph: bool = False,
) -> Iterator[Derived]:
    """The metric and its gradients with the embeddings at each part of the way, one after the other."""
    for part in parts(steps):
        yield derived(asked, rows, sites, [put(start + part * (end - start)), *hooks], keep_graph=keep_graph)


def average(found: Iterator[Derived]) -> dict[AnySite, Tensor]:
    """The mean gradient at each site."""
    count, sums = 1, dict(next(found).gradient)
    for each in found:
        count, sums = count + 1, {site: total + each.gradient[site] for site, total in sums.items()}
    return {site: total / count for site, total in sums.items()}


def check_end(asked: Question, rows: Sequence[int], hooks: Sequence[Hook], end: Tensor, wanted: Tensor) -> None:
    """Raise `Unsupported` where the embeddings of other tokens do not make the model say what those tokens do."""
    found = asked.asked_of(asked.run(rows, put(end), *hooks), rows)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            f"the way from one prompt's embeddings to another's does not end at the other prompt: the metric is "
            f"{found.tolist()} there and {wanted.tolist()} for the prompt itself, since this model reads its tokens by "
            "another way too; take the plain gradient (method='gradient', or steps=1)"
        )
