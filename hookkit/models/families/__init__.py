"""Where each model family has its sites. No module here imports torch."""
