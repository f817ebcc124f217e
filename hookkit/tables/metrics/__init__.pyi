# The metrics. `__init__.py` reads this file.

from .metric import Metric as Metric
from .metric import MetricInput as MetricInput
from .metric import entropy as entropy
from .metric import kl as kl
from .metric import loss as loss
from .metric import top1_changed as top1_changed
from .token_metrics import logit as logit
from .token_metrics import logit_diff as logit_diff
from .token_metrics import logprob as logprob
from .token_metrics import prob as prob
from .token_metrics import rank as rank
