"""hookkit scan: one page of everything about one prompt.

What to ask next: further commands about a prompt, with the places that a scan found in it.
"""

import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from .options import Which
from .output import Shown

if TYPE_CHECKING:
    from ..models.lm import LM
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .app import command
from .options import Edits, Prompt, Top, Watch, one_prompt, watched
from .output import Form, strongest, tell

if TYPE_CHECKING:
    import pandas as pd

    from ..hooks.base import Hook
    from ..models.lm import LM
    from ..runs.run import Run


class Scanned(Protocol):
    """What a scan is about."""

    @property
    def lm(self) -> "LM": ...
    @property
    def prompt(self) -> str: ...
    @cached_property
    def first(self) -> tuple[int, int]: ...


def questions(scan: Scanned, which: Which, parts: Mapping[str, Any]) -> list[str]:
    """A question and its command, by turns."""
    one, two = (_spelled(scan.lm, token) for token in scan.first)
    names = [scan.lm.string(token) for token in scan.first]
    asked: list[tuple[str, Sequence[str]]] = [
        (
            f"Which heads say {names[0]!r} rather than {names[1]!r}?",
            ["direct", "--token", one, "--against", two, "--heads"],
        ),
        ("Does it come from what is looked at?", _cut(parts)),
        (f"Is the strongest component needed for {names[0]!r}?", _without(parts, one)),
        (f"When does it come to say {names[0]!r}?", ["lens", "--watch", one, "--top", "1"]),
        ("What would it write, and why?", ["trace", "--watch", two, "--max-new-tokens", "12"]),
        (f"And without {names[0]!r}?", ["compare", "--ban", one, "--max-new-tokens", "12"]),
    ]
    lines = []
    for question, words in asked:
        if words:
            lines += [question, f"    {_line(words[0], scan.prompt, [*words[1:], *_model(which)])}"]
    if "Not to be had here" in parts:
        lines += [
            "Why is something not to be had?",
            f"    {shlex.join(['hookkit', 'doctor', *_doctor(which)])}",
        ]
    return lines


def _spelled(lm: "LM", token: int) -> str:
    """A token as an option takes it: its text, or its id where that text is not this one token."""
    from ..errors import NotOneToken
    from ..hooks.text import spelled_token

    try:
        found = lm.token(lm.string(token)) == token
    except NotOneToken:
        found = False
    return spelled_token(lm.string(token) if found else token)


def _line(command: str, prompt: str, words: Sequence[str]) -> str:
    return shlex.join(
        ["hookkit", command, *(["--"] if prompt.startswith("-") else []), prompt, *words]
    )


def _model(which: Which) -> list[str]:
    given = {
        "--model": which.model,
        "--revision": which.revision,
        "--device": which.device,
        "--dtype": which.dtype,
    }
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def _doctor(which: Which) -> list[str]:
    words = _model(which)
    return words[1:] if words[:1] == ["--model"] else words


def _cut(parts: Mapping[str, Any]) -> list[str]:
    """A knockout of the head that looks most at a token other than the first and the last one."""
    if "attention" not in parts:
        return []
    table: Any = parts["attention"].table.iloc[1:-1]
    if table.empty:
        return []
    best = table.loc[table["strongest"].idxmax()]
    return ["shift", "--hook", f"knockout:{best['head']}@query=-1,key={best['pos']}"]


def _without(parts: Mapping[str, Any], one: str) -> list[str]:
    """An ablation of the component that adds most."""
    found = parts.get("direct")
    if not isinstance(found, Shown):
        return []
    table: Any = found.table[found.table["kind"].isin(["attention", "mlp"])]
    if table.empty:
        return []
    return [
        "shift",
        "--ablate",
        str(table.loc[table["logit"].idxmax(), "component"]),
        "--watch",
        one,
    ]


@command(
    'hookkit scan "The Eiffel Tower is in the city of" --watch " London" --out eiffel', panel="Look"
)
def scan(
    prompt: Prompt, which: Which, edits: Edits, form: Form, top: Top = 5, watch: Watch = None
) -> None:
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
        from ..runs.forward import forward

        return forward(self.lm, self.prompt, *self.hooks)

    @cached_property
    def first(self) -> tuple[int, int]:
        """The two likeliest tokens."""
        from ..tables.rank_tables import ranks

        one, two = ranks(self.run, top=2)["token_id"].tolist()[:2]
        return one, two

    @property
    def tokens(self) -> tuple[str, str]:
        """The texts of these two."""
        return self.lm.string(self.first[0]), self.lm.string(self.first[1])

    def ranks(self) -> Shown:
        """What comes next."""
        from ..tables.rank_tables import ranks

        table = ranks(self.run, top=self.top, watch=self.watch)
        return Shown(table, ("rank", "token", "prob", "logit"), f"What comes after {self.prompt!r}")

    def uncertainty(self) -> Shown:
        """How sure that is."""
        from ..tables.rank_tables import uncertainty

        names = ("entropy", "perplexity", "margin", "top1_prob", "nucleus_90", "scenario")
        return Shown(uncertainty(self.run, pos=-1), names, "How sure it is (entropy in nats)")

    def lens(self) -> Shown:
        """What each layer would say."""
        from ..figures.lenses import lens_map
        from ..lenses.logit_lens import logit_lens

        ids = list(dict.fromkeys((*self.first, *self.watch)))
        table = logit_lens(self.lm, self.prompt, *self.hooks, top=1, watch=ids)
        words = (
            f"The logit lens: what leads in which layers, and the rank of {self.tokens[0]!r} there"
        )
        return Shown(table, (), words, leading(table, self.first[0]), lambda: lens_map(table))

    def direct(self) -> Shown:
        """Which components say it."""
        from ..figures.lenses import logit_bars
        from ..lenses.direct import direct_logits

        table = direct_logits(self.run, self.first[0], against=self.first[1])
        one, two = self.tokens
        words = f"Which components say {one!r} rather than {two!r}: {table['logit'].sum():.4g} of logit in all"
        best = strongest(table, "logit", 8)
        return Shown(table, ("component", "logit"), words, best, lambda: logit_bars(table, top=12))

    def surprisal(self) -> Shown:
        """What the prompt's own tokens cost."""
        from ..figures.surprisal import surprisal_strip
        from ..tables.surprisal import surprisal

        table = surprisal(self.run, top=2)
        names = ("pos", "token", "loss", "rank", "alternatives")
        words = f"What each token of the prompt cost (nats; {table['loss'].mean():.3g} on average)"
        return Shown(table, names, words, figure=lambda: surprisal_strip(table))

    def attention(self) -> Shown:
        """What the last token looks at."""
        table = attention_of(self.lm, self.prompt, self.hooks)
        names = ("pos", "token", "mean", "strongest", "head")
        return Shown(
            table,
            names,
            "What the last token looks at: over all heads, and the head that does most",
        )

    def attribution(self) -> Shown:
        """Which tokens speak for it."""
        from ..attributions.input_tokens import token_attribution
        from ..errors import Unsupported
        from ..tables.token_metrics import logit_diff

        if self.hooks:
            raise Unsupported("gradients are those of the model without hooks: leave the hooks out")
        one, two = self.tokens
        table = token_attribution(self.lm, self.prompt, logit_diff(*self.first))
        words = (
            f"Which tokens speak for {one!r} rather than {two!r} (gradient times input, in logits)"
        )
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
            "layers": " to ".join(
                str(first.loc[site, "layer"]) for site in dict.fromkeys((span[0], span[-1]))
            ),
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

    from ..hooks.capture import capture
    from ..runs.forward import forward

    run = forward(lm, prompt, *hooks, capture("pattern", pos=-1), logits=False)
    layers: list[Any] = [site.layer for site in run.sites]  # pyright: ignore[reportAttributeAccessIssue]
    given = [run[site][0, :, 0].double().cpu() for site in run.sites]  # each [head, key]
    names = [
        f"{layer}.{head}"
        for layer, each in zip(layers, given, strict=True)
        for head in range(len(each))
    ]
    heads = torch.cat(given)
    most = heads.max(dim=0)
    tokens = [repr(lm.string(token)) for token in run.tokens[0].tolist()]
    columns = {"pos": range(len(tokens)), "token": tokens, "mean": heads.mean(dim=0).tolist()}
    columns |= {
        "strongest": most.values.tolist(),
        "head": [names[index] for index in most.indices.tolist()],
    }
    return pd.DataFrame(columns)
