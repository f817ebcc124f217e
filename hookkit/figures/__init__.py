"""Figures: from the tables of hookkit to matplotlib Figures. No module here imports torch.

    hk.figures.heat_map(table, value="prob_effect").savefig("effect.png")

The names are loaded when they are first used. The catalogue is in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
