"""How a site is stored in the tensor at its module location.

A `SiteView` converts between a module's tensor and a site's values: heads, fused parts,
multipliers, keys. It reads through views of that tensor where it can, so that what it writes goes
into the module's own tensor (or a copy).
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch_positions import ForwardPass, KeySpan, Selection
from .dictionaries import find_dictionary
from .experts import NEURONS
from .families.schema import AxisSplit, ModuleLocation
from .layout import Layout, read_integer
from .sites import CROSS_SITES, QUERY_KEY_SITES, AnySite, Site


@dataclass(frozen=True)
class SiteView:
    """A site that is its module's tensor [batch, pos, ...], up to a factor."""

    head: int | None = None
    factor: float = 1.0
    flat: bool = False  # True if rows and positions are one axis: [(batch pos), ...]

    @property
    def plain(self) -> bool:
        """True if the site is exactly the module's tensor."""
        return type(self) is SiteView and self.factor == 1.0 and not self.flat

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        """Returns a view [batch, pos, ...] of the module's tensor."""
        if self.flat and tensor.ndim == 2:
            return tensor.unflatten(0, (forward.shape[0], -1))
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
        if new.requires_grad:  # the gradient goes to `new`, also where no value changed
            raw = raw.detach() + (scaled - scaled.detach())
        return torch.where(new == old, raw, scaled)


@dataclass(frozen=True)
class ExpertView(SiteView):
    """Neurons of experts, [(batch pos), choice, d_mlp]."""

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        return tensor.unflatten(0, (forward.shape[0], -1))


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
    cross: bool = False  # True if the keys are those of an encoder-decoder's source

    def _keys(self, cells: Selection, forward: ForwardPass, count: int) -> list[list[KeySpan]]:
        return forward.source_keys(cells) if self.cross else forward.keys(cells, count)

    def read(self, raw: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
        unseen = unseen_value(raw.dtype, self.scores)
        if self.scores:
            raw = raw.masked_fill(is_hidden(raw), unseen)
        spans = self._keys(cells, forward, raw.shape[-1])
        width = max(span.last for span in itertools.chain(*spans))
        own_keys = [KeySpan(slice(None), 0, width, slice(0, width))]
        if all(row_spans == own_keys for row_spans in spans):
            return raw[..., :width]
        values = raw.new_full((*raw.shape[:-1], width), unseen)
        for row, row_spans in enumerate(spans):
            for span in row_spans:
                keys = raw[row][span.queries][..., span.columns]
                values[row, span.queries, ..., span.first : span.last] = keys
        return values

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Tensor:
        result = raw.clone()
        for row, row_spans in enumerate(self._keys(cells, forward, raw.shape[-1])):
            for span in row_spans:
                query_values = result[row][span.queries].clone()
                query_values[..., span.columns] = new[row][span.queries][
                    ..., span.first : span.last
                ]
                result[row, span.queries] = query_values
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
    if site not in layout.views:
        layout.views[site] = _build_view(layout, site, location)
    return layout.views[site]


def full_sizes(layout: Layout, site: AnySite, location: ModuleLocation) -> dict[int, int] | None:
    """Returns the full lengths of a tensor's axes that may be split among processes, by axis.

    Returns None where they are not known.
    """
    if not isinstance(site, Site):
        return _module_sizes(layout, location)
    if site.of_features:
        site = find_dictionary(layout.dictionaries, site).site
    shape = layout.shape(replace(site, head=None))
    if location.side == "inside" and not location.flat:
        return {1: shape[0]}
    cut = layout.cut(site)
    if cut is not None:
        return {-1: cut.outer * cut.total}
    return {axis - len(shape): size for axis, size in enumerate(shape) if size}


def _module_sizes(layout: Layout, location: ModuleLocation) -> dict[int, int] | None:
    attribute = "in_features" if location.side == "input" else "out_features"
    size = read_integer(layout.submodule(location.path), attribute)
    if size is None or location.item != 0:
        return None
    return {-1: size}


def _build_view(layout: Layout, site: AnySite, location: ModuleLocation) -> SiteView:
    if not isinstance(site, Site):
        return SiteView()
    if site.of_features:
        return _build_feature_view(layout, site, location)
    if location.item in NEURONS:
        return ExpertView()
    if location.side == "inside" and site.name in QUERY_KEY_SITES:
        return AttentionView(
            site.head, scores=site.name.endswith("scores"), cross=site.name in CROSS_SITES
        )
    if location.side == "inside" and location.item != "router":
        return HeadFirstView(site.head, keys=location.item != "query")
    cut = layout.cut(site)
    if cut is not None:
        return FusedView(site.head, flat=location.flat, cut=cut)
    return SiteView(site.head, layout.factor(site), location.flat)


def _build_feature_view(layout: Layout, site: Site, location: ModuleLocation) -> SiteView:
    dictionary = find_dictionary(layout.dictionaries, site)
    source = dictionary.reads
    source_view = None
    if source != dictionary.site:
        source_view = view_of(layout, source, layout.location(source))
    base = _build_view(layout, dictionary.site, location)
    return dictionary.view(base, source_view, site.head)


def source_of_features(layout: Layout, site: AnySite) -> Site | None:
    """Returns the site that a transcoder reads, whose features these are; None for other sites."""
    if not isinstance(site, Site) or not site.of_features:
        return None
    dictionary = find_dictionary(layout.dictionaries, site)
    return None if dictionary.reads == dictionary.site else dictionary.reads
