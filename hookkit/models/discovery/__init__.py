"""Sites of models that no row of the table describes, from a run of the model with recorded tensors."""
