"""From a module's tensor to the values of a site, and back: heads, fused parts, multipliers, keys.

A `SiteView` says how a site stands in the tensor at its place. What it reads is a view or made of one, so that what it
writes goes into the module's own tensor (or a copy of it).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch_positions import ForwardPass, Selection
from .families.schema import AxisSplit, ModuleLocation
from .layout import Layout
from .sites import SQUARE, AnySite, Site


@dataclass(frozen=True)
class SiteView:
    """A site that is its module's tensor, [batch, pos, ...]."""

    head: int | None = None
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        """True where nothing at all stands between the tensor and the site."""
        return type(self) is SiteView and self.factor == 1.0

    def laid(self, found: Tensor, call: ForwardPass) -> Tensor:
        """The module's tensor as [batch, pos, ...], a view of it."""
        return found

    def call(self, call: ForwardPass, found: Tensor) -> ForwardPass:
        """The forward whose rows and columns the tensor has."""
        return call

    def view(self, full: Tensor) -> Tensor:
        """The part of [batch, pos, ...] that is the site, a view; heads may still be on two axes."""
        return full

    def read(self, raw: Tensor, cells: Selection, call: ForwardPass) -> Tensor:
        """The values of the site [row, pos, ...] from those cells of the view."""
        return raw if self.factor == 1.0 else raw * self.factor

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, call: ForwardPass
    ) -> Tensor:
        """The cells of the view that give these values; with `old`, to the bit what they were where nothing changed."""
        if self.factor == 1.0:
            return new
        return new / self.factor if old is None else torch.where(new == old, raw, new / self.factor)


@dataclass(frozen=True)
class FlatView(SiteView):
    """Rows and positions on one axis: [(batch pos), ...]."""

    def laid(self, found: Tensor, call: ForwardPass) -> Tensor:
        return found if found.ndim > 2 else found.view(call.rows, -1, found.shape[-1])


@dataclass(frozen=True)
class FusedView(SiteView):
    """Some numbers of the last axis, which may be heads."""

    cut: AxisSplit = None  # pyright: ignore[reportAssignmentType]

    def view(self, full: Tensor) -> Tensor:
        cut = self.cut
        part = full.unflatten(-1, (-1, cut.total))[..., cut.start : cut.stop]
        if cut.inner is None:
            return part[..., 0, :]
        heads = part.unflatten(-1, (cut.inner, cut.width))
        if self.head is not None:
            return heads[:, :, self.head // cut.inner, self.head % cut.inner]
        if cut.inner == 1:
            return heads[..., 0, :]
        return heads[:, :, 0] if cut.outer == 1 else heads

    def read(self, raw: Tensor, cells: Selection, call: ForwardPass) -> Tensor:
        return raw.flatten(2, 3) if raw.ndim == 5 else raw

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, call: ForwardPass
    ) -> Tensor:
        return new.reshape(raw.shape)


@dataclass(frozen=True)
class HeadFirstView(SiteView):
    """Inside attention, [batch, head, pos, d_head]."""

    keys: bool = False  # what attention looks at: all that the cache holds, and not this forward's positions only

    def laid(self, found: Tensor, call: ForwardPass) -> Tensor:
        return found.transpose(1, 2)

    def call(self, call: ForwardPass, found: Tensor) -> ForwardPass:
        return call.over_keys(found.shape[2]) if self.keys else call

    def view(self, full: Tensor) -> Tensor:
        return full if self.head is None else full[:, :, self.head]


@dataclass(frozen=True)
class AttentionView(SiteView):
    """Attention's numbers of each query and key: [batch, head, query, key] in the module, with the columns of the batch
    as keys. Its values are [row, query, head, key], with each row's own positions as keys, also those that it has not
    come to. Where a query does not see a key, a score is the smallest number there is, and the pattern zero."""

    scores: bool = False

    def laid(self, found: Tensor, call: ForwardPass) -> Tensor:
        return found.transpose(1, 2)

    def view(self, full: Tensor) -> Tensor:
        return full if self.head is None else full[:, :, self.head]

    def read(self, raw: Tensor, cells: Selection, call: ForwardPass) -> Tensor:
        unseen = unseen_value(raw.dtype, self.scores)
        if self.scores:
            raw = raw.masked_fill(hidden(raw), unseen)
        spans = call.keys(cells, raw.shape[-1])
        width = max(last for _, last, _ in spans)
        if all(span == (0, width, 0) for span in spans):
            return raw[..., :width]
        values = raw.new_full((*raw.shape[:-1], width), unseen)
        for row, (first, last, column) in enumerate(spans):
            values[row, ..., first:last] = raw[row, ..., column : column + last - first]
        return values

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, call: ForwardPass
    ) -> Tensor:
        result = raw.clone()
        for row, (first, last, column) in enumerate(call.keys(cells, raw.shape[-1])):
            result[row, ..., column : column + last - first] = new[row, ..., first:last]
        return result


def hidden(scores: Tensor, masks: torch.dtype | None = None) -> Tensor:
    """Where a mask hides a key; `masks` is the dtype of the mask, that of the scores if left out.

    It is not the smallest number alone, since some families scale after they have masked. In float64 it is float32's,
    since some families compute their scores in float32 whatever the model's dtype.
    """
    dtype = masks or scores.dtype
    narrow = torch.float32 if dtype == torch.float64 else dtype
    return scores <= torch.finfo(narrow).min / 16


def unseen_value(dtype: torch.dtype, scores: bool) -> float:
    """What stands where a query does not see a key."""
    return torch.finfo(dtype).min if scores else 0.0


def form_of(layout: Layout, site: AnySite, place: ModuleLocation) -> SiteView:
    """How a site stands in the tensor at its place."""
    if (
        place.times or place.over
    ):  # read anew each time: a multiplier is an attribute, which a user may change
        return _form(layout, site, place)
    if site not in layout.forms:
        layout.forms[site] = _form(layout, site, place)
    return layout.forms[site]


def full_sizes(layout: Layout, site: AnySite, place: ModuleLocation) -> dict[int, int] | None:
    """How long the axes of the whole tensor at a place are that may be split among processes; None where that is not
    known."""
    if isinstance(site, Site):
        shape = layout.shape(replace(site, head=None))
        if place.side == "inside" and not place.flat:
            return {1: shape[0]}
        found = layout.cut(site) if place.cut else None
        if found is not None:
            return {-1: found.outer * found.total}
        return {number - len(shape): size for number, size in enumerate(shape) if size}
    word = "in_features" if place.side == "input" else "out_features"
    size = getattr(layout.submodule(place.path), word, None) if place.item == 0 else None
    return {-1: size} if isinstance(size, int) else None


def _form(layout: Layout, site: AnySite, place: ModuleLocation) -> SiteView:
    head = site.head if isinstance(site, Site) else None
    if place.flat:
        return FlatView(head)
    if place.side == "inside":
        assert isinstance(site, Site)
        return (
            AttentionView(head, scores=site.name == "scores")
            if site.name in SQUARE
            else HeadFirstView(head, keys=place.item != "query")
        )
    if place.cut:
        assert isinstance(site, Site)
        found = layout.cut(site)
        assert found is not None
        return FusedView(head, cut=found)
    return SiteView(head, layout.factor(site))
