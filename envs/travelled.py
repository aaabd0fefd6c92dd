"""How far and how smoothly something has gone in an episode. Knows numbers. Knows no simulator and no task."""

from typing import NamedTuple

import numpy as np


class Travelled(NamedTuple):
    """What an episode was until now."""

    at: np.ndarray
    """Where it is: places [m] or joint angles [rad], (d,)."""
    step: np.ndarray
    """The last change of that, (d,)."""
    length: float = 0.0
    """[m] or [rad]"""
    steps: int = 0
    squares: float = 0.0
    """Sum of the squared accelerations of all steps [m^2/s^4] or [rad^2/s^4]."""
    touched: bool = False

    def after(self, at: np.ndarray, touched: bool, period: float) -> "Travelled":
        """What it is one control period [s] later."""
        step = at - self.at
        square = float(((step - self.step) ** 2).sum()) / period**4
        length = self.length + float(np.linalg.norm(step))
        return Travelled(at, step, length, self.steps + 1, self.squares + square, self.touched or touched)

    @property
    def smoothness(self) -> float:
        """The mean squared acceleration over the steps."""
        return self.squares / max(self.steps, 1)
