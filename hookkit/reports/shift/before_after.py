"""The forwards of a shift report, one for each edit over all prompts, and what they measure.

`ResumePlan` lets a forward begin at the first block that an edit touches: the blocks before it
compute the same as without the edit. `watched_of` and `distances_of` compare the next-token logits
before and after an edit, `texts_of` compares generated texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import HookkitError
from ...hooks.base import Hook
from ...hooks.capture import capture
from ...hooks.captured_values import Captured, Captures, LazyCapture
from ...lenses.model_end import find_ending
from ...models.lm import LM
from ...models.next_token import (
    entropy_of,
    exact_logprobs,
    kl_divergence,
    rank_among,
    ranks_for_table,
    token_logits,
    values_at,
)
from ...models.overrides import Overrides
from ...models.prompts import Row
from ...models.sites import Site
from ...runs.forward import forward
from ...runs.generate import generate
from ...runs.manager import capture_reference
from ...runs.partial import skip_block
from ...runs.run import Run
from ...runs.taps import HookPoint, build_hook_points
from ...sweeps.shortcuts import shortcuts
from ...tables.distributions import Distribution
from .named_edits import Edit, token_literal

# With fewer tokens in all forwards of the edits, a trial of the shortcut costs more than it saves.
MIN_TOKENS = 512
TOP_BEFORE = "what was first"  # the prompt's own most likely token before the edit
COMPARED = ("logit", "logprob", "prob", "rank")
Logits = Float[Tensor, "row vocab"]


@dataclass(frozen=True, eq=False)
class ResumePlan:
    """The blocks at which forwards of edits can begin, and the outputs of the blocks before them.

    `starts` has the first block that an edit touches, by the edit's number; edits that need whole
    forwards are not in it. `block_outputs` belongs to the plan: `record_outputs` fills it with the
    outputs of the unedited forward, by block.
    """

    lm: LM
    starts: dict[int, int]
    block_outputs: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def record_outputs(self) -> Iterator[None]:
        """Within the `with` block, a forward's outputs are recorded as far as they are needed."""
        with Overrides() as lent:
            for number in {start - 1 for start in self.starts.values()}:
                lent.around(self._block(number), "forward", partial(self._record, number))
            yield

    def _record(self, number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.block_outputs[number] = inner(*args, **kwargs)
        return self.block_outputs[number]

    @contextmanager
    def resume_at(self, start: int) -> Iterator[None]:
        """Within the `with` block, forwards of the same prompts begin at block `start`.

        With `start` 0 they are whole forwards.
        """
        with Overrides() as lent:
            for number in range(start - 1):
                output_kind = find_ending(self.lm).kinds[number]
                lent.around(self._block(number), "forward", partial(skip_block, output_kind))
            if start:
                lent.around(self._block(start - 1), "forward", partial(self._replay, start - 1))
            yield

    def _replay(self, number: int, /, *args: Any, **kwargs: Any) -> Any:
        output = self.block_outputs[number]
        if isinstance(output, Tensor):
            return output.clone()
        return (output[0].clone(), *output[1:])

    def _block(self, number: int) -> Any:
        return self.lm.submodule(self.lm.family.block.format(layer=number))


def plan_resuming(lm: LM, rows: Sequence[Row], edits: Sequence[tuple[Hook, ...]]) -> ResumePlan:
    """The plan for the forwards of these edits over these prompts.

    A trial forward verifies that the model allows it. A model that does not, and a model with other
    hooks, which would see that blocks are skipped, run whole forwards.
    """
    whole = ResumePlan(lm, {})
    n_tokens = sum(map(len, rows)) * len(edits)
    if n_tokens < MIN_TOKENS or lm.root.training or _has_hooks(lm):
        return whole
    starts = {}
    try:
        for number, hooks in enumerate(edits):
            start = _first_block(lm, hooks)
            if start > 0:
                starts[number] = start
    except HookkitError:
        return whole
    return ResumePlan(lm, starts) if starts and shortcuts(lm).grow else whole


def _has_hooks(lm: LM) -> bool:
    """True if the user's hooks, or those of an outer `with` block of hookkit, see a forward."""
    modules = (*lm.wrapping, *lm.root.modules())
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _first_block(lm: LM, hooks: tuple[Hook, ...]) -> int:
    """The first block that hooks touch: `n_layers` if they act after all blocks, else 0."""
    model_end = find_ending(lm)
    blocks = {lm.family.block.format(layer=number): number for number in range(lm.n_layers)}
    numbers = []
    for point in build_hook_points(lm, list(hooks), partial(capture_reference, lm)):
        number = _enclosing_block(point, blocks)
        if number is None:
            number = lm.n_layers if model_end.has(point) else 0
        numbers.append(number)
    return min(numbers, default=0)


def _enclosing_block(point: HookPoint, blocks: dict[str, int]) -> int | None:
    path = point.place.path
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return blocks.get(path)


def computed_sites(sites: Sequence[Site], start: int) -> list[Site]:
    """The sites that are computed by a forward that begins at block `start`."""
    return [site for site in sites if site.layer is None or site.layer >= start]


def add_unedited(captures: Captures, unedited: Captures) -> Captures:
    """The captures of a resumed forward, completed by the unedited ones, in the order of these."""
    resumed = {slot.site: slot for slot in captures.slots}
    slots: list[LazyCapture] = [resumed.pop(slot.site, slot) for slot in unedited.slots]
    return Captures((*slots, *resumed.values()))


@dataclass(frozen=True, eq=False)
class NextTokenLogits:
    """The logits after each prompt, and the run, which keeps only the shown rows."""

    edit: Edit | None
    run: Run
    logits: Logits  # float32, on the CPU

    @property
    def lm(self) -> LM:
        return self.run.lm

    @cached_property
    def logprobs(self) -> Logits:
        return self.logits.log_softmax(-1)

    @cached_property
    def exact(self) -> Logits:
        """The log-probabilities in float64, for sums over the vocabulary."""
        return exact_logprobs(self.logits)

    @cached_property
    def entropy(self) -> Float[Tensor, " row"]:
        return entropy_of(self.exact)

    @property
    def _real_logits(self) -> Logits:
        """The logits of the real vocabulary."""
        return token_logits(self.logits, self.lm.n_tokens)

    @cached_property
    def top_tokens(self) -> list[int]:
        """The most likely token of each prompt."""
        return self._real_logits.argmax(-1).tolist()

    @property
    def top_names(self) -> list[str | None]:
        """The most likely tokens by name; None where logits are NaN, so that there is none."""
        names: list[str | None] = [token_literal(self.lm, token) for token in self.top_tokens]
        for row in self.logits.isnan().any(-1).nonzero().flatten().tolist():
            names[row] = None
        return names

    def ranks(self, ids: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """The ranks of one token for each prompt: 1 + the number of strictly larger logits."""
        return rank_among(self._real_logits, values_at(self.logits, ids))

    def distribution(self, row: int) -> Distribution:
        position = {"row": row, "pos": self.run.prompt_lengths[row] - 1}
        return Distribution(self.lm, position, self.logits[row])


def run_prompts(
    lm: LM,
    rows: Sequence[Row],
    hooks: tuple[Hook, ...],
    edit: Edit | None,
    sites: Sequence[Site],
    shown: int,
    start: int = 0,
    unedited: Captures | None = None,
) -> NextTokenLogits:
    """One forward over all prompts with these hooks. Captures `sites` of the first `shown` prompts.

    For a forward that begins at block `start`, the captures before it are taken from `unedited`.
    """
    prompts = [list(row) for row in rows]
    computed = computed_sites(sites, start)
    captures = [_capture_last(computed, shown)] if computed else []
    run = forward(lm, prompts, *hooks, *captures, logits="last")
    last_logits = run.captured_logits()
    logits = last_logits.values[:, 0].detach().float().cpu()
    all_hooks = (*hooks, _capture_last(sites, shown)) if sites else hooks
    run = replace(run, hooks=all_hooks, output=None, kept_logits=_first_rows(last_logits, shown))
    if unedited is not None and sites:
        run = replace(run, kept=add_unedited(run.kept, unedited))
    return NextTokenLogits(edit, run, logits)


def _capture_last(sites: Sequence[Site], shown: int) -> Hook:
    return capture(list(sites), pos=-1, rows=range(shown), name="hookkit.shifts")


def _first_rows(captured: Captured, shown: int) -> Captured:
    assert captured.positions is not None
    return replace(
        captured,
        values=captured.values[:shown].clone(),
        positions=captured.positions[:shown],
        rows=captured.rows[:shown],
        prompts=captured.prompts[:shown],
    )


def watched_of(
    before: NextTokenLogits, after: NextTokenLogits, watch: Sequence[int]
) -> pd.DataFrame:
    """Every prompt's watched tokens, and its most likely token before, before and after one edit.

    Columns: row, edit, control, draw (of a random control), watched, token, token_id; logit,
    logprob, prob and rank, each with _before, _after and _delta; shift; decades (log10 of rank
    before over rank after: 1 for a rise from 100 to 10).
    """
    assert after.edit is not None
    n_rows = len(after.logits)
    tokens_by_name = {token_literal(after.lm, token): [token] * n_rows for token in watch}
    tokens_by_name[TOP_BEFORE] = before.top_tokens
    parts = []
    for name, tokens in tokens_by_name.items():
        columns: dict[str, object] = {
            "row": range(n_rows),
            "edit": after.edit.name,
            "control": after.edit.control,
            "draw": after.edit.draw,
            "watched": name,
            "token": [token_literal(after.lm, token) for token in tokens],
            "token_id": tokens,
        }
        columns |= _numbers_of(before, tokens, "before")
        columns |= _numbers_of(after, tokens, "after")
        parts.append(pd.DataFrame(columns))
    table = add_deltas(pd.concat(parts, ignore_index=True))
    return table.sort_values("row", kind="stable", ignore_index=True)


def _numbers_of(outcome: NextTokenLogits, tokens: list[int], when: str) -> dict[str, object]:
    ids = torch.tensor(tokens)
    logprobs = values_at(outcome.logprobs, ids)
    return {
        f"logit_{when}": values_at(outcome.logits, ids).double().numpy(),
        f"logprob_{when}": logprobs.double().numpy(),
        f"prob_{when}": logprobs.exp().double().numpy(),
        f"rank_{when}": ranks_for_table(outcome.ranks(ids)).numpy(),
    }


def add_deltas(table: pd.DataFrame) -> pd.DataFrame:
    """The table with after minus before of all compared numbers, and with columns in order."""
    numbers = []
    for name in COMPARED:
        before, after = table[f"{name}_before"], table[f"{name}_after"]
        # -inf minus -inf is no change
        table[f"{name}_delta"] = (after - before).where(after != before, 0)
        numbers += [f"{name}_before", f"{name}_after", f"{name}_delta"]
    table["shift"] = -table["rank_delta"]
    table["decades"] = np.log10(table["rank_before"] / table["rank_after"])
    numbers += ["shift", "decades"]
    keys = [name for name in table.columns if name not in numbers]
    return pd.DataFrame(table[[*keys, *numbers]])


def distances_of(before: NextTokenLogits, after: NextTokenLogits) -> pd.DataFrame:
    """How far each prompt's whole distribution moved.

    Columns: row, edit, control, draw, kl (KL(before‖after), nats), entropy_before, _after, _delta
    (nats), top1_before, top1_after, top1_changed (None where logits are NaN).
    """
    assert after.edit is not None
    kl = kl_divergence(before.exact, after.exact).clamp(min=0.0)
    top1_changed: list[bool | None] = []
    for name_before, name_after in zip(before.top_names, after.top_names, strict=True):
        is_known = name_before is not None and name_after is not None
        top1_changed.append(name_before != name_after if is_known else None)
    columns = {
        "row": range(len(kl)),
        "edit": after.edit.name,
        "control": after.edit.control,
        "draw": after.edit.draw,
        "kl": kl.tolist(),
        "entropy_before": before.entropy.tolist(),
        "entropy_after": after.entropy.tolist(),
        "entropy_delta": (after.entropy - before.entropy).tolist(),
        "top1_before": before.top_names,
        "top1_after": after.top_names,
        "top1_changed": top1_changed,
    }
    return pd.DataFrame(columns)


def texts_of(
    lm: LM, rows: Sequence[Row], baseline: tuple[Hook, ...], edits: Sequence[Edit], count: int
) -> pd.DataFrame:
    """Greedy texts of `count` tokens after every prompt, without and with each edit.

    Columns: row, edit, before, after (the texts), parts_at (the first token that differs, counted
    from 0; empty where none differs), both (the text up to there), then_before, then_after (the
    texts from there on).
    """
    prompts = [list(row) for row in rows]
    settings = {"max_new_tokens": count, "do_sample": False, "logits": False}
    before = generate(lm, prompts, *baseline, **settings)
    records = []
    for edit in edits:
        after = generate(lm, prompts, *edit.hooks, **settings)
        for row in range(len(prompts)):
            records.append({"row": row, "edit": edit.name} | _compare_texts(lm, before, after, row))
    return pd.DataFrame(records).astype({"parts_at": "Int64"})


def _compare_texts(lm: LM, before: Run, after: Run, row: int) -> dict[str, object]:
    tokens_before, tokens_after = _generated_tokens(before, row), _generated_tokens(after, row)
    parts_at = first_difference(tokens_before, tokens_after)
    common = tokens_before[:parts_at]
    then_before, then_after = "", ""
    if parts_at is not None:
        then_before = lm.added(common, tokens_before[parts_at:])
        then_after = lm.added(common, tokens_after[parts_at:])
    return {
        "before": before.generated[row],
        "after": after.generated[row],
        "parts_at": parts_at,
        "both": lm.text(common),
        "then_before": then_before,
        "then_after": then_after,
    }


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The index of the first token that differs, None if the sequences are equal."""
    if first == second:
        return None
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _generated_tokens(run: Run, row: int) -> list[int]:
    return run.tokens[row, run.prompt_lengths[row] : run.lengths[row]].tolist()
