"""FeatureView: the features of a dictionary, read from and written to the tensor of their site.

A read encodes the values. A write adds the change of each feature times its decoder direction, so
that the part which the dictionary does not explain is kept, and a position without a change keeps
its numbers bit for bit.

Several hooks of one forward may act on one dictionary. What they changed is noted in the forward
pass, so that each reads the features as the hooks before it left them: encoding the changed values
would not give them back, since the directions of features are not orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.batch_positions import ForwardPass, Selection, expand_mask
from ..models.views import SiteView

if TYPE_CHECKING:
    from .dictionary import Dictionary


@dataclass(frozen=True, eq=False)
class FeatureView(SiteView):
    """The features of a dictionary at the site of `base`; with `head`, the one of that number.

    `source` is the view of the other site that a transcoder reads.
    """

    base: SiteView = None  # pyright: ignore[reportAssignmentType]
    source: SiteView | None = None
    dictionary: Dictionary = None  # pyright: ignore[reportAssignmentType]

    def batch_view(self, tensor: Tensor, forward: ForwardPass) -> Tensor:
        return self.base.batch_view(tensor, forward)

    def call(self, forward: ForwardPass, tensor: Tensor) -> ForwardPass:
        return self.base.call(forward, tensor)

    def view(self, full: Tensor) -> Tensor:
        return self.base.view(full)

    @property
    def _features(self) -> list[int] | None:
        return None if self.head is None else [self.head]

    def read(self, raw: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
        values = self._read(self._inputs(raw, cells, forward), cells, forward, self._features)
        return values if self.head is None else values[..., 0]

    def _read(
        self, inputs: Tensor, cells: Selection, forward: ForwardPass, features: list[int] | None
    ) -> Tensor:
        """Returns features as the hooks before this one left them."""
        values = self.dictionary.encode(inputs, features=features)
        edits = self._edits(forward)
        if edits is not None:
            values = edits.apply(values, cells, features)
        if cells.valid is None:
            return values
        return values.masked_fill(~expand_mask(cells.valid, values), 0)  # zeros have features too

    def _edits(self, forward: ForwardPass) -> FeatureEdits | None:
        return forward.feature_edits.get(self.dictionary.site)

    def _inputs(
        self, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Float[Tensor, "row pos d"]:
        """Returns the values that are encoded, without what hooks changed at the features."""
        if self.source is not None:
            tensor = forward.read_by_transcoders[self.dictionary.reads]
            full = self.source.view(self.source.batch_view(tensor, forward))
            return self.source.read(cells.gather(full), cells, forward).flatten(2)
        values = self.base.read(raw, cells, forward)
        edits = self._edits(forward)
        if edits is not None:
            values = edits.before(values, cells)
        return values.flatten(2)

    def write(
        self, new: Tensor, old: Tensor | None, raw: Tensor, cells: Selection, forward: ForwardPass
    ) -> Tensor:
        values = self.base.read(raw, cells, forward)
        inputs = self._inputs(raw, cells, forward)
        features = self._features
        if old is None:  # for a gradient, in which the values before have their part too
            old = self.read(raw, cells, forward)
        if features is not None:
            new, old = new[..., None], old[..., None]
        numbers = self._changed(new, old, features)
        if features is None and numbers is not None:
            new, old = new[..., numbers], old[..., numbers]
        if self.dictionary.keeps_error:
            written = self._with_changes(values, new - old, inputs, numbers)
        else:
            everything = new
            if numbers is not None:
                everything = self._read(inputs, cells, forward, None).index_copy(-1, numbers, new)
            written = self.dictionary.decode(everything, inputs=inputs)
        written = written.to(values.dtype).reshape(values.shape)
        edits = forward.feature_edits.setdefault(self.dictionary.site, FeatureEdits())
        edits.add(cells, forward, values, written, FeatureChange(numbers, old, new))
        return self.base.write(written, values, raw, cells, forward)

    def _changed(
        self, new: Tensor, old: Tensor, features: list[int] | None
    ) -> Int[Tensor, " feature"] | None:
        """Returns the numbers of the features that change anywhere; None for all of them."""
        if features is not None:
            return torch.tensor(features, device=new.device)
        if torch.is_grad_enabled() and new.requires_grad:
            return None
        numbers = (new != old).flatten(0, -2).any(0).nonzero().flatten()
        return None if len(numbers) == new.shape[-1] else numbers

    def _with_changes(
        self, values: Tensor, changes: Tensor, inputs: Tensor, numbers: Tensor | None
    ) -> Tensor:
        """Returns the site's values with what the changes add. The others keep their bits."""
        flat = values.flatten(2)
        added = self.dictionary.contribution(changes, features=numbers, inputs=inputs)
        moved = (flat + added).to(flat.dtype)
        if torch.is_grad_enabled() and changes.requires_grad:
            return moved
        return torch.where((changes != 0).any(-1, keepdim=True), moved, flat)


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """The values of some features before and after a hook; `numbers` is None for all features."""

    numbers: Int[Tensor, " feature"] | None
    old: Float[Tensor, "row pos feature"]
    new: Float[Tensor, "row pos feature"]

    def columns(self, features: list[int] | None) -> tuple[Tensor, Tensor] | None:
        """Returns which of the features that are read it changed, and its columns of them."""
        count = self.old.shape[-1]
        numbers = self.numbers
        if numbers is None:
            numbers = torch.arange(count, device=self.old.device)
        if features is None:
            return numbers, torch.arange(count, device=numbers.device)
        index = (numbers == features[0]).nonzero().flatten()
        if not len(index):
            return None
        return torch.zeros_like(index), index


@dataclass(eq=False)
class FeatureEdits:
    """What the hooks at one hook point changed so far at the features of one dictionary.

    `values_before` and `values_after` [batch, pos, ...] are those of the site, zero where nothing
    was written. The forward pass owns the object.
    """

    values_before: Tensor | None = None
    values_after: Tensor | None = None
    changes: list[FeatureChange] = field(default_factory=list)

    def before(self, values: Tensor, cells: Selection) -> Tensor:
        """Returns the site's values without the changes of features."""
        if self.values_before is None or self.values_after is None:
            return values
        before, after = cells.gather(self.values_before), cells.gather(self.values_after)
        return torch.where(values == after, before, values + (before - after))

    def apply(self, values: Tensor, cells: Selection, features: list[int] | None) -> Tensor:
        """Returns the encoded features with the changes."""
        for change in self.changes:
            column_pair = change.columns(features)
            if column_pair is None:
                continue
            columns, changed_columns = column_pair
            old, new = (
                cells.gather(change.old)[..., changed_columns],
                cells.gather(change.new)[..., changed_columns],
            )
            current = values[..., columns]
            changed = torch.where(torch.isclose(current, old), new, current + (new - old))
            values = values.index_copy(-1, columns, torch.where(old == new, current, changed))
        return values

    def add(
        self,
        cells: Selection,
        forward: ForwardPass,
        values: Tensor,
        written: Tensor,
        change: FeatureChange,
    ) -> None:
        """Notes a change of features, and the site's values before and after it."""
        # the model's tensor may be written into
        before = self.before(values, cells).clone()
        self.values_before = _place(self.values_before, before, cells, forward)
        self.values_after = _place(self.values_after, written, cells, forward)
        old = _place(None, change.old, cells, forward)
        new = _place(None, change.new, cells, forward)
        self.changes.append(FeatureChange(change.numbers, old, new))


def _place(full: Tensor | None, values: Tensor, cells: Selection, forward: ForwardPass) -> Tensor:
    """Returns a tensor of all rows and positions with the cells' values."""
    if cells.whole:
        return values
    if full is None:
        full = values.new_zeros(*forward.shape, *values.shape[2:])
    full = full.clone()
    cells.scatter(full, values)
    return full
