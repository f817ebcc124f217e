"""Which part of a model does it: a grid of edits, with forwards that cells share."""
