"""Model against model: two models with one vocabulary on the same prompts, or one model in two states.

pairing     whether they read the same tokens, and which sites they have in common
cka         linear CKA, of rows that come a batch at a time
alike       how alike two models are at a site
saying      what both say after each token
reading     the forwards, a batch and some sites at a time
difference  Difference
drawing     the figures
page        the page
running     diff
"""

from .difference import Difference as Difference
from .running import diff as diff
