"""Prompt pairs for experiments, made from templates for a model's tokenizer.

pairs = hk.datasets.indirect_object(lm, 50)
pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong
"""

from .pairs import Pairs as Pairs
from .tasks import capitals as capitals
from .tasks import greater_than as greater_than
from .tasks import indirect_object as indirect_object
from .tasks import induction as induction
from .tasks import landmarks as landmarks
from .tasks import successor as successor

__all__ = [
    "Pairs",
    "capitals",
    "greater_than",
    "indirect_object",
    "induction",
    "landmarks",
    "successor",
]


def __dir__() -> list[str]:
    return __all__
