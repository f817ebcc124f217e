r"""Symptoms: what one sees, what is the matter, and what to do.

# "My edit did nothing"

hookkit raises where it can know: an unknown site, a hook that never fired, an edit that gave nothing back. What is
left:

- **The edit is elsewhere than you think.** Logit edits act at the prompt's last position and on each generated token;
  edits inside act at all positions. Say `pos=`. `run.log` says which hook acted where.
- **It moved what you do not look at.** Look at logits, not at the first token: an edit can move a logit by 5 and leave
  the ranking as it was. `hk.rank_shift(before, after, watch=[" coffee"])` has a row for the token wherever it is.
- **The model makes up for it.** Later heads do what the head did that you took out: `hk.direct_logits` before and after
  shows which. A direct effect (`hk.path_patching`) holds them still.
- **It was a capture before the edit.** Hooks at one site act in the order given: a capture after the edit sees it.

>>> looks = [hk.capture("z.9.3", name=name) for name in ("before", "after")]
>>> run = hk.forward(lm, prompt, looks[0], hk.ablate("z.9.3"), looks[1])
>>> bool(run["z.9.3", "before"].any()), bool(run["z.9.3", "after"].any())
(True, False)

# "The token is not found", or is three tokens

Most words begin with a space: `" coffee"`, not `"coffee"`. The error shows the pieces and the nearest spellings; for
several tokens in a row there is `hk.phrase`.

>>> hk.forward(lm, prompt, hk.force("coffee"))
Traceback (most recent call last):
hookkit.errors.NotOneToken: 'coffee' is 3 tokens here ...

# "The batch differs from the single run"

By rounding, yes: another shape is computed in another order, and logits differ by about 1e-5. By more, never by
padding: positions are counted in each row's own text, on whichever side it is padded. If it is more, look for dropout
(`lm.model.train()`; hookkit warns), for half precision, where rounding is a hundred times coarser, and for your own
edit function, which is given the padded batch: `hk.Here` tells it what each row is.

>>> alone = hk.ranks(hk.forward(lm, "Tea with milk"), top=5)
>>> batch = hk.ranks(hk.forward(lm, ["Tea with milk", "I like oat milk in my coffee"]), top=5).query("row == 0")
>>> bool((alone["logit"] - batch["logit"]).abs().max() < 1e-4)
True

# "The run differs from the one before"

Greedy text is the same each time; draws need `seed=`. Between machines and versions the last digits differ, and where
two tokens are almost as likely, so does the text. `about.json` in a result's folder has what to compare: versions,
the hash of the weights, dtype, attention.

# "Out of memory"

- Logits are most of it: 8 x 1,024 tokens of a vocabulary of 128,000 are 4 GB. Say `logits="last"` or `logits=False`.
- Captures keep what they are told to: `pos=-1` keeps a token in place of all.
- Sweeps and lenses work in batches that fit, and halve them where they do not: `hk.plan` says beforehand what it takes.
- A corpus does not fit in memory at all: `hk.harvest` writes it as it goes.
- A model that does not fit: `hk.load(name, device_map="auto")`, or in parts under torchrun, `tp_plan="auto"`.

>>> hk.forward(lm, prompt, hk.capture("resid_post.5", pos=-1), logits=False)["resid_post.5"].shape
torch.Size([1, 1, 576])

# "It is slow"

Nothing attached costs nothing. `pattern` and `scores` make their layers compute attention in the open: name the
layers that you look at. `logits=False` ends the forward behind the last block that is looked at. A loop of forwards
over a grid is what `hk.sweep` is for.

# "The site is missing"

The error says why, for this family. `lm.describe()` lists all sites, and `hookkit doctor MODEL` proves on the model
itself that each means what it says.

# "NaN"

float16 ends at 65,504, and some models' streams are longer: use bfloat16 or float32. An edit that makes an infinite
number or NaN of a finite one raises `BadEdit`, so NaN in a table is the model's own: no token has a rank, a probability
or an entropy there, and none is named as the most likely one.
"""
