# ruff: noqa: I001 - the help lists the commands in the order of these imports
"""The command line. Results go to standard output, messages to standard error.

    hookkit scan "The Eiffel Tower is in the city of"
    hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3
    hookkit trace "I like oat milk in my" --ban " coffee"
    hookkit diff default ./tuned "I like oat milk in my"

app             the program, and how its commands end
options         the options that commands share: model, prompts, hooks, generation, engine
output          tables, plain text, CSV, JSON and pages
scan            hookkit scan
inspect_prompt  hookkit ranks, lens, direct, surprisal
intervene       hookkit shift, patch, sweep, diff
generate        hookkit generate, compare, steer, trace
models          hookkit sites, doctor, models, harvest
experiments     hookkit new, run, show
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
