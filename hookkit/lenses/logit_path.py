"""The path of a prediction: token ids, embedding, blocks, final norm, logits, probabilities."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from ..arguments import check_arguments
from ..errors import BadPrompt
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import Site
from ..runs.forward import forward
from ..tables.distributions import token_texts
from ..tables.rank_tables import ranks
from .logit_lens import logit_lens


@check_arguments
def logit_path(lm: LM, prompt: Prompts, *hooks: Hook, pos: int = -1, top: int = 3) -> pd.DataFrame:
    """The path from a prompt to the probabilities of its next token, one row for each stage.

    Columns: stage, site, axes, shape, norm (the length of the vector at position `pos`), content
    (token ids, the first numbers of a vector, what the logit lens reads after a block, the leading
    tokens). Shapes are those of a batch of one.

    >>> path = logit_path(lm, "I like oat milk in my")
    >>> path.loc[path["stage"] == "embedding", ["axes", "shape"]].values.tolist()
    [['batch pos d_model', '[1, 6, 576]']]
    """
    stages = {Site("embed"): "embedding", Site("pos_embed"): "position embedding"}
    stages |= {Site("resid_post", layer): f"block {layer}" for layer in range(lm.n_layers)}
    stages |= {Site("final_norm"): "final norm", Site("lm_head"): "head"}
    sites = [site for site in stages if site.name in lm.layout.names]
    run = forward(lm, prompt, *hooks, capture(sites))
    if len(run.lengths) != 1:
        raise BadPrompt(f"{len(run.lengths)} prompts were given: a path is that of one")
    lens = logit_lens(lm, prompt, *hooks, pos=pos, top=1)
    lens_contents = {}
    for site, token, prob in zip(lens["site"], lens["token"], lens["prob"], strict=True):
        lens_contents[site] = f"the lens reads {token} ({prob:.1%})"
    ids, leading = run.tokens[0].tolist(), ranks(run, pos=pos, top=top)
    tokens = _join(token_texts(lm, ids), ids, "{}={}")
    rows: list[dict[str, Any]] = [
        {"stage": "text", "content": repr(run.text[0])},
        {"stage": "tokens", "axes": "batch pos", "shape": str([1, len(ids)]), "content": tokens},
    ]
    for site in sites:
        values = run[site]
        vector = values[0, pos].float()
        numbers = ", ".join([f"{number:.3g}" for number in vector[:4].tolist()])
        rows.append(
            {
                "stage": stages[site],
                "site": str(site),
                "axes": site.axes,
                "shape": str(list(values.shape)),
                "norm": float(vector.norm()),
                "content": lens_contents.get(str(site), f"{numbers}, …"),
            }
        )
    logits = _join(leading["token"], leading["logit"], "{} {:.2f}")
    probs = _join(leading["token"], leading["prob"], "{} {:.1%}")
    shape = {"axes": "batch pos vocab", "shape": str(list(run.logits.shape))}
    rows += [
        {"stage": "logits", "site": "logits", **shape, "content": logits},
        {"stage": "probabilities", **shape, "content": probs},
        {"stage": "next token", "content": leading["token"].tolist()[0]},
    ]
    return pd.DataFrame(rows, columns=["stage", "site", "axes", "shape", "norm", "content"])


def _join(names: Iterable[str], numbers: Iterable[float], form: str) -> str:
    return ", ".join(map(form.format, names, numbers))
