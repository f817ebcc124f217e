"""hk.gradients: the values at many sites and a metric's gradient there, from one forward and one
backward. The weights are frozen meanwhile.

    result = hk.gradients(lm, prompts, hk.metrics.logit_diff(" Mary", " John"), "resid_pre")
    result.metric                     # [row]
    result.of("resid_pre.6")          # [row, pos, d_model]: how fast the metric rises per unit
    result.values("resid_pre.6")      # the values themselves
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..arguments import check_arguments, check_integer, shorten
from ..display import describe_outcome, render_html
from ..errors import BadHook, Unsupported
from ..hooks.base import EditHook, Hook
from ..hooks.capture import Captured, Captures, LazyCapture, capture
from ..hooks.edits import edit
from ..models.lm import LM
from ..models.model_setup import freeze_weights
from ..models.prompts import Prompts
from ..models.sites import LOGIT_SITES, AnySite, Site, Sites, SitesLike, has_name
from ..runs.forward import forward
from ..runs.run import Run
from ..sweeps.cells import as_hooks
from ..sweeps.grids import check_pairs
from ..sweeps.inputs import SweepInputs, read_inputs
from ..tables.metrics.metric import Loss, Measure, Metric, MetricInput, MetricLike, as_metrics

# The name of the captures that the attributions make, beside those of the user.
CAPTURE_NAME = "hookkit.gradients"

EMBED = Site("embed")

Points: TypeAlias = Literal["start", "middle"]
"""Where the gradient is taken in each of the equal parts of a path between embeddings."""


@dataclass(frozen=True, eq=False)
class PromptMetric:
    """A metric of some prompts, at the position that it reads.

    rows   the prompts of `inputs` that are run; one may be there several times
    hooks  act in every run
    """

    metric: Metric
    measure: Measure
    inputs: SweepInputs
    rows: Sequence[int]
    hooks: tuple[Hook, ...] = ()

    @property
    def lm(self) -> LM:
        """The model of the prompts."""
        return self.inputs.lm

    @property
    def reads_continuation(self) -> bool:
        """True if the metric reads a continuation after the prompts."""
        return isinstance(self.metric, Loss)

    def batches(self, size: int) -> Iterator[PromptMetric]:
        """Yields the prompts that run together: all of them if hooks may name rows."""
        size = len(self.rows) if self.hooks else size
        for start in range(0, len(self.rows), size):
            yield replace(self, rows=self.rows[start : start + size])

    def with_values(self, site: Site, values: Tensor) -> PromptMetric:
        """Returns the metric of the same prompts with other values at a site."""
        return replace(self, hooks=(edit(site, lambda _: values), *self.hooks))

    def run(self, *hooks: Hook) -> Run:
        """Runs the prompts, with a continuation if there is one, and no more logits than the metric
        reads.

        Prompts of several lengths have all logits. Logits of the last position alone would need
        padding on the left, where a query sees no key and its pattern has no gradient.
        """
        tokens = self.inputs.rows
        if self.reads_continuation:
            tokens = self.inputs.run_rows
        prompts = [tokens[row] for row in self.rows]
        logits = "all"
        if self._reads_last_only(prompts, (*self.hooks, *hooks)):
            logits = "last"
        return forward(self.lm, prompts, *self.hooks, *hooks, logits=logits)

    def _reads_last_only(self, prompts: Sequence[Sequence[int]], hooks: Iterable[Hook]) -> bool:
        """True if the metric and the hooks read no logits but those of the last position."""
        if self.reads_continuation or self.inputs.cropped or len(set(map(len, prompts))) > 1:
            return False
        sites = itertools.chain.from_iterable(hook.sites for hook in hooks)
        return not any(has_name(site, *LOGIT_SITES) for site in sites)

    def of_run(self, run: Run) -> Float[Tensor, " row"]:
        """Returns the metric of a run of the prompts, differentiable if the run's logits are."""
        captured, inputs = run.captured_logits(), self.inputs
        lengths = [len(inputs.run_rows[row]) for row in self.rows]
        starts = [len(inputs.run_rows[row]) - inputs.read_counts[row] for row in self.rows]
        columns = list(map(captured.column, range(len(starts)), starts))
        logits = captured.values[torch.arange(len(columns)), torch.tensor(columns)]
        after = None
        if self.reads_continuation:
            after = []
            for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                after.append(as_float(captured.values[index, start:length]))
        return self.measure(MetricInput(as_float(logits), self.rows, after=after))


def as_float(values: Tensor) -> Tensor:
    """Returns values as float32, or as float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def bind_metric(
    lm: LM, prompts: Prompts, metric: MetricLike, pos: int = -1, hooks: Sequence[Hook] = ()
) -> PromptMetric:
    """Returns the metric of these prompts, checked against the model before anything runs."""
    metrics = as_metrics(metric)
    if len(metrics) != 1:
        raise BadHook(
            f"{len(metrics)} metrics were given, and a gradient is of one: call it once for each"
        )
    inputs = read_inputs(lm, prompts, metrics, pos)
    measure = metrics[0].bind(lm, len(inputs))
    return PromptMetric(metrics[0], measure, inputs, range(len(inputs)), tuple(hooks))


def bind_pair(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metric: MetricLike,
    direction: Literal["denoise", "noise"],
    hooks: Hook | Sequence[Hook],
) -> tuple[PromptMetric, PromptMetric]:
    """Returns the metric of the prompts that are patched (target) and of those patched from
    (source), with hooks that act in both. "denoise" patches the corrupted prompts."""
    lm.refuse_engine("effects of sites were asked for")
    target, source = clean, corrupted
    if direction == "denoise":
        target, source = corrupted, clean
    check_pairs(lm, source, target)
    base_hooks = as_hooks(hooks)
    target_metric = bind_metric(lm, target, metric, hooks=base_hooks)
    if target_metric.reads_continuation:
        raise Unsupported(
            "loss reads a continuation, and attribution is of prompts in pairs: take "
            "hk.metrics.logprob of its first token"
        )
    return target_metric, bind_metric(lm, source, metric, hooks=base_hooks)


@dataclass(frozen=True, eq=False)
class SiteGradients:
    """A metric with its gradient at some sites. The values have the graph of the computation."""

    metric: Float[Tensor, " row"]
    run: Run
    values: dict[AnySite, Captured]
    gradient: dict[AnySite, Tensor]


def compute_gradients(
    prompt_metric: PromptMetric, sites: SitesLike, *hooks: Hook, keep_graph: bool = False
) -> SiteGradients:
    """Returns the metric and its gradient at the sites, from one forward and one backward."""
    lm = prompt_metric.lm
    all_sites = lm.expand(sites)
    _refuse_experts(all_sites)
    captures = capture(all_sites, grad=True, name=CAPTURE_NAME)
    with torch.inference_mode(False), torch.enable_grad(), freeze_weights(lm.model):
        run = prompt_metric.run(*hooks, captures)
        metric = prompt_metric.of_run(run)
        values = read_captures(run, all_sites)
        leaves = list(map(_leaf, values.values()))
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if run.logits.requires_grad:  # otherwise they depend on none of the sites
            _require_gradient(metric, prompt_metric.metric)
            gradients = torch.autograd.grad(
                metric.sum(), leaves, allow_unused=True, retain_graph=keep_graph
            )
    is_edited = any(isinstance(hook, EditHook) for hook in (*prompt_metric.hooks, *hooks))
    checked: dict[AnySite, Tensor] = {}
    for site, leaf, gradient in zip(values, leaves, gradients, strict=True):
        if gradient is None and is_edited:
            gradient = torch.zeros_like(leaf)  # what the edit inserts need not depend on the site
        checked[site] = _check_gradient(site, gradient)
    return SiteGradients(metric.detach(), run, values, checked)


def read_captures(run: Run, sites: Iterable[AnySite]) -> dict[AnySite, Captured]:
    """Returns the values that an attribution captured at some sites."""
    return {site: run.captured(site, CAPTURE_NAME) for site in sites}


def _refuse_experts(sites: Iterable[AnySite]) -> None:
    for site in sites:
        if has_name(site, "experts"):
            raise Unsupported(
                f"{site} is the numbers of experts, which have no gradient: take 'router_logits'"
            )


def _require_gradient(values: Tensor, metric: Metric) -> None:
    if not values.requires_grad:
        raise Unsupported(
            f"the metric {metric.name} gives no gradient: it counts or compares, so that it does "
            "not change with small changes of the logits. Take hk.metrics.logit_diff, "
            "hk.metrics.logit, hk.metrics.logprob …, or a function of differentiable steps"
        )


def _leaf(captured: Captured) -> Tensor:
    if not captured.values.requires_grad:
        raise Unsupported(
            f"{captured.site} has shape {list(captured.values.shape)}, without axes batch and pos, "
            "and takes no part in the computation as a capture: name the input or output of "
            "another module"
        )
    return captured.values


def _check_gradient(site: AnySite, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise Unsupported(
            f"the metric does not depend on {site}: nothing that it is made of reads this site"
        )
    if not bool(gradient.isfinite().all()):
        raise Unsupported(
            f"the gradient at {site} has values that are not finite: the metric has no slope there "
            "(a logit of minus infinity, a probability of zero), or the model's dtype is too "
            "narrow; take hk.metrics.logit_diff, or float32"
        )
    return gradient


# ---- the path from the values of some prompts at a site to those of others


def points_of_method(method: str, steps: int | None, points: Points | None) -> list[float]:
    """Returns the points of an integrated method, else none."""
    if method.startswith("integrated"):
        return path_points(5 if steps is None else steps, points)
    if steps is not None or points is not None:
        raise BadHook(
            "steps and points are of method='integrated', and have no effect with "
            f"{method!r}: leave them out"
        )
    return []


def path_points(steps: int, points: Points | None) -> list[float]:
    """Returns the points of the path at which the gradient is taken, from 0, the prompts that are
    run, to 1, the other prompts.

    "start" (the default) is the sum of EAP-IG (Hanna et al. 2024): its first point is the prompts
    that are run, and the other prompts are no point. Its error is of order 1 / steps, that of
    "middle" of order 1 / steps².
    """
    check_integer(steps, "steps", least=1, meaning="how many parts of the way,", error=BadHook)
    offset = 0.5 if points == "middle" else 0.0
    return [(number + offset) / steps for number in range(steps)]


def path_gradients(
    prompt_metric: PromptMetric,
    sites: SitesLike,
    start: Tensor,
    end: Tensor,
    points: Sequence[float],
    *,
    site: Site = EMBED,
    keep_graph: bool = False,
) -> Iterator[SiteGradients]:
    """Yields the metric and its gradients at points between two tensors of values at a site."""
    for point in points:
        at_point = prompt_metric.with_values(site, start + point * (end - start))
        yield compute_gradients(at_point, sites, keep_graph=keep_graph)


def mean_gradient(results: Iterable[SiteGradients]) -> dict[AnySite, Tensor]:
    """Returns the mean gradient at each site."""
    sums: dict[AnySite, Any] = {}
    count = 0
    for result in results:
        count += 1
        for site, gradient in result.gradient.items():
            sums[site] = sums.get(site, 0) + gradient
    return {site: total / count for site, total in sums.items()}


def check_path_end(target: PromptMetric, end: Tensor, source_metric: Tensor) -> None:
    """Raises `Unsupported` if the embeddings of the source's prompts do not give their metric."""
    at_end = target.with_values(EMBED, end)
    metric = at_end.of_run(at_end.run())
    if not torch.allclose(metric, source_metric, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            "the way from one prompt's embeddings to another's does not end at the other prompt: "
            f"the metric is {metric.tolist()} there and {source_metric.tolist()} for the prompt "
            "itself, since this model reads its tokens by another way too; take the plain gradient "
            "(method='gradient', or steps=1)"
        )


# ---- hk.gradients


@dataclass(frozen=True, eq=False, repr=False)
class Gradients:
    """A metric of some prompts with its gradient at some sites.

    metric     [row], in the metric's own unit
    run        the forward, with the user's own captures
    """

    metric: Float[Tensor, " row"]
    run: Run
    captures: Captures
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
        return self.captures.captured(site)

    def stack(self, name: str) -> Shaped[Tensor, "layer row pos ..."]:
        """Returns the gradients at every layer of a site, such as "resid_pre"."""
        return self.gradient.stack(name)

    def _repr_html_(self) -> str:
        numbers = {f"row {row}": value for row, value in enumerate(self.metric.tolist())}
        return render_html("Gradients of a metric", numbers | {"at": self.sites})

    def __repr__(self) -> str:
        metric = [round(value, 4) for value in self.metric.tolist()]
        text = f"Gradients(metric {shorten(str(metric))}; at {self.sites})"
        return describe_outcome(text, f"gradients[{str(self.sites[0])!r}]", "gradients.metric")


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
    prompt_metric = bind_metric(lm, prompts, metric, pos, hooks)
    if prompt_metric.reads_continuation and hooks:
        raise Unsupported(
            "loss reads a continuation after the prompt, where the positions of hooks would count "
            "from its end: leave the hooks out, or take hk.metrics.logprob of the token"
        )
    result = compute_gradients(prompt_metric, sites)
    slopes: dict[AnySite, Captured] = {}
    for site, captured in result.values.items():
        slopes[site] = replace(captured, values=result.gradient[site])
    # Without the graph of the computation, which would keep all of it in memory.
    values = {site: _detach(captured) for site, captured in result.values.items()}
    run = replace(
        result.run,
        hooks=hooks,
        captures=_other_captures(result.run.captures),
        kept_logits=_detach(result.run.captured_logits()),
        output=None,
    )
    return Gradients(result.metric, run, _as_captures(values), _as_captures(slopes))


def _other_captures(captures: Captures) -> Captures:
    """Returns the captures of the user's own hooks, with their values read."""
    slots = []
    for slot in captures.slots:
        if slot.name != CAPTURE_NAME:
            slots.append(LazyCapture(slot.site, slot.name, None, slot.captured()))
    return Captures(tuple(slots))


def _detach(captured: Captured) -> Captured:
    return replace(captured, values=captured.values.detach())


def _as_captures(values: Mapping[AnySite, Captured]) -> Captures:
    slots = [LazyCapture(site, CAPTURE_NAME, None, captured) for site, captured in values.items()]
    return Captures(tuple(slots))
