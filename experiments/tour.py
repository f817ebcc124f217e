# %% [markdown]
"""# What can one see and change in a language model, in five steps?

The steps go from the most likely next tokens to the parts of the model that compute them: an edit
of a logit, the logit lens, a logit as a sum, patching, and steering. Each step prints a table or
draws a figure. The answer to the question is yes if each table shows what the text above it says.

`make docs` writes this file as a notebook, `build/docs/tour.ipynb`. VS Code opens it as it is (its
cells begin with `# %%`). `python -m experiments.tour` runs it in a terminal.
"""

# %%
import hookkit as hk

lm = hk.load(device="cpu")
print(lm)

# %% [markdown]
"""## 1. What comes next, and how can it be changed?

After "I like oat milk in my", the most likely token is " coffee". After "The capital of France is",
the same token has rank 8,827 of 49,152. `hk.force` raises its logit above all others, and leaves
the logits of all other tokens as they are.
"""

# %%
MILK, PARIS = "I like oat milk in my", "The capital of France is"
before = hk.forward(lm, [MILK, PARIS])
ranks = hk.ranks(before, top=3, watch=" coffee")
hk.show(ranks, columns=["row", "token", "prob", "rank"])

forced = hk.forward(lm, [MILK, PARIS], hk.force(" coffee"))
shift = hk.rank_shift(before, forced, rows=1, top=3)
columns = ["token", "logit_before", "logit_after", "rank_before", "rank_after"]
hk.show(shift, columns=columns)
hk.figures.rank_bump(shift, title="The token is forced")

# %% [markdown]
"""## 2. In which layer does the answer appear?

The logit lens applies the model's final norm and unembedding to the residual stream after each
block. " Paris" becomes the most likely token in one of the last blocks. The column `since` is the
first block from which on it stays the most likely token.
"""

# %%
TOWER = "The Eiffel Tower is located in the city of"
lens = hk.logit_lens(lm, TOWER, watch=" Paris")
summary = hk.stats.lens_summary(lens)
paris = summary.query('token == " Paris"')
hk.show(paris, columns=["token", "first", "since", "last_prob"])
hk.figures.lens_map(hk.logit_lens(lm, TOWER, pos=slice(None), top=1))

# %% [markdown]
"""## 3. Which parts of the model contribute to it?

A logit is the dot product of a row of the unembedding and the last hidden state. This state is a
sum over all attention layers and MLPs. The difference of two logits is therefore a sum too, and
each part of it is the contribution of one layer.
"""

# %%
NAMES = "When Mary and John went to the store, John gave a drink to"
run = hk.forward(lm, NAMES, hk.capture("pattern.23"))
parts = hk.direct_logits(run, " Mary", against=" John")
print(f"{len(parts)} parts, together {parts['logit'].sum():.3f}")
hk.figures.logit_bars(parts, title="' Mary' against ' John'")

# %% [markdown]
"""## 4. Where is the information that the answer needs?

In a second prompt, Mary gives the drink and John gets it. Patching takes one value of the first
prompt's run and writes it into the run of the second prompt. Where this brings back the first
answer (an effect of 1), the value carries who gets the drink. In the early layers it is at the
second name, and in the last layers at the last token.
"""

# %%
SWAPPED = "When Mary and John went to the store, Mary gave a drink to"
metric = hk.metrics.logit_diff(" Mary", " John")
table = hk.patching(lm, NAMES, SWAPPED, "resid_pre", metric, layers=[0, 10, 20, 29], progress=False)
strongest = table.loc[table.groupby("layer")["logit_diff_effect"].idxmax()]
hk.show(strongest, columns=["layer", "pos", "logit_diff_effect"])
hk.figures.heat_map(table, title="The effect of patching the residual stream")

# %% [markdown]
"""## 5. Can the text be steered?

The difference between the means of happy and unhappy sentences is a direction. It is added to the
residual stream, with 0.3 of the stream's length, and the model continues with a happy text. With
-0.3, it continues with an unhappy one.
"""

# %%
happy, unhappy = ["I love it", "It is wonderful"], ["I hate it", "It is terrible"]
(mood,) = hk.mean_difference(lm, happy, unhappy, "resid_post.16")
texts = {}
for dose in (0.3, -0.3):
    steered = hk.generate(
        lm, "I think that the film was", mood.steer(dose=dose), max_new_tokens=6, do_sample=False
    )
    texts[dose] = steered.generated
print(mood, texts, sep="\n")

# %% [markdown]
"""## What a notebook shows

In a notebook, `lm`, `run` and `mood` alone on a line show what they are. The tab key completes
`run["` and `lm.sites.`. `hk.figures.attention_view(run, 23)` draws the attention pattern that step
3 captured, if circuitsvis is installed.
"""

# %%
run  # noqa: B018  # pyright: ignore[reportUnusedExpression]
