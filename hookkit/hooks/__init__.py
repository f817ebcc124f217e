"""Hooks: frozen values that say what to do at which sites and positions."""
