"""The logit lens: what the model would say if it stopped at each layer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments, read_tokens, whole_number
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..models.lm import LM, Token
from ..models.positions import CountLike, PosLike
from ..models.prompts import Prompts, Row, as_batch
from ..models.sites import AnySite, Site, SitesLike
from ..models.tokens import shown_ranks
from ..runs.forward import forward
from ..runs.run import Run
from .model_end import ModelEnd, tail_of
from .readout import Readout, chunk_of, in_cache, numbers

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class Translator(Protocol):
    """What a lens does to a state before the model's own end reads it: `TunedLens`, for one."""

    def translated(
        self, site: Site, states: Float[Tensor, "state d_model"]
    ) -> Float[Tensor, "state d_model"]: ...


@checks_arguments
def logit_lens(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    sites: SitesLike = "resid_post",
    pos: PosLike = -1,
    rows: CountLike = None,
    top: int = 5,
    watch: Iterable[Token] | Token = (),
    choose: str = "layer",
    through: Translator | None = None,
) -> pd.DataFrame:
    """What the model would say of each layer's residual stream: the state through its own final norm, head and cap.

    Columns: row, pos, site, layer, token, token_id, logit, logprob, prob, rank; entropy (nats) of the layer's
    distribution and kl, KL(the model's prediction ‖ the layer's), in nats. One row for each shown token of each state.
    The last layer's `resid_post` is what the model says.

    `sites` are places in the stream (resid_pre, resid_mid, resid_post), or one component (embed, attn_out, mlp_out: it
    alone through the norm; `direct_logits` splits a logit exactly). `choose="layer"` shows each layer's first `top`
    tokens; `choose="anywhere"` shows at every layer the same `top` tokens, those that rank best at any of them.
    `hooks` act as in `forward`, and those behind the blocks act on every layer's state. `through` is a tuned lens.

    The logit lens: nostalgebraist 2020, "interpreting GPT: the logit lens".

    >>> lens = logit_lens(lm, "The Eiffel Tower is located in the city of", top=1)
    >>> lens[["layer", "token", "rank"]].tail(3)
        layer     token  rank
    27     27  ' Paris'     1
    28     28  ' Paris'     1
    29     29  ' Paris'     1
    """
    if choose not in ("layer", "anywhere"):
        raise BadHook(
            f"choose={choose!r}: say 'layer' (each layer's first tokens) or 'anywhere' (best at any layer)"
        )
    watched = [lm.token(token) for token in read_tokens(watch, "watch")]
    meaning = "how many tokens to show"
    whole_number(top, "top", least=0 if watched else 1, most=lm.n_tokens, meaning=meaning)
    wanted = stream_sites(lm, sites)
    end = Site("resid_post", lm.n_layers - 1)
    read = tuple(site for site in wanted if site != end)
    run = forward(lm, prompts, *hooks, capture([*read, end], pos=pos, rows=rows), logits=False)
    states = States(run, (*read, end), through)
    table = lens_of(
        states, hooks, as_batch(lm, prompts).rows, top, watched, anywhere=choose == "anywhere"
    )
    return (
        table
        if end in wanted
        else pd.DataFrame(table[table["site"] != str(end)]).reset_index(drop=True)
    )


def stream_sites(lm: LM, sites: SitesLike) -> tuple[Site, ...]:
    """The sites of a lens, each a state of the stream's width."""
    found: list[Site] = []
    width = lm.shape(Site("resid_post", lm.n_layers - 1))
    for site in lm.expand(sites):
        if not isinstance(site, Site) or site.name not in STREAM:
            raise BadHook(
                f"a lens reads states of the residual stream, {', '.join(STREAM)}, and {site} is none"
            )
        if lm.shape(site) != width:
            raise Unsupported(
                f"{site} has {lm.shape(site)[0]} numbers, and the norm behind the stream takes {width[0]}"
            )
        found.append(site)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class States:
    """The states of a run at some sites, the model's last one at the end, as cells of one row and position each."""

    run: Run
    sites: tuple[Site, ...]
    through: Translator | None = None

    @property
    def end(self) -> Captured:
        return self.run.captured(self.sites[-1])

    def places(self) -> list[tuple[int, int, int, int]]:
        """Of each cell: its index in what was captured, and the prompt and position that it is of."""
        assert self.end.positions is not None
        return [
            (index, column, row, place)
            for index, (row, places) in enumerate(
                zip(self.end.rows, self.end.positions.tolist(), strict=True)
            )
            for column, place in enumerate(places)
            if place >= 0
        ]

    def of(self, cells: Sequence[tuple[int, int, int, int]]) -> Float[Tensor, "cell site d_model"]:
        """The states of some cells, translated where the lens is a tuned one."""
        index = [cell[0] for cell in cells], [cell[1] for cell in cells]
        found = []
        for site in self.sites:
            states = self.run[site][index]
            translates = self.through is not None and site != self.sites[-1]
            found.append(
                self.through.translated(site, states) if translates and self.through else states
            )
        return torch.stack([states.to(found[-1].device) for states in found], 1)


def lens_of(
    states: States,
    hooks: Sequence[Hook],
    rows: tuple[Row, ...],
    top: int,
    watched: Sequence[int],
    *,
    anywhere: bool,
) -> pd.DataFrame:
    """`logit_lens` of states that were captured, in a run of these rows with these hooks."""
    tail = tail_of(states.run.lm, hooks, rows)
    return _table(states.run.lm, states, tail, top, watched, anywhere=anywhere)


def _table(
    lm: LM, states: States, tail: ModelEnd, top: int, watched: Sequence[int], *, anywhere: bool
) -> pd.DataFrame:
    places, count = states.places(), len(states.sites)
    step = max(1, chunk_of(lm.device, lm.sizes["vocab"] or 1) // count)
    parts: list[Readout] = []
    with torch.no_grad():
        for start in range(0, len(places), step):
            cells = places[start : start + step]
            each = [(row, pos) for _, _, row, pos in cells for _ in range(count)]
            logits = (
                tail.logits(states.of(cells).flatten(0, 1), each)
                .float()
                .unflatten(0, (len(cells), count))
            )
            some = in_cache(logits)
            room = some[0].new_empty(2, *some[0].shape)
            parts += [
                numbers(part, lm.n_tokens, top, watched, room, anywhere=anywhere).cpu()
                for part in some
            ]
    return _frame(lm, states.sites, [(row, pos) for _, _, row, pos in places], parts)


def _frame(
    lm: LM, sites: Sequence[AnySite], places: Sequence[tuple[int, int]], parts: Sequence[Readout]
) -> pd.DataFrame:
    """The table of all chunks; a token that is both leading and watched stands once."""
    joined = Readout(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in Readout.__dataclass_fields__
        )
    )
    cells, count, shown = joined.ids.shape
    flat = joined.ids.flatten().tolist()
    known = {token: repr(lm.string(token)) for token in set(flat)}
    table = pd.DataFrame(
        {
            "row": _spread([row for row, _ in places], count * shown),
            "pos": _spread([pos for _, pos in places], count * shown),
            "site": _spread([str(site) for site in sites], shown) * cells,
            "layer": _spread([getattr(site, "layer", None) for site in sites], shown) * cells,
            "token": [known[token] for token in flat],
            "token_id": flat,
            "logit": joined.logits.double().flatten().numpy(),
            "logprob": joined.logprobs.double().flatten().numpy(),
            "prob": joined.logprobs.double().exp().flatten().numpy(),
            "rank": shown_ranks(joined.ranks).flatten().numpy(),
            "entropy": joined.entropy.double().flatten().repeat_interleave(shown).numpy(),
            "kl": joined.kl.double().flatten().repeat_interleave(shown).numpy(),
        }
    )
    table["layer"] = table["layer"].astype("Int64")
    order = table.assign(_site=[n for n in range(count) for _ in range(shown)] * cells)
    order = order.drop_duplicates(["row", "pos", "_site", "token_id"])
    order = order.sort_values(["row", "pos", "_site", "rank", "token_id"], ignore_index=True)
    return order.drop(columns="_site")


def _spread(values: Sequence[object], times: int) -> list[object]:
    return [value for value in values for _ in range(times)]


@checks_arguments
def lens_summary(lens: pd.DataFrame) -> pd.DataFrame:
    """When each token of a lens comes to the top: one row for each row, pos and token of `logit_lens`' table.

    Columns: row, pos, token, token_id; best_rank, best_site (the first at which it has that rank), first (the first
    site at which its rank is 1), since (the site from which on its rank is 1 to the end), last_rank and last_prob.
    Missing where it never leads. A token counts at the sites where it is shown: watch it, or use choose="anywhere".
    """
    needed = ["row", "pos", "site", "token", "token_id", "rank", "prob"]
    if missing := [name for name in needed if name not in lens]:
        raise BadHook(f"this table has no column {', '.join(missing)}: give what logit_lens gave")
    sites = list(dict.fromkeys(lens["site"]))
    found = []
    groups: Any = lens.groupby(["row", "pos", "token_id"], sort=True)
    for (row, pos, token_id), part in groups:
        ranked = part[part["rank"].notna()]
        ranks = dict(zip(ranked["site"], ranked["rank"], strict=True))
        best = min(ranks.values(), default=math.nan)
        leads = [site for site in sites if ranks.get(site) == 1]
        behind = len(sites)
        while behind and ranks.get(sites[behind - 1]) == 1:
            behind -= 1
        probs = dict(zip(part["site"], part["prob"], strict=True))
        found.append(
            {
                "row": row,
                "pos": pos,
                "token": part["token"].tolist()[0],
                "token_id": token_id,
                "best_rank": best,
                "best_site": next((site for site in sites if ranks.get(site) == best), None),
                "first": leads[0] if leads else None,
                "since": sites[behind] if behind < len(sites) else None,
                "last_rank": ranks.get(sites[-1]),
                "last_prob": probs.get(sites[-1]),
            }
        )
    table = pd.DataFrame(found).astype({"last_rank": "Int64"})
    return table.sort_values(["row", "pos", "best_rank", "token_id"], ignore_index=True)
