"""Tensor parallelism: one model split among several processes (ranks).

torchrun --nproc-per-node 2 script.py    # the script calls hk.load(name, tp_plan="auto")

transformers splits the matrices: in each rank `q_proj` returns some of the heads, and `down_proj`
reads some of the neurons, as plain tensors that are not marked as parts. hookkit gathers the parts
of all ranks before a hook runs, and splits the result of the hooks again. So each rank does the
same work on the same whole tensors and gets the same run, and only rank 0 writes files.

A tensor is known to be split by its size, because the model's configuration determines the full
size. A tensor of full size must be equal on all ranks, which is checked once for each module
location. Any other tensor raises.
"""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Unsupported

Key = tuple[str, str, int | str]
"""A module location: path, side and item."""
Transform: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """How a tensor is split: along which axis, and the size of each rank's part."""

    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share one model, seen from one of them. The model's LM owns it."""

    group: Any
    rank: int
    count: int
    # None: whole, and the same on every rank
    splits: dict[Key, Split | None] = field(default_factory=dict)

    def split(self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None) -> Split | None:
        """Returns how the tensor at a module location is split. All ranks must call this together.

        `expected` has the full sizes of the axes that may be split; it is None if they are unknown.
        """
        if key not in self.splits:
            self.splits[key] = self._find_split(key, tensor, expected)
        return self.splits[key]

    def _find_split(
        self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None
    ) -> Split | None:
        subject = f"what is at the {key[1]} of {key[0] or 'the model'}"
        shapes: list[list[int]] = self.gather_values(list(tensor.shape))
        for axis, full in (expected or {}).items():
            sizes = tuple(shape[axis] for shape in shapes)
            if sum(sizes) == full and tensor.shape[axis] != full:
                return Split(axis % tensor.ndim, sizes)
            if set(sizes) != {full}:
                raise Unsupported(
                    f"{subject} has {list(sizes)} numbers on the ranks along axis "
                    f"{axis % tensor.ndim}, which do not make up {full}: it cannot be put together"
                )
        numbers = tensor.detach().double()
        checksums = [float(numbers.sum()), float(numbers.abs().sum())]
        sums = torch.tensor(self.gather_values(checksums))
        same_sums = torch.allclose(sums, sums[:1].expand_as(sums), rtol=1e-4, equal_nan=True)
        if not same_sums or shapes.count(shapes[0]) != len(shapes):
            raise Unsupported(
                f"{subject} differs from rank to rank ({list(map(tuple, shapes))}), and "
                "how its parts make up the whole is not known: it cannot be put together. The "
                "sites of lm.describe() can"
            )
        return None

    def gather_values(self, value: Any) -> list[Any]:
        """Returns the value of each rank, in their order."""
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    # ---- parts and wholes; every rank has the gradient of a whole, and of its own part

    def whole(self, part: Tensor, split: Split) -> Tensor:
        """Returns the whole tensor from the part that each rank has."""
        return _apply(partial(self.gather, split=split), partial(self.slice, split=split), part)

    def part(self, whole: Tensor, split: Split) -> Tensor:
        """Returns this rank's part of a whole tensor."""
        return _apply(partial(self.slice, split=split), partial(self.gather, split=split), whole)

    def gather(self, part: Tensor, split: Split) -> Tensor:
        """Returns the whole tensor, without a gradient."""
        largest = max(split.sizes)
        sent = part.detach().movedim(split.axis, 0).contiguous()
        if len(sent) < largest:
            sent = torch.cat([sent, sent.new_zeros(largest - len(sent), *sent.shape[1:])])
        received = [torch.empty_like(sent) for _ in split.sizes]
        torch.distributed.all_gather(received, sent, group=self.group)
        parts = [padded[:size] for padded, size in zip(received, split.sizes, strict=True)]
        return torch.cat(parts).movedim(0, split.axis).contiguous()

    def slice(self, whole: Tensor, split: Split) -> Tensor:
        """Returns this rank's part, without a gradient."""
        start = sum(split.sizes[: self.rank])
        return whole.narrow(split.axis, start, split.sizes[self.rank]).contiguous()

    def around(
        self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None, work: Transform
    ) -> Tensor:
        """Applies `work` to the whole of a tensor, and returns this rank's part of the result."""
        split = self.split(key, tensor, expected)
        if split is None:
            return work(tensor)
        whole = self.whole(tensor, split)
        new = work(whole)
        return tensor if new is whole else self.part(new, split)


def _apply(function: Transform, gradient_function: Transform, tensor: Tensor) -> Tensor:
    """Returns `function(tensor)`, whose gradient goes through `gradient_function`."""
    if not tensor.requires_grad:
        return function(tensor)
    return _WithGradient.apply(tensor, function, gradient_function)  # pyright: ignore


class _WithGradient(torch.autograd.Function):
    """A function without a gradient of its own, and the function for the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: Transform, gradient_function: Transform) -> Any:
        ctx.gradient_function = gradient_function
        return function(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.gradient_function(gradients[0]), None, None


# ---- the model


def find_ranks(model: nn.Module) -> Ranks | None:
    """Returns the ranks that share a model, or None if this process has the whole model.

    Raises `Unsupported` for a model that is distributed in another way than by tensor parallelism.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    meshes = [weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)]
    if not meshes:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise Unsupported(
                "this version of transformers does not mark what it splits among processes: use "
                "5.20 on"
            )
        return None
    mesh = meshes[0]
    names = tuple(mesh.mesh_dim_names or ())
    if mesh.ndim != 1 or (names and names != ("tp",)):
        raise Unsupported(
            f"the model is spread over {mesh.size()} processes by "
            f"{' and '.join(names) or 'a mesh of several axes'}, and hooks reach models spread by "
            "tensor parallelism only: hk.load(name, tp_plan='auto')"
        )
    group = mesh.get_group()
    ranks = Ranks(group, torch.distributed.get_rank(group), mesh.size())
    _LIVE_RANKS.add(ranks)
    return ranks


_LIVE_RANKS: weakref.WeakSet[Ranks] = weakref.WeakSet()
"""This process's part in each split model that it has. The models own the entries."""


def is_writing_process() -> bool:
    """True if this process has rank 0 in every model: it writes files of no single model."""
    return all(ranks.rank == 0 for ranks in _LIVE_RANKS)


def gather_weight(weight: Tensor) -> Tensor:
    """Returns a weight whole, if it is split among ranks. Every rank must call this."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # pyright: ignore
