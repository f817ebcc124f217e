"""Prompt pairs, and activations of a corpus on disk."""
