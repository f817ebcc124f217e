"""Sites, positions, steps and rows: how to select what a hook acts on.

# Sites

A site is a named activation of the model. It means the same in every model family: `resid_post.6`
is the residual stream after block 6, and `z.9.3` is the output of head 3 of layer 9, before the
output projection. Layers and heads count from 0.

>>> lm.sites("z", layers=[9, 10], heads=[3])
2 sites: z.9.3, z.10.3

`lm.describe()` returns the table of all sites. Where a family lacks a site, the table gives the
reason, and so does the error. Any module can be selected by its path:
`hk.module("model.layers.3.mlp.gate_proj")`.

# Positions

A position is the index of a token in its prompt's own text, without padding. Position -1 is the
prompt's last token, also while the model generates.

>>> last = hk.capture("resid_post.6", pos=-1)
>>> run = hk.forward(lm, ["Tea with milk", "I like oat milk in my"], last)
>>> run["resid_post.6"].shape
torch.Size([2, 1, 576])

`pos` can be an integer, a slice, a list, `hk.PROMPT`, `hk.GENERATED`, or the tokens of a phrase:

>>> phrase = hk.capture("resid_post.6", pos=hk.at("oat milk"))
>>> hk.forward(lm, "I like oat milk in my", phrase)["resid_post.6"].shape
torch.Size([1, 2, 576])

# Steps and rows

A step is the index of a generated token, and counts from 0. Only hooks on the logits have one. A
row is the index of a prompt in the batch.

>>> prompts = ["I like oat milk in my", "She drinks"]
>>> edits = [hk.force(" tea", step=1), hk.ban(" coffee", rows=0)]
>>> run = hk.generate(lm, prompts, *edits, max_new_tokens=2, do_sample=False)
>>> run.generated
[' morning tea', ', tea']

# Heads that share keys and values

With grouped-query attention, `k` and `v` have fewer heads than `q` and `z`. The captured tensors
have the number of heads that the model computes.

>>> run = hk.forward(lm, "Tea", hk.capture("q.0"), hk.capture("k.0"))
>>> run["q.0"].shape, run["k.0"].shape
(torch.Size([1, 2, 9, 64]), torch.Size([1, 2, 3, 64]))
"""
