"""The Jacobian lens: reads a state through the average Jacobian from its layer to the last one.

    lens = hk.fit_jacobian(lm, texts)
    hk.logit_lens(lm, prompts, lens=lens)
    lens.table                       # how much of each layer is noise
    lens.vector(" coffee", 12)       # the direction that makes the model say it

`JacobianLens` is the value; `jacobian_fit` makes it, and `load_lens` reads it from a file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_integer, shorten
from ..display import count_of, describe_outcome
from ..errors import BadFile, BadHook, OtherModel, Unsupported
from ..files.untrusted import check_mapping, error_message, is_count, parse_json
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.vector import SAME, Vector, differences
from ..models.lm import LM, Token
from ..models.positions import PosLike
from ..models.prompts import Prompts
from ..models.provenance import weights_hash
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.model_end import cells_of, model_end_of
from ..tables.distributions import token_texts
from .components import FrozenNorm
from .direct import unembedding

SITE = re.compile(r"resid_post\.\d+")
PUBLISHED = ".pt"  # files of anthropics/jacobian-lens and TransformerLens


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens:
    """The average Jacobian from a layer's residual stream to the last layer's, for each site.

    Made by `fit_jacobian`, used by `logit_lens` and `swap_concept`.

    sums        site -> [half, row, d_model], on the CPU: the Jacobians of all texts, summed over
                each half of them. A published lens has one half
    counts      the number of texts of each half
    lengths     site -> the mean length of the states, the unit of a vector's dose; NaN if unknown
    tokens      the ids of the tokens whose rows were fitted, or None: a row for each dimension
    directions  [token, d_model], what the Jacobian of each token's row was multiplied with, or None
    about       the model, the texts, and how the lens was fitted
    lm          the model, for `vector` and `rank_tokens`; `load_lens(path, lm=lm)` sets it
    """

    sums: Mapping[str, Float[Tensor, "half row d_model"]]
    counts: tuple[int, ...]
    lengths: Mapping[str, float]
    tokens: tuple[int, ...] | None = None
    directions: Float[Tensor, "token d_model"] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    lm: LM | None = None

    def __repr__(self) -> str:
        sites = shorten(", ".join(self.sums))
        rows = "all rows" if self.tokens is None else count_of(len(self.tokens), "token")
        text = f"JacobianLens({rows} of {count_of(len(self.sums), 'site')}: {sites}; "
        text += f"{count_of(sum(self.counts), 'text')})"
        use = "lens.rank_tokens(prompts)"
        if self.tokens is None:
            use = "hk.logit_lens(lm, prompts, lens=lens)"
        return describe_outcome(text, use, "lens.table")

    def jacobian(self, site: str | Site) -> Float[Tensor, "row d_model"]:
        """Returns the average Jacobian of a site: d h_last[row] / d h_site, or a row a token."""
        if str(site) not in self.sums:
            raise BadHook(
                f"this Jacobian lens was not fitted at {site}: it has {', '.join(self.sums)}"
            )
        return self.sums[str(site)].sum(0) / sum(self.counts)

    def translated(
        self, site: Site, states: Float[Tensor, "state d_model"]
    ) -> Float[Tensor, "state d_model"]:
        """Returns the states as the final norm is to read them."""
        if self.tokens is not None:
            raise Unsupported(
                f"this lens was fitted for {count_of(len(self.tokens), 'token')}, and logit_lens "
                "reads the whole vocabulary: use lens.rank_tokens(prompts), or fit without tokens="
            )
        jacobian = self.jacobian(site)
        if jacobian.shape[-1] != states.shape[-1]:
            raise BadHook(
                f"this lens has {jacobian.shape[-1]} numbers a state, and {site} has "
                f"{states.shape[-1]}: it is of another model"
            )
        return states @ jacobian.T.to(states)

    @property
    def table(self) -> pd.DataFrame:
        """How far each site's Jacobian can be trusted, and whether it says more than the stream.

        Columns: site, layer, texts; noise, the length of the difference of the two halves' means as
        a fraction of the mean's length (half of it is about the mean's own error, and 2 is nothing
        but noise; NaN for a published lens); identity, the multiple of the identity that is nearest
        to the Jacobian, and identity_distance, the length of what remains as a fraction (0: the
        lens is the logit lens). For a lens of tokens, the same of their rows.
        """
        rows: list[dict[str, Any]] = []
        for site, sums in self.sums.items():
            mean = self.jacobian(site).double()
            noise = math.nan
            if len(self.counts) == 2 and all(self.counts):
                counts = torch.tensor(self.counts, dtype=torch.float64)
                first, second = sums.double() / counts[:, None, None]
                noise = float((first - second).norm() / mean.norm())
            identity = torch.eye(len(mean), dtype=mean.dtype)
            if self.directions is not None:
                identity = self.directions.double()
            multiple = float((mean * identity).sum() / identity.square().sum())
            distance = float((mean - multiple * identity).norm() / mean.norm())
            row = {"site": site, "layer": _site(site).layer, "texts": sum(self.counts)}
            quality = {"noise": noise, "identity": multiple, "identity_distance": distance}
            rows.append(row | quality)
        return pd.DataFrame(rows).astype({"layer": "Int64"})

    def vector(self, token: Token, layer: int) -> Vector:
        """Returns the direction in `resid_post` of a layer along which the lens reads a token.

        It is W_U[token] · J, with the final norm's weight in W_U. Its `norm` is the mean length of
        the states at which the lens was fitted; if it is not known, the vector's own length.
        """
        layer = check_integer(layer, "layer", least=0, meaning="the block,", error=BadHook)
        site = Site("resid_post", layer)
        token_id = token
        if self.lm is not None:
            token_id = self.lm.token(token)
        elif isinstance(token, str):
            raise BadHook(f"the token {token!r} needs the model: hk.load_lens(path, lm=lm)")
        direction = self._direction(site, token, int(token_id))
        length = self.lengths[str(site)]
        if math.isnan(length):
            length = float(direction.norm())
        about = {name: self.about[name] for name in ("model", *SAME) if name in self.about}
        about["method"] = f"the Jacobian lens of {token!r}"
        return Vector(site, direction, length, about)

    def _direction(self, site: Site, token: Token, token_id: int) -> Float[Tensor, " d_model"]:
        rows = self.jacobian(site)
        if self.tokens is None:
            return token_directions(self._model(), [token_id])[0] @ rows
        if token_id not in self.tokens:
            raise BadHook(
                f"this lens was not fitted for {token!r}: it has the tokens "
                f"{shorten(str(self._texts()))}"
            )
        return rows[self.tokens.index(token_id)]

    @check_arguments
    def rank_tokens(self, prompts: Prompts, *hooks: Hook, pos: PosLike = -1) -> pd.DataFrame:
        """Ranks the tokens for which the lens was fitted, at each site, for each position.

        Columns: row, pos, site, layer, token, token_id, score, rank (1 is the first of these
        tokens). The score is W_U[token] · J · h. The lens's logit is the score divided by a
        positive number, the scale of the final norm, which the tokens' rows alone do not tell. The
        ranks are therefore those of the whole lens. `hooks` act as in `forward`.

        Raises `Unsupported` for a lens of all rows (use `logit_lens`), and if the final norm or the
        head has a bias, which counts in the order of the tokens.
        """
        lm, sites = self._model(), list(map(_site, self.sums))
        if self.tokens is None or self.directions is None:
            raise Unsupported(
                "this lens has all rows and reads the whole vocabulary: use "
                "hk.logit_lens(lm, prompts, lens=lens, watch=tokens)"
            )
        if self.about.get("bias"):
            raise Unsupported(
                f"the end of {type(lm.root).__name__} has a bias, which decides the order "
                "together with the scale of J · h, which rows of tokens do not tell: fit without "
                "tokens=, for hk.logit_lens"
            )
        run = forward(lm, prompts, *hooks, capture(sites, pos=pos), logits=False)
        tables = []
        for site in sites:
            cells = cells_of(run.captured(site))
            states = run[site][cells.index, cells.column].float().cpu()
            scores = states @ self.jacobian(str(site)).T
            ranks = 1 + (scores[:, None] > scores[..., None]).sum(-1)
            count = len(self.tokens)
            columns = {
                "row": cells.rows.repeat_interleave(count).tolist(),
                "pos": cells.positions.repeat_interleave(count).tolist(),
                "site": str(site),
                "layer": site.layer,
                "token": self._texts() * len(states),
                "token_id": list(self.tokens) * len(states),
                "score": scores.double().flatten().tolist(),
                "rank": ranks.flatten().tolist(),
            }
            tables.append(pd.DataFrame(columns))
        table = pd.concat(tables).astype({"layer": "Int64"})
        order = ["row", "pos", "layer", "rank", "token_id"]
        return table.sort_values(order, ignore_index=True, kind="stable")

    @check_arguments
    def merge(self, other: JacobianLens) -> JacobianLens:
        """Returns the lens of the texts of both lenses."""
        if differ := differences(self.about, other.about):
            raise OtherModel(
                f"the two lenses are of different models: they differ in {', '.join(differ)}"
            )
        if self._kind() != other._kind():
            raise BadHook(
                "the two lenses have other sites, tokens, skip= or halves, so that their Jacobians "
                "are not means of the same: fit both with the same ones"
            )
        sums = {site: values + other.sums[site] for site, values in self.sums.items()}
        counts = list(map(sum, zip(self.counts, other.counts, strict=True)))
        share = sum(self.counts) / sum(counts)
        lengths = {}
        for site, length in self.lengths.items():
            lengths[site] = share * length + (1 - share) * other.lengths[site]
        about = {**self.about, "texts": sum(counts), "progress": None}
        return replace(self, sums=sums, counts=tuple(counts), lengths=lengths, about=about)

    def _kind(self) -> tuple[Any, ...]:
        shapes = {site: sums.shape for site, sums in self.sums.items()}
        return shapes, self.tokens, self.about.get("skip")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the lens to a safetensors file for `load_lens`, and returns its path."""
        from ..files.atomic import save_tensors

        tensors = {f"jacobian/{site}": sums for site, sums in self.sums.items()}
        if self.directions is not None:
            tensors["directions"] = self.directions
        header = {
            "counts": self.counts,
            "lengths": dict(self.lengths),
            "tokens": self.tokens,
            "about": dict(self.about),
        }
        return save_tensors(tensors, path, about={"jacobian": json.dumps(header)})

    def _model(self) -> LM:
        if self.lm is None:
            raise BadHook("this lens was loaded without its model: hk.load_lens(path, lm=lm)")
        return self.lm

    def _texts(self) -> list[str]:
        tokens = list(self.tokens or ())
        return list(map(str, tokens)) if self.lm is None else token_texts(self.lm, tokens)


def _site(name: str) -> Site:
    return Site("resid_post", int(name.rpartition(".")[2]))


def token_directions(lm: LM, ids: Iterable[int]) -> Float[Tensor, "token d_model"]:
    """Returns W_U[token] with the final norm's weight in it: the direction in the last state along
    which the token's logit grows, where the norm's scale is 1.

    Raises `Unsupported` if what is between the last block and the head is neither a norm nor
    linear.
    """
    outward = torch.stack([unembedding(lm, token) for token in ids])
    width = lm.shape(Site("resid_post", lm.n_layers - 1))[0]
    state = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = (state - state.mean()) / state.std(correction=0)  # every norm's scale of it is 1
    states = state.to(outward).expand(len(outward), -1)
    end = model_end_of(lm, (), ())
    norm = FrozenNorm(end.head_input, states, "what is between the last block and the head")
    return norm.backward(outward).float().cpu()


def read_jacobian(
    tensors: Mapping[str, Tensor], text: str, name: str, lm: LM | None
) -> JacobianLens:
    """Returns the lens of a file that `JacobianLens.save` wrote, checked against its model."""
    header = check_mapping(parse_json(text, name, finite=False), name)
    sums: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith("jacobian/"):
            sums[key.removeprefix("jacobian/")] = tensor
    if not _is_header(header, sums, has_directions="directions" in tensors):
        raise BadFile(f"{name} is no Jacobian lens as hookkit writes it: it was changed")
    counts, lengths, tokens = (header[key] for key in ("counts", "lengths", "tokens"))
    about: dict[str, Any] = header["about"]
    if lm is not None and about.get("weights_sha256") != weights_hash(lm):
        raise BadHook(
            f"{name} was fitted on {about.get('model')!r}, whose weights are not those of "
            f"{lm.name!r}"
        )
    ids = None if tokens is None else tuple(tokens)
    ordered = {site: sums[site] for site in lengths}
    directions = tensors.get("directions")
    return JacobianLens(ordered, tuple(counts), lengths, ids, directions, about, lm)


def _is_header(
    header: Mapping[str, Any], sums: Mapping[str, Tensor], *, has_directions: bool
) -> bool:
    """True if the header of a file has what `JacobianLens.save` writes, for these sums."""
    if not {"counts", "lengths", "tokens", "about"} <= set(header):
        return False
    lengths, tokens = header["lengths"], header["tokens"]
    if not isinstance(header["about"], dict) or not isinstance(lengths, dict):
        return False
    if not _are_counts(header["counts"]) or (tokens is not None and not _are_counts(tokens)):
        return False
    if set(lengths) != set(sums) or not all(map(SITE.fullmatch, sums)):
        return False
    halves = {values.shape[:1] for values in sums.values()}
    return halves == {(len(header["counts"]),)} and has_directions == (tokens is not None)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(map(is_count, numbers))


def read_published(path: Path, lm: LM | None) -> JacobianLens:
    """Returns a published lens, a file with "J" (layer -> [d_model, d_model]) and "n_prompts".

    The file is unpickled with `weights_only=True`. It does not say which model it is for, so that
    only the sizes are checked.
    """
    jacobians, count = _load_published(path)
    width: int = max(getattr(next(iter(jacobians.values())), "shape", [0]))
    sums: dict[str, Tensor] = {}
    for layer, jacobian in sorted(jacobians.items()):
        if not is_count(layer) or getattr(jacobian, "shape", None) != (width, width):
            raise BadFile(f"{str(path)!r} has a 'J' that is no square matrix of each layer")
        sums[f"resid_post.{layer}"] = jacobian.float()[None] * count
    if lm is not None:
        _check_size(lm, path, width, max(jacobians))
    about = {"file": path.name, "method": "a published Jacobian lens", "texts": count}
    return JacobianLens(sums, (int(count),), dict.fromkeys(sums, math.nan), None, None, about, lm)


def _check_size(lm: LM, path: Path, width: int, last: int) -> None:
    width_of_model = lm.shape(Site("resid_post", lm.n_layers - 1))[0]
    if width != width_of_model or last >= lm.n_layers:
        raise BadHook(
            f"the lens in {str(path)!r} is of another model: its states have {width} numbers, and "
            f"its last layer is {last}; those of {lm.name!r} have {width_of_model} numbers, and "
            f"its last layer is {lm.n_layers - 1}"
        )


def _load_published(path: Path) -> tuple[dict[Any, Any], int]:
    """Returns "J" and "n_prompts" of a file. Raises `BadFile` if it lacks one of them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many classes of errors
        raise BadFile(f"{str(path)!r} cannot be read: {error_message(error)}") from error
    content = content if isinstance(content, dict) else {}
    jacobians, count = content.get("J"), content.get("n_prompts")
    if not isinstance(jacobians, dict) or not jacobians or not is_count(count) or not count:
        raise BadFile(
            f"{str(path)!r} is no published Jacobian lens: it lacks 'J' or 'n_prompts', as a "
            "checkpoint of an unfinished fit does"
        )
    return jacobians, count
