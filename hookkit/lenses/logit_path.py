"""The path of a prediction: token ids, embedding, blocks, final norm, logits, probabilities."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..arguments import check_arguments
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

BEFORE_BLOCKS = {"embed": "embedding", "pos_embed": "position embedding"}
AFTER_BLOCKS = {"final_norm": "final norm", "lm_head": "head"}


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
    names = [name for name in (*BEFORE_BLOCKS, *AFTER_BLOCKS) if name in lm.layout.names]
    stream = [Site("resid_post", layer) for layer in range(lm.n_layers)]
    run = forward(lm, prompt, *hooks, capture([*map(Site, names), *stream]))
    if len(run.lengths) != 1:
        raise BadPrompt(f"{len(run.lengths)} prompts were given: a path is that of one")
    lens = logit_lens(lm, prompt, *hooks, pos=pos, top=1)
    rows = [
        *_input_stages(run),
        *_vector_stages(run, BEFORE_BLOCKS, pos),
        *_block_stages(run, lens, pos),
        *_vector_stages(run, AFTER_BLOCKS, pos),
        *_output_stages(run, pos, top),
    ]
    return pd.DataFrame(rows, columns=["stage", "site", "axes", "shape", "norm", "content"])


def _input_stages(run: Run) -> Iterator[dict[str, Any]]:
    ids = run.tokens[0].tolist()
    yield {"stage": "text", "content": repr(run.text[0])}
    tokens = ", ".join([f"{run.lm.string(token)!r}={token}" for token in ids])
    yield {"stage": "tokens", "axes": "batch pos", "shape": str([1, len(ids)]), "content": tokens}


def _vector_stages(run: Run, stages: dict[str, str], pos: int) -> Iterator[dict[str, Any]]:
    for name, stage in stages.items():
        if name in run.lm.layout.names:
            yield _vector(stage, run.captured(name), pos)


def _block_stages(run: Run, lens: pd.DataFrame, pos: int) -> Iterator[dict[str, Any]]:
    for layer, token, prob in zip(lens["layer"], lens["token"], lens["prob"], strict=True):
        stage = _vector(f"block {layer}", run.captured(Site("resid_post", int(layer))), pos)
        yield {**stage, "content": f"the lens reads {token} ({prob:.1%})"}


def _vector(stage: str, captured: Captured, pos: int) -> dict[str, Any]:
    vector = captured.values[0, pos].float()
    site = captured.site
    assert isinstance(site, Site)
    first = ", ".join([f"{number:.3g}" for number in vector[:4].tolist()])
    return {
        "stage": stage,
        "site": str(site),
        "axes": site.axes,
        "shape": str(list(captured.values.shape)),
        "norm": float(vector.norm()),
        "content": f"{first}, …",
    }


def _output_stages(run: Run, pos: int, top: int) -> Iterator[dict[str, Any]]:
    leading = ranks(run, pos=pos, top=top)
    columns = (leading["token"], leading["logit"], leading["prob"])
    logits, probs = [], []
    for token, logit, prob in zip(*columns, strict=True):
        logits.append(f"{token} {logit:.2f}")
        probs.append(f"{token} {prob:.1%}")
    shape = {"axes": "batch pos vocab", "shape": str(list(run.logits.shape))}
    yield {"stage": "logits", "site": "logits", **shape, "content": ", ".join(logits)}
    yield {"stage": "probabilities", **shape, "content": ", ".join(probs)}
    yield {"stage": "next token", "content": leading["token"].tolist()[0]}
