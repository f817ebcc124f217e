"""What two models, or two states of one, differ in on some prompts, as tables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..displaying import records, shown
from ..errors import Unsupported
from ..reports import Report
from ..sites import AnySite, parse
from .page import Found, page_of


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """Two models beside one another. Made by `diff`; every table is a plain DataFrame, deltas are after minus before.

    tokens    one row a token that was read: row, pos, read; kl (KL(before‖after), nats), kl_reverse, js; entropy, loss
              (nats, of the token that follows in the prompt), each with _before, _after, _delta; top1_before,
              top1_after, top1_changed
    shifts    how the ranking of tokens moved, with the columns of `rank_shift`
    sites     one row a site, in the order of computation: site, name, layer, tokens; cosine (mean over the tokens) and
              cosine_min; difference (‖after - before‖ / ‖before‖ of a token, the mean) and difference_max; norm_before,
              norm_after (means); cka (empty where none was taken); parts (difference_max is beyond the tolerance)
    parting   one row a prompt: row, site, layer, pos, read, difference, of the first site in the order of computation
              at which a token's difference is beyond the tolerance, and of the first such token; empty where none is.
              Without rows where the models do not have the same sites
    stream    of the first prompts: row, pos, read, layer, difference, cosine at resid_post
    left_out  what, why: what was not compared, or has no meaning for these two
    names     what the two are called
    tolerance the relative difference beyond which they have parted
    about     how it was made; plain values
    """

    tokens: pd.DataFrame
    shifts: pd.DataFrame
    sites: pd.DataFrame
    parting: pd.DataFrame
    stream: pd.DataFrame
    left_out: pd.DataFrame
    names: tuple[str, str]
    tolerance: float
    about: Mapping[str, Any]

    @property
    def first(self) -> AnySite | None:
        """The first site at which any prompt parts, None where none does.

        `Unsupported` where the models' sites are not the same, so that there is no order that both follow.
        """
        if self.parting.empty:
            why = self.left_out.set_index("what").loc["the site where they part first", "why"]
            raise Unsupported(f"where the two part first cannot be said: {why}. found.sites has what they share")
        parted = set(self.parting["site"]) - {""}
        return next((parse(site) for site in self.sites["site"] if site in parted), None)

    @property
    def prompts(self) -> pd.DataFrame:
        """One row a prompt: row, tokens; kl (mean over its tokens), kl_max, and kl_max_pos, where that is; top1_changed
        (how many tokens); loss_before, loss_after, loss_delta (means); parts_at (the site, where that can be said)."""
        of = self.tokens.groupby("row", sort=True)
        found = of.agg(tokens=("pos", "size"), kl=("kl", "mean"), kl_max=("kl", "max"))
        found["kl_max_pos"] = self.tokens.loc[of["kl"].idxmax(), "pos"].to_numpy()
        found["top1_changed"] = of["top1_changed"].sum()
        for name in ("loss_before", "loss_after", "loss_delta"):
            found[name] = of[name].mean()
        found, at = found.reset_index(), dict(zip(self.parting["row"], self.parting["site"], strict=True))
        return found.assign(parts_at=[at[row] for row in found["row"]]) if at else found

    def page(self, *, title: str = "", question: str = "", drawn: int = 1) -> Report:
        """One page of it; the first `drawn` prompts have figures. Its tables are written as CSV, JSON, Markdown and
        LaTeX beside it."""
        names = ("prompts", "tokens", "shifts", "sites", "parting", "stream", "left_out")
        tables: dict[str, pd.DataFrame] = {name: getattr(self, name) for name in names}
        first = "" if self.parting.empty else str(self.first or "")
        found = Found(tables, self.names, first, self.tolerance, self.about)
        return page_of(found, title=title, question=question, drawn=drawn)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the page and all tables to a folder; the page's path."""
        return self.page().write(folder)

    def _repr_html_(self) -> str:
        facts = {"part first at": self.first or "no site"} if len(self.parting) else {}
        return shown(f"Difference: {self.names[0]} and {self.names[1]}", facts, records(self.prompts))

    def __repr__(self) -> str:
        kl, changed = self.tokens["kl"].mean(), self.tokens["top1_changed"].mean()
        where = "" if self.parting.empty else f"; they part at {self.first}" if self.first else "; they never part"
        return (
            f"Difference({self.names[0]} and {self.names[1]}: {len(self.tokens)} tokens, KL {kl:.3g} nats a token, "
            f"another first token after {changed:.0%}{where})"
        )
