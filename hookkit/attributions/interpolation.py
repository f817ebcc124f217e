"""The path between two runs: the model with embeddings between those of one text and another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_integer
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.edits import edit
from ..models.sites import AnySite, Site, SitesLike
from .backward import PromptMetric, SiteGradients, check_choice, compute_gradients

EMBED = Site("embed")

Points: TypeAlias = Literal["start", "middle"]
"""Where the gradient is taken in each of the equal parts of the path."""


def set_embeddings(values: Tensor) -> Hook:
    """Returns a hook that replaces the embeddings of a batch."""
    return edit("embed", lambda _: values)


def path_points(steps: int, points: Points = "middle") -> list[float]:
    """Returns the points of the path at which the gradient is taken, from 0, the prompts that are
    run, to 1, the other prompts.

    "start" is the sum of EAP-IG (Hanna et al. 2024): its first point is the prompts that are run,
    and the other prompts are no point. Its error is of order 1 / steps, that of "middle" of order
    1 / steps².
    """
    check_choice("points", points, "start", "middle")
    check_integer(steps, "steps", least=1, meaning="how many parts of the way,", error=BadHook)
    offset = 0.5 if points == "middle" else 0.0
    return [(number + offset) / steps for number in range(steps)]


@dataclass(frozen=True, eq=False)
class EmbeddingPath:
    """The straight path between the embeddings of some prompts and other embeddings."""

    start: Tensor
    end: Tensor
    steps: int
    points: Points

    def gradients(
        self,
        prompt_metric: PromptMetric,
        rows: Sequence[int],
        sites: SitesLike,
        hooks: Sequence[Hook],
        *,
        keep_graph: bool = False,
    ) -> Iterator[SiteGradients]:
        """Yields the metric and its gradients at each point of the path."""
        for point in path_points(self.steps, self.points):
            embeddings = set_embeddings(self.start + point * (self.end - self.start))
            yield compute_gradients(
                prompt_metric, rows, sites, [embeddings, *hooks], keep_graph=keep_graph
            )


def mean_gradient(results: Iterator[SiteGradients]) -> dict[AnySite, Tensor]:
    """Returns the mean gradient at each site."""
    sums = dict(next(results).gradient)
    count = 1
    for result in results:
        count += 1
        for site in sums:
            sums[site] = sums[site] + result.gradient[site]
    return {site: total / count for site, total in sums.items()}


def check_path_end(
    prompt_metric: PromptMetric,
    rows: Sequence[int],
    hooks: Sequence[Hook],
    end: Tensor,
    target: Tensor,
) -> None:
    """Raises `Unsupported` if the embeddings of the other prompts do not give their metric."""
    run = prompt_metric.run(rows, set_embeddings(end), *hooks)
    metric = prompt_metric.of_run(run, rows)
    if not torch.allclose(metric, target, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            "the way from one prompt's embeddings to another's does not end at the other prompt: "
            f"the metric is {metric.tolist()} there and {target.tolist()} for the prompt itself, "
            "since this model reads its tokens by another way too; take the plain gradient "
            "(method='gradient', or steps=1)"
        )
