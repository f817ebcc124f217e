"""The whole way of a prediction: from token ids to embedding, blocks, final norm, logits and probabilities."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import BadPrompt
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.run import Run
from ..tables.rank_tables import ranks
from .logit_lens import logit_lens


@checks_arguments
def logit_path(lm: LM, prompt: Prompts, *hooks: Hook, pos: int = -1, top: int = 3) -> pd.DataFrame:
    """The way from a prompt to the probabilities of its next token, one row for each stage, from top to bottom.

    Columns: stage, site, axes, shape, norm (the length of the vector at position `pos`), content (what is there: token
    ids, the first numbers of a vector, what the logit lens reads after a block, the leading tokens). Shapes are those
    of a batch of one.

    >>> path = logit_path(lm, "I like oat milk in my")
    >>> path.loc[path["stage"] == "embedding", ["axes", "shape"]].values.tolist()
    [['batch pos d_model', '[1, 6, 576]']]
    """
    there = [
        name for name in ("embed", "pos_embed", "final_norm", "lm_head") if name in lm.layout.names
    ]
    stream = [Site("resid_post", layer) for layer in range(lm.n_layers)]
    run = forward(lm, prompt, *hooks, capture([*map(Site, there), *stream]))
    if len(run.lengths) != 1:
        raise BadPrompt(f"{len(run.lengths)} prompts were given: a path is that of one")
    lens = logit_lens(lm, prompt, *hooks, pos=pos, top=1)
    rows = [*_read(run), *_inside(run, there, lens, pos), *_said(run, pos, top)]
    return pd.DataFrame(rows, columns=["stage", "site", "axes", "shape", "norm", "content"])


def _read(run: Run) -> Iterator[dict[str, Any]]:
    ids = run.tokens[0].tolist()
    yield {"stage": "text", "content": repr(run.text[0])}
    tokens = ", ".join(f"{run.lm.string(token)!r}={token}" for token in ids)
    yield {"stage": "tokens", "axes": "batch pos", "shape": str([1, len(ids)]), "content": tokens}


def _inside(run: Run, there: list[str], lens: pd.DataFrame, pos: int) -> Iterator[dict[str, Any]]:
    words = {
        "embed": "embedding",
        "pos_embed": "position embedding",
        "final_norm": "final norm",
        "lm_head": "head",
    }
    for name in ("embed", "pos_embed"):
        if name in there:
            yield _vector(words[name], run.captured(name), pos)
    for layer, token, prob in zip(lens["layer"], lens["token"], lens["prob"], strict=True):
        found = _vector(f"block {layer}", run.captured(Site("resid_post", int(layer))), pos)
        yield found | {"content": f"the lens reads {token} ({prob:.1%})"}
    for name in ("final_norm", "lm_head"):
        if name in there:
            yield _vector(words[name], run.captured(name), pos)


def _vector(stage: str, found: Captured, pos: int) -> dict[str, Any]:
    vector: Tensor = found.values[0, pos].float()
    site = found.site
    assert isinstance(site, Site)
    first = ", ".join(f"{number:.3g}" for number in vector[:4].tolist())
    facts = {
        "axes": site.axes,
        "shape": str(list(found.values.shape)),
        "norm": float(vector.norm()),
    }
    return {"stage": stage, "site": str(site), **facts, "content": f"{first}, …"}


def _said(run: Run, pos: int, top: int) -> Iterator[dict[str, Any]]:
    leading = ranks(run, pos=pos, top=top)
    pairs = [*zip(leading["token"], leading["logit"], leading["prob"], strict=True)]
    shape = {"axes": "batch pos vocab", "shape": str(list(run.logits.shape))}
    logits = ", ".join(f"{token} {logit:.2f}" for token, logit, _ in pairs)
    yield {"stage": "logits", "site": "logits", **shape, "content": logits}
    probs = ", ".join(f"{token} {prob:.1%}" for token, _, prob in pairs)
    yield {"stage": "probabilities", **shape, "content": probs}
    yield {"stage": "next token", "content": pairs[0][0]}
