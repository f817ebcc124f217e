"""hk.token_attribution: how much each token of a prompt speaks for what the model says, read at the embeddings."""

from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import BadHook, Unsupported
from ..hooks.capture import capture
from ..models.lm import LM, Token
from ..models.prompts import Prompts
from ..runs.forward import forward
from ..tables.metrics import MetricLike
from .backward import OWN, Question, derived, one_of, question
from .interpolation import EMBED, along, average, parts, put


@checks_arguments
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
    """How much each token of each prompt adds to the metric, to first order: its embedding times the gradient there.

    method     "gradient": gradient times input (Shrikumar et al. 2016), with a baseline times the difference from it.
               "integrated": the gradient's mean over `steps` runs on the way from the baseline to the prompt
               (integrated gradients: Sundararajan et al. 2017), whose sum over the tokens is metric(prompt) -
               metric(baseline), up to the steps. The paper approximates its integral at the ends of equal parts of the
               way; here at their middles, whose error falls with the square of `steps`
    steps      of "integrated": how many runs, 20 if left out
    baseline   the embedding that says nothing: zeros where left out, that of a token (text or id), or a tensor
               [d_model]

    Columns: row, pos, token, token_id, attribution (in the metric's unit, positive for a token that raises it), and
    with "integrated" gap: metric(prompt) - metric(baseline) - the row's sum, the same for all tokens of a row.
    `attrs["metric"]`, `attrs["baseline"]` and `attrs["gap"]` have them of each prompt. Where the gap is large beside
    the metric's change, the numbers do not share it out: take more steps, or another baseline. A model that norms what
    it reads hardly changes along most of the way from zeros, and at once near their end.

    >>> token_attribution(lm, "The capital of France is", logit(" Paris"))["token"].tolist()
    ["'The'", "' capital'", "' of'", "' France'", "' is'"]
    """
    one_of("method", method, "gradient", "integrated")
    if method != "integrated" and steps is not None:
        raise BadHook(
            f"steps is of method='integrated', and has no effect with {method!r}: leave it out"
        )
    steps = 20 if steps is None else steps
    asked = question(lm, prompts, metric, pos)
    if asked.reads_on:
        raise Unsupported(
            "loss reads a continuation behind the prompt: take hk.logprob of its first token"
        )
    parts(steps)  # raises
    rows = range(len(asked))
    here = derived(asked, rows, EMBED, ())
    end = here.values[EMBED].values.detach()
    start = _baseline(lm, baseline, end)
    ground = _metric_at(asked, start)
    slope = here.gradient[EMBED]
    if method == "integrated":
        slope = average(along(asked, rows, EMBED, (), start, end, steps, "middle"))[EMBED]
    found = ((end - start) * slope).double().sum(-1).cpu()
    table = _table(asked, found)
    if method == "integrated":
        gaps = here.metric.double().cpu() - ground.double().cpu() - found.sum(-1)
        table["gap"] = [float(gaps[row]) for row in table["row"]]
        table.attrs |= {"gap": gaps.tolist(), "steps": steps}
    table.attrs |= {"method": method, "metric": here.metric.tolist(), "baseline": ground.tolist()}
    return table


def _baseline(
    lm: LM, given: Token | Tensor | None, like: Float[Tensor, "row pos d_model"]
) -> Tensor:
    """The baseline's embeddings, with the zeros of filled-up rows left as they are."""
    if given is None:
        return torch.zeros_like(like)
    if isinstance(given, Tensor):
        if given.shape != like.shape[2:] or not bool(given.isfinite().all()):
            raise BadHook(
                f"baseline has shape {list(given.shape)}: give finite numbers {list(like.shape[2:])}, or a token"
            )
        return given.detach().to(like).expand_as(like).clone()
    run = forward(lm, [[lm.token(given)]], capture(EMBED, name=OWN), logits=False)
    return run[EMBED][0, 0].to(like).expand_as(like).clone()


def _metric_at(asked: Question, embeddings: Tensor) -> Float[Tensor, " row"]:
    """The metric of the prompts with other embeddings."""
    rows = range(len(asked))
    return asked.asked_of(asked.run(rows, put(embeddings)), rows)


def _table(asked: Question, found: Float[Tensor, "row pos"]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for row, ids in enumerate(asked.reading.rows):
        for place, token_id in enumerate(ids):
            token = {"token": repr(asked.lm.string(token_id)), "token_id": token_id}
            rows.append(
                {"row": row, "pos": place, **token, "attribution": float(found[row, place])}
            )
    return pd.DataFrame(rows)
