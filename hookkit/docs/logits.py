"""Logits: where one comes from, how sure the model is, what it expected.

# A logit is a sum

`W @ h + b`: the token's row of the unembedding times the last hidden state. The products are there to be looked at,
and so are the parts of the model that wrote them; both sums give the logit.

>>> run = hk.forward(lm, "The Eiffel Tower is located in the city of", hk.capture("final_norm"))
>>> terms = hk.logit_terms(run, " Paris", top=2)
>>> bool(abs(terms["product"].iloc[-1] - run.logits[0, -1, lm.token(" Paris")]) < 1e-4)
True
>>> parts = hk.direct_logits(run, " Paris")
>>> bool(parts[parts["kind"] == "residual"]["logit"].abs().max() < 1e-4)
True

# Layer by layer

The logit lens reads each layer's residual stream through the model's own final norm and head.

>>> lens = hk.logit_lens(lm, "The Eiffel Tower is located in the city of", top=1, watch=" Paris")
>>> hk.lens_summary(lens).set_index("token")["first"].loc["' Paris'"]
'resid_post.27'

# How sure

>>> hk.uncertainty(run)[["entropy", "top1_prob"]].tail(1).round(2).values.tolist()
[[1.81, 0.7]]

# What it expected

Surprisal is the loss token by token; its mean is the loss of the text, and the exponential of that the perplexity.

>>> hk.surprisal(hk.forward(lm, "I like oat milk in my coffee"))[["token", "rank"]].tail(1)
        token  rank
5  ' coffee'     1
"""
