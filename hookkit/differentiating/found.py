"""hk.gradients: what is at many sites and the metric's gradient there, in one forward and one backward.

found = hk.gradients(lm, prompts, hk.logit_diff(" Mary", " John"), "resid_pre")
found.metric                     # [row]
found.of("resid_pre.6")          # [row, pos, d_model]: by how much the metric rises with each number
found.values("resid_pre.6")      # the numbers themselves
"""

from dataclasses import dataclass, replace

from jaxtyping import Float, Shaped
from torch import Tensor

from ..arguments import checks_arguments
from ..captured import Captured, Kept, Slot
from ..displaying import shown
from ..errors import Unsupported
from ..hooks.base import Hook
from ..metrics import MetricLike
from ..model import LM
from ..prompts import Prompts
from ..runs import Run
from ..sites import AnySite, Sites, SitesLike
from .backward import OWN, Derived, derived, detached, question


@dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """A metric of some prompts with its gradient at some sites.

    metric     [row]      in the metric's own unit
    run                   the forward that it is of, with what the user's own captures kept
    """

    metric: Float[Tensor, " row"]
    run: Run
    kept: Kept
    gradient: Kept

    @property
    def sites(self) -> Sites:
        """The sites that have a gradient."""
        return self.gradient.sites

    def of(self, site: str | AnySite) -> Shaped[Tensor, "row pos ..."]:
        """The gradient at a site, of the shape of its values: each row's metric by each of the row's own numbers; zero
        where a shorter row was filled up."""
        return self.gradient.captured(site).values

    def values(self, site: str | AnySite) -> Shaped[Tensor, "row pos ..."]:
        """What is at the site: the numbers by which the metric was differentiated."""
        return self.captured(site).values

    def captured(self, site: str | AnySite) -> Captured:
        """The same, with rows and positions."""
        return self.kept.captured(site)

    def stack(self, name: str) -> Shaped[Tensor, "layer row pos ..."]:
        """The gradients at every layer of a site, such as "resid_pre"."""
        return self.gradient.stack(name)

    def _repr_html_(self) -> str:
        numbers = {f"row {row}": value for row, value in enumerate(self.metric.tolist())}
        return shown("Gradients of a metric", numbers | {"at": self.sites})

    def __repr__(self) -> str:
        return f"Gradients(metric {[round(value, 4) for value in self.metric.tolist()]}; at {self.sites})"


@checks_arguments
def gradients(lm: LM, prompts: Prompts, metric: MetricLike, sites: SitesLike, *hooks: Hook, pos: int = -1) -> Gradients:
    """The metric of each prompt and its gradient at these sites: how fast it rises with each number there, all that
    comes behind the site taken along (Simonyan et al. 2013).

    One forward and one backward, whatever the number of sites; the weights are frozen for the while, and get no
    gradient. `metric` is one of hookkit's or a function of the logits [row, vocab]; it looks at position `pos` of each
    prompt. Hooks act as in `forward`, and a site's gradient is at the place in their order behind all of them.
    `Unsupported` for a metric without a slope (`rank`), and at a site on which it does not depend.

    >>> found = gradients(lm, "I like oat milk in my", logit_diff(" coffee", " tea"), ["embed", "resid_pre.6"])
    >>> found.of("resid_pre.6").shape
    torch.Size([1, 6, 576])
    """
    asked = question(lm, prompts, metric, pos)
    if asked.reads_on and hooks:
        raise Unsupported(
            "loss reads a continuation behind the prompt, where the positions of hooks would count from its end: leave "
            "the hooks out, or take hk.logprob of the token that is meant"
        )
    return _given(derived(asked, range(len(asked)), sites, hooks), hooks)


def _given(found: Derived, hooks: tuple[Hook, ...]) -> Gradients:
    """What was found, without the graph of the computation, which would hold all of it in memory."""
    values = {site: detached(captured) for site, captured in found.values.items()}
    slopes = {site: replace(values[site], values=found.gradient[site]) for site in values}
    kept, gradient = (
        Kept(tuple(Slot(site, OWN, None, each) for site, each in some.items())) for some in (values, slopes)
    )
    mine = tuple(Slot(slot.site, slot.name, None, slot.captured()) for slot in found.run.kept.slots if slot.name != OWN)
    logits = detached(found.run.captured_logits())
    run = replace(found.run, hooks=hooks, kept=Kept(mine), kept_logits=logits, output=None)
    return Gradients(found.metric, run, kept, gradient)
