"""Starts, goals and obstacles of the maze: drawn, or given and checked.

Knows the map and its ways. Knows no simulator.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.envs.maze_map import DISC_RADIUS, ROOM, WORDS, disc_distance, distance, wall_distance
from diffusion_policy.envs.maze_paths import FACTOR, GROWN, Way, graph, shortest_ways

FREE = 0.2
"""Starts and goals are drawn at least so far from walls [m]."""
APART = 1.5
"""And so far from each other [m]."""
OBSTACLE_RADII = (0.1, 0.15, 0.2)
"""Of the obstacles that can stand in the maze [m]."""
MOST_OBSTACLES = 6
BESIDE = 0.1
"""Standard deviation of an obstacle's distance from a shortest way, along x and y [m]."""
AROUND_ENDS = 0.2
"""At least so much room is left between an obstacle and the disc at start and goal [m]."""
ROOMY, LONGER = 0.05, 1.15
"""A class is closed by obstacles or has a way that keeps so far from them and from walls [m], and is at most so many
times as long as the shortest."""
BLOCKED = 0.5
"""At least this share of the classes has an obstacle in its shortest way."""


class Episode(NamedTuple):
    """What an episode is about: numbers that float32 can hold, so that what is observed is what is."""

    start: np.ndarray
    """(2,) [m]"""
    goal: np.ndarray
    """(2,) [m]"""
    obstacles: np.ndarray
    """x, y, radius, (k, 3) [m]; a radius of 0 for none."""


def draw_episode(random: np.random.Generator, count: int, given: Mapping[str, Any]) -> Episode:
    """An episode with places for so many obstacles, of which `start`, `goal` and `obstacles` may be given. Raises
    ValueError for those that cannot be."""
    ends = {name: checked_end(name, given[name]) for name in ("start", "goal") if name in given}
    fixed = checked_obstacles(given["obstacles"], count) if "obstacles" in given else None
    for _ in range(100):
        start, goal = _draw_ends(random, ends)
        ways = shortest_ways(start, goal)
        obstacles = draw_obstacles(random, ways, count) if fixed is None else fixed
        if obstacles is not None and _is_possible(start, goal, obstacles):
            return Episode(start, goal, obstacles)
        if fixed is not None and len(ends) == 2:
            break
    raise ValueError(
        "no way is left for the disc: start or goal lies in an obstacle, or obstacles close every way"
        if fixed is not None
        else f"no place for {count} obstacles that leaves a way; give another start or goal, or fewer obstacles"
    )


def _draw_ends(random: np.random.Generator, given: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Start and goal, (2,) each [m], with two classes at least unless both are given."""
    while True:
        start, goal = (given[name] if name in given else _draw_free(random) for name in ("start", "goal"))
        if len(given) == 2 or (np.linalg.norm(goal - start) >= APART and len(shortest_ways(start, goal)) > 1):
            return start, goal


def _draw_free(random: np.random.Generator) -> np.ndarray:
    while True:
        point = _exact(random.uniform(-ROOM, ROOM, 2))
        if wall_distance(point) >= FREE:
            return point


def draw_obstacles(random: np.random.Generator, ways: Sequence[Way], count: int) -> np.ndarray | None:
    """Obstacles (count, 3) [m] in the corridors of the shortest ways between start and goal: so that some are blocked
    and one class at least stays open. None where that did not come about."""
    start, goal = ways[0].points[0], ways[0].points[-1]
    dense = [way_points(way.points, 0.02) for way in ways]
    placed = np.zeros((0, 3))
    for _ in range(30 * count):
        points = dense[random.integers(len(dense))]
        center = points[random.integers(len(points))] + random.normal(0, BESIDE, 2)
        obstacle = _exact(np.array([*center, random.choice(OBSTACLE_RADII)]))
        room = np.linalg.norm(np.stack([start, goal]) - obstacle[:2], axis=1).min() - obstacle[2] - DISC_RADIUS
        apart = min(wall_distance(obstacle[:2]), disc_distance(obstacle[:2], placed))
        more = np.concatenate([placed, obstacle[None]])
        if room >= AROUND_ENDS and apart >= obstacle[2] and _is_clear(start, goal, more):
            placed = more
        if len(placed) == count:
            break
    blocked = np.mean([disc_distance(points, placed).min() < DISC_RADIUS for points in dense])
    return placed if len(placed) == count and (count == 0 or blocked >= BLOCKED) else None


def _is_clear(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray) -> bool:
    """Whether a class exists, and the disc has room in all that do: no gap is left that only a perfect path fits."""
    tight = graph(GROWN, obstacles).ways(start, goal, FACTOR)
    roomy = {way.word: way.length for way in graph(GROWN + ROOMY, obstacles).ways(start, goal, LONGER * FACTOR)}
    exists = any(way.word in WORDS for way in tight)
    return exists and all(roomy.get(way.word, np.inf) <= LONGER * way.length for way in tight)


def _is_possible(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray) -> bool:
    """Whether start and goal are free, and there is a way between them."""
    free = distance(np.stack([start, goal]), obstacles).min() > DISC_RADIUS
    return bool(free) and len(shortest_ways(start, goal, obstacles)) > 0


def way_points(points: np.ndarray, spacing: float) -> np.ndarray:
    """Points on a chain of edges (n, 2) at even distances of about `spacing` [m], with its ends."""
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=-1))])
    at = np.linspace(0, length[-1], max(2, round(length[-1] / spacing) + 1))
    return np.stack([np.interp(at, length, points[:, axis]) for axis in range(2)], axis=-1)


def checked_end(name: str, point: Any) -> np.ndarray:
    """A start or goal (2,) [m]; raises ValueError where the disc cannot be there."""
    array = _numbers(point)
    if array.shape != (2,) or not wall_distance(array) > DISC_RADIUS:
        raise ValueError(f"a {name} is x, y [m], more than {DISC_RADIUS} m from the walls; got {point!r:.80}")
    return array


def checked_obstacles(obstacles: Any, count: int) -> np.ndarray:
    """Obstacles (count, 3) [m], filled up with such as are none; raises ValueError for what are none."""
    array = _numbers(obstacles)
    array = array.reshape(-1, 3) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != 3 or not np.isfinite(array).all():
        raise ValueError(f"obstacles are rows x, y, radius [m]; got {obstacles!r:.80}")
    standing = array[array[:, 2] != 0]
    known = [_exact(np.array(radius)) for radius in OBSTACLE_RADII]
    if not np.isin(standing[:, 2], known).all() or (np.abs(standing[:, :2]) > ROOM).any():
        radii = ", ".join(map(str, OBSTACLE_RADII))
        raise ValueError(f"an obstacle stands in the room with a radius of {radii} m; got {obstacles!r:.80}")
    if len(standing) > count:
        raise ValueError(f"the environment has places for {count} obstacles; got {len(standing)}: make it with more")
    return np.concatenate([standing, np.zeros((count - len(standing), 3))])


def _numbers(given: Any) -> np.ndarray:
    try:
        return _exact(np.asarray(given, np.float64))
    except (TypeError, ValueError):
        return np.full((1,), np.nan)


def _exact(numbers: np.ndarray) -> np.ndarray:
    """Numbers that float32 can hold."""
    return numbers.astype(np.float32).astype(np.float64)
