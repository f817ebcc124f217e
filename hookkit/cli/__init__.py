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

from .app import app as app
from .scan import scan as scan
from .inspect_prompt import ranks as ranks
from .inspect_prompt import lens as lens
from .inspect_prompt import direct as direct
from .inspect_prompt import surprisal as surprisal
from .intervene import shift as shift
from .generate import generate as generate
from .generate import compare as compare
from .generate import steer as steer
from .generate import trace as trace
from .intervene import patch as patch
from .intervene import ablations as ablations
from .intervene import patching as patching
from .models import harvest as harvest
from .intervene import diff as diff
from .models import sites as sites
from .models import doctor as doctor
from .models import list_models as list_models
from .experiments import new as new
from .experiments import run as run
from .experiments import show as show
