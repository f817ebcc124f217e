"""hk.gradients: the values at many sites and a metric's gradient there, from one forward and one
backward. The weights are frozen meanwhile.

    result = hk.gradients(lm, prompts, hk.logit_diff(" Mary", " John"), "resid_pre")
    result.metric                     # [row]
    result.of("resid_pre.6")          # [row, pos, d_model]: how fast the metric rises per unit
    result.values("resid_pre.6")      # the values themselves
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..arguments import check_arguments
from ..display import render_html
from ..errors import BadHook, Unsupported
from ..hooks.base import EditHook, Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, Captures, LazyCapture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import LOGIT_SITES, AnySite, Site, Sites, SitesLike
from ..models.training import freeze_weights
from ..runs.forward import forward
from ..runs.run import Run
from ..sweeps.inputs import SweepInputs, read_inputs
from ..tables.metrics import Loss, Measure, Metric, MetricLike, Said, as_metrics

# The name of the captures that the attributions make, beside those of the user.
CAPTURE_NAME = "hookkit.gradients"


@dataclass(frozen=True, eq=False)
class PromptMetric:
    """A metric of some prompts, at the position that it reads."""

    lm: LM
    metric: Metric
    measure: Measure
    inputs: SweepInputs

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def reads_continuation(self) -> bool:
        """True if the metric reads a continuation after the prompts."""
        return isinstance(self.metric, Loss)

    def prompts(self, rows: Sequence[int]) -> list[list[int]]:
        """Returns the tokens that are run: whole prompts, with a continuation if there is one."""
        tokens = self.inputs.run_rows if self.reads_continuation else self.inputs.rows
        return [list(tokens[row]) for row in rows]

    def run(self, rows: Sequence[int], *hooks: Hook) -> Run:
        """Runs these prompts, with no more logits than the metric reads.

        Prompts of several lengths have all logits. Logits of the last position alone would need
        padding on the left, where a query sees no key and its pattern has no gradient.
        """
        prompts = self.prompts(rows)
        one_length = len({len(prompt) for prompt in prompts}) == 1
        last_only = one_length and not self.reads_continuation and not self.inputs.cropped
        for hook in hooks:
            if any(_is_logits(site) for site in hook.sites):
                last_only = False
        return forward(self.lm, prompts, *hooks, logits="last" if last_only else "all")

    def of_run(self, run: Run, rows: Sequence[int]) -> Float[Tensor, " row"]:
        """Returns the metric of a run of these prompts, differentiable if the run's logits are."""
        captured = run.captured_logits()
        lengths = [len(self.inputs.run_rows[row]) for row in rows]
        positions = []
        for row, length in zip(rows, lengths, strict=True):
            positions.append(length - self.inputs.read_counts[row])
        columns = [captured.column(index, position) for index, position in enumerate(positions)]
        logits = captured.values[torch.arange(len(rows)), torch.tensor(columns)]
        after = None
        if self.reads_continuation:
            after = []
            for index, (position, length) in enumerate(zip(positions, lengths, strict=True)):
                after.append(as_float(captured.values[index, position:length]))
        return self.measure(Said(as_float(logits), rows, after=after))


def as_float(values: Tensor) -> Tensor:
    """Returns values as float32, or as float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def bind_metric(lm: LM, prompts: Prompts, metric: MetricLike, pos: int = -1) -> PromptMetric:
    """Returns the metric of these prompts, checked against the model before anything runs."""
    metrics = as_metrics(metric)
    if len(metrics) != 1:
        raise BadHook(
            f"{len(metrics)} metrics were given, and a gradient is of one: call it once for each"
        )
    inputs = read_inputs(lm, prompts, metrics, pos)
    return PromptMetric(lm, metrics[0], metrics[0].bound(lm, len(inputs)), inputs)


@dataclass(frozen=True, eq=False)
class SiteGradients:
    """A metric with its gradient at some sites.

    `leaves` are the tensors of the computation at the sites.
    """

    metric: Float[Tensor, " row"]
    run: Run
    values: dict[AnySite, Captured]
    gradient: dict[AnySite, Tensor]
    leaves: dict[AnySite, Tensor]


def compute_gradients(
    prompt_metric: PromptMetric,
    rows: Sequence[int],
    sites: SitesLike,
    hooks: Sequence[Hook],
    *,
    keep_graph: bool = False,
) -> SiteGradients:
    """Returns the metric and its gradient at the sites, from one forward and one backward."""
    lm = prompt_metric.lm
    all_sites = _check_sites(lm.expand(sites))
    captures = capture(all_sites, grad=True, name=CAPTURE_NAME)
    with torch.inference_mode(False), torch.enable_grad(), freeze_weights(lm.model):
        run = prompt_metric.run(rows, *hooks, captures)
        metric = prompt_metric.of_run(run, rows)
        values = {site: run.captured(site, CAPTURE_NAME) for site in all_sites}
        leaves = {site: _leaf(captured) for site, captured in values.items()}
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if run.logits.requires_grad:  # otherwise they depend on none of the sites
            _check_metric(prompt_metric.metric, metric)
            gradients = torch.autograd.grad(
                metric.sum(), list(leaves.values()), allow_unused=True, retain_graph=keep_graph
            )
    is_edited = any(isinstance(hook, EditHook) for hook in hooks)
    checked = {}
    for site, gradient in zip(leaves, gradients, strict=True):
        checked[site] = _check_gradient(site, leaves[site], gradient, is_edited)
    return SiteGradients(metric.detach(), run, values, checked, leaves)


def _is_logits(site: AnySite) -> bool:
    return isinstance(site, Site) and site.name in LOGIT_SITES


def _check_sites(sites: Sites) -> Sites:
    for site in sites:
        if isinstance(site, Site) and site.name == "experts":
            raise Unsupported(
                f"{site} is the numbers of experts, which have no gradient: take 'router_logits'"
            )
    return sites


def _check_metric(metric: Metric, value: Tensor) -> None:
    if not value.requires_grad:
        raise Unsupported(
            f"the metric {metric.name} gives no gradient: it counts or compares, so that it does "
            "not change with small changes of the logits. Take hk.logit_diff, hk.logit, "
            "hk.logprob …, or a function of differentiable steps"
        )


def _leaf(captured: Captured) -> Tensor:
    if not captured.values.requires_grad:
        raise Unsupported(
            f"{captured.site} has shape {list(captured.values.shape)}, without axes batch and pos, "
            "and takes no part in the computation as a capture: name the input or output of "
            "another module"
        )
    return captured.values


def _check_gradient(
    site: AnySite, leaf: Tensor, gradient: Tensor | None, is_edited: bool
) -> Tensor:
    if gradient is None:
        if is_edited:  # an edit after the site may insert values that do not depend on it
            return torch.zeros_like(leaf)
        raise Unsupported(
            f"the metric does not depend on {site}: nothing that it is made of reads this site"
        )
    if not bool(gradient.isfinite().all()):
        raise Unsupported(
            f"the gradient at {site} has values that are not finite: the metric has no slope there "
            "(a logit of minus infinity, a probability of zero), or the model's dtype is too "
            "narrow; take hk.logit_diff, or float32"
        )
    return gradient


def detach(captured: Captured) -> Captured:
    """Returns the same values without the graph of their computation."""
    return replace(captured, values=captured.values.detach())


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raises `BadHook` if a keyword's value is none of the choices."""
    if value not in choices:
        raise BadHook(f"{name}={value!r} is unknown: say {' or '.join(map(repr, choices))}")


@dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """A metric of some prompts with its gradient at some sites.

    metric     [row], in the metric's own unit
    run        the forward, with the user's own captures
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
        """Returns the gradient at a site, in the shape of its values: of each row's metric with
        respect to the row's own values; zero at the padding of shorter rows."""
        return self.gradient.captured(site).values

    def values(self, site: str | AnySite) -> Shaped[Tensor, "row pos ..."]:
        """Returns the values at a site, with respect to which the metric was differentiated."""
        return self.captured(site).values

    def captured(self, site: str | AnySite) -> Captured:
        """Returns the values at a site with their rows and positions."""
        return self.kept.captured(site)

    def stack(self, name: str) -> Shaped[Tensor, "layer row pos ..."]:
        """Returns the gradients at every layer of a site, such as "resid_pre"."""
        return self.gradient.stack(name)

    def _repr_html_(self) -> str:
        numbers = {f"row {row}": value for row, value in enumerate(self.metric.tolist())}
        return render_html("Gradients of a metric", numbers | {"at": self.sites})

    def __repr__(self) -> str:
        metric = [round(value, 4) for value in self.metric.tolist()]
        return f"Gradients(metric {metric}; at {self.sites})"


@check_arguments
def gradients(
    lm: LM, prompts: Prompts, metric: MetricLike, sites: SitesLike, *hooks: Hook, pos: int = -1
) -> Gradients:
    """Returns the metric of each prompt and its gradient at these sites: how fast the metric rises
    with each value there, through everything after the site (Simonyan et al. 2013).

    It takes one forward and one backward for any number of sites. The weights are frozen meanwhile
    and get no gradient. `metric` is one of hookkit's or a function of the logits [row, vocab]; it
    reads position `pos` of each prompt. Hooks act as in `forward`, and a site's gradient is taken
    after all hooks at this site. Raises `Unsupported` for a metric without a gradient (`rank`), and
    for a site on which the metric does not depend.

    >>> prompt, metric = "I like oat milk in my", logit_diff(" coffee", " tea")
    >>> result = gradients(lm, prompt, metric, ["embed", "resid_pre.6"])
    >>> result.of("resid_pre.6").shape
    torch.Size([1, 6, 576])
    """
    prompt_metric = bind_metric(lm, prompts, metric, pos)
    if prompt_metric.reads_continuation and hooks:
        raise Unsupported(
            "loss reads a continuation after the prompt, where the positions of hooks would count "
            "from its end: leave the hooks out, or take hk.logprob of the token that is meant"
        )
    result = compute_gradients(prompt_metric, range(len(prompt_metric)), sites, hooks)
    values = {site: detach(captured) for site, captured in result.values.items()}
    slopes = {}
    for site, captured in values.items():
        slopes[site] = replace(captured, values=result.gradient[site])
    run = _without_graph(result.run, hooks)
    return Gradients(result.metric, run, _as_captures(values), _as_captures(slopes))


def _as_captures(values: Mapping[AnySite, Captured]) -> Captures:
    slots = [LazyCapture(site, CAPTURE_NAME, None, captured) for site, captured in values.items()]
    return Captures(tuple(slots))


def _without_graph(run: Run, hooks: tuple[Hook, ...]) -> Run:
    """Returns the run without the graph of its computation, which would keep it all in memory."""
    slots = []
    for slot in run.kept.slots:
        if slot.name != CAPTURE_NAME:
            slots.append(LazyCapture(slot.site, slot.name, None, slot.captured()))
    logits = detach(run.captured_logits())
    return replace(run, hooks=hooks, kept=Captures(tuple(slots)), kept_logits=logits, output=None)
