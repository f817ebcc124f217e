# ruff: noqa: I001 - commands stand in the help in the order in which they are imported
"""The command line. What was asked for goes to standard output, messages to standard error.

    hookkit scan "The Eiffel Tower is in the city of"
    hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3
    hookkit trace "I like oat milk in my" --ban " coffee"
    hookkit diff default ./tuned "I like oat milk in my"

gathering   options that stand together in a dataclass
base        the program, and how its commands end
printing    tables, clean text, CSV, JSON, pages
options     which model, prompts, hooks, generation
engine      where a command computes
reading     hookkit ranks, lens, direct, surprisal
asking      what to ask next
scanning    hookkit scan
shifting    hookkit shift
generating  hookkit generate, compare, steer
tracing     hookkit trace
sweeping    hookkit patch, sweep
harvesting  hookkit harvest
differing   hookkit diff
examining   hookkit sites, doctor
storing     hookkit models
starting    hookkit new
results     hookkit run, show
"""

from .base import app as app
from .scanning import scan as scan
from .reading import ranks as ranks
from .reading import lens as lens
from .reading import direct as direct
from .reading import surprisal as surprisal
from .shifting import shift as shift
from .generating import generate as generate
from .generating import compare as compare
from .generating import steer as steer
from .tracing import trace as trace
from .sweeping import patch as patch
from .sweeping import ablations as ablations
from .sweeping import patching as patching
from .harvesting import harvest as harvest
from .differing import diff as diff
from .examining import sites as sites
from .examining import doctor as doctor
from .storing import list_models as list_models
from .starting import new as new
from .results import run as run
from .results import show as show
