"""Vectors from contrasting prompts: the difference of means, and the first principal direction.

vectors = hk.mean_difference(lm, ["I love this place."], ["I hate this place."], "resid_post.12")
vectors["resid_post.12"].steer(dose=0.3)

Prompts run a few at a time. Of each site, only each prompt's mean and the lengths of its values are
kept, at the prompt's own positions, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, BadPrompt
from ..hooks.base import require_vectors
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..hooks.vector import Vector, Vectors, data_hash, describe_model
from ..models.lm import LM
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, SitesLike
from ..runs.forward import forward

BATCH = 16  # default number of prompts that run together


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Statistics of a set of prompts at one site, in float64 on the CPU.

    means    [prompt, d]  the mean over each prompt's positions
    counts   [prompt]     how many positions each has
    lengths  [token]      the L2 norm of each value
    """

    means: Float[Tensor, "prompt d"]
    counts: Int[Tensor, " prompt"]
    lengths: Float[Tensor, " token"]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean over all positions of all prompts, each position with the same weight."""
        return (self.means * self.counts[:, None]).sum(0) / self.counts.sum()


def collect_statistics(
    lm: LM, rows: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int
) -> dict[AnySite, SiteStatistics]:
    """Returns the statistics of each of these sites at some positions of each prompt."""
    check_integer(batch, "batch", least=1, meaning="how many prompts run together,", error=BadHook)
    selected = require_vectors(lm.expand(sites), "a steering vector is a mean of")
    prompts: dict[AnySite, list[tuple[Tensor, int, Tensor]]] = {site: [] for site in selected}
    for start in range(0, len(rows), batch):
        texts = list(rows[start : start + batch])
        run = forward(lm, texts, capture(selected, pos=pos), logits=False)
        for site in selected:
            for values in _values_of_prompts(run.captured(site)):
                prompts[site].append((values.mean(0), len(values), values.norm(dim=-1)))
    statistics = {}
    for site in selected:
        means, counts, lengths = zip(*prompts[site], strict=True)
        means, lengths = torch.stack(means), torch.cat(lengths)
        statistics[site] = SiteStatistics(means, torch.tensor(counts), lengths)
    return statistics


def _values_of_prompts(captured: Captured) -> Iterator[Float[Tensor, "pos d"]]:
    """Returns the values of each prompt at its own positions."""
    if captured.positions is None or captured.values.ndim != 3:
        raise BadHook(
            f"{captured.site} has values {list(captured.values.shape)}, and a steering vector is "
            "one for each prompt and position, [prompt, pos, d]: name one head of a site with "
            "heads, such as 'z.9.3'"
        )
    for values, positions in zip(captured.values, captured.positions, strict=True):
        yield values[(positions >= 0).to(values.device)].cpu().double()


def median_length(*lengths: Float[Tensor, " token"]) -> float:
    """Returns the median length.

    The mean would be dominated by the first position, where the stream of many models is a hundred
    times as long.
    """
    return float(torch.cat(lengths).median())


@check_arguments
def mean_difference(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The mean of each site on the positive prompts minus that on the negative ones.

    The numbers of prompts may differ. `pos` is where the sites are read, counted in each prompt
    without padding: the last token, several tokens, or all with pos=None (each token has the same
    weight; a model's first position is often an outlier, and pos=slice(1, None) leaves it out).
    `batch` prompts run at a time and only sums are kept, so that memory does not grow with their
    number. The result has a vector for each site: "resid_post" gives one for every layer.

    Turner et al. 2023; Marks and Tegmark 2023; Rimsky et al. 2024.

    >>> positive, sites = ["I love it", "It is great"], ["resid_post.6", "resid_post.12"]
    >>> vectors = mean_difference(lm, positive, ["I hate it"], sites)
    >>> vectors["resid_post.12"].tensor.shape
    torch.Size([576])
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    positives = collect_statistics(lm, toward, sites, pos, batch)
    negatives = collect_statistics(lm, away, sites, pos, batch)
    about = provenance(lm, "mean difference", pos, toward, away)
    vectors = []
    for site, stream in positives.items():
        difference = stream.mean - negatives[site].mean
        norm = median_length(stream.lengths, negatives[site].lengths)
        vectors.append(Vector(site, difference, norm, about))
    return Vectors(tuple(vectors))


def provenance(
    lm: LM, method: str, pos: PosLike, toward: Sequence[Row], away: Sequence[Row]
) -> dict[str, Any]:
    """Returns how vectors of these prompts are made, for their `about`."""
    return {
        **describe_model(lm),
        "method": method,
        "pos": repr(pos),
        "prompts": [len(toward), len(away)],
        "data_sha256": data_hash(toward, away),
    }


@check_arguments
def principal_direction(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The first principal direction of the differences between paired prompts, of length 1.

    Prompt n of `positive` is paired with prompt n of `negative`. The differences are not centred,
    since each of them represents both orders of its pair; so their common part counts, and the
    direction is the one along which pairs are furthest apart. Its sign is that in which the
    positive prompts lie on average. If `pos` selects several tokens, their mean in each prompt is
    used. `about["share"]` is the part of the squared differences along it, 0 to 1.

    Zou et al. 2023.

    >>> positive, negative = ["I love it", "It is great"], ["I hate it", "It is bad"]
    >>> vectors = principal_direction(lm, positive, negative, "resid_post.6")
    >>> round(vectors[0].length, 4)
    1.0
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    if len(toward) != len(away):
        raise BadPrompt(
            f"{len(toward)} positive and {len(away)} negative prompts were given, and a principal "
            "direction is of pairs: give as many of each, in pairs; hk.mean_difference needs none"
        )
    positives = collect_statistics(lm, toward, sites, pos, batch)
    negatives = collect_statistics(lm, away, sites, pos, batch)
    about = provenance(lm, "principal direction", pos, toward, away)
    vectors = []
    for site, stream in positives.items():
        differences = stream.means - negatives[site].means
        if not bool(differences.any()):
            raise BadHook(
                f"the pairs are the same at {site}, pos={pos!r}: read them where they differ"
            )
        _, sizes, axes = torch.linalg.svd(differences, full_matrices=False)
        direction = axes[0]
        if (differences @ direction).mean() < 0:
            direction = -direction
        share = float(sizes[0] ** 2 / (sizes**2).sum())
        norm = median_length(stream.lengths, negatives[site].lengths)
        vectors.append(Vector(site, direction, norm, {**about, "share": share}))
    return Vectors(tuple(vectors))
