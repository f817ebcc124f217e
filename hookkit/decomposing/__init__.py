"""Where a logit comes from: exact sums over components, over dimensions, and the way from tokens to logits.

frozen      a norm with the scale of this very forward
components  what the stream is the sum of
direct      direct_logits, logit_terms, unembedding
path        logit_path
"""

from .direct import direct_logits as direct_logits
from .direct import logit_terms as logit_terms
from .direct import unembedding as unembedding
from .path import logit_path as logit_path
