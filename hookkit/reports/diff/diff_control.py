"""The random control of two compared models: does as large a change do as much?

With hooks on one side of one model, the control is drawn as that of a shift report. Between two
models, or two states of one, it is the first model with the difference of the two streams after
the last block, turned by a random rotation: a change of the same length in a random direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...errors import Unsupported
from ...hooks.ablation import patch
from ...hooks.base import EditHook, Hook
from ...hooks.capture import capture
from ...models.sites import Site
from ...runs.forward import forward
from ...sweeps.cells import Randomised
from ...sweeps.sweep import sweep
from ...tables.metrics.metric import KL
from ..control_draws import NO_CONTROL, ControlMaker, compare
from .paired_models import PairedRuns

TURNED = (
    "the first model with the difference of the streams after the last block, turned in a random "
    "direction"
)


@dataclass(frozen=True, eq=False)
class DiffControl:
    """The draws of the control after each prompt's last token.

    table        columns: row, draw, kl (KL(before‖draw), nats)
    summary      one row: measure ("kl"), n (prompts), draws, and the columns of `compare`
    description  what the draws are
    why_none     why there is no control; the tables are then empty
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    description: str = ""
    why_none: str = ""


def no_control(why: str) -> DiffControl:
    """The value for a comparison without a control."""
    return DiffControl(pd.DataFrame(), pd.DataFrame(), why_none=why)


def draw_control(
    runs: PairedRuns, edits: Sequence[Hook], tokens: pd.DataFrame, count: int, seed: int
) -> DiffControl:
    """Returns `count` draws of the control. `edits` are the hooks on the second side only.

    Raises one of `NO_CONTROL` if there is no control.
    """
    with torch.no_grad(), runs.before.around():
        effects = _effects_of_last_tokens(runs, tokens)
        is_one_model = runs.before.lm.root is runs.after.lm.root
        same_around = runs.before.around is runs.after.around
        if edits and is_one_model and same_around:
            draws, description = _draws_of_hooks(runs, tuple(edits), count, seed)
            table = _measure(runs, list(range(len(runs.rows))), draws)
        else:
            description = TURNED
            parts = []
            for batch in runs.batches():
                parts.append(_measure(runs, batch, _turned_ends(runs, batch, count, seed)))
            table = pd.concat(parts, ignore_index=True).sort_values(["row", "draw"])
    grid = table.pivot(index="row", columns="draw", values="kl").to_numpy()
    counts = {"measure": "kl", "n": grid.shape[0], "draws": grid.shape[1]}
    summary = pd.DataFrame([counts | compare(effects, grid, (0.0, np.inf))])
    return DiffControl(table.reset_index(drop=True), summary, description)


def _effects_of_last_tokens(runs: PairedRuns, tokens: pd.DataFrame) -> Any:
    """The divergence of the two models after each prompt's last token."""
    last_positions = [len(runs.rows[row]) - 1 for row in tokens["row"]]
    last: Any = tokens[tokens["pos"] == last_positions]
    last = last.sort_values("row")
    if len(last) != len(runs.rows):
        raise Unsupported(
            "the control is measured after the last token of each prompt, which pos= leaves out"
        )
    return last["kl"].to_numpy(float)


def _draws_of_hooks(
    runs: PairedRuns, edits: tuple[Hook, ...], count: int, seed: int
) -> tuple[Sequence[tuple[Hook, ...]], str]:
    side = runs.before
    run = forward(side.lm, list(runs.rows), *side.hooks, logits="last")
    logits = run.captured_logits().values[:, 0].float().cpu()
    control = ControlMaker(side.lm, logits, runs.request.watched).draw(edits, count, seed)
    return control.draws, control.description


def _turned_ends(
    runs: PairedRuns, batch: Sequence[int], count: int, seed: int
) -> list[tuple[Hook, ...]]:
    """The draws for these prompts: what makes the first model's last stream the second one's."""
    site = Site("resid_post", runs.before.lm.n_layers - 1)
    other = Site("resid_post", runs.after.lm.n_layers - 1)
    if site != other or runs.before.lm.shape(site) != runs.after.lm.shape(other):
        raise Unsupported("the models have streams of different sizes, or other numbers of layers")
    prompts = [runs.rows[row] for row in batch]
    with runs.after.around():
        ends = forward(
            runs.after.lm, prompts, *runs.after.hooks, capture(site, pos=-1), logits=False
        )
    hook = patch(site, ends, pos=-1)
    assert isinstance(hook, EditHook)
    draws: list[tuple[Hook, ...]] = []
    for draw in range(count):
        turn = Random(f"{seed} {draw}").randrange(2**31)
        draws.append((Randomised(hook.sites, hook.where, hook, turn, "all"),))
    return draws


def _measure(
    runs: PairedRuns, batch: Sequence[int], draws: Sequence[tuple[Hook, ...]]
) -> pd.DataFrame:
    """The divergence of each draw from the first model, for these prompts."""
    table: Any = sweep(
        runs.before.lm,
        [runs.rows[row] for row in batch],
        {"draw": range(len(draws))},
        lambda draw: draws[draw],
        [KL(None)],
        base_hooks=runs.before.hooks,
        progress=False,
    )
    rows = [batch[row] for row in table["row"]]
    return pd.DataFrame({"row": rows, "draw": table["draw"], "kl": table["kl"]})


def attempt_control(
    runs: PairedRuns,
    edits: Sequence[Hook],
    tokens: pd.DataFrame,
    count: int | None,
    seed: int,
    default: int,
) -> DiffControl:
    """Returns the control, or why there is none; raises for a count that the user gave."""
    if count == 0:
        return no_control("")
    try:
        return draw_control(runs, edits, tokens, count or default, seed)
    except NO_CONTROL as error:
        if count is not None:
            raise
        return no_control(str(error))
