# %% [markdown]
"""# What can one see and change in a language model, in five steps?

From a list of next tokens to the heads that make it: the founding example, the logit lens, a logit
as a sum, patching, and steering. Every step ends in a table; it is answered if each says what the
sentence before it claims.

Open this file in VS Code or Jupyter as a notebook (its cells begin with `# %%`), or run `python -m
experiments.tour`.
"""

# %%
import hookkit as hk

lm = hk.load(device="cpu")
print(lm)

# %% [markdown]
"""## 1. What comes next, and what does it take to change that?

After "I like oat milk in my" the model says " coffee", as expected; after "The capital of France
is" it is nowhere, at rank 8,827 of 49,152. `hk.force` raises its logit above all others; every
other token keeps its own.
"""

# %%
MILK, PARIS = "I like oat milk in my", "The capital of France is"
before = hk.forward(lm, [MILK, PARIS])
print(
    hk.ranks(before, top=3, watch=" coffee")[["row", "token", "prob", "rank"]]
    .round(3)
    .to_string(index=False)
)

forced = hk.forward(lm, [MILK, PARIS], hk.force(" coffee"))
shift = hk.rank_shift(before, forced, rows=1, top=3)
columns = ["token", "logit_before", "logit_after", "rank_before", "rank_after", "why"]
print(shift[columns].round(2).to_string(index=False))

# %% [markdown]
"""## 2. When does it come to say so?

The logit lens puts the stream behind each block through the model's own end. " Paris" is not among
the likely tokens until the last blocks: `since` is the block from which on it leads.
"""

# %%
TOWER = "The Eiffel Tower is located in the city of"
lens = hk.logit_lens(lm, TOWER, watch=" Paris")
said = hk.stats.lens_summary(lens).query("token == ' Paris'")[["first", "since", "last_prob"]]
print(said.round(2).to_string(index=False))

# %% [markdown]
"""## 3. Who says it?

The logit is one row of the head times one hidden state, and that is a sum over all blocks. So the
difference between two tokens is a sum too, and it can be read which attention layer or MLP spoke
for the one and which for the other.
"""

# %%
NAMES = "When Mary and John went to the store, John gave a drink to"
run = hk.forward(lm, NAMES, hk.capture("pattern.23"))
parts = hk.direct_logits(run, " Mary", against=" John")
print(f"{len(parts)} parts, together {parts['logit'].sum():.3f}")
print(parts.nlargest(3, "logit")[["component", "logit"]].round(2).to_string(index=False))

# %% [markdown]
"""## 4. Where is it kept?

Take a prompt in which Mary gives and John gets. Put into its run, one place at a time, what the
clean run had there: where the answer comes back (effect 1), the place carries who is given the
drink. At first that is the second name, in the end the last token.
"""

# %%
SWAPPED = "When Mary and John went to the store, Mary gave a drink to"
metric = hk.metrics.logit_diff(" Mary", " John")
table = hk.patching(lm, NAMES, SWAPPED, "resid_pre", metric, layers=[0, 10, 20, 29], progress=False)
best = table.loc[
    table.groupby("layer")["logit_diff_effect"].idxmax(), ["layer", "pos", "logit_diff_effect"]
]
tokens = [lm.string(token) for token in run.tokens[0].tolist()]
print(best.assign(token=[repr(tokens[pos]) for pos in best["pos"]]).round(2).to_string(index=False))
hk.figures.heat_map(table, labels=tokens, title="What each place carries")

# %% [markdown]
"""## 5. Can it be pushed?

The difference of means over happy and unhappy sentences is a direction. Added to the stream with
three tenths of its length, it turns the text that follows; taken away, it turns it the other way.
"""

# %%
happy, unhappy = ["I love it", "It is wonderful"], ["I hate it", "It is terrible"]
mood = hk.mean_difference(lm, happy, unhappy, "resid_post.16")[0]
texts = {
    dose: hk.generate(
        lm, "I think that the film was", mood.steer(dose=dose), max_new_tokens=6, do_sample=False
    ).generated
    for dose in (0.3, -0.3)
}
print(mood, texts, sep="\n")

# %% [markdown]
"""## And on

In a notebook, `lm`, `run` and `mood` alone on a line show what they are; `run["` and `lm.sites.`
are completed by the tab key; `hk.figures.attention_view(run, 23)` draws the pattern that was
captured above, where circuitsvis is installed.
"""

# %%
run  # noqa: B018  # pyright: ignore[reportUnusedExpression]
