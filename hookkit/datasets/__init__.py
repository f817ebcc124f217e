"""Datasets that ship: pairs of prompts made from templates with a seed, for a model's own tokenizer.

    pairs = hk.datasets.indirect_object(lm, 50, seed=0)
    pairs.clean[0], pairs.corrupted[0], pairs.answers[0], pairs.wrong[0]
    pairs.check(lm)                  # does this model solve them? one row for each pair
    pairs.labels["S2"]               # where the second mention of the subject stands, in each prompt

indirect_object     "When Mary and John went to the store, John gave a drink to" → " Mary"
greater_than        "The war lasted from the year 1732 to the year 17" → "5", and not "2"
successor           "In order: Monday, Tuesday, Wednesday, Thursday," → " Friday"
induction           random tokens, repeated; needs no tokenizer
capitals            "The capital of France is the city of" → " Paris"
landmarks           "The Eiffel Tower is located in the city of" → " Paris"

Nothing is fetched. `python -m experiments.datasets` measures how many of each the default model solves.
"""

from .facts import capitals as capitals
from .facts import landmarks as landmarks
from .indirect import indirect_object as indirect_object
from .pairs import Pairs as Pairs
from .repeats import induction as induction
from .series import successor as successor
from .years import greater_than as greater_than
