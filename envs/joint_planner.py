"""Paths of joints: RRT-Connect (Kuffner and LaValle 2000), shortcuts, smoothing, and when a path is where.

Knows spaces of any dimension in which a function says what is free. Knows no robot and no simulator.
"""

from collections.abc import Callable

import numpy as np

Free = Callable[[np.ndarray], np.ndarray]
"""Points (n, d) → whether each is free, (n,)."""
SPACING = 0.04
"""Between the points of an edge at which it is checked, and of a smooth path [rad]."""
STRIDE = 0.8
"""At most so far does a tree grow towards a random point in one step [rad]."""


def line(start: np.ndarray, end: np.ndarray, spacing: float = SPACING) -> np.ndarray:
    """Points (n, d) from start to end, both included, no farther apart than `spacing`."""
    count = max(2, int(np.ceil(np.linalg.norm(end - start) / spacing)) + 1)
    return start + np.linspace(0, 1, count)[:, None] * (end - start)


def dense(points: np.ndarray, spacing: float = SPACING) -> np.ndarray:
    """Points on a chain of edges (n, d) at even distances of about `spacing`, with its ends."""
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=-1))])
    at = np.linspace(0, length[-1], max(2, round(length[-1] / spacing) + 1))
    return np.stack([np.interp(at, length, column) for column in points.T], axis=-1)


class _Tree:
    """Points, and from which each has grown."""

    def __init__(self, root: np.ndarray) -> None:
        self.points = root[None]
        self._parents = [-1]

    def grow(self, towards: np.ndarray, free: Free, stride: float) -> tuple[int, bool]:
        """Grow from the nearest point towards another one, until something is in the way or by `stride`; the number of
        the point that is nearest then, and whether it is that other one."""
        nearest = int(np.linalg.norm(self.points - towards, axis=-1).argmin())
        root = self.points[nearest]
        whole = np.linalg.norm(towards - root)
        if whole < 1e-9:
            return nearest, True
        end = towards if whole <= stride else root + stride / whole * (towards - root)
        edge = line(root, end)
        clear = free(edge[1:])
        steps = len(clear) if clear.all() else int(clear.argmin())
        if steps == 0:
            return nearest, False
        self.points = np.concatenate([self.points, edge[steps][None]])
        self._parents.append(nearest)
        return len(self._parents) - 1, bool(steps == len(clear) and whole <= stride)

    def branch(self, number: int) -> np.ndarray:
        """The points from a point to the root, (n, d)."""
        found = []
        while number >= 0:
            found.append(self.points[number])
            number = self._parents[number]
        return np.stack(found)


def connect(
    start: np.ndarray, goal: np.ndarray, free: Free, bounds: np.ndarray, random: np.random.Generator, rounds: int
) -> np.ndarray | None:
    """A free chain of edges (n, d) from start to goal (d,), both of which are free, within bounds (d, 2). None where so
    many rounds find none."""
    if free(line(start, goal)).all():
        return np.stack([start, goal])
    here, there = _Tree(start), _Tree(goal)
    for number in range(rounds):
        towards = there.points[0] if number % 8 == 0 else random.uniform(*bounds.T)
        reached, _ = here.grow(towards, free, STRIDE)
        met, joined = there.grow(here.points[reached], free, np.inf)
        if joined:
            chain = np.concatenate([here.branch(reached)[::-1], there.branch(met)[1:]])
            return chain if np.array_equal(chain[0], start) else chain[::-1]
        here, there = there, here
    return None


def shortened(
    chain: np.ndarray, free: Free, accepted: Callable[[np.ndarray], bool], random: np.random.Generator, tries: int
) -> np.ndarray:
    """A chain (n, d) whose detours are cut by straight edges, so many times, where these are free and the whole chain
    is still accepted."""
    for _ in range(tries):
        knots = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(chain, axis=0), axis=-1))])
        if len(chain) == 2:
            break
        first, last = np.sort(random.uniform(0, knots[-1], 2))
        i, j = np.searchsorted(knots, (first, last)) - 1
        if j <= i:
            continue
        a, b = (np.array([np.interp(at, knots, column) for column in chain.T]) for at in (first, last))
        shorter = np.concatenate([chain[: i + 1], a[None], b[None], chain[j + 1 :]])
        if free(line(a, b)).all() and accepted(shorter):
            chain = shorter
    return chain


def smoothed(points: np.ndarray, half: int) -> np.ndarray:
    """Points (n, d) at even distances, each the mean of those up to `half` numbers away, weighted by a raised cosine;
    the ends stay where they are."""
    half = min(half, len(points) - 1)
    weights = 1 + np.cos(np.linspace(-np.pi, np.pi, 2 * half + 1))
    before, after = 2 * points[0] - points[half:0:-1], 2 * points[-1] - points[-2 : -half - 2 : -1]
    longer = np.concatenate([before, points, after])
    return np.stack([np.convolve(column, weights / weights.sum(), "valid") for column in longer.T], axis=-1)


def timed(points: np.ndarray, speed: float, acceleration: float, period: float) -> np.ndarray:
    """Points (steps + 1, d) at every control period [s] along points (n, d): from rest to rest, as fast as a speed
    [rad/s] and an acceleration [rad/s^2], along the path and across it, allow."""
    edges = np.diff(points, axis=0)
    length = np.maximum(np.linalg.norm(edges, axis=-1), 1e-9)  # (n - 1,)
    turns = np.linalg.norm(np.diff(edges / length[:, None], axis=0), axis=-1)  # (n - 2,)
    fast = np.minimum(speed, np.sqrt(acceleration * length[1:] / np.maximum(turns, 1e-6)))
    speeds = np.concatenate([[0.0], fast, [0.0]])  # (n,)
    for i in range(len(length)):
        speeds[i + 1] = min(speeds[i + 1], (speeds[i] ** 2 + 2 * acceleration * length[i]) ** 0.5)
    for i in reversed(range(len(length))):
        speeds[i] = min(speeds[i], (speeds[i + 1] ** 2 + 2 * acceleration * length[i]) ** 0.5)
    takes = 2 * length / (speeds[:-1] + speeds[1:])  # of each edge [s]
    begins = np.concatenate([[0], np.cumsum(takes)])
    at = np.minimum(period * np.arange(np.ceil(begins[-1] / period - 1e-9) + 1), begins[-1])
    edge = np.clip(np.searchsorted(begins, at, side="right") - 1, 0, len(length) - 1)
    since = at - begins[edge]
    gone = speeds[edge] * since + (speeds[edge + 1] - speeds[edge]) / takes[edge] * since**2 / 2
    return points[edge] + (gone / length[edge])[:, None] * edges[edge]
