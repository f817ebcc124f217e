"""TransformerLens, as its users sweep: one `run_with_hooks` for each cell. Run by `peers`."""

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

from .serving import Cells, Task, loaded, serve


def main() -> None:
    model, tokenizer, folder = loaded()
    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=model, tokenizer=tokenizer, dtype=torch.float32, device="cpu"
    )

    def source(task: Task) -> Any:
        names = {f"blocks.{layer}.hook_resid_pre" for layer in range(bridge.cfg.n_layers)}
        return bridge.run_with_cache(
            torch.tensor([task["clean"]]), names_filter=lambda name: name in names
        )[1]

    def one_by_one(task: Task, clean: Any, cells: Cells) -> list[float]:
        ids, found = torch.tensor([task["prompt"]]), []
        for layer, place in cells:
            name = (
                f"blocks.{layer}.attn.hook_z" if clean is None else f"blocks.{layer}.hook_resid_pre"
            )

            def edit(values: Any, hook: Any, name: str = name, place: int = place) -> Any:
                if clean is None:
                    values[:, :, place] = 0
                else:
                    values[:, place] = clean[name][:, place]
                return values

            last = bridge.run_with_hooks(ids, fwd_hooks=[(name, edit)])[0, -1]
            found.append(float(last[task["right"]] - last[task["wrong"]]))
        return found

    serve(source, {"one by one": one_by_one})


if __name__ == "__main__":
    main()
