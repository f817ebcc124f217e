"""hookkit, page by page. Every example on these pages runs in the tests, on the default model.

first_steps    load a model, look, change, compare
places         sites, positions, steps, rows: how to say where
logits         where a logit comes from, how sure the model is, what it expected
causes         which part does it: ablation, patching, sweeps, attribution
coming_from    TransformerLens, nnsight, pyvene, baukit: their idioms, and hookkit's
symptoms       "my edit did nothing", "the batch differs", "out of memory": what is the matter
"""
