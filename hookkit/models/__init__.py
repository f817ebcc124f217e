"""What can be looked into: a model, its sites, positions and prompts."""
