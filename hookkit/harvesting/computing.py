"""What a harvest has computed: batches of a window, each by itself, here or elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..model import LM
from ..positions import Where
from ..sites import AnySite, Sites
from .texts import Read
from .values import Kind, as_stored, at_sites

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
        return {site: as_stored(site, values, self.kinds[site].dtype) for site, values in found.items()}
