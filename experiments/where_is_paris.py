"""Where does the model keep which city a landmark is in, and when does the last token come to know it?

The subject's tokens are blurred with noise, so that the city is lost; then one clean state at a time is put back
(causal tracing, Meng et al. 2022). It is answered if two places bring the city back: the MLPs early at the subject's
last token, and attention late at the end of the prompt; and if the state of a landmark brings its own city with it.

python -m experiments.where_is_paris        some minutes on two cores; writes results/where_is_paris/
"""

from typing import Any

import hookkit as hk

SEED, SAMPLES, NOISE = 0, 10, 3.0  # draws of noise, in standard deviations of the embeddings
PROMPT, SUBJECT, CITY = "The Eiffel Tower is located in the city of", "Eiffel Tower", " Paris"
COUNT, WINDOW = 30, 5  # pairs of landmarks; blocks that are restored together
QUESTION = "Where does the model keep which city a landmark is in, and when does the last token come to know it?"


def main() -> None:
    lm = hk.load(device="cpu")
    with hk.record("results/where_is_paris", title="Where is Paris", question=QUESTION, lm=lm, seed=SEED) as results:
        traced(lm, results)
        swapped(lm, results)
    print("The page: results/where_is_paris/report.html")


def traced(lm: hk.LM, results: hk.Record) -> None:
    clean = results.run("clean", hk.forward(lm, PROMPT))
    tokens = [repr(lm.string(token)) for token in clean.tokens[0].tolist()]
    results.text("# Blurred, and put back")
    for site, window in (("resid_post", 1), ("mlp_out", WINDOW), ("attn_out", WINDOW)):
        table = hk.causal_tracing(
            lm, PROMPT, SUBJECT, hk.prob(CITY), site=site, window=window, noise=NOISE, samples=SAMPLES, seed=SEED
        )
        means = results.table(site, hk.over_prompts(table), caption=f"{site}: means over {SAMPLES} draws of noise.")
        around = "one block" if window == 1 else f"{window} blocks"
        results.figure(
            f"{site}_map",
            hk.heat_map(table, value="prob_delta", labels=tokens),
            caption=f"How much of p({CITY!r}) {site} of {around} brings back.",
        )
        best = means.loc[means["prob_delta"].idxmax()]
        results.text(
            f"{site}: p({CITY!r}) is {hk.prob(CITY)(clean).item():.3f} clean and {best['prob_before']:.3f} blurred; "
            f"the best place, block {int(best['layer'])} at {tokens[int(best['pos'])]}, makes it {best['prob']:.3f}."
        )


def swapped(lm: hk.LM, results: hk.Record) -> None:
    results.text("# Another landmark's state")
    pairs = hk.datasets.landmarks(lm, COUNT, seed=SEED).solved(lm)
    metric = [pairs.metric(), hk.rank(list(pairs.answers))]
    places = {name: pairs.labels[name] for name in ("subject", "end")}
    table = hk.patching(lm, pairs.clean, pairs.corrupted, ["resid_post", "mlp_out", "attn_out"], metric, pos=places)
    means = results.table(
        "swapped", hk.over_prompts(table), caption=f"{len(pairs)} pairs of landmarks; 95 % intervals."
    )
    results.text(f"{pairs.note}.")
    stream: Any = means[means["site"] == "resid_post"]
    results.figure("stream", hk.interval_lines(stream, series="pos"), caption="1: the other landmark's city has won.")
    by_layer: Any = stream.pivot_table(index="layer", columns="pos", values="logit_diff_effect")
    half = {name: by_layer.index[(by_layer[name] > 0.5)].tolist() for name in places}
    results.answer(
        f"The stream at the subject's last token carries more than half of the answer in "
        f"{_span(half['subject'])}, and at the end in {_span(half['end'])}."
    )


def _span(layers: list[int]) -> str:
    return f"blocks {min(layers)} to {max(layers)}" if layers else "no block"


if __name__ == "__main__":
    main()
