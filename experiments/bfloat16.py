"""What moves when a model computes in bfloat16 instead of float32?

The default model's weights are rounded to bfloat16 (eight binary digits, a relative error of at
most 2^-9 = 0.2 %), and all that it computes is. It is answered by four numbers over the same texts:
after how many tokens another one comes first, how far the distributions are apart, what the text
itself costs, and at which layers the difference grows. As a measure beside it, one block is passed
by in float32, as if it were not there. Processors add bfloat16 products in ways of their own, so
that the last numbers shown here differ from one to another.

python -m experiments.bfloat16        two minutes on two cores; writes results/bfloat16/
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import hookkit as hk

FOLDER = Path("results/bfloat16")
SKIPPED = 17  # the block that is passed by, for comparison
TEXTS = [
    "I like oat milk in my coffee, and my sister takes hers with nothing but a little sugar.",
    "The Eiffel Tower is located in the city of Paris, which is the capital of France.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
    "To be, or not to be, that is the question.",
    "The committee will meet on Tuesday, March 4, to discuss the budget for the next year.",
    "Der Zug nach Berlin fährt um acht Uhr ab.",
    "She opened the door, looked around the empty room, and began to laugh.",
]
QUESTION = (
    "Is a result that was found in bfloat16 one about the model, or about its rounding? The same "
    "texts, read by the same weights in both."
)


def main() -> None:
    lm = hk.load(device="cpu")
    rounded = hk.LM(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, lm.name)
    found = hk.model_diff(lm, rounded, TEXTS, names=("float32", "bfloat16"))
    skipped = hk.model_diff(lm, lm, TEXTS, hooks_after=hk.skip_block(SKIPPED), sites="resid_post")
    table = pd.DataFrame([said("bfloat16", found), said(f"without block {SKIPPED}", skipped)])
    words = answer({"beside_a_skipped_block": table})
    found.page(title="float32 and bfloat16", question=QUESTION, answer=words).write(FOLDER)
    table.to_csv(
        FOLDER / "beside_a_skipped_block.csv", index=False, float_format="%.6g", lineterminator="\n"
    )
    print(table.round(4).to_string(index=False))
    print(f"The page: {FOLDER}/report.html")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["beside_a_skipped_block"]
    rounded, skipped = table.iloc[0], table.iloc[1]
    verdict = "In part about its rounding"
    if rounded["another_first"] < 0.05 and rounded["kl"] < skipped["kl"] / 10:
        verdict = "About the model, for most tokens"
    return (
        f"{verdict}: in bfloat16 another token comes first after "
        f"{rounded['another_first']:.1%} of {rounded['tokens']} tokens, the distributions are "
        f"{rounded['kl']:.2g} nats apart on average (KL), and the text costs "
        f"{rounded['loss_delta']:+.2g} nats a token. As a measure beside it, float32 without block "
        f"{SKIPPED} puts another token first after {skipped['another_first']:.1%} of them and is "
        f"{skipped['kl']:.2g} nats apart. An effect as small as the former may be rounding."
    )


def said(name: str, found: hk.types.Difference) -> dict[str, object]:
    """What a comparison comes to."""
    stream = found.sites[found.sites["name"] == "resid_post"].set_index("layer")
    return {
        "what": name,
        "tokens": len(found.tokens),
        "another_first": found.tokens["top1_changed"].mean(),
        "kl": found.tokens["kl"].mean(),
        "kl_max": found.tokens["kl"].max(),
        "loss_delta": found.tokens["loss_delta"].mean(),
        "loss_delta_abs": found.tokens["loss_delta"].abs().mean(),
        "first_difference": str(found.first),
        "stream_first": stream["difference"].iloc[0],
        "stream_middle": stream["difference"].iloc[len(stream) // 2],
        "stream_last": stream["difference"].iloc[-1],
        "cka_least": stream["cka"].min(),
    }


if __name__ == "__main__":
    main()
