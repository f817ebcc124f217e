"""Patchscopes: a hidden state of one prompt, patched into another prompt that decodes it."""

from __future__ import annotations

import pandas as pd

from ..arguments import check_arguments
from ..errors import BadPrompt
from ..hooks.ablation import ablate
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.positions import PosLike
from ..models.prompts import Prompts, as_batch
from ..models.sites import Site, SitesLike
from ..runs.forward import forward
from ..runs.generate import generate
from ..tables.rank_tables import ranks

# the prompt of the paper's next-token reading, patched at "?"
IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"


@check_arguments
def patchscope(
    lm: LM,
    prompt: Prompts,
    *hooks: Hook,
    sites: SitesLike = "resid_post",
    pos: PosLike = -1,
    target: Prompts = IDENTITY,
    target_pos: PosLike = None,
    target_layer: int | None = None,
    max_new_tokens: int = 8,
) -> pd.DataFrame:
    """What the model generates from a target prompt that has a prompt's state, for each site.

    Columns: site, layer (of the state), target_site (that it replaces); token, token_id, prob (the
    most likely first token after the target), text (what is generated, greedily).

    The state at `pos` (one position) of `prompt` is read under `hooks`, and replaces the target
    prompt's state at `target_pos`, by default its last token, in the same layer or in
    `target_layer`. The default target is the paper's prompt of identities ("cat -> cat", and so on,
    a line each). It ends in "?", whose state is replaced, and the model's next tokens decode the
    state. All sites run in one batch.

    Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden
    Representations".

    >>> sites = ["resid_post.4", "resid_post.28"]
    >>> scope = patchscope(lm, "I like oat milk in my", sites=sites, max_new_tokens=1)
    >>> scope[["site", "target_site"]].values.tolist()
    [['resid_post.4', 'resid_post.4'], ['resid_post.28', 'resid_post.28']]
    """
    sources = [site for site in lm.expand(sites) if isinstance(site, Site)]
    run = forward(lm, prompt, *hooks, capture(sources, pos=pos), logits=False)
    n_prompts, n_positions = run.captured(sources[0]).values.shape[:2]
    if (n_prompts, n_positions) != (1, 1):
        raise BadPrompt(
            f"{n_prompts} prompts and {n_positions} positions were chosen: a patchscope takes the "
            "state of one position of one prompt"
        )
    position = -1 if target_pos is None else target_pos
    targets, edits = [], []
    for row, site in enumerate(sources):
        layer = site.layer if target_layer is None else target_layer
        targets.append(Site(site.name, layer, site.head))
        edits.append(ablate(targets[-1], to=run[site][0, 0], pos=position, rows=[row]))
    target_rows = as_batch(lm, target).rows
    if len(target_rows) != 1:
        raise BadPrompt(
            f"{len(target_rows)} target prompts were given: a patchscope puts every state into the "
            "same one"
        )
    prompts = list(target_rows) * len(sources)
    run = generate(lm, prompts, *edits, max_new_tokens=max_new_tokens, do_sample=False)
    table = ranks(run, step=0, top=1).drop_duplicates("row", ignore_index=True)
    table["site"], table["target_site"] = list(map(str, sources)), list(map(str, targets))
    table["layer"] = pd.array([site.layer for site in sources], dtype="Int64")
    table["text"] = run.generated
    columns = ["site", "layer", "target_site", "token", "token_id", "prob", "text"]
    return pd.DataFrame(table[columns])
