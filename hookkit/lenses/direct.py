"""Direct logit attribution: a logit as its exact sum over the components of the model.

`direct_logits` splits a logit by component, `logit_terms` by dimension of the head's input, and
`unembedding` is the direction along which a logit grows.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, BadPrompt, Unsupported
from ..hooks.capture import Capture, capture
from ..models.devices import device_of
from ..models.lm import LM, Token
from ..models.positions import PosLike
from ..models.sites import Site
from ..models.training import refuse_no_gradient
from ..runs.forward import forward
from ..runs.run import Run
from .components import Cells, Map, Part, ResidualStream, freeze_norm, parts_of, required_sites
from .model_end import ModelEnd, Read, model_end_of

Tokens = Token | list[Token]


@check_arguments
def direct_logits(
    run: Run,
    token: Tokens,
    *,
    against: Tokens | None = None,
    pos: PosLike = -1,
    heads: bool = False,
    neurons: bool = False,
) -> pd.DataFrame:
    """What each component of the model adds to a token's logit directly, along W_U[token].

    Columns: row, pos, component, kind, layer, head, neuron, logit. The rows of a position sum to
    the token's logit, or with `against` to its logit minus that of the other token. A list of
    tokens has one for each row of the run.

    The components are the embedding and every block's attention and MLP; with `heads` each head and
    the output projection's bias, with `neurons` each neuron, in place of the whole. Norms are
    linear with the scale that they had in this forward, so that each component's share depends on
    the other components only through that scale. After the components come the biases of the final
    norm and the head, the effect of a soft-cap (a scale is in every row), the edits of the run's
    hooks after the blocks, and "residual", the rounding error of the sum. "rest.L" is what a block
    adds besides attention and MLP, "block.L" what a block without either adds, "between" an edit of
    the stream. Where blocks differ, those without heads or neurons stay whole. `attrs` have token,
    against and the largest residual.

    The run's prompts are read again with its hooks. Raises `Unsupported` for a generate with edits
    (use a forward over its text), if the stream passes no norm of the usual kinds, and if what a
    block adds cannot be split.

    Direct logit attribution: Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits".

    >>> table = direct_logits(run, " coffee")
    >>> table["logit"].sum().round(3), table.nlargest(2, "logit")["component"].tolist()
    (np.float64(20.371), ['mlp_out.29', 'mlp_out.27'])
    """
    return decompose_logits(_read_again(run, heads, neurons, pos), token, against)


def decompose_logits(run: Run, token: Tokens, against: Tokens | None = None) -> pd.DataFrame:
    """Returns the table of `direct_logits` for a run that captured the `required_sites`.

    The captures are those of the run's first rows, after its edits.
    """
    lm = run.lm
    refuse_no_gradient(lm)
    end = run.captured(f"resid_post.{lm.n_layers - 1}")
    assert end.positions is not None
    cells: Cells = ([], [])
    locations: list[tuple[int, int]] = []  # row and position of each cell
    for index, positions in enumerate(end.positions.tolist()):
        for column, pos in enumerate(positions):
            if pos >= 0:
                cells[0].append(index)
                cells[1].append(column)
                locations.append((end.rows[index], pos))
    rows = [row for row, _ in locations]
    ids = _ids_of_cells(lm, token, rows, len(run.lengths))
    other_ids = None
    if against is not None:
        other_ids = _ids_of_cells(lm, against, rows, len(run.lengths))
    parts = _parts(run, cells, ids, other_ids, _logits_at(run, cells[0], locations))
    table = _table(parts, locations)
    residual = table.loc[table["kind"] == "residual", "logit"]
    table.attrs["token"] = _names(lm, ids)
    table.attrs["against"] = None if other_ids is None else _names(lm, other_ids)
    table.attrs["residual"] = float(residual.abs().max())
    return table


def _logits_at(
    run: Run, indices: Sequence[int], locations: Sequence[tuple[int, int]]
) -> Float[Tensor, "cell vocab"]:
    captured = run.captured_logits()
    logits = []
    for index, (row, pos) in zip(indices, locations, strict=True):
        logits.append(captured.values[index, captured.column(index, pos)])
        if bool(logits[-1].isnan().any()):
            raise Unsupported(f"the logits of row {row} are NaN, and have no parts that add up")
    return torch.stack(logits)


def _names(lm: LM, ids: Sequence[int]) -> str:
    return ", ".join(dict.fromkeys(repr(lm.string(token)) for token in ids))


def _read_again(run: Run, heads: bool, neurons: bool, pos: PosLike) -> Run:
    """Returns a forward over the run's text, with its edits and all sites that the sum needs."""
    edits = [hook for hook in run.hooks if not isinstance(hook, Capture)]
    if edits and run.settings["verb"] == "generate":
        raise Unsupported(
            f"{edits[0]} acted in a generate, where positions count from the prompt's end: read "
            "its text with hk.forward and the hooks that are meant there, and give that run"
        )
    rows = [row[:length] for row, length in zip(run.tokens.tolist(), run.lengths, strict=True)]
    sites = required_sites(run.lm, heads=heads, neurons=neurons)
    logits = "last" if pos == -1 else "all"
    return forward(run.lm, rows, *edits, capture(sites, pos=pos), logits=logits)


def _ids_of_cells(lm: LM, token: Tokens, rows: Sequence[int], count: int) -> list[int]:
    """Returns the token of each cell; `rows` has the row of each."""
    if not isinstance(token, list):
        return [lm.token(token)] * len(rows)
    if len(token) != count:
        raise BadPrompt(
            f"there are {len(token)} tokens for {count} rows: give one for each row, or one"
        )
    return [lm.token(token[row]) for row in rows]


def _parts(
    run: Run,
    cells: Cells,
    ids: list[int],
    other_ids: list[int] | None,
    logits: Float[Tensor, "cell vocab"],
) -> list[Part]:
    """Returns every part of the logits, which sum to those of the run."""
    lm = run.lm
    end = Site("resid_post", lm.n_layers - 1)
    tail, states = model_end_of(lm, (), run.captured(end).prompts), run[end][cells]
    norm = freeze_norm(tail.head_input, states, "what stands between the last block and the head")
    with torch.no_grad():
        read = tail.read(states)
    raw = _values_of(read.raw, ids, other_ids)
    capped = _values_of(read.logits, ids, other_ids)
    final = _values_of(logits, ids, other_ids)
    factor = _scale(read)
    outward = _rows_of_head(tail, read, ids, other_ids)
    names = {site.name for site in run.sites if isinstance(site, Site)}
    stream = ResidualStream(lm, run, cells, norm.backward(outward) * factor)
    parts = list(parts_of(stream, heads="z" in names, neurons="mlp_post" in names))
    norm_bias = factor * _dot(outward, norm.offset.expand_as(outward))
    head_bias = factor * (raw - _dot(outward, read.input))
    optional_parts = [
        Part("final_norm bias", "bias", None, norm_bias),
        Part("lm_head bias", "bias", None, head_bias),
        Part("soft-cap", "cap", None, capped - factor * raw),
        Part("edits of the logits", "edit", None, final - capped),
    ]
    totals = [_total(part) for part in (*parts, *optional_parts)]
    residual = Part("residual", "residual", None, final - torch.stack(totals).sum(0))
    kept_parts = []
    for part in (*parts, *optional_parts):
        if part.kind not in ("bias", "cap", "edit") or bool((part.shares.abs() > 1e-5).any()):
            kept_parts.append(part)
    return [*kept_parts, residual]


def _total(part: Part) -> Float[Tensor, " cell"]:
    return part.shares.flatten(1).sum(1) if part.shares.ndim > 1 else part.shares


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() * other.double()).sum(-1)


def _values_of(
    values: Float[Tensor, "cell vocab"], ids: list[int], other_ids: list[int] | None
) -> Float[Tensor, " cell"]:
    """Returns the value of each cell's token, minus that of the other token."""
    cells = torch.arange(len(ids), device=values.device)
    selected = values[cells, torch.tensor(ids, device=values.device)].double()
    if other_ids is None:
        return selected
    return selected - values[cells, torch.tensor(other_ids, device=values.device)].double()


def _head_of(lm: LM) -> Map:
    return lm.submodule(lm.place(Site("lm_head")).path).forward


def _rows_of_head(
    tail: ModelEnd, read: Read, ids: list[int], other_ids: list[int] | None
) -> Float[Tensor, "cell d"]:
    """Returns W_U[token], minus that of the other token, for each cell: the head's gradient."""
    head = _head_of(tail.lm)
    with torch.enable_grad():
        leaf = read.input.detach().clone().requires_grad_()
        return torch.autograd.grad(_values_of(head(leaf), ids, other_ids).sum(), leaf)[0]


def _scale(read: Read) -> float:
    """Returns the factor from the head's output to the logits; 1 if they are not proportional,
    as with a soft-cap."""
    raw, logits = read.raw.double(), read.logits.double()
    largest = raw.abs().argmax()
    factor = float(logits.flatten()[largest] / raw.flatten()[largest])
    error = float((raw * factor - logits).abs().max())
    return factor if error <= 1e-5 * float(logits.abs().max()) else 1.0


def _table(parts: Sequence[Part], locations: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Returns one row for each cell and part, or for each neuron of a part."""
    table_rows = []
    for cell, (row, pos) in enumerate(locations):
        for part in parts:
            start = (row, pos, part.name, part.kind, part.layer, part.head)
            shares = part.shares[cell].tolist()
            if not isinstance(shares, list):
                table_rows.append((*start, None, shares))
                continue
            for neuron, share in enumerate(shares):
                name = f"{part.name}.{neuron}"
                table_rows.append((row, pos, name, part.kind, part.layer, part.head, neuron, share))
    names = ["row", "pos", "component", "kind", "layer", "head", "neuron", "logit"]
    table = pd.DataFrame(table_rows, columns=names)
    return table.astype({"layer": "Int64", "head": "Int64", "neuron": "Int64"})


@check_arguments
def logit_terms(
    run: Run, token: Token, *, pos: int = -1, row: int = 0, top: int = 10
) -> pd.DataFrame:
    """A token's logit as `W @ h + b`: the `top` dimensions with the largest products.

    Columns: term, dim, weight (W_U[token, dim]), hidden (h[dim], the head's input), product,
    running (the sum so far). After them "others" (all other dimensions together), "bias", if a
    family has one "soft-cap or scale", and "logit", whose product is the logit itself.

    >>> terms = logit_terms(run, " coffee", top=2)
    >>> terms[["term", "product"]].round(2)
          term  product
    0  dim 199     2.46
    1  dim 322     2.16
    2   others    15.75
    3     bias     0.00
    4    logit    20.37
    """
    check_integer(top, "top", least=1, meaning="how many dimensions to show,", error=BadHook)
    lm = run.lm
    refuse_no_gradient(lm)
    again = _read_again(run, False, False, pos)
    end = again.captured(f"resid_post.{lm.n_layers - 1}")
    assert end.positions is not None
    tail = model_end_of(lm, (), end.prompts)
    token_id = lm.token(token)
    with torch.no_grad():
        read = tail.read(end.values[row : row + 1, 0])
        bias = float(_head_of(lm)(torch.zeros_like(read.input[:1]))[0, token_id])
    weight = _rows_of_head(tail, read, [token_id], None)[0].double()
    hidden = read.input[0].double()
    products = weight * hidden
    terms: list[dict[str, object]] = []
    total = 0.0
    for dim in products.abs().sort(descending=True, stable=True).indices[:top].tolist():
        product = float(products[dim])
        total += product
        numbers = {"weight": float(weight[dim]), "hidden": float(hidden[dim])}
        terms.append({"term": f"dim {dim}", "dim": dim, **numbers, "product": product})
    captured = again.captured_logits()
    logit = float(captured.values[row, captured.column(row, int(end.positions[row, 0])), token_id])
    raw = float(read.raw[0, token_id])
    terms.append({"term": "others", "product": raw - bias - total})
    terms.append({"term": "bias", "product": bias})
    if abs(logit - raw) > 1e-6 * max(1.0, abs(raw)):
        terms.append({"term": "soft-cap, scale or edit", "product": logit - raw})
    table = pd.DataFrame(terms)
    table["running"] = table["product"].cumsum()
    table.loc[len(table)] = {"term": "logit", "product": logit, "running": logit}
    columns = ["term", "dim", "weight", "hidden", "product", "running"]
    return table.astype({"dim": "Int64"}).reindex(columns=columns)


@check_arguments
def unembedding(lm: LM, token: Token) -> Float[Tensor, " d_model"]:
    """W_U[token]: the direction in the head's input along which a token's logit grows.

    Returns a copy, [d_model]. It is the same in every context; the hidden state that it is
    multiplied with changes.

    >>> unembedding(lm, " coffee").shape
    torch.Size([576])
    """
    refuse_no_gradient(lm)
    head = lm.submodule(lm.place(Site("lm_head")).path)
    width = lm.sizes["d_model"] or 0
    if "final_norm" in lm.layout.names:
        width = lm.shape(Site("final_norm"))[0]
    dtype = next(head.parameters()).dtype
    with torch.enable_grad():
        leaf = torch.zeros(1, width, device=device_of(head), dtype=dtype, requires_grad=True)
        return torch.autograd.grad(head.forward(leaf)[0, lm.token(token)], leaf)[0][0].clone()
