"""DictionaryParts: what a file says about a dictionary, before its sites are known.

Every format is read into it. `build_dictionary` checks the shapes and the sites, and returns the
dictionary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import describe, shorten
from ..errors import BadFile, BadHook
from ..models.sites import SITES_OF_DICTIONARIES, Site, has_name, parse_site
from .dictionary import KEEPING_K, Activation, Dictionary, Normalization

# Where TransformerLens' hooks of a block are.
PLACES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "resid_mid",  # it stands before the norm there
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
}
# The axes of each weight: d_in is encoded, d_out is written.
SHAPES = {
    "W_enc": ("d_in", "features"),
    "b_enc": ("features",),
    "W_dec": ("features", "d_out"),
    "b_dec": ("d_out",),
    "threshold": ("features",),
    "b_gate": ("features",),
    "b_mag": ("features",),
    "r_mag": ("features",),
    "W_skip": ("d_out", "d_in"),
}
NEEDED = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


@dataclass(frozen=True, eq=False)
class DictionaryParts:
    """What a file says about a dictionary.

    `hook` and `hook_out` are the sites that are encoded and written, as the file names them, and
    `head` is the head of the former. `rescaled` is True if activations are multiplied by the norm
    of the feature's decoder row before the activation function, and divided by it before decoding.
    """

    weights: Mapping[str, Tensor]
    activation: Activation
    source: str
    k: int | None = None
    normalization: Normalization = "none"
    centred: bool = False
    rescaled: bool = False
    transcoder: bool = False
    model_name: str = ""
    hook: str = ""
    head: int | None = None
    hook_out: str = ""


def build_dictionary(
    parts: DictionaryParts, at: str | Site | None, reads: str | Site | None
) -> Dictionary:
    """Returns the dictionary of these parts. Raises if shapes or sites do not fit."""
    weights = {name: _as_float(name, tensor, parts) for name, tensor in parts.weights.items()}
    weights.setdefault("b_enc", torch.zeros_like(weights["W_dec"][:, 0]))
    _check_shapes(weights, parts)
    _check_k(weights, parts)
    if parts.rescaled:
        norms = weights["W_dec"].norm(dim=-1)
        weights["decoder_norms"] = norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    site, source = _sites(parts, at, reads)
    return Dictionary(
        site,
        source,
        weights,
        parts.activation,
        k=parts.k,
        normalization=parts.normalization,
        centred=parts.centred,
        model_name=parts.model_name,
        source=parts.source,
    )


def _as_float(name: str, tensor: Tensor, parts: DictionaryParts) -> Tensor:
    """Returns a weight in float32, or in float64 if it is, as a tensor of its own."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    weight = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not bool(weight.isfinite().all()):
        raise BadFile(f"{name} of {parts.source} has numbers that are infinite or NaN")
    return weight


def _check_shapes(weights: Mapping[str, Tensor], parts: DictionaryParts) -> None:
    needed = ("W_enc", "W_dec", "b_dec", *NEEDED.get(parts.activation, ()))
    missing = [name for name in needed if name not in weights]
    if missing:
        raise BadFile(
            f"{parts.source} has no {missing[0]}, which a {parts.activation} dictionary needs: it "
            f"has {', '.join(weights)}"
        )
    sizes = {"d_in": weights["W_enc"].shape[0], "features": weights["W_enc"].shape[-1]}
    sizes["d_out"] = weights["W_dec"].shape[-1]
    for name, weight in weights.items():
        expected = [sizes[axis] for axis in SHAPES[name]]
        if list(weight.shape) != expected:
            raise BadFile(
                f"{name} of {parts.source} has shape {list(weight.shape)}, and W_enc and W_dec ask "
                f"for {expected} [{', '.join(SHAPES[name])}]"
            )
    if sizes["d_in"] != sizes["d_out"] and not parts.transcoder:
        raise BadFile(
            f"{parts.source} encodes {sizes['d_in']} numbers and decodes {sizes['d_out']}, and it "
            "is no transcoder"
        )


def _check_k(weights: Mapping[str, Tensor], parts: DictionaryParts) -> None:
    n_features = weights["W_enc"].shape[-1]
    if parts.activation not in KEEPING_K:
        return
    k = parts.k
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_features:
        raise BadFile(
            f"k={describe(k)} of {parts.source}: it is how many of {n_features} features are kept"
        )
    if parts.activation == "groupmax" and n_features % k:
        raise BadFile(f"{parts.source} has {n_features} features, which make no {k} equal groups")


def _sites(
    parts: DictionaryParts, at: str | Site | None, reads: str | Site | None
) -> tuple[Site, Site]:
    """Returns the site that a dictionary writes, and the one that it reads."""
    hook_out = parts.hook_out if parts.transcoder else parts.hook
    site = _site(at, "at", hook_out, parts, None if parts.transcoder else parts.head)
    if parts.transcoder:
        return site, _site(reads, "reads", parts.hook, parts, parts.head)
    if reads is not None:
        raise BadHook(
            f"reads={str(reads)!r} is the site that a transcoder encodes, and {parts.source} is no "
            "transcoder: say at= alone"
        )
    return site, site


def _site(
    value: str | Site | None, name: str, hook: str, parts: DictionaryParts, head: int | None
) -> Site:
    """Returns one site, from an argument and from what the file says. They have to agree."""
    if value is None and not hook:
        raise BadHook(f"{parts.source} does not name its site: say it with {name}=")
    if value is None:
        hook_site = site_of_hook(hook)
        if hook_site is None:
            raise BadHook(
                f"{parts.source} is of {shorten(hook)!r}, a hook of TransformerLens that is no "
                f"site here: say the site that is meant, with {name}="
            )
        return check_dictionary_site(replace(hook_site, head=head), name)
    site = check_dictionary_site(parse_site(value) if isinstance(value, str) else value, name)
    hook_site = site_of_hook(hook)
    if hook_site is not None and replace(hook_site, head=head) != site:
        raise BadHook(
            f"{name}={str(site)!r}, and {parts.source} says {hook!r}, which is "
            f"{replace(hook_site, head=head)}: leave {name}= out, or give the dictionary of that "
            "site"
        )
    return site


def check_dictionary_site(site: Any, name: str) -> Site:
    """Returns the site. Raises `BadHook` if a dictionary cannot be of it."""
    if not has_name(site, *SITES_OF_DICTIONARIES) or site.layer is None:
        raise BadHook(
            f"{name}={str(site)!r}: a dictionary is of one site in one block, such as "
            f"'resid_post.12'; the sites are {', '.join(SITES_OF_DICTIONARIES)}"
        )
    return site


def site_of_hook(name: str) -> Site | None:
    """Returns the site that TransformerLens' name of a hook means; None for one without a site.

    >>> site_of_hook("blocks.12.hook_resid_post")
    Site(name='resid_post', layer=12, head=None)
    """
    blocks, _, after_blocks = name.partition(".")
    layer, _, hook_name = after_blocks.partition(".")
    if blocks != "blocks" or not layer.isdecimal() or hook_name not in PLACES:
        return None
    return Site(PLACES[hook_name], int(layer))


def refuse_unknown(names: Collection[str], known: Collection[str], what: str) -> None:
    """Raises `BadFile` for names in a file whose meaning is not known, and names the first."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadFile(
            f"{what} has {shorten(unknown[0])!r}, whose meaning is not known, so that the "
            "dictionary might be read wrongly: update hookkit, or remove it from the file if it "
            "changes no number"
        )
