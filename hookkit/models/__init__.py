"""What hookkit reads of a model: its sites, modules, tokens, positions and prompts."""
