"""Dictionaries of features (sparse autoencoders, transcoders) whose features are sites."""
