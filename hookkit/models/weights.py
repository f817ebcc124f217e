"""Which weights write or read a site, and how a copy of a model gets a bias or a head of its own.

A site is a part of the output of one matrix (q, mlp_out …), or of its input (z, mlp_post). So what
is linear at the site can be computed into the matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import Unsupported
from .families.schema import ModuleLocation
from .layout import text_config
from .lm import LM
from .sites import Site
from .views import view_of

# The site that the last matrix of a part of the block reads.
READ_BY_LAST_MATRIX = {"attn_out": "z", "mlp_out": "mlp_post", "cross_out": "cross_z"}


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """The matrix that writes or reads a site.

    path    its module
    reads   True if the site is in the module's input, False if it is in its output
    index   the indices of the site's numbers on that axis of the matrix, in the site's shape
    factor  the number by which the module's tensor is multiplied to give the site
    """

    path: str
    reads: bool
    index: Int[Tensor, "*site"]
    factor: float = 1.0


def find_weights(lm: LM, site: Site, *, through_norm: bool = False) -> SiteWeights:
    """Returns the matrix that writes or reads a site, or raises `Unsupported` with the reason.

    With `through_norm`, it may be the matrix before the norm that gives the site.
    """
    location = lm.location(site)
    if location.side == "inside":
        raise Unsupported(f"{site} is computed inside {location.path}, and no one matrix writes it")
    module = lm.submodule(location.path)
    path = location.path
    if not _is_matrix(module):
        path = _last_matrix(lm, site, location, through_norm)
        module = lm.submodule(path)
    reads = location.side == "input"
    if isinstance(module, nn.Embedding) and reads:
        raise Unsupported(f"{site} is the input of an embedding, which is token ids")
    factor = lm.layout.factor(site)
    if isinstance(module, nn.Embedding):
        factor *= float(getattr(module, "embed_scale", 1.0))
    size = matrix_of(module).shape[1 if reads else 0]
    numbers = torch.arange(size)[None, None]
    view = view_of(lm.layout, site, location)
    return SiteWeights(path, reads, view.view(numbers)[0, 0], factor)


def _last_matrix(lm: LM, site: Site, location: ModuleLocation, through_norm: bool) -> str:
    """Returns the path of the matrix that is the last of the module whose output a site is."""
    path = _last_inner_path(lm, site, location)
    kind = type(lm.submodule(location.path)).__name__
    is_norm = "norm" in kind.lower()
    if is_norm and not (path and through_norm):
        raise Unsupported(f"{site} comes from {location.path} ({kind}), which is a norm")
    if not is_norm and not path.startswith(f"{location.path}."):
        verb = "is read by" if location.side == "input" else "comes from"
        raise Unsupported(f"{site} {verb} {location.path} ({kind}), which is no single matrix")
    module = lm.submodule(path)
    if not _is_matrix(module):
        raise Unsupported(
            f"{site} comes from {path} ({type(module).__name__}), which is no plain matrix: a "
            "mixture of experts, or quantised weights"
        )
    return path


def _last_inner_path(lm: LM, site: Site, location: ModuleLocation) -> str:
    """Returns the path of the last matrix of the module that gives a site; "" if it has none."""
    reader = READ_BY_LAST_MATRIX.get(site.name)
    if reader is None or location.side != "output":
        return ""
    inner = lm.layout.of_stack(site).find(reader, site.layer)
    return "" if inner is None else inner.path


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    weight: Any = getattr(module, "weight", None)
    is_kind = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    return is_kind and type(weight) is nn.Parameter and weight.is_floating_point()


def matrix_of(module: nn.Module) -> Float[Tensor, "out in"]:
    """Returns the view of a module's weight that maps its input to its output."""
    weight: Any = module.weight
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def edit_weights(
    module: nn.Module,
    weights: SiteWeights,
    linear: Callable[[Tensor], Tensor],
    offset: Float[Tensor, "*site"],
) -> None:
    """Changes a matrix and its bias so that the site's values x become `linear(x) + offset`.

    `linear` maps values [row, *site] and is a symmetric matrix on the last axis. A bias is needed
    for an offset that is not zero.
    """
    matrix, index = matrix_of(module), weights.index.to(matrix_of(module).device)
    offset = offset.to(matrix.device, torch.promote_types(matrix.dtype, torch.float32))
    bias: Any = getattr(module, "bias", None)
    if weights.reads:
        columns = matrix[:, index].to(offset.dtype)
        if bias is not None:
            bias.data += (columns * offset).flatten(1).sum(1).to(bias.dtype)
        matrix[:, index] = linear(columns).to(matrix.dtype)
        return
    if isinstance(module, nn.Embedding):
        rows = matrix.T[:, index].to(offset.dtype) * weights.factor
        matrix.T[:, index] = ((linear(rows) + offset) / weights.factor).to(matrix.dtype)
        return
    rows = matrix[index].to(offset.dtype).movedim(-1, 0)
    matrix[index] = linear(rows).movedim(0, -1).to(matrix.dtype)
    if bias is not None:
        new = linear(bias.data[index].to(offset.dtype)[None])[0] + offset / weights.factor
        bias.data[index] = new.to(bias.dtype)


# ---- weights that several modules share, and biases that are not there


def untie(model: nn.Module, path: str) -> None:
    """Gives a module weights of its own, if only the embedding and the head share them.

    Raises `Unsupported` if other modules share weights, or the module stands at several paths.
    """
    paths = _paths_by_weight(model)
    sharing = paths[id(model.get_submodule(path).weight)]
    if len(sharing) == 1:
        return
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    are_tied = {model.get_submodule(name) for name in sharing} == {head, embedding}
    several = [names for names in paths.values() if len(names) > 1]
    if len(sharing) > 2 or not are_tied or len(several) > 1:
        names = ", ".join(several[0] if are_tied else sharing)
        raise Unsupported(f"the modules {names} … share their weights, and an edit would be of all")
    head.weight = nn.Parameter(head.weight.detach().clone())
    config: Any = model.config
    for part in (config, text_config(config)):
        part.tie_word_embeddings = False


def _paths_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Returns the paths of the modules that have each weight, by the id of the weight."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            paths.setdefault(id(weight), []).append(name)
    return paths


def add_biases(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Adds biases of zeros to these modules, with settings of the configuration; returns the paths
    for which the configuration has no setting.
    """
    missing = {path for path in paths if getattr(model.get_submodule(path), "bias", None) is None}
    names = _bias_settings(model.config)
    for settings in (*((name,) for name in names), tuple(names)):
        if not missing:
            break
        new = _modules_with_new_bias(model, settings)
        if missing.isdisjoint(new):
            continue
        for path in new:
            _add_bias(model.get_submodule(path))
        for name in settings:
            setattr(text_config(model.config), name, True)
        missing -= set(new)
    return sorted(missing)


def _bias_settings(config: Any) -> list[str]:
    """Returns the names of a configuration's settings that turn biases on, and are off."""
    settings: Mapping[str, Any] = text_config(config).to_dict()
    return [name for name, value in settings.items() if "bias" in name and value is False]


def _modules_with_new_bias(model: Any, settings: tuple[str, ...]) -> list[str]:
    """Returns the modules that have a bias with these settings and none without.

    Empty if the settings do more than to add biases to matrices, or the configuration refuses them.
    """
    other = _with_settings(model, settings)
    if other is None:
        return []
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    new = set(dict(other.named_parameters(remove_duplicate=False))) - names
    if any(not name.endswith(".bias") for name in new):
        return []
    kinds = {path: type(module) for path, module in model.named_modules()}
    is_same = kinds == {path: type(module) for path, module in other.named_modules()}
    return sorted(name.removesuffix(".bias") for name in new) if is_same else []


def _with_settings(model: Any, settings: tuple[str, ...]) -> Any:
    """Returns the model, on the meta device, with these settings on; None if they are refused."""
    config = copy.deepcopy(model.config)
    for name in settings:
        setattr(text_config(config), name, True)
    try:
        config = type(config).from_dict(config.to_dict())  # checks what goes together
        with torch.device("meta"):
            return type(model)(config)
    except (ValueError, TypeError, StrictDataclassError):
        return None


def _add_bias(module: nn.Module) -> None:
    weight: Any = module.weight
    size = weight.shape[0]
    module.register_parameter(
        "bias", nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
    )
