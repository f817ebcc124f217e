"""hk.bake: hooks as weights, so that a plain transformers model has their effect everywhere.

An edit that is the same linear change at every position can be computed into the matrix that
writes the site, or into the one that reads it: W becomes A W, and b becomes A b + c. The residual
stream is a sum of what many matrices write. A vector that is added to it is a bias of the last of
them; a direction that is projected out of all of it is projected out of all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadEdit, EmptySelection, Unsupported
from ..hooks.ablation import Ablate, Patch
from ..hooks.base import EVERY_STEP, Binding, EditContext, EditHook, Hook
from ..hooks.edits import ProjectOut, Scale, SkipBlock, Steer
from ..hooks.logit_shifts import Boost
from ..models.lm import LM
from ..models.model_setup import active_adapter_names
from ..models.padding import trial_rows
from ..models.positions import Where
from ..models.sites import ModuleSite, Site, Sites, has_name
from ..models.weights import SiteWeights, add_biases, edit_weights, find_weights, untie
from .forward import forward
from .manager import capture_reference

STREAM = ("resid_pre", "resid_mid", "resid_post")
LINEAR = (Steer, Scale, ProjectOut, Ablate, SkipBlock, Boost)
FLOAT32_LIMIT, OTHER_LIMIT = 1e-4, 5e-2  # of the largest logit


@check_arguments
def bake(lm: LM, *hooks: Hook) -> LM:
    """Returns a copy of the model whose weights have the effect of these hooks.

    The copy is a plain transformers model of the same class, without hooks: `baked.save(folder)`
    writes a Hugging Face folder for any program that reads such folders. The given model stays as
    it is. The logits are those of the hooked model up to rounding, which `bake` checks with a
    forward of each.

    Weights express what is the same linear change at every position: `steer`, `scale`,
    `project_out`, `ablate` to zero, to a tensor, to statistics or to the mean of a reference with
    per="all", `skip_block`, and `boost`, in models whose head has a bias. They act at what one
    matrix writes or reads: embed, q, k, v, z, attn_out, mlp_pre, mlp_post, mlp_out, lm_head, heads
    and neurons included. At the residual stream, a steer becomes a bias of the part before it, and
    `project_out` of all of `lm.sites(["resid_pre", "resid_mid", "resid_post"])` is projected out of
    every matrix that writes to the stream (Arditi et al. 2024).

    A bias that the model does not have is added if a setting of its configuration is for it
    (`attention_bias` of Llama …), and tied embeddings are untied if one of them is edited. All else
    raises `Unsupported` with the reason: `pos`, `rows`, `step` and `when`, functions, patches, a
    steer before a norm, a mixture of experts, quantised weights, adapters that are not merged.

    >>> baked = bake(lm, scale("mlp_out.12", 0.5), ablate("z.9.3"))
    >>> torch.equal(forward(lm, "Tea").logits, forward(baked, "Tea").logits)
    False
    """
    if not hooks:
        raise EmptySelection("bake was given no hook: give hk.steer, hk.project_out, hk.ablate …")
    lm.refuse_engine("hooks were to be written into the weights")
    _check_model(lm)
    plan = _in_order(list(_plan(lm, hooks)))
    model: Any = copy.deepcopy(lm.root)
    _add_biases(model, plan)
    for edit in plan:
        _untie(model, edit)
        edit_weights(model.get_submodule(edit.weights.path), edit.weights, edit.linear, edit.offset)
    name = f"{lm.name or type(lm.root).__name__} with baked hooks"
    baked = LM(model, lm.tokenizer, name, lm.row)
    _check_logits(lm, baked, hooks)
    return baked


def _check_model(lm: LM) -> None:
    """Raises `Unsupported` for a model whose weights are not all there as plain tensors."""
    if lm.adapters and active_adapter_names(lm.root):
        raise Unsupported(
            "the model has adapters, whose weights are added to its own: merge them first, "
            "model.merge_and_unload()"
        )
    if lm.ranks is not None:
        raise Unsupported("the model is split among processes: load it whole to bake hooks")
    if any(weight.is_meta for weight in lm.root.parameters()):
        raise Unsupported("weights of the model are on disk: load it whole to bake hooks")
    if lm.root.training:
        raise Unsupported("the model is in training mode: call model.eval() first")


# ---- from hooks to edits of weights


@dataclass(frozen=True, eq=False)
class _WeightEdit:
    """A linear change at one site. `order`: parts, then biases for the stream, then projections."""

    hook: EditHook
    site: Site
    weights: SiteWeights
    change: Any  # of values [row, pos, *site]
    context: EditContext
    order: int = 0

    @property
    def offset(self) -> Float[Tensor, "*site"]:
        """What the change makes of zeros."""
        return self._apply(torch.zeros(1, *self.weights.index.shape))[0]

    def linear(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """Returns the change of values without the offset."""
        return self._apply(values) - self.offset.to(values)

    def _apply(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        try:
            return self.change(values[None], self.context)[0]
        except BadEdit as error:
            raise Unsupported(
                f"{self.hook} writes other values at each position, and a weight acts at all of "
                "them alike: give one value, or per='all'"
            ) from error


def _in_order(plan: list[_WeightEdit]) -> list[_WeightEdit]:
    """Returns the edits in the order in which the matrices change.

    A matrix takes what its input goes through from the last hook to the first: W A₂ A₁.
    """
    reading = [edit for edit in plan if edit.weights.reads]
    writing = [edit for edit in plan if not edit.weights.reads]
    return [*reversed(reading), *sorted(writing, key=lambda edit: edit.order)]


def _plan(lm: LM, hooks: tuple[Hook, ...]) -> Iterator[_WeightEdit]:
    for hook in hooks:
        edit = _check_hook(hook)
        if isinstance(edit, SkipBlock):
            edit = _skipped_parts(edit)
        sites = lm.expand(edit.sites)
        if isinstance(edit, ProjectOut):
            sites, of_stream = _split_stream(lm, edit, sites)
            for site in of_stream:
                yield _edit_at(lm, edit, site, order=2)
        for site in sites:
            assert isinstance(site, Site)
            if site.name in STREAM:
                yield _stream_edit(lm, edit, site)
            else:
                yield _edit_at(lm, edit, site)


def _check_hook(hook: Hook) -> EditHook:
    """Returns the hook. Raises `Unsupported` for one that is no linear change at all positions."""
    if not isinstance(hook, LINEAR) or isinstance(hook, Patch):
        raise Unsupported(
            f"{hook}: a weight can steer, scale, project_out, ablate, skip_block and boost, and "
            f"{hook.verb} is no linear change of the values at one position: use hk.attach, or "
            "hk.logits_processor for edits of logits"
        )
    if any(isinstance(site, ModuleSite) or site.stack or site.of_features for site in hook.sites):
        raise Unsupported(f"{hook}: bake knows the weights of named sites of the text model only")
    everywhere = Where(step=EVERY_STEP) if isinstance(hook, Boost) else Where()
    if hook.where != everywhere:
        raise Unsupported(
            f"{hook} acts at some positions, rows or steps, and a weight acts at all: leave pos, "
            "rows and step out"
        )
    if getattr(hook, "when", None) is not None:
        raise Unsupported(f"{hook} acts where a condition holds, and a weight acts everywhere")
    return hook


def _skipped_parts(hook: SkipBlock) -> Ablate:
    sites: list[Site] = []
    for site in hook.sites:
        assert isinstance(site, Site)
        sites += [replace(site, name="attn_out"), replace(site, name="mlp_out")]
    return Ablate(Sites(tuple(sites)), hook.where)


def _edit_at(
    lm: LM, hook: EditHook, site: Site, *, order: int = 0, through: Site | None = None
) -> _WeightEdit:
    """Returns the edit of the weights at a site, or at the site `through` which it acts."""
    reference = partial(_reference, lm, site)
    change = hook.change(Binding(lm, site, reference))
    weights = _find_weights(lm, hook, through or site)
    context = EditContext(site, hook.where, None)
    return _WeightEdit(hook, site, weights, change, context, order)


def _reference(lm: LM, site: Site, prompts: tuple[Any, ...]) -> Any:
    return capture_reference(lm, [site], prompts)[site]


def _find_weights(lm: LM, hook: EditHook, site: Site) -> SiteWeights:
    if site.name == "logits":
        site = replace(site, name="lm_head")  # `_check_logits` sees a soft-cap
    # zeros stay zeros in a norm
    is_zero = isinstance(hook, Ablate) and hook.to == "zero" and hook.units is site.head is None
    try:
        return find_weights(lm, site, through_norm=is_zero)
    except Unsupported as error:
        raise Unsupported(f"{hook} cannot be baked: {error}") from error


# ---- the residual stream


def _stream_edit(lm: LM, hook: EditHook, site: Site) -> _WeightEdit:
    """Returns the addition to the stream as a bias of the part that was added last."""
    if not isinstance(hook, Steer):
        raise Unsupported(
            f"{hook} cannot be baked: {site} is the sum of what all blocks before have written, "
            "which later blocks read too. Weights can add to it (hk.steer), and hk.project_out a "
            "direction of all of it: lm.sites(['resid_pre', 'resid_mid', 'resid_post'])"
        )
    return _edit_at(lm, hook, site, order=1, through=_last_part(lm, site))


def _last_part(lm: LM, site: Site) -> Site:
    """Returns the part whose output is the last that was added to the stream at a site."""
    layer = site.layer or 0
    if site.name == "resid_mid":
        return Site("attn_out", layer)
    if site.name == "resid_pre":
        if layer == 0:
            return Site("embed")
        layer -= 1
    names = [name for name in ("mlp_out", "attn_out") if lm.layout.find(name, layer) is not None]
    return Site(names[0] if names else "mlp_out", layer)


def _split_stream(lm: LM, hook: ProjectOut, sites: Sites) -> tuple[list[Site], list[Site]]:
    """Returns the sites of parts, and the parts that write to the stream if it is among the sites.

    Raises `Unsupported` if the stream is there at some of its sites only.
    """
    stream = [site for site in sites if has_name(site, *STREAM)]
    parts = [site for site in sites if isinstance(site, Site) and site not in stream]
    if not stream:
        return parts, []
    _check_whole_stream(lm, hook, stream)
    writers = ("embed", "pos_embed", "attn_out", "mlp_out")
    writer_names = [name for name in writers if name in lm.layout.names]
    width = lm.sizes["d_model"]
    if lm.shape("embed") != (width,):
        raise Unsupported(
            f"{hook} cannot be baked: embed has {lm.shape('embed')[0]} numbers, which another "
            f"matrix brings to the stream's {width}"
        )
    return parts, list(lm.sites(writer_names))  # pyright: ignore[reportReturnType]


def _check_whole_stream(lm: LM, hook: ProjectOut, stream: Sequence[Site]) -> None:
    points = set(map(_point, stream))
    names = [name for name in STREAM if name in lm.layout.names]
    missing = [site for site in lm.sites(names) if _point(site) not in points]  # pyright: ignore
    if missing:
        raise Unsupported(
            f"{hook} cannot be baked: it leaves out {missing[0]}. A direction is projected out of "
            "every matrix that writes to the stream, so all of its sites are needed: "
            f"lm.sites({names})"
        )


def _point(site: Site) -> tuple[str, int]:
    """Returns a place in the stream: what enters a block is what the block before returned."""
    layer = site.layer or 0
    if site.name == "resid_pre":
        return "resid_post", layer - 1
    return site.name, layer


# ---- the copy


def _add_biases(model: Any, plan: list[_WeightEdit]) -> None:
    needs: dict[str, _WeightEdit] = {}
    for edit in plan:
        is_embedding = isinstance(model.get_submodule(edit.weights.path), torch.nn.Embedding)
        if bool(edit.offset.any()) and not is_embedding:
            needs.setdefault(edit.weights.path, edit)
    for path in add_biases(model, needs):
        edit = needs[path]
        raise Unsupported(
            f"{edit.hook} cannot be baked: it adds to {edit.site}, {path} has no bias, and the "
            f"configuration of {model.config.model_type} has no setting for one, so that "
            "transformers could not load it. Use hk.attach, or for the residual stream a control "
            "vector of llama.cpp, Vector.save_gguf"
        )


def _untie(model: Any, edit: _WeightEdit) -> None:
    """Gives the module that an edit changes weights of its own."""
    try:
        untie(model, edit.weights.path)
    except Unsupported as error:
        raise Unsupported(f"{edit.hook} cannot be baked: {error}") from error


def _check_logits(lm: LM, baked: LM, hooks: tuple[Hook, ...]) -> None:
    """Raises `Unsupported` if the copy has other logits than the model with the hooks."""
    rows = trial_rows(lm)[:1]
    last = "last" if any(isinstance(hook, Boost) for hook in hooks) else "all"
    with torch.no_grad():
        expected = forward(lm, rows, *hooks, logits=last).logits.float()
        logits = forward(baked, rows, logits=last).logits.float()
    is_float32 = next(lm.root.parameters()).dtype in (torch.float32, torch.float64)
    limit = FLOAT32_LIMIT if is_float32 else OTHER_LIMIT
    difference = float((logits - expected).abs().max())
    if not difference <= limit * max(1.0, float(expected.abs().max())):
        raise Unsupported(
            f"the weights of {type(lm.root).__name__} do not express these hooks: the logits "
            f"differ by {difference:.2g} from those of the hooked model. Something of the model's "
            "own stands between the weights and a site (a norm, a soft-cap, a multiplier): use "
            "hk.attach"
        )
