"""nnsight, as its users sweep: one trace for each cell, or one for a layer's. Run by `peers`."""

from itertools import groupby
from typing import Any

import torch
from nnsight import LanguageModel  # pyright: ignore[reportMissingImports]

from .serving import Cells, Task, loaded, serve


def main() -> None:
    plain, tokenizer, _ = loaded()
    model = LanguageModel(plain, tokenizer=tokenizer)
    layers, size = model.model.layers, plain.config.head_dim

    def source(task: Task) -> Any:
        with model.trace(torch.tensor([task["clean"]])):
            states = list().save()  # noqa: C408  # pyright: ignore  nnsight gives lists a save
            for layer in layers:
                states.append(layer.input)
        return states

    def one_by_one(task: Task, clean: Any, cells: Cells) -> list[float]:
        ids, right, wrong, found = torch.tensor([task["prompt"]]), task["right"], task["wrong"], []
        for layer, place in cells:
            with model.trace(ids):
                if clean is None:
                    layers[layer].self_attn.o_proj.input[
                        :, :, place * size : (place + 1) * size
                    ] = 0
                else:
                    layers[layer].input[:, place] = clean[layer][:, place]
                logits = model.lm_head.output
                difference = (logits[0, -1, right] - logits[0, -1, wrong]).save()
            found.append(float(difference))
        return found

    def batched(task: Task, clean: Any, cells: Cells) -> list[float]:
        ids, right, wrong, found = torch.tensor([task["prompt"]]), task["right"], task["wrong"], []
        for layer, group in groupby(cells, key=lambda cell: cell[0]):
            places = [place for _, place in group]
            with model.trace() as tracer:
                differences = list().save()  # noqa: C408  # pyright: ignore
                for place in places:
                    with tracer.invoke(ids):
                        if clean is None:
                            layers[layer].self_attn.o_proj.input[
                                :, :, place * size : (place + 1) * size
                            ] = 0
                        else:
                            layers[layer].input[:, place] = clean[layer][:, place]
                        logits = model.lm_head.output
                        differences.append(logits[0, -1, right] - logits[0, -1, wrong])
            found += [float(each) for each in differences]
        return found

    serve(source, {"one by one": one_by_one, "batched invokes": batched})


if __name__ == "__main__":
    main()
