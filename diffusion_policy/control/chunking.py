"""Chunking: how a new plan is joined to the one that is being executed. Others call a plan an action chunk.

Knows plans. Knows neither policy nor simulator.
"""

from typing import Protocol

import numpy as np


class Chunking(Protocol):
    """Makes of plans what is executed."""

    def join(self, executing: np.ndarray, plans: np.ndarray, delay_steps: int) -> np.ndarray:
        """What to execute from *now* on, (B, steps, A). `executing`: what is left of that until now, (B, steps, A), NaN
        beyond its end and for an episode's first plan; `plans`: new ones, (B, steps, A); `delay_steps`: after so many
        steps they are ready."""
        ...


class RecedingHorizon:
    """Follows the new plan as soon as it is ready, and the one before until then; the first plan of an episode is
    waited for (Chi et al. 2023, arXiv 2303.04137, section 2.2)."""

    def join(self, executing: np.ndarray, plans: np.ndarray, delay_steps: int) -> np.ndarray:
        """See `Chunking.join`."""
        joined = plans.copy()
        running_on = ~np.isnan(executing[:, 0]).any(axis=-1)  # (B,)
        joined[running_on, :delay_steps] = executing[running_on, :delay_steps]
        return joined
