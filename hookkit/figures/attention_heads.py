"""hk.attention_view: the heads of a layer as circuitsvis draws them, to be moved over with the mouse."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arguments import checks_arguments
from ..errors import MissingExtra, NotCaptured, OutOfRange

if TYPE_CHECKING:
    from ..runs.run import Run


@dataclass(frozen=True, repr=False)
class AttentionView:
    """A drawing that a notebook shows. `html` is what it shows, to be written into a page of one's own."""

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"AttentionView({self.title}; show it in a notebook, or write its .html)"


@checks_arguments
def attention_view(
    run: "Run", layer: int, *, row: int = 0, heads: Collection[int] | None = None, cdn: bool = False
) -> AttentionView:
    """The attention patterns of a layer's heads for one prompt, drawn by circuitsvis (`pip install circuitsvis`).

    The run needs the pattern, `hk.capture("pattern.5")`, at every position. The script that draws it is 1.3 MB of
    circuitsvis's own, which is put into every view: no network is needed. With `cdn` the view is small, and the browser
    loads the script from unpkg.com each time it is shown. A notebook has to be trusted to run either.

    `MissingExtra` without circuitsvis, `NotCaptured` without the pattern, `OutOfRange` for a row or head that is not
    there.

    >>> patterns = hk.forward(lm, "I like oat milk in my", hk.capture("pattern.5"))  # doctest: +SKIP
    >>> attention_view(patterns, 5, heads=[0, 1])  # doctest: +SKIP
    AttentionView(pattern.5 of 'I like oat milk in my'; show it in a notebook, or write its .html)
    """
    captured = run.captured(f"pattern.{layer}")
    if row not in captured.rows:
        raise OutOfRange(f"row {row} was asked for, and the pattern has rows {list(captured.rows)}")
    length = run.lengths[row]
    pattern = captured.values[captured.rows.index(row)].detach().float().cpu()
    assert captured.positions is not None
    there = captured.positions[captured.rows.index(row)]
    if there[there >= 0].tolist() != list(range(length)):
        raise NotCaptured(
            f"pattern.{layer} was captured at some positions only: capture it without pos="
        )
    names = list(range(len(pattern))) if heads is None else list(heads)
    wrong = [head for head in names if not 0 <= head < len(pattern)]
    if wrong:
        raise OutOfRange(
            f"head {wrong[0]} of pattern.{layer} was asked for, and it has heads 0 to {len(pattern) - 1}"
        )
    tokens = [run.lm.string(token) for token in run.tokens[row, :length].tolist()]
    title = f"pattern.{layer} of {run.lm.text(run.tokens[row, :length].tolist())!r}"
    return AttentionView(
        _drawn(pattern[names, :length, :length], tokens, [f"{layer}.{n}" for n in names], cdn),
        title,
    )


def _drawn(pattern: object, tokens: list[str], heads: list[str], cdn: bool) -> str:
    """What circuitsvis draws. It writes tokens into a script as they are, so that they are put in here, escaped."""
    try:
        from circuitsvis.attention import attention_heads  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(
            f"attention_view needs circuitsvis, which cannot be imported ({error}): pip install 'hookkit[notebook]'"
        ) from error
    stands = [f"hookkit-token-{number}" for number in range(len(tokens))]
    drawn = attention_heads(attention=pattern, tokens=stands, attention_head_names=heads)
    html = drawn.cdn_src if cdn else drawn.local_src
    for stand, token in zip(stands, tokens, strict=True):
        word = (
            json.dumps(token)
            .replace("<", "\\u003c")
            .replace(">", "\\u003e")
            .replace("&", "\\u0026")
        )
        html = html.replace(f'"{stand}"', word)
    return html
