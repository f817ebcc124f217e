"""Places: sites, positions, steps and rows, or how to say where.

# Sites

A site is a named place in the model, and means the same in every family: `resid_post.6` is the residual stream that
leaves block 6, and `z.9.3` what head 3 of block 9 gives before the output projection. Layers and heads count from 0.

>>> lm.sites("z", layers=[9, 10], heads=[3])
2 sites: z.9.3, z.10.3

`lm.describe()` is the table of all. Where a family has no such place, it says why, and so does the error. Any module
can be named by its path: `hk.module("model.layers.3.mlp.gate_proj")`.

# Positions

A position is counted in the prompt's own text, without padding; -1 is its last token, also while the model generates.

>>> run = hk.forward(lm, ["Tea with milk", "I like oat milk in my"], hk.capture("resid_post.6", pos=-1))
>>> run["resid_post.6"].shape
torch.Size([2, 1, 576])

A position can be a number, a slice, a list, `hk.PROMPT`, `hk.GENERATED`, or a word of the text:

>>> hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6", pos=hk.at("oat milk")))["resid_post.6"].shape
torch.Size([1, 2, 576])

# Steps and rows

A step is a generated token, counted from 0; only hooks on the logits have one. A row is a prompt of the batch.

>>> edits = [hk.force(" tea", step=1), hk.ban(" coffee", rows=0)]
>>> run = hk.generate(lm, ["I like oat milk in my", "She drinks"], *edits, max_new_tokens=2, do_sample=False)
>>> run.generated
[' morning tea', ', tea']

# Heads that share keys

With grouped-query attention `k` and `v` have fewer heads than `q` and `z`; the sites have the shapes that are there.

>>> run = hk.forward(lm, "Tea", hk.capture("q.0"), hk.capture("k.0"))
>>> run["q.0"].shape, run["k.0"].shape
(torch.Size([1, 2, 9, 64]), torch.Size([1, 2, 3, 64]))
"""
