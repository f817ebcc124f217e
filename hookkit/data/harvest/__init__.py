"""Activations of a corpus: written to shards on disk, read back, and summarised."""
