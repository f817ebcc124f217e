"""Vectors that are read from contrasting prompts: the difference of means, and the first principal direction.

vectors = hk.mean_difference(lm, ["I love this place."], ["I hate this place."], "resid_post.12")
vectors["resid_post.12"].steer(dose=0.3)

What is at some sites on some prompts, a few prompts at a time: each prompt's own values, without padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import checks_arguments, whole_number
from ..errors import BadHook, BadPrompt
from ..hooks.base import not_square
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..hooks.vector import Vector, Vectors, data_hash, model_words
from ..models.lm import LM
from ..models.positions import PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, SitesLike
from ..runs.forward import forward

BATCH = 16  # prompts that run together, where nothing else is said


@dataclass(frozen=True, eq=False)
class Stream:
    """What is kept of a set of prompts at one site, in float64 on the CPU: little, however many there are.

    means    [prompt, d]  the mean over each prompt's positions
    counts   [prompt]     how many positions each has
    lengths  [token]      the L2 norm of each value
    """

    means: Float[Tensor, "prompt d"]
    counts: Int[Tensor, " prompt"]
    lengths: Float[Tensor, " token"]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean over all positions of all prompts, each position counting as much."""
        return (self.means * self.counts[:, None]).sum(0) / self.counts.sum()


def streams(
    lm: LM, rows: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int
) -> dict[AnySite, Stream]:
    """What is at each of these sites at some positions of each prompt."""
    whole_number(batch, "batch", least=1, meaning="how many prompts run together,", error=BadHook)
    chosen = not_square(lm.expand(sites), "a steering vector is a mean of")
    found: dict[AnySite, list[Stream]] = {site: [] for site in chosen}
    for start in range(0, len(rows), batch):
        some = [list(row) for row in rows[start : start + batch]]
        run = forward(lm, some, capture(chosen, pos=pos), logits=False)
        for site in chosen:
            found[site].append(_stream(list(_own(run.captured(site)))))
    return {site: _joined(each) for site, each in found.items()}


def _own(kept: Captured) -> Iterator[Float[Tensor, "pos d"]]:
    """The values of each prompt at its own positions."""
    if kept.positions is None or kept.values.ndim != 3:
        raise BadHook(
            f"{kept.site} has values {list(kept.values.shape)}, and a steering vector is one for each prompt and "
            "position, [prompt, pos, d]: name one head of a site with heads, such as 'z.9.3'"
        )
    for values, positions in zip(kept.values, kept.positions, strict=True):
        yield values[(positions >= 0).to(values.device)].cpu().double()


def _stream(each: Sequence[Float[Tensor, "pos d"]]) -> Stream:
    counts = torch.tensor([len(values) for values in each])
    return Stream(
        torch.stack([v.mean(0) for v in each]), counts, torch.cat([v.norm(dim=-1) for v in each])
    )


def _joined(parts: Sequence[Stream]) -> Stream:
    columns = zip(*((part.means, part.counts, part.lengths) for part in parts), strict=True)
    return Stream(*(torch.cat(column) for column in columns))


def typical(*lengths: Float[Tensor, " token"]) -> float:
    """The median length. Not the mean: at many models' first position the stream is a hundred times as long."""
    return float(torch.cat(lengths).median())


@checks_arguments
def mean_difference(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The mean of what is at each site on the positive prompts, minus that on the negative ones (Turner et al. 2023;
    Marks and Tegmark 2023; Rimsky et al. 2024).

    The two need not be as many. `pos` is where they are read, counted in each prompt without padding: the last token,
    several of them, or all with pos=None (each token counts as much; a model's first position is often an outlier, and
    pos=slice(1, None) leaves it out). `batch` prompts run at a time and only sums are kept, so that memory does not
    grow with their number. A vector for each site: "resid_post" gives one for every layer.

    >>> found = mean_difference(lm, ["I love it", "It is great"], ["I hate it"], ["resid_post.6", "resid_post.12"])
    >>> found["resid_post.12"].tensor.shape
    torch.Size([576])
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    there, here = (streams(lm, rows, sites, pos, batch) for rows in (toward, away))
    about: dict[str, Any] = {**model_words(lm), "method": "mean difference", "pos": repr(pos)}
    about |= {"prompts": [len(toward), len(away)], "data_sha256": data_hash(toward, away)}
    return Vectors(
        tuple(
            Vector(
                site,
                there[site].mean - here[site].mean,
                typical(there[site].lengths, here[site].lengths),
                about,
            )
            for site in there
        )
    )


@checks_arguments
def principal_direction(
    lm: LM,
    positive: Prompts,
    negative: Prompts,
    sites: SitesLike,
    *,
    pos: PosLike = -1,
    batch: int = BATCH,
) -> Vectors:
    """The first principal direction of the differences between paired prompts, of length 1 (Zou et al. 2023).

    Prompt n of the one is paired with prompt n of the other. The differences are not centred, since each of them stands
    for both orders of its pair; so their common part counts, and the direction is the one along which pairs are
    furthest apart. Its sign is that in which the positive prompts lie on average. Where `pos` means several tokens,
    their mean in each prompt is taken. `about["share"]` is the part of the squared differences along it, 0 to 1.

    >>> found = principal_direction(lm, ["I love it", "It is great"], ["I hate it", "It is bad"], "resid_post.6")
    >>> round(found[0].length, 4)
    1.0
    """
    toward, away = as_batch(lm, positive).rows, as_batch(lm, negative).rows
    if len(toward) != len(away):
        raise BadPrompt(
            f"{len(toward)} positive and {len(away)} negative prompts were given, and a principal direction is of "
            "pairs: give as many of each, in pairs; hk.mean_difference needs none"
        )
    there, here = (streams(lm, rows, sites, pos, batch) for rows in (toward, away))
    about: dict[str, Any] = {**model_words(lm), "method": "principal direction", "pos": repr(pos)}
    about |= {"prompts": [len(toward), len(away)], "data_sha256": data_hash(toward, away)}
    found = []
    for site in there:
        apart = there[site].means - here[site].means
        if not bool(apart.any()):
            raise BadHook(
                f"the pairs are the same at {site}, pos={pos!r}: read them where they differ"
            )
        _, sizes, axes = torch.linalg.svd(apart, full_matrices=False)
        direction = axes[0] if (apart @ axes[0]).mean() >= 0 else -axes[0]
        share = float(sizes[0] ** 2 / (sizes**2).sum())
        norm = typical(there[site].lengths, here[site].lengths)
        found.append(Vector(site, direction, norm, {**about, "share": share}))
    return Vectors(tuple(found))
