"""A path that is followed from control step to control step. Knows arrays."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


class PathExpert:
    """Leads a body along a path of one mode, which is planned from the first observation of an episode. It aims at the
    path's point of the next step, and waits for a body that lags behind."""

    modes: Sequence[str]
    key: str
    """Observation that says where the body is, (n,)."""
    ahead = 3
    """It waits for a body that has come no nearer than so many steps before the point where it should be."""
    plan: Callable[[np.ndarray, np.ndarray, str, np.ndarray], np.ndarray]
    """(start, goal, mode, obstacles) → path (steps + 1, n); raises ValueError where there is none."""
    no_obstacles: np.ndarray

    def __init__(self, mode: str) -> None:
        if mode not in self.modes:
            raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(self.modes)}")
        self._mode = mode
        self._path: np.ndarray | None = None
        self._at = 0

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next point to aim at, (n,). Raises ValueError where no path of the mode exists."""
        place = observation[self.key]
        if self._path is None:
            obstacles = np.asarray(observation.get("obstacles", self.no_obstacles))
            self._path = type(self).plan(place, observation["goal"], self._mode, obstacles)
        behind = max(0, self._at - 2 * self.ahead)
        away = np.linalg.norm(self._path[behind : self._at + 1] - place, axis=-1)
        self._at = min(self._at + 1, behind + int(away.argmin()) + self.ahead, len(self._path) - 1)
        return self._path[self._at].astype(np.float32)
