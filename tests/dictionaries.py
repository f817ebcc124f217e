"""Random dictionaries for tests, written as SAELens writes them, and their formulas in plain torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HOOK = "blocks.1.hook_resid_post"
TRANSCODER = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}


def random_weights(architecture: str, d: int = 32, n: int = 96, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": draw(d, n),
        "W_dec": draw(n, d),
        "b_dec": draw(d),
    }
    if architecture == "gated":
        return weights | {"b_gate": draw(n), "b_mag": draw(n), "r_mag": draw(n)}
    weights["b_enc"] = draw(n)
    if "jumprelu" in architecture:
        weights["threshold"] = draw(n).abs()
    if "skip" in architecture:
        weights["W_skip"] = draw(d, d)
    return weights


def write(
    folder: Path,
    architecture: str = "topk",
    weights: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Path:
    """Writes a folder of a dictionary. Settings change its cfg; None leaves one out."""
    weights = weights or random_weights(architecture)
    is_transcoder = "transcoder" in architecture
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": TRANSCODER if is_transcoder else {"hook_name": HOOK},
    }
    if architecture == "topk":
        cfg |= {"k": 8, "rescale_acts_by_decoder_norm": False}
    cfg |= settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(
        json.dumps({name: value for name, value in cfg.items() if value is not None})
    )
    save_file(dict(weights), folder / "sae_weights.safetensors")
    return folder


def encode(w: Mapping[str, Tensor], x: Tensor, architecture: str, centred: bool = True) -> Tensor:
    """The formulas of the papers: Bricken et al. 2023, Gao et al. 2024 (topk, k=8), Rajamanoharan et
    al. 2024 (gated; jumprelu)."""
    if centred:
        x = x - w["b_dec"]
    before = torch.einsum("...d,dn->...n", x, w["W_enc"])
    if architecture == "gated":
        magnitude = torch.relu(torch.exp(w["r_mag"]) * before + w["b_mag"])
        return torch.where(before + w["b_gate"] > 0, magnitude, 0.0)
    before = before + w["b_enc"]
    if "jumprelu" in architecture:
        return torch.where(before > w["threshold"], before.clamp(min=0), 0.0)
    if architecture == "topk":
        eighth = before.sort(dim=-1, descending=True).values[..., 7:8]
        return torch.where(before >= eighth, before.clamp(min=0), 0.0)
    return before.clamp(min=0)


def fitted(lm: Any, folder: Path, *, layer: int = 12, half: int = 16, k: int = 4) -> Path:
    """Writes a small dictionary that describes a model: its principal directions and their opposites."""
    from hookkit import capture, forward
    from hookkit.features.fit_to_model import TEXT

    site = f"resid_post.{layer}"
    values = forward(lm, TEXT, capture(site, pos=slice(1, None)))[site][0]
    mean = values.mean(0)
    directions = torch.linalg.svd(values - mean, full_matrices=False).Vh[:half]
    both = torch.cat([directions, -directions])
    weights = {
        "W_enc": both.T.contiguous(),
        "b_enc": torch.zeros(2 * half),
        "W_dec": both,
        "b_dec": mean,
    }
    metadata = {
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "model_name": "SmolLM2-135M-Instruct",
    }
    return write(folder, "topk", weights, k=k, metadata=metadata)


def random_transcoders(d: int = 32, layers: int = 3, n: int = 48, k: int = 4) -> list[Any]:
    """Random transcoders of the MLPs of a tiny model."""
    from hookkit.features.dictionary import Dictionary
    from hookkit.models.sites import Site

    transcoders = []
    for layer in range(layers):
        weights = random_weights("transcoder", d=d, n=n, seed=layer)
        sites = (Site("mlp_out", layer), Site("mlp_in", layer))
        transcoders.append(Dictionary(*sites, weights, "topk", k=k))
    return transcoders
