"""Scenarios: four names for how a choice between next tokens can look, with the thresholds that decide between them.

very confident     the first token has at least 0.9 of the probability
two good options   the second has at least half of what the first has, and the two together at least 0.6
one clear winner   the first has at least 0.5
uncertain          all the rest: no token, and no pair of equals, has most of it

They are asked in this order, and the first that fits is the name. The thresholds are round numbers that sort positions
for a reader, no more: a study should use the columns `top1_prob`, `entropy` and `perplexity` themselves.
"""

import math

VERY_CONFIDENT = 0.9  # the first token's probability
HALF_AS_GOOD = 0.5  # the second's probability as a part of the first's
TOGETHER = 0.6  # the two tokens' probability
CLEAR = 0.5  # the first token's probability

UNKNOWN = "unknown"  # where the model's logits are NaN

SCENARIOS = ("very confident", "two good options", "one clear winner", "uncertain")


def scenario(first: float, second: float) -> str:
    """The name for a distribution whose two largest probabilities are these.

    >>> scenario(0.45, 0.4)
    'two good options'
    """
    confident, options, winner, uncertain = SCENARIOS
    if math.isnan(first) or math.isnan(second):
        return UNKNOWN
    if first >= VERY_CONFIDENT:
        return confident
    if second >= HALF_AS_GOOD * first and first + second >= TOGETHER:
        return options
    return winner if first >= CLEAR else uncertain
