"""What is at some sites on some prompts, a few prompts at a time: each prompt's own values, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import whole_number
from ..captured import Captured
from ..errors import BadHook
from ..hooks.base import not_square
from ..hooks.looking import capture
from ..model import LM
from ..positions import PosLike
from ..prompts import Row
from ..runs import forward
from ..sites import AnySite, SitesLike

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


def streams(lm: LM, rows: Sequence[Row], sites: SitesLike, pos: PosLike, batch: int) -> dict[AnySite, Stream]:
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
    return Stream(torch.stack([v.mean(0) for v in each]), counts, torch.cat([v.norm(dim=-1) for v in each]))


def _joined(parts: Sequence[Stream]) -> Stream:
    columns = zip(*((part.means, part.counts, part.lengths) for part in parts), strict=True)
    return Stream(*(torch.cat(column) for column in columns))


def typical(*lengths: Float[Tensor, " token"]) -> float:
    """The median length. Not the mean: at many models' first position the stream is a hundred times as long."""
    return float(torch.cat(lengths).median())
