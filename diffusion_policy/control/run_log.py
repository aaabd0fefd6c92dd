"""What happened in a run on a robot. Knows arrays only."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

LATE = 0.010
"""From so late on an action counts as late [s]."""


class PlanRecord(NamedTuple):
    """A plan as it was made."""

    asked: int
    """Step at whose observation it was asked for."""
    ready: int
    """Step from which on it was followed; `ready - asked` actions were consumed meanwhile."""
    expected: int
    """Delay that it was made for [steps]."""
    seconds: float
    """What planning took [s]."""
    plan: np.ndarray
    """As sampled, from `asked` on, (steps, A)."""


@dataclass
class RunLog:
    """What happened, a row for each step."""

    period: float
    """Time between two steps [s]."""
    observations: dict[str, list[np.ndarray]] = field(default_factory=dict)
    actions: list[np.ndarray] = field(default_factory=list)
    """As executed, within the limits."""
    times: list[float] = field(default_factory=list)
    """When each action was handed over, since the first step [s]."""
    lateness: list[float] = field(default_factory=list)
    """By how much after its due time [s]."""
    plan_of: list[int] = field(default_factory=list)
    """Which plan was followed."""
    plans: list[PlanRecord] = field(default_factory=list)
    missed: int = 0
    """Steps that were left out, since the one before took longer than a period."""
    starved: int = 0
    """Steps without an action, since the old plan had ended and the new one was not ready."""
    limited: int = 0
    """Actions that the limits changed."""
    warnings: list[str] = field(default_factory=list)
    ended: str = ""
    """Why the run ended."""
    failed: bool = False
    """Whether that was a fault."""

    @property
    def late(self) -> int:
        """Actions over 10 ms late."""
        return sum(one > LATE for one in self.lateness)

    def warn(self, sentence: str) -> None:
        """Keep a warning, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
