"""hookkit scan: one page of everything about one prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .asking import questions
from .base import command
from .options import Edits, Prompt, Top, Watch, Which, one_prompt, watched
from .printing import Form, Shown, strongest, tell

if TYPE_CHECKING:
    import pandas as pd

    from ..hooks import Hook
    from ..model import LM
    from ..runs import Run


@command('hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel="Look")
def scan(prompt: Prompt, which: Which, edits: Edits, form: Form, top: Top = 5, watch: Watch = None) -> None:
    """One page on one prompt: what comes next, where that comes from, what was read for it, and what to ask next.

    All is about the token after the prompt. JSON has every table; --out FOLDER is a page with figures and tables.
    """
    form.check(several=True)
    text = one_prompt(prompt)
    edits.check()
    lm = which.load(quiet=form.quiet)
    ids = watched(lm, watch)
    found = Scan(lm, text, tuple(edits.read(lm, form.note)), top, tuple(ids))
    parts: dict[str, Shown | str] = {"ranks": found.ranks(), "uncertainty": found.uncertainty()}
    refused: list[str] = []
    for name in ("lens", "direct", "surprisal", "attention", "attribution"):
        parts |= _part(name, getattr(found, name), refused)
    parts |= {"Not to be had here": "\n".join(refused)} if refused else {}
    parts["What to ask next"] = "\n".join(questions(found, which, parts))
    tell(form, f"Scan: {text}"[:120], parts)


def _part(name: str, make: "Callable[[], Shown]", refused: list[str]) -> dict[str, Shown]:
    """A part of the page; where the model does not allow it, why."""
    from ..errors import EmptySelection, MissingSite, Unsupported

    try:
        return {name: make()}
    except (EmptySelection, MissingSite, Unsupported) as error:
        refused.append(f"{name}: {error}")
        return {}


@dataclass(frozen=True)
class Scan:
    """A prompt with its hooks, and what is found of it."""

    lm: "LM"
    prompt: str
    hooks: "tuple[Hook, ...]"
    top: int
    watch: tuple[int, ...]

    @cached_property
    def run(self) -> "Run":
        """One forward over the prompt."""
        from ..runs import forward

        return forward(self.lm, self.prompt, *self.hooks)

    @cached_property
    def first(self) -> tuple[int, int]:
        """The two likeliest tokens."""
        from ..tables import ranks

        one, two = ranks(self.run, top=2)["token_id"].tolist()[:2]
        return one, two

    @property
    def tokens(self) -> tuple[str, str]:
        """The texts of these two."""
        return self.lm.string(self.first[0]), self.lm.string(self.first[1])

    def ranks(self) -> Shown:
        """What comes next."""
        from ..tables import ranks

        table = ranks(self.run, top=self.top, watch=self.watch)
        return Shown(table, ("rank", "token", "prob", "logit"), f"What comes after {self.prompt!r}")

    def uncertainty(self) -> Shown:
        """How sure that is."""
        from ..tables import uncertainty

        names = ("entropy", "perplexity", "margin", "top1_prob", "nucleus_90", "scenario")
        return Shown(uncertainty(self.run, pos=-1), names, "How sure it is (entropy in nats)")

    def lens(self) -> Shown:
        """What each layer would say."""
        from ..lenses import logit_lens
        from ..origins import lens_map

        ids = list(dict.fromkeys((*self.first, *self.watch)))
        table = logit_lens(self.lm, self.prompt, *self.hooks, top=1, watch=ids)
        words = f"The logit lens: what leads in which layers, and the rank of {self.tokens[0]!r} there"
        return Shown(table, (), words, leading(table, self.first[0]), lambda: lens_map(table))

    def direct(self) -> Shown:
        """Which components say it."""
        from ..decomposing import direct_logits
        from ..origins import logit_bars

        table = direct_logits(self.run, self.first[0], against=self.first[1])
        one, two = self.tokens
        words = f"Which components say {one!r} rather than {two!r}: {table['logit'].sum():.4g} of logit in all"
        best = strongest(table, "logit", 8)
        return Shown(table, ("component", "logit"), words, best, lambda: logit_bars(table, top=12))

    def surprisal(self) -> Shown:
        """What the prompt's own tokens cost."""
        from ..passages import surprisal_strip
        from ..surprisals import surprisal

        table = surprisal(self.run, top=2)
        names = ("pos", "token", "loss", "rank", "alternatives")
        words = f"What each token of the prompt cost (nats; {table['loss'].mean():.3g} on average)"
        return Shown(table, names, words, figure=lambda: surprisal_strip(table))

    def attention(self) -> Shown:
        """What the last token looks at."""
        table = attention_of(self.lm, self.prompt, self.hooks)
        names = ("pos", "token", "mean", "strongest", "head")
        return Shown(table, names, "What the last token looks at: over all heads, and the head that does most")

    def attribution(self) -> Shown:
        """Which tokens speak for it."""
        from ..differentiating import token_attribution
        from ..errors import Unsupported
        from ..metrics import logit_diff

        if self.hooks:
            raise Unsupported("gradients are those of the model without hooks: leave the hooks out")
        one, two = self.tokens
        table = token_attribution(self.lm, self.prompt, logit_diff(*self.first))
        words = f"Which tokens speak for {one!r} rather than {two!r} (gradient times input, in logits)"
        return Shown(table, ("pos", "token", "attribution"), words)


def leading(lens: "pd.DataFrame", token: int) -> "pd.DataFrame":
    """Layer by layer, those together in which one token leads: layers, token, prob (in the last of them), and the rank
    of the token that is asked for, in the first of them and in the last."""
    import pandas as pd

    table: Any = lens
    first = table[table["rank"] == 1].drop_duplicates("site").set_index("site")
    ranks = table[table["token_id"] == token].set_index("site")["rank"]
    spans: list[list[str]] = []
    for site in first.index:
        if spans and first.loc[spans[-1][-1], "token_id"] == first.loc[site, "token_id"]:
            spans[-1].append(site)
        else:
            spans.append([site])
    rows = [
        {
            "layers": " to ".join(str(first.loc[site, "layer"]) for site in dict.fromkeys((span[0], span[-1]))),
            "token": first.loc[span[-1], "token"],
            "prob": first.loc[span[-1], "prob"],
            "rank": " to ".join(str(ranks[site]) for site in dict.fromkeys((span[0], span[-1]))),
        }
        for span in spans
    ]
    return pd.DataFrame(rows)


def attention_of(lm: "LM", prompt: str, hooks: "tuple[Hook, ...]") -> "pd.DataFrame":
    """How much of the last token's attention goes to each position.

    Columns: pos, token, mean (over all heads of all layers, 0 to 1), strongest (the most that a head gives), head
    (which: LAYER.HEAD).
    """
    import pandas as pd
    import torch

    from ..hooks import capture
    from ..runs import forward

    run = forward(lm, prompt, *hooks, capture("pattern", pos=-1), logits=False)
    layers: list[Any] = [site.layer for site in run.sites]  # pyright: ignore[reportAttributeAccessIssue]
    given = [run[site][0, :, 0].double().cpu() for site in run.sites]  # each [head, key]
    names = [f"{layer}.{head}" for layer, each in zip(layers, given, strict=True) for head in range(len(each))]
    heads = torch.cat(given)
    most = heads.max(dim=0)
    tokens = [repr(lm.string(token)) for token in run.tokens[0].tolist()]
    columns = {"pos": range(len(tokens)), "token": tokens, "mean": heads.mean(dim=0).tolist()}
    columns |= {"strongest": most.values.tolist(), "head": [names[index] for index in most.indices.tolist()]}
    return pd.DataFrame(columns)
