"""The command line. Machine output and what was asked for go to standard output, messages to standard error.

hookkit trace "I like oat milk in my" --ban " coffee"
hookkit harvest texts.txt resid_post.6 --out folder
hookkit sweep ablations "I like oat milk in my" z --token " coffee"
hookkit diff default ./tuned "I like oat milk in my"

base        the program, and how it ends
engine      where a command computes
tracing     hookkit trace
examining   hookkit doctor
harvesting  hookkit harvest
sweeping    hookkit sweep
starting    hookkit new
results     hookkit run, hookkit show
differing   hookkit diff
"""

from .base import app as app
from .differing import diff as diff
from .examining import doctor as doctor
from .harvesting import harvest as harvest
from .results import run as run
from .results import show as show
from .starting import new as new
from .sweeping import ablations as ablations
from .sweeping import patching as patching
from .tracing import trace as trace
