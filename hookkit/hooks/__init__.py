"""Hooks: frozen values that say what to do at which sites and positions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["when"])
