"""Causes: which part of the model does it?

# Take it out

>>> before, after = hk.forward(lm, clean), hk.forward(lm, clean, hk.ablate("z.23.3"))
>>> metric = hk.logit_diff(" Mary", " John")
>>> round(metric(before).item(), 1), round(metric(after).item(), 1)
(6.1, 3.1)

Zero is far from what a head ever gives; `to="mean", over=texts` puts in what it gives on average, and `to="resample"`
what it gave on another prompt.

# Put in what it was elsewhere

Two prompts that differ in one word, and one value of the one put into the other: what comes back, that value carried.

>>> source = hk.forward(lm, clean, hk.capture("resid_post.15"))
>>> patched = hk.forward(lm, corrupted, hk.patch("resid_post.15", source, pos=9))  # the second name
>>> round(metric(hk.forward(lm, corrupted)).item(), 1), round(metric(patched).item(), 1)
(-5.5, 6.3)

# All of them

A sweep does this for each place, at a fraction of the cost; the plan says which, and why.

>>> table = hk.patching(lm, clean, corrupted, "z", metric, layers=[20, 23], progress=False)
>>> table.nlargest(1, "logit_diff_effect")[["layer", "head"]].values.tolist()
[[23, 3]]

Means over prompts come with intervals (`hk.over_prompts`), and with a control in the same call
(`control="random"`), drawn ten times: one draw of a random edit says little. Of hundreds of cells the largest is
too large by chance: `hk.strongest` chooses cells on one half of the prompts and measures them on the other.

# An estimate for all places at once

Attribution takes one backward for all places. It is a slope: look at `hk.agreement` before you trust it.

>>> guess = hk.attribution(lm, clean, corrupted, "z", metric, layers=[20, 23])
>>> guess.nlargest(1, "logit_diff_delta")[["layer", "head"]].values.tolist()
[[23, 3]]
"""
