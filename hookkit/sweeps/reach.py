"""What a cell can change: the first block and the first position at which its rows differ from the unedited ones.

Everything here is an argument, and no measurement:

causal      what is at a position depends on nothing behind it, so an edit changes nothing before its own position
last block  behind the attention of the last block no position reads another, so an edit there that is not where the
            metric looks changes nothing that it sees
together    a user's function is given all the positions that it wants, so that it may look from one at another
same text   a patch puts in what is there already, up to the first token in which the source's prompt differs (the
            sweep holds the source's values against the model's own before it believes this)
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ..hooks.ablation import Ablate, FromRun
from ..hooks.base import EditHook
from ..hooks.captured_values import Captured
from ..models.lm import LM
from ..models.positions import At, PositionRange, Where, wish
from ..models.prompts import cover
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.taps import BoundHook
from .inputs import SweepInputs

INPUT = -1  # before the first block

# What stands behind the attention of its block: it reaches other positions through later blocks only.
BEHIND_ATTENTION = frozenset(
    {
        "scores",
        "pattern",
        "z",
        "attn_out",
        "resid_mid",
        "mlp_in",
        "router_logits",
        "experts",
        "expert_weights",
    }
    | {"mlp_pre", "mlp_post", "mlp_out", "resid_post", "final_norm", "lm_head", "logits"}
)


@dataclass(frozen=True, order=True)
class Start:
    """Where a row of a cell begins to differ from the unedited row."""

    block: int
    pos: int


@dataclass(frozen=True)
class FirstEffect:
    """The argument for one model and one reading. `trusted`: patches of the same text put in what is there already."""

    lm: LM
    reading: SweepInputs
    trusted: bool = True
    under: tuple[BoundHook, ...] = ()  # acts in every row, edited or not

    @cached_property
    def _mixing(self) -> list[BoundHook]:
        """What may carry something from a position to one before it, in every row."""
        return [action for action in self.under if together(action)]

    def start(self, actions: Iterable[BoundHook], row: int) -> Start | None:
        """Where a row begins to differ under these actions; None where it cannot matter."""
        edits = (action for action in actions if action.change is not None)
        found = [start for action in edits if (start := self.of(action, row)) is not None]
        if not found:
            return None
        also = [self._first_of(action, row) for action in self._mixing]
        return Start(min(each.block for each in found), min([*(each.pos for each in found), *also]))

    def of(self, action: BoundHook, row: int) -> Start | None:
        """Where one action begins to change a row, as far as the metric can see."""
        wanted = self.reading.full.wishes(action.where)[row]
        if wanted is None:
            return None
        first = 0
        if self.last_block(action.site) and not together(action) and not self._mixed_behind(action):
            first = self.reading.lengths[row] - self.reading.looks[row]
        if self.trusted:
            first = max(first, self.same_until(action, row))
        place = _first(wanted, first)
        if place is None or place >= self.reading.lengths[row]:
            return None
        return Start(self.block(action.site), place)

    def _mixed_behind(self, action: BoundHook) -> bool:
        """True where something behind an action of the last block may carry it to other positions."""
        if not action.head:
            return bool(self._mixing)
        return any(each.head or isinstance(each.site, ModuleSite) for each in self._mixing)

    def block(self, site: AnySite) -> int:
        """The block in which a site is; the last one for what comes behind all blocks, `INPUT` for the rest."""
        last = self.lm.n_layers - 1
        if isinstance(site, Site):
            return (
                INPUT
                if site.name in ("embed", "pos_embed")
                else last
                if site.layer is None
                else site.layer
            )
        path = self.lm.family.block
        inside = (
            n for n in range(last + 1) if f"{site.path}.".startswith(path.format(layer=n) + ".")
        )
        return next(inside, INPUT)

    def last_block(self, site: AnySite) -> bool:
        """True where a site is behind the last attention."""
        if not isinstance(site, Site) or site.name not in BEHIND_ATTENTION:
            return False
        return site.layer is None or site.layer == self.lm.n_layers - 1

    def same_until(self, action: BoundHook, row: int) -> int:
        """The first position at which a patch may put in something else than is there; 0 for what is no patch."""
        source = source_of(action)
        if source is None or not self._same_places(
            action.where, row, source.prompts[source.row(row)]
        ):
            return 0
        return self.common(source, row)

    def common(self, source: Captured, row: int) -> int:
        """The first position at which a source's prompt differs from one of these, or at which something acts on it."""
        if source.positions is None:
            return 0
        key = id(source.prompts), source.row(row), row
        if key not in self._known:
            self._known[key] = source, self._common(source.prompts[source.row(row)], row)
        return self._known[key][1]

    @cached_property
    def _known(self) -> dict[tuple[int, int, int], tuple[Captured, int]]:
        return {}  # the source is kept alive, and its number with it

    def _common(self, ids: tuple[int, ...], row: int) -> int:
        mine = self.reading.rows[row]
        pairs = enumerate(zip(ids, mine, strict=False))
        differ = next(
            (place for place, (theirs, ours) in pairs if theirs != ours), min(len(ids), len(mine))
        )
        return min([differ, *(self._first_of(each, row) for each in self.under)])

    def _same_places(self, where: Where, row: int, ids: tuple[int, ...]) -> bool:
        if len(ids) == len(self.reading.rows[row]) and not isinstance(where.pos, At):
            return True
        theirs = wish(where, len(ids), lambda at: cover(self.lm, ids, at))
        return theirs == self.reading.full.wishes(where)[row]

    def _first_of(self, action: BoundHook, row: int) -> int:
        wanted = self.reading.full.wishes(action.where)[row]
        return len(self.reading.rows[row]) if not wanted else wanted[0]


def inside_a_block(lm: LM, path: str) -> bool:
    """True for a block of a model, and for a module in one."""
    blocks = (lm.family.block.format(layer=number) for number in range(lm.n_layers))
    return any(f"{path}.".startswith(f"{block}.") for block in blocks)


def together(action: BoundHook) -> bool:
    """True where what is done at a position may depend on the others that are wanted: they have to be there."""
    return isinstance(action.hook, EditHook) and action.hook.together


def source_of(action: BoundHook) -> Captured | None:
    """What a patch puts in at its site; None for any other hook."""
    hook = action.hook
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        return None
    return next(source for source in hook.to.sources if source.site == action.site)


def _first(wanted: PositionRange, least: int) -> int | None:
    """The first wanted position that is at least so much."""
    place = bisect_left(wanted, least)
    return wanted[place] if place < len(wanted) else None
