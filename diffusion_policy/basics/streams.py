"""Random generators by name: a tag says what a generator is for, numbers (seed, step, ...) which of them it is.

Different names give different random numbers. With numbers alone as entropy, NumPy gives the same ones for (seed),
(seed, 0) and (seed, 0, 0), as it fills up with zeros. Knows NumPy alone.
"""

import hashlib
import json

import numpy as np


def derive_entropy(tag: str, *numbers: int) -> np.random.SeedSequence:
    """The entropy of a stream."""
    name = json.dumps([tag, *map(int, numbers)])
    return np.random.SeedSequence(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def derive_rng(tag: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator of its own for each tag and sequence of numbers."""
    return np.random.default_rng(derive_entropy(tag, *numbers))
