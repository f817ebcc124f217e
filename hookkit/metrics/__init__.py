"""Metrics: from what the model says to one number for each prompt.

    diff = hk.logit_diff(" Mary", " John")
    diff(run)                                   # [row], of a run
    hk.sweep(lm, prompts, grid, hooks, diff)    # of every cell of a sweep

A token is text or an id. A tuple of tokens means several answers that all count; a list has an entry for each prompt.
Any function of the logits [row, vocab] that gives a number for each row is a metric as well.

metric      what a metric is, and what it is given
answers     the tokens that a metric is of
tokens      logit_diff, logit, logprob, prob, rank
wholes      entropy, kl, top1_changed
continuing  loss
given       one or several, or a user's function
"""

from .continuing import Loss as Loss
from .continuing import loss as loss
from .given import MetricLike as MetricLike
from .given import OfLogits as OfLogits
from .given import as_metrics as as_metrics
from .given import columns as columns
from .metric import Measure as Measure
from .metric import Metric as Metric
from .metric import Said as Said
from .metric import last_logits as last_logits
from .tokens import logit as logit
from .tokens import logit_diff as logit_diff
from .tokens import logprob as logprob
from .tokens import prob as prob
from .tokens import rank as rank
from .wholes import entropy as entropy
from .wholes import kl as kl
from .wholes import top1_changed as top1_changed
