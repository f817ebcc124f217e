"""What forward and generate are asked alike: which logits to keep, of a model that they can run."""

from typing import Literal, TypeAlias

from ..errors import EmptySelection, Unsupported
from ..model import LM

Logits: TypeAlias = Literal["all", "last", "none"] | bool | None


def refuse_two_texts(lm: LM) -> None:
    """Raise `Unsupported` for a model that reads one text and writes another."""
    if lm.two_texts:
        raise Unsupported(
            f"{type(lm.root).__name__} is an encoder-decoder, which reads one text and writes another: run it yourself "
            "in a block of hk.attach, with hooks at hk.module(path)"
        )


def wanted_logits(logits: Logits) -> Literal["all", "last", "none"]:
    """Which logits a run is to keep."""
    if logits in ("all", True):
        return "all"
    if logits in ("none", False, None):
        return "none"
    if logits == "last":
        return "last"
    raise EmptySelection(f"logits={logits!r} is unknown: say 'all', 'last' or False")
