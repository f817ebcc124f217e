"""A steering vector as a value: where it was read, how long the stream is there, and how it was
made.

    vector = hk.mean_difference(lm, happy, sad, "resid_post.12")["resid_post.12"]
    hk.generate(lm, "The film was", vector.steer(dose=0.3), max_new_tokens=8)
    vector.save("mood.safetensors")
    hk.load_vector(lm, "mood.safetensors")

A dose is a length as a fraction of the residual stream's own: at dose 0.3 a vector three tenths as
long as the stream is added. To take a direction out of every layer (Arditi et al. 2024):

    hk.forward(lm, prompts, hk.project_out(lm.sites(["resid_pre", "resid_post"]), vector.tensor))

What a vector was made with: the model by its weights, the prompts by their tokens; plain values for
JSON.
"""

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

from ..arguments import (
    as_whole,
    checks_arguments,
    checks_construction,
    described,
    file_of,
    items_of,
)
from ..display import printable, shown
from ..errors import BadFile, BadHook, EmptySelection, NotCaptured, OtherModel, OutOfRange
from ..files.tensors import save_tensors
from ..files.untrusted import json_of, strings_of, tensors_in
from ..models.lm import LM
from ..models.positions import CountLike, PosLike
from ..models.prompts import Row
from ..models.provenance import about_model, config_hash, weights_hash
from ..models.sites import AnySite, ModuleSite, Site, Sites, parse
from ..models.wrappers import adapters_in_use
from .base import as_constant, number
from .edits import Steer, steer

SAME = (
    "weights_sha256",
    "config_sha256",
    "adapters",
)  # what makes two models one; the name is for the reader


def model_words(lm: LM) -> dict[str, Any]:
    """The model by its name, and by the hashes of its weights and configuration and the adapters
    that act.
    """
    hashes = {"weights_sha256": weights_hash(lm), "config_sha256": config_hash(lm)}
    return {"model": about_model(lm)["model"], **hashes, "adapters": adapters_in_use(lm.root)}


def data_hash(*sets: Sequence[Row]) -> str:
    """The sha256 of sets of prompts, as tokens, in their order."""
    return hashlib.sha256(
        json.dumps([[list(row) for row in rows] for rows in sets]).encode()
    ).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which of the words that make a model this one two descriptions differ, as far as both have
    them.
    """
    return [word for word in SAME if word in one and word in other and one[word] != other[word]]


def check_same_model(about: Mapping[str, Any], lm: LM) -> None:
    """Raise `OtherModel` where a vector was made with another model than this one."""
    here = model_words(lm)
    gone = [word for word in SAME if word not in about]
    differ = gone or differences(about, here)
    if differ:
        words = "says nothing of" if gone else "differs in"
        raise OtherModel(
            f"the vector was made with {about.get('model', 'a model without a name')}, and this is {here['model']}; it "
            f"{words} {', '.join(differ)}: load it with its own model, or say any_model=True if that is meant"
        )


@checks_construction
@dataclass(frozen=True, eq=False, repr=False)
class Vector:
    """A direction at a site. Made by `mean_difference`, `principal_direction`, `fit_vector`,
    `load_vector`, or by hand.

    site    where it was read, and where `steer` adds it
    tensor  [d], float32 on the CPU: a copy of what was given
    norm    the median length of the values at the site, over the positions read: what a dose is a fraction of
    about   how it was made: model and its hashes, method, data_sha256 of the prompts' tokens …; plain values

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
            object.__setattr__(self, "site", parse(self.site))
        if not isinstance(self.site, Site | ModuleSite):
            raise BadHook(
                f"site={described(self.site)}: give the place of the vector, such as 'resid_post.6'"
            )
        if self.site.every_layer:
            raise BadHook(
                f"a vector stands at one place, and {self.site} is one in every layer: name a layer"
            )
        copy = as_constant(self.tensor, "the vector").tensor.float().cpu()
        if copy.ndim != 1 or not len(copy):
            raise BadHook(
                f"the vector has shape {list(copy.shape)}: give the numbers of one place, [d_model], say"
            )
        object.__setattr__(self, "tensor", copy)
        if number(self.norm, "norm") <= 0:
            raise BadHook(
                f"norm={self.norm}: give the length of the values at {self.site}, more than 0"
            )

    @property
    def length(self) -> float:
        """How long the vector is: its L2 norm."""
        return float(self.tensor.double().norm())

    @property
    def dose(self) -> float:
        """Its length as a fraction of the stream's."""
        return self.length / self.norm

    def unit(self) -> "Vector":
        """The same direction with length 1. `BadHook` for a vector of zeros."""
        if not self.length:
            raise BadHook(f"the vector at {self.site} is zero, and has no direction")
        return self._made(self.tensor / self.length, f"unit of {self.method}")

    def cosine(self, other: "Vector") -> float:
        """The cosine of the angle between two vectors, -1 to 1; they may stand at different layers."""
        if self.tensor.shape != other.tensor.shape:
            raise BadHook(
                f"vectors of {len(self.tensor)} and {len(other.tensor)} numbers have no angle between them"
            )
        return float(self.unit().tensor.double() @ other.unit().tensor.double())

    def random(self, *, seed: int = 0) -> "Vector":
        """A vector of equal length at the same site, in a direction that depends on the seed and
        the site alone.
        """
        words = hashlib.sha256(repr((seed, str(self.site))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)
        noise = torch.randn(self.tensor.shape, generator=generator)
        return self._made(
            noise / noise.norm() * self.length, f"random (seed {seed}), as long as {self.method}"
        )

    @checks_arguments
    def steer(
        self,
        *,
        dose: float | None = None,
        scale: float | None = None,
        pos: PosLike = None,
        rows: CountLike = None,
    ) -> Steer:
        """A hook that adds the vector at its site: `dose` times as long as the stream, or `scale`
        times as it is.

        A negative number adds the opposite. With neither, the vector as it is (scale 1).
        """
        if dose is not None and scale is not None:
            raise BadHook(
                f"dose={dose} and scale={scale} were both given: a dose sets the length, a scale keeps it"
            )
        if dose is None:
            return steer(
                self.site, self.tensor, scale=1.0 if scale is None else scale, pos=pos, rows=rows
            )
        size = float(
            f"{number(dose, 'dose') * self.norm:.6g}"
        )  # further digits are the processor's that measured it
        return steer(self.site, self.unit().tensor, scale=size, pos=pos, rows=rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, to be read by `load_vector`; the file's path."""
        words = {"site": str(self.site), "norm": self.norm, "about": dict(self.about)}
        return save_tensors(
            {"vector": self.tensor}, path, about={"vector": json.dumps(words, sort_keys=True)}
        )

    @property
    def method(self) -> str:
        """How it was made, in a word or two."""
        return str(self.about.get("method", "a vector made by hand"))

    # ---- arithmetic

    def __add__(self, other: "Vector") -> "Vector":
        return self._with(other, 1, "+")

    def __sub__(self, other: "Vector") -> "Vector":
        return self._with(other, -1, "-")

    def __mul__(self, by: float) -> "Vector":
        return self._made(self.tensor * number(by, "the factor"), f"{by:g} * {self.method}")

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> "Vector":
        return self._made(self.tensor / number(by, "the divisor"), f"{self.method} / {by:g}")

    def __neg__(self) -> "Vector":
        return self._made(-self.tensor, f"-{self.method}")

    def _with(self, other: "Vector", sign: int, word: str) -> "Vector":
        """The sum; its norm is the mean of both, its data's hash that of both hashes."""
        if not isinstance(other, Vector):
            return NotImplemented
        if self.site != other.site or len(self.tensor) != len(other.tensor):
            raise BadHook(
                f"a vector of {len(self.tensor)} numbers at {self.site} and one of {len(other.tensor)} at {other.site} "
                "were to be added: vectors are added at one site; give each a hook of its own to steer at both"
            )
        if differ := differences(self.about, other.about):
            raise OtherModel(
                f"the two vectors were made with different models: they differ in {', '.join(differ)}"
            )
        both = [each.about.get("data_sha256") for each in (self, other)]
        about = {name: self.about.get(name, other.about.get(name)) for name in ("model", *SAME)}
        about |= {"method": f"({self.method} {word} {other.method})"}
        about |= (
            {"data_sha256": hashlib.sha256(json.dumps(both).encode()).hexdigest()}
            if any(both)
            else {}
        )
        known = {name: value for name, value in about.items() if value is not None}
        return Vector(
            self.site, self.tensor + sign * other.tensor, (self.norm + other.norm) / 2, known
        )

    def _made(self, tensor: Tensor, method: str) -> "Vector":
        return replace(self, tensor=tensor, about={**self.about, "method": method})

    def _repr_html_(self) -> str:
        facts = {
            "made": self.method,
            "length": self.length,
            "of the stream's": self.dose,
            "numbers": len(self.tensor),
        }
        return shown(f"Vector at {self.site}", facts)

    def __repr__(self) -> str:
        return f"Vector({self.site}: {printable(self.method)}, length {self.length:.3g}, {self.dose:.2g} of the stream's)"


@checks_construction
@dataclass(frozen=True, eq=False, repr=False)
class Vectors(Sequence[Vector]):
    """Vectors of several sites, in order: `vectors["resid_post.12"]`, `len(vectors)`, `for vector
    in vectors`.
    """

    all: tuple[Vector, ...]

    def __post_init__(self) -> None:
        vectors = items_of(self.all)
        if vectors is None or not all(isinstance(vector, Vector) for vector in vectors):
            raise BadHook(f"{described(self.all)} holds no vectors: give a list of hk.Vector")
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
    def __getitem__(self, index: slice) -> "Vectors": ...
    def __getitem__(self, index: int | str | AnySite | slice) -> "Vector | Vectors":
        if isinstance(index, slice):
            return Vectors(self.all[index])
        number_of_vector = as_whole(index)
        if number_of_vector is not None:
            if not -len(self) <= number_of_vector < len(self):
                raise OutOfRange(
                    f"vector {index} was asked for, and there are {len(self)}: 0 to {len(self) - 1}"
                )
            return self.all[number_of_vector]
        site = parse(index) if isinstance(index, str) else index
        found = [vector for vector in self.all if vector.site == site]
        if not found:
            raise NotCaptured(f"there is no vector of {site}: there are those of {self.sites}")
        return found[0]

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Vector]:
        return iter(self.all)

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        rows = [
            {"site": each.site, "length": each.length, "of the stream's": each.dose}
            for each in self.all
        ]
        return shown(f"Vectors: {self.all[0].method}", rows=rows)

    def __repr__(self) -> str:
        return f"Vectors({printable(self.all[0].method)}; {self.sites})"


@checks_arguments
def load_vector(lm: LM, path: str | os.PathLike[str], *, any_model: bool = False) -> Vector:
    """The vector that `Vector.save` wrote, checked against this model.

    `OtherModel` where weights, configuration or adapters are not those that it was made with;
    `any_model=True` leaves that to you (a fine-tune of the same model, say). A site that the model
    lacks raises in any case.

    >>> path = hk.Vector("resid_post.6", direction, norm=120.0).save("mood.safetensors")
    >>> load_vector(lm, path, any_model=True)
    Vector(resid_post.6: a vector made by hand, length ..., ... of the stream's)
    """
    tensors, words = tensors_in(file_of(path))
    written = words.get("vector")
    if written is None or "vector" not in tensors:
        raise BadHook(
            f"{Path(path).name!r} has no steering vector: give a file that Vector.save wrote"
        )
    name = f"the steering vector in {Path(path).name!r}"
    made = strings_of(json_of(written, name, finite=False), ("site",), name)
    if not {"site", "norm", "about"} <= set(made) or not isinstance(made["norm"], int | float):
        raise BadFile(f"{name} has no site, norm or about: give a file that Vector.save wrote")
    about = strings_of(made["about"], ("method",), f"what {name} says about itself")
    if not any_model:
        check_same_model(about, lm)
    vector = Vector(parse(made["site"]), tensors["vector"], made["norm"], about)
    lm.expand(vector.site)
    return vector
