"""hookkit: see and change what a language model computes, at any place in it, at any token.

    import hookkit as hk

    lm = hk.load()                                              # or hk.LM(model, tokenizer), hk.load("gpt2")
    run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
    hk.ranks(run, watch=" coffee")                              # a DataFrame

    baseline = hk.forward(lm, "The capital of France is")
    forced = hk.forward(lm, "The capital of France is", hk.force(" coffee"))
    hk.rank_shift(baseline, forced)                             # how every token moved, and why it is shown

Names are loaded when they are first used, so that the import is light. The catalogue is in `__init__.pyi`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
