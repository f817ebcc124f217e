"""Metrics: what a sweep, a patching grid or an attribution measures of each run.

    hk.patching(lm, clean, corrupted, "resid_post", metrics=hk.metrics.logit_diff(" Mary", " John"))
    hk.metrics.prob(" coffee").of(run)

The names are loaded when they are first used. `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
