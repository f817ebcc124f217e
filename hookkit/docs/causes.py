"""Causes: which part of the model is responsible for an output?

# Ablate it

>>> before, after = hk.forward(lm, clean), hk.forward(lm, clean, hk.ablate("z.23.3"))
>>> metric = hk.metrics.logit_diff(" Mary", " John")
>>> round(metric(before).item(), 1), round(metric(after).item(), 1)
(6.1, 3.1)

`hk.ablate` writes zeros by default. Zero is far from any usual output of a head, and so an unusual
input for the layers that follow. `to="mean", over=texts` writes the mean of the site over texts,
and `to="resample"` writes its value on another prompt.

# Patch it from another prompt

The two prompts differ in one word. A value captured on the clean prompt is written into the run on
the corrupted prompt. If this restores the clean answer, then that value carried the information.

>>> source = hk.forward(lm, clean, hk.capture("resid_post.15"))
>>> patch = hk.patch("resid_post.15", source, pos=9)  # the second name
>>> patched = hk.forward(lm, corrupted, patch)
>>> round(metric(hk.forward(lm, corrupted)).item(), 1), round(metric(patched).item(), 1)
(-5.5, 6.3)

# Patch every site: a sweep

A sweep repeats this for every site, at a fraction of the cost of a loop. `hk.sweep_plan` returns
how the sweep will run, and why.

>>> table = hk.patching(lm, clean, corrupted, "z", metric, layers=[20, 23], progress=False)
>>> table.nlargest(1, "logit_diff_effect")[["layer", "head"]].values.tolist()
[[23, 3]]

`hk.stats.mean_over_prompts` returns means over prompts with intervals. `control="random"` adds a
control in the same call. It is drawn ten times, because a single random edit is weak evidence. The
largest of hundreds of cells is too large by chance: `hk.stats.strongest` selects cells on one half
of the prompts and measures them on the other half.

# Estimate every site at once: attribution

Attribution estimates the effect of every site from one backward pass. The estimate is linear:
check it with `hk.stats.compare_attributions` before you rely on it.

>>> estimate = hk.attribution(lm, clean, corrupted, "z", metric, layers=[20, 23])
>>> estimate.nlargest(1, "logit_diff_delta")[["layer", "head"]].values.tolist()
[[23, 3]]
"""
