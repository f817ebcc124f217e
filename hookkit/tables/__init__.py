"""Tables of runs, as DataFrames: ranks, shifts, uncertainty, surprisal, decoding, metrics."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["metrics"])
