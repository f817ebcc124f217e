"""Families of models: where the sites of each are.

places         what a row is made of
parts          parts that rows share
reasons        why a site is not there
llama_like     the rows of families that are built like llama
other_layouts  the rows of the others
table          model types and their rows
"""

from .places import Cut as Cut
from .places import Family as Family
from .places import Place as Place
from .places import cut as cut
from .table import FAMILIES as FAMILIES
