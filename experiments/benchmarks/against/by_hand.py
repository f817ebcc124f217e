"""The same sweeps with plain transformers and hooks by hand: one forward per cell or per layer."""

from itertools import groupby
from typing import Any

import torch

from .serving import Cells, Source, Task, Way


def by_hand(model: Any) -> tuple[Source, dict[str, Way]]:
    """What is patched in, and both ways, for a Llama of transformers."""

    @torch.no_grad()
    def source(task: Task) -> Any:
        kept: dict[int, Any] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda _m, args, n=number: kept.__setitem__(n, args[0].clone())
            )
            for number, layer in enumerate(model.model.layers)
        ]
        model(torch.tensor([task["clean"]]), use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return kept

    @torch.no_grad()
    def one_by_one(task: Task, clean: Any, cells: Cells) -> list[float]:
        return [
            value for layer, place in cells for value in _said(model, task, clean, layer, [place])
        ]

    @torch.no_grad()
    def batched(task: Task, clean: Any, cells: Cells) -> list[float]:
        found = []
        for layer, group in groupby(cells, key=lambda cell: cell[0]):
            found += _said(
                model, task, clean, layer, [place for _, place in group], logits_to_keep=1
            )
        return found

    return source, {"one by one": one_by_one, "batched": batched}


def _said(
    model: Any, task: Task, clean: Any, layer: int, places: list[int], **settings: Any
) -> list[float]:
    """The metric of each row of a batch in which row n is edited at the n-th place."""

    def edit(_: Any, args: tuple[Any, ...]) -> Any:
        values, size = args[0].clone(), model.config.head_dim
        for row, place in enumerate(places):
            if clean is None:
                values[row, :, place * size : (place + 1) * size] = 0
            else:
                values[row, place] = clean[layer][0, place]
        return (values, *args[1:])

    block = model.model.layers[layer]
    handle = (block.self_attn.o_proj if clean is None else block).register_forward_pre_hook(edit)
    try:
        last = model(
            torch.tensor([task["prompt"]] * len(places)), use_cache=False, **settings
        ).logits[:, -1]
    finally:
        handle.remove()
    return (last[:, task["right"]] - last[:, task["wrong"]]).tolist()
