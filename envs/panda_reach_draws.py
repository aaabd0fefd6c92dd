"""Starts, goals and obstacles of the reaching Panda: drawn, or given and checked.

Knows the arm and the scene as numbers. Knows no simulator.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.envs.panda_model import LIMITS, least_gaps, tool_positions
from diffusion_policy.envs.panda_reach_expert import find_path
from diffusion_policy.envs.panda_scene import ARRAY, MODES, NO_OBSTACLES, OBSTACLE_RADII

FREE = 0.04
"""Starts and goals are drawn at least so far from everything [m]."""
DRAWN = np.array([(0.3, 1.2), (-0.6, 1.0), (-0.4, 0.4), (-2.8, -1.0), (-0.4, 0.4), (1.0, 3.2), (0.2, 1.4)])
"""Joint angles among which starts and goals are drawn, (7, 2) [rad]: the first on the side y > 0."""
REGION = np.array([(0.35, 0.62), (0.25, 0.5), (0.1, 0.4)])
"""Where the tool is then: x, the distance from the gate, z, (3, 2) [m]."""
MOST_OBSTACLES = 4
AROUND_ENDS = 0.06
"""At least so much room is left between a ball and the arm at start and goal [m]."""
AROUND = np.array([(0.25, 0.7), (-0.45, 0.45), (0.1, 0.9)])
"""The balls' middles lie in this part of the space, (3, 2) [m]."""


BESIDE = 0.04
"""Standard deviation of a ball's distance from the arm on such a way, along each axis [m]."""
BEHIND = (0.0, 0.1, 0.2)
"""It is drawn near the point of the hand or the wrist that lies so far behind the tool [m]."""
NO_BOXES = np.zeros((0, 6))


class Episode(NamedTuple):
    """What an episode is about: numbers that float32 can hold, so that what is observed is what is."""

    start: np.ndarray
    """(7,) [rad]"""
    goal: np.ndarray
    """(7,) [rad]"""
    obstacles: np.ndarray
    """x, y, z, radius, (k, 4) [m]; a radius of 0 for none."""


def draw_episode(random: np.random.Generator, count: int, given: Mapping[str, Any]) -> Episode:
    """An episode with places for so many obstacles, of which `start`, `goal` and `obstacles` may be given. Raises
    ValueError for those that cannot be."""
    ends = {name: checked_end(name, given[name]) for name in ("start", "goal") if name in given}
    fixed = checked_obstacles(given["obstacles"], count) if "obstacles" in given else None
    for _ in range(30):
        side = 1 if random.random() < 0.5 else -1
        start = ends["start"] if "start" in ends else _draw_end(random, side)
        if "start" in ends:
            side = 1 if tool_positions(start)[1] > 0 else -1
        goal = ends["goal"] if "goal" in ends else _draw_end(random, -side)
        obstacles = draw_obstacles(random, start, goal, count) if fixed is None else fixed
        if obstacles is None:
            continue
        if least_gaps(np.stack([start, goal]), ARRAY, obstacles).min() > 0:
            return Episode(start, goal, obstacles)
        if fixed is not None and len(ends) == 2:
            break
    raise ValueError("no place was found: obstacles touch start or goal, or leave no way between them")


def _draw_end(random: np.random.Generator, side: int) -> np.ndarray:
    """A start or a goal on the side y > 0 or y < 0 of the gate, (7,) [rad], the hand pointing down."""
    while True:
        joints = _exact(random.uniform(DRAWN[:, 0], DRAWN[:, 1], (64, 7)) * (side, 1, 1, 1, 1, 1, 1))
        tool = tool_positions(joints) * (1, side, 1)
        down = tool_positions(joints, 0.1)[:, 2] - tool[:, 2] > 0.08
        fits = ((tool > REGION[:, 0]) & (tool < REGION[:, 1])).all(axis=1) & down
        fits[fits] = least_gaps(joints[fits], ARRAY, NO_OBSTACLES) > FREE
        if fits.any():
            return joints[fits.argmax()]


def draw_obstacles(random: np.random.Generator, start: np.ndarray, goal: np.ndarray, count: int) -> np.ndarray | None:
    """Balls (count, 4) [m] in the ways that demonstrations take from start to goal: one of these at least is blocked,
    and for one mode at least a path is left. None where that did not come about."""
    if count == 0:
        return NO_OBSTACLES
    paths = [path for path in (find_path(start, goal, mode) for mode in MODES) if path is not None]
    placed = NO_OBSTACLES
    for _ in range(20 * count):
        path = paths[random.integers(len(paths))] if paths else np.stack([start, goal])
        middle = tool_positions(path[random.integers(len(path))], random.choice(BEHIND)) + random.normal(0, BESIDE, 3)
        ball = _exact(np.array([*middle, random.choice(OBSTACLE_RADII)]))[None]
        inside = ((ball[0, :3] > AROUND[:, 0]) & (ball[0, :3] < AROUND[:, 1])).all()
        if inside and least_gaps(np.stack([start, goal]), NO_BOXES, ball).min() > AROUND_ENDS:
            placed = np.concatenate([placed, ball])
        if len(placed) == count:
            break
    blocked = [least_gaps(path, NO_BOXES, placed).min() < 0 for path in paths]
    if len(placed) < count or not any(blocked):
        return None
    modes = [MODES[number] for number in random.permutation(len(MODES))]
    return placed if any(find_path(start, goal, mode, placed) is not None for mode in modes) else None


def checked_end(name: str, joints: Any) -> np.ndarray:
    """A start or goal (7,) [rad]; raises ValueError where the arm cannot be there."""
    array = _numbers(joints)
    inside = array.shape == (7,) and bool(((array >= LIMITS[:, 0]) & (array <= LIMITS[:, 1])).all())
    if not inside or not least_gaps(array, ARRAY, NO_OBSTACLES)[0] > 0:
        raise ValueError(f"a {name} is seven joint angles [rad] at which nothing is touched; got {joints!r:.80}")
    return array


def checked_obstacles(obstacles: Any, count: int) -> np.ndarray:
    """Obstacles (count, 4) [m], filled up with such as are none; raises ValueError for what are none."""
    array = _numbers(obstacles)
    array = array.reshape(-1, 4) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise ValueError(f"obstacles are rows x, y, z, radius [m]; got {obstacles!r:.80}")
    standing = array[array[:, 3] != 0]
    if not np.isin(standing[:, 3], [_exact(np.array(radius)) for radius in OBSTACLE_RADII]).all():
        radii = ", ".join(map(str, OBSTACLE_RADII))
        raise ValueError(f"an obstacle is a ball with a radius of {radii} m; got {obstacles!r:.80}")
    if len(standing) > count:
        raise ValueError(f"the environment has places for {count} obstacles; got {len(standing)}: make it with more")
    return np.concatenate([standing, np.zeros((count - len(standing), 4))])


def _numbers(given: Any) -> np.ndarray:
    try:
        return _exact(np.asarray(given, np.float64))
    except (TypeError, ValueError):
        return np.full((1,), np.nan)


def _exact(numbers: np.ndarray) -> np.ndarray:
    """Numbers that float32 can hold."""
    return numbers.astype(np.float32).astype(np.float64)
