"""What the decoder rows of features say: the tokens they promote, and their nearest features."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import Unsupported
from ..models.lm import LM
from ..models.next_token import token_logits
from ..models.sites import Site, has_name
from ..runs.model_end import model_end_of
from ..tables.distributions import token_texts
from .dictionary import Dictionary

CHUNK = 256  # features at once
IN_STREAM = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


def promoted_tokens(
    lm: LM, dictionary: Dictionary, features: Sequence[int], top: int
) -> pd.DataFrame:
    """Returns the tokens that each feature promotes and demotes most directly.

    Columns: feature, kind ("promoted", "demoted"), order (from 1), token, token_id, logit. The
    logit is that of a state that is the feature's decoder row alone, with a root mean square of 1,
    through the model's final norm and head, without their biases. Raises `Unsupported` for a
    dictionary of a site that is not in the residual stream.
    """
    site = dictionary.site
    if not has_name(site, *IN_STREAM) or site.stack:
        raise Unsupported(
            f"{site} is not added to the residual stream that becomes logits, so its features "
            f"promote no tokens directly: those of {', '.join(IN_STREAM)} do"
        )
    end = model_end_of(lm, (), ())
    rows: list[pd.DataFrame] = []
    for chunk in torch.tensor(features).split(CHUNK):
        directions = dictionary.weights["W_dec"][chunk]
        length = directions.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        states = (directions / length * directions.shape[-1] ** 0.5).to(_stream(lm))
        with torch.no_grad():
            # half of the difference has no bias of the norm or of the head
            difference = end.read(states).raw.float() - end.read(-states).raw.float()
        logits = token_logits(difference / 2, lm.n_tokens)
        for kind, sign in (("promoted", 1), ("demoted", -1)):
            best = (sign * logits).topk(min(top, logits.shape[-1]))
            ids, values = best.indices.flatten().tolist(), best.values.flatten() * sign
            count = best.indices.shape[1]
            columns = {
                "feature": chunk.repeat_interleave(count).tolist(),
                "kind": kind,
                "order": list(range(1, count + 1)) * len(chunk),
                "token": token_texts(lm, ids),
                "token_id": ids,
                "logit": values.tolist(),
            }
            rows.append(pd.DataFrame(columns))
    table = pd.concat(rows)
    return table.sort_values(
        ["feature", "kind", "order"], ascending=[True, False, True]
    ).reset_index(drop=True)


def _stream(lm: LM) -> Tensor:
    """Returns a tensor with the dtype and device of the model's residual stream."""
    head = lm.submodule(lm.location(Site("lm_head")).path)
    return next(head.parameters())


def nearest_features(dictionary: Dictionary, features: Sequence[int], top: int) -> pd.DataFrame:
    """Returns the features whose decoder rows have the largest cosines with those of each feature.

    Columns: feature, order (from 1), nearest, cosine.
    """
    directions: Float[Tensor, "feature d"] = nn.functional.normalize(
        dictionary.weights["W_dec"].float(), dim=-1
    )
    rows: list[pd.DataFrame] = []
    for chunk in torch.tensor(features).split(CHUNK):
        cosines = directions[chunk] @ directions.T
        cosines[torch.arange(len(chunk)), chunk] = -torch.inf
        best = cosines.topk(min(top, dictionary.n_features - 1))
        count = best.indices.shape[1]
        columns = {
            "feature": chunk.repeat_interleave(count).tolist(),
            "order": list(range(1, count + 1)) * len(chunk),
            "nearest": best.indices.flatten().tolist(),
            "cosine": best.values.flatten().tolist(),
        }
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)
