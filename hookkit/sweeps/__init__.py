"""Sweeps: many edits, one metric, a table; in a fraction of the forwards."""

from .grids import ablations as ablations
from .grids import dose as dose
from .grids import patching as patching
from .noising import causal_tracing as causal_tracing
from .paths import path_patching as path_patching
from .planning import Plan as Plan
from .summaries import over_prompts as over_prompts
from .summaries import strongest as strongest
from .sweep import plan as plan
from .sweep import sweep as sweep
