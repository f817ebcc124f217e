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

from ..hooks.ablation import Ablate, FromRun
from ..hooks.base import EditHook
from ..hooks.captured_values import Captured
from ..hooks.edits import Edit
from ..models.lm import LM
from ..models.positions import At, PositionRange, Where, resolve_positions
from ..models.prompts import positions_of_text
from ..models.sites import QUERY_KEY_SITES, AnySite, ModuleSite, Site
from ..runs.taps import BoundHook, HookPoint
from .inputs import SweepInputs

INPUT = -1  # the block number of what is before the first block

# Sites after the attention of their block. They reach other positions through later blocks only.
AFTER_ATTENTION = {"scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in"}
AFTER_ATTENTION |= {"router_logits", "experts", "expert_weights", "mlp_pre", "mlp_post", "mlp_out"}
AFTER_ATTENTION |= {"resid_post", "final_norm", "lm_head", "logits"}


@dataclass(frozen=True, order=True)
class Start:
    """The block and the position at which a row of a cell begins to differ."""

    block: int
    pos: int


@dataclass(frozen=True)
class FirstEffect:
    """Finds where edits begin to change a row of the inputs.

    sources_match  True if the sources of patches were compared with the model's own values
    base           hooks that act in every row, edited or not
    """

    lm: LM
    inputs: SweepInputs
    sources_match: bool = True
    base: tuple[BoundHook, ...] = ()

    @cached_property
    def _mixing(self) -> list[BoundHook]:
        """Base hooks that may carry a change from a position to an earlier one."""
        return [bound for bound in self.base if needs_all_positions(bound)]

    def first_start(self, bound_hooks: Iterable[BoundHook], row: int) -> Start | None:
        """Returns where a row begins to differ under these hooks; None if it cannot matter."""
        starts = []
        for bound in bound_hooks:
            start = None
            if bound.change is not None:
                start = self.start_of(bound, row)
            if start is not None:
                starts.append(start)
        if not starts:
            return None
        positions = [start.pos for start in starts]
        positions += [self._first_position(bound, row) for bound in self._mixing]
        return Start(min(start.block for start in starts), min(positions))

    def start_of(self, bound: BoundHook, row: int) -> Start | None:
        """Returns where one hook begins to change a row, as far as the metric can see."""
        positions = self.inputs.full.selected_positions(bound.where)[row]
        if positions is None:
            return None
        length = self.inputs.lengths[row]
        first = 0
        stays_in_place = not needs_all_positions(bound) and not self._is_mixed_later(bound)
        if self.is_after_last_attention(bound.site) and stays_in_place:
            first = length - self.inputs.read_counts[row]
        if self.sources_match:
            first = max(first, self._shared_prefix(bound, row))
        position = _first_at_least(positions, first)
        if position is None or position >= length:
            return None
        return Start(self.block_of(bound.site), position)

    def _is_mixed_later(self, bound: BoundHook) -> bool:
        """True if a base hook after a hook of the last block may carry its change elsewhere."""
        if not bound.head:
            return bool(self._mixing)
        return any(mixing.head or isinstance(mixing.site, ModuleSite) for mixing in self._mixing)

    def block_of(self, site: AnySite) -> int:
        """Returns the block of a site: the last one for sites after all blocks, `INPUT` for the
        embedding and for modules outside the blocks."""
        last = self.lm.n_layers - 1
        if isinstance(site, Site):
            if site.name in ("embed", "pos_embed"):
                return INPUT
            return last if site.layer is None else site.layer
        for layer in range(last + 1):
            if _is_inside(site.path, self.lm.family.block.format(layer=layer)):
                return layer
        return INPUT

    def is_after_last_attention(self, site: AnySite) -> bool:
        """True if no later attention reads a site."""
        if not isinstance(site, Site) or site.name not in AFTER_ATTENTION:
            return False
        return site.layer is None or site.layer == self.lm.n_layers - 1

    def _shared_prefix(self, bound: BoundHook, row: int) -> int:
        """Returns the first position at which a patch may change a value; 0 for other hooks."""
        source = patch_source(bound)
        if source is None:
            return 0
        source_ids = source.prompts[source.row(row)]
        if not self._has_same_positions(bound.where, row, source_ids):
            return 0
        return self.common_prefix(source, row)

    def common_prefix(self, source: Captured, row: int) -> int:
        """Returns the first position at which a source's prompt differs from a prompt of the
        sweep, or at which a base hook acts."""
        if source.positions is None:
            return 0
        key = id(source.prompts), source.row(row), row
        if key not in self._common_prefixes:
            length = self._compare_with(source.prompts[source.row(row)], row)
            self._common_prefixes[key] = source, length
        return self._common_prefixes[key][1]

    @cached_property
    def _common_prefixes(self) -> dict[tuple[int, int, int], tuple[Captured, int]]:
        """Cache of `common_prefix`, owned by this object. It keeps the source alive, because its
        id is part of the key."""
        return {}

    def _compare_with(self, source_ids: tuple[int, ...], row: int) -> int:
        ids = self.inputs.rows[row]
        length = min(len(source_ids), len(ids))
        for position in range(length):
            if source_ids[position] != ids[position]:
                length = position
                break
        return min([length, *(self._first_position(bound, row) for bound in self.base)])

    def _has_same_positions(self, where: Where, row: int, source_ids: tuple[int, ...]) -> bool:
        """True if a hook's positions are the same in the source's prompt and in a row."""
        if len(source_ids) == len(self.inputs.rows[row]) and not isinstance(where.pos, At):
            return True
        positions = resolve_positions(
            where, len(source_ids), lambda at: positions_of_text(self.lm, source_ids, at)
        )
        return positions == self.inputs.full.selected_positions(where)[row]

    def _first_position(self, bound: BoundHook, row: int) -> int:
        positions = self.inputs.full.selected_positions(bound.where)[row]
        if not positions:
            return len(self.inputs.rows[row])
        return positions[0]


def bound_hooks_of(hook_points: Iterable[HookPoint]) -> list[BoundHook]:
    """Returns the hooks at all hook points."""
    return list(chain.from_iterable(hook_point.actions for hook_point in hook_points))


def is_inside_block(lm: LM, path: str) -> bool:
    """True for a block of the model and for a module in one."""
    blocks = (lm.family.block.format(layer=layer) for layer in range(lm.n_layers))
    return any(_is_inside(path, block) for block in blocks)


def _is_inside(path: str, block: str) -> bool:
    return f"{path}.".startswith(f"{block}.")


def needs_all_positions(bound: BoundHook) -> bool:
    """True if what a hook does at a position may depend on other positions."""
    if weights_later_keys(bound):
        return True
    return isinstance(bound.hook, EditHook) and bound.hook.together


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


def _first_at_least(positions: PositionRange, minimum: int) -> int | None:
    """Returns the first of the positions that is at least `minimum`."""
    index = bisect_left(positions, minimum)
    return positions[index] if index < len(positions) else None
