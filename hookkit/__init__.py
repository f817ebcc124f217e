"""hookkit: see and change what a language model computes, at any layer and at any token.

    import hookkit as hk

    lm = hk.load()                    # or hk.LM(model, tokenizer), hk.load("gpt2")
    run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
    hk.ranks(run, watch=" coffee")    # a DataFrame

    baseline = hk.forward(lm, "The capital of France is")
    forced = hk.forward(lm, "The capital of France is", hk.force(" coffee"))
    hk.rank_shift(baseline, forced)   # how the rank of each token changed

Names are imported when they are first used, which keeps `import hookkit` fast. `__init__.pyi` lists
all of them.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
