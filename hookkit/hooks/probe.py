"""Probes: linear classifiers of the values at a site.

probes = hk.fit_probe(lm, texts, labels, "resid_post")
probe = probes.best
probe.read(hk.generate(lm, "Dear Sir", hk.capture(probe.site), max_new_tokens=8))
hk.generate(lm, "Dear Sir", probe.vector.steer(dose=-0.3), max_new_tokens=8)
probe.save("spam.safetensors")
hk.load_probe(lm, "spam.safetensors")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments, check_fields, check_number, describe
from ..display import describe_outcome, render_html
from ..errors import BadFile, BadHook, NotCaptured
from ..files.atomic import save_tensors
from ..files.untrusted import check_file, check_mapping, parse_json, read_tensors
from ..models.lm import LM
from ..models.sites import AnySite, Site, Sites, parse_site
from .base import Constant, as_constant, require_vectors, set_field
from .vector import Vector, check_same_model, describe_model

if TYPE_CHECKING:
    from ..runs.run import Run

FIELDS = ("site", "bias", "norm", "about")  # what the file of a probe says beside its direction


@check_fields
@dataclass(frozen=True, repr=False)
class Probe:
    """A linear classifier of the values at a site: sigmoid(values @ direction + bias), in float32.

    site       where it reads
    direction  [d], in float32 on the CPU; a tensor is copied
    bias       the logit of values of zeros
    norm       the median norm of the values that it was fitted on, which is the unit of a dose
    about      how it was fitted: model and hashes, data_sha256 of the texts' tokens and labels …

    `hk.fit_probe` and `hk.load_probe` return it. Two probes are equal if their fields are equal.
    Raises `BadHook` for a direction of other axes or without a length, or numbers that are not
    finite.

    >>> probe = hk.types.Probe("resid_post.6", torch.ones(576), bias=-1.0, norm=120.0)
    >>> float(probe.score(torch.zeros(576)))
    0.2689...
    """

    site: AnySite
    direction: Constant
    bias: float
    norm: float
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        direction = self.direction
        tensor = direction.tensor if isinstance(direction, Constant) else direction
        vector = Vector(self.site, tensor, self.norm)  # checks site, direction and norm
        require_vectors(Sites((vector.site,)), "a probe reads")
        vector.unit()  # raises for a direction without length
        set_field(self, "site", vector.site)
        set_field(self, "direction", as_constant(vector.tensor, "the direction"))
        set_field(self, "bias", check_number(self.bias, "bias"))
        set_field(self, "norm", check_number(self.norm, "norm"))
        set_field(self, "about", as_plain_mapping(self.about))

    @property
    def vector(self) -> Vector:
        """The direction as a vector, to steer, to project out or to compare."""
        about = {"method": "probe", **self.about}
        return Vector(self.site, self.direction.tensor, self.norm, about)

    def logit(self, values: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """Returns values @ direction + bias in float32, on the device of the values.

        Raises `BadHook` if the values are not those of the probe's site.
        """
        direction = self.direction.tensor
        if not values.ndim or values.shape[-1] != len(direction):
            raise BadHook(
                f"values {list(values.shape)} were given to a probe of {self.site}, which reads "
                f"[…, {len(direction)}]: give the values of that site"
            )
        return values.float() @ direction.to(values.device) + self.bias

    def score(self, values: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """Returns the probability of the positive label for values of the site, 0 to 1."""
        return self.logit(values).sigmoid()

    @check_arguments
    def read(self, run: Run, *, name: str | None = None) -> pd.DataFrame:
        """The probe's score at each captured position of a run, of the prompt or generated.

        Columns: row, pos, token, token_id, generated (True for a token that the model wrote),
        logit, score. The run needs a capture of the probe's site, `hk.capture(probe.site)`;
        `name` tells two captures of the site apart. The values are those of the run: an edit
        before the capture changes them.

        >>> probe = hk.types.Probe("resid_post.6", direction, bias=-1.0, norm=120.0)
        >>> run = hk.forward(lm, "I like oat milk", hk.capture(probe.site))
        >>> list(probe.read(run)["pos"])
        [0, 1, 2, 3]
        """
        captured = run.captured(self.site, name)
        if captured.positions is None:
            raise NotCaptured(
                f"the tensor at {self.site} has no axes row and pos, so that no token has a score"
            )
        logits = self.logit(captured.values.detach()).cpu()
        scores = logits.sigmoid()
        lines = []
        for index, row in enumerate(_run_rows(run, captured.rows)):
            for column, position in enumerate(captured.positions[index].tolist()):
                if position < 0:  # padding
                    continue
                token = int(run.tokens[row, position])
                line = {"row": row, "pos": position, "token": run.lm.string(token)}
                line |= {"token_id": token, "generated": position >= run.prompt_lengths[row]}
                line |= {"logit": float(logits[index, column])}
                lines.append(line | {"score": float(scores[index, column])})
        return pd.DataFrame(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the probe to a safetensors file for `load_probe`. Returns the file's path."""
        header = {"site": str(self.site), "bias": self.bias, "norm": self.norm}
        text = json.dumps({**header, "about": self.about}, sort_keys=True)
        return save_tensors({"direction": self.direction.tensor}, path, about={"probe": text})

    def _repr_html_(self) -> str:
        facts = {"bias": self.bias, "length": self.vector.length}
        return render_html(f"Probe at {self.site}", facts | dict(self.about))

    def __repr__(self) -> str:
        text = f"Probe({self.site}, bias {self.bias:.3g}, length {self.vector.length:.3g})"
        return describe_outcome(text, "probe.read(run)", "probe.vector.steer(dose=0.3)")


def as_plain_mapping(about: object) -> dict[str, Any]:
    """Returns a copy of a mapping that JSON can express."""
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))  # pyright: ignore
    except (TypeError, ValueError) as error:
        raise BadHook(
            f"about={describe(about)}: give a mapping of names to values that JSON can express"
        ) from error


def _run_rows(run: Run, prompts: Sequence[int]) -> list[int]:
    """Returns the row of the run that each row of a capture is, from the prompt of each."""
    captured_prompts = set(prompts)
    rows = []
    for row, prompt in enumerate(run.prompt_rows):
        if prompt in captured_prompts:
            rows.append(row)
    if [run.prompt_rows[row] for row in rows] != list(prompts):
        raise NotCaptured(
            f"{len(rows)} rows continue the captured prompts, and {len(prompts)} of them came to "
            "the positions of the capture: capture a position that each of them has"
        )
    return rows


@check_arguments
def load_probe(lm: LM, path: str | os.PathLike[str], *, any_model: bool = False) -> Probe:
    """Returns the probe that `Probe.save` wrote, and checks it against this model.

    Raises `OtherModel` if weights, configuration or adapters differ from those with which it was
    fitted; `any_model=True` skips this check (for a fine-tune of the same model). A site that the
    model does not have raises in any case, and so does a direction of another width.

    >>> probe = hk.types.Probe("resid_post.6", direction, bias=-1.0, norm=120.0)
    >>> load_probe(lm, probe.save("spam.safetensors"), any_model=True) == probe
    True
    """
    tensors, metadata = read_tensors(check_file(path))
    header_text = metadata.get("probe")
    if header_text is None or "direction" not in tensors:
        raise BadHook(f"{Path(path).name!r} has no probe: give a file that Probe.save wrote")
    name = f"the probe in {Path(path).name!r}"
    header = check_mapping(parse_json(header_text, name), name, "site")
    if not set(FIELDS) <= set(header):
        raise BadFile(f"{name} has not all of {', '.join(FIELDS)}: give a file of Probe.save")
    about = check_mapping(header["about"], f"what {name} says about itself", "model")
    if not any_model:
        check_same_model("probe", about, describe_model(lm))
    site = parse_site(header["site"])
    probe = Probe(site, tensors["direction"], header["bias"], header["norm"], about)  # pyright: ignore
    lm.expand(probe.site)  # raises for an unknown site
    check_width(lm, probe)
    return probe


def check_width(lm: LM, probe: Probe) -> None:
    """Raises `BadHook` if the values at the probe's site are not as wide as its direction."""
    if not isinstance(probe.site, Site):  # a module, of which only a forward tells the width
        return
    shape, width = lm.shape(probe.site), len(probe.direction.tensor)
    if shape != (width,):
        raise BadHook(
            f"the probe reads {width} numbers, and {probe.site} has {list(shape)} in this model: "
            "fit a probe of this site"
        )
