"""Lenses: what the model would say of a state in its midst, through its own final norm, head and cap.

tail        what comes behind the blocks, for any state
numbers     what is read off many logits at once
lens        logit_lens, lens_summary
tuned       train_lens, load_lens, TunedLens
patchscope  patchscope
"""

from .lens import lens_summary as lens_summary
from .lens import logit_lens as logit_lens
from .patchscope import patchscope as patchscope
from .tuned import TunedLens as TunedLens
from .tuned import load_lens as load_lens
from .tuned import train_lens as train_lens
