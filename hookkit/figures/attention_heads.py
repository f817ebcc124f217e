"""The attention patterns of a layer's heads, drawn by circuitsvis for a notebook."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arguments import check_arguments
from ..errors import MissingExtra, NotCaptured, OutOfRange

if TYPE_CHECKING:
    from ..runs.run import Run


@dataclass(frozen=True, repr=False)
class AttentionView:
    """A drawing that a notebook shows. `html` is the same drawing, for a page of your own."""

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"AttentionView({self.title}; show it in a notebook, or write its .html)"


@check_arguments
def attention_view(
    run: Run, layer: int, *, row: int = 0, heads: Collection[int] | None = None, cdn: bool = False
) -> AttentionView:
    """The attention patterns of a layer's heads for one prompt, drawn by circuitsvis.

    Needs `pip install circuitsvis`, and a run with the pattern, `hk.capture("pattern.5")`, at every
    position. Every view contains the script of circuitsvis (1.3 MB), so that no network is needed.
    With `cdn` the view is small, and the browser loads the script from unpkg.com each time. A
    notebook has to be trusted to run either.

    Raises `MissingExtra` without circuitsvis, `NotCaptured` without the pattern, and `OutOfRange`
    for a row or head that does not exist.

    >>> run = hk.forward(lm, "I like oat milk in my", hk.capture("pattern.5"))  # doctest: +SKIP
    >>> attention_view(run, 5, heads=[0, 1])  # doctest: +SKIP
    AttentionView(pattern.5 of 'I like oat milk in my'; show it in a notebook, or write its .html)
    """
    captured = run.captured(f"pattern.{layer}")
    if row not in captured.rows:
        raise OutOfRange(f"row {row} was asked for, and the pattern has rows {list(captured.rows)}")
    index = captured.rows.index(row)
    length = run.lengths[row]
    pattern = captured.values[index].detach().float().cpu()
    assert captured.positions is not None
    positions = captured.positions[index]
    if positions[positions >= 0].tolist() != list(range(length)):
        raise NotCaptured(
            f"pattern.{layer} was captured at some positions only: capture it without pos="
        )
    n_heads = len(pattern)
    numbers = list(range(n_heads)) if heads is None else list(heads)
    for head in numbers:
        if not 0 <= head < n_heads:
            raise OutOfRange(
                f"head {head} of pattern.{layer} was asked for, and it has heads 0 to {n_heads - 1}"
            )
    ids = run.tokens[row, :length].tolist()
    tokens = [run.lm.string(token) for token in ids]
    names = [f"{layer}.{head}" for head in numbers]
    html = _draw_heads(pattern[numbers, :length, :length], tokens, names, cdn)
    return AttentionView(html, f"pattern.{layer} of {run.lm.text(ids)!r}")


def _draw_heads(pattern: object, tokens: list[str], heads: list[str], cdn: bool) -> str:
    """The HTML of circuitsvis. It escapes no tokens: it gets placeholders in their place."""
    try:
        from circuitsvis.attention import attention_heads  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(
            f"attention_view needs circuitsvis, which cannot be imported ({error}): "
            "pip install 'hookkit[notebook]'"
        ) from error
    placeholders = [f"hookkit-token-{number}" for number in range(len(tokens))]
    view = attention_heads(attention=pattern, tokens=placeholders, attention_head_names=heads)
    html = view.cdn_src if cdn else view.local_src
    escapes = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
    for placeholder, token in zip(placeholders, tokens, strict=True):
        html = html.replace(f'"{placeholder}"', json.dumps(token).translate(escapes))
    return html
