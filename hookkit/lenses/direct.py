"""Where a logit comes from: its exact sum over the components of the model."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import checks_arguments, whole_number
from ..errors import BadHook, BadPrompt, Unsupported
from ..hooks.capture import Capture, capture
from ..models.devices import device_of
from ..models.lm import LM, Token
from ..models.positions import PosLike
from ..models.sites import Site
from ..models.training import refuse_no_gradient
from ..runs.forward import forward
from ..runs.run import Run
from .components import Part, Stream, frozen, needed, parts_of
from .model_end import ModelEnd, Read, tail_of

Tokens = Token | list[Token]


@checks_arguments
def direct_logits(
    run: Run,
    token: Tokens,
    *,
    against: Tokens | None = None,
    pos: PosLike = -1,
    heads: bool = False,
    neurons: bool = False,
) -> pd.DataFrame:
    """A token's logit as an exact sum: what each component of the model adds to it, directly, along W_U[token].

    Columns: row, pos, component, kind, layer, head, neuron, logit. The rows of a position sum to the token's logit, or
    with `against` to its logit minus that of the other token. A list of tokens has one for each row of the run.

    The components are the embedding and every block's attention and MLP; with `heads` each head and the output
    projection's bias, with `neurons` each neuron, in place of the whole. The norms are linear with the scale that they
    had in this very forward, so that what each component adds depends on all the others through that one number. Behind
    them stand the biases of the final norm and the head; what a soft-cap takes away (a scale is in every row); the
    edits of the run's hooks behind the blocks; and "residual", what rounding left of the identity. "rest.L" is what a
    block adds beside attention and MLP, "block.L" what one adds that has neither, "between" an edit of the stream.
    Where blocks differ, those without heads or neurons stay whole. `attrs` have token, against and the largest
    residual.

    The run's prompts are read again with its hooks. `Unsupported` for a generate with edits (give a forward over its
    text), for a model whose stream passes no norm of the usual kinds, and where what a block adds cannot be split.

    Direct logit attribution: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    >>> table = direct_logits(run, " coffee")
    >>> table["logit"].sum().round(3), table.nlargest(2, "logit")["component"].tolist()
    (np.float64(20.371), ['mlp_out.29', 'mlp_out.27'])
    """
    return decomposed(_again(run, heads, neurons, pos), token, against)


def decomposed(again: Run, token: Tokens, against: Tokens | None = None) -> pd.DataFrame:
    """`direct_logits` of a run that captured, after its edits, the `needed` sites of its first rows."""
    lm = again.lm
    refuse_no_gradient(lm)
    end = again.captured(f"resid_post.{lm.n_layers - 1}")
    assert end.positions is not None
    places = [
        (n, c, p)
        for n, row in enumerate(end.positions.tolist())
        for c, p in enumerate(row)
        if p >= 0
    ]
    cells = [row for row, _, _ in places], [column for _, column, _ in places]
    rows = [end.rows[row] for row in cells[0]]
    chosen = _chosen(lm, token, rows, len(again.lengths))
    others = None if against is None else _chosen(lm, against, rows, len(again.lengths))
    tail = tail_of(lm, (), end.prompts)
    logits = again.captured_logits()
    said = torch.stack([logits.values[row, logits.column(row, place)] for row, _, place in places])
    unknown = said.isnan().any(-1).tolist()
    if any(unknown):
        raise Unsupported(
            f"the logits of row {rows[unknown.index(True)]} are NaN, and have no parts that add up"
        )
    parts = _sum(again, tail, cells, chosen, others, said)
    table = _frame(parts, [(row, place) for row, (_, _, place) in zip(rows, places, strict=True)])
    residual = float(table.loc[table["kind"] == "residual", "logit"].abs().max())
    names = {"token": _names(lm, chosen), "against": None if others is None else _names(lm, others)}
    table.attrs |= {**names, "residual": residual}
    return table


def _names(lm: LM, ids: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(repr(lm.string(token)) for token in ids))


def _again(run: Run, heads: bool, neurons: bool, pos: PosLike) -> Run:
    """The run's text once more, with its edits and with all that the sum is made of."""
    edits = [hook for hook in run.hooks if not isinstance(hook, Capture)]
    if edits and run.settings["verb"] == "generate":
        raise Unsupported(
            f"{edits[0]} acted in a generate, where positions count from the prompt's end: read its text with "
            "hk.forward and the hooks that are meant there, and give that run"
        )
    rows = [row[:length] for row, length in zip(run.tokens.tolist(), run.lengths, strict=True)]
    sites = needed(run.lm, heads=heads, neurons=neurons)
    return forward(
        run.lm, rows, *edits, capture(sites, pos=pos), logits="last" if pos == -1 else "all"
    )


def _chosen(lm: LM, token: Tokens, rows: Sequence[int], count: int) -> list[int]:
    """The token of each cell."""
    if isinstance(token, list) and len(token) != count:
        raise BadPrompt(
            f"there are {len(token)} tokens for {count} rows: give one for each row, or one"
        )
    return [lm.token(token[row] if isinstance(token, list) else token) for row in rows]


def _sum(
    run: Run,
    tail: ModelEnd,
    cells: tuple[list[int], list[int]],
    chosen: list[int],
    others: list[int] | None,
    said: Tensor,
) -> list[Part]:
    """Every part of the logits, which sum to what the run said."""
    lm = run.lm
    states = run[Site("resid_post", lm.n_layers - 1)][cells]
    still = frozen(tail.given, states, "what stands between the last block and the head")
    with torch.no_grad():
        read = tail.read(states)
    wanted = _picked(read.raw, chosen, others)
    factor = _scale(read)
    outward = _rows_of_head(tail, read, chosen, others)
    along = still.back(outward) * factor
    parts = list(parts_of(Stream(lm, run, cells, along), **_splits(run)))
    parts.append(
        Part(
            "final_norm bias", "bias", None, factor * _dot(outward, still.offset.expand_as(outward))
        )
    )
    parts.append(Part("lm_head bias", "bias", None, factor * (wanted - _dot(outward, read.given))))
    shown = _picked(read.logits, chosen, others)
    parts.append(Part("soft-cap", "cap", None, shown - factor * wanted))
    ended = _picked(said, chosen, others)
    parts.append(Part("edits of the logits", "edit", None, ended - shown))
    total = torch.stack(
        [part.shares.flatten(1).sum(1) if part.shares.ndim > 1 else part.shares for part in parts]
    )
    parts = [
        part for part in parts if part.kind not in ("bias", "cap", "edit") or _matters(part.shares)
    ]
    return [*parts, Part("residual", "residual", None, ended - total.sum(0))]


def _splits(run: Run) -> dict[str, bool]:
    names = {site.name for site in run.sites if isinstance(site, Site)}
    return {"heads": "z" in names, "neurons": "mlp_post" in names}


def _matters(shares: Tensor) -> bool:
    return bool((shares.abs() > 1e-5).any())


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() * other.double()).sum(-1)


def _picked(values: Tensor, chosen: list[int], others: list[int] | None) -> Float[Tensor, " cell"]:
    """The value of each cell's token, less that of the other token."""
    numbers = torch.arange(len(chosen), device=values.device)
    found = values[numbers, torch.tensor(chosen, device=values.device)].double()
    return (
        found
        if others is None
        else found - values[numbers, torch.tensor(others, device=values.device)].double()
    )


def _rows_of_head(
    tail: ModelEnd, read: Read, chosen: list[int], others: list[int] | None
) -> Float[Tensor, "cell d"]:
    """W_U[token], less that of the other token, for each cell: the gradient of what the head gives."""
    head = tail.lm.submodule(tail.lm.place(Site("lm_head")).path).forward
    with torch.enable_grad():
        given = read.given.detach().clone().requires_grad_()
        return torch.autograd.grad(_picked(head(given), chosen, others).sum(), given)[0]


def _scale(read: Read) -> float:
    """By what the model multiplies what the head gives; 1 where it does something else with it, such as a soft-cap."""
    raw, logits = read.raw.double(), read.logits.double()
    largest = raw.abs().argmax()
    factor = float(logits.flatten()[largest] / raw.flatten()[largest])
    apart = float((raw * factor - logits).abs().max())
    return factor if apart <= 1e-5 * float(logits.abs().max()) else 1.0


def _frame(parts: Sequence[Part], places: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """One row for each cell and part, or each of a part's neurons."""
    names = ["row", "pos", "component", "kind", "layer", "head", "neuron", "logit"]
    columns: dict[str, list[object]] = {name: [] for name in names}
    for number, (row, pos) in enumerate(places):
        for part in parts:
            shares = part.shares[number].tolist()
            each = enumerate(shares) if isinstance(shares, list) else [(None, shares)]
            for neuron, share in each:
                component = part.name if neuron is None else f"{part.name}.{neuron}"
                values = (row, pos, component, part.kind, part.layer, part.head, neuron, share)
                for name, value in zip(names, values, strict=True):
                    columns[name].append(value)
    return pd.DataFrame(columns).astype({"layer": "Int64", "head": "Int64", "neuron": "Int64"})


@checks_arguments
def logit_terms(
    run: Run, token: Token, *, pos: int = -1, row: int = 0, top: int = 10
) -> pd.DataFrame:
    """A token's logit as `W @ h + b`: the `top` dimensions whose products weight x hidden are largest in size.

    Columns: term, dim, weight (W_U[token, dim]), hidden (h[dim], what the head reads), product, running (the sum so
    far). Behind them "others" (all other dimensions together), "bias", where a family has one "soft-cap or scale", and
    "logit", whose product is the logit itself.

    >>> terms = logit_terms(run, " coffee", top=2)
    >>> terms[["term", "product"]].round(2)
          term  product
    0  dim 199     2.46
    1  dim 322     2.16
    2   others    15.75
    3     bias     0.00
    4    logit    20.37
    """
    whole_number(top, "top", least=1, meaning="how many dimensions to show,", error=BadHook)
    lm = run.lm
    refuse_no_gradient(lm)
    again = _again(run, False, False, pos)
    end = again.captured(f"resid_post.{lm.n_layers - 1}")
    tail = tail_of(lm, (), end.prompts)
    chosen = [lm.token(token)]
    with torch.no_grad():
        read = tail.read(end.values[row : row + 1, 0])
    weight, hidden = _rows_of_head(tail, read, chosen, None)[0].double(), read.given[0].double()
    products = weight * hidden
    order = products.abs().sort(descending=True, stable=True).indices[:top].tolist()
    found = [
        {
            "term": f"dim {dim}",
            "dim": dim,
            **_numbers(weight[dim], hidden[dim]),
            "product": float(products[dim]),
        }
        for dim in order
    ]
    assert end.positions is not None
    logits = again.captured_logits()
    said = float(logits.values[row, logits.column(row, int(end.positions[row, 0])), chosen[0]])
    raw = float(read.raw[0, chosen[0]])
    with torch.no_grad():
        head = lm.submodule(lm.place(Site("lm_head")).path).forward
        bias = float(head(torch.zeros_like(read.given[:1]))[0, chosen[0]])
    found.append(
        {"term": "others", "product": raw - bias - sum(float(products[dim]) for dim in order)}
    )
    found.append({"term": "bias", "product": bias})
    if abs(said - raw) > 1e-6 * max(1.0, abs(raw)):
        found.append({"term": "soft-cap, scale or edit", "product": said - raw})
    table = pd.DataFrame(found)
    table["running"] = table["product"].cumsum()
    table.loc[len(table)] = {"term": "logit", "product": said, "running": said}
    return table.astype({"dim": "Int64"}).reindex(
        columns=["term", "dim", "weight", "hidden", "product", "running"]
    )


def _numbers(weight: Tensor, hidden: Tensor) -> dict[str, float]:
    return {"weight": float(weight), "hidden": float(hidden)}


@checks_arguments
def unembedding(lm: LM, token: Token) -> Float[Tensor, " d_model"]:
    """W_U[token]: the direction in what the head reads along which a token's logit grows, [d_model], a copy.

    It is the same in every context; what changes is the hidden state that it is multiplied with.

    >>> unembedding(lm, " coffee").shape
    torch.Size([576])
    """
    refuse_no_gradient(lm)
    head = lm.submodule(lm.place(Site("lm_head")).path)
    width = (
        lm.shape(Site("final_norm"))[0]
        if "final_norm" in lm.layout.names
        else lm.sizes["d_model"] or 0
    )
    dtype = next(head.parameters()).dtype
    with torch.enable_grad():
        given = torch.zeros(1, width, device=device_of(head), dtype=dtype, requires_grad=True)
        return torch.autograd.grad(head.forward(given)[0, lm.token(token)], given)[0][0].clone()
