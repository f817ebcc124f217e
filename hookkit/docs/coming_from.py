"""Coming from TransformerLens, nnsight, pyvene or baukit: their idioms, and those of hookkit.

hookkit runs the unchanged Hugging Face model: no weights are folded and no modules are replaced.
All numbers are therefore those of transformers. The numbers of TransformerLens differ where it
folds the norm into the weights (`from_pretrained` does this; `from_pretrained_no_processing` does
not).

# Capture the residual stream

| tool | idiom |
|---|---|
| TransformerLens | `logits, cache = model.run_with_cache(prompt)` and `cache["resid_post", 6]` |
| nnsight | `with model.trace(prompt): h = model.model.layers[6].output[0].save()` |
| pyvene | `pv.CollectIntervention()` at the component `"model.layers[6].output"` |
| baukit | `with Trace(model, "model.layers.6") as trace: model(**inputs)` and `trace.output` |

>>> run = hk.forward(lm, prompt, hk.capture("resid_post.6"))
>>> run["resid_post.6"].shape
torch.Size([1, 6, 576])

# Edit it with a function

| tool | idiom |
|---|---|
| TransformerLens | `model.run_with_hooks(tokens, fwd_hooks=[("blocks.6.hook_resid_post", fn)])` |
| nnsight | `with model.trace(prompt): model.model.layers[6].output[0][:] *= 0.5` |
| pyvene | your own `Intervention` class in the configuration |
| baukit | `with Trace(model, "model.layers.6", edit_output=function): model(**inputs)` |

>>> half = hk.forward(lm, prompt, hk.edit("resid_post.6", lambda values: values * 0.5))

The function returns a new tensor of the same shape. A function that returns None raises an error.

# Ablate a head

| tool | idiom |
|---|---|
| TransformerLens | a hook on `blocks.9.attn.hook_z` that sets `value[:, :, 3] = 0` |
| nnsight | `model.model.layers[9].self_attn.o_proj.input[..., 192:256] = 0` (columns of head 3) |
| baukit | the same slice in `edit_input` of `o_proj` |

>>> without = hk.forward(lm, prompt, hk.ablate("z.9.3"))

# Patch from another prompt

| tool | idiom |
|---|---|
| TransformerLens | `patching.get_act_patch_resid_pre(model, corrupted, clean_cache, metric)` |
| nnsight | two invokes in one trace, in a loop over layers and positions |
| pyvene | `pv.VanillaIntervention` and `model(base, [source], {"sources->base": …})`, in a loop |

>>> metric = hk.metrics.logit_diff(" Mary", " John")
>>> table = hk.patching(lm, clean, corrupted, "resid_pre", metric, layers=[0, 16], progress=False)
>>> len(table), "logit_diff_effect" in table
(28, True)

# Edit while the model generates

| tool | idiom |
|---|---|
| TransformerLens | `with model.hooks(fwd_hooks=[…]): model.generate(…)` |
| nnsight | `with model.generate(prompt, max_new_tokens=3) as tracer:` and `with tracer.iter[:]:` |
| baukit | `with Trace(…, edit_output=function): model.generate(…)` |
| transformers | your own `LogitsProcessor` |

>>> hk.generate(lm, prompt, hk.ban(" coffee"), max_new_tokens=2, do_sample=False).generated
[' morning smoothie']

# Register hooks around your own code

| tool | idiom |
|---|---|
| TransformerLens | `with model.hooks(fwd_hooks=[…]):` |
| nnsight | write the code inside the trace |
| baukit | `with TraceDict(model, ["model.layers.6", …]) as traces:` |

>>> with hk.attach(lm, hk.capture("resid_post.6")) as manager:
...     logits = lm.model(**inputs).logits

# Logit lens and direct logit attribution

| tool | idiom |
|---|---|
| TransformerLens | `cache.accumulated_resid(…)` and `cache.logit_attrs(…)` |
| nnsight | `model.lm_head(model.model.norm(model.model.layers[6].output[0]))` in the trace |

>>> lens = hk.logit_lens(lm, prompt, top=1)
>>> parts = hk.direct_logits(hk.forward(lm, prompt), " coffee")

# Names of sites

| hookkit | TransformerLens | in a Llama-type model of transformers |
|---|---|---|
| `embed` | `hook_embed` | output of `model.embed_tokens` |
| `resid_pre.6` | `blocks.6.hook_resid_pre` | input of `model.layers.6` |
| `resid_mid.6` | `blocks.6.hook_resid_mid` | input of `model.layers.6.post_attention_layernorm` |
| `resid_post.6` | `blocks.6.hook_resid_post` | output of `model.layers.6` |
| `attn_out.6` | `blocks.6.hook_attn_out` | what attention adds to the residual stream |
| `mlp_out.6` | `blocks.6.hook_mlp_out` | what the MLP adds to the residual stream |
| `q.6`, `k.6`, `v.6` | `blocks.6.attn.hook_q` … | outputs of `q_proj` …, by heads, before rotary |
| `scores.6` | `blocks.6.attn.hook_attn_scores` | attention scores, before the softmax |
| `pattern.6` | `blocks.6.attn.hook_pattern` | attention weights, after the softmax |
| `z.6` | `blocks.6.attn.hook_z` | input of `o_proj`, by heads |
| `mlp_pre.6` | `blocks.6.mlp.hook_pre` | output of `gate_proj`, before the activation function |
| `mlp_post.6` | `blocks.6.mlp.hook_post` | input of `down_proj` |
| `final_norm` | `ln_final.hook_normalized`, folded | output of `model.norm` |
| `logits` | what the model returns | what the model returns, after the soft-cap |
"""
