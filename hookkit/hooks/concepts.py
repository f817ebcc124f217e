"""Exchanges two tokens in what a lens reads in the residual stream: `swap_concept`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..arguments import check_integers, check_keywords, describe
from ..errors import BadHook, Unsupported
from ..models.lm import Token
from ..models.positions import IndicesLike, PosLike
from ..models.sites import Site, as_sites, has_name
from .base import (
    Binding,
    Change,
    Constant,
    EditContext,
    EditHook,
    When,
    as_constant,
    as_where,
    check_constant,
)
from .values import convert_once
from .vector import Vector

PARALLEL = 0.999  # the cosine from which on two vectors have no coordinates of their own


@runtime_checkable
class TokenVectors(Protocol):
    """Gives the direction of a token in the residual stream after a block, as `JacobianLens`."""

    def vector(self, token: Token, layer: int) -> Vector: ...


@dataclass(frozen=True)
class SwapConcept(EditHook, verb="swap_concept", bare=("a", "b")):
    """Exchanges two tokens' coordinates in the stream. `swap_concept` returns it.

    vectors  [site, 2, d_model]: the directions of `a` and `b` at each site
    """

    a: Token
    b: Token
    vectors: Constant

    def check(self) -> None:
        check_constant(self.vectors, "the vectors")
        for site in self.sites:
            if not has_name(site, "resid_post") or site.layer is None:
                raise BadHook(f"swap_concept acts after blocks, and {site} is none of them")
        vectors = self.vectors.tensor
        if vectors.ndim != 3 or vectors.shape[:2] != (len(self.sites), 2):
            raise BadHook(
                f"the vectors have shape {list(vectors.shape)}: give two for each site, "
                f"[{len(self.sites)}, 2, d_model]"
            )
        self._check_directions(vectors)

    def _check_directions(self, vectors: Tensor) -> None:
        """Raises `BadHook` if the two vectors of a site are zero or parallel."""
        cosines = torch.cosine_similarity(vectors[:, 0].double(), vectors[:, 1].double(), dim=-1)
        for site, cosine in zip(self.sites, cosines.abs().tolist(), strict=True):
            if not 0 <= cosine <= PARALLEL or not bool(vectors.any(-1).all()):
                raise BadHook(
                    f"{self.a!r} and {self.b!r} have one direction at {site} (cosine {cosine:.4f}),"
                    " so that neither has a coordinate of its own: take other tokens or layers"
                )

    def change(self, binding: Binding) -> Change:
        read, number = binding.read_source, list(self.sites).index(binding.site)
        if read is None:
            raise Unsupported(
                f"{self} reads the unedited model beside the run, which hk.forward, hk.generate "
                "and hk.attach do: not a sweep, a lens or an exported processor"
            )
        basis = self.vectors.tensor[number].double()
        if binding.shape is not None and binding.shape[-1] != basis.shape[-1]:
            raise BadHook(
                f"{self} has vectors of {basis.shape[-1]} numbers, and {binding.site} has "
                f"{binding.shape[-1]}: the lens is of another model"
            )
        fit_basis = convert_once(basis, "the vectors")
        fit_inverse = convert_once(torch.linalg.pinv(basis), "the vectors' inverse")

        def apply(values: Tensor, here: EditContext) -> Tensor:
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            inverse = fit_inverse(wide)
            clean = read(here)[:, :, number].to(wide) @ inverse
            change = clean.flip(-1) - wide @ inverse
            return (wide + change @ fit_basis(wide)).to(values.dtype)

        return apply


@check_keywords
def swap_concept(
    lens: TokenVectors,
    a: Token,
    b: Token,
    *,
    layers: int | Iterable[int],
    pos: PosLike = None,
    rows: IndicesLike = None,
    when: When | None = None,
) -> SwapConcept:
    """Exchanges two tokens in the residual stream after blocks, as a Jacobian lens sees them.

    At each layer, the part of the state in the plane of both tokens' vectors (`lens.vector`) is
    replaced: it gets the coordinates that the *unedited* model has there, exchanged. The rest of
    the state stays. The unedited model reads each row's own text beside the run, which costs a
    forward of its own. Coordinates that were read from the run itself would be exchanged back by
    the next layer (TransformerLens #1746).

    Gurnee, Sofroniew, Lindsey et al. 2026, "Verbalizable Representations Form a Global Workspace
    in Language Models".

    >>> small = hk.tiny("llama")
    >>> lens = hk.fit_jacobian(small, [list(range(2, 40))], tokens=[7, 9], progress=False)
    >>> print(swap_concept(lens, 7, 9, layers=[0, 1]))
    swap_concept(resid_post.0, resid_post.1, 7, 9, vectors=tensor[2, 2, 32])
    """
    if not callable(getattr(lens, "vector", None)):
        raise BadHook(
            f"lens={describe(lens)} gives no vectors of tokens: give what hk.fit_jacobian returned"
        )
    numbers = check_integers(layers, "layers", least=0, meaning="the blocks, counted from 0,")
    pairs = []
    for layer in numbers:
        pairs.append(torch.stack([lens.vector(token, layer).tensor for token in (a, b)]))
    vectors = as_constant(torch.stack(pairs), "the vectors")
    sites = as_sites([Site("resid_post", layer) for layer in numbers])
    return SwapConcept(sites, as_where(pos, rows), a, b, vectors, when=when)
