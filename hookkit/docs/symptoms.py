r"""Symptoms: what you see, its cause, and what to do about it.

# "My edit did nothing"

hookkit raises where it can detect this: an unknown site, a hook that never fired, an edit that
returned None. Other causes:

- **The edit acts at other positions than you think.** Edits of logits act at the prompt's last
  position and on each generated token. Edits of other sites act at all positions. Set `pos=`.
  `run.log` lists where each hook acted.
- **The edit changed something else than the first token.** An edit can change a logit by 5 and
  leave the ranking as it was. `hk.rank_shift(before, after, watch=[" coffee"])` always has a row
  for the watched token.
- **The model compensates.** Later heads can take over the function of an ablated head. Compare
  `hk.direct_logits` before and after to see which heads do. `hk.path_patching` measures the direct
  effect, with later components held fixed.
- **The capture comes before the edit.** Hooks at the same site act in the order in which they are
  passed. A capture after the edit returns the edited values.

>>> captures = [hk.capture("z.9.3", name=name) for name in ("before", "after")]
>>> run = hk.forward(lm, prompt, captures[0], hk.ablate("z.9.3"), captures[1])
>>> bool(run["z.9.3", "before"].any()), bool(run["z.9.3", "after"].any())
(True, False)

# "The token is not found", or is three tokens

Most words begin with a space: write `" coffee"`, not `"coffee"`. The error lists the tokens of the
text and the nearest spellings. For several tokens in a row, use `hk.phrase`.

>>> hk.forward(lm, prompt, hk.force("coffee"))
Traceback (most recent call last):
hookkit.errors.NotOneToken: 'coffee' is 3 tokens here ...

# "The batch differs from the single run"

A difference of about 1e-5 in the logits is rounding: tensors of another shape are summed in another
order. Padding is never the cause, because positions are counted in each row's own text, whichever
side is padded. If the difference is larger, check three things: dropout (after `lm.model.train()`;
hookkit warns about it); half precision, in which rounding is a hundred times coarser; and your own
edit function, which receives the padded batch. `hk.types.EditContext` tells the function the rows
and positions of its values.

>>> alone = hk.ranks(hk.forward(lm, "Tea with milk"), top=5)
>>> batch = hk.forward(lm, ["Tea with milk", "I like oat milk in my coffee"])
>>> batched = hk.ranks(batch, top=5).query("row == 0")
>>> bool((alone["logit"] - batched["logit"]).abs().max() < 1e-4)
True

# "The run differs from the one before"

Greedy decoding returns the same text each time; sampling needs `seed=`. The last digits differ
between machines and versions, and where two tokens are almost equally likely, the text differs too.
Compare `about.json` in the folders of the two results: it has the versions, the hash of the
weights, the dtype and the attention implementation.

# "Out of memory"

- Logits take most of it: 8 x 1,024 tokens of a vocabulary of 128,000 are 4 GB. Pass
  `logits="last"` or `logits=False`.
- Captures hold every position by default. `pos=-1` holds one token per prompt.
- Sweeps and lenses run in batches that fit, and halve a batch that does not. `hk.sweep_plan`
  returns the cost of a sweep before it runs.
- The activations of a corpus do not fit in memory: `hk.harvest` writes them to disk in shards.
- If the model does not fit, use `hk.load(name, device_map="auto")`, or `tp_plan="auto"` under
  torchrun for tensor parallelism.

>>> capture = hk.capture("resid_post.5", pos=-1)
>>> hk.forward(lm, prompt, capture, logits=False)["resid_post.5"].shape
torch.Size([1, 1, 576])

# "It is slow"

A model without hooks runs at its usual speed. Hooks at `pattern` and `scores` make their layers
compute attention step by step instead of fused: select only the layers that you need.
`logits=False` ends the forward pass after the last block that has a hook. Instead of a loop of
forward passes over a grid, use `hk.sweep`.

# "The site is missing"

The error gives the reason for this model family. `lm.describe()` lists all sites, and
`hookkit doctor MODEL` checks on the model itself that each site is what its name says.

# "NaN"

float16 ends at 65,504, and the residual streams of some models exceed it: use bfloat16 or float32.
An edit that turns a finite number into an infinite one or NaN raises `BadEdit`, so NaN in a table
comes from the model itself. At such a position no token has a rank or a probability, there is no
entropy, and no token is named as the most likely one.
"""
