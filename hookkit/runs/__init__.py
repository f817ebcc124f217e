"""Runs of a model with hooks: the hook manager, forward, generate, traces, shared forwards."""
