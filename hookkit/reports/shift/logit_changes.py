"""The forwards of `hk.token_shifts` over a batch of texts, and what they change in the logits.

A change is after minus before. Whatever is added to all logits of a position changes nothing, so
the order of the tokens by the change of the logit is their order by the change of the
log-probability.

Beside the forwards there is time for a few passes over the vocabulary only. So positions are
compared in chunks that fit into the processor's cache (`chunk_size`), the largest changes are found
by stripes, and the ranks of all tokens, which need a sort, are computed at few positions.
"""

from collections.abc import Iterator, Sequence
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
STRIPES = 32  # the parts of the vocabulary among which the largest changes are found
KL_STEPS = 3  # how often the size of a control is corrected
MOST_SCALE = 100.0  # of a control's change of the logits


def chunk_size(logits: Float[Tensor, "... vocab"]) -> int:
    """Returns how many positions are compared at once."""
    most = CHUNK_BYTES if logits.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(1, most // (4 * logits.shape[-1]))


@dataclass(frozen=True, eq=False)
class LogitChanges:
    """The changes of the logits at some positions, as multiples of `changes`.

    changes   after minus before; 0 where both are the same infinity
    scale     the multiple that is meant, for each position
    log_norm  how much the logarithm of the sum of exp(logits) grows
    kl        KL(before‖after), in nats
    """

    changes: Logits
    scale: Numbers
    log_norm: Numbers
    kl: Numbers

    def logprob_sum(self, n_tokens: int) -> Float[Tensor, " token"]:
        """Returns each token's change of the log-probability, summed over the positions."""
        if bool((self.scale == 1).all()):
            total = self.changes[:, :n_tokens].sum(0)
        else:
            total = (self.changes[:, :n_tokens] * self.scale[:, None]).sum(0)
        return total - self.log_norm.sum()

    def logprob_deltas(self, changes: Float[Tensor, "position n"]) -> Float[Tensor, "position n"]:
        """Returns the changes of the log-probability for some of the tokens' `changes`."""
        return changes * self.scale[:, None] - self.log_norm[:, None]


def compare_logits(
    before: Logits, probs: Logits, after: Logits, target: Numbers | None = None
) -> LogitChanges:
    """Returns the changes of the logits; `probs` are the probabilities before.

    With `target`, the changes are scaled at each position so that the KL is the target, as far as
    that is possible: up to `MOST_SCALE`, and not where a change is infinite.
    """
    changes = after - before
    scale = torch.ones_like(changes[:, 0])
    if not bool(changes.sum().isfinite()):  # a banned token, or NaN
        changes = torch.where(before == after, 0.0, changes)
        log_norm = after.logsumexp(-1) - before.logsumexp(-1)
        logprobs = before.log_softmax(-1), after.log_softmax(-1)
        kl = next_token.kl_divergence(*logprobs).clamp(min=0.0)
        return LogitChanges(changes, scale, log_norm, kl)
    largest = changes.amax(-1)
    mean = torch.linalg.vecdot(probs, changes)
    log_norm = _log_norm(probs, changes, largest, scale)
    kl = (log_norm - mean).clamp(min=0.0)
    if target is not None:
        scale, log_norm, kl = _scale_to_kl(probs, changes, largest, mean, kl, target)
    return LogitChanges(changes, scale, log_norm, kl)


def _log_norm(probs: Logits, changes: Logits, largest: Numbers, scale: Numbers) -> Numbers:
    """Returns log Σ p exp(scale · change)."""
    powers = ((changes - largest[:, None]) * scale[:, None]).exp_()
    return torch.linalg.vecdot(probs, powers).log_() + largest * scale


def _scale_to_kl(
    probs: Logits,
    changes: Logits,
    largest: Numbers,
    mean: Numbers,
    kl: Numbers,
    target: Numbers,
) -> tuple[Numbers, Numbers, Numbers]:
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
        nearest = torch.minimum(scale / 10, last_scale.clamp(min=1 / MOST_SCALE))
        guess = torch.where(step.isfinite(), scale + step, scale)
        last_scale, last_root = scale, root
        scale = torch.maximum(guess, nearest).clamp(max=MOST_SCALE)
        log_norm = _log_norm(probs, changes, largest, scale)
        kl = (log_norm - scale * mean).clamp(min=0.0)
        root = kl.sqrt()
    return scale, log_norm, kl


@dataclass(frozen=True, eq=False)
class Movers:
    """The tokens whose logits changed most at each position, in one direction.

    A token counts (`is_counted`) if at most as many tokens as asked for, itself included, changed
    by as much. So where all other tokens change equally, as with a forced token, none of them
    counts.
    """

    ids: Int[Tensor, "position n"]
    changes: Float[Tensor, "position n"]
    is_counted: Bool[Tensor, "position n"]


def most_changed(changes: Float[Tensor, "position token"], count: int, *, rise: bool) -> Movers:
    """Returns the `count` tokens whose logits rose most at each position, or fell most."""
    width = changes.shape[-1] // STRIPES
    if width <= count + 1:
        values, ids = changes.topk(count + 1, largest=rise)
    else:
        values, ids = _extremes(changes, width, count + 1, rise=rise)
    limit = values[:, count:]
    is_counted = values[:, :count] > limit if rise else values[:, :count] < limit
    return Movers(ids[:, :count], values[:, :count], is_counted)


def _extremes(
    changes: Float[Tensor, "position token"], width: int, count: int, *, rise: bool
) -> tuple[Float[Tensor, "position n"], Int[Tensor, "position n"]]:
    """Returns the largest or the smallest changes, and their tokens.

    The vocabulary is a table of stripes, each of `width` tokens. The `count` largest changes are in
    the `count` columns with the largest maxima, and finding those is one pass over the vocabulary.
    """
    table = changes[:, : STRIPES * width].unflatten(1, (STRIPES, width))
    best = table.amax(1) if rise else table.amin(1)
    columns = best.topk(count, largest=rise).indices[:, None, :].expand(-1, STRIPES, -1)
    starts = torch.arange(STRIPES, device=changes.device)[None, :, None] * width
    remaining_ids = torch.arange(STRIPES * width, changes.shape[1], device=changes.device)
    ids = torch.cat([(columns + starts).flatten(1), remaining_ids.expand(len(changes), -1)], dim=1)
    values = torch.cat([table.gather(2, columns).flatten(1), changes[:, STRIPES * width :]], dim=1)
    values, locations = values.topk(count, largest=rise)
    return values, ids.gather(1, locations)


def ranks_of_all(logits: Float[Tensor, "position token"]) -> Int[Tensor, "position token"]:
    """Returns the rank of every token: 1 + the number of tokens with a strictly larger logit."""
    if logits.device.type == "cpu":  # numpy sorts several times as fast as torch
        order = torch.from_numpy(np.argsort(-logits.numpy(), axis=-1))
    else:
        order = logits.argsort(dim=-1, descending=True)
    ordered = logits.gather(-1, order)
    ranks = torch.arange(1, logits.shape[-1] + 1, device=logits.device).expand(logits.shape)
    is_tied = ordered[:, 1:] == ordered[:, :-1]
    if bool(is_tied.any()):
        ranks = ranks.clone()
        ranks[:, 1:][is_tied] = 0
        ranks = ranks.cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, ranks)


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
                change, control = Sums.empty(n_tokens), None
                if self.control is not None:
                    draw = self.control.draw_of(sequence.text)
                    control = draws.setdefault(draw, Sums.empty(n_tokens))
                self._compare(sequence, [arm[row] for arm in arms], change, control, hits)
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
        arms: Sequence[Tensor],
        change: Sums,
        control: Sums | None,
        examples: dict[str, list[Examples]],
    ) -> None:
        """Adds what the positions of one sequence show."""
        n_tokens, size = len(change.of_token["rank"]), chunk_size(arms[0])
        for start in range(0, len(sequence.positions), size):
            positions = torch.tensor(sequence.positions[start : start + size])
            logits = [arm[positions.to(arm.device)].float() for arm in arms]
            is_ranked = (positions + sequence.text) % self.every == 0
            probs = logits[0].softmax(-1)
            changes = compare_logits(logits[0], probs, logits[1])
            _refuse_nan(changes, sequence, positions)
            ranks = None
            if bool(is_ranked.any()):
                ranks = ranks_of_all(logits[0][is_ranked][:, :n_tokens])
                after = logits[1][is_ranked][:, :n_tokens]
                change.of_token["rank"] += _rank_deltas(ranks, after)
            change.counts += torch.tensor([len(positions), int(is_ranked.sum())])
            change.kl += changes.kl.sum(dtype=torch.float64).cpu()
            change.of_token["logprob"] += changes.logprob_sum(n_tokens).double().cpu()
            for name, movers in self._movers(change, changes.changes[:, :n_tokens]):
                examples[name].append(_examples(movers, changes, sequence, positions))
            if control is not None:
                self._add_control(control, logits, probs, changes.kl, is_ranked, ranks)

    def _movers(self, sums: Sums, changes: Tensor) -> Iterator[tuple[str, Movers]]:
        """Adds the tokens that moved most to the sums. Yields them as "promoted" and "demoted"."""
        for name, rise in (("promoted", True), ("demoted", False)):
            movers = most_changed(changes, self.top, rise=rise)
            ids = movers.ids[movers.is_counted].cpu()
            sums.of_token[name] += torch.bincount(ids, minlength=len(sums.of_token[name]))
            yield name, movers

    def _add_control(
        self,
        control: Sums,
        logits: Sequence[Logits],
        probs: Logits,
        kl: Numbers,
        is_ranked: Bool[Tensor, " position"],
        ranks: Tensor | None,
    ) -> None:
        """Adds the control's movers, and where there are ranks its changes at an equal KL."""
        before, after, n_tokens = logits[0], logits[2], len(control.of_token["rank"])
        changes = after - before
        if bool(changes.sum().isnan()):
            changes = torch.where(before == after, 0.0, changes)
        for _ in self._movers(control, changes[:, :n_tokens]):
            pass
        control.counts += torch.tensor([len(before), int(is_ranked.sum())])
        if ranks is None:
            return
        before, probs, target = before[is_ranked], probs[is_ranked], kl[is_ranked]
        scaled = compare_logits(before, probs, after[is_ranked], target)
        control.kl += scaled.kl.sum(dtype=torch.float64).cpu()
        control.of_token["logprob"] += scaled.logprob_sum(n_tokens).double().cpu()
        after = before + scaled.changes * scaled.scale[:, None]
        control.of_token["rank"] += _rank_deltas(ranks, after[:, :n_tokens])


def _rank_deltas(ranks: Tensor, after: Float[Tensor, "position token"]) -> Tensor:
    """Returns the sum of rank after minus rank before over the positions."""
    return (ranks_of_all(after) - ranks).sum(0).double().cpu()


def _refuse_nan(changes: LogitChanges, sequence: TokenSequence, positions: Tensor) -> None:
    is_nan = changes.log_norm.isnan().cpu()
    if bool(is_nan.any()):
        position = int(positions[is_nan][0])
        raise BadEdit(
            f"the logits after position {position} of text {sequence.text} are NaN, before or "
            "after the change: no token has a rank there. Leave this text out, or use float32"
        )


def _examples(
    movers: Movers, changes: LogitChanges, sequence: TokenSequence, positions: Tensor
) -> Examples:
    """Returns the tokens that moved most, and how much their log-probabilities did."""
    is_counted = movers.is_counted.cpu()
    deltas = changes.logprob_deltas(movers.changes).cpu()[is_counted]
    locations = np.full((len(positions), LOCATION), PADDING, dtype=np.int32)
    locations[:, :2] = sequence.text, sequence.piece
    locations[:, 2] = positions.numpy()
    for row, position in enumerate(positions.tolist()):
        context = sequence.ids[max(0, position + 1 - CONTEXT) : position + 1]
        locations[row, LOCATION - len(context) :] = context
    numbers = np.repeat(np.arange(len(positions)), is_counted.sum(1).numpy())
    tokens = movers.ids.cpu()[is_counted].numpy()
    return Examples(tokens, deltas.abs().numpy(), locations[numbers])
