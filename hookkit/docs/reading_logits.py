"""Logits: what a logit is made of, how certain the model is, and what it predicted.

# A logit is a sum

A logit is `W @ h + b`: the dot product of the token's row of the unembedding with the last hidden
state. `hk.logit_terms` returns the products. `hk.direct_logits` returns the contribution of each
component of the model. Both sums equal the logit.

>>> run = hk.forward(lm, "The Eiffel Tower is located in the city of", hk.capture("final_norm"))
>>> terms = hk.logit_terms(run, " Paris", top=2)
>>> bool(abs(terms["product"].iloc[-1] - run.logits[0, -1, lm.token(" Paris")]) < 1e-4)
True
>>> parts = hk.direct_logits(run, " Paris")
>>> bool(parts[parts["kind"] == "residual"]["logit"].abs().max() < 1e-4)
True

# Layer by layer

The logit lens applies the model's final norm and unembedding to the residual stream of each layer.

>>> prompt = "The Eiffel Tower is located in the city of"
>>> lens = hk.logit_lens(lm, prompt, top=1, watch=" Paris")
>>> hk.stats.lens_summary(lens).set_index("token")["first"].loc[" Paris"]
'resid_post.27'

# How certain the model is

>>> hk.uncertainty(run)[["entropy", "top1_prob"]].tail(1).round(2).values.tolist()
[[1.81, 0.7]]

# What the model predicted

Surprisal is the loss of a single token. Its mean over a text is the loss of the text, and the
exponential of the mean is the perplexity.

>>> losses = hk.surprisal(hk.forward(lm, "I like oat milk in my coffee"))
>>> hk.show(losses.tail(1), columns=["token", "rank"])
token      rank
' coffee'     1
"""
