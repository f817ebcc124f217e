"""Vectors that are learnt: gradient descent on what is added at one site, every weight of the model frozen.

vector = hk.fit_vector(lm, "resid_post.12", prompts, hk.logit_diff(" good", " bad"), dose=0.3)
vector = hk.fit_vector(lm, "resid_post.12", prompts, [" a joy to watch.", " lovely and warm."])
vector.about["curve"]           # what the target was before each step, and after the last
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import checks_arguments
from ..errors import BadHook
from ..hooks.base import number
from ..metrics import MetricLike
from ..model import LM
from ..positions import PosLike
from ..prompts import Prompts
from ..sites import AnySite
from ..training import frozen, warn_of_dropout
from .aiming import Aim, aim
from .origin import data_hash, model_words
from .streams import BATCH, streams, typical
from .vector import Vector


@checks_arguments
def fit_vector(
    lm: LM,
    site: str | AnySite,
    prompts: Prompts,
    target: MetricLike | str | list[str],
    *,
    pos: PosLike = None,
    steps: int = 50,
    lr: float = 0.02,
    dose: float | None = None,
    seed: int | None = None,
    batch: int = BATCH,
    progress: bool | None = None,
) -> Vector:
    """The vector that moves a target most when it is added at a site, found by gradient descent with the model's
    weights frozen (Subramani et al. 2022).

    target    a metric whose mean over the prompts is to rise, at their last token (`hk.logit_diff`, `hk.logprob` …, a
              function of the logits); or continuations, one text for all prompts or one for each, whose loss is to fall
    pos       where the vector is added: everywhere, on a continuation too; or at these positions of each prompt
    lr        about how far one of the `steps` of Adam goes, as a fraction of the stream's median length there
    dose      the longest that the vector may become, as such a fraction; without it nothing holds it
    seed      without one, the vector begins at zero; with one, at a random vector as long as a step
    batch     prompts that run together: memory does not grow with the others
    progress  True or False; left out, a bar is shown in a terminal

    The same call gives the same numbers. `about["curve"]` has the target's mean before each step and after the last, in
    its own units. `BadHook` where the target has no slope to follow.

    >>> fitted = fit_vector(lm, "resid_post.20", ["I take my tea with"], logprob(" sugar"), steps=2, progress=False)
    >>> fitted.about["curve"][-1] > fitted.about["curve"][0]
    True
    """
    if steps < 1 or number(lr, "lr") <= 0:
        raise BadHook(f"steps={steps!r} and lr={lr!r}: give 1 step or more, and a step longer than 0")
    if dose is not None and number(dose, "dose") <= 0:
        raise BadHook(f"dose={dose}: give the longest that the vector may become, as a fraction of the stream's length")
    aimed = aim(lm, site, prompts, target, pos)
    rows = aimed.reading.rows
    stream = streams(lm, rows, [aimed.site], pos, batch)[aimed.site]
    norm, width = typical(stream.lengths), stream.means.shape[1]
    warn_of_dropout(lm)
    with torch.inference_mode(False), frozen(lm.root):
        start = torch.zeros(width)
        if seed is not None:
            start = Vector(aimed.site, torch.ones(width), norm).random(seed=seed).unit().tensor * (lr * norm)
        descent = Descent(aimed, steps, lr * norm / width**0.5, None if dose is None else dose * norm, batch)
        vector, curve = descent.run(start, progress)
    about = {**model_words(lm), "method": "learnt", "pos": repr(pos), "target": aimed.words, "prompts": [len(rows)]}
    about |= {"data_sha256": data_hash(rows, aimed.reading.fed), "steps": steps, "lr": lr, "dose": dose, "seed": seed}
    return Vector(aimed.site, vector, norm, {**about, "curve": curve})


@dataclass(frozen=True, eq=False)
class Descent:
    """Steps of Adam towards an aim: how many, how large in each number, how long the vector may become."""

    aim: Aim
    steps: int
    lr: float
    longest: float | None
    batch: int

    def run(self, start: Float[Tensor, " d"], progress: bool | None) -> tuple[Float[Tensor, " d"], list[float]]:
        """The vector after the last step, and the target's mean before each step and at the end."""
        vector = start.to(self.aim.lm.device).clone().requires_grad_()
        adam = torch.optim.Adam([vector], lr=self.lr)
        curve: list[float] = []
        shown = None if progress is None else not progress
        for _ in tqdm(range(self.steps), unit="step", disable=shown):
            value, slope = self._mean(vector)
            curve.append(value)
            if not bool(slope.any()):
                raise BadHook(
                    f"{self.aim.words} does not change with a vector at {self.aim.site}, so that there is no slope to "
                    "follow: add it where the target's position reads it, or (for kl, flat at the start) give seed="
                )
            vector.grad = slope if self.aim.falls else -slope
            adam.step()
            if self.longest is not None:
                with torch.no_grad():
                    vector *= (self.longest / vector.norm().clamp(min=1e-30)).clamp(max=1)
        with torch.no_grad():
            curve.append(sum(float(self.aim.values(vector, rows).sum()) for rows in self._batches()) / self._count)
        return vector.detach(), curve

    def _mean(self, vector: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """The target's mean over the prompts, and its gradient."""
        value, slope = 0.0, torch.zeros_like(vector)
        for rows in self._batches():
            part, gradient = self.aim.gradient(vector, rows)
            value, slope = value + float(part), slope + gradient
        return value / self._count, slope / self._count

    @property
    def _count(self) -> int:
        return len(self.aim.reading)

    def _batches(self) -> Sequence[range]:
        return [range(at, min(at + self.batch, self._count)) for at in range(0, self._count, self.batch)]
