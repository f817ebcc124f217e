"""Runs: one forward or one generate of a model with hooks, and all that came of it.

    run = hk.forward(lm, ["I like oat milk in my"], hk.capture("resid_post.6"))
    run = hk.generate(lm, "The capital of France is", hk.force(" coffee", step=0), max_new_tokens=8)

Everything in a run is in the positions of each row's own text: column 0 is the row's first token, whatever the padding
was, and a shorter row is filled up at its end, where `run.mask` is False.

run         what came of it
asking      what both are asked
draws       the random numbers of a generate
forwarding  forward
generating  generate
"""

from .asking import Logits as Logits
from .asking import outside_inference_mode as outside_inference_mode
from .draws import Draws as Draws
from .forwarding import forward as forward
from .generating import generate as generate
from .generating import traced as traced
from .run import Run as Run
