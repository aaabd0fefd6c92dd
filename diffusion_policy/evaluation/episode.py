"""What one rollout leaves: what was observed, done and planned, how it ended; or why it could not be run.

Knows arrays. Knows no simulator, no policy and no metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Observations = Mapping[str, np.ndarray]
"""{key: (...)} of one step, or {key: (steps, ...)} of several."""


class Plan(NamedTuple):
    """One planned sequence of an episode."""

    step: int
    """Control step at which it was made."""
    actions: np.ndarray
    """Raw, from that step on, (steps, A)."""


@dataclass(frozen=True)
class Episode:
    """One rollout. It ends at success."""

    seed: int
    success: bool
    mode: str | None
    """None: no mode completed."""
    observations: dict[str, np.ndarray]
    """Each key: (steps + 1, ...); without images, unless they were to be kept."""
    actions: np.ndarray
    """Raw, (steps, A)."""
    repeat: int = 0
    """Episodes of one seed start alike and differ in their planning noise."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """How the episode ended, as numbers that the environment gives."""
    plans: Sequence[Plan] = ()
    """In the order in which they were made."""


@dataclass(frozen=True, order=True)
class FailedEpisode:
    """What of an episode failed for reasons other than the policy: its environment, twice, so that it counts nowhere;
    or the function that tells its mode, so that it counts without one."""

    seed: int
    repeat: int
    reason: str


class Trace(NamedTuple):
    """One episode in the plane of its environment."""

    path: np.ndarray
    """Where it went, (steps + 1, 2)."""
    plans: dict[int, np.ndarray]
    """Where each plan would have led, (H + 1, 2), by the step at which it was made."""
