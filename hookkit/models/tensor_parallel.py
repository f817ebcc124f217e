"""Tensor parallelism: one model held by several processes, in each of which some tensors are a part of what they are.

torchrun --nproc-per-node 2 script.py        # every process runs the script, and hk.load(name, tp_plan="auto")

transformers splits the matrices: in each process (rank) `q_proj` gives some heads, and `down_proj` reads some neurons,
as plain tensors without a mark. Here such a part is joined with those of the other ranks before any hook sees it, and
what the hooks leave is cut again. So each rank does the same work on the same whole tensors, gets the same run, and
rank 0 alone writes files.

That a tensor is split is read off its size, which the model's configuration fixes; that one of the full size is the
same on all ranks is tried once for each place. What fits neither raises.
"""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported

Key = tuple[str, str, int | str]
"""A module's path, its side, and which of several tensors."""


@dataclass(frozen=True)
class Split:
    """How a tensor is split: along which axis, and how much of it each rank has."""

    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that hold one model together, seen from one of them."""

    group: Any
    rank: int
    count: int
    splits: dict[Key, Split | None] = field(
        default_factory=dict
    )  # None: whole, and the same on every rank

    def split(self, key: Key, found: Tensor, expected: Mapping[int, int] | None) -> Split | None:
        """How the tensor at a place is split; found out the first time, by all ranks together.

        `expected` has the full sizes of axes that may be split, None where they are not known.
        """
        if key not in self.splits:
            self.splits[key] = self._found(key, found, expected)
        return self.splits[key]

    def _found(self, key: Key, found: Tensor, expected: Mapping[int, int] | None) -> Split | None:
        where = f"what is at the {key[1]} of {key[0] or 'the model'}"
        shapes: list[list[int]] = self.told(list(found.shape))
        for axis, full in (expected or {}).items():
            sizes = tuple(shape[axis] for shape in shapes)
            if sum(sizes) == full and self.count > 1 and found.shape[axis] != full:
                return Split(axis % found.ndim, sizes)
            if set(sizes) != {full}:
                raise Unsupported(
                    f"{where} has {list(sizes)} numbers on the ranks along axis {axis % found.ndim}, which do not make "
                    f"up {full}: it cannot be put together"
                )
        sums = self.told(_summed(found))
        if any(shape != shapes[0] for shape in shapes) or not torch.allclose(
            torch.tensor(sums),
            torch.tensor(sums[:1]).expand(len(sums), -1),
            rtol=1e-4,
            equal_nan=True,
        ):
            raise Unsupported(
                f"{where} differs from rank to rank ({[tuple(shape) for shape in shapes]}), and how its parts stand "
                "to the whole is not known: it cannot be put together. The sites of lm.describe() can"
            )
        return None

    def told(self, value: Any) -> list[Any]:
        """What each rank says, in their order."""
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def first(self, value: Any) -> Any:
        """What rank 0 says."""
        return self.told(value)[0]

    def least(self, value: int) -> int:
        """The smallest of what the ranks say."""
        return min(self.told(value))

    def together(self) -> None:
        """Wait until every rank is here."""
        self.told(None)

    # ---- parts and wholes

    def whole(self, part: Tensor, split: Split) -> Tensor:
        """The whole tensor, from the part that each rank has."""
        return _Joined.apply(part, self, split) if part.requires_grad else self.joined(part, split)  # pyright: ignore

    def part(self, whole: Tensor, split: Split) -> Tensor:
        """This rank's part of a whole tensor."""
        return _Cut.apply(whole, self, split) if whole.requires_grad else self.cut(whole, split)  # pyright: ignore

    def joined(self, part: Tensor, split: Split) -> Tensor:
        largest = max(split.sizes)
        sent = part.detach().movedim(split.axis, 0).contiguous()
        if len(sent) < largest:
            sent = torch.cat([sent, sent.new_zeros(largest - len(sent), *sent.shape[1:])])
        received = [torch.empty_like(sent) for _ in split.sizes]
        torch.distributed.all_gather(received, sent, group=self.group)
        parts = [each[:size] for each, size in zip(received, split.sizes, strict=True)]
        return torch.cat(parts).movedim(0, split.axis).contiguous()

    def cut(self, whole: Tensor, split: Split) -> Tensor:
        start = sum(split.sizes[: self.rank])
        return whole.narrow(split.axis, start, split.sizes[self.rank]).contiguous()

    def around(
        self,
        key: Key,
        found: Tensor,
        expected: Mapping[int, int] | None,
        work: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Work on the whole of a tensor of which this rank may have a part: what goes on, the part again."""
        split = self.split(key, found, expected)
        if split is None:
            return work(found)
        whole = self.whole(found, split)
        new = work(whole)
        return found if new is whole else self.part(new, split)


class _Joined(torch.autograd.Function):
    """Parts to the whole; backwards, this rank's part of the gradient, which every rank has whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, split: Split) -> Tensor:
        ctx.ranks, ctx.split = ranks, split
        return ranks.joined(part, split)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.ranks.cut(gradients[0], ctx.split), None, None


class _Cut(torch.autograd.Function):
    """The whole to this rank's part; backwards, the gradient of the whole from those of all parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks, split: Split) -> Tensor:
        ctx.ranks, ctx.split = ranks, split
        return ranks.cut(whole, split)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.ranks.joined(gradients[0], ctx.split), None, None


def _summed(found: Tensor) -> list[float]:
    numbers = found.detach().double()
    return [float(numbers.sum()), float(numbers.abs().sum())]


# ---- the model


def ranks_of(model: nn.Module) -> Ranks | None:
    """The ranks that hold a model together; None for one that is whole in this process.

    `Unsupported` for a model that is spread in another way than by tensor parallelism.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    mesh = next(
        (weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)), None
    )
    if mesh is None:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise Unsupported(
                "this version of transformers does not mark what it splits among processes: use 5.20 on"
            )
        return None
    names = tuple(mesh.mesh_dim_names or ())
    if mesh.ndim != 1 or (names and names != ("tp",)):
        raise Unsupported(
            f"the model is spread over {mesh.size()} processes by {' and '.join(names) or 'a mesh of several axes'}, "
            "and hooks reach models spread by tensor parallelism only: hk.load(name, tp_plan='auto')"
        )
    group = mesh.get_group()
    ranks = Ranks(group, torch.distributed.get_rank(group), mesh.size())
    _LIVE_RANKS.add(ranks)
    return ranks


_LIVE_RANKS: weakref.WeakSet[Ranks] = weakref.WeakSet()
"""This process's part in each split model that it holds now. A model that is gone has left the set."""


def is_writing_process() -> bool:
    """True where this process writes files: in no model that lives now is it a later rank.

    For what belongs to no model, such as a report. Where there is a model, `lm.is_writer` says it.
    """
    return all(ranks.rank == 0 for ranks in _LIVE_RANKS)


def whole_weight(weight: Tensor) -> Tensor:
    """A weight that may be split among ranks, whole; every rank has to ask."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # pyright: ignore
