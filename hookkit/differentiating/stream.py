"""Who writes into the residual stream and who reads it, each in the stream's own numbers.

What a sender would write otherwise is pushed forward through the family's own output projection, and a norm or
a factor behind it; the gradient at what a receiver reads is pulled back through the family's own norm and projection.
Both are products of a vector with the Jacobian that autograd has of the run, so that nothing of the family has to be
known but its sites.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..captured import Captured
from ..errors import Unsupported
from ..model import LM
from ..sites import AnySite, Site
from .backward import Derived

PARTS = ("q", "k", "v")  # of what a head reads


@dataclass(frozen=True, eq=False)
class End:
    """One end of an edge. `stage` counts along the stream: a sender reaches the receivers of later stages."""

    name: str
    stage: int
    vector: Float[Tensor, "row pos d_model"]


def needed(lm: LM) -> list[Site]:
    """The sites of which edges are made. `Unsupported` or `MissingSite` where the model lacks one."""
    found = [Site("resid_post", lm.n_layers - 1)]
    for layer in range(lm.n_layers):
        names = ("resid_pre", *PARTS, "z", "attn_out", "mlp_in", "mlp_out")
        found += [Site(name, layer) for name in names]
        found += [Site("resid_mid", layer)] if lm.layout.find("resid_mid", layer) else []
    for site in found:
        lm.place(site)
    return found


def _read_by_mlp(lm: LM, layer: int) -> Site:
    """The stream as the MLP finds it: behind attention, or where they run in parallel, before it."""
    return Site("resid_mid" if lm.layout.find("resid_mid", layer) else "resid_pre", layer)


def check_sum(lm: LM, here: Derived) -> None:
    """Raise `Unsupported` where the stream is more than the sum of what embedding, attention and MLPs write."""
    found = here.values[Site("resid_pre", 0)].values
    for layer in range(lm.n_layers):
        for name in ("attn_out", "mlp_out"):  # blocks may be on several devices
            found = found + here.values[Site(name, layer)].values.to(found.device)
    last = here.values[Site("resid_post", lm.n_layers - 1)].values
    if not _alike(found, last):
        reason = lm.family.exceptions.get("sum", "something else writes into it, or scales it")
        raise Unsupported(
            f"the stream of this {lm.family.name} model is not the sum of its embedding and of what attention and MLPs "
            f"add, so that it has no edges between them: {reason}. hk.attribution and hk.path_patching need no sum"
        )


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return float((found.to(wanted.device) - wanted).detach().abs().max()) <= 2e-2 * _precision(wanted) * float(
        wanted.detach().abs().max()
    )


def _precision(like: Tensor) -> float:
    """0.1 for the narrow dtypes, whose sums round; 1 in 1,000 for those of 32 bits and more."""
    return 5.0 if like.dtype in (torch.float16, torch.bfloat16) else 0.05


def senders(lm: LM, here: Derived, other: Mapping[AnySite, Captured]) -> list[End]:
    """By how much each sender's part of the stream is another on the other prompts."""
    change = {site: other[site].values - found.values.detach() for site, found in here.values.items()}
    found = [End("embed", -1, change[Site("resid_pre", 0)])]
    for layer in range(lm.n_layers):
        z, out = Site("z", layer), Site("attn_out", layer)
        for head, vector in enumerate(_pushed(here.leaves[z], here.leaves[out], change[z])):
            found.append(End(f"z.{layer}.{head}", 2 * layer, vector))
        found.append(End(f"mlp_out.{layer}", 2 * layer + 1, change[Site("mlp_out", layer)]))
    return found


def _pushed(z: Tensor, out: Tensor, change: Tensor) -> Iterator[Tensor]:
    """What each head's change comes to behind the projection: forward through the Jacobian, as the gradient of a
    gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        seed = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, z, seed, create_graph=True)
        for head in range(z.shape[2]):
            (forth,) = torch.autograd.grad(back, seed, _only(change, head), retain_graph=True)
            yield forth


def _only(values: Tensor, head: int) -> Tensor:
    """The same with zeros at all heads but one."""
    kept = torch.zeros_like(values)
    kept[:, :, head] = values[:, :, head]
    return kept


def receivers(lm: LM, here: Derived) -> Iterator[list[End]]:
    """The gradient at what each receiver reads, block by block. `Unsupported` at the end where these are not all who
    read the stream: together they have to make the gradient of the embedding."""
    last = Site("resid_post", lm.n_layers - 1)
    total = here.gradient[last].clone()
    yield [End("logits", 2 * lm.n_layers, here.gradient[last])]
    for layer in reversed(range(lm.n_layers)):
        found = [*_heads(here, layer), _mlp(lm, here, layer)]
        for end in found:
            total += end.vector.to(total.device)
        yield found
    if not _alike(total, here.gradient[Site("resid_pre", 0)]):
        raise Unsupported(
            f"the blocks of this {lm.family.name} model read the stream by another way than queries, keys, values and "
            "the MLP's input, so that edges would leave some of it out: use hk.attribution or hk.path_patching"
        )


def _heads(here: Derived, layer: int) -> Iterator[End]:
    stream = here.leaves[Site("resid_pre", layer)]
    for name in PARTS:
        site = Site(name, layer)
        for head in range(here.leaves[site].shape[2]):
            (back,) = torch.autograd.grad(
                here.leaves[site], stream, _only(here.gradient[site], head), retain_graph=True
            )
            yield End(f"{name}.{layer}.{head}", 2 * layer, back)


def _mlp(lm: LM, here: Derived, layer: int) -> End:
    site, read = Site("mlp_in", layer), _read_by_mlp(lm, layer)
    (back,) = torch.autograd.grad(here.leaves[site], here.leaves[read], here.gradient[site], retain_graph=True)
    return End(str(site), 2 * layer + (read.name == "resid_mid"), back)
