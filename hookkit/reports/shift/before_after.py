"""The forwards of a shift report, one for each edit over all prompts, and what they measure.

`ResumePlan` lets a forward begin at the first block that an edit touches: the blocks before it
compute the same as without the edit. `watched_of` and `distances_of` compare the next-token logits
before and after an edit, `texts_of` compares generated texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ...display import quote_token
from ...errors import HookkitError
from ...hooks.base import Hook
from ...hooks.capture import Captures, capture
from ...models import next_token
from ...models.lm import LM
from ...models.overrides import Overrides
from ...models.prompts import Row
from ...models.sites import Site
from ...runs.forward import forward
from ...runs.generate import generate
from ...runs.hook_points import build_hook_points
from ...runs.manager import capture_reference
from ...runs.model_end import find_ending
from ...runs.partial import skip_block
from ...runs.run import Run
from ...sweeps.shortcuts import shortcuts
from ...sweeps.sweep import sweep
from ...tables import rank_tables
from ...tables.counterfactuals import first_difference
from ...tables.distributions import Distribution, token_texts
from ...tables.metrics.metric import KL, FunctionMetric, Metric, entropy
from ...tables.metrics.token_metrics import logit, logprob, rank
from .named_edits import Edit

# With fewer tokens in all forwards of the edits, a trial of the shortcut costs more than it saves.
MIN_TOKENS = 512
EDIT_COLUMNS = {"edit": "name", "control": "control", "draw": "draw"}
TOP_BEFORE = "what was first"  # the prompt's own most likely token before the edit
COMPARED = ("logit", "logprob", "prob", "rank")
Logits = Float[Tensor, "row vocab"]


@dataclass(frozen=True, eq=False)
class ResumePlan:
    """The first block that each edit touches, by its number, as far as forwards can begin there.

    `block_outputs` belongs to the plan: the outputs of the unedited forward, by block.
    """

    lm: LM
    starts: dict[int, int]
    block_outputs: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def record_outputs(self) -> Iterator[None]:
        """Within the `with` block, a forward's outputs are recorded as far as they are needed."""

        def record(number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.block_outputs[number] = inner(*args, **kwargs)
            return self.block_outputs[number]

        with Overrides() as overrides:
            for number in {start - 1 for start in self.starts.values()}:
                overrides.wrap_method(self._block(number), "forward", partial(record, number))
            yield

    @contextmanager
    def resume_at(self, start: int) -> Iterator[None]:
        """Within the `with` block forwards begin at block `start`; 0 is a whole forward."""

        def replay(*args: Any, **kwargs: Any) -> Any:
            output = self.block_outputs[start - 1]
            if isinstance(output, Tensor):
                return output.clone()
            return (output[0].clone(), *output[1:])

        with Overrides() as overrides:
            for number in range(start - 1):
                output_kind = find_ending(self.lm).kinds[number]
                overrides.wrap_method(
                    self._block(number), "forward", partial(skip_block, output_kind)
                )
            if start:
                overrides.wrap_method(self._block(start - 1), "forward", replay)
            yield

    def _block(self, number: int) -> Any:
        return self.lm.submodule(self.lm.family.block.format(layer=number))


def plan_resuming(lm: LM, rows: Sequence[Row], edits: Sequence[tuple[Hook, ...]]) -> ResumePlan:
    """The plan for the forwards of these edits. Without a start, an edit takes a whole forward.

    A trial verifies that the model allows it.
    """
    whole = ResumePlan(lm, {})
    n_tokens = sum(map(len, rows)) * len(edits)
    if n_tokens < MIN_TOKENS or not _can_resume(lm):
        return whole
    first_blocks = map(partial(_first_block, lm), edits)
    try:
        starts = {number: start for number, start in enumerate(first_blocks) if start > 0}
    except HookkitError:
        return whole
    return ResumePlan(lm, starts) if starts and shortcuts(lm, rows).grow else whole


def _can_resume(lm: LM) -> bool:
    """False for a model with dropout, or with hooks that would see that blocks are skipped."""
    modules = (*lm.wrapping, *lm.root.modules())
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return not (lm.root.training or has_hooks)


def _first_block(lm: LM, hooks: tuple[Hook, ...]) -> int:
    """The first block that hooks touch: `n_layers` if they act after all blocks, else 0."""
    model_end = find_ending(lm)
    blocks = {lm.family.block.format(layer=number): number for number in range(lm.n_layers)}
    numbers = []
    for point in build_hook_points(lm, list(hooks), partial(capture_reference, lm)):
        path = point.location.path
        while path and path not in blocks:
            path = path.rpartition(".")[0]
        number = lm.n_layers if model_end.has(point) else 0
        numbers.append(blocks.get(path, number))
    return min(numbers, default=0)


@dataclass(frozen=True, eq=False)
class NextTokenLogits:
    """The logits after each prompt, and the run, which keeps only the shown rows."""

    edit: Edit  # its hooks include the base hooks
    run: Run
    logits: Logits  # float32, on the CPU
    details: int

    @property
    def lm(self) -> LM:
        return self.run.lm

    @cached_property
    def logprobs(self) -> Logits:
        return self.logits.log_softmax(-1)

    @cached_property
    def exact(self) -> Logits:
        """The log-probabilities in float64, for sums over the vocabulary."""
        return next_token.exact_logprobs(self.logits)

    @cached_property
    def entropy(self) -> Float[Tensor, " row"]:
        return next_token.entropy_of(self.exact)

    @property
    def real_logits(self) -> Logits:
        """The logits of the real vocabulary."""
        return next_token.token_logits(self.logits, self.lm.n_tokens)

    @cached_property
    def top_tokens(self) -> list[int]:
        """The most likely token of each prompt."""
        return self.real_logits.argmax(-1).tolist()

    @property
    def top_names(self) -> list[str | None]:
        """The most likely tokens by name; None where logits are NaN, so that there is none."""
        names = pd.Series(token_texts(self.lm, self.top_tokens), dtype=object)
        return names.mask(self.logits.isnan().any(-1).numpy(), None).tolist()

    def numbers(self, tokens: list[int], when: str) -> dict[str, object]:
        """The columns of one token for each prompt, with `when` in their names."""
        ids = torch.tensor(tokens)
        logits = next_token.values_at(self.logits, ids)
        logprobs = next_token.values_at(self.logprobs, ids)
        ranks = next_token.rank_among(self.real_logits, logits)
        return {
            f"logit_{when}": logits.double().numpy(),
            f"logprob_{when}": logprobs.double().numpy(),
            f"prob_{when}": logprobs.exp().double().numpy(),
            f"rank_{when}": next_token.ranks_for_table(ranks).numpy(),
        }

    @cached_property
    def distributions(self) -> list[Distribution]:
        """The distributions after the details prompts."""
        result = []
        for row, length in enumerate(self.run.prompt_lengths[: self.details]):
            position = {"row": row, "pos": length - 1}
            result.append(Distribution(self.lm, position, self.logits[row]))
        return result


def run_prompts(
    lm: LM,
    rows: Sequence[Row],
    edit: Edit,
    sites: Sequence[Site],
    details: int,
    start: int = 0,
    unedited: Captures | None = None,
) -> NextTokenLogits:
    """One forward over all prompts with an edit. Captures `sites` of the first `details` prompts.

    For a forward that begins at block `start`, the captures before it are taken from `unedited`.
    """
    computed = [site for site in sites if site.layer is None or site.layer >= start]
    captures = [_capture_last(computed, details)] if computed else []
    run = forward(lm, list(rows), *edit.hooks, *captures, logits="last")
    last_logits = run.captured_logits()
    logits = last_logits.values[:, 0].detach().float().cpu()
    assert last_logits.positions is not None
    shown_logits = replace(
        last_logits,
        values=last_logits.values[:details].clone(),
        positions=last_logits.positions[:details],
        rows=last_logits.rows[:details],
        prompts=last_logits.prompts[:details],
    )
    hooks = (*edit.hooks, _capture_last(sites, details)) if sites else edit.hooks
    run = replace(run, hooks=hooks, output=None, kept_logits=shown_logits)
    if unedited is not None and sites:
        run = replace(run, captures=_add_unedited(run.captures, unedited))
    return NextTokenLogits(edit, run, logits, details)


def _capture_last(sites: Sequence[Site], details: int) -> Hook:
    return capture(list(sites), pos=-1, rows=range(details), name="hookkit.shifts")


def _add_unedited(captures: Captures, unedited: Captures) -> Captures:
    """The captures of a resumed forward, completed by the unedited ones, in the order of these."""
    resumed = {slot.site: slot for slot in captures.slots}
    slots = [resumed.pop(slot.site, slot) for slot in unedited.slots]
    return Captures((*slots, *resumed.values()))


def watched_of(
    before: NextTokenLogits, after: NextTokenLogits, watch: Sequence[int]
) -> pd.DataFrame:
    """Every prompt's watched tokens, and its most likely token before, before and after one edit.

    Columns: row, edit, control, draw (of a random control), watched, token, token_id; logit,
    logprob, prob and rank, each with _before, _after and _delta; log10_rank_ratio (log10 of rank
    before over rank after: 1 for a rise from 100 to 10).
    """
    parts = []
    for name, tokens in _watched_tokens(before, watch).items():
        table = _rows_of(after).assign(
            watched=name, token=token_texts(after.lm, tokens), token_id=tokens
        )
        numbers = before.numbers(tokens, "before") | after.numbers(tokens, "after")
        parts.append(table.assign(**numbers))
    table = add_deltas(pd.concat(parts, ignore_index=True))
    return table.sort_values("row", kind="stable", ignore_index=True)


def _watched_tokens(before: NextTokenLogits, watch: Sequence[int]) -> dict[str, list[int]]:
    """The token of each prompt by its name in the tables."""
    tokens_by_name = {}
    for token in watch:
        tokens_by_name[quote_token(before.lm.string(token))] = [token] * len(before.logits)
    return tokens_by_name | {TOP_BEFORE: before.top_tokens}


def _rows_of(after: NextTokenLogits) -> pd.DataFrame:
    """The columns that say which prompt and edit each row is about."""
    columns = {column: attrgetter(name)(after.edit) for column, name in EDIT_COLUMNS.items()}
    return pd.DataFrame({"row": range(len(after.logits)), **columns})


def add_deltas(table: pd.DataFrame) -> pd.DataFrame:
    """The table with after minus before of all compared numbers, and with log10_rank_ratio."""
    table = rank_tables.add_deltas(table, COMPARED)
    return table.assign(log10_rank_ratio=log10_rank_ratio(table))


def log10_rank_ratio(table: pd.DataFrame) -> Any:
    """log10 of rank before over rank after."""
    return np.log10(table["rank_before"] / table["rank_after"])


def distances_of(before: NextTokenLogits, after: NextTokenLogits) -> pd.DataFrame:
    """How far each prompt's whole distribution moved.

    Columns: row, edit, control, draw, kl (KL(before‖after), nats), entropy_before, _after, _delta
    (nats), top1_before, top1_after, top1_changed (None where logits are NaN).
    """
    kl = next_token.kl_divergence(before.exact, after.exact).clamp(min=0.0)
    table = _rows_of(after).assign(
        kl=kl.tolist(),
        entropy_before=before.entropy.tolist(),
        entropy_after=after.entropy.tolist(),
        entropy_delta=(after.entropy - before.entropy).tolist(),
        top1_before=before.top_names,
        top1_after=after.top_names,
    )
    return _with_top_changed(table)


def _with_top_changed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column top1_changed; None where a first token is not known."""
    is_unknown: Any = table["top1_before"].isna() | table["top1_after"].isna()
    changed: Any = table["top1_before"] != table["top1_after"]
    if is_unknown.any():
        changed = changed.astype(object).mask(is_unknown, None)
    return table.assign(top1_changed=changed)


def draws_of(
    before: NextTokenLogits,
    rows: Sequence[Row],
    base_hooks: tuple[Hook, ...],
    controls: Sequence[Edit],
    watch: Sequence[int],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `watched_of` and `distances_of` for the draws of random controls.

    Many draws share a forward, each over all prompts, as cells of a sweep.
    """
    lm = before.lm
    tokens_by_name = _watched_tokens(before, watch)
    token_metrics: list[Metric] = []
    for tokens in tokens_by_name.values():
        entries: Any = tokens
        token_metrics += [logit(entries), logprob(entries), rank(entries)]
    table: Any = sweep(
        lm,
        list(rows),
        {"number": range(len(controls))},
        lambda number: controls[number].hooks,
        [*token_metrics, entropy(), KL(None), FunctionMetric(partial(_top_token, lm.n_tokens))],
        base_hooks=base_hooks,
        progress=False,
    )
    names = {column: list(map(attrgetter(name), controls)) for column, name in EDIT_COLUMNS.items()}
    about = pd.DataFrame(names).loc[table["number"]].reset_index(drop=True)
    about.insert(0, "row", table["row"])
    index = table["row"].to_numpy()
    parts = []
    for number, (name, tokens) in enumerate(tokens_by_name.items()):
        suffix = f"_{number + 1}" if number else ""
        names_and_ids = {"watched": name, "token": token_texts(lm, tokens), "token_id": tokens}
        numbers = pd.DataFrame(names_and_ids | before.numbers(tokens, "before")).loc[index]
        part = pd.concat([about, numbers.reset_index(drop=True)], axis=1)
        for measure in ("logit", "logprob", "rank"):
            part[f"{measure}_after"] = table[f"{measure}{suffix}"]
        parts.append(part.assign(prob_after=np.exp(part["logprob_after"])))
    watched: Any = add_deltas(pd.concat(parts, ignore_index=True))
    if not watched["rank_after"].isna().any():
        watched = watched.astype({"rank_after": "int64", "rank_delta": "int64"})
    distances = about.assign(
        kl=table["kl"],
        entropy_before=before.entropy.numpy()[index],
        entropy_after=table["entropy"],
        entropy_delta=table["entropy"] - before.entropy.numpy()[index],
        top1_before=np.array(before.top_names, dtype=object)[index],
        top1_after=_names_of(lm, table["metric"]),
    )
    return watched, _with_top_changed(distances)


def _top_token(n_tokens: int, logits: Logits) -> Float[Tensor, " row"]:
    """The id of the most likely token of each row; NaN where a logit is NaN."""
    top = next_token.token_logits(logits, n_tokens).argmax(-1).float()
    return top.masked_fill(logits.isnan().any(-1), torch.nan)


def _names_of(lm: LM, ids: pd.Series) -> list[str | None]:
    """Tokens by name; None where the id is missing."""
    numbers = ids.dropna()
    names = pd.Series(token_texts(lm, numbers.astype(int)), index=numbers.index, dtype=object)
    return names.reindex(ids.index).where(ids.notna(), None).tolist()


def texts_of(
    lm: LM, rows: Sequence[Row], base_hooks: tuple[Hook, ...], edits: Sequence[Edit], count: int
) -> pd.DataFrame:
    """Greedy texts of `count` tokens after every prompt, without and with each edit.

    Columns: row, edit, before, after (the texts), first_difference (the first token that differs,
    counted from 0; empty where none differs), both (the text up to there), then_before, then_after
    (the texts from there on).
    """
    settings = {"max_new_tokens": count, "do_sample": False, "logits": False}
    before = generate(lm, list(rows), *base_hooks, **settings)
    records = []
    for edit in edits:
        after = generate(lm, list(rows), *base_hooks, *edit.hooks, **settings)
        for row in range(len(rows)):
            records.append({"row": row, "edit": edit.name} | _compare_texts(before, after, row))
    return pd.DataFrame(records).astype({"first_difference": "Int64"})


def _compare_texts(before: Run, after: Run, row: int) -> dict[str, object]:
    lm, start = before.lm, before.prompt_lengths[row]
    tokens_before = before.tokens[row, start : before.lengths[row]].tolist()
    tokens_after = after.tokens[row, start : after.lengths[row]].tolist()
    differs_at = first_difference(tokens_before, tokens_after)
    common = tokens_before[:differs_at]
    then_before, then_after = "", ""
    if differs_at is not None:
        then_before = lm.added(common, tokens_before[differs_at:])
        then_after = lm.added(common, tokens_after[differs_at:])
    return {
        "before": before.generated[row],
        "after": after.generated[row],
        "first_difference": differs_at,
        "both": lm.text(common),
        "then_before": then_before,
        "then_after": then_after,
    }
