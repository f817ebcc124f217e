"""Values: what is at the sites at the positions wanted, a row for each, from one forward of a batch of texts.

What a harvest has computed: batches of a window, each by itself, here or elsewhere.

How far the texts are: a line in the terminal with tokens a second and the time that is left.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import BadHook
from ...hooks.capture import capture
from ...models.lm import LM
from ...models.positions import Where
from ...models.prompts import pad_id
from ...models.sites import SQUARE, AnySite, ModuleSite, Sites, SitesLike
from ...runs.forward import forward
from .texts import Read, Window

PROBE = 2, 3  # rows and tokens of the forward that shows what a site holds


@dataclass(frozen=True)
class Kind:
    """What a site holds at one position: the sizes of its axes and their numbers' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def probed(lm: LM, sites: SitesLike, what: str) -> dict[AnySite, Kind]:
    """What each site of a selection holds, every layer written out; found out by a forward of two short rows.

    `BadHook` where a site has no vector for each position: scores and pattern, or a module without rows and positions.
    """
    chosen = lm.expand(sites)
    for site in chosen:
        if not isinstance(site, ModuleSite) and site.name in SQUARE:
            raise BadHook(
                f"{what} keeps as many numbers for every token, and {site} has one for each query and key, more with "
                "every token: use hk.forward(lm, texts, hk.capture(site)) on texts at a time"
            )
    rows, width = PROBE
    run = forward(lm, [[pad_id(lm)] * width] * rows, capture(chosen), logits=False)
    kinds: dict[AnySite, Kind] = {}
    for site in chosen:
        found = run.captured(site)
        if found.positions is None or found.values.shape[:2] != PROBE:
            raise BadHook(
                f"{what} keeps a row for every token, and {site} has shape {list(found.values.shape)} for {rows} rows "
                f"of {width} tokens, without axes batch and pos: use hk.forward(lm, texts, hk.capture(site))"
            )
        kinds[site] = Kind(tuple(found.values.shape[2:]), found.values.dtype)
    return kinds


def at_sites(
    lm: LM, reads: Sequence[Read], sites: Sites, where: Where
) -> dict[AnySite, Shaped[Tensor, "row ..."]]:
    """The values at each site, a row for every position wanted of these texts, in their order."""
    run = forward(lm, [read.ids for read in reads], capture(sites, pos=where.pos), logits=False)
    wanted = [place for read in reads for place in read.places]
    found = {}
    for site in sites:
        captured = run.captured(site)
        assert captured.positions is not None
        there = captured.positions >= 0
        assert captured.positions[there].tolist() == wanted, (
            f"{site}: the positions are not those that were planned"
        )
        found[site] = (
            captured.values.flatten(0, 1)
            if bool(there.all())
            else captured.values[there.to(captured.values.device)]
        )
    return found


def row_numbers(reads: Sequence[Read], starts: Sequence[int]) -> Int[Tensor, " row"]:
    """Where each row of `at_sites` stands in the order of the texts, given where each text's rows begin."""
    return torch.cat(
        [
            torch.arange(start, start + len(read.places))
            for read, start in zip(reads, starts, strict=True)
        ]
    )


def as_stored(site: AnySite, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values on the CPU in the dtype of the shards. `BadHook` where a number is too large for it."""
    stored = values.to(dtype).cpu()
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        lost = torch.isinf(stored) & torch.isfinite(values).cpu()
        if bool(lost.any()):
            largest = values.abs().max().item()
            name = str(dtype).removeprefix("torch.")
            raise BadHook(
                f"dtype={name!r} holds numbers up to {torch.finfo(dtype).max:g}, and {site} has {largest:g}: use "
                "'bfloat16' or 'float32'"
            )
    return stored


NAMED = 8  # so many texts are named in an error


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that run together: which decides their last digits, so that it is never cut."""

    reads: tuple[Read, ...]

    def __str__(self) -> str:
        texts = sorted({read.text for read in self.reads})
        more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
        return f"the batch of text{'' if len(texts) == 1 else 's'} {', '.join(map(str, texts[:NAMED]))}{more}"


@dataclass(frozen=True, eq=False)
class Computing:
    """The values at some sites, as they are stored."""

    lm: LM
    kinds: Mapping[AnySite, Kind]
    where: Where

    def compute(self, batch: Batch) -> dict[AnySite, Tensor]:
        """A row for each position that is wanted of the batch's texts, in their order."""
        found = at_sites(self.lm, batch.reads, Sites(tuple(self.kinds)), self.where)
        return {
            site: as_stored(site, values, self.kinds[site].dtype) for site, values in found.items()
        }


class Progress:
    """A line that is told of each batch. `total` is the number of texts, where it is known."""

    def __init__(self, total: int | None, shown: bool) -> None:
        self._bar = tqdm(total=total, unit=" texts", disable=not shown, leave=True)
        self._started, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
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
