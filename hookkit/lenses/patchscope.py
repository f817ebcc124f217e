"""Patchscopes: a hidden state of one prompt, put into another prompt and said in the model's own words."""

import pandas as pd

from ..arguments import checks_arguments
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

IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"  # the prompt of the paper's next-token reading, patched at "?"


@checks_arguments
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
    """A state of a prompt at each site, put into a target prompt, and what the model then writes.

    Columns: site, layer (where the state was taken), target_site (where it was put in); token, token_id, prob (the most
    likely first token after the target), text (what is generated, greedily).

    The state at `pos` (one position) of `prompt` is taken under `hooks`, and takes the place of what the target prompt
    has at `target_pos`, its last token if left out, in the same layer or in `target_layer`. The default target is the
    paper's prompt of identities ("cat -> cat", and so on, a line each). It ends in "?", whose state is replaced, and
    the model's next tokens are what the state says. All sites run in one batch.

    Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations".

    >>> scope = patchscope(lm, "I like oat milk in my", sites=["resid_post.4", "resid_post.28"], max_new_tokens=1)
    >>> scope[["site", "target_site"]].values.tolist()
    [['resid_post.4', 'resid_post.4'], ['resid_post.28', 'resid_post.28']]
    """
    wanted = [site for site in lm.expand(sites) if isinstance(site, Site)]
    source = forward(lm, prompt, *hooks, capture(wanted, pos=pos), logits=False)
    first = source.captured(wanted[0])
    if first.values.shape[:2] != (1, 1):
        raise BadPrompt(
            f"{first.values.shape[0]} prompts and {first.values.shape[1]} positions were chosen: a patchscope takes "
            "the state of one position of one prompt"
        )
    place = -1 if target_pos is None else target_pos
    put = [
        Site(site.name, site.layer if target_layer is None else target_layer, site.head)
        for site in wanted
    ]
    edits = [
        ablate(there, to=source[site][0, 0], pos=place, rows=[row])
        for row, (site, there) in enumerate(zip(wanted, put, strict=True))
    ]
    goal = as_batch(lm, target).rows
    if len(goal) != 1:
        raise BadPrompt(
            f"{len(goal)} target prompts were given: a patchscope puts every state into the same one"
        )
    run = generate(
        lm, list(goal) * len(wanted), *edits, max_new_tokens=max_new_tokens, do_sample=False
    )
    table = ranks(run, step=0, top=1)
    table = table.drop_duplicates("row")
    return pd.DataFrame(
        {
            "site": [str(site) for site in wanted],
            "layer": pd.array([site.layer for site in wanted], dtype="Int64"),
            "target_site": [str(site) for site in put],
            "token": table["token"].tolist(),
            "token_id": table["token_id"].tolist(),
            "prob": table["prob"].tolist(),
            "text": run.generated,
        }
    )
