"""How can a token be likely after one text and not after another, when its unembedding is the same?

A token's logit is its row of W times the last hidden state h. W does not change from text to text,
so all that a context can do is turn h. The claim is tested word by word in two texts that end
alike: W h by hand is the model's logit everywhere, and moving nothing but h from one text to the
other moves the whole ranking with it, exactly.

python -m experiments.context_shapes_predictions
    20 seconds; writes results/context_shapes_predictions/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import DASHES, INK, LINES, apply_style, drawable, rank_axis

SEED = 0
TEXTS = {
    "river": "They walked along the river to the bank and looked at the",
    "city": "They walked into the city to the bank and looked at the",
}
WATCH = (" water", " fish", " trees", " money", " building", " clock")


def main() -> None:
    lm = hk.load(device="cpu")
    question = (
        "How can one token be likely after one text and unlikely after another, when its row of W "
        "is the same?"
    )
    with hk.record(
        "results/context_shapes_predictions", question=question, lm=lm, seed=SEED
    ) as results:
        runs = {
            name: results.run(name, hk.forward(lm, TEXTS[name], hk.capture("final_norm")))
            for name in TEXTS
        }
        words(lm, runs, results)
        endings(lm, runs, results)
        table = moved(lm, runs, results)
    print(table.to_string(index=False))
    print("\nThe page: results/context_shapes_predictions/report.html")


def words(lm: hk.LM, runs: dict[str, hk.types.Run], results: hk.types.Record) -> None:
    """Every beginning of a text from one forward, since no position sees those after it."""
    parts = []
    for name, run in runs.items():
        read = list(map(lm.string, run.tokens[0].tolist()))
        table = hk.ranks(run, pos=hk.PROMPT, top=0, watch=WATCH)
        parts.append(table.assign(text=name, read=[read[pos] for pos in table["pos"]]))
    table: Any = pd.concat(parts, ignore_index=True)
    ids = [lm.token(token) for token in WATCH]
    rows = lm.model.lm_head.weight.detach()[ids]  # pyright: ignore
    off = max(
        float((run["final_norm"][0] @ rows.T - run.logits[0][:, ids]).abs().max())
        for run in runs.values()
    )
    results.text("# Word by word")
    results.text("\n".join(f"{name}: “{text}”" for name, text in TEXTS.items()))
    results.figure(
        "figure",
        drawn(table),
        caption="The rank of six tokens as next token, after each word that is read.",
    )
    results.table(
        "words",
        table[["text", "pos", "read", "token", "logit", "prob", "rank"]],
        caption="The same, in numbers.",
    )
    results.text(
        "Everywhere the logit is the token's row of W times h: the largest difference is "
        f"{off:.0e}."
    )


def endings(lm: hk.LM, runs: dict[str, hk.types.Run], results: hk.types.Record) -> None:
    hidden = {name: run["final_norm"][0, -1] for name, run in runs.items()}
    rows = lm.model.lm_head.weight.detach()[[lm.token(token) for token in WATCH]]  # pyright: ignore
    found = {"token": list(WATCH), "row_length": rows.norm(dim=1).tolist()}
    found |= {
        f"cosine_{name}": torch.cosine_similarity(rows, h).tolist() for name, h in hidden.items()
    }
    found |= {f"logit_{name}": (rows @ h).tolist() for name, h in hidden.items()}
    here, there = hidden.values()
    turned, lengths = torch.cosine_similarity(here, there, dim=0), (here.norm(), there.norm())
    results.text("# At the end: the same rows, another h")
    results.text(
        f"h is {lengths[0]:.1f} long after one text and {lengths[1]:.1f} after the other; cosine "
        f"{turned:.3f}."
    )
    caption = "A logit is the row's length × the length of h × the cosine of the two."
    results.table("endings", pd.DataFrame(found).round(4), caption=caption)
    shift = results.table(
        "shift", hk.rank_shift(*runs.values(), top=8, watch=WATCH), caption="From river to city."
    )
    results.figure(
        "ranks",
        hk.figures.rank_bump(shift, names=("river", "city"), title="What the other context moved"),
    )


def moved(lm: hk.LM, runs: dict[str, hk.types.Run], results: hk.types.Record) -> pd.DataFrame:
    """The causal test, and what a researcher asks next: from which layer on has h been turned?"""
    source = hk.forward(
        lm, TEXTS["city"], hk.capture(lm.sites("resid_post")), hk.capture("final_norm")
    )
    patched = hk.forward(lm, TEXTS["river"], hk.patch("final_norm", source, pos=-1))
    distances = []
    for name, run in (("its own h", runs["river"]), ("h of the city text", patched)):
        kl = hk.stats.shift_summary(runs["city"], run)["kl"].iloc[0]
        distances.append({"river text with": name, "kl_to_city": kl})
    table = pd.DataFrame(distances)
    results.table("moved", table, caption="KL(city‖river text), in nats, at the last position.")
    results.answer(answer({"moved": table}))
    rows = []
    for layer in range(lm.n_layers):
        run = hk.forward(
            lm,
            TEXTS["river"],
            hk.patch(hk.Site("resid_post", layer), source, pos=-1),
            logits="last",
        )
        ranks = hk.ranks(run, top=0, watch=WATCH).set_index("token")["rank"].to_dict()
        left = hk.stats.shift_summary(runs["city"], run)["kl"][0]
        rows.append(
            {
                "layer": layer,
                "kl_to_city": left,
                **{repr(token): ranks[token] for token in WATCH},
            }
        )
    results.text("# From which layer on is the last position's h already turned?")
    caption = (
        "The last position's residual stream after a layer, from the city text: KL(city‖patched), "
        "and ranks."
    )
    return results.table("layers", pd.DataFrame(rows), caption=caption)


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    kl = tables["moved"].set_index("river text with")["kl_to_city"]
    return (
        "By the last hidden state h, which is all that the context changes. With h of the city "
        "text put into the river text, and the weights as they are, the prediction after the river "
        f"text is that after the city text: they are {kl['h of the city text']:.1e} nats apart "
        f"(KL). With its own h they are {kl['its own h']:.2f} nats apart."
    )


def drawn(table: Any) -> Figure:
    """Draws the rank of each watched token after each word, a panel for each text."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    low = float(table["rank"].max()) * 1.3
    for axes, name in zip(figure.subplots(1, 2, sharey=True), TEXTS, strict=True):
        mine = table[table["text"] == name]
        for number, token in enumerate(WATCH):
            part = mine[mine["token"] == token]
            style: dict[str, Any] = {"color": LINES[number % len(LINES)], "ms": 4}
            style |= {"marker": "os^Dv*"[number], "ls": DASHES[number // len(LINES)]}
            axes.plot(part["pos"], part["rank"], label=repr(token), lw=1.4, **style)
        rank_axis(axes, low)
        reads = mine.drop_duplicates("pos")
        words = [drawable(repr(word)) for word in reads["read"]]
        axes.set_xticks(reads["pos"], words, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_title(TEXTS[name], fontsize=9, color=INK)
        axes.set_xlabel("after reading")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, labelcolor=INK, loc="outside right center")
    figure.axes[1].set_ylabel("")
    return apply_style(figure, "The rank of six tokens as the next token, word by word")


if __name__ == "__main__":
    main()
