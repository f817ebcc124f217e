"""Subspaces of the values at a site, within which one prompt takes the values of another.

fit = hk.fit_subspace(lm, pairs, "resid_post.12", 4)
fit.table                                  # interchange accuracy beside its controls
hk.generate(lm, base, fit.subspace.interchange(source_run, pos=-1), max_new_tokens=8)
fit.subspace.save("city.safetensors")
hk.load_subspace(lm, "city.safetensors")
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_fields, check_seed, describe
from ..display import count_of, describe_outcome, render_html
from ..errors import BadFile, BadHook
from ..files.atomic import save_tensors
from ..files.untrusted import check_file, check_mapping, parse_json, read_tensors
from ..models.chat import Chat
from ..models.lm import LM
from ..models.positions import IndicesLike, PosLike
from ..models.sites import AnySite, ModuleSite, Site, Sites, parse_site
from .ablation import HasCaptures, Patch, patch
from .base import Constant, When, as_constant, require_vectors, set_field
from .probe import as_plain_mapping
from .values import check_directions, orthonormal_basis
from .vector import check_same_model, describe_model


@check_fields
@dataclass(frozen=True, repr=False)
class Subspace:
    """A linear subspace of the values at a site.

    site    where it is
    basis   [k, d], in float32 on the CPU. Independent directions are made orthonormal
    about   how it was fitted: model and hashes, data_sha256 of the pairs' tokens …

    `hk.fit_subspace` and `hk.load_subspace` return it. Raises `BadHook` for directions that depend
    on each other.

    >>> subspace = hk.types.Subspace("resid_post.6", torch.eye(576)[:2])
    >>> print(subspace.interchange("Green tea with", pos=-1))
    patch(resid_post.6, 'Green tea with', subspace=tensor[2, 576], pos=-1)
    """

    site: AnySite
    basis: Constant
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        site = parse_site(self.site) if isinstance(self.site, str) else self.site
        if not isinstance(site, Site | ModuleSite) or site.every_layer:
            raise BadHook(
                f"site={describe(self.site)}: a subspace is at one site, such as 'resid_post.6'"
            )
        require_vectors(Sites((site,)), "a subspace is of")
        basis = self.basis.tensor if isinstance(self.basis, Constant) else self.basis
        directions = as_constant(basis, "the subspace")
        check_directions(directions, "the subspace")
        set_field(self, "site", site)
        rows = torch.atleast_2d(directions.tensor).float().cpu()
        if (rows @ rows.T - torch.eye(len(rows))).abs().max() > 1e-5:
            rows = orthonormal_basis(rows).T.float()
        set_field(self, "basis", Constant(rows))
        set_field(self, "about", as_plain_mapping(self.about))

    @property
    def k(self) -> int:
        """The number of dimensions."""
        return len(self.basis.tensor)

    def interchange(
        self,
        source: HasCaptures | str | Chat,
        *,
        pos: PosLike = None,
        source_pos: PosLike = None,
        rows: IndicesLike = None,
        when: When | None = None,
    ) -> Patch:
        """Returns a hook that takes the component within the subspace from a source.

        It is `hk.patch(site, source, subspace=basis)`: an interchange intervention. The source is a
        run with a capture of the site, or a prompt.
        """
        settings = {"pos": pos, "source_pos": source_pos, "rows": rows, "when": when}
        return patch(self.site, source, subspace=self.basis.tensor, **settings)

    def angles(self, other: Subspace) -> Float[Tensor, " angle"]:
        """Returns the principal angles to another subspace in radians, the smallest first.

        There are as many as the smaller subspace has dimensions (Björck and Golub 1973).
        """
        first, second = sorted((self, other), key=lambda subspace: subspace.k, reverse=True)
        large, small = first.basis.tensor.double(), second.basis.tensor.double()
        if large.shape[1] != small.shape[1]:
            raise BadHook(
                f"subspaces of {large.shape[1]} and {small.shape[1]} numbers have no angles "
                "between them"
            )
        # the sines are exact for small angles, and the cosines for large ones
        outside = small - (small @ large.T) @ large
        sines = torch.linalg.svdvals(outside).clamp(max=1).flip(0)
        cosines = torch.linalg.svdvals(small @ large.T).clamp(max=1)
        return torch.where(sines < 0.7, sines.asin(), cosines.acos())

    def random(self, *, seed: int = 0) -> Subspace:
        """Returns a random subspace of as many dimensions at the same site."""
        digest = hashlib.sha256(repr((check_seed(seed), str(self.site))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        directions = torch.randn(self.basis.tensor.shape, generator=generator)
        basis: Any = torch.linalg.qr(directions.T)[0].T
        return replace(self, basis=basis, about={"method": f"random (seed {seed})"})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the subspace to a safetensors file for `load_subspace`. Returns its path."""
        text = json.dumps({"site": str(self.site), "about": dict(self.about)}, sort_keys=True)
        return save_tensors({"basis": self.basis.tensor}, path, about={"subspace": text})

    def _repr_html_(self) -> str:
        return render_html(f"Subspace at {self.site}", {"k": self.k} | dict(self.about))

    def __repr__(self) -> str:
        width = self.basis.tensor.shape[1]
        text = f"Subspace({self.site}, {count_of(self.k, 'dimension')} of {width})"
        return describe_outcome(text, "subspace.interchange(run, pos=-1)", "subspace.save(path)")


@check_arguments
def load_subspace(lm: LM, path: str | os.PathLike[str], *, any_model: bool = False) -> Subspace:
    """Returns the subspace that `Subspace.save` wrote, and checks it against this model.

    Raises `OtherModel` if weights, configuration or adapters differ from those with which it was
    fitted; `any_model=True` skips this check. A site that the model does not have raises in any
    case, and so does a basis of another width.

    >>> subspace = hk.types.Subspace("resid_post.6", torch.eye(576)[:2])
    >>> load_subspace(lm, subspace.save("city.safetensors"), any_model=True) == subspace
    True
    """
    tensors, metadata = read_tensors(check_file(path))
    text = metadata.get("subspace")
    if text is None or "basis" not in tensors:
        raise BadHook(f"{Path(path).name!r} has no subspace: give a file that Subspace.save wrote")
    name = f"the subspace in {Path(path).name!r}"
    header = check_mapping(parse_json(text, name), name, "site")
    if "about" not in header:
        raise BadFile(f"{name} does not say how it was fitted: give a file of Subspace.save")
    about = check_mapping(header["about"], f"what {name} says about itself", "model")
    if not any_model:
        check_same_model("subspace", about, describe_model(lm))
    subspace = Subspace(parse_site(header["site"]), tensors["basis"], about)  # pyright: ignore
    lm.expand(subspace.site)  # raises for an unknown site
    width = subspace.basis.tensor.shape[1]
    if isinstance(subspace.site, Site) and lm.shape(subspace.site)[-1] != width:
        raise BadHook(
            f"the subspace is of {width} numbers, and {subspace.site} has "
            f"{list(lm.shape(subspace.site))} in this model: fit one of this site"
        )
    return subspace
