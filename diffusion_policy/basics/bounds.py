"""Bounds that environments, datasets, options and evaluations share. Imports nothing."""

MOST_STEPS = 1000
"""Steps after which an episode ends where the environment has no time limit."""
MOST_SEED = 2**32 - 1
"""A larger one would not fit every generator that it feeds."""
