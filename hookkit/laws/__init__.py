"""The laws that give each site its meaning, and the proof of them on a model: the user's own, or a tiny random one.

    hk.prove(lm)            a DataFrame: which law, at which site, how large the difference, whether it holds

A name means what the design says only where the laws that name it hold: what attention and MLP add is the stream, a
captured value put back changes nothing, an edit reaches the output, a row alone is the row in a padded batch.

study    a model with prompts, on which laws are tried
law      what a law is, and what it finds
looking  laws of a model that is only looked at
editing  laws of a model that is edited
reading  laws of a model that reads batches and writes
proving  all of them, tried
"""

from .proving import LAWS as LAWS
from .proving import UNTRIED as UNTRIED
from .proving import prove as prove
