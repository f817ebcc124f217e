"""hk.model_diff: what two models do differently on the same texts."""
