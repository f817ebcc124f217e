"""What the weights of an attention head do to tokens: its OV and QK circuits, by their factors.

    hk.ov(lm, 0, 3).top(" Mary")      # the tokens that the head writes where it attends to " Mary"
    hk.qk(lm, 0, 3).top(" Mary")      # the keys that the query " Mary" attends to
    hk.ov(lm, 4, 1).composition(5)    # which heads of block 5 read what the head writes

A circuit is a matrix vocabulary x vocabulary of rank d_head. It is never built: all is computed
from its two factors [vocab, d_head]. A forward of a few tokens shows that the factors are those of
the model; where they are not, `Unsupported` has the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ..arguments import check_arguments, check_integer, check_seed
from ..display import describe_outcome, render_html
from ..errors import BadHook, Unsupported
from ..hooks.capture import capture
from ..hooks.edits import edit
from ..models.lm import LM, Token
from ..models.padding import trial_rows
from ..models.sites import Site
from ..models.weights import find_weights, matrix_of
from ..runs.dispatch import forward_of_site
from ..runs.forward import forward
from ..runs.model_end import model_end_of
from ..runs.run import Run
from ..tables.distributions import token_texts
from .components import agree

Map = Callable[[Tensor], Tensor]
FAR = 1e3  # the length of vectors at which a norm's epsilon does not matter
CHECKED_PAIRS = 6  # of a query and a key, in the check of a QK circuit
TAILS = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The weights of a block's attention, read from the model and checked against a forward.

    norm   the block's norm before attention (or the identity)
    run    a forward of a few tokens, with captures
    """

    lm: LM
    layer: int
    norm: Map
    run: Run

    @staticmethod
    @torch.no_grad()
    def read(lm: LM, layer: int, length: int = 0) -> AttentionWeights:
        """Returns the weights of a block. `length` is how many tokens the check has at least."""
        names = ("resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "scores", "pattern")
        for name in names:
            lm.location(Site(name, layer))  # raises if the block has no such site
        row = trial_rows(lm)[0]
        row = (tuple(row) * (length // len(row) + 1))[: max(length, len(row))]
        run = forward(lm, [row], capture([Site(name, layer) for name in names]), logits=False)
        before, after = run[Site("resid_pre", layer)], run[Site("attn_in", layer)]
        block = lm.submodule(lm.family.block.format(layer=layer))
        for norm in (lambda values: values, *block.children()):
            try:
                if agree(norm(before), after):
                    return AttentionWeights(lm, layer, norm, run)
            except (TypeError, RuntimeError, AttributeError, ValueError, IndexError):
                continue  # it is no norm, and takes other arguments
        raise Unsupported(
            f"attention of block {layer} does not read the stream through one norm of the block, "
            "so that its weights say nothing of tokens"
        )

    def kv_head(self, head: int) -> int:
        """Returns the head of keys and values that a query head reads."""
        sizes = self.lm.layout.sizes_of(self.layer)
        heads, kv_heads = sizes["head"] or 1, sizes["kv_head"] or sizes["head"] or 1
        check_integer(head, "head", least=0, most=heads - 1, meaning="a head of the block,")
        return head * kv_heads // heads

    def projection(self, name: str, head: int) -> tuple[Tensor, Tensor]:
        """Returns the matrix [d_head, d_model] and the bias of a head's q, k or v."""
        site = Site(name, self.layer, head)
        weights = find_weights(self.lm, site)
        module: Any = self.lm.submodule(weights.path)
        index = weights.index.to(matrix_of(module).device)
        matrix, bias = matrix_of(module)[index].float(), torch.zeros(len(index))
        if getattr(module, "bias", None) is not None:
            bias = module.bias.detach()[index].float()
        read = self.run[Site("attn_in", self.layer)].float()
        computed = read @ matrix.T.to(read) + bias.to(read)
        if weights.reads or not agree(
            computed, self.run[Site(name, self.layer)][:, :, head].float()
        ):
            raise Unsupported(f"{site} is not one matrix of what attention reads")
        return matrix, bias.to(matrix)

    def output(self, head: int) -> Float[Tensor, "d_model d_head"]:
        """Returns the head's part of the output projection, in units of the stream."""
        site, added = Site("z", self.layer), Site("attn_out", self.layer)
        values, factor = self.run[site], self.lm.layout.factor(added)
        with torch.no_grad():
            projected = forward_of_site(self.lm, site)(values.flatten(2)) * factor
        if not agree(projected, self.run[added]):
            raise Unsupported(
                f"what block {self.layer} adds as attn_out is not its output projection: a norm "
                "after it scales what a head writes by what all heads write"
            )
        weights = find_weights(self.lm, Site("z", self.layer, head))
        matrix = matrix_of(self.lm.submodule(weights.path))
        return matrix[:, weights.index.to(matrix.device)].float() * factor

    def check_values(self, head: int) -> None:
        """Raises `Unsupported` if a head's output is not its pattern times its values."""
        values = self.run[Site("v", self.layer)][0, :, self.kv_head(head)].float()
        pattern = self.run[Site("pattern", self.layer)][0, head].float()
        if not agree(pattern @ values, self.run[Site("z", self.layer)][0, :, head].float()):
            raise Unsupported(
                f"z.{self.layer}.{head} is not the pattern times the values (a gate, a norm of "
                "values, or a difference of two patterns), so that its weights alone do not say "
                "what it writes"
            )

    @torch.no_grad()
    def of_tokens(self, matrix: Tensor, bias: Tensor) -> Float[Tensor, "vocab d_head"]:
        """Returns a projection of every token's embedding, through the block's norm."""
        embedding = find_weights(self.lm, Site("embed"))
        table = matrix_of(self.lm.submodule(embedding.path)).T[: self.lm.n_tokens]
        normed = self.norm(table * embedding.factor)
        return normed.float() @ matrix.T.to(normed.device) + bias.to(normed.device)

    @cached_property
    def folded_norm(self) -> Float[Tensor, "d_model d_model"]:
        """The norm as a matrix for row vectors, with its scale set to 1."""
        return fold(self.norm, self.run[Site("resid_pre", self.layer)][0])


@torch.no_grad()
def fold(norm: Map, states: Float[Tensor, "state d_in"]) -> Float[Tensor, "d_in d_out"]:
    """Returns a norm without the division by its scale, as a matrix for row vectors.

    Raises `Unsupported` if the map is neither a LayerNorm, an RMSNorm nor linear.
    """
    width = states.shape[-1]
    axes = torch.eye(width, dtype=states.dtype, device=states.device) * FAR
    zero = norm(torch.zeros_like(states[:1]))
    images, doubled = (norm(axes) - zero).float(), (norm(2 * axes) - zero).float()
    shifted = norm(states + states.abs().mean()).float() - norm(states).float()
    centred = float(shifted.abs().max()) <= 1e-3 * float(norm(states).abs().max())
    if agree(doubled, 2 * images):
        matrix = images / FAR
    else:
        variance = (1 / width - 1 / width**2) if centred else 1 / width
        matrix = images * variance**0.5
    expected = (norm(states) - zero).float()
    cosines = torch.cosine_similarity(states.float() @ matrix, expected, dim=-1)
    if float(cosines.min()) < 1 - 1e-3:
        raise Unsupported("a norm of this model is neither a LayerNorm, an RMSNorm nor linear")
    return matrix


@torch.no_grad()
def output_directions(weights: AttentionWeights) -> tuple[Tensor, Tensor]:
    """Returns the final norm as a matrix for row vectors, and W_U [vocab, d]."""
    lm, run = weights.lm, weights.run
    unembedding = matrix_of(lm.submodule(find_weights(lm, Site("lm_head")).path))
    states = run[Site("resid_pre", weights.layer)][0]
    final_norm = fold(model_end_of(lm, (), run.prompts).head_input, states)
    return final_norm, unembedding[: lm.n_tokens].float()


# ---- circuits


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A head's matrix vocabulary x vocabulary, as the product of two factors [vocab, d_head]."""

    lm: LM
    layer: int
    head: int
    left: Float[Tensor, "vocab d_head"]
    right: Float[Tensor, "vocab d_head"]

    def _row(self, token: Token) -> Float[Tensor, " vocab"]:
        return self.right @ self.left[self.lm.token(token)]

    def _table(self, values: Float[Tensor, " vocab"], name: str, n: int, largest: bool) -> Any:
        check_integer(n, "n", least=1, meaning="how many tokens to show,")
        best = values.cpu().topk(min(n, len(values)), largest=largest)
        ids = best.indices.tolist()
        columns = {"token": token_texts(self.lm, ids), "token_id": ids, name: best.values.tolist()}
        return pd.DataFrame(columns)

    def _repr_html_(self) -> str:
        facts = {"layer": self.layer, "head": self.head, "rank": self.left.shape[1]}
        return render_html(type(self).__name__, facts)

    def __repr__(self) -> str:
        vocab, rank = self.left.shape
        name = type(self).__name__
        text = f"{name}({self.layer}.{self.head}: {vocab} x {vocab} tokens, rank {rank})"
        return describe_outcome(text, f"{name.lower()}.top(token)")


@dataclass(frozen=True, eq=False, repr=False)
class OV(Circuit):
    """What a head writes into the logits where it attends to a token. `ov` returns it.

    left    [vocab, d_head]  the value of each token
    right   [vocab, d_head]  the logit of each token that a value writes
    bias    [d_head]         the part of all values that is the same
    """

    bias: Float[Tensor, " d_head"]
    weights: AttentionWeights

    def logits(self, token: Token) -> Float[Tensor, " vocab"]:
        """Returns what the head adds to every logit where it attends to this token alone."""
        return self._row(token)

    def top(self, token: Token, n: int = 10, *, largest: bool = True) -> pd.DataFrame:
        """Returns the n tokens that the head writes most where it attends to a token, or least.

        Columns: token, token_id, logit.
        """
        return self._table(self.logits(token), "logit", n, largest)

    @cached_property
    def eigenvalues(self) -> Complex[Tensor, " d_head"]:
        """The eigenvalues of the matrix that are not zero, without the bias; d_head of them."""
        values = (self.left - self.bias.to(self.left)).double()
        return torch.linalg.eigvals((self.right.double().T @ values).cpu())

    @property
    def copying(self) -> float:
        """The sum of the eigenvalues divided by the sum of their sizes, -1 to 1.

        1 if all are positive: the head raises the tokens that it attends to (Elhage et al. 2021).
        """
        return float(self.eigenvalues.real.sum() / self.eigenvalues.abs().sum())

    @property
    def positive(self) -> float:
        """The share of the eigenvalues with a positive real part."""
        return float((self.eigenvalues.real > 0).double().mean())

    @check_arguments
    def composition(self, layer: int, *, draws: int = 100, seed: int = 0) -> pd.DataFrame:
        """Returns how much the heads of a later block read of what this head writes.

        Columns: kind ("q", "k", "v"), layer, head; score, the norm of the product of the two heads'
        matrices divided by the product of their norms (Frobenius); random, what it is on average
        (root mean square) if the stream is turned at random between them, 1 / sqrt(d_model);
        random_low and random_high, between which 95 % of `draws` such turns lie.

        Norms are folded into the weights that read them, and q and k are at distance 0, without the
        rotation of positions. Elhage et al. 2021, "A Mathematical Framework for Transformer
        Circuits".
        """
        check_integer(draws, "draws", least=2, meaning="how many random turns,")
        check_integer(layer, "layer", least=self.layer + 1, meaning="a later block,", error=BadHook)
        later = AttentionWeights.read(self.lm, layer)
        folded = self.weights.folded_norm
        values = self.weights.projection("v", self.weights.kv_head(self.head))[0] @ folded.T
        writes = self.weights.output(self.head)
        heads = self.lm.layout.sizes_of(layer)["head"] or 1
        frames = _frames(writes, draws, check_seed(seed))
        lines = []
        for head in range(heads):
            readers = _readers(later, head)
            for kind, (left, reader) in readers.items():
                norm = _product_norm(left @ left.T, reader @ later.folded_norm.T, None)
                norm = norm * _product_norm(writes.T @ writes, values, None)
                gram, through = values @ values.T, reader @ later.folded_norm.T
                score = _product_norm(left @ left.T, through @ writes, gram) / norm
                turned = [_product_norm(left @ left.T, through @ frame, gram) for frame in frames]
                low, high = np.quantile(np.array(turned) / norm, TAILS)
                line = {"kind": kind, "layer": layer, "head": head, "score": score}
                line |= {"random": len(writes) ** -0.5}
                lines.append(line | {"random_low": float(low), "random_high": float(high)})
        return pd.DataFrame(lines)


def _readers(weights: AttentionWeights, head: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns by kind of composition what a head reads with, and the factor on the other side."""
    query, key, value = (
        weights.projection(name, number)[0]
        for name, number in (
            ("q", head),
            ("k", weights.kv_head(head)),
            ("v", weights.kv_head(head)),
        )
    )
    folded = weights.folded_norm.T
    return {
        "q": (key @ folded, query),
        "k": (query @ folded, key),
        "v": (weights.output(head).T, value),
    }


def _product_norm(left: Tensor, core: Tensor, right: Tensor | None) -> float:
    """Returns the Frobenius norm of L core R, from L'L and RR' (None: the identity)."""
    after = core if right is None else core @ right.to(core)
    return float(
        (left.to(core).double() @ after.double() * core.double()).sum().clamp(min=0).sqrt()
    )


def _frames(writes: Float[Tensor, "d_model d_head"], draws: int, seed: int) -> list[Tensor]:
    """Returns what a head writes, after random turns of the stream."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linalg.qr(writes.cpu())[1]
    frames = []
    for _ in range(draws):
        noise = torch.randn(writes.shape, generator=generator)
        frames.append((torch.linalg.qr(noise)[0] @ lengths).to(writes))
    return frames


@check_arguments
def ov(lm: LM, layer: int, head: int) -> OV:
    """Returns a head's OV circuit in tokens: what it adds to the logits where it reads a token.

    `ov.top(" Mary")` are the tokens that it writes most, `ov.copying` says whether it raises the
    tokens that it reads, and `ov.composition(layer)` which later heads read it.

    The token is its embedding, through the block's own norm and with all biases of the value. In
    block 0 of a model without position embeddings that is exact; in later blocks, what earlier
    blocks have added is left out. What it writes is in logits of `lm_head` for a final norm of
    scale 1: divide by the scale (the root mean square) of the last state. The bias of the output
    projection belongs to no head and is left out. A head reads the values of its group.

    Raises `Unsupported` where the weights do not say it: a norm after the output projection (Gemma
    2, OLMo 2), a gate, quantised weights; `MissingSite` for latent attention (DeepSeek).

    >>> ov(lm, 0, 3).top(" Mary", 3).columns.tolist()
    ['token', 'token_id', 'logit']
    """
    weights = AttentionWeights.read(lm, layer)
    matrix, bias = weights.projection("v", weights.kv_head(head))
    weights.check_values(head)
    final_norm, unembedding = output_directions(weights)
    through = weights.output(head).T.to(final_norm) @ final_norm
    writes = unembedding @ through.T.to(unembedding)
    values = weights.of_tokens(matrix, bias).to(writes)
    return OV(lm, layer, head, values, writes, bias, weights)


@dataclass(frozen=True, eq=False, repr=False)
class QK(Circuit):
    """The attention scores of a head between tokens at a distance. `qk` returns it.

    left      [vocab, d_head]  the query of each token, turned and scaled
    right     [vocab, d_head]  the key of each token
    distance  how many positions the key is before the query
    """

    distance: int

    def scores(self, query: Token) -> Float[Tensor, " vocab"]:
        """Returns the score, before the softmax, of every token as the key of this query."""
        return self._row(query)

    def top(self, query: Token, n: int = 10, *, largest: bool = True) -> pd.DataFrame:
        """Returns the n keys with the largest scores for a query, or the smallest.

        Columns: token, token_id, score.
        """
        return self._table(self.scores(query), "score", n, largest)


@check_arguments
def qk(lm: LM, layer: int, head: int, *, distance: int = 0) -> QK:
    """Returns a head's QK circuit in tokens: which keys a query attends to.

    `qk.top(" Mary")` are the keys with the largest scores, which are those of the site `scores`,
    scaled, before the softmax. Queries and keys are tokens' embeddings through the block's own norm
    and with biases, as in `ov`: exact in block 0 without position embeddings. Where positions are
    rotary, the key is `distance` positions before the query, by default at the query itself. A head
    reads the keys of its group.

    Raises `Unsupported` where scores are not products of both: queries and keys that are normalised
    (Qwen 3, Gemma 3), a soft-cap (Gemma 2), a bias of positions (ALiBi), and rotations inside
    attention's own code for distance > 0; `MissingSite` for latent attention (DeepSeek).

    >>> qk(lm, 0, 3, distance=1).top(" Mary", 3).columns.tolist()
    ['token', 'token_id', 'score']
    """
    check_integer(distance, "distance", least=0, meaning="positions from the key to the query,")
    weights = AttentionWeights.read(lm, layer, distance + CHECKED_PAIRS)
    kv_head = weights.kv_head(head)
    module: Any = lm.submodule(lm.location(Site("scores", layer)).path)
    if getattr(module, "attn_logit_softcapping", None) is not None:
        raise Unsupported(f"the scores of block {layer} have a soft-cap, and are no products")
    query_weights, key_weights = weights.projection("q", head), weights.projection("k", kv_head)
    query_turn, key_turn = _turns(weights, head, distance)
    run, scores = weights.run, weights.run[Site("scores", layer)][0, head].float()
    queries = run[Site("q", layer)][0, distance:, head].float() @ query_turn
    keys = run[Site("k", layer)][0, : len(queries), kv_head].float() @ key_turn
    products, actual = (queries * keys).sum(-1), scores.diagonal(-distance)
    scale = float((products * actual).sum() / products.square().sum())
    if not agree(products * scale, actual):
        raise Unsupported(
            f"scores.{layer}.{head} at distance {distance} are not scaled products of q and k: "
            "they are normalised, have a bias of the distance, or are turned by other code"
        )
    left = weights.of_tokens(*query_weights) @ query_turn * scale
    right = weights.of_tokens(*key_weights) @ key_turn
    return QK(lm, layer, head, left, right, distance)


def _turns(weights: AttentionWeights, head: int, distance: int) -> tuple[Tensor, Tensor]:
    """Returns the rotations of a query at a distance and of a key at position 0, for row vectors.

    They are what the model makes of the unit vectors, in a forward with one row for each.
    """
    lm, layer, kv_head = weights.lm, weights.layer, weights.kv_head(head)
    width = weights.run[Site("q", layer)].shape[-1]
    if "q_rot" not in lm.layout.names or lm.layout.find("q_rot", layer) is None:
        identity = torch.eye(width, device=weights.run[Site("q", layer)].device)
        return identity, identity
    query, key = Site("q", layer, head), Site("k", layer, kv_head)
    read = [Site("q_rot", layer, head), Site("k_rot", layer, kv_head)]
    row = list(weights.run.prompts[0][: distance + 1])

    def put_in(values: Tensor) -> Tensor:
        return torch.eye(width).to(values)[:, None]

    hooks = [edit(query, put_in, pos=distance), edit(key, put_in, pos=0)]
    captures = [capture(read[0], pos=distance), capture(read[1], pos=0)]
    run = forward(lm, [row] * width, *hooks, *captures, logits=False)
    return run[read[0]][:, 0].float(), run[read[1]][:, 0].float()
