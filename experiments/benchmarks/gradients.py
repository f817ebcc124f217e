"""What does attribution cost? Beside one plain forward, and beside the same written by hand.

All of resid_pre on the indirect-object prompt: the values and the gradient of the logit difference
at 30 layers and 14 positions. It is answered by ratios to a plain forward of the same round, the
workloads in turn and in a new order each round, since the machine's speed drifts.

python -m experiments.benchmarks.gradients
    2 minutes on two cores; writes results/benchmarks_gradients/
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch

import hookkit as hk

ROUNDS, THREADS = 15, 2
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
GOAL = 3.0  # at most, of attribution to a plain forward
RIGHT, WRONG = " Mary", " John"

Work = dict[str, Callable[[], Any]]
QUESTION = "What does attribution cost?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    with hk.record(
        "results/benchmarks_gradients",
        title="What attribution costs",
        question=QUESTION,
        lm=lm,
        seed=0,
    ) as results:
        work = workloads(lm)
        same = float(
            (work["gradients"]().stack("resid_pre") - work["gradients by hand"]()[1]).abs().max()
        )
        caption = (
            f"Medians of {ROUNDS} rounds, {THREADS} threads. ratio: to the plain forward, round by "
            "round."
        )
        table = results.table("gradients", compared(work), caption=caption)
        ratios = table.set_index("workload")["ratio"]
        results.text(
            f"hk.gradients and the backward by hand differ by {same:.1e} at most. Attribution "
            f"takes {ratios['attribution']:.2f} plain forwards (aimed at: {GOAL} or less), "
            f"{ratios['attribution by hand']:.2f} by hand: a forward of each prompt and a backward."
        )
        results.answer(answer({"gradients": table}))
    print(table.round(2).to_string(index=False))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratios = tables["gradients"].set_index("workload")["ratio"]
    return (
        f"Attribution of every layer and position costs as much as {ratios['attribution']:.2f} "
        f"plain forwards, and {ratios['attribution by hand']:.2f} if it is written by hand. The "
        f"gradients alone cost {ratios['gradients']:.2f}, and {ratios['gradients by hand']:.2f} by "
        "hand."
    )


def workloads(lm: hk.LM) -> Work:
    model: Any = lm.model
    clean, corrupted = (torch.tensor([lm.tokenizer.encode(text)]) for text in (CLEAN, CORRUPTED))
    metric = hk.metrics.logit_diff(RIGHT, WRONG)
    right, wrong = lm.token(RIGHT), lm.token(WRONG)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return model(corrupted, use_cache=False).logits

    def streams(ids: torch.Tensor, grad: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(_module: Any, args: Any) -> Any:
            kept.append(args[0].detach().requires_grad_(grad) if grad and not kept else args[0])
            return (kept[-1], *args[1:])

        hooks = [layer.register_forward_pre_hook(keep) for layer in model.model.layers]
        with torch.set_grad_enabled(grad):
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return kept, logits

    def gradients() -> tuple[list[torch.Tensor], torch.Tensor]:
        asking = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in asking:
            weight.requires_grad_(False)
        kept, logits = streams(corrupted, True)
        found = torch.stack(torch.autograd.grad(logits[right] - logits[wrong], kept))
        for weight in asking:
            weight.requires_grad_(True)
        return kept, found

    def attributed() -> torch.Tensor:
        source, _ = streams(clean, False)
        kept, slope = gradients()
        with torch.no_grad():
            return ((torch.stack(source) - torch.stack(kept)) * slope).sum(-1)

    return {
        "plain forward": plain,
        "gradients by hand": gradients,
        "gradients": lambda: hk.gradients(lm, CORRUPTED, metric, "resid_pre"),
        "attribution by hand": attributed,
        "attribution": lambda: hk.attribution(lm, CLEAN, CORRUPTED, "resid_pre", metric),
    }


def compared(work: Work) -> pd.DataFrame:
    """Seconds of each workload, and how they compare with the first one's in the same round."""
    taken: dict[str, list[float]] = {label: [] for label in work}
    for number in range(ROUNDS + 1):  # the first round warms up
        for label in random.Random(number).sample(list(work), len(work)):
            started = time.perf_counter()
            work[label]()
            taken[label].append(time.perf_counter() - started)
    plain = taken[next(iter(work))][1:]
    rows = []
    for label, seconds in taken.items():
        ratio = statistics.median(
            mine / other for mine, other in zip(seconds[1:], plain, strict=True)
        )
        rows.append([label, statistics.median(seconds[1:]) * 1000, ratio])
    return pd.DataFrame(rows, columns=["workload", "median_ms", "ratio"])


if __name__ == "__main__":
    main()
