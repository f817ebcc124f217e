"""Sweeps: many edits, one metric, a table; in a fraction of the forwards."""

from .planning import Plan as Plan
from .sweep import plan as plan
from .sweep import sweep as sweep
