"""The expert of the reaching Panda: plans a path of one mode, at rest at both ends, and leads the joints along it.

Knows the arm and the scene as numbers. Knows no simulator.
"""

import zlib
from functools import lru_cache
from itertools import pairwise

import numpy as np

from diffusion_policy.envs.following import PathExpert
from diffusion_policy.envs.joint_planner import Free, connect, dense, shortened, smoothed, timed
from diffusion_policy.envs.panda_model import LIMITS, least_gaps, tool_positions
from diffusion_policy.envs.panda_scene import ARRAY, MODES, NO_OBSTACLES, mode_of

PERIOD = 0.1
"""Of control [s]."""
SPEED = 1.4
"""At most, of all joints together [rad/s]."""
ACCELERATION = 3.0
"""At most, along the path and across it [rad/s^2]."""
MARGINS = (0.025, 0.005)
"""Between what covers the arm and everything else [m]: the first with which a path is found."""
ROUNDS = 40
"""Of the planner on each side of a waypoint."""
TRIES = 24
"""Shortcuts that are tried."""
AROUND = 12
"""So many waypoints are drawn near each known one."""
COARSE = 12
"""Points of an edge at which it is looked at, to order waypoints."""
CHOSEN = 3
"""Waypoints through which a path is tried, one after the other."""
ROOM = 0.5
"""The planner's trees grow at most so far beyond start, waypoint and goal, in each joint [rad]."""
CLEARLY = np.array([0.02, 0.0, 0.02])
"""So far from the borders between modes the tool passes [m]."""
MOST_STEPS = 62
"""A path with more is none."""
WINDOWS = (8, 4, 2, 1)
"""Half the width of the window that smooths a path, in points: the first that leaves it free."""
SPREAD = 0.25
"""Standard deviation of the waypoints around the known ones [rad]."""
WAYPOINTS = {
    "near": np.array([
        (-0.37, -0.71, 0.36, -2.65, 0.07, 2.31, 1.31),
        (-0.43, -0.20, 0.07, -2.38, 0.42, 1.37, 0.77),
        (-0.02, -0.42, -0.01, -2.65, -0.08, 1.79, 0.66),
        (0.20, -0.51, -0.20, -2.65, -0.29, 2.16, 0.88),
        (0.19, -0.59, -0.36, -2.62, 0.46, 1.61, 1.27),
        (0.17, -0.06, -0.12, -2.88, 0.17, 2.42, 1.48),
    ]),
    "through": np.array([
        (-0.42, 0.15, 0.49, -2.14, 0.06, 3.08, 1.37),
        (0.32, -0.31, -0.22, -2.50, 0.26, 2.77, 0.66),
        (0.19, 0.15, -0.23, -2.18, 0.08, 3.19, 0.83),
        (0.35, 0.11, -0.36, -2.05, -0.73, 2.58, 1.37),
        (0.22, -0.07, -0.10, -2.24, -0.72, 2.47, 0.86),
        (-0.12, 0.02, 0.44, -2.07, -0.78, 1.81, 1.15),
    ]),
    "over": np.array([
        (-0.19, -0.25, 0.00, -1.12, 0.46, 2.21, 0.29),
        (-0.22, -0.36, 0.19, -1.38, 0.41, 2.46, 1.30),
        (-0.10, -0.45, 0.07, -1.59, -0.03, 2.94, 0.28),
        (0.25, -0.25, -0.15, -1.27, 0.11, 1.93, 0.91),
        (-0.38, 0.15, 0.31, -0.93, 0.21, 2.15, 1.07),
        (0.11, -0.28, -0.11, -1.36, -0.39, 2.52, 1.07),
    ]),
}  # fmt: skip
"""Configurations in the plane of the gate through which a path of each mode can lead, (w, 7) [rad]."""


def plan_path(start: np.ndarray, goal: np.ndarray, mode: str, obstacles: np.ndarray = NO_OBSTACLES) -> np.ndarray:
    """As `find_path`; raises ValueError where no path is found."""
    path = find_path(start, goal, mode, obstacles)
    if path is None:
        raise ValueError(f"no path of the mode {mode!r} was found from {start} to {goal}")
    return path


def find_path(
    start: np.ndarray, goal: np.ndarray, mode: str, obstacles: np.ndarray = NO_OBSTACLES
) -> np.ndarray | None:
    """Joint angles (steps + 1, 7) [rad] at every control step of a path of a mode from start to goal (7,), past
    obstacles (k, 4: x, y, z, radius [m]), at rest at both ends. The same for the same arguments; None where no path is
    found."""
    spheres = np.asarray(obstacles, np.float64).reshape(-1, 4)
    spheres = spheres[spheres[:, 3] > 0]
    begin, end, others = (tuple(np.asarray(one, np.float64).ravel().tolist()) for one in (start, goal, spheres))
    path = _plan(begin, end, others, mode)
    return None if path is None else path.copy()


@lru_cache(maxsize=64)
def _plan(start: tuple, goal: tuple, obstacles: tuple, mode: str) -> np.ndarray | None:
    """See `find_path`; all numbers of each in one tuple."""
    if mode not in MODES:
        return None
    begin, end, spheres = np.array(start), np.array(goal), np.array(obstacles).reshape(-1, 4)
    random = np.random.default_rng([zlib.crc32(np.array(start + goal + obstacles).tobytes()), MODES.index(mode)])
    for margin in MARGINS:

        def free(joints: np.ndarray, margin: float = margin) -> np.ndarray:
            return least_gaps(joints, ARRAY, spheres) > margin

        if not free(np.stack([begin, end])).all():
            continue
        known = _plan(start, goal, (), mode) if obstacles else None
        if known is not None and free(known).all():
            return known  # no obstacle is in the way
        for waypoint in _waypoints(begin, end, mode, free, random):
            path = _through(begin, waypoint, end, mode, free, random)
            if path is not None:
                return path
    return None


def _waypoints(
    start: np.ndarray, goal: np.ndarray, mode: str, free: Free, random: np.random.Generator
) -> list[np.ndarray]:
    """A few free ones near the known: those first that straight edges reach, then those with the least detour."""
    known = WAYPOINTS[mode]
    near = np.repeat(known, AROUND, axis=0) + random.normal(0, SPREAD, (AROUND * len(known), 7))
    found = np.clip(np.concatenate([known, near]), *LIMITS.T)
    found = found[free(found)]
    if len(found) == 0:
        return []
    share = np.linspace(0, 1, COARSE)[:, None, None]
    edges = np.concatenate([end + share * (found - end) for end in (start, goal)])  # (2 COARSE, w, 7)
    straight = free(edges.reshape(-1, 7)).reshape(2 * COARSE, len(found)).all(axis=0)
    detour = np.linalg.norm(found - start, axis=-1) + np.linalg.norm(found - goal, axis=-1)
    return list(found[np.lexsort((detour, ~straight))[:CHOSEN]])


def _through(
    start: np.ndarray, waypoint: np.ndarray, goal: np.ndarray, mode: str, free: Free, random: np.random.Generator
) -> np.ndarray | None:
    """A timed path of the mode through a waypoint, None where none is found."""
    corners = np.stack([start, waypoint, goal])
    bounds = np.stack([corners.min(axis=0) - ROOM, corners.max(axis=0) + ROOM], axis=-1)
    bounds = np.stack([np.maximum(bounds[:, 0], LIMITS[:, 0]), np.minimum(bounds[:, 1], LIMITS[:, 1])], axis=-1)
    halves = []
    for one, other in pairwise(corners):
        half = connect(one, other, free, bounds, random, ROUNDS)
        if half is None:
            return None
        halves.append(half)
    chain = np.concatenate([halves[0], halves[1][1:]])

    def accepted(chain: np.ndarray) -> bool:
        return _is_clearly(mode, dense(chain, 0.1))

    if not accepted(chain):
        return None
    points = dense(shortened(chain, free, accepted, random, TRIES))
    for window in WINDOWS:
        smooth = smoothed(points, window)
        path = timed(smooth, SPEED, ACCELERATION, PERIOD)
        if len(path) <= MOST_STEPS + 1 and _is_clearly(mode, path) and free(smooth).all():
            return path
    return None


def _is_clearly(mode: str, joints: np.ndarray) -> bool:
    """Whether a path (steps, 7) [rad] is of a mode, and would be if the tool were a little elsewhere."""
    tool = tool_positions(joints)
    return all(mode_of(tool + shift) == mode for shift in (CLEARLY, -CLEARLY))


class PandaReachExpert(PathExpert):
    """Leads the joints along a path of one mode."""

    modes = MODES
    key = "joints"
    plan = staticmethod(plan_path)
    no_obstacles = NO_OBSTACLES
