"""One forward and one backward: a metric's gradient at many sites, with the weights frozen for the while.

hk.gradients: what is at many sites and the metric's gradient there, in one forward and one backward.

found = hk.gradients(lm, prompts, hk.logit_diff(" Mary", " John"), "resid_pre")
found.metric                     # [row]
found.of("resid_pre.6")          # [row, pos, d_model]: by how much the metric rises with each number
found.values("resid_pre.6")      # the numbers themselves
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..arguments import checks_arguments
from ..display import shown
from ..errors import BadHook, Unsupported
from ..hooks.base import EditHook, Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, Captures, LazyCapture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import LOGITS, AnySite, Site, Sites, SitesLike
from ..models.training import frozen
from ..runs.forward import forward
from ..runs.run import Run
from ..sweeps.inputs import SweepInputs, read
from ..tables.metrics import Loss, Measure, Metric, MetricLike, Said, as_metrics

OWN = "hookkit.gradients"  # the name of the capture whose values are differentiated by


@dataclass(frozen=True, eq=False)
class Question:
    """A metric of some prompts, at the position at which it looks."""

    lm: LM
    metric: Metric
    measure: Measure
    reading: SweepInputs

    def __len__(self) -> int:
        return len(self.reading)

    @property
    def reads_on(self) -> bool:
        """True where the metric reads a continuation behind the prompts."""
        return isinstance(self.metric, Loss)

    def prompts(self, rows: Sequence[int]) -> list[list[int]]:
        """What is run of these prompts: all of each, and its continuation if the metric reads one."""
        of = self.reading.fed if self.reads_on else self.reading.rows
        return [list(of[row]) for row in rows]

    def run(self, rows: Sequence[int], *hooks: Hook) -> Run:
        """A forward of these prompts, with no more logits than the metric reads.

        Prompts of several lengths have them all: logits of the last position alone would have the padding on the left,
        where a query sees no key and its pattern no slope.
        """
        prompts = self.prompts(rows)
        last = len(set(map(len, prompts))) == 1 and not self.reads_on and not self.reading.cropped
        at_head = any(_at_head(site) for hook in hooks for site in hook.sites)
        return forward(self.lm, prompts, *hooks, logits="last" if last and not at_head else "all")

    def asked_of(self, run: Run, rows: Sequence[int]) -> Float[Tensor, " row"]:
        """The metric of a run of these prompts, differentiable where the run's logits are."""
        kept = run.captured_logits()
        ends = [len(self.reading.fed[row]) - self.reading.looks[row] for row in rows]
        picked = [kept.column(number, end) for number, end in enumerate(ends)]
        logits = kept.values[torch.arange(len(rows)), torch.tensor(picked)]
        after = None
        if self.reads_on:
            after = [
                wide(kept.values[n, end : len(self.reading.fed[row])])
                for n, (row, end) in _each(rows, ends)
            ]
        return self.measure(Said(wide(logits), rows, after=after))


def _each(rows: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    return enumerate(zip(rows, ends, strict=True))


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where the values are."""
    return values if values.dtype == torch.float64 else values.float()


def question(lm: LM, prompts: Prompts, metric: MetricLike, pos: int = -1) -> Question:
    """What is asked of these prompts, held against the model before anything runs."""
    found = as_metrics(metric)
    if len(found) != 1:
        raise BadHook(
            f"{len(found)} metrics were given, and a gradient is of one: call it once for each"
        )
    reading = read(lm, prompts, found, pos)
    return Question(lm, found[0], found[0].bound(lm, len(reading)), reading)


@dataclass(frozen=True, eq=False)
class Derived:
    """A metric with its gradient at some sites. `leaves` are the sites' values as the computation has them."""

    metric: Float[Tensor, " row"]
    run: Run
    values: dict[AnySite, Captured]
    gradient: dict[AnySite, Tensor]
    leaves: dict[AnySite, Tensor]


def derived(
    asked: Question,
    rows: Sequence[int],
    sites: SitesLike,
    hooks: Sequence[Hook],
    *,
    keep_graph: bool = False,
) -> Derived:
    """The metric of these prompts and its gradient at the sites, in one forward and one backward."""
    chosen = _differentiable(asked.lm.expand(sites))
    own = capture(chosen, grad=True, name=OWN)
    with torch.inference_mode(False), torch.enable_grad(), frozen(asked.lm.model):
        run = asked.run(rows, *hooks, own)
        metric = asked.asked_of(run, rows)
        captured = {site: run.captured(site, OWN) for site in chosen}
        leaves = {site: _leaf(found) for site, found in captured.items()}
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if run.logits.requires_grad:  # else nothing that was captured reaches them
            _check_metric(asked.metric, metric)
            found = torch.autograd.grad(
                metric.sum(), list(leaves.values()), allow_unused=True, retain_graph=keep_graph
            )
    edited = any(isinstance(hook, EditHook) for hook in hooks)
    given = zip(leaves.items(), found, strict=True)
    gradient = {site: _checked(site, leaf, grad, edited) for (site, leaf), grad in given}
    return Derived(metric.detach(), run, captured, gradient, leaves)


def _at_head(site: AnySite) -> bool:
    return isinstance(site, Site) and site.name in LOGITS


def _differentiable(sites: Sites) -> Sites:
    for site in sites:
        if isinstance(site, Site) and site.name == "experts":
            raise Unsupported(
                f"{site} is the numbers of experts, which have no gradient: take 'router_logits'"
            )
    return sites


def _check_metric(metric: Metric, value: Tensor) -> None:
    if not value.requires_grad:
        raise Unsupported(
            f"the metric {metric.name} gives no gradient: it counts or compares, so that it does not change with small "
            "changes of the logits. Take hk.logit_diff, hk.logit, hk.logprob …, or a function of differentiable steps"
        )


def _leaf(found: Captured) -> Tensor:
    if not found.values.requires_grad:
        raise Unsupported(
            f"{found.site} has shape {list(found.values.shape)}, without axes batch and pos, and takes no part in the "
            "computation as a capture: name the input or output of another module"
        )
    return found.values


def _checked(site: AnySite, leaf: Tensor, gradient: Tensor | None, edited: bool) -> Tensor:
    if gradient is None:
        if edited:  # an edit stands between: what it puts in does not depend on the site
            return torch.zeros_like(leaf)
        raise Unsupported(
            f"the metric does not depend on {site}: nothing that it is made of reads this place"
        )
    if not bool(gradient.isfinite().all()):
        raise Unsupported(
            f"the gradient at {site} has values that are not finite: the metric has no slope there (a logit of minus "
            "infinity, a probability of zero), or the model's dtype is too narrow; take hk.logit_diff, or float32"
        )
    return gradient


def detached(found: Captured) -> Captured:
    """The same values by themselves, without the computation that they were part of."""
    return replace(found, values=found.values.detach())


def one_of(word: str, given: Any, *known: str) -> None:
    """Raise `BadHook` for a keyword's value that is none of these."""
    if given not in known:
        raise BadHook(f"{word}={given!r} is unknown: say {' or '.join(map(repr, known))}")


@dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """A metric of some prompts with its gradient at some sites.

    metric     [row]      in the metric's own unit
    run                   the forward that it is of, with what the user's own captures kept
    """

    metric: Float[Tensor, " row"]
    run: Run
    kept: Captures
    gradient: Captures

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
def gradients(
    lm: LM, prompts: Prompts, metric: MetricLike, sites: SitesLike, *hooks: Hook, pos: int = -1
) -> Gradients:
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
        Captures(tuple(LazyCapture(site, OWN, None, each) for site, each in some.items()))
        for some in (values, slopes)
    )
    mine = tuple(
        LazyCapture(slot.site, slot.name, None, slot.captured())
        for slot in found.run.kept.slots
        if slot.name != OWN
    )
    logits = detached(found.run.captured_logits())
    run = replace(found.run, hooks=hooks, kept=Captures(mine), kept_logits=logits, output=None)
    return Gradients(found.metric, run, kept, gradient)
