"""Families of models: where the sites of each are.

places   what a row is made of
table    the rows
"""

from .places import Cut as Cut
from .places import Family as Family
from .places import Place as Place
from .places import cut as cut
from .table import FAMILIES as FAMILIES
