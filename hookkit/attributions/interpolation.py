"""Between two runs: the model with embeddings a part of the way from one text's to another's."""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import whole_number
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.edits import edit
from ..models.sites import AnySite, Site, SitesLike
from .backward import Derived, Question, derived, one_of

EMBED = Site("embed")


def put(values: Tensor) -> Hook:
    """The embeddings of a batch, in the place of its tokens'."""
    return edit("embed", lambda _: values)


Points: TypeAlias = Literal["start", "middle"]
"""Where the gradient is taken in each of the equal parts of the way: at the part's start or at its middle."""


def parts(steps: int, points: Points = "middle") -> list[float]:
    """Where the gradient is taken on the way from 0, the prompts that are run, to 1, the other ones.

    "start" is the sum of EAP-IG (Hanna et al. 2024): the prompts that are run are its first point, and the other
    prompts are none of them. "middle" has an error of order 1 / steps² beside the integral, "start" of 1 / steps.
    """
    one_of("points", points, "start", "middle")
    whole_number(steps, "steps", least=1, meaning="how many parts of the way,", error=BadHook)
    offset = 0.5 if points == "middle" else 0.0
    return [(number + offset) / steps for number in range(steps)]


def along(
    asked: Question,
    rows: Sequence[int],
    sites: SitesLike,
    hooks: Sequence[Hook],
    start: Tensor,
    end: Tensor,
    steps: int,
    points: Points,
    *,
    keep_graph: bool = False,
) -> Iterator[Derived]:
    """The metric and its gradients with the embeddings at each part of the way, one after the other."""
    for part in parts(steps, points):
        yield derived(
            asked, rows, sites, [put(start + part * (end - start)), *hooks], keep_graph=keep_graph
        )


def average(found: Iterator[Derived]) -> dict[AnySite, Tensor]:
    """The mean gradient at each site."""
    count, sums = 1, dict(next(found).gradient)
    for each in found:
        count, sums = count + 1, {site: total + each.gradient[site] for site, total in sums.items()}
    return {site: total / count for site, total in sums.items()}


def check_end(
    asked: Question, rows: Sequence[int], hooks: Sequence[Hook], end: Tensor, wanted: Tensor
) -> None:
    """Raise `Unsupported` where the embeddings of other tokens do not make the model say what those tokens do."""
    found = asked.asked_of(asked.run(rows, put(end), *hooks), rows)
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            f"the way from one prompt's embeddings to another's does not end at the other prompt: the metric is "
            f"{found.tolist()} there and {wanted.tolist()} for the prompt itself, since this model reads its tokens by "
            "another way too; take the plain gradient (method='gradient', or steps=1)"
        )
