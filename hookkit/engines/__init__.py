"""Engines: where the forwards of a harvest or of a sweep run: here, or on the actors of a Ray cluster.

steps       what is to be computed, and what is done with it, in order; computed here
travelling  a model, and the work that it is for, as bytes
cluster     hk.Ray: which actors, on which cluster
crew        the actors, and steps computed by them
"""

from .cluster import EngineLike as EngineLike
from .cluster import Ray as Ray
from .cluster import as_engine as as_engine
from .cluster import check_installed as check_installed
from .crew import computed as computed
from .steps import Step as Step
from .steps import Steps as Steps
from .steps import Work as Work
