"""KeptTensors: captures that keep the model's own tensors instead of copies.

A tensor of the model that nothing writes into after its capture need not be copied. torch counts
the writes into each tensor (`_version`). If the count of a kept tensor has moved when the forward
ends, the module location is noted, the forward runs again, and from then on this location is
copied. Models that write in place are Falcon (the output of its MLPs), for example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hooks.base import Hook
from ..hooks.capture import Capture
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from ..models.sites import Site

# The first two may be tables of the model; a run's logits are its output too.
COPIED = ("embed", "pos_embed", "lm_head", "logits")


@dataclass(eq=False)
class KeptTensors:
    """The tensors of one forward that captures keep. The strategy of the forward owns it."""

    lm: LM
    _kept: list[tuple[ModuleLocation, Tensor, int]] = field(default_factory=list)
    _storages: set[int] = field(default_factory=set)

    def keep(self, site: object, location: ModuleLocation, tensor: Tensor) -> Tensor:
        """Returns the tensor itself if a capture may keep it, else a copy.

        It may if it has memory of its own: all of it, and no other capture has it.
        """
        storage = tensor.untyped_storage()
        owns_memory = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        is_inner = isinstance(site, Site) and site.name not in COPIED
        is_kept = storage.data_ptr() in self._storages
        if not is_inner or not owns_memory or is_kept or location in overwritten(self.lm):
            return tensor.clone()
        self._storages.add(storage.data_ptr())
        self._kept.append((location, tensor, tensor._version))
        return tensor

    def note_overwritten(self) -> bool:
        """Notes the locations whose tensors were written into. True if there are any."""
        written = {location for location, tensor, count in self._kept if tensor._version != count}
        overwritten(self.lm).update(written)
        return bool(written)


def overwritten(lm: LM) -> set[ModuleLocation]:
    """Returns the locations whose tensors the model writes into, as far as forwards have shown."""
    return lm.trial_results.setdefault("overwritten", set())


def can_keep_tensors(lm: LM, hooks: Sequence[Hook]) -> bool:
    """True if captures may keep tensors: nothing but captures acts, so the forward can run again.

    A block runs compiled code uncompiled, so that no result is in memory that is used again.
    """
    if not hooks or not all(isinstance(hook, Capture) and not hook.grad for hook in hooks):
        return False
    if lm.root.training or torch.is_inference_mode_enabled():
        return False
    hooked = (module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    return not any(hooked)
