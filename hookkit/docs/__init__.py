"""The documentation of hookkit. The tests run every example on these pages, on the default model.

first_steps    load a model, look at its activations, change them, compare two runs
places         sites, positions, steps and rows: how to select what a hook acts on
reading_logits what a logit is made of, how certain the model is, what it predicted
causes         which component is responsible: ablation, patching, sweeps, attribution
coming_from    idioms of TransformerLens, nnsight, pyvene and baukit, and those of hookkit
symptoms       "my edit did nothing", "the batch differs", "out of memory": causes and remedies
"""
