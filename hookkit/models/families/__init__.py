"""The table of model families: where each has its sites. No module here imports torch."""
