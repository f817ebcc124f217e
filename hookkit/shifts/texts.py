"""What is written before and after the edits, and where the texts part."""

from collections.abc import Sequence

import pandas as pd

from ..hooks.base import Hook
from ..model import LM
from ..prompts import Row
from ..runs import Run, generate
from .naming import Edit


def texts_of(
    lm: LM, rows: Sequence[Row], baseline: tuple[Hook, ...], edits: Sequence[Edit], count: int
) -> pd.DataFrame:
    """Greedy texts of `count` tokens after every prompt, without and with each edit.

    Columns: row, edit, before, after (what was written), parts_at (the first token that differs, counted from 0; empty
    where none does), both (the text up to there), then_before, then_after (the texts from there on).
    """
    prompts = [list(row) for row in rows]
    settings = {"max_new_tokens": count, "do_sample": False, "logits": False}
    was = generate(lm, prompts, *baseline, **settings)
    parts = []
    for edit in edits:
        now = generate(lm, prompts, *edit.hooks, **settings)
        parts += [{"row": row, "edit": edit.name, **_parted(lm, was, now, row)} for row in range(len(prompts))]
    return pd.DataFrame(parts).astype({"parts_at": "Int64"})


def _parted(lm: LM, was: Run, now: Run, row: int) -> dict[str, object]:
    one, two = _written(was, row), _written(now, row)
    differ = [place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    at = None if one == two else (differ or [min(len(one), len(two))])[0]
    both = lm.text(one[:at])
    rests = [lm.added(one[:at], tokens[at:]) if at is not None else "" for tokens in (one, two)]
    return {"before": was.generated[row], "after": now.generated[row], "parts_at": at, "both": both,
            "then_before": rests[0], "then_after": rests[1]}  # fmt: skip


def _written(run: Run, row: int) -> list[int]:
    return run.tokens[row, run.prompt_lengths[row] : run.lengths[row]].tolist()
