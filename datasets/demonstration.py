"""One episode as it is recorded, read, copied or merged: rows by name, and what is known of it.

Knows arrays. Knows no files.
"""

from typing import Any, NamedTuple

import numpy as np

PUSHED = "pushed"
"""A further column: whether a person pushed a body in this step, 0 or 1, so that no action repeats it."""
SEEDS = "None or a whole number from 0 to 2**63 - 1"


class Demonstration(NamedTuple):
    """One episode as it is stored. What is None is unknown."""

    data: dict[str, np.ndarray]
    """Each observation key and the action, (steps, ...)."""
    seed: int | None = None
    mode: str | None = None
    success: bool | None = None
    final: dict[str, np.ndarray] | None = None
    """The observation after the last action, by key, without the axis of steps; known of all episodes of a store or of
    none."""
    instruction: str | None = None
    """What it was told to do, one of the store's instructions."""
    instruction_embedding: np.ndarray | None = None
    """Of that text, (E,) float32; a store has one for all of its instructions or for none."""


def is_seed(seed: Any) -> bool:
    """Whether a store can keep a seed."""
    return seed is None or (isinstance(seed, int | np.integer) and bool(0 <= seed < 2**63))


def nonfinite_rows(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows (steps, ...) that hold NaN or infinity."""
    if rows.dtype.kind != "f" or rows.size == 0:
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
