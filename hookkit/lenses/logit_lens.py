"""The logit lens: what the model would predict if it stopped at each layer.

`logit_path` shows the whole way of one prompt, from its tokens to the next one. `patchscope` reads
a state by another prompt, into which the state is patched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_choice, check_integer
from ..errors import BadHook, BadPrompt, Unsupported
from ..hooks.ablation import ablate
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.next_token import ranks_for_table
from ..models.positions import IndicesLike, PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import Site, SitesLike, has_name, refuse_stacks
from ..models.tokens import describe_prompts
from ..models.words import WordLike
from ..runs.forward import forward
from ..runs.generate import generate
from ..runs.model_end import Cells, cells_of, model_end_of
from ..runs.run import Run
from ..tables.distributions import token_texts
from ..tables.rank_tables import ranks, watched_ids
from .readout import Readout, numbers, split_for_cache, states_per_chunk

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@runtime_checkable
class Translator(Protocol):
    """Translates a state before the model's own end reads it, as `TunedLens` does."""

    def translated(
        self, site: Site, states: Float[Tensor, "state d_model"]
    ) -> Float[Tensor, "state d_model"]: ...


@check_arguments
def logit_lens(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    sites: SitesLike = "resid_post",
    pos: PosLike = -1,
    rows: IndicesLike = None,
    top: int = 5,
    watch: Iterable[WordLike] | WordLike = (),
    choose: str = "layer",
    lens: Translator | None = None,
) -> pd.DataFrame:
    """What the model would predict from each layer's residual stream.

    Each state passes the model's own final norm, head and cap. Columns: row, pos, site, layer,
    token, token_id, logit, logprob, prob, rank; entropy (nats) of the layer's distribution and kl,
    KL(the model's prediction ‖ the layer's), in nats. The table has one row for each shown token of
    each state. The last layer's `resid_post` is the model's own prediction.

    `sites` are sites of the stream (resid_pre, resid_mid, resid_post), or one component (embed,
    attn_out, mlp_out: it alone through the norm; `direct_logits` splits a logit exactly).
    `choose="layer"` shows each layer's first `top` tokens; `choose="anywhere"` shows at every layer
    the same `top` tokens, those that rank best at any layer. `hooks` act as in `forward`, and those
    after the blocks act on every layer's state. `lens` is a tuned lens.

    The logit lens: nostalgebraist 2020, "interpreting GPT: the logit lens".

    >>> lens = logit_lens(lm, "The Eiffel Tower is located in the city of", top=1)
    >>> lens[["layer", "token", "rank"]].tail(3)
        layer   token  rank
    27     27   Paris     1
    28     28   Paris     1
    29     29   Paris     1
    """
    check_choice(choose, "choose", ["layer", "anywhere"])
    lm.refuse_engine("a lens runs the model's norm and head")
    watched = watched_ids(lm, watch)
    least = 0 if watched else 1
    check_integer(top, "top", least=least, most=lm.n_tokens, meaning="how many tokens to show")
    selected = stream_sites(lm, sites)
    end = Site("resid_post", lm.n_layers - 1)
    captured = (*[site for site in selected if site != end], end)
    run = forward(lm, prompts, *hooks, capture(list(captured), pos=pos, rows=rows), logits=False)
    states = LensStates(run, captured, lens)
    prompt_rows = as_batch(lm, prompts).rows
    table = lens_table(states, hooks, prompt_rows, top, watched, anywhere=choose == "anywhere")
    if end not in selected:
        table = pd.DataFrame(table[table["site"] != str(end)]).reset_index(drop=True)
    table.attrs |= describe_prompts(lm, prompt_rows, tokens=True)
    return table


def stream_sites(lm: LM, sites: SitesLike) -> tuple[Site, ...]:
    """Returns the sites of a lens; raises if one is no state of the stream's width."""
    width = lm.shape(Site("resid_post", lm.n_layers - 1))
    selected = []
    refuse_stacks(lm.expand(sites), "a lens reads the stream that the unembedding reads")
    for site in lm.expand(sites):
        if not has_name(site, *STREAM):
            raise BadHook(
                f"a lens reads states of the residual stream, {', '.join(STREAM)}, and {site} is "
                "none"
            )
        if lm.shape(site) != width:
            raise Unsupported(
                f"{site} has {lm.shape(site)[0]} numbers, and the norm after the stream takes "
                f"{width[0]}"
            )
        selected.append(site)
    return tuple(selected)


@dataclass(frozen=True, eq=False)
class LensStates:
    """The states of a run at some sites; the model's last state is the last one."""

    run: Run
    sites: tuple[Site, ...]
    lens: Translator | None = None

    def at(self, cells: Cells) -> Float[Tensor, "cell site d_model"]:
        """Returns the states of some cells, translated if the lens is a tuned one."""
        states = []
        for site in self.sites:
            values = self.run[site][cells.index, cells.column]
            if self.lens is not None and site != self.sites[-1]:
                values = self.lens.translated(site, values)
            states.append(values)
        device = states[-1].device
        return torch.stack([values.to(device) for values in states], 1)


def lens_table(
    states: LensStates,
    hooks: Sequence[Hook],
    rows: tuple[Row, ...],
    top: int,
    watched: Sequence[int],
    *,
    anywhere: bool,
) -> pd.DataFrame:
    """Returns the table of `logit_lens` for states captured in a run of these rows and hooks."""
    lm, count = states.run.lm, len(states.sites)
    cells = cells_of(states.run.captured(states.sites[-1]))
    tail = model_end_of(lm, hooks, rows)
    step = max(1, states_per_chunk(lm.device, lm.sizes["vocab"] or 1) // count)
    parts: list[Readout] = []
    with torch.no_grad():
        for numbers_of_cells in torch.arange(len(cells.rows)).split(step):
            chunk = cells.select(numbers_of_cells)
            cells_of_states = cells.select(numbers_of_cells.repeat_interleave(count))
            logits = tail.logits(states.at(chunk).flatten(0, 1), cells_of_states).float()
            pieces = split_for_cache(logits.unflatten(0, (-1, count)))
            buffer = pieces[0].new_empty(2, *pieces[0].shape)
            for piece in pieces:
                part = numbers(piece, lm.n_tokens, top, watched, buffer, anywhere=anywhere)
                parts.append(part.cpu())
    return _table(lm, states.sites, cells, Readout.join(parts))


def _table(lm: LM, sites: Sequence[Site], cells: Cells, readout: Readout) -> pd.DataFrame:
    """Returns the table of a readout; a token that is both leading and watched is shown once."""
    cell, site, _ = np.indices(readout.ids.shape).reshape(3, -1)  # of each row of the table
    ids = readout.ids.flatten().tolist()
    distinct = sorted(set(ids))
    texts = dict(zip(distinct, token_texts(lm, distinct), strict=True))
    logprobs = readout.logprobs.double().flatten()
    table = pd.DataFrame(
        {
            "row": cells.rows.numpy()[cell],
            "pos": cells.positions.numpy()[cell],
            "site": np.array(list(map(str, sites)), dtype=object)[site],
            "layer": pd.array([one_site.layer for one_site in sites], dtype="Int64")[site],
            "token": list(map(texts.__getitem__, ids)),
            "token_id": ids,
            "logit": readout.logits.double().flatten().numpy(),
            "logprob": logprobs.numpy(),
            "prob": logprobs.exp().numpy(),
            "rank": ranks_for_table(readout.ranks).flatten().numpy(),
            "entropy": readout.entropy.double().numpy()[cell, site],
            "kl": readout.kl.double().numpy()[cell, site],
            "_site": site,
        }
    )
    table = table.drop_duplicates(["row", "pos", "_site", "token_id"])
    table = table.sort_values(["row", "pos", "_site", "rank", "token_id"], ignore_index=True)
    return table.drop(columns="_site")


@check_arguments
def lens_summary(lens: pd.DataFrame) -> pd.DataFrame:
    """At which sites each token of a lens is the most likely: one row for each row, pos and token.

    Columns: row, pos, token, token_id; best_rank, best_site (the first at which it has that rank),
    first (the first site at which its rank is 1), since (the site from which on its rank is 1 to
    the end), last_rank and last_prob. Missing if its rank is never 1. A token counts at the sites
    where it is shown: watch it, or use choose="anywhere".
    """
    needed = ["row", "pos", "site", "token", "token_id", "rank", "prob"]
    if missing := [name for name in needed if name not in lens]:
        raise BadHook(f"this table has no column {', '.join(missing)}: give what logit_lens gave")
    sites = list(dict.fromkeys(lens["site"]))
    table_rows = []
    groups: Any = lens.groupby(["row", "pos", "token_id"], sort=True)
    for (row, pos, token_id), part in groups:
        location = {"row": row, "pos": pos, "token": part["token"].tolist()[0]}
        table_rows.append({**location, "token_id": token_id, **_summary_of_token(part, sites)})
    table = pd.DataFrame(table_rows).astype({"last_rank": "Int64"})
    return table.sort_values(["row", "pos", "best_rank", "token_id"], ignore_index=True)


def _summary_of_token(part: pd.DataFrame, sites: Sequence[str]) -> dict[str, object]:
    """Returns best_rank to last_prob for the rows of one token; `sites` are in order."""
    ranked = part[part["rank"].notna()]
    ranks_of_sites = dict(zip(ranked["site"], ranked["rank"], strict=True))
    probs = dict(zip(part["site"], part["prob"], strict=True))
    best = min(ranks_of_sites.values(), default=math.nan)
    best_sites = [site for site in sites if ranks_of_sites.get(site) == best]
    leading = [site for site in sites if ranks_of_sites.get(site) == 1]
    to_the_end = list(takewhile(leading.__contains__, reversed(sites)))
    return {
        "best_rank": best,
        "best_site": next(iter(best_sites), None),
        "first": next(iter(leading), None),
        "since": next(reversed(to_the_end), None),
        "last_rank": ranks_of_sites.get(sites[-1]),
        "last_prob": probs.get(sites[-1]),
    }


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
    readings = map("the lens reads {!r} ({:.1%})".format, lens["token"], lens["prob"])
    lens_contents = dict(zip(lens["site"], readings, strict=True))
    ids, leading = run.tokens[0].tolist(), ranks(run, pos=pos, top=top)
    tokens = _join(token_texts(lm, ids), ids, "{!r}={}")
    rows: list[dict[str, Any]] = [
        {"stage": "text", "content": repr(run.text[0])},
        {"stage": "tokens", "axes": "batch pos", "shape": str([1, len(ids)]), "content": tokens},
    ]
    for site in sites:
        values = run[site]
        vector = values[0, pos].float()
        numbers = ", ".join(map("{:.3g}".format, vector[:4].tolist()))
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
    logits = _join(leading["token"], leading["logit"], "{!r} {:.2f}")
    probs = _join(leading["token"], leading["prob"], "{!r} {:.1%}")
    shape = {"axes": "batch pos vocab", "shape": str(list(run.logits.shape))}
    rows += [
        {"stage": "logits", "site": "logits", **shape, "content": logits},
        {"stage": "probabilities", **shape, "content": probs},
        {"stage": "next token", "content": repr(leading["token"].tolist()[0])},
    ]
    return pd.DataFrame(rows, columns=["stage", "site", "axes", "shape", "norm", "content"])


def _join(names: Iterable[str], numbers: Iterable[float], form: str) -> str:
    return ", ".join(map(form.format, names, numbers))


# the prompt of the patchscopes' paper for reading the next token, patched at "?"
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
    refuse_stacks(lm.expand(sites), "a patchscope reads the text model's states")
    sources = [site for site in lm.expand(sites) if isinstance(site, Site)]
    run = forward(lm, prompt, *hooks, capture(sources, pos=pos), logits=False)
    _check_one_state(run, sources[0])
    target_rows = as_batch(lm, target).rows
    if len(target_rows) != 1:
        raise BadPrompt(
            f"{len(target_rows)} target prompts were given: a patchscope puts every state into the "
            "same one"
        )
    position = -1 if target_pos is None else target_pos
    targets = sources
    if target_layer is not None:
        targets = [replace(site, layer=target_layer) for site in sources]
    states = [run[site][0, 0] for site in sources]
    edits = []
    for row, (site, state) in enumerate(zip(targets, states, strict=True)):
        edits.append(ablate(site, to=state, pos=position, rows=[row]))
    prompts = list(target_rows) * len(sources)
    run = generate(lm, prompts, *edits, max_new_tokens=max_new_tokens, do_sample=False)
    table = ranks(run, step=0, top=1).drop_duplicates("row", ignore_index=True)
    table["site"], table["target_site"] = list(map(str, sources)), list(map(str, targets))
    table["layer"] = pd.array([site.layer for site in sources], dtype="Int64")
    table["text"] = run.generated
    columns = ["site", "layer", "target_site", "token", "token_id", "prob", "text"]
    return pd.DataFrame(table[columns])


def _check_one_state(run: Run, site: Site) -> None:
    n_prompts, n_positions = run.captured(site).values.shape[:2]
    if (n_prompts, n_positions) != (1, 1):
        raise BadPrompt(
            f"{n_prompts} prompts and {n_positions} positions were chosen: a patchscope takes the "
            "state of one position of one prompt"
        )
