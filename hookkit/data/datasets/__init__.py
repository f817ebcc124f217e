"""Prompt pairs for experiments, made from templates for a model's tokenizer; texts with labels.

pairs = hk.datasets.indirect_object(lm, 50)
pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong
table = hk.datasets.labelled("96_spam_is", 200)   # columns text and label, for hk.fit_probe
"""

from .labelled_texts import labelled as labelled
from .labelled_texts import labelled_names as labelled_names
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
    "labelled",
    "labelled_names",
    "landmarks",
    "successor",
]


def __dir__() -> list[str]:
    return __all__
