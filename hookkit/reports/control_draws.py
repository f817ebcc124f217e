"""Controls of edits, drawn at random: edits that are alike and say nothing about the hypothesis.

    tokens   of an edit of logits: the same edit of other tokens that are as likely before it
    parts    of an ablation, a patch or a scaling of components, of skipped blocks and of knockouts:
             the same at other components of the same kind (heads, MLP outputs, blocks)
    units    of an ablation of units: the same at other units of the same site
    turned   of every other edit: its own changes, turned by one random rotation for all positions
             and prompts, so that a steering vector becomes a random vector of the same length

`compare` sets the effect of an edit beside the effects of the draws of its control.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, MissingSite, Unsupported
from ..hooks.ablation import Ablate
from ..hooks.base import Constant, EditHook, Hook, as_tuple
from ..hooks.edits import Knockout, Scale, SkipBlock
from ..hooks.logit_shifts import Boost
from ..hooks.logits import LogitEdit
from ..hooks.values import FromPrompt, Reference
from ..models.lm import LM
from ..models.next_token import token_logits
from ..models.sites import QUERY_KEY_SITES, AnySite, Site, Sites, has_name
from ..models.words import Word, WordLike
from ..sweeps.cells import Randomised
from ..tables import intervals

DRAWS = 20  # of a control, by default
NO_CONTROL = (BadEdit, MissingSite, Unsupported)  # the errors of a control that cannot be made
NEIGHBOURS = 50  # tokens of similar rank, among which a token's replacement is drawn
TRIES = 20  # for each draw, to find one that differs from the others
CONFIDENCE = 0.95
# Sites that hold the residual stream as a whole, which is no component.
STREAM = {"embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "final_norm"}
DESCRIPTIONS = {
    "tokens": "the same edit of other tokens, which have similar ranks after these prompts",
    "parts": "the same edit at other parts of the same kind",
    "units": "the same edit of other units of the same site",
    "turned": "changes of the same length in random directions",
}

Hooks: TypeAlias = tuple[Hook, ...]


@dataclass(frozen=True, eq=False)
class ControlDraws:
    """The draws of the control of one edit, and what they are in words."""

    draws: tuple[Hooks, ...]
    description: str


@dataclass(frozen=True, eq=False)
class ControlMaker:
    """Draws the controls of edits of one model.

    logits   [row, vocab]  the next-token logits after each prompt, before the edits
    avoided  tokens that a control of logits never edits, since they are watched
    """

    lm: LM
    logits: Float[Tensor, "row vocab"]
    avoided: Sequence[int] = ()

    def draw(self, hooks: Hooks, count: int, seed: int) -> ControlDraws:
        """Returns at most `count` different draws of the control of hooks that act together.

        Raises `Unsupported` if there are not two: an edit of attention's pattern in all blocks, for
        example, has no other block.
        """
        makers = list(map(self._choose_kind, hooks))
        draws: dict[Hooks, None] = {}
        for attempt in range(count * TRIES):
            generator = Random(f"{seed} {attempt}")
            draws[tuple([make(generator) for _, make in makers])] = None
            if len(draws) == count:
                break
        if len(draws) < min(count, 2):
            raise Unsupported(
                f"{' + '.join(map(str, hooks))} has no random control, since there is nothing else "
                "of its kind: name one, controls={'name': hook}"
            )
        kinds = dict.fromkeys(kind for kind, _ in makers)
        return ControlDraws(tuple(draws), "; ".join(map(DESCRIPTIONS.__getitem__, kinds)))

    def _choose_kind(self, hook: Hook) -> tuple[str, Callable[[Random], Hook]]:
        """Returns the kind of control of a hook, and the function that draws one."""
        assert isinstance(hook, EditHook)
        if isinstance(hook, LogitEdit):
            return "tokens", lambda generator: self._with_other_tokens(hook, generator)
        if isinstance(hook, Ablate) and hook.units is not None:
            units = self._other_units(hook)
            if len(units) > len(hook.units):
                return "units", lambda generator: _with_other_units(hook, units, generator)
        elif _is_of_parts(hook):
            parts = self._other_parts(hook.sites)
            if _has_alternatives(parts):
                return "parts", lambda generator: _at_other_parts(hook, parts, generator)
        _refuse_query_keys(hook)
        return "turned", lambda generator: _turned(hook, generator)

    # ---- other tokens

    @cached_property
    def _log_ranks(self) -> Float[Tensor, " token"]:
        """The mean over the prompts of the logarithm of each token's rank."""
        logits = token_logits(self.logits, self.lm.n_tokens).nan_to_num()
        order = torch.argsort(logits, dim=-1, descending=True, stable=True)
        ranks = order.argsort(dim=-1) + 1
        return ranks.double().log().mean(0)

    def _neighbours(self, token: int) -> list[int]:
        """The tokens with the most similar ranks, the closest first."""
        distances = (self._log_ranks - self._log_ranks[token]).abs()
        count = min(len(distances), NEIGHBOURS + len(self.avoided) + 1)
        return distances.topk(count, largest=False).indices.tolist()

    def _with_other_tokens(self, hook: LogitEdit, generator: Random) -> Hook:
        used = {*hook.named(self.lm), *self.avoided}
        changes: dict[str, Any] = {}
        for name in hook.names:
            value = getattr(hook, name)
            entries: list[WordLike] = []
            counts = []
            for entry in as_tuple(value):
                new = self._other_entries(hook, entry, used, generator)
                entries += new
                counts.append(len(new))
            changes[name] = tuple(entries) if isinstance(value, tuple) else entries[0]
            if isinstance(hook, Boost) and isinstance(hook.by, tuple):
                changes["by"] = tuple(np.repeat(hook.by, counts).tolist())
        return replace(hook, **changes)

    def _other_entries(
        self, hook: LogitEdit, entry: WordLike, used: set[int], generator: Random
    ) -> list[WordLike]:
        """Returns what stands in the control for one token or word of a hook.

        That is a token for each spelling of one token, or as many tokens in a row.
        """
        ids = hook.ids(entry, self.lm)
        tokens = self._other_ids(ids, used, generator)
        if len(ids) > 1 and isinstance(entry, Word) and ids == entry.ids(self.lm):
            return [Word(tokens)]
        return list(tokens)

    def _other_ids(self, ids: Iterable[int], used: set[int], generator: Random) -> tuple[int, ...]:
        """Returns a token of similar rank for each of these; `used` grows by them."""
        alternatives = []
        for token in ids:
            free = [other for other in self._neighbours(token) if other not in used]
            if not free:
                raise Unsupported(
                    "the vocabulary has too few tokens of similar rank for a random control"
                )
            alternatives.append(generator.choice(free[:NEIGHBOURS]))
            used.add(alternatives[-1])
        return tuple(alternatives)

    # ---- other parts

    def _other_parts(self, sites: Sites) -> list[tuple[list[Site], list[Site]]]:
        """Returns for each kind of part among the sites those sites, and the alternatives."""
        by_kind: dict[tuple[str, bool], list[Site]] = {}
        for site in self.lm.expand(sites):
            if not isinstance(site, Site) or site.layer is None:
                return []
            by_kind.setdefault((site.name, site.head is None), []).append(site)
        parts = []
        for (name, is_whole), selected in by_kind.items():
            all_parts = self._parts_of_kind(name, is_whole=is_whole)
            parts.append((selected, [site for site in all_parts if site not in selected]))
        return parts

    def _parts_of_kind(self, name: str, *, is_whole: bool) -> list[Site]:
        layers = [Site(name, layer) for layer in self.lm.layout.layers(name) or ()]
        if is_whole:
            return layers
        heads = []
        for site in layers:
            sizes_at = site
            if name in QUERY_KEY_SITES:
                sizes_at = Site("z", site.layer)
            n_heads = self.lm.shape(sizes_at)[0]
            heads += [Site(name, site.layer, head) for head in range(n_heads)]
        return heads

    def _other_units(self, hook: Ablate) -> list[int]:
        assert hook.units is not None
        widths = []
        for site in self.lm.expand(hook.sites):
            widths.append(self.lm.shape(site)[-1] if isinstance(site, Site) else 0)
        return [unit for unit in range(min(widths)) if unit not in hook.units]


def _refuse_query_keys(hook: EditHook) -> None:
    """Raises `Unsupported` for an edit of values of attention that have no direction."""
    for site in hook.sites:
        if has_name(site, *QUERY_KEY_SITES):
            raise Unsupported(
                f"{hook} changes {site.name}, where there is no direction, and not enough other "
                "heads or blocks are left for a random control: name one, "
                "controls={'name': hook}"
            )


def _has_alternatives(parts: Sequence[tuple[list[Site], list[Site]]]) -> bool:
    """True if each kind of part has more alternatives than selected sites."""
    return bool(parts) and all(len(free) > len(selected) for selected, free in parts)


def _is_of_parts(hook: EditHook) -> bool:
    """True for an edit of components whose meaning is the same at other ones."""
    if isinstance(hook, SkipBlock | Knockout):
        return True
    is_known = isinstance(hook, Scale) or (isinstance(hook, Ablate) and _is_portable(hook.to))
    return is_known and not any(map(_is_stream, hook.sites))


def _is_portable(to: object) -> bool:
    """True if what an ablation puts at a component has the same meaning at another one."""
    if isinstance(to, Reference):
        return bool(to.prompts)
    return to == "zero" or isinstance(to, Constant | FromPrompt)


def _is_stream(site: AnySite) -> bool:
    return not isinstance(site, Site) or site.name.rpartition(".")[2] in STREAM


def _with_other_units(hook: Ablate, units: Sequence[int], generator: Random) -> Hook:
    assert hook.units is not None
    return replace(hook, units=tuple(sorted(generator.sample(units, len(hook.units)))))


def _at_other_parts(
    hook: EditHook, parts: Sequence[tuple[list[Site], list[Site]]], generator: Random
) -> Hook:
    sites: list[Site] = []
    for selected, alternatives in parts:
        sites += sorted(generator.sample(alternatives, len(selected)), key=alternatives.index)
    return replace(hook, sites=Sites(tuple(sites)))


def _turned(hook: EditHook, generator: Random) -> Hook:
    return Randomised(hook.sites, hook.where, hook, generator.randrange(2**31), "all")


# ---- an edit beside its control


def compare(
    effects: Float[np.ndarray, " prompt"],
    draws: Float[np.ndarray, "prompt draw"],
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, float]:
    """Returns the effect of an edit beside those of the draws of its control.

    effect                  the mean over the prompts
    control                 the mean over the prompts and draws
    control_low, _high      between them lies the mean of 95 % of further draws
    control_min, _max       the smallest and the largest mean of a draw
    gain                    effect minus control
    gain_low, gain_high     the 95 % interval of the gain, over prompts and draws: it excludes 0
                            in 5 of 100 experiments if the edit is one more draw
    as_large                how many draws have a mean as far from 0 as the effect, or farther, on
                            the same side

    The intervals of a divergence are over the draws, on these prompts: its variance between prompts
    grows with its size, which would widen the interval exactly where the gain is large.

    `bounds` are the smallest and the largest possible value: 0 and infinity for a divergence. The
    intervals are those of `intervals.beyond_random`, and NaN where a number is not finite.
    """
    effect, means = float(effects.mean()), draws.mean(axis=0)
    control, count = float(means.mean()), len(means)
    with np.errstate(invalid="ignore"):
        gain = effect - control
    result = {
        "effect": effect, "control": control,
        "control_low": np.nan, "control_high": np.nan,
        "control_min": float(means.min()), "control_max": float(means.max()),
        "gain": gain, "gain_low": np.nan, "gain_high": np.nan,
        "as_large": int((np.sign(effect) * means >= abs(effect)).sum()),
    }  # fmt: skip
    if count < 2 or not np.isfinite(draws).all():
        return result
    between = float(means.std(ddof=1))
    residual = float(np.sqrt(intervals.variation(draws).residual))
    _, half = intervals.beyond_random(effects[:0], between, residual, count, CONFIDENCE)
    result["control_low"] = max(control - half, bounds[0])
    result["control_high"] = min(control + half, bounds[1])
    if np.isfinite(effects).all():
        gains = effects - draws.mean(axis=1)
        if np.isfinite(bounds[0]):
            gains = gains.mean(keepdims=True)
        _, half = intervals.beyond_random(gains, between, residual, count, CONFIDENCE)
        result |= {"gain_low": gain - half, "gain_high": gain + half}
    return result
