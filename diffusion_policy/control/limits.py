"""What an action on a robot may be: bounds for each number, and for its change from step to step. Knows numbers."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffusion_policy.config import ConfigError


@dataclass(frozen=True)
class Limits:
    """What an action may be, number by number; one number stands for all. None: anything."""

    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    change: tuple[float, ...] | None = None
    """Largest change from one action to the next."""
    rate: tuple[float, ...] | None = None
    """Largest change in a second."""

    def resolve(self, numbers: int, period: float) -> "Bounds":
        """For actions of so many numbers. Raises ConfigError for limits of another length, or that no action meets."""

        def row(name: str, default: float) -> np.ndarray:
            given = getattr(self, name)
            if given is not None and len(given) not in (1, numbers):
                raise ConfigError(
                    f"--{name} takes 1 number, or one for each of the action's {numbers}; got {len(given)}"
                )
            found = np.broadcast_to(np.array(default if given is None else given, float), numbers)
            if np.isnan(found).any():
                raise ConfigError(f"--{name} must be numbers; got {given}")
            return found

        low, high = row("low", -math.inf), row("high", math.inf)
        change = np.minimum(row("change", math.inf), row("rate", math.inf) * period)
        if (low == math.inf).any() or (high == -math.inf).any():
            raise ConfigError(f"no action meets these limits: --low {self.low}, --high {self.high}")
        if (low > high).any():
            raise ConfigError(f"no action meets these limits: --low {self.low} lies above --high {self.high}")
        if (change <= 0).any():
            raise ConfigError("no action meets these limits: --change and --rate must be above 0")
        return Bounds(low, high, change)


class Bounds(NamedTuple):
    """Limits for each number of an action, (A,)."""

    low: np.ndarray
    high: np.ndarray
    change: np.ndarray

    def apply(self, action: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        """The nearest action within the limits; `before`: the last one, from which it may not differ too much."""
        if before is not None:
            action = np.clip(action, before - self.change, before + self.change)
        return np.clip(action, self.low, self.high)
