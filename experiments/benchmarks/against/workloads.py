"""The sweeps that are measured, and how hookkit does them."""

from itertools import product
from typing import Any

import hookkit as hk

from .serving import Cells, Source, Task, Way

CLEAN = "When Mary and John went to the store, John gave a drink to"
LATE = (
    "When Mary and John went to the store, Mary gave a drink to"  # differs from the tenth token on
)
EARLY = (
    "While Anna and Tom went to the store, Tom gave a drink to"  # differs from the first token on
)
RIGHT, WRONG = " Mary", " John"


def workloads(lm: hk.LM) -> dict[str, tuple[Task, Cells]]:
    """Each sweep by its letter, with all its cells."""
    width, right, wrong = len(lm.encode(CLEAN)), lm.token(RIGHT), lm.token(WRONG)
    layers = range(lm.n_layers)
    stream, heads = (
        list(product(layers, range(width))),
        list(product(layers, range(lm.sizes["head"] or 0))),
    )
    pairs = {"a": (LATE, CLEAN, stream), "b": (EARLY, CLEAN, stream), "c": (CLEAN, None, heads)}
    return {
        letter: (
            Task(
                prompt=lm.encode(prompt),
                clean=lm.encode(clean) if clean else None,
                right=right,
                wrong=wrong,
            ),
            cells,
        )
        for letter, (prompt, clean, cells) in pairs.items()
    }


def swept(lm: hk.LM) -> tuple[Source, Way]:
    """What is patched in, and the sweep, with hookkit. The cells are those of a whole grid."""

    def source(task: Task) -> Any:
        return hk.forward(lm, [task["clean"] or []], hk.capture("resid_pre"), logits=False)

    def sweep(task: Task, clean: Any, cells: Cells) -> list[float]:
        grid = {
            "layer": sorted({layer for layer, _ in cells}),
            "place": sorted({place for _, place in cells}),
        }

        def hooks(layer: int, place: int) -> hk.types.Hook:
            if clean is None:
                return hk.ablate(hk.Site("z", layer, place))
            return hk.patch(hk.Site("resid_pre", layer), clean, pos=place)

        metric = hk.metrics.logit_diff(task["right"], task["wrong"])
        return hk.sweep(lm, [task["prompt"]], grid, hooks, metric)["logit_diff"].tolist()

    return source, sweep
