"""Where the rows of a cell begin to differ from the unedited rows: the first block and position.

Four arguments decide it; nothing is measured.

causal           A position depends on no later position, so an edit changes nothing before its own
                 position. Where an edit of scores or a pattern may break this, whole prompts run.
last block       After the attention of the last block no position reads another. An edit there
                 matters only at the positions that the metric reads.
all positions    A user's function receives all of its positions together, so what it does at one
                 may depend on the other ones.
shared prefix    A patch changes nothing up to the first token in which the source's prompt
                 differs. The sweep compares the source with the model's own values before it
                 relies on this.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeAlias

from ..hooks.ablation import Ablate
from ..hooks.base import EditHook
from ..hooks.capture import Captured
from ..hooks.edits import Edit
from ..hooks.values import FromRun
from ..models.lm import LM
from ..models.positions import At, Where, resolve_positions
from ..models.prompts import positions_of_text
from ..models.sites import QUERY_KEY_SITES, AnySite, ModuleSite, Site
from ..runs.taps import BoundHook, HookPoint
from .inputs import SweepInputs

INPUT = -1  # the block number of what is before the first block

# Sites after the attention of their block. They reach other positions through later blocks only.
AFTER_ATTENTION = {"scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in"}
AFTER_ATTENTION |= {"router_logits", "experts", "expert_weights", "mlp_pre", "mlp_post", "mlp_out"}
AFTER_ATTENTION |= {"resid_post", "final_norm", "lm_head", "logits"}

Start: TypeAlias = tuple[int, int]
"""The block and the position at which a row of a cell begins to differ."""


@dataclass(frozen=True, eq=False)
class FirstEffect:
    """Finds where edits begin to change a row of the inputs.

    `base` are the hooks that act in every row, edited or not. `sources_match` in its methods is
    True if the sources of patches were compared with the model's own values.
    """

    inputs: SweepInputs
    base: list[BoundHook]

    @cached_property
    def _mixing(self) -> list[BoundHook]:
        """Base hooks that may carry a change from a position to an earlier one."""
        return [bound for bound in self.base if needs_all_positions(bound)]

    def first_start(
        self, bound_hooks: Iterable[BoundHook], row: int, *, sources_match: bool
    ) -> Start | None:
        """Returns where a row begins to differ under these hooks; None if it cannot matter."""
        blocks, positions = [], []
        for bound in bound_hooks:
            if bound.change is None:
                continue
            start = self.start_of(bound, row, sources_match=sources_match)
            if start is not None:
                blocks.append(start[0])
                positions.append(start[1])
        if not blocks:
            return None
        positions += [self._first_position(bound, row) for bound in self._mixing]
        return min(blocks), min(positions)

    def start_of(self, bound: BoundHook, row: int, *, sources_match: bool) -> Start | None:
        """Returns where one hook begins to change a row, as far as the metric can see."""
        positions = self.inputs.full.selected_positions(bound.where)[row]
        if positions is None:
            return None
        length = self.inputs.lengths[row]
        first = 0
        stays_in_place = not needs_all_positions(bound) and not self._is_mixed_later(bound)
        if self.is_after_last_attention(bound.site) and stays_in_place:
            first = length - self.inputs.read_counts[row]
        source = patch_source(bound) if sources_match else None
        if source is not None and self._has_same_positions(bound.where, source, row):
            first = max(first, self.common_prefix(source, row))
        index = bisect_left(positions, first)
        if index == len(positions) or positions[index] >= length:
            return None
        return self.block_of(bound.site), positions[index]

    def _is_mixed_later(self, bound: BoundHook) -> bool:
        """True if a base hook after a hook of the last block may carry its change elsewhere."""
        if not bound.head:
            return bool(self._mixing)
        return any(mixing.head or isinstance(mixing.site, ModuleSite) for mixing in self._mixing)

    def block_of(self, site: AnySite) -> int:
        """Returns the block of a site: the last one for sites after all blocks, `INPUT` for the
        embedding and for modules outside the blocks."""
        lm = self.inputs.lm
        if isinstance(site, ModuleSite):
            return block_of_module(lm, site.path)
        if site.name in ("embed", "pos_embed"):
            return INPUT
        return lm.n_layers - 1 if site.layer is None else site.layer

    def is_after_last_attention(self, site: AnySite) -> bool:
        """True if no later attention reads a site."""
        if not isinstance(site, Site) or site.name not in AFTER_ATTENTION:
            return False
        return site.layer is None or site.layer == self.inputs.lm.n_layers - 1

    def common_prefix(self, source: Captured, row: int) -> int:
        """Returns the first position at which a source's prompt differs from a prompt of the
        sweep, or at which a base hook acts."""
        if source.positions is None:
            return 0
        ids, source_ids = self.inputs.rows[row], source.prompts[source.row(row)]
        key = id(source_ids), row
        if key not in self._common_prefixes:
            limits = [len(ids), len(source_ids)]
            limits += [self._first_position(bound, row) for bound in self.base]
            for position, pair in enumerate(zip(ids, source_ids, strict=False)):
                if pair[0] != pair[1]:
                    limits.append(position)
                    break
            self._common_prefixes[key] = source_ids, min(limits)
        return self._common_prefixes[key][1]

    @cached_property
    def _common_prefixes(self) -> dict[tuple[int, int], tuple[tuple[int, ...], int]]:
        """Cache of `common_prefix`, owned by this object. It keeps the source's tokens alive,
        because their id is part of the key."""
        return {}

    def _has_same_positions(self, where: Where, source: Captured, row: int) -> bool:
        """True if a hook's positions are the same in the source's prompt and in a row."""
        source_ids = source.prompts[source.row(row)]
        if len(source_ids) == len(self.inputs.rows[row]) and not isinstance(where.pos, At):
            return True
        positions = resolve_positions(
            where, len(source_ids), lambda at: positions_of_text(self.inputs.lm, source_ids, at)
        )
        return positions == self.inputs.full.selected_positions(where)[row]

    def _first_position(self, bound: BoundHook, row: int) -> int:
        positions = self.inputs.full.selected_positions(bound.where)[row]
        return positions[0] if positions else len(self.inputs.rows[row])


def bound_hooks_of(hook_points: Iterable[HookPoint]) -> list[BoundHook]:
    """Returns the hooks at all hook points."""
    return list(chain.from_iterable(hook_point.actions for hook_point in hook_points))


def block_of_module(lm: LM, path: str) -> int:
    """Returns the block that a module is or is in; `INPUT` for a module outside the blocks."""
    for layer in range(lm.n_layers):
        if f"{path}.".startswith(f"{lm.family.block.format(layer=layer)}."):
            return layer
    return INPUT


def needs_all_positions(bound: BoundHook) -> bool:
    """True if what a hook does at a position may depend on other positions."""
    if weights_later_keys(bound):
        return True
    return isinstance(bound.hook, EditHook) and bound.hook.mixes_positions


def weights_later_keys(bound: BoundHook) -> bool:
    """True if a query may attend to later positions after an edit of its scores or pattern.

    A user's function may change the values of keys that the query does not see, and so does a
    score of zero, since an unseen key's score is -inf. Other edits leave unseen keys unseen.
    """
    if not isinstance(bound.site, Site) or bound.site.name not in QUERY_KEY_SITES:
        return False
    if isinstance(bound.hook, Edit):
        return True
    zeroed = isinstance(bound.hook, Ablate) and bound.hook.to == "zero"
    return zeroed and bound.site.name == "scores"


def patch_source(bound: BoundHook) -> Captured | None:
    """Returns the values that a patch inserts at its site; None for any other hook."""
    hook = bound.hook
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        return None
    return next(source for source in hook.to.sources if source.site == bound.site)
