"""The forwards of `hk.token_shifts` over a batch of texts, and what they change in the logits.

A change is after minus before. Whatever is added to all logits of a position changes nothing, so
the order of the tokens by the change of the logit is their order by the change of the
log-probability.

Beside the forwards there is time for a few passes over the vocabulary only. So positions are
compared in chunks that fit into the processor's cache (`chunk_size`), the largest changes are found
by stripes, and the ranks of all tokens, which need a sort, are computed at few positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...data.harvest.texts import Batch, TokenSequence
from ...errors import BadEdit
from ...hooks.base import EditContext, Hook
from ...hooks.edits import edit
from ...models import next_token
from ...models.lm import LM
from ...models.prompts import Row
from ...models.sites import Site, Sites
from ...sweeps.cells import Randomised, turn
from ..diff.paired_models import Side
from .corpus_sums import (
    CONTEXT,
    LOCATION,
    PADDING,
    BatchShifts,
    Examples,
    Sums,
    TextMoments,
    strongest_examples,
)

Logits = Float[Tensor, "position vocab"]
Numbers = Float[Tensor, " position"]

CHUNK_BYTES = 2**20  # of the float32 logits of a chunk on the CPU; as large as a processor's cache
DEVICE_CHUNK_BYTES = 2**26  # on another device
STRIPES = 64  # the parts of the vocabulary among which the largest changes are found
KL_STEPS = 3  # how often the size of a control is corrected
MAX_SCALE = 100.0  # of a control's change of the logits
SIGN_BIT = 2**31  # of a float32


def chunk_size(logits: Float[Tensor, "... vocab"]) -> int:
    """Returns how many positions are compared at once."""
    most = CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, most // (4 * logits.shape[-1]))


def subtract(arms: Sequence[Logits], before: Logits) -> Float[Tensor, "arm position vocab"]:
    """Returns the changes of the logits in each arm: 0 where both are the same infinity."""
    changes = before.new_empty(len(arms), *before.shape)
    for arm, change in zip(arms, changes, strict=True):
        torch.sub(arm, before, out=change)
    if bool(changes.sum().isnan()):
        for arm, change in zip(arms, changes, strict=True):
            change[arm == before] = 0.0
    return changes


@dataclass(frozen=True, eq=False)
class Norms:
    """What the changes of the logits at some positions add up to.

    scale     the multiple of the changes that is meant, for each position
    log_norm  how much the logarithm of the sum of exp(logits) grows
    kl        KL(before‖after), in nats
    """

    scale: Numbers
    log_norm: Numbers
    kl: Numbers


def measure_changes(
    before: Logits, after: Logits, changes: Logits, target: Numbers | None = None
) -> Norms:
    """Returns what the changes add up to.

    With `target`, the changes are scaled at each position so that the KL is the target, as far as
    that is possible: up to `MAX_SCALE`, and not where a change is infinite.
    """
    largest, scale = before.amax(-1, keepdim=True), torch.ones_like(changes[:, 0])
    weights = (before - largest).exp_()
    log_total = weights.sum(-1).log()
    mean = weights.mul_(changes).sum(-1) / log_total.exp()
    log_norm = (after - largest).exp_().sum(-1).log() - log_total
    if not bool(log_norm.isfinite().all()):  # exp is beyond float32
        log_norm = after.logsumexp(-1) - before.logsumexp(-1)
    if not bool(mean.isfinite().all()):  # a banned token, or NaN
        logprobs = before.log_softmax(-1), after.log_softmax(-1)
        kl = next_token.kl_divergence(*logprobs).clamp(min=0.0)
        return Norms(scale, log_norm, kl)
    kl = (log_norm - mean).clamp(min=0.0)
    if target is not None:
        logprobs = before - largest - log_total[:, None]
        return _scale_to_kl(logprobs, changes, mean, kl, target)
    return Norms(scale, log_norm, kl)


def _scale_to_kl(
    logprobs: Logits, changes: Logits, mean: Numbers, kl: Numbers, target: Numbers
) -> Norms:
    """Returns the scales at which the KL is the target, and the log norms and KLs there.

    The square root of the KL is almost linear in the scale, and is followed by secants.
    """
    last_scale, last_root = torch.zeros_like(kl), torch.zeros_like(kl)
    scale, root = torch.ones_like(kl), kl.sqrt()
    target_root = target.sqrt()
    log_norm = mean + kl
    for _ in range(KL_STEPS):
        slope = (root - last_root) / (scale - last_scale)
        step = (target_root - root) / slope
        nearest = torch.minimum(scale / 10, last_scale.clamp(min=1 / MAX_SCALE))
        guess = torch.where(step.isfinite(), scale + step, scale)
        last_scale, last_root = scale, root
        scale = torch.maximum(guess, nearest).clamp(max=MAX_SCALE)
        log_norm = torch.addcmul(logprobs, changes, scale[:, None]).logsumexp(-1)
        kl = (log_norm - scale * mean).clamp(min=0.0)
        root = kl.sqrt()
    return Norms(scale, log_norm, kl)


MOVED = {"promoted": True, "demoted": False}  # and whether the logits rose


@dataclass(frozen=True, eq=False)
class Movers:
    """The tokens whose logits changed most at each position, in one direction.

    A token counts (`is_counted`) if at most as many tokens as asked for, itself included, changed
    by as much. So where all other tokens change equally, as with a forced token, none of them
    counts.
    """

    ids: Int[Tensor, "... position n"]
    changes: Float[Tensor, "... position n"]
    is_counted: Bool[Tensor, "... position n"]


def join_movers(parts: Sequence[Movers]) -> Movers:
    """Returns the movers of successive positions, on the CPU."""
    ids = torch.cat([part.ids for part in parts], dim=-2).cpu()
    changes = torch.cat([part.changes for part in parts], dim=-2).cpu()
    return Movers(ids, changes, torch.cat([part.is_counted for part in parts], dim=-2).cpu())


def most_changed(changes: Float[Tensor, "... token"], count: int, *, rise: bool) -> Movers:
    """Returns the `count` tokens whose logits rose most at each position, or fell most."""
    width = changes.shape[-1] // STRIPES
    if width <= count + 1:
        values, ids = changes.topk(count + 1, largest=rise)
    else:
        values, ids = _extremes(changes, width, count + 1, rise=rise)
    limit = values[..., count:]
    is_counted = values[..., :count] > limit if rise else values[..., :count] < limit
    return Movers(ids[..., :count], values[..., :count], is_counted)


def _extremes(
    changes: Float[Tensor, "... token"], width: int, count: int, *, rise: bool
) -> tuple[Float[Tensor, "... n"], Int[Tensor, "... n"]]:
    """Returns the largest or the smallest changes, and their tokens.

    The vocabulary is a table of stripes, each of `width` tokens. The `count` largest changes are in
    the `count` columns with the largest maxima, and finding those is one pass over the vocabulary.
    """
    table = changes[..., : STRIPES * width].view(*changes.shape[:-1], STRIPES, width)
    best = table.amax(-2) if rise else table.amin(-2)
    columns = best.topk(count, largest=rise).indices[..., None, :]
    columns = columns.expand(*columns.shape[:-2], STRIPES, count)
    starts = torch.arange(0, STRIPES * width, width, device=changes.device)[:, None]
    ids, values = (columns + starts).flatten(-2), table.gather(-1, columns).flatten(-2)
    remaining = torch.arange(STRIPES * width, changes.shape[-1], device=changes.device)
    if len(remaining):
        ids = torch.cat([ids, remaining.expand(*ids.shape[:-1], -1)], dim=-1)
        values = torch.cat([values, changes[..., STRIPES * width :]], dim=-1)
    values, locations = values.topk(count, largest=rise)
    return values, ids.gather(-1, locations)


def ranks_of_all(logits: Float[Tensor, "position token"]) -> Int[Tensor, "position token"]:
    """Returns the rank of every token: 1 + the number of tokens with a strictly larger logit.

    The logits are float32.
    """
    if logits.device.type != "cpu":
        ordered = logits.sort(dim=-1).values
        return 1 + logits.shape[-1] - torch.searchsorted(ordered, logits, right=True)
    ranks = np.empty(logits.shape, dtype=np.int64)
    for row, ranks_of_row in zip(logits.numpy(), ranks, strict=True):
        _rank(row, ranks_of_row)
    return torch.from_numpy(ranks)


def _rank(logits: np.ndarray, ranks: np.ndarray) -> None:
    """Writes the rank of every token to `ranks`.

    Numpy sorts integers of 16 bits by their digits, which takes a third of the time that comparing
    takes. So the tokens are sorted by the lower half of their keys, and then by the upper half.
    """
    keys = _descending_keys(logits)
    lower, upper = keys.astype(np.uint16), (keys >> 16).astype(np.uint16)
    order = np.argsort(lower, kind="stable")
    order = order.take(np.argsort(upper.take(order), kind="stable"))
    ranks[order] = np.arange(1, len(order) + 1)
    ordered = keys.take(order)
    tied = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1  # where a logit equals the one before
    is_first = np.diff(tied, prepend=-1) != 1
    ranks[order[tied]] = np.maximum.accumulate(np.where(is_first, tied, 0))


def _descending_keys(logits: np.ndarray) -> np.ndarray:
    """Returns integers of 32 bits in the opposite order of the logits; equal for equal logits."""
    bits = np.subtract(0.0, logits, dtype=np.float32).view(np.uint32)  # both zeros become one
    negative = (bits.view(np.int32) >> 31).view(np.uint32)  # all bits are 1 below zero
    return bits ^ (negative | np.uint32(SIGN_BIT))


# ---- the forwards of a batch


@dataclass(frozen=True, eq=False)
class Control:
    """The draws of the control: hooks for each draw, or for two models seeds of rotations.

    Text n has draw n modulo the number of draws. The control of another model turns its change of
    the residual stream after the last block, at `site`, by a random rotation.
    """

    draws: tuple[tuple[Hook, ...], ...] = ()
    seeds: tuple[int, ...] = ()
    site: Site | None = None

    def __len__(self) -> int:
        return len(self.draws) or len(self.seeds)

    def draw_of(self, text: int) -> int:
        return text % len(self)

    def hooks(self, texts: Sequence[int], streams: tuple[Tensor, Tensor] | None) -> list[Hook]:
        """Returns the hooks for a batch of texts. `streams` are the streams before and after."""
        if streams is not None:
            assert self.site is not None
            change = (streams[1].to(streams[0]) - streams[0]).float()
            for row, text in enumerate(texts):
                change[row] = turn(change[row], self.seeds[self.draw_of(text)])

            def turned(values: Tensor, here: EditContext) -> Tensor:
                return values + change.to(values)

            return [edit(self.site, turned)]
        rows_of_draws: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of_draws.setdefault(self.draw_of(text), []).append(row)
        hooks = []
        for draw, rows in rows_of_draws.items():
            hooks += [_in_rows(hook, tuple(rows)) for hook in self.draws[draw]]
        return hooks


def _in_rows(hook: Hook, rows: tuple[int, ...]) -> Hook:
    """Returns the hook, acting in these rows of the batch only."""
    where = replace(hook.where, rows=rows)
    if isinstance(hook, Randomised):
        return replace(hook, where=where, of=replace(hook.of, where=where))
    return replace(hook, where=where)


@dataclass(frozen=True, eq=False)
class ShiftComputation:
    """Computes the shifts of a batch of sequences: what the engines run.

    lm        the model whose tokens these are
    before    the model and the hooks before
    after     those after
    control   None for no control
    top       how many tokens count as promoted, and as demoted, at a position
    every     one position in so many has ranks, a different one in each text
    n_examples  examples of each token
    split_at  the number of tokens at which a text is split into pieces; 0 if it is not split
    """

    lm: LM
    before: Side
    after: Side
    control: Control | None
    top: int
    every: int
    n_examples: int
    split_at: int

    def compute(self, batch: Batch) -> BatchShifts:
        """Returns what the batch shows."""
        rows = [sequence.ids for sequence in batch.sequences]
        arms = self._run(rows, [sequence.text for sequence in batch.sequences])
        n_tokens = self.lm.n_tokens or arms[0].shape[-1]
        texts, pieces, draws = TextMoments(n_tokens), [], {}
        hits: dict[str, list[Examples]] = {"promoted": [], "demoted": []}
        with torch.no_grad():
            for row, sequence in enumerate(batch.sequences):
                change = Sums.empty(n_tokens)
                sums = [change]
                if self.control is not None:
                    draw = self.control.draw_of(sequence.text)
                    sums.append(draws.setdefault(draw, Sums.empty(n_tokens)))
                logits = [arm[row].to(arms[0].device) for arm in arms]
                kl = self._compare(sequence, logits, sums, hits)
                self._compare_ranks(sequence, logits, sums, kl)
                if self.is_piece(sequence):
                    pieces.append((sequence.text, change))
                else:
                    texts.add(change)
        examples = {
            name: strongest_examples(parts, self.n_examples) for name, parts in hits.items()
        }
        return BatchShifts(texts, pieces, draws, examples)

    def is_piece(self, sequence: TokenSequence) -> bool:
        """True for a piece of a text, and for a text that other pieces may follow."""
        return sequence.piece > 0 or len(sequence) == self.split_at

    def _run(self, rows: Sequence[Row], texts: Sequence[int]) -> list[Tensor]:
        """Returns the logits before, after, and under the control if there is one."""
        sites, streams = Sites(()), None
        if self.control is not None and self.control.site is not None:
            sites = Sites((self.control.site,))
        before = self.before.run(rows, sites, logits=True)
        after = self.after.run(rows, sites, logits=True)
        arms = [before.logits, after.logits]
        if self.control is not None:
            if len(sites):
                streams = before[sites[0]], after[sites[0]]
            hooks = (*self.before.hooks, *self.control.hooks(texts, streams))
            arms.append(replace(self.before, hooks=hooks).run(rows, Sites(()), logits=True).logits)
        return arms

    def _compare(
        self,
        sequence: TokenSequence,
        arms: Sequence[Logits],
        sums: Sequence[Sums],
        examples: dict[str, list[Examples]],
    ) -> Numbers:
        """Adds what the positions of one sequence show, but for the ranks. Returns the KLs.

        The first arm is before; `sums` are those of the others.
        """
        n_tokens, size, change = sums[0].n_tokens, chunk_size(arms[0]), sums[0]
        total = torch.zeros(n_tokens, device=arms[0].device)
        norms: list[Norms] = []
        movers: dict[str, list[Movers]] = {name: [] for name in MOVED}
        for start in range(0, len(sequence.positions), size):
            positions = sequence.positions[start : start + size]
            before, *others = [_logits_at(arm, positions) for arm in arms]
            changes = subtract(others, before)
            norms.append(measure_changes(before, others[0], changes[0]))
            changes_of_tokens = changes[0, :, :n_tokens].T
            total.addmv_(changes_of_tokens, torch.ones_like(norms[-1].kl))
            for name, rise in MOVED.items():
                movers[name].append(most_changed(changes[..., :n_tokens], self.top, rise=rise))
        log_norm = torch.cat([part.log_norm for part in norms]).cpu()
        kl = torch.cat([part.kl for part in norms]).cpu()
        _refuse_nan(log_norm, sequence)
        change.kl += kl.sum(dtype=torch.float64)
        change.of_token["logprob"] += total.cpu() - log_norm.sum(dtype=torch.float64)
        for name, parts in movers.items():
            joined = join_movers(parts)
            _count_movers(name, joined, sums)
            examples[name].append(_examples(joined, log_norm, sequence))
        for arm in sums:
            arm.counts[0] += len(sequence.positions)
        return kl

    def _compare_ranks(
        self,
        sequence: TokenSequence,
        arms: Sequence[Logits],
        sums: Sequence[Sums],
        kl: Numbers,
    ) -> None:
        """Adds the changes of the ranks at one position in `every`, of the control at equal KL."""
        change, n_tokens = sums[0], sums[0].n_tokens
        positions = torch.tensor(sequence.positions)
        ranked = ((positions + sequence.text) % self.every == 0).nonzero().flatten()
        size = chunk_size(arms[0])
        for start in range(0, len(ranked), size):
            rows = ranked[start : start + size]
            before, after, *others = [_logits_at(arm, positions[rows].tolist()) for arm in arms]
            ranks = ranks_of_all(before[:, :n_tokens])
            change.of_token["rank"] += _rank_deltas(ranks, after[:, :n_tokens])
            change.counts[1] += len(rows)
            for other in others:  # the control
                control, target = sums[1], kl[rows].to(before.device)
                changes = subtract([other], before)[0]
                norms = measure_changes(before, other, changes, target)
                changes *= norms.scale[:, None]
                logprobs = changes[:, :n_tokens].sum(0).cpu()
                control.of_token["logprob"] += logprobs - norms.log_norm.cpu().sum()
                control.of_token["rank"] += _rank_deltas(ranks, (before + changes)[:, :n_tokens])
                control.kl += norms.kl.cpu().sum(dtype=torch.float64)
                control.counts[1] += len(rows)


def _logits_at(logits: Logits, positions: Sequence[int]) -> Logits:
    """Returns the logits at some positions in float32; successive positions are not copied."""
    start, stop = positions[0], positions[-1] + 1
    if stop - start == len(positions):
        return logits[start:stop].float()
    return logits[torch.tensor(positions, device=logits.device)].float()


def _rank_deltas(ranks: Tensor, after: Float[Tensor, "position token"]) -> Tensor:
    """Returns the sum of rank after minus rank before over the positions."""
    return (ranks_of_all(after) - ranks).sum(0).cpu()


def _refuse_nan(log_norm: Numbers, sequence: TokenSequence) -> None:
    is_nan = log_norm.isnan()
    if bool(is_nan.any()):
        position = sequence.positions[int(is_nan.nonzero()[0])]
        raise BadEdit(
            f"the logits after position {position} of text {sequence.text} are NaN, before or "
            "after the change: no token has a rank there. Leave this text out, or use float32"
        )


def _count_movers(name: str, movers: Movers, sums: Sequence[Sums]) -> None:
    """Adds to the sums of each arm how often each token was among those that moved most."""
    for number, arm in enumerate(sums):
        ids = movers.ids[number][movers.is_counted[number]]
        arm.of_token[name].index_add_(0, ids, torch.ones(len(ids), dtype=torch.float64))


def _examples(movers: Movers, log_norm: Numbers, sequence: TokenSequence) -> Examples:
    """Returns the tokens that the change moved most, and how much their log-probabilities did."""
    is_counted = movers.is_counted[0]
    deltas = (movers.changes[0] - log_norm[:, None])[is_counted]
    locations = np.full((len(log_norm), LOCATION), PADDING, dtype=np.int32)
    locations[:, :2] = sequence.text, sequence.piece
    locations[:, 2] = sequence.positions
    for row, position in enumerate(sequence.positions):
        context = sequence.ids[max(0, position + 1 - CONTEXT) : position + 1]
        locations[row, LOCATION - len(context) :] = context
    numbers = np.repeat(np.arange(len(log_norm)), is_counted.sum(1).numpy())
    tokens = movers.ids[0][is_counted].numpy()
    return Examples(tokens, deltas.abs().numpy(), locations[numbers])
