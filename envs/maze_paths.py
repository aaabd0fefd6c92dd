"""Shortest ways of the disc through the maze, one in each class.

Blocks and obstacles, grown by the disc's radius, are polygons; a shortest way is a chain of edges between their corners
(a visibility graph). The search runs over corners together with the word of the way that led there, which is the
covering space, so that the first arrival at the goal under a word is the shortest way of that class. Knows the map.
Knows no simulator, no time and no episode.
"""

import heapq
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffusion_policy.envs.maze_map import BLOCKS, CUTS, DISC_RADIUS, NO_OBSTACLES, ROOM, WORDS, label_of, reduced

SIDES = 12
"""Of a polygon around a block or an obstacle: a rounded corner becomes three of its corners."""
GROWN = DISC_RADIUS * math.cos(math.pi / SIDES)
"""By so much a polygon is grown [m]: its corners lie at the disc's radius and its sides 3 mm nearer, so that the disc
is outside wherever it touches nothing, and its way is never shorter than the shortest one here."""
FACTOR = 1.5
"""A class exists for a start and a goal where its shortest way is at most so many times as long as the shortest."""
TOLERANCE = 1e-6
"""What reaches so little into a polygon passes it by [m]."""
GOAL = -1
"""The number of the goal among those of the corners."""

_ANGLES = np.arange(SIDES) * 2 * math.pi / SIDES
_NORMALS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=-1).round(12)  # (SIDES, 2)
_NEXT = np.roll(np.arange(SIDES), -1)

Edge = tuple[int, float, str]
"""Where it leads, its length [m] and its word."""


class Way(NamedTuple):
    """A shortest way in its class."""

    word: str
    length: float
    """[m]"""
    points: np.ndarray
    """Its corners, with start and goal, (n, 2) [m]."""


class Graph:
    """The corners of all polygons to which the disc can go, and the edges between them."""

    def __init__(self, radius: float, obstacles: np.ndarray) -> None:
        """`radius`: what keeps away from blocks, walls and `obstacles` (k, 3) [m]."""
        boxes = np.array([[*block.center, *block.half] for block in BLOCKS])
        obstacles = obstacles[obstacles[:, 2] > 0]
        support = np.concatenate([
            boxes[:, :2] @ _NORMALS.T + boxes[:, 2:] @ np.abs(_NORMALS).T,
            obstacles[:, :2] @ _NORMALS.T + obstacles[:, 2:] * math.cos(math.pi / SIDES),
        ])  # fmt: skip
        self._support = support + radius  # (polygons, SIDES): a point is within where normals @ point < support
        self._limit = ROOM - radius
        inverse = np.linalg.inv(np.stack([_NORMALS, _NORMALS[_NEXT]], axis=1))  # (SIDES, 2, 2)
        sides = np.stack([self._support, self._support[:, _NEXT]], axis=-1)  # (polygons, SIDES, 2)
        corners = np.einsum("sij,psj->psi", inverse, sides).reshape(-1, 2)
        kept = self.free(corners)
        self.corners = corners[kept]  # (n, 2)
        side = np.flatnonzero(kept) % SIDES
        self._sides = np.stack([_NORMALS[side], _NORMALS[_NEXT[side]]], axis=1)  # (n, 2, 2): those at a corner
        away = self.corners[None] - self.corners[:, None]
        taut = self._tangent(away)
        self._edges = self._edges_where(self.corners, taut & taut.T)

    def free(self, points: np.ndarray) -> np.ndarray:
        """Whether points (n, 2) lie in the room and in no polygon, (n,)."""
        inside = (points @ _NORMALS.T)[:, None] < self._support - TOLERANCE  # (n, polygons, SIDES)
        in_room = (np.abs(points) < self._limit + TOLERANCE).all(axis=-1)
        return np.logical_and(in_room, ~inside.all(axis=-1).any(axis=-1))

    def visible(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether segments from points (n, 2) to as many others cross no polygon, (n,): each is clipped by the sides
        (Cyrus and Beck 1978)."""
        depth = (starts @ _NORMALS.T)[:, None] - self._support + TOLERANCE  # (n, polygons, SIDES)
        slope = ((ends - starts) @ _NORMALS.T)[:, None]  # (n, 1, SIDES)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -depth / slope  # where it crosses a side's line, in shares of its length
        never = np.where(depth >= 0, np.inf, -np.inf)
        enter = np.where(slope < 0, at, np.where(slope == 0, never, -np.inf)).max(axis=-1)
        leave = np.where(slope > 0, at, np.inf).min(axis=-1)
        return (np.maximum(enter, 0) >= np.minimum(leave, 1)).all(axis=-1)

    def _rest(self, into: dict[int, float]) -> dict[int, float]:
        """The shortest length from each corner to a goal which some corners see so far away [m]."""
        queue = [(length, number) for number, length in into.items()]
        heapq.heapify(queue)
        found: dict[int, float] = {}
        while queue:
            length, number = heapq.heappop(queue)
            if number in found:
                continue
            found[number] = length
            for following, more, _ in self._edges[number]:
                if following not in found:
                    heapq.heappush(queue, (length + more, following))
        return found

    def _edges_of(self, point: np.ndarray) -> list[Edge]:
        """Edges from a point (2,) to corners."""
        return self._edges_where(point[None], self._tangent((self.corners - point)[None]))[0]

    def ways(self, start: np.ndarray, goal: np.ndarray, most: float, wanted: str | None = None) -> list[Way]:
        """The shortest way of each class that has one of at most `most` times the shortest of all, by length; or, where
        a word is wanted, of that class alone. Nothing where start or goal (2,) is not free."""
        if not self.free(np.stack([start, goal])).all():
            return []
        into = {number: (length, word.swapcase()[::-1]) for number, length, word in self._edges_of(goal)}
        rest = {**self._rest({number: length for number, (length, _) in into.items()}), GOAL: 0.0}
        first = self._edges_of(start)
        if self.visible(start[None], goal[None])[0]:
            first.append((GOAL, math.dist(start, goal), segment_words(start[None], goal[None])[0]))
        first = [edge for edge in first if edge[0] in rest]
        limit = most * min((length + rest[number] for number, length, _ in first), default=0.0)

        def edges(number: int) -> list[Edge]:
            ahead = [edge for edge in self._edges[number] if edge[0] in rest]
            return [*ahead, (GOAL, *into[number])] if number in into else ahead

        queue: list[tuple[float, float, int, str, tuple[int, ...]]]
        queue = [(length + rest[number], length, number, word, (number,)) for number, length, word in first]
        heapq.heapify(queue)
        done: set[tuple[int, str]] = set()
        found = []
        while queue and queue[0][0] <= limit:
            _, length, number, word, chain = heapq.heappop(queue)
            if (number, word) in done:
                continue
            done.add((number, word))
            if number == GOAL:
                if wanted in (None, word):
                    found.append(Way(word, length, np.stack([start, *self.corners[list(chain[:-1])], goal])))
                if wanted == word:
                    break
                continue
            for following, more, step in edges(number):
                after, total = reduced(word + step) if step else word, length + more
                if (following, after) not in done:
                    heapq.heappush(queue, (total + rest[following], total, following, after, (*chain, following)))
        return found

    def _tangent(self, directions: np.ndarray) -> np.ndarray:
        """Whether a line through a corner only touches its polygon there: no other edge is part of a shortest way.
        Directions (m, n, 2), one for each of n corners → (m, n)."""
        return np.einsum("nkc,mnc->mnk", self._sides, directions).prod(axis=-1) <= TOLERANCE

    def _edges_where(self, ends: np.ndarray, useful: np.ndarray) -> list[list[Edge]]:
        """Edges from points (m, 2) to the corners that they see, where that is useful (m, n)."""
        away = np.linalg.norm(ends[:, None] - self.corners, axis=-1)
        i, j = np.nonzero(useful & (away > 1e-9))
        seen = self.visible(ends[i], self.corners[j])
        i, j = i[seen], j[seen]
        edges: list[list[Edge]] = [[] for _ in ends]
        words = segment_words(ends[i], self.corners[j])
        for end, corner, length, word in zip(i.tolist(), j.tolist(), away[i, j].tolist(), words, strict=True):
            edges[end].append((corner, length, word))
        return edges


def segment_words(starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The words of segments from points (n, 2) to as many others."""
    (x0, y0), (x1, y1) = starts.T, ends.T
    order = np.full((len(starts), len(CUTS)), np.inf)  # where on the segment each cut is crossed
    for column, cut in enumerate(CUTS):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (cut.x - x0) / (x1 - x0)
            y = y0 + share * (y1 - y0)
        crossed = ((x0 < cut.x) != (x1 < cut.x)) & (cut.low < y) & (y < cut.high)
        order[crossed, column] = share[crossed]
    words = [""] * len(starts)
    for i in np.flatnonzero(np.isfinite(order).any(axis=1)):
        word = "".join(CUTS[k].name for k in np.argsort(order[i]) if np.isfinite(order[i, k]))
        words[i] = word if x0[i] < x1[i] else word.lower()
    return words


@lru_cache(maxsize=64)
def _graph(radius: float, obstacles: bytes) -> Graph:
    return Graph(radius, np.frombuffer(obstacles).reshape(-1, 3))


def graph(radius: float = GROWN, obstacles: np.ndarray = NO_OBSTACLES) -> Graph:
    """The graph for a radius [m] and obstacles (k, 3); the last ones are kept."""
    return _graph(float(radius), np.ascontiguousarray(obstacles, np.float64).tobytes())


def shortest_ways(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES) -> list[Way]:
    """The shortest way of each class that exists for a start and a goal (2,) [m], the shortest first."""
    start, goal = np.asarray(start, np.float64), np.asarray(goal, np.float64)
    return [way for way in graph(obstacles=obstacles).ways(start, goal, FACTOR) if way.word in WORDS]


def classes(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES) -> tuple[str, ...]:
    """The names of the classes that exist for a start and a goal (2,) [m]: those whose shortest way, past obstacles
    (k, 3) as well, is at most FACTOR times the shortest of all. The shortest first; () where there is no way."""
    return tuple(label_of(way.word) for way in shortest_ways(start, goal, obstacles))


def shortest_length(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES) -> float:
    """The length of the shortest of all ways [m]; infinite where there is none."""
    return min((way.length for way in graph(obstacles=obstacles).ways(start, goal, most=1 + 1e-9)), default=math.inf)
