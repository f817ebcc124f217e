"""Hooks on a model: the manager, forward, generate, traces, and forwards of a part of a model."""
