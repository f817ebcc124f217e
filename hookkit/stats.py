"""Statistics: means over prompts with intervals, the agreement of two methods, summaries of shifts.

    table = hk.patching(lm, clean, corrupted, "resid_post", metrics=metric)
    hk.stats.mean_over_prompts(table)
    hk.stats.shift_summary(before, after)
    hk.stats.activation_statistics(lm, texts, "resid_post.6")
    hk.stats.evaluate(lm, "arc_easy", hk.scale("mlp_out.12", 0.5))

Most functions take a table that hookkit returned. `shift_summary` takes two runs,
`activation_statistics` a model and texts, and `evaluate` a model and tasks of
lm-evaluation-harness.
"""

from .attributions.attribution_patching import compare_attributions
from .data.harvest.statistics import activation_statistics
from .lenses.logit_lens import lens_summary
from .steering.controls import effect_at_damage, mean_over_doses
from .sweeps.summary import mean_over_prompts, strongest
from .tables.calibration import calibration, roc
from .tables.evaluation import evaluate
from .tables.rank_tables import shift_summary

__all__ = [
    "activation_statistics",
    "calibration",
    "compare_attributions",
    "effect_at_damage",
    "evaluate",
    "lens_summary",
    "mean_over_doses",
    "mean_over_prompts",
    "roc",
    "shift_summary",
    "strongest",
]


def __dir__() -> list[str]:
    return __all__
