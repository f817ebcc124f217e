"""Converts between a module's tensor and a site's values: heads, fused parts, multipliers, keys.

A `SiteView` says how a site is stored in the tensor at its module location. It reads through views
of that tensor where it can, so that what it writes goes into the module's own tensor (or a copy).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch_positions import ForwardPass, Selection
from .families.schema import AxisSplit, ModuleLocation
from .layout import Layout
from .sites import QUERY_KEY_SITES, AnySite, Site


@dataclass(frozen=True)
class SiteView:
    """A site that is its module's tensor [batch, pos, ...], up to a factor."""

    head: int | None = None
    factor: float = 1.0

    @property
    def plain(self) -> bool:
        """True if the site is exactly the module's tensor."""
        return type(self) is SiteView and self.factor == 1.0

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        """Returns a view [batch, pos, ...] of the module's tensor."""
        return tensor

    def call(self, forward: ForwardPass, tensor: Tensor) -> ForwardPass:
        """Returns the forward pass with the rows and columns that the tensor has."""
        return forward

    def view(self, full: Tensor) -> Tensor:
        """Returns the view of [batch, pos, ...] that is the site; heads may be on two axes."""
        return full

    def read(self, raw: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
        """Returns the values of the site [row, pos, ...] from these cells of the view."""
        if self.factor == 1.0:
            return raw
        return raw * self.factor

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Tensor:
        """Returns the cells of the view that give the values `new`.

        With `old`, cells that did not change are equal to `raw` bit for bit.
        """
        if self.factor == 1.0:
            return new
        scaled = new / self.factor
        if old is None:
            return scaled
        return torch.where(new == old, raw, scaled)


@dataclass(frozen=True)
class FlatView(SiteView):
    """A site whose tensor has rows and positions on one axis: [(batch pos), ...]."""

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        if tensor.ndim > 2:
            return tensor
        return tensor.view(forward.rows, -1, tensor.shape[-1])


@dataclass(frozen=True)
class FusedView(SiteView):
    """A site that is a part of the tensor's last axis, which may have heads."""

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
        if cut.outer == 1:
            return heads[:, :, 0]
        return heads

    def read(self, raw: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
        return raw.flatten(2, 3) if raw.ndim == 5 else raw

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Tensor:
        return new.reshape(raw.shape)


@dataclass(frozen=True)
class HeadFirstView(SiteView):
    """A tensor inside attention, [batch, head, pos, d_head].

    With `keys=True` it has all columns that the cache holds, and not only those of this forward.
    """

    keys: bool = False

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        return tensor.transpose(1, 2)

    def call(self, forward: ForwardPass, tensor: Tensor) -> ForwardPass:
        return forward.with_keys(tensor.shape[2]) if self.keys else forward

    def view(self, full: Tensor) -> Tensor:
        if self.head is None:
            return full
        return full[:, :, self.head]


@dataclass(frozen=True)
class AttentionView(HeadFirstView):
    """Scores or pattern: [batch, head, query, key] in the module, with batch columns as keys.

    The values of the site are [row, query, head, key]. Keys are each row's own positions, up to
    the last position of the longest row. Where a query does not see a key, a score is the dtype's
    smallest number and the pattern is zero.
    """

    scores: bool = False

    def read(self, raw: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
        unseen = unseen_value(raw.dtype, self.scores)
        if self.scores:
            raw = raw.masked_fill(is_hidden(raw), unseen)
        spans = forward.keys(cells, raw.shape[-1])
        width = max(last for _, last, _ in spans)
        if all(span == (0, width, 0) for span in spans):
            return raw[..., :width]
        values = raw.new_full((*raw.shape[:-1], width), unseen)
        for row, (first, last, column) in enumerate(spans):
            values[row, ..., first:last] = raw[row, ..., column : column + last - first]
        return values

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Tensor:
        result = raw.clone()
        for row, (first, last, column) in enumerate(forward.keys(cells, raw.shape[-1])):
            result[row, ..., column : column + last - first] = new[row, ..., first:last]
        return result


def is_hidden(scores: Tensor, masks: torch.dtype | None = None) -> Tensor:
    """True where a mask hides a key. `masks` is the mask's dtype; by default that of the scores.

    The limit is above the dtype's smallest number, because some families scale after masking. In
    float64 the limit is float32's, because some families always compute scores in float32.
    """
    dtype = masks or scores.dtype
    if dtype == torch.float64:
        dtype = torch.float32
    return scores <= torch.finfo(dtype).min / 16


def unseen_value(dtype: torch.dtype, scores: bool) -> float:
    """Returns the value of a score or of the pattern where a query does not see a key."""
    return torch.finfo(dtype).min if scores else 0.0


def view_of(layout: Layout, site: AnySite, location: ModuleLocation) -> SiteView:
    """Returns how a site is stored in the tensor at its module location."""
    # A multiplier is an attribute that users may change, so it is read each time.
    if location.times or location.over:
        return _build_view(layout, site, location)
    if site not in layout.forms:
        layout.forms[site] = _build_view(layout, site, location)
    return layout.forms[site]


def full_sizes(layout: Layout, site: AnySite, location: ModuleLocation) -> dict[int, int] | None:
    """Returns the full lengths of a tensor's axes that may be split among processes, by axis.

    Returns None where they are not known.
    """
    if not isinstance(site, Site):
        if location.item != 0:
            return None
        attribute = "in_features" if location.side == "input" else "out_features"
        size = getattr(layout.submodule(location.path), attribute, None)
        return {-1: size} if isinstance(size, int) else None
    shape = layout.shape(replace(site, head=None))
    if location.side == "inside" and not location.flat:
        return {1: shape[0]}
    cut = layout.cut(site)
    if cut is not None:
        return {-1: cut.outer * cut.total}
    return {axis - len(shape): size for axis, size in enumerate(shape) if size}


def _build_view(layout: Layout, site: AnySite, location: ModuleLocation) -> SiteView:
    head = site.head if isinstance(site, Site) else None
    if location.flat:
        return FlatView(head)
    if location.side == "inside":
        assert isinstance(site, Site)
        if site.name in QUERY_KEY_SITES:
            return AttentionView(head, scores=site.name == "scores")
        return HeadFirstView(head, keys=location.item != "query")
    if location.cut:
        assert isinstance(site, Site)
        cut = layout.cut(site)
        assert cut is not None
        return FusedView(head, cut=cut)
    return SiteView(head, layout.factor(site))
