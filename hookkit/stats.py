"""Statistics of tables: means over prompts with intervals, and the agreement of two methods.

    table = hk.patching(lm, clean, corrupted, "resid_post", metrics=metric)
    hk.stats.mean_over_prompts(table)

Every function takes a table that hookkit returned and returns a DataFrame.
"""

from .attributions.attribution_patching import compare_attributions
from .lenses.logit_lens import lens_summary
from .steering.controls import effect_at_damage, mean_over_doses
from .sweeps.summary import mean_over_prompts, strongest
from .tables.calibration import calibration, roc

__all__ = [
    "calibration",
    "compare_attributions",
    "effect_at_damage",
    "lens_summary",
    "mean_over_doses",
    "mean_over_prompts",
    "roc",
    "strongest",
]


def __dir__() -> list[str]:
    return __all__
