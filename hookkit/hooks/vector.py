"""Steering vectors, the residual stream's norm at their sites, and how they were computed.

    vector = hk.mean_difference(lm, happy, sad, "resid_post.12")["resid_post.12"]
    hk.generate(lm, "The film was", vector.steer(dose=0.3), max_new_tokens=8)
    vector.save("mood.safetensors")
    hk.load_vector(lm, "mood.safetensors")

A dose is a length as a fraction of the residual stream's norm: dose 0.3 adds a vector three tenths
as long as the stream. To remove a direction from every layer (Arditi et al. 2024):

    hk.forward(lm, prompts, hk.project_out(lm.sites(["resid_pre", "resid_post"]), vector.tensor))
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_integer, as_items, check_arguments, check_fields, check_number, describe
from ..display import describe_outcome, printable, render_html
from ..errors import BadFile, BadHook, EmptySelection, NotCaptured, OtherModel, OutOfRange
from ..files.atomic import save_tensors
from ..files.control_vectors import read_control_vector, write_control_vector
from ..files.untrusted import check_file, check_mapping, parse_json, read_tensors
from ..models.lm import LM
from ..models.model_setup import active_adapter_names
from ..models.positions import IndicesLike, PosLike
from ..models.prompt_row import row_as_json
from ..models.prompts import Row
from ..models.provenance import about_model, config_hash, weights_hash
from ..models.sites import AnySite, ModuleSite, Site, Sites, has_name, parse_site
from .base import When, as_constant
from .edits import Steer, steer

# what identifies a model; its name is for the reader only
SAME = ("weights_sha256", "config_sha256", "adapters")


def describe_model(lm: LM) -> dict[str, Any]:
    """Returns the model's name, the hashes of its weights and configuration, and its adapters."""
    return {
        "model": about_model(lm)["model"],
        "weights_sha256": weights_hash(lm),
        "config_sha256": config_hash(lm),
        "adapters": active_adapter_names(lm.root),
    }


def data_hash(*prompt_sets: Sequence[Row]) -> str:
    """Returns the sha256 of sets of prompts, as token ids, in their order."""
    token_ids = [list(map(row_as_json, prompts)) for prompts in prompt_sets]
    return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the names in `SAME` for which both descriptions have values, and they differ."""
    return [name for name in SAME if name in one and name in other and one[name] != other[name]]


@check_fields
@dataclass(frozen=True, eq=False, repr=False)
class Vector:
    """A direction at a site, from `mean_difference`, `fit_vector`, `load_vector` … or by hand.

    site    where it was read, and where `steer` adds it
    tensor  [d], a copy in float32 on the CPU
    norm    the median norm of the values at the site over the positions that were read; the unit
            of a dose
    about   how it was computed: model and hashes, method, data_sha256 of the prompts' tokens …

    Vectors of one site and one model can be added, subtracted and multiplied by numbers. `BadHook`
    for a tensor of other axes, or with numbers that are not finite.

    >>> hk.Vector("resid_post.6", torch.ones(576), norm=120.0).steer(dose=0.1).scale
    12.0
    """

    site: AnySite
    tensor: Float[Tensor, " d"]
    norm: float
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.site, str):
            object.__setattr__(self, "site", parse_site(self.site))
        if not isinstance(self.site, Site | ModuleSite):
            raise BadHook(
                f"site={describe(self.site)}: give the place of the vector, such as 'resid_post.6'"
            )
        if self.site.every_layer:
            raise BadHook(
                f"a vector stands at one place, and {self.site} is one in every layer: name a layer"
            )
        copy = as_constant(self.tensor, "the vector").tensor.float().cpu()
        if copy.ndim != 1 or not len(copy):
            raise BadHook(
                f"the vector has shape {list(copy.shape)}: give the numbers of one place, such as "
                "[d_model]"
            )
        object.__setattr__(self, "tensor", copy)
        if check_number(self.norm, "norm") <= 0:
            raise BadHook(
                f"norm={self.norm}: give the length of the values at {self.site}, more than 0"
            )

    @property
    def length(self) -> float:
        """The L2 norm of the vector."""
        return float(self.tensor.double().norm())

    @property
    def dose(self) -> float:
        """The vector's length as a fraction of the stream's norm."""
        return self.length / self.norm

    def unit(self) -> Vector:
        """Returns the same direction with length 1. Raises `BadHook` for a vector of zeros."""
        if not self.length:
            raise BadHook(f"the vector at {self.site} is zero, and has no direction")
        return self._derive(self.tensor / self.length, f"unit of {self.method}")

    def cosine(self, other: Vector) -> float:
        """Returns the cosine of the angle between two vectors, which may be at different sites."""
        if self.tensor.shape != other.tensor.shape:
            raise BadHook(
                f"vectors of {len(self.tensor)} and {len(other.tensor)} numbers have no angle "
                "between them"
            )
        return float(self.unit().tensor.double() @ other.unit().tensor.double())

    def random(self, *, seed: int = 0) -> Vector:
        """Returns a random vector of equal length, which depends on the seed and the site only."""
        digest = hashlib.sha256(repr((seed, str(self.site))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(self.tensor.shape, generator=generator)
        tensor = noise / noise.norm() * self.length
        return self._derive(tensor, f"random (seed {seed}), as long as {self.method}")

    @check_arguments
    def steer(
        self,
        *,
        dose: float | None = None,
        scale: float | None = None,
        pos: PosLike = None,
        rows: IndicesLike = None,
        when: When | None = None,
    ) -> Steer:
        """Returns a hook that adds the vector at its site.

        `dose` is the length as a fraction of the stream's norm, `scale` a factor of the vector as
        it is (1 by default). A negative number adds the opposite.
        """
        if dose is not None and scale is not None:
            raise BadHook(
                f"dose={dose} and scale={scale} were both given: a dose sets the length, a scale "
                "keeps it"
            )
        if dose is None:
            scale = 1.0 if scale is None else scale
            return steer(self.site, self.tensor, scale=scale, pos=pos, rows=rows, when=when)
        # later digits of the norm depend on the processor that measured it
        length = float(f"{check_number(dose, 'dose') * self.norm:.6g}")
        return steer(self.site, self.unit().tensor, scale=length, pos=pos, rows=rows, when=when)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the vector to a safetensors file for `load_vector`. Returns the file's path."""
        header = {"site": str(self.site), "norm": self.norm, "about": dict(self.about)}
        about = {"vector": json.dumps(header, sort_keys=True)}
        return save_tensors({"vector": self.tensor}, path, about=about)

    def save_gguf(self, path: str | os.PathLike[str]) -> Path:
        """Writes the vector as a control vector of llama.cpp. Returns the file's path.

        `llama-server --control-vector-scaled FILE:SCALE` then adds it at every position, as
        `steer(scale=SCALE)` does. Raises `BadHook` for a vector at another site than `resid_post`
        of a block from 1 on: llama.cpp has no others. `load_vector` reads the file.
        """
        return Vectors((self,)).save_gguf(path)

    @property
    def method(self) -> str:
        """The name of the method by which the vector was computed."""
        return str(self.about.get("method", "a vector made by hand"))

    def __add__(self, other: Vector) -> Vector:
        return self._add(other, 1, "+")

    def __sub__(self, other: Vector) -> Vector:
        return self._add(other, -1, "-")

    def __mul__(self, by: float) -> Vector:
        return self._derive(self.tensor * check_number(by, "the factor"), f"{by:g} * {self.method}")

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> Vector:
        return self._derive(
            self.tensor / check_number(by, "the divisor"), f"{self.method} / {by:g}"
        )

    def __neg__(self) -> Vector:
        return self._derive(-self.tensor, f"-{self.method}")

    def _add(self, other: Vector, sign: int, word: str) -> Vector:
        """Returns the sum. Its norm is the mean of both; its data hash is that of both hashes."""
        if not isinstance(other, Vector):
            return NotImplemented
        if self.site != other.site or len(self.tensor) != len(other.tensor):
            raise BadHook(
                f"a vector of {len(self.tensor)} numbers at {self.site} and one of "
                f"{len(other.tensor)} at {other.site} were to be added: vectors are added at one "
                "site; give each a hook of its own to steer at both"
            )
        if differ := differences(self.about, other.about):
            raise OtherModel(
                "the two vectors were made with different models: they differ in "
                f"{', '.join(differ)}"
            )
        about = self._joined_about(other, f"({self.method} {word} {other.method})")
        tensor = self.tensor + sign * other.tensor
        return Vector(self.site, tensor, (self.norm + other.norm) / 2, about)

    def _joined_about(self, other: Vector, method: str) -> dict[str, Any]:
        joined = {**other.about, **self.about}
        about = {name: joined[name] for name in ("model", *SAME) if joined.get(name) is not None}
        about["method"] = method
        hashes = [self.about.get("data_sha256"), other.about.get("data_sha256")]
        if any(hashes):
            about["data_sha256"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        return about

    def _derive(self, tensor: Tensor, method: str) -> Vector:
        return replace(self, tensor=tensor, about={**self.about, "method": method})

    def _repr_html_(self) -> str:
        facts = {"made": self.method, "length": self.length, "of the stream's": self.dose}
        return render_html(f"Vector at {self.site}", facts | {"numbers": len(self.tensor)})

    def __repr__(self) -> str:
        size = f"length {self.length:.3g}, {self.dose:.2g} of the stream's"
        return f"Vector({self.site}: {printable(self.method)}, {size})"


@check_fields
@dataclass(frozen=True, eq=False, repr=False)
class Vectors(Sequence[Vector]):
    """Vectors of several sites, in order, by index or by site: `vectors["resid_post.12"]`."""

    all: tuple[Vector, ...]

    def __post_init__(self) -> None:
        vectors = as_items(self.all)
        if vectors is None or not all(isinstance(vector, Vector) for vector in vectors):
            raise BadHook(f"{describe(self.all)} holds no vectors: give a list of hk.Vector")
        if not vectors:
            raise EmptySelection("there is no vector: give at least one")
        object.__setattr__(self, "all", tuple(vectors))

    @property
    def sites(self) -> Sites:
        """The sites that have a vector."""
        return Sites(tuple(vector.site for vector in self.all))

    @overload
    def __getitem__(self, index: int | str | AnySite) -> Vector: ...
    @overload
    def __getitem__(self, index: slice) -> Vectors: ...
    def __getitem__(self, index: int | str | AnySite | slice) -> Vector | Vectors:
        if isinstance(index, slice):
            return Vectors(self.all[index])
        number = as_integer(index)
        if number is not None:
            if not -len(self) <= number < len(self):
                raise OutOfRange(
                    f"vector {index} was asked for, and there are {len(self)}: 0 to {len(self) - 1}"
                )
            return self.all[number]
        site = parse_site(index) if isinstance(index, str) else index
        for vector in self.all:
            if vector.site == site:
                return vector
        raise NotCaptured(f"there is no vector of {site}: there are those of {self.sites}")

    def save_gguf(self, path: str | os.PathLike[str]) -> Path:
        """Writes the vectors as one control vector of llama.cpp, with a direction for each block.

        See `Vector.save_gguf`.
        """
        directions: dict[int, Tensor] = {}
        headers: dict[str, Any] = {}
        for vector in self.all:
            layer = _control_layer(vector.site)
            if layer in directions:
                raise BadHook(f"there are two vectors at {vector.site}: give one for each block")
            directions[layer] = vector.tensor
            headers[str(layer)] = {"norm": vector.norm, "about": dict(vector.about)}
        model = str(self.all[0].about.get("model", "unknown"))
        return write_control_vector(path, directions, model, json.dumps(headers, sort_keys=True))

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Vector]:
        return iter(self.all)

    def _ipython_key_completions_(self) -> list[str]:
        return list(map(str, self.sites))

    def _repr_html_(self) -> str:
        rows = [
            {"site": vector.site, "length": vector.length, "of the stream's": vector.dose}
            for vector in self.all
        ]
        return render_html(f"Vectors: {self.all[0].method}", rows=rows)

    def __repr__(self) -> str:
        text = f"Vectors({printable(self.all[0].method)}; {self.sites})"
        first = f"vectors[{str(self.sites[0])!r}]"
        return describe_outcome(text, f"{first}.steer(dose=0.3)", f"{first}.save(path)")


def _control_layer(site: AnySite) -> int:
    """Returns the block of a site at which llama.cpp can add a vector."""
    if not has_name(site, "resid_post") or site.stack or not site.layer:
        raise BadHook(
            "a control vector of llama.cpp is added to what a block from 1 on gives, resid_post.1 "
            f"and so on, and this vector is at {site}: compute it there, or write its steer into "
            "the weights with hk.bake"
        )
    return site.layer


@check_arguments
def load_vector(
    lm: LM,
    path: str | os.PathLike[str],
    *,
    any_model: bool = False,
    layer: int | None = None,
) -> Vector:
    """Returns the vector that `Vector.save` wrote, and checks it against this model.

    Raises `OtherModel` if weights, configuration or adapters differ from those with which it was
    computed; `any_model=True` skips this check (for a fine-tune of the same model). A site that the
    model does not have raises in any case.

    A file whose name ends in .gguf is a control vector of llama.cpp. If it has several directions,
    `layer` says which. One that other programs wrote says nothing of its model, so that it needs
    any_model=True, and has no norm: its dose counts in its own length.

    >>> path = hk.Vector("resid_post.6", direction, norm=120.0).save("mood.safetensors")
    >>> load_vector(lm, path, any_model=True)
    Vector(resid_post.6: a vector made by hand, length ..., ... of the stream's)
    """
    file = check_file(path)
    if file.suffix == ".gguf":
        vector = _read_gguf(file, layer)
    elif layer is None:
        vector = _read_safetensors(file)
    else:
        raise BadHook(f"layer={layer} chooses among directions of a .gguf file: leave it out")
    if not any_model:
        check_same_model("vector", vector.about, describe_model(lm))
    lm.expand(vector.site)  # raises for an unknown site
    return vector


def _read_safetensors(path: Path) -> Vector:
    tensors, metadata = read_tensors(path)
    header_text = metadata.get("vector")
    if header_text is None or "vector" not in tensors:
        raise BadHook(f"{path.name!r} has no steering vector: give a file that Vector.save wrote")
    name = f"the steering vector in {path.name!r}"
    header = check_mapping(parse_json(header_text, name, finite=False), name, "site")
    about = _check_header(header, name, "site", "norm", "about")
    return Vector(parse_site(header["site"]), tensors["vector"], header["norm"], about)


def _check_header(header: Mapping[str, Any], name: str, *needs: str) -> Mapping[str, Any]:
    """Returns what a vector in a file says about itself. Raises `BadFile` if it lacks a field."""
    if not set(needs) <= set(header) or not isinstance(header["norm"], int | float):
        raise BadFile(
            f"{name} has no {', '.join(needs[:-1])} or {needs[-1]}: give a file that hookkit wrote"
        )
    return check_mapping(header["about"], f"what {name} says about itself", "method")


def _read_gguf(path: Path, layer: int | None) -> Vector:
    directions, text = read_control_vector(path)
    if layer is None and len(directions) == 1:
        (layer,) = directions
    if layer not in directions:
        blocks = ", ".join(map(str, sorted(directions)))
        raise BadHook(
            f"{path.name!r} has directions of the blocks {blocks}: say layer=, one of them"
        )
    tensor, site = directions[layer], Site("resid_post", layer)
    if text is None:
        return Vector(site, tensor, float(tensor.double().norm()), {"method": "a control vector"})
    name = f"the control vector in {path.name!r}"
    headers = check_mapping(parse_json(text, name, finite=False), name)
    header = check_mapping(headers.get(str(layer)), name)
    about = _check_header(header, name, "norm", "about")
    return Vector(site, tensor, header["norm"], about)


def check_same_model(noun: str, about: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raises `OtherModel` if a vector or a probe was made with another model, or does not say."""
    missing = [name for name in SAME if name not in about]
    if problems := missing or differences(about, model):
        verb = "says nothing of" if missing else "differs in"
        raise OtherModel(
            f"the {noun} was made with {about.get('model', 'a model without a name')}, and this is "
            f"{model['model']}; it {verb} {', '.join(problems)}: load it with its own model, or "
            "say any_model=True if that is meant"
        )
