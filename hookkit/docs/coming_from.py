"""Coming from TransformerLens, nnsight, pyvene or baukit: their idioms, and hookkit's.

In hookkit the model stays the Hugging Face one: no weights are folded, no modules replaced. So numbers are those of
transformers, and TransformerLens' are another's where it folds the norm into the weights (`from_pretrained` does; its
`from_pretrained_no_processing` does not).

# Look at the residual stream

| tool | idiom |
|---|---|
| TransformerLens | `logits, cache = model.run_with_cache(prompt)` and `cache["resid_post", 6]` |
| nnsight | `with model.trace(prompt): h = model.model.layers[6].output[0].save()` |
| pyvene | `pv.IntervenableModel({"component": "model.layers[6].output", "intervention": pv.CollectIntervention()})` |
| baukit | `with Trace(model, "model.layers.6") as found: model(**inputs)` and `found.output` |

>>> run = hk.forward(lm, prompt, hk.capture("resid_post.6"))
>>> run["resid_post.6"].shape
torch.Size([1, 6, 576])

# Change it with a function

| tool | idiom |
|---|---|
| TransformerLens | `model.run_with_hooks(tokens, fwd_hooks=[("blocks.6.hook_resid_post", function)])` |
| nnsight | `with model.trace(prompt): model.model.layers[6].output[0][:] *= 0.5` |
| pyvene | an `Intervention` of your own in the configuration |
| baukit | `with Trace(model, "model.layers.6", edit_output=function): model(**inputs)` |

>>> half = hk.forward(lm, prompt, hk.edit("resid_post.6", lambda values: values * 0.5))

The function gives back a new tensor of the same shape; one that gives nothing back raises.

# Take out a head

| tool | idiom |
|---|---|
| TransformerLens | a hook on `blocks.9.attn.hook_z` that sets `value[:, :, 3] = 0` |
| nnsight | `model.model.layers[9].self_attn.o_proj.input[..., 192:256] = 0`, the head's place worked out by hand |
| baukit | the same slice in `edit_input` of `o_proj` |

>>> without = hk.forward(lm, prompt, hk.ablate("z.9.3"))

# Patch from another prompt

| tool | idiom |
|---|---|
| TransformerLens | `patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)` |
| nnsight | two invokes in one trace, the one's value assigned to the other, in a loop over layers and positions |
| pyvene | `pv.VanillaIntervention`, `model(base, [source], {"sources->base": ([[[4]]], [[[4]]])})`, in a loop |

>>> metric = hk.logit_diff(" Mary", " John")
>>> table = hk.patching(lm, clean, corrupted, "resid_pre", metric, layers=[0, 16], progress=False)
>>> len(table), "logit_diff_effect" in table
(28, True)

# While it generates

| tool | idiom |
|---|---|
| TransformerLens | `with model.hooks(fwd_hooks=[…]): model.generate(…)` |
| nnsight | `with model.generate(prompt, max_new_tokens=3) as tracer:` and `with tracer.iter[:]:` |
| baukit | `with Trace(…, edit_output=function): model.generate(…)` |
| transformers | a `LogitsProcessor` of your own |

>>> hk.generate(lm, prompt, hk.ban(" coffee"), max_new_tokens=2, do_sample=False).generated
[' morning smoothie']

# Around code of your own

| tool | idiom |
|---|---|
| TransformerLens | `with model.hooks(fwd_hooks=[…]):` |
| nnsight | the code goes into the trace |
| baukit | `with TraceDict(model, ["model.layers.6", …]) as found:` |

>>> with hk.attach(lm, hk.capture("resid_post.6")) as manager:
...     logits = lm.model(**inputs).logits

# Logit lens, direct logit attribution

| tool | idiom |
|---|---|
| TransformerLens | `cache.accumulated_resid(…)` and `cache.logit_attrs(…)` |
| nnsight | `model.lm_head(model.model.norm(model.model.layers[6].output[0]))` in the trace |

>>> lens = hk.logit_lens(lm, prompt, top=1)
>>> parts = hk.direct_logits(hk.forward(lm, prompt), " coffee")

# Names of places

| hookkit | TransformerLens | in a Llama-type model of transformers |
|---|---|---|
| `embed` | `hook_embed` | output of `model.embed_tokens` |
| `resid_pre.6` | `blocks.6.hook_resid_pre` | input of `model.layers.6` |
| `resid_mid.6` | `blocks.6.hook_resid_mid` | input of `model.layers.6.post_attention_layernorm` |
| `resid_post.6` | `blocks.6.hook_resid_post` | output of `model.layers.6` |
| `attn_out.6`, `mlp_out.6` | `blocks.6.hook_attn_out`, `.hook_mlp_out` | what is added to the stream |
| `q.6`, `k.6`, `v.6` | `blocks.6.attn.hook_q` … | outputs of `q_proj` …, by heads, before rotary |
| `scores.6`, `pattern.6` | `blocks.6.attn.hook_attn_scores`, `.hook_pattern` | before and after softmax |
| `z.6` | `blocks.6.attn.hook_z` | input of `o_proj`, by heads |
| `mlp_pre.6`, `mlp_post.6` | `blocks.6.mlp.hook_pre`, `.hook_post` | before the activation; input of `down_proj` |
| `final_norm` | `ln_final.hook_normalized`, folded | output of `model.norm` |
| `logits` | what the model returns | what the model returns, soft-cap and all |
"""
