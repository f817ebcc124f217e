"""What does gradient descent do to a model, step by step, as it learns "we love deep learning"?

A tiny Llama, made from its configuration a moment ago, is trained in front of the reader: forward,
loss, backward, a step. Claims: it starts as unsure as a guess and ends sure; a small step lowers
the loss by step size times the squared length of the gradient; what one sentence taught is lost
where the next one contradicts it, and kept where they agree.

python -m experiments.loss_and_gradient_descent
    half a minute; writes results/loss_and_gradient_descent/
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hookkit as hk
from hookkit.figures.style import DASHES, DOWN, LINES, MUTED, add_legend, apply_style

SEED = 0
SENTENCE, OTHER = "we love deep learning", "we love oat milk"
WORDS = ("we", "love", "deep", "learning", "oat", "milk", "tea", "coffee", "and", "sleep")
STEPS, STEP_SIZE, SMALL = 60, 0.1, 1e-3  # along a small step the loss is a straight line
TABLES = ("curve", "small_step", "forgotten")  # those of which the answer is made
QUESTION = (
    f"What does gradient descent do to a model, step by step, when it learns to say “{SENTENCE}”?"
)


def main() -> None:
    tiny, lm = made(), hk.load(device="cpu")
    with hk.record(
        "results/loss_and_gradient_descent", question=QUESTION, lm=lm, seed=SEED
    ) as results:
        curve = learn(tiny, results)
        forget(tiny, results)
        expect(lm, results)
        tables = {name: pd.read_csv(results.folder / f"{name}.csv") for name in TABLES}
        results.answer(answer(tables))
    print(curve.iloc[::10].to_string(index=False))


def made() -> hk.LM:
    """A model of two blocks that has learnt nothing, and a tokenizer with one token per word."""
    torch.manual_seed(SEED)
    sizes: Any = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=None, **sizes)
    words: Any = Tokenizer(
        models.WordLevel(dict(zip(WORDS, range(10), strict=True)), unk_token="and")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hk.LM(
        LlamaForCausalLM(config).eval(),
        PreTrainedTokenizerFast(tokenizer_object=words),
        "a tiny Llama",
    )


def step(lm: Any, text: str, size: float) -> tuple[float, float]:
    """One step of training. Returns the loss before it (nats) and the gradient's squared length."""
    model, ids = lm.model, torch.tensor([lm.tokenizer.encode(text)])
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss  # forward
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= size * weight.grad
    return loss.item(), sum(
        float(weight.grad.double().square().sum()) for weight in model.parameters()
    )


def trained(lm: hk.LM, text: str) -> pd.DataFrame:
    rows = []  # row n is what the model says of the text after n steps
    for number in range(STEPS + 1):
        said = hk.surprisal(hk.forward(lm, text))
        loss, squared = step(lm, text, STEP_SIZE if number < STEPS else 0)
        rows.append(
            {"step": number, "loss": loss, "perplexity": math.exp(loss), "gradient": squared**0.5}
        )
        rows[-1] |= dict(zip(map(repr, said["token"]), said["prob"], strict=True))
    return pd.DataFrame(rows)


def learn(lm: hk.LM, results: hk.types.Record) -> pd.DataFrame:
    loss, squared = step(lm, SENTENCE, SMALL)
    drop = loss - step(lm, SENTENCE, 0)[0]
    start = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    before, curve, guess = hk.forward(lm, SENTENCE), trained(lm, SENTENCE), math.log(len(WORDS))
    small = {"size": SMALL, "predicted": SMALL * squared, "drop": drop, "guess": guess}
    results.table("small_step", pd.DataFrame([small]), caption="What a small step takes off.")
    results.figure(
        "loss",
        drawn(curve),
        caption="Left: the loss. Right: what each word of the sentence was given.",
    )
    results.table(
        "curve", curve, caption="Loss in nats; gradient: its length; then each word's probability."
    )
    shift = hk.rank_shift(before, hk.forward(lm, SENTENCE), pos=2, top=len(WORDS)).drop(
        columns=["row", "pos", "why"]
    )
    results.table(
        "logits", shift.round(4), caption="All logits after “we love deep”, before and after."
    )
    moved = {
        n: float((w.data - start[n]).norm() / start[n].norm())
        for n, w in lm.model.named_parameters()
    }
    table = pd.DataFrame({"weight": moved.keys(), "moved": moved.values()}).sort_values(
        "moved", ascending=False
    )
    results.table(
        "weights", table, caption="How far each weight moved, as a part of its length before."
    )
    return curve


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    losses, small = tables["curve"]["loss"], tables["small_step"].iloc[0]
    worst = tables["forgotten"].iloc[0]
    return (
        f"It makes the sentence likely and everything else unlikely: {len(losses) - 1} steps of "
        f"{STEP_SIZE:g} lower the loss from {losses.iloc[0]:.3f} nats a word, which is a guess "
        f"({small['guess']:.3f}), to {losses.iloc[-1]:.4f}. Each step follows the gradient: a "
        f"small one should lower the loss by {small['predicted']:.6f} nats and lowers it by "
        f"{small['drop']:.6f}. As many steps on “{OTHER}” undo it where the two contradict each "
        f"other: the probability of {worst['token']!r} goes from {worst['prob_before']:.3f} to "
        f"{worst['prob_after']:.3f}."
    )


def forget(lm: hk.LM, results: hk.types.Record) -> None:
    before = hk.forward(lm, SENTENCE)
    trained(lm, OTHER)
    worse = hk.surprisal_shift(before, hk.forward(lm, SENTENCE), worst_first=True).drop(
        columns=["row"]
    )
    results.text(f"# What would a next sentence undo? {STEPS} steps on “{OTHER}” alone")
    results.table(
        "forgotten", worse, caption=f"What “{SENTENCE}” costs before and after. Worst first."
    )


def expect(lm: hk.LM, results: hk.types.Record) -> None:
    said = hk.surprisal(results.run("default", hk.forward(lm, SENTENCE)), top=4)
    results.text("# The same words under the default model, as the context grows")
    results.figure(
        "strip", hk.figures.surprisal_strip(said, title="What each word cost the default model")
    )
    results.table(
        "default",
        said,
        caption="Of the first token nothing was expected. mean_loss, perplexity: up to here.",
    )


def drawn(curve: pd.DataFrame) -> Figure:
    left, right = (figure := Figure(figsize=(10, 3.8), layout="constrained")).subplots(1, 2)
    left.plot(curve["step"], curve["loss"], color=DOWN, lw=2, label="loss of the sentence")
    left.axhline(math.log(len(WORDS)), color=MUTED, ls="--", lw=0.9, label="a guess: ln 10")
    add_legend(left)
    for number, name in enumerate(curve.columns[4:]):
        style: dict[str, Any] = {"ls": DASHES[number], "color": LINES[number]}
        right.plot(curve["step"], curve[name], lw=2, label=name, **style)
    left.set(xlabel="steps of gradient descent", ylabel="loss (nats a word)")
    right.set(xlabel="steps of gradient descent", ylabel="probability of the word")
    add_legend(right)
    return apply_style(figure, f"Learning to say “{SENTENCE}”")


if __name__ == "__main__":
    main()
