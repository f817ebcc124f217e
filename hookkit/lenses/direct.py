"""Direct logit attribution: a logit as its exact sum over the components of the model.

`direct_logits` splits a logit by component, `logit_terms` by dimension of the head's input, and
`unembedding` is the direction along which a logit grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..display import quote_token
from ..errors import BadHook, BadPrompt, Unsupported
from ..hooks.capture import Capture, capture
from ..models.devices import device_of
from ..models.lm import LM, Token, refuse_no_gradient
from ..models.next_token import values_at
from ..models.positions import PosLike
from ..models.sites import AnySite, Site, SitesLike
from ..runs.forward import forward
from ..runs.model_end import Cells, Read, cells_of, model_end_of
from ..runs.run import Run
from ..tables.distributions import prompts_of_run, token_texts
from .components import (
    FrozenNorm,
    Part,
    ResidualStream,
    check_feature_sites,
    parts_of,
    required_sites,
    sites_of_features,
    vector_jacobian_product,
)

Tokens = Token | list[Token]
OPTIONAL = ("bias", "cap", "edit")  # kinds of parts that are left out if they are 0


@check_arguments
def direct_logits(
    run: Run,
    token: Tokens,
    *,
    against: Tokens | None = None,
    pos: PosLike = -1,
    heads: bool = False,
    neurons: bool = False,
    features: SitesLike | None = None,
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

    `features` are sites of dictionaries. At "feat.mlp_out.12", each active feature (its number is
    in the column neuron), the dictionary's bias and its error stand in place of that component; at
    "feat.resid_post.12" or "feat.resid_pre.12", in place of everything before.

    The run's prompts are read again with its hooks. Raises `Unsupported` for a generate with edits
    (use a forward over its text), if the stream passes no norm of the usual kinds, and if what a
    block adds cannot be split.

    Direct logit attribution: Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits".

    >>> table = direct_logits(run, " coffee")
    >>> table["logit"].sum().round(3), table.nlargest(2, "logit")["component"].tolist()
    (np.float64(20.371), ['mlp_out.29', 'mlp_out.27'])
    """
    sites: Sequence[AnySite] = ()
    if features is not None:
        sites = check_feature_sites(run.lm, features)
    return decompose_logits(_read_again(run, heads, neurons, pos, sites), token, against)


def decompose_logits(run: Run, token: Tokens, against: Tokens | None = None) -> pd.DataFrame:
    """Returns the table of `direct_logits` for a run that captured the `required_sites`.

    The captures are those of the run's first rows, after its edits.
    """
    lm = run.lm
    refuse_no_gradient(lm)
    cells = cells_of(run.captured(f"resid_post.{lm.n_layers - 1}"))
    ids = _ids_of_cells(run, token, cells)
    other_ids = None if against is None else _ids_of_cells(run, against, cells)
    table = _table(_parts(run, cells, LogitDifference(ids, other_ids)), cells)
    residual = table.loc[table["kind"] == "residual", "logit"]
    table.attrs |= prompts_of_run(run)
    table.attrs["token"] = _names(lm, ids)
    table.attrs["against"] = None if other_ids is None else _names(lm, other_ids)
    table.attrs["residual"] = float(residual.abs().max())
    return table


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """The token of each cell whose logit is split, and the token whose logit is subtracted."""

    ids: Int[Tensor, " cell"]
    other_ids: Int[Tensor, " cell"] | None = None

    def of(self, values: Float[Tensor, "cell vocab"]) -> Float[Tensor, " cell"]:
        """Returns the value of each cell's token, minus that of the other token."""
        selected = values_at(values, self.ids).double()
        if self.other_ids is None:
            return selected
        return selected - values_at(values, self.other_ids).double()

    def direction(self, lm: LM, head_input: Float[Tensor, "cell d"]) -> Float[Tensor, "cell d"]:
        """Returns W_U[token], minus that of the other token: the gradient of the head's output."""
        head, ones = _head_of(lm).forward, torch.ones(len(head_input))
        return vector_jacobian_product(lambda states: self.of(head(states)), head_input, ones)


def _head_of(lm: LM) -> torch.nn.Module:
    return lm.submodule(lm.location(Site("lm_head")).path)


def _ids_of_cells(run: Run, token: Tokens, cells: Cells) -> Int[Tensor, " cell"]:
    count = len(run.lengths)
    tokens = token if isinstance(token, list) else [token] * count
    if len(tokens) != count:
        raise BadPrompt(
            f"there are {len(tokens)} tokens for {count} rows: give one for each row, or one"
        )
    return torch.tensor(list(map(run.lm.token, tokens)))[cells.rows]


def _logits_at(run: Run, cells: Cells) -> Float[Tensor, "cell vocab"]:
    captured = run.captured_logits()
    columns = list(map(captured.column, cells.index.tolist(), cells.positions.tolist()))
    logits = captured.values[cells.index, columns]
    unknown = cells.rows[logits.isnan().any(-1).cpu()].tolist()
    if unknown:
        raise Unsupported(f"the logits of row {unknown[0]} are NaN, and have no parts that add up")
    return logits


def _names(lm: LM, ids: Int[Tensor, " cell"]) -> str:
    return ", ".join(map(quote_token, token_texts(lm, dict.fromkeys(ids.tolist()))))


def _read_again(
    run: Run, heads: bool, neurons: bool, pos: PosLike, features: Sequence[AnySite] = ()
) -> Run:
    """Returns a forward over the run's text, with its edits and all sites that the sum needs."""
    edits = [hook for hook in run.hooks if not isinstance(hook, Capture)]
    if edits and run.settings["verb"] == "generate":
        raise Unsupported(
            f"{edits[0]} acted in a generate, where positions count from the prompt's end: read "
            "its text with hk.forward and the hooks that are meant there, and give that run"
        )
    sites: list[AnySite] = [*required_sites(run.lm, heads=heads, neurons=neurons)]
    sites = list(dict.fromkeys([*sites, *sites_of_features(run.lm, features)]))
    logits = "last" if pos == -1 else "all"
    return forward(run.lm, run.rows, *edits, capture(sites, pos=pos), logits=logits)


def _parts(run: Run, cells: Cells, difference: LogitDifference) -> list[Part]:
    """Returns every part of the logits, which sum to those of the run."""
    lm, logits = run.lm, _logits_at(run, cells)
    end = run.captured(Site("resid_post", lm.n_layers - 1))
    tail, states = model_end_of(lm, (), end.prompts), end.values[cells.index, cells.column]
    norm = FrozenNorm(tail.head_input, states, "what is between the last block and the head")
    with torch.no_grad():
        read = tail.read(states)
    raw, capped, final = map(difference.of, (read.raw, read.logits, logits))
    factor, outward = _scale(read), difference.direction(lm, read.input)
    names = {site.name for site in run.sites if isinstance(site, Site)}
    stream = ResidualStream(run, cells, norm.backward(outward) * factor)
    parts = [
        *parts_of(stream, names),
        Part("final_norm bias", "bias", None, factor * _dot(outward, norm.offset)),
        Part("lm_head bias", "bias", None, factor * (raw - _dot(outward, read.input))),
        Part("soft-cap", "cap", None, capped - factor * raw),
        Part("edits of the logits", "edit", None, final - capped),
    ]
    residual = final - torch.stack([part.total for part in parts]).sum(0)
    listed = [part for part in parts if part.kind not in OPTIONAL or part.shares.abs().max() > 1e-5]
    return [*listed, Part("residual", "residual", None, residual)]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() * other.double()).sum(-1)


def _scale(read: Read) -> float:
    """Returns the factor from the head's output to the logits; 1 if they are not proportional,
    as with a soft-cap."""
    raw, logits = read.raw.double(), read.logits.double()
    largest = raw.abs().argmax()
    factor = float(logits.flatten()[largest] / raw.flatten()[largest])
    error = float((raw * factor - logits).abs().max())
    return factor if error <= 1e-5 * float(logits.abs().max()) else 1.0


def _table(parts: Sequence[Part], cells: Cells) -> pd.DataFrame:
    """Returns one row for each cell and part, or for each neuron of a part."""
    table_rows = []
    locations = zip(cells.rows.tolist(), cells.positions.tolist(), strict=True)
    for cell, location in enumerate(locations):
        for part in parts:
            shares = part.shares[cell].tolist()
            if not isinstance(shares, list):
                numbers = (part.kind, part.layer, part.head, None, shares)
                table_rows.append((*location, part.name, *numbers))
                continue
            for neuron, share in enumerate(shares):
                if part.kind == "feature" and not share:
                    continue  # most features are not active
                numbers = (part.kind, part.layer, part.head, neuron, share)
                table_rows.append((*location, f"{part.name}.{neuron}", *numbers))
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
    end, captured = again.captured(f"resid_post.{lm.n_layers - 1}"), again.captured_logits()
    assert end.positions is not None
    token_id = lm.token(token)
    with torch.no_grad():
        read = model_end_of(lm, (), end.prompts).read(end.values[row : row + 1, 0])
        bias = float(_head_of(lm).forward(torch.zeros_like(read.input))[0, token_id])
    weight = LogitDifference(torch.tensor([token_id])).direction(lm, read.input)[0].double()
    hidden = read.input[0].double()
    products = weight * hidden
    dims = products.abs().sort(descending=True, stable=True).indices[:top]
    logit = float(captured.values[row, captured.column(row, int(end.positions[row, 0])), token_id])
    raw = float(read.raw[0, token_id])
    table = pd.DataFrame({"term": "dim ", "dim": dims.tolist()})
    table["term"] += table["dim"].astype(str)
    for name, numbers in (("weight", weight), ("hidden", hidden), ("product", products)):
        table[name] = numbers[dims].tolist()
    sums = {"others": raw - bias - sum(table["product"]), "bias": bias}
    if abs(logit - raw) > 1e-6 * max(1.0, abs(raw)):
        sums["soft-cap, scale or edit"] = logit - raw
    sums_table = pd.DataFrame({"term": list(sums), "product": list(sums.values())})
    table = pd.concat([table, sums_table], ignore_index=True)
    table["running"] = table["product"].cumsum()
    table.loc[len(table)] = {"term": "logit", "product": logit, "running": logit}
    return table.astype({"dim": "Int64"})


@check_arguments
def unembedding(lm: LM, token: Token) -> Float[Tensor, " d_model"]:
    """W_U[token]: the direction in the head's input along which a token's logit grows.

    Returns a copy, [d_model]. It is the same in every context; the hidden state that it is
    multiplied with changes.

    >>> unembedding(lm, " coffee").shape
    torch.Size([576])
    """
    refuse_no_gradient(lm)
    head = _head_of(lm)
    width = lm.sizes["d_model"] or 0
    if "final_norm" in lm.layout.names:
        width = lm.shape(Site("final_norm"))[0]
    dtype = next(head.parameters()).dtype
    state = torch.zeros(1, width, device=device_of(head), dtype=dtype)
    return LogitDifference(torch.tensor([lm.token(token)])).direction(lm, state)[0].clone()
