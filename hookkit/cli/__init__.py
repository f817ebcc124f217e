# ruff: noqa: I001 - the help lists the commands in the order of these imports
"""The command line. Results go to standard output, messages to standard error.

    hookkit scan "The Eiffel Tower is in the city of"
    hookkit shift "I like oat milk in my" --force " coffee" --ablate z.9.3
    hookkit trace "I like oat milk in my" --ban " coffee"
    hookkit diff default ./tuned "I like oat milk in my"

app             the program, and how its commands end
options         the options that commands share: model, prompts, hooks, generation, engine
output          tables, plain text, CSV, JSON and pages
inspect_prompt  hookkit scan, ranks, lens, direct, surprisal
intervene       hookkit shift, patch, sweep, diff
generate_text   hookkit generate, compare, steer, trace
models          hookkit sites, doctor, models, harvest, dictionary, feature, eval
experiments     hookkit new, run, show
"""

from .app import app as app
from . import inspect_prompt as inspect_prompt
from . import intervene as intervene
from . import generate_text as generate_text
from . import models as models
from . import experiments as experiments
