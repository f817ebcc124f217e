"""Directions in activation space: how they are made, how strong they are, and their controls."""
