"""hk.attribution_graph: which features of a model's transcoders made the next token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_number
from ..attributions.backward import as_float
from ..errors import BadHook, BadPrompt, Unsupported
from ..hooks.capture import capture
from ..lenses.components import AGREE
from ..models.dictionaries import site_of_features
from ..models.lm import LM, refuse_no_gradient
from ..models.prompts import Prompts
from ..models.sites import Site
from ..models.tokens import prompt_text
from ..runs.forward import forward
from ..runs.run import Run
from ..tables.distributions import token_texts
from .dictionary import Dictionary
from .graph import Graph, logit_weights, path_influence
from .local_replacement import ENTERING, HEAD, LocalReplacement, bias_of, pattern_sites

READS = ("mlp_in", "resid_mid", "resid_pre")  # what a transcoder of an MLP may read
INTEGERS = ("layer", "pos", "feature", "token_id")
COLUMNS = ("kind", "site", *INTEGERS, "token", "value", "bias", "prob")


@check_arguments
def attribution_graph(
    lm: LM,
    prompt: Prompts,
    *,
    max_features: int = 4096,
    beyond: Literal["raise", "error"] = "raise",
    max_logits: int = 10,
    logit_share: float = 0.95,
    batch_size: int = 64,
) -> Graph:
    """Returns the attribution graph of a prompt: which features, errors and tokens made the next
    token's logits, through which features (Ameisen et al. 2025, "Circuit Tracing").

    The LM needs a transcoder of every MLP, at "mlp_out.L". Nodes are each active feature at each
    position, the error of each transcoder (what its MLP adds besides), what enters the first block
    at each position, and the logits, minus the mean logit, of the most likely next tokens. An edge
    is what a source adds to the pre-activation of a feature or to a logit through the residual
    stream and attention, with attention patterns and the scales of norms fixed, and not through
    other features. So the edges into a node and its bias sum to its value. This is checked for
    every node, and `Unsupported` raised where it does not hold, as for a model with gates between.

    max_features  a prompt with more active features raises `BadHook`. With beyond="error", those
                  that write most are nodes, and the others are a part of the errors
    max_logits, logit_share   as many of the likeliest tokens as have this probability together
    batch_size    how many nodes a backward is of

    The cost is two forwards, and a backward through the blocks before it for each node.

    >>> small = hk.tiny("llama")
    >>> graph = attribution_graph(small.with_dictionaries(*transcoders, check=False), [[5, 6, 7]])
    >>> graph.prune().edges.columns.tolist()
    ['source', 'target', 'source_site', 'source_pos', 'target_site', 'target_pos', 'weight']
    """
    limits = {"max_features": max_features, "max_logits": max_logits, "batch_size": batch_size}
    for name, number in limits.items():
        check_integer(number, name, least=1, meaning="how many nodes,", error=BadHook)
    check_number(logit_share, "logit_share", least=0, most=1, error=BadHook)
    refuse_no_gradient(lm)
    lm.refuse_engine("an attribution graph needs gradients")
    transcoders = _transcoders_of(lm)
    sites = [ENTERING, *pattern_sites(lm)]
    for transcoder in transcoders:
        sites += [transcoder.reads, transcoder.site]
    captures = capture(list(dict.fromkeys(sites)))
    plain = forward(lm, prompt, captures, capture(HEAD, pos=-1), logits="last")
    if len(plain.lengths) != 1:
        raise BadPrompt(f"a graph is of one prompt, and {len(plain.lengths)} were given")
    active = [ActiveFeatures.of_run(plain, transcoder) for transcoder in transcoders]
    count = sum(len(features.values) for features in active)
    tokens, probs = _likely_tokens(plain, max_logits, logit_share)
    builder = _GraphBuilder(plain, _limit(active, max_features, beyond), tokens)
    nodes = builder.nodes(probs)
    is_target = nodes["kind"].isin(("feature", "logit")).to_numpy(dtype=bool)
    rows = builder.edges(batch_size)
    nodes.loc[is_target, "bias"] = builder.biases().numpy()
    _check_sums(nodes.loc[is_target], rows, getattr(lm.root, "dtype", torch.float32))
    adjacency = torch.zeros(len(nodes), len(nodes), dtype=rows.dtype)
    adjacency[torch.tensor(is_target), : rows.shape[1]] = rows
    about = {"prompt": prompt_text(lm, plain.rows[0]), "model": lm.name, "active_features": count}
    about["transcoders"] = list(map(str, transcoders))
    texts = tuple(token_texts(lm, plain.tokens[0].tolist()))
    return Graph(_with_influence(nodes, adjacency), adjacency, texts, about)


def _check_sums(targets: pd.DataFrame, rows: Tensor, dtype: torch.dtype) -> None:
    """Raises `Unsupported` if the edges into a node and its bias do not sum to its value."""
    biases = torch.tensor(targets["bias"].to_numpy(dtype="float64"))
    values = torch.tensor(targets["value"].to_numpy(dtype="float64"))
    sums = rows.double().sum(1) + biases
    sizes = rows.double().abs().sum(1) + biases.abs() + values.abs()
    errors = (sums - values).abs() / sizes.clamp(min=1e-30)
    worst = int(errors.nan_to_num(torch.inf).argmax())
    if errors[worst] <= AGREE.get(dtype, 1e-4):
        return
    site, pos = targets["site"].iloc[worst], targets["pos"].iloc[worst]
    raise Unsupported(
        f"the edges into {site} at position {pos} and its bias sum to {sums[worst]:.4g}, and its "
        f"value is {values[worst]:.4g}: before it, this model is not linear with fixed attention "
        "patterns and fixed scales of norms (it has a gate, a state, or a norm of another kind), "
        "so that a graph would not hold"
    )


def _with_influence(nodes: pd.DataFrame, adjacency: Tensor) -> pd.DataFrame:
    """Returns the nodes with each one's share in all paths to the logits."""
    influence = path_influence(adjacency, logit_weights(nodes))
    shares = influence / influence.sum().clamp(min=1e-30)
    order = shares.argsort(descending=True, stable=True)
    cumulative = torch.empty_like(shares)
    cumulative[order] = shares[order].cumsum(0)
    table = nodes.assign(influence=shares.numpy(), cumulative=cumulative.numpy())
    table.loc[nodes["kind"] == "logit", ["influence", "cumulative"]] = float("nan")
    return table


def _transcoders_of(lm: LM) -> list[Dictionary]:
    """Returns the transcoder of each MLP. Raises if one is missing, or cannot be used."""
    by_site = {dictionary.site: dictionary for dictionary in lm.dictionaries}
    layers = [Site("mlp_out", layer) for layer in lm.layout.layers("mlp_out") or ()]
    transcoders: list[Dictionary] = []
    missing: list[str] = []
    for site in layers:
        dictionary = by_site.get(site)
        if not isinstance(dictionary, Dictionary):
            missing.append(str(site))
            continue
        _check_transcoder(dictionary, site)
        transcoders.append(dictionary)
    if missing or not layers:
        raise BadHook(
            f"a graph needs a transcoder of every MLP, and this LM has none at "
            f"{', '.join(missing) or 'mlp_out, a site that the model does not have'}: "
            "lm.with_dictionaries(*transcoders)"
        )
    return transcoders


def _check_transcoder(dictionary: Dictionary, site: Site) -> None:
    """Raises if a dictionary of an MLP's output cannot be used in a graph."""
    reads = dictionary.reads
    if reads.layer != site.layer or reads.name not in READS:
        raise BadHook(
            f"the dictionary of {site} reads {reads}, and a graph is made of transcoders, "
            f"which read {', '.join(f'{name}.{site.layer}' for name in READS)}"
        )
    if not dictionary.keeps_error:
        raise BadHook(
            f"the dictionary of {site} replaces what the MLP adds, and a graph has the error "
            "as nodes: leave replace=True out of lm.with_dictionaries"
        )
    if dictionary.normalization != "none":
        raise Unsupported(
            f"the transcoder of {site} normalizes what it reads ({dictionary.normalization}), "
            "so that its features are not linear in it"
        )


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one transcoder, in the order of positions.

    `writes` is what each adds to the stream, and `written` what the MLP adds besides the bias of
    the transcoder.
    """

    transcoder: Dictionary
    positions: Int[Tensor, " feature"]
    numbers: Int[Tensor, " feature"]
    values: Float[Tensor, " feature"]
    writes: Float[Tensor, "feature d_model"]
    written: Float[Tensor, "pos d_model"]

    @staticmethod
    def of_run(run: Run, transcoder: Dictionary) -> ActiveFeatures:
        """Returns the features that are active in a run."""
        inputs = run[transcoder.reads]
        encoded = transcoder.encode(inputs)[0]
        positions, numbers = encoded.nonzero(as_tuple=True)
        values = encoded[positions, numbers]
        writes = values[:, None] * transcoder.weights["W_dec"].to(values.device)[numbers]
        written = (run[transcoder.site] - bias_of(transcoder, inputs))[0]
        return ActiveFeatures(
            transcoder, positions, numbers, values, writes, written.to(values.dtype)
        )

    def select(self, mask: Bool[Tensor, " feature"]) -> ActiveFeatures:
        """Returns some of the features."""
        fields = (self.positions[mask], self.numbers[mask], self.values[mask], self.writes[mask])
        return ActiveFeatures(self.transcoder, *fields, self.written)

    @property
    def error(self) -> Float[Tensor, "pos d_model"]:
        """What the MLP adds at each position besides these features and the bias."""
        return self.written.index_add(0, self.positions, -self.writes)

    @property
    def directions(self) -> Float[Tensor, "feature d_in"]:
        """The gradient of each feature with respect to what the transcoder reads."""
        return self.transcoder.affine(self.numbers.cpu())[0].to(self.values)

    def before(self, inputs: Float[Tensor, "pos d_in"]) -> Float[Tensor, " feature"]:
        """Returns the pre-activation of each feature for other values that are read."""
        constants = self.transcoder.affine(self.numbers.cpu())[1].to(self.values)
        products = inputs[self.positions].to(self.values) * self.directions
        return products.sum(-1) + constants


def _limit(
    active: Sequence[ActiveFeatures], most: int, beyond: Literal["raise", "error"]
) -> list[ActiveFeatures]:
    """Returns at most so many features. Raises `BadHook` for more, or leaves the weakest out."""
    counts = [len(features.values) for features in active]
    if sum(counts) <= most:
        return list(active)
    if beyond == "raise":
        raise BadHook(
            f"{sum(counts)} features are active on this prompt, and max_features={most}: raise it "
            "(the graph has their square as numbers), shorten the prompt, or say beyond='error' "
            "for a graph of those that write most, in which the others are a part of the errors"
        )
    strengths = torch.cat([features.writes.norm(dim=-1).cpu() for features in active])
    mask = torch.zeros_like(strengths, dtype=torch.bool)
    mask[strengths.topk(most).indices] = True
    masks = mask.split(counts)
    return [
        features.select(part.to(features.values.device))
        for features, part in zip(active, masks, strict=True)
    ]


def _likely_tokens(run: Run, most: int, share: float) -> tuple[list[int], list[float]]:
    """Returns the likeliest next tokens that have this probability together, and theirs."""
    logits = run.logits[0, -1, : run.lm.n_tokens].double()
    probs, ids = logits.softmax(-1).topk(min(most, len(logits)))
    count = int((probs.cumsum(0) < share).sum()) + 1
    return ids[:count].tolist(), probs[:count].tolist()


class _GraphBuilder:
    """Computes the rows of one prompt's graph, and owns its local replacement model.

    The sources are the features by layer, the errors by layer and position, and the tokens.
    """

    def __init__(self, plain: Run, active: Sequence[ActiveFeatures], tokens: list[int]) -> None:
        self.plain, self.active, self.tokens = plain, active, tokens
        self.model = LocalReplacement(plain, [features.transcoder for features in active])
        self.errors = [features.error for features in active]
        self.entering = as_float(plain[ENTERING][0])

    def edges(self, batch_size: int) -> Float[Tensor, "target source"]:
        """Returns the rows of all features and logits."""
        rows: list[Tensor] = []
        for features in self.active:
            output, directions = self.model.read[features.transcoder.reads], features.directions
            for start in range(0, len(directions), batch_size):
                batch = slice(start, start + batch_size)
                seeds = directions.new_zeros(len(directions[batch]), *output.shape)
                targets = torch.arange(len(seeds), device=seeds.device)
                seeds[targets, 0, features.positions[batch]] = directions[batch]
                rows.append(self._rows(output, seeds))
        head, count = self.model.read[HEAD], self.plain.lm.n_tokens
        for token in self.tokens:
            direction = head.new_zeros(1, *head.shape)
            direction[..., :count] = -1 / count
            direction[..., token] += 1
            rows.append(self._rows(head, direction))
        return torch.cat(rows)

    def _rows(self, output: Tensor, directions: Tensor) -> Float[Tensor, "target source"]:
        """Returns what each source adds to an output along directions."""
        entering, *added = self.model.pull_back(output, directions)
        count = len(directions)
        of_features: list[Tensor] = []
        of_errors: list[Tensor] = []
        for features, error, gradient in zip(self.active, self.errors, added, strict=True):
            if gradient is None:  # a later layer
                of_features.append(torch.zeros(count, len(features.values)))
                of_errors.append(torch.zeros(count, len(error)))
                continue
            slopes = gradient[:, 0].to(error)
            at_features = slopes[:, features.positions]
            of_features.append(torch.einsum("tfd,fd->tf", at_features, features.writes).cpu())
            of_errors.append(torch.einsum("tpd,pd->tp", slopes, error).cpu())
        assert entering is not None  # every layer reads the stream
        of_tokens = torch.einsum("tpd,pd->tp", as_float(entering[:, 0]), self.entering)
        return torch.cat([*of_features, *of_errors, of_tokens.cpu()], dim=1)

    def biases(self) -> Float[Tensor, " target"]:
        """Returns what reaches each feature and each logit from no source."""
        read = self.model.without_sources()
        biases: list[Tensor] = []
        for features in self.active:
            biases.append(features.before(read[features.transcoder.reads][0]).cpu())
        return torch.cat([*biases, self._centred(read[HEAD])])

    def _centred(self, head: Tensor) -> Float[Tensor, " target"]:
        """Returns the logits of the tokens minus the mean logit."""
        logits = head[0, 0, : self.plain.lm.n_tokens].double().cpu()
        return logits[self.tokens] - logits.mean()

    def nodes(self, probs: Sequence[float]) -> pd.DataFrame:
        """Returns the table of nodes, without biases."""
        ids = self.plain.tokens[0].tolist()
        count = len(ids)
        tables: list[pd.DataFrame] = []
        for features in self.active:
            of_all, numbers = site_of_features(features.transcoder), features.numbers.tolist()
            columns = {"site": [f"{of_all}.{number}" for number in numbers], "feature": numbers}
            columns |= {"layer": of_all.layer, "pos": features.positions.tolist()}
            values = features.values.tolist()
            tables.append(pd.DataFrame({"kind": "feature", **columns, "value": values}))
        for features, error in zip(self.active, self.errors, strict=True):
            site, norms = features.transcoder.site, error.norm(dim=-1).tolist()
            columns = {"site": str(site), "layer": site.layer, "pos": range(count)}
            tables.append(pd.DataFrame({"kind": "error", **columns, "value": norms}))
        columns = {"site": str(ENTERING), "pos": range(count)}
        columns["value"] = self.entering.norm(dim=-1).tolist()
        tables.append(pd.DataFrame({"kind": "token", **columns}))
        columns = {"site": str(HEAD), "pos": count - 1, "token_id": self.tokens, "prob": probs}
        columns["value"] = self._centred(self.plain[HEAD]).tolist()
        tables.append(pd.DataFrame({"kind": "logit", **columns}))
        table = pd.concat(tables, ignore_index=True)
        ids_at_positions = table["pos"].astype(int).map(ids.__getitem__)
        table["token_id"] = table["token_id"].fillna(ids_at_positions)
        table["token"] = token_texts(self.plain.lm, table["token_id"].astype(int))
        table["bias"] = float("nan")
        return table.astype(dict.fromkeys(INTEGERS, "Int64")).reindex(columns=COLUMNS)
