"""hk.token_attribution: how much each token of a prompt contributes to the metric, measured at the
embeddings."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadHook, Unsupported
from ..hooks.capture import capture
from ..models.lm import LM, Token
from ..models.named_positions import placeholder_ids
from ..models.prompts import Prompts
from ..runs.forward import forward
from ..tables.distributions import add_roles
from ..tables.metrics.metric import MetricLike
from .backward import (
    CAPTURE_NAME,
    EMBED,
    PromptMetric,
    bind_metric,
    compute_gradients,
    mean_gradient,
    path_gradients,
    path_points,
)


@check_arguments
def token_attribution(
    lm: LM,
    prompts: Prompts,
    metric: MetricLike,
    *,
    method: Literal["gradient", "integrated"] = "gradient",
    steps: int | None = None,
    baseline: Token | Tensor | None = None,
    pos: int = -1,
) -> pd.DataFrame:
    """Returns how much each token of each prompt adds to the metric, to first order: its embedding
    times the gradient there.

    method     "gradient": gradient times input (Shrikumar et al. 2016), with a baseline times the
               difference from it. "integrated": the gradient's mean over `steps` runs on the path
               from the baseline to the prompt (integrated gradients: Sundararajan et al. 2017). Its
               sum over the tokens is metric(prompt) - metric(baseline), up to the error of the
               steps. The paper approximates the integral at the ends of equal parts of the path;
               here it is at their middles, whose error falls with the square of `steps`
    steps      for "integrated": how many runs, 20 by default
    baseline   the embedding that carries no information: zeros by default, that of a token (text or
               id), or a tensor [d_model]

    Columns: row, pos, token, token_id, attribution (in the metric's unit, positive for a token that
    raises it), and with "integrated" gap: metric(prompt) - metric(baseline) - the row's sum, the
    same for all tokens of a row. `attrs["metric"]`, `attrs["baseline"]` and `attrs["gap"]` have
    them for each prompt. If the gap is large beside the metric's change, the attributions do not
    add up: use more steps, or another baseline. A model that normalizes the embeddings hardly
    changes along most of the path from zeros, and changes at once near its start.

    >>> token_attribution(lm, "The capital of France is", logit(" Paris"))["token"].tolist()
    ['The', ' capital', ' of', ' France', ' is']
    """
    if method != "integrated" and steps is not None:
        raise BadHook(
            f"steps is of method='integrated', and has no effect with {method!r}: leave it out"
        )
    prompt_metric = bind_metric(lm, prompts, metric, pos)
    if prompt_metric.reads_continuation:
        raise Unsupported(
            "loss reads a continuation after the prompt: take hk.metrics.logprob of its first token"
        )
    _refuse_images(prompt_metric)
    path = path_points(20 if steps is None else steps, "middle")
    result = compute_gradients(prompt_metric, EMBED)
    embeddings = result.values[EMBED].values.detach()
    start = _baseline_embeddings(lm, baseline, embeddings)
    at_baseline = prompt_metric.with_values(EMBED, start)
    baseline_metric = at_baseline.of_run(at_baseline.run())
    gradient = result.gradient[EMBED]
    if method == "integrated":
        results = path_gradients(prompt_metric, EMBED, start, embeddings, path)
        gradient = mean_gradient(results)[EMBED]
    attributions = ((embeddings - start) * gradient).double().sum(-1).cpu()
    table = _table(prompt_metric, attributions)
    if method == "integrated":
        change = result.metric.double().cpu() - baseline_metric.double().cpu()
        gaps = change - attributions.sum(-1)
        table["gap"] = gaps.numpy()[table["row"]]
        table.attrs |= {"gap": gaps.tolist(), "steps": len(path)}
    table.attrs |= {"method": method, "metric": result.metric.tolist()}
    table.attrs["baseline"] = baseline_metric.tolist()
    return table


def _refuse_images(prompt_metric: PromptMetric) -> None:
    """Raises `Unsupported` for prompts with images, which take the place of their embeddings."""
    placeholders = placeholder_ids(prompt_metric.lm)
    for row, ids in enumerate(prompt_metric.inputs.rows):
        if placeholders.intersection(ids):
            raise Unsupported(
                f"prompt {row} has an image or sound, which takes the place of its tokens' "
                "embeddings, so that these say nothing of it: see hk.attribution at resid_pre"
            )


def _baseline_embeddings(
    lm: LM, baseline: Token | Tensor | None, like: Float[Tensor, "row pos d_model"]
) -> Tensor:
    """Returns the baseline's embeddings, in the shape of the prompts' embeddings."""
    if baseline is None:
        return torch.zeros_like(like)
    if isinstance(baseline, Tensor):
        if baseline.shape != like.shape[2:] or not bool(baseline.isfinite().all()):
            raise BadHook(
                f"baseline has shape {list(baseline.shape)}: give finite numbers "
                f"{list(like.shape[2:])}, or a token"
            )
        embedding = baseline.detach()
    else:
        run = forward(lm, [[lm.token(baseline)]], capture(EMBED, name=CAPTURE_NAME), logits=False)
        embedding = run[EMBED][0, 0]
    return embedding.to(like).expand_as(like).clone()


def _table(prompt_metric: PromptMetric, attributions: Float[Tensor, "row pos"]) -> pd.DataFrame:
    records: list[dict[str, Any]] = []
    for row, ids in enumerate(prompt_metric.inputs.rows):
        for position, token_id in enumerate(ids):
            token = prompt_metric.lm.string(token_id)
            record = {"row": row, "pos": position, "token": token, "token_id": token_id}
            records.append(record | {"attribution": float(attributions[row, position])})
    roles = [getattr(ids, "roles", ()) for ids in prompt_metric.inputs.rows]
    return add_roles(pd.DataFrame(records), roles)
