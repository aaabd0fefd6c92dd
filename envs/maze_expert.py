"""The expert of the maze: plans a smooth path of one class, at rest at both ends, and leads the disc along it.

Knows the map and its ways. Knows no simulator.
"""

import numpy as np

from diffusion_policy.envs.following import PathExpert
from diffusion_policy.envs.maze_draws import way_points
from diffusion_policy.envs.maze_map import MODES, NO_OBSTACLES, label_of
from diffusion_policy.envs.maze_paths import GROWN, graph

PERIOD = 0.1
"""Of control [s]."""
SPEED = 0.9
"""At most [m/s]."""
ACCELERATION = 1.5
"""At most, along the path and across it [m/s^2]."""
CLEARANCES = (0.1, 0.07, 0.04, 0.02, 0.0)
"""Between disc and walls, along the shortest way that is smoothed [m]: the first that leaves a way."""
SPACING = 0.01
"""Of a path's points before they are timed [m]."""
WINDOW = 0.2
"""Half the width of the window that smooths a path [m]."""


def plan_path(start: np.ndarray, goal: np.ndarray, mode: str, obstacles: np.ndarray = NO_OBSTACLES) -> np.ndarray:
    """Positions (steps + 1, 2) [m] at every control step of a path of a class from start to goal (2,), at rest at both
    ends. Raises ValueError where there is no way of the class."""
    start, goal = (np.asarray(end, np.float64) for end in (start, goal))
    for clearance in CLEARANCES:
        known = [mode] if mode in MODES else []
        ways = graph(GROWN + clearance, obstacles).ways(start, goal, most=2.5)
        found = [way for way in ways if label_of(way.word) in known]
        if found:
            return timed(smoothed(way_points(found[0].points, SPACING)))
    raise ValueError(f"no way of the class {mode!r} leads from {start} to {goal}")


def smoothed(points: np.ndarray) -> np.ndarray:
    """Points (n, 2) at even distances, each the mean of those within WINDOW, weighted by a raised cosine; the ends stay
    where they are."""
    half = round(WINDOW / SPACING)
    weights = 1 + np.cos(np.linspace(-np.pi, np.pi, 2 * half + 1))
    before = 2 * points[0] - points[half:0:-1] if len(points) > half else np.repeat(points[:1], half, axis=0)
    after = 2 * points[-1] - points[-2 : -half - 2 : -1] if len(points) > half else np.repeat(points[-1:], half, axis=0)
    longer = np.concatenate([before, points, after])
    return np.stack([np.convolve(longer[:, axis], weights / weights.sum(), "valid") for axis in range(2)], axis=-1)


def timed(points: np.ndarray) -> np.ndarray:
    """Positions (steps + 1, 2) at every control step along points (n, 2): from rest to rest, as fast as SPEED and
    ACCELERATION allow."""
    edges = np.diff(points, axis=0)
    length = np.maximum(np.linalg.norm(edges, axis=-1), 1e-9)  # (n - 1,)
    heading = np.unwrap(np.arctan2(edges[:, 1], edges[:, 0]))
    curvature = np.abs(np.diff(heading)) / length[1:]  # (n - 2,)
    speed = np.minimum(SPEED, np.sqrt(ACCELERATION / np.maximum(curvature, 1e-6)))
    speed = np.concatenate([[0.0], speed, [0.0]])  # (n,)
    for i in range(len(length)):
        speed[i + 1] = min(speed[i + 1], (speed[i] ** 2 + 2 * ACCELERATION * length[i]) ** 0.5)
    for i in reversed(range(len(length))):
        speed[i] = min(speed[i], (speed[i + 1] ** 2 + 2 * ACCELERATION * length[i]) ** 0.5)
    time = np.concatenate([[0], np.cumsum(2 * length / (speed[:-1] + speed[1:]))])
    at = PERIOD * np.arange(np.ceil(time[-1] / PERIOD) + 1)
    return np.stack([np.interp(at, time, points[:, axis]) for axis in range(2)], axis=-1)


class MazeExpert(PathExpert):
    """Leads the disc along a path of one class."""

    modes = MODES
    key = "position"
    plan = staticmethod(plan_path)
    no_obstacles = NO_OBSTACLES
