"""The residual stream read as logits: logit lens, tuned lens, patchscope, direct logits."""
