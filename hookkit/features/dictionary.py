"""Dictionary: a sparse autoencoder or a transcoder as a value.

It encodes the values of one site as the activations of its features, and decodes them. It registers
nothing: an LM has its features as sites after `lm.with_dictionaries(dictionary)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..display import render_html
from ..errors import BadHook, OutOfRange
from ..models.sites import Site
from ..models.views import SiteView

if TYPE_CHECKING:
    import pandas as pd

    from ..data.harvest.texts import TextsLike
    from ..models.lm import LM

Activation: TypeAlias = Literal["relu", "topk", "groupmax", "jumprelu", "gated"]
Normalization: TypeAlias = Literal["none", "constant_norm_rescale", "layer_norm"]
Features: TypeAlias = Sequence[int] | Tensor | None

LAYER_NORM_EPSILON = 1e-5  # added to the standard deviation, as SAELens does
KEEPING_K = ("topk", "groupmax")  # activations that keep k features, so each depends on the others


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A dictionary of features of one site: a sparse autoencoder, or a transcoder.

    site           where the features are added, such as `mlp_out.12`
    reads          the site that is encoded: `site` itself, or that of a transcoder's input
    activation     "relu"; "topk" and "groupmax" keep `k` features at each position; "jumprelu"
                   keeps those above a threshold; "gated" has a gate beside the magnitude
    normalization  what is done to the values before they are encoded, and undone after decoding
    centred        True if the decoder's bias is subtracted before encoding
    model_name     the model's name in the dictionary's file, or an empty text
    source         where it was loaded from
    keeps_error    True if an edit of features adds its changes to the site's values; False if the
                   reconstruction replaces the values, which costs the loss that `cost` says

    `load_dictionary` returns it. Features are computed in float32, or in float64 if the weights
    are in float64. Two dictionaries are equal if their settings and weights are equal.
    """

    site: Site
    reads: Site
    weights: Mapping[str, Tensor]
    activation: Activation
    k: int | None = None
    normalization: Normalization = "none"
    centred: bool = False
    model_name: str = ""
    source: str = ""
    keeps_error: bool = True
    cost: str = ""
    _by_device: dict[torch.device, Mapping[str, Tensor]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields; a copy moves its own weights to a device."""
        return {**self.__dict__, "_by_device": {}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.about() == other.about()

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def n_features(self) -> int:
        """The number of features."""
        return self.weights["W_dec"].shape[0]

    @property
    def d_model(self) -> int:
        """How many numbers it encodes at each position."""
        return self.weights["W_enc"].shape[0]

    @property
    def kind(self) -> str:
        """Its kind in words, such as "topk k=32" or "jumprelu transcoder"."""
        words: list[str] = [self.activation]
        if self.k is not None and self.activation in KEEPING_K:
            words.append(f"k={self.k}")
        if self.reads != self.site:
            words.append("skip transcoder" if "W_skip" in self.weights else "transcoder")
        return " ".join(words)

    @cached_property
    def hash(self) -> str:
        """The sha256 of its settings and numbers."""
        settings = (self.activation, self.k, self.normalization, self.centred)
        digest = hashlib.sha256(repr((str(self.site), str(self.reads), *settings)).encode())
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            data: Any = tensor.cpu().contiguous()
            digest.update(data.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Returns the properties of the dictionary as values for JSON."""
        return {
            "site": str(self.site),
            "reads": str(self.reads),
            "kind": self.kind,
            "features": self.n_features,
            "normalization": self.normalization,
            "replace": not self.keeps_error,
            "sha256": self.hash,
        }

    def __str__(self) -> str:
        text = f"{self.site}: {self.n_features} features of {self.d_model}, {self.kind}"
        return f"{text}, {self.cost}" if self.cost else text

    def __repr__(self) -> str:
        return f"Dictionary({self})"

    def _repr_html_(self) -> str:
        facts = {"model": self.model_name or "unknown", "loaded from": self.source}
        facts |= {name: str(value) for name, value in self.about().items()}
        return render_html(repr(self), facts)

    # ---- encoding and decoding

    def encode(
        self, values: Float[Tensor, "... d_model"], *, features: Features = None
    ) -> Float[Tensor, "... feature"]:
        """Returns the activations of all features, or of those whose numbers are given.

        >>> values = hk.forward(lm, "I like oat milk in my", capture("resid_post.12"))
        >>> dictionary.encode(values["resid_post.12"]).shape
        torch.Size([1, 6, 32])
        """
        weights = self._weights_on(values.device)
        columns = None if self.activation in KEEPING_K else features
        inputs, _, _ = self._normalize(values.to(weights["W_enc"].dtype))
        if self.centred:
            inputs = inputs - weights["b_dec"]
        active = self._activate(inputs, _Columns(weights, columns))
        if features is not None and columns is None:
            return active[..., features]
        return active

    def decode(
        self,
        activations: Float[Tensor, "... feature"],
        *,
        inputs: Float[Tensor, "... d_model"] | None = None,
    ) -> Float[Tensor, "... d_out"]:
        """Returns the reconstruction of the site from the activations of all features.

        `inputs` are the values that were encoded. A dictionary with a normalization, or with a skip
        connection, needs them to undo the one and to add the other.
        """
        weights = self._weights_on(activations.device)
        decoded = activations @ weights["W_dec"] + weights["b_dec"]
        if not self.reads_inputs:
            return decoded
        if inputs is None:
            raise BadHook(
                f"{self!r} decodes with the values that were encoded, for its normalization or its "
                "skip connection: give them, decode(activations, inputs=values)"
            )
        inputs = inputs.to(decoded.dtype)
        if self.reads == self.site:
            _, scale, shift = self._normalize(inputs)
            decoded = decoded * scale + shift
        if "W_skip" in weights:
            decoded = decoded + inputs @ weights["W_skip"].T
        return decoded

    @property
    def reads_inputs(self) -> bool:
        """True if decoding needs the values that were encoded."""
        is_normalized = self.normalization != "none" and self.reads == self.site
        return is_normalized or "W_skip" in self.weights

    def contribution(
        self,
        changes: Float[Tensor, "... feature"],
        *,
        features: Features = None,
        inputs: Float[Tensor, "... d_model"],
    ) -> Float[Tensor, "... d_out"]:
        """Returns what changes of some features add to the site. `inputs` are the encoded values.

        Without `features` the changes are those of all of them.
        """
        directions = self._weights_on(changes.device)["W_dec"]
        if features is not None:
            directions = directions[features]
        added = changes @ directions
        if self.normalization == "none" or self.reads != self.site:
            return added
        _, scale, _ = self._normalize(inputs.to(added.dtype))
        return added * scale

    def shares(self, features: Tensor, inputs: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what each feature adds along the directions `along`, as a dot product, and what
        the rest of the reconstruction adds: the biases and a skip connection.
        """
        directions = self._weights_on(features.device)["W_dec"].double()
        of_features = features.double() * (along @ directions.T)
        if self.normalization != "none" and self.reads == self.site:
            _, scale, _ = self._normalize(inputs.double())
            of_features = of_features * scale
        decoded = self.decode(features, inputs=inputs).double()
        return of_features, (decoded * along).sum(-1) - of_features.sum(-1)

    def direction(self, feature: int) -> Float[Tensor, " d_out"]:
        """Returns a copy of a feature's decoder row: what one unit of the feature adds.

        >>> dictionary.direction(7).shape
        torch.Size([576])
        """
        if not 0 <= feature < self.n_features:
            raise OutOfRange(
                f"feature {feature} was asked for, and the dictionary has {self.n_features}: "
                f"0 to {self.n_features - 1}"
            )
        return self.weights["W_dec"][feature].clone()

    def affine(
        self, features: Int[Tensor, " feature"]
    ) -> tuple[Float[Tensor, "feature d_in"], Float[Tensor, " feature"]]:
        """Returns the direction and the constant of each feature, for a dictionary without a
        normalization: an active feature is direction · values + constant.
        """
        weights = self.weights
        directions = weights["W_enc"].T[features]
        if self.activation == "gated":
            directions = directions * weights["r_mag"].exp()[features, None]
        constants = weights["b_mag" if self.activation == "gated" else "b_enc"][features]
        if "decoder_norms" in weights:
            directions = directions * weights["decoder_norms"][features, None]
            constants = constants * weights["decoder_norms"][features]
        if self.centred:
            constants = constants - directions @ weights["b_dec"]
        return directions, constants

    def _weights_on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Returns the weights on a device, to which they are moved once."""
        if device not in self._by_device:
            with torch.inference_mode(False):  # a later forward may need gradients
                moved = {name: weight.to(device) for name, weight in self.weights.items()}
            self._by_device[device] = moved
        return self._by_device[device]

    def _normalize(self, values: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns the normalized values, and the scale and the shift that undo it."""
        if self.normalization == "constant_norm_rescale":
            scale = values.norm(dim=-1, keepdim=True) / self.d_model**0.5
            return values / scale, scale, 0.0
        if self.normalization == "layer_norm":
            mean = values.mean(-1, keepdim=True)
            scale = values.std(-1, keepdim=True)
            return (values - mean) / (scale + LAYER_NORM_EPSILON), scale, mean
        return values, 1.0, 0.0

    def _activate(self, inputs: Tensor, weights: _Columns) -> Tensor:
        before = inputs @ weights["W_enc"]
        if self.activation == "gated":
            magnitude = before * weights["r_mag"].exp() + weights["b_mag"]
            return magnitude.relu() * (before + weights["b_gate"] > 0)
        before = before + weights["b_enc"]
        if "decoder_norms" in self.weights:
            before = before * weights["decoder_norms"]
        if self.activation == "jumprelu":
            return before.relu() * (before > weights["threshold"])
        if self.activation == "relu":
            return before.relu()
        assert self.k is not None
        if self.activation == "topk":
            largest, indices = before.topk(self.k, dim=-1)
        else:  # the largest of each of k groups
            groups = before.unflatten(-1, (self.k, -1))
            largest, indices = groups.max(dim=-1)
            indices = indices + torch.arange(self.k, device=before.device) * groups.shape[-1]
        return torch.zeros_like(before).scatter(-1, indices, largest.relu())

    def quality(
        self, lm: LM, texts: TextsLike, *, context: int | None = None, batch_tokens: int = 1024
    ) -> pd.DataFrame:
        """Returns how well the dictionary describes a model on some texts, best on held-out ones.

        Columns: measure, value, low, high (95 % intervals over the texts), texts, tokens. Measures:

        fvu                         the fraction of variance unexplained at the site
        l0                          the mean number of active features at a token
        dead_share                  the share of features that are active at none of the tokens
        loss_clean                  the model's loss in nats per token, as it is
        loss_reconstruction         … with the reconstruction in place of the site's values
        loss_mean, loss_zero        … with the mean of the site's values, and with zeros
        loss_recovered              (loss_zero - loss_reconstruction) / (loss_zero - loss_clean)
        loss_recovered_from_mean    the same with loss_mean, which is stricter

        The first token of each text, and values of more than ten times the median norm, are not
        measured and keep their values: a dictionary is not trained on them. `context` is the
        number of tokens of a text that are read. The values of all texts are held in memory.
        """
        from .quality import measure_quality  # it imports this module

        return measure_quality(self, lm, texts, context=context, batch_tokens=batch_tokens)

    # ---- as sites of an LM

    def view(self, base: SiteView, source: SiteView | None, feature: int | None) -> SiteView:
        """Returns how the features, or one of them, are stored in the tensor at `site`."""
        from .view import FeatureView  # it imports this module

        return FeatureView(feature, base=base, source=source, dictionary=self)

    def prepared(self, lm: LM, *, replace: bool, check: bool) -> Dictionary:
        """Returns the dictionary for an LM. Raises `OtherModel` if it does not fit the model."""
        from .fit_to_model import prepare

        return prepare(self, lm, replaces=replace, check=check)

    def replacing(self, cost: str) -> Dictionary:
        """Returns a dictionary whose reconstruction replaces the values. `cost` is in words."""
        return replace(self, keeps_error=False, cost=cost, _by_device={})


@dataclass(frozen=True, eq=False)
class _Columns:
    """The weights of some features: their columns of each weight, or all of them."""

    weights: Mapping[str, Tensor]
    features: Features

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        return weight if self.features is None else weight[..., self.features]
