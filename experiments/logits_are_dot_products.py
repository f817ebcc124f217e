"""Where does a logit come from?

From `W @ h + b`: one row of weights, one hidden state, and everything that wrote it. The logit of "
coffee" after "I like oat milk in my" is taken apart three times: by the numbers of the hidden
state, by the components that wrote it, and by heads. It is answered if each sum gives the logit. A
researcher then asks of many prompts which components write the answer's lead over a rival, and
tests the claim by ablating them: a direct share is what a component would take away if nothing
behind it had read it.

python -m experiments.logits_are_dot_products
    a minute on two cores; writes results/logits_are_dot_products/
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

import hookkit as hk

SEED, COUNT, TESTED = 0, 50, 8  # pairs; how many of them are run again without each head
PROMPT, OTHER, TOKEN, RIVAL = "I like oat milk in my", "I walk the dog in my", " coffee", " tea"
QUESTION = "Where does a logit come from?"


def main() -> None:
    lm = hk.load(device="cpu")
    title = "Logits are dot products"
    with hk.record(
        "results/logits_are_dot_products", title=title, question=QUESTION, lm=lm, seed=SEED
    ) as results:
        results.table(
            "path",
            hk.logit_path(lm, PROMPT),
            caption="From the text to the next token, stage by stage.",
        )
        by_number(lm, results)
        by_component(lm, results)
        over_many_prompts(lm, results)
    print("The page: results/logits_are_dot_products/report.html")


def by_number(lm: hk.LM, results: hk.types.Record) -> None:
    results.text("# W @ h + b")
    run = results.run(
        "two contexts", hk.forward(lm, [PROMPT, OTHER], hk.capture("final_norm", pos=-1))
    )
    results.table(
        "terms",
        hk.logit_terms(run, TOKEN),
        caption="The largest products of weight and hidden state.",
    )
    weights = hk.unembedding(lm, TOKEN)
    contexts = pd.DataFrame({"prompt": [PROMPT, OTHER], "numbers": len(weights)})
    contexts["sum_of_products"] = (run["final_norm"][:, 0] @ weights).tolist()
    contexts["logit"] = run.logits[:, -1, lm.token(TOKEN)].tolist()
    results.table("contexts", contexts, caption=f"The row of {TOKEN!r} in two contexts.")
    results.answer(answer({"contexts": contexts}))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["contexts"]
    here, other = table.iloc[0], table.iloc[1]
    return (
        f"From one row of weights and one hidden state: after “{PROMPT}” their {here['numbers']} "
        f"products sum to {here['sum_of_products']:.3f}, and the model's logit of {TOKEN!r} is "
        f"{here['logit']:.3f}. After “{OTHER}” the same row of weights meets another hidden state: "
        f"they sum to {other['sum_of_products']:.3f}, and the logit is {other['logit']:.3f}."
    )


def by_component(lm: hk.LM, results: hk.types.Record) -> None:
    results.text("# Who wrote the hidden state")
    run = hk.forward(lm, PROMPT)
    parts = results.table(
        "components",
        hk.direct_logits(run, TOKEN),
        caption="Every component; they sum to the logit.",
    )
    title = f"What each component adds to the logit of {TOKEN!r}"
    figure = hk.figures.logit_bars(parts, title=title)
    results.figure("components_bars", figure, caption=f"{title}.")
    residual = parts.attrs["residual"]
    results.text(f"The sum misses the logit by {residual:.1g}, which is rounding.")
    against = hk.direct_logits(run, TOKEN, against=RIVAL, heads=True)
    title = f"What each head and MLP adds to {TOKEN!r} over {RIVAL!r}"
    results.table("heads", against, caption=f"{title}.")
    results.figure("heads_bars", hk.figures.logit_bars(against, title=title), caption=f"{title}.")


def over_many_prompts(lm: hk.LM, results: hk.types.Record) -> None:
    results.text("# Many prompts, and the test")
    pairs = hk.datasets.indirect_object(lm, COUNT, seed=SEED)
    run = hk.forward(lm, list(pairs.clean), logits="last")
    parts = hk.direct_logits(run, list(pairs.answers), against=list(pairs.wrong), heads=True)
    heads: Any = parts[parts["kind"] == "head"][["row", "layer", "head", "logit"]]
    means = results.table(
        "many",
        hk.stats.mean_over_prompts(heads, by=["layer", "head"], values=["logit"]),
        caption=f"{len(pairs)} pairs, 95 %.",
    )
    title = "What each head adds to the answer's lead over the other name (logits)"
    figure = hk.figures.heat_map(heads, value="logit", x="head", title=title)
    results.figure("many_map", figure, caption=f"{title}.")
    few = pairs[:TESTED]
    metric = hk.metrics.logit_diff(list(few.answers), list(few.wrong))
    removed = hk.ablations(lm, list(few.clean), "z", metric, progress=False)
    effect: Any = hk.stats.mean_over_prompts(removed, by=["layer", "head"])
    both: Any = means.merge(effect, on=["layer", "head"])
    both["taken"] = -both["logit_diff_delta"]
    results.table(
        "tested", both[["layer", "head", "logit", "taken"]], caption="Share; what zeroing takes."
    )
    top = both.nlargest(5, "logit")
    each = zip(top["layer"], top["head"], top["logit"], top["taken"], strict=True)
    named = ", ".join(
        f"{layer}.{head} ({share:+.2f}, {taken:+.2f})" for layer, head, share, taken in each
    )
    results.text(
        f"The heads that add most (direct share, and what zeroing them takes away): {named}. Over "
        f"all {len(both)} heads the two go together with r = "
        f"{both['logit'].corr(both['taken']):.2f}: where they part, other components read the "
        "head, or make up for it."
    )


if __name__ == "__main__":
    main()
