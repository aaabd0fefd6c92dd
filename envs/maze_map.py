"""The maze: a room with blocks, how far points are from what stands in it, and the class of a path.

A class is a homotopy class of paths with fixed ends. From each block a cut leads upwards to the next block or to the
wall. What is left of the free space is simply connected, so the cuts that a path crosses, in order and with their
direction, name its class once each crossing that is taken back at once is dropped (a word of the free group). Knows no
simulator, no search and no episode.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """A box that stands in the room, with sides along the axes."""

    name: str
    """One capital letter."""
    center: tuple[float, float]
    """[m]"""
    half: tuple[float, float]
    """Half of its width and height, seen from above [m]."""


class Cut(NamedTuple):
    """A vertical line from a block upwards to the next block or the wall."""

    name: str
    """Of its block."""
    x: float
    """[m]"""
    low: float
    high: float
    """Its ends' y [m], both within what is not free."""


ROOM = 2.0
"""Half the width and height of the room, whose middle is the origin [m]."""
DISC_RADIUS = 0.1
"""Of the disc that moves [m]."""
BLOCKS = (
    Block("A", (-0.7, 1.1), (0.75, 0.3)),
    Block("B", (1.1, 0.6), (0.35, 0.8)),
    Block("C", (0.65, -1.1), (0.8, 0.3)),
    Block("D", (-1.15, -0.65), (0.3, 0.75)),
    Block("E", (-0.05, 0.0), (0.3, 0.3)),
)
NO_OBSTACLES = np.zeros((0, 3))
BELOW = "below"
"""The word of a path that crosses no cut: it passes below all blocks that it passes."""


def _cut(block: Block) -> Cut:
    (x, y), top = block.center, ROOM + 1.0
    above = [b.center[1] for b in BLOCKS if abs(b.center[0] - x) < b.half[0] and b.center[1] > y]
    return Cut(block.name, x, y, min(above, default=top))


CUTS = tuple(_cut(block) for block in BLOCKS)
_ONE_WAY = (
    "A B C D E A-C a-D A-e B-c C-B D-C c-E E-C D-E A-C-B a-D-C a-D-E A-e-C A-e-d D-C-B E-C-B c-a-D C-B-c c-E-C "
    "D-E-C a-D-E-C b-c-a-D D-E-C-B"
)
MODES = (BELOW, *(label for there in _ONE_WAY.split() for label in (there, there[::-1].swapcase())))
"""The names of all classes, there and back: those that exist (see `maze_paths.classes`) for at least one of a thousand
pairs of a start and a goal."""
WORDS = frozenset("" if mode == BELOW else mode.replace("-", "") for mode in MODES)


# Distances


def box_distance(points: np.ndarray, center: Sequence[float], half: Sequence[float]) -> np.ndarray:
    """Signed distance of points (..., 2) to a box, (...) [m]: negative within it."""
    beyond = np.abs(points - np.asarray(center)) - np.asarray(half)  # (..., 2)
    outside = np.linalg.norm(np.maximum(beyond, 0), axis=-1)
    return outside + np.minimum(beyond.max(axis=-1), 0)


def disc_distance(points: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """Signed distance of points (..., 2) to the nearest of discs (k, 3): x, y, radius [m]; those without a radius are
    none. (...) [m], infinite without any."""
    discs = np.asarray(discs, np.float64).reshape(-1, 3)
    discs = discs[discs[:, 2] > 0]
    away = np.linalg.norm(points[..., None, :] - discs[:, :2], axis=-1) - discs[:, 2]  # (..., k)
    return away.min(axis=-1, initial=np.inf)


def wall_distance(points: np.ndarray) -> np.ndarray:
    """Signed distance of points (..., 2) to the nearest of the blocks and the room's walls, (...) [m]: negative within
    a block and outside of the room."""
    points = np.asarray(points, np.float64)
    blocks = np.stack([box_distance(points, block.center, block.half) for block in BLOCKS])
    return np.minimum(blocks.min(axis=0), -box_distance(points, (0, 0), (ROOM, ROOM)))


def distance(points: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES) -> np.ndarray:
    """Signed distance of points (..., 2) to the nearest block, wall or obstacle (k, 3), (...) [m]. A disc there touches
    nothing where it is more than DISC_RADIUS."""
    points = np.asarray(points, np.float64)
    return np.minimum(wall_distance(points), disc_distance(points, obstacles))


def clearance(paths: np.ndarray, obstacles: np.ndarray = NO_OBSTACLES, parts: int = 4) -> np.ndarray:
    """The smallest gap between the disc and what stands in the room, along paths (..., steps, 2) [m] of which each
    segment is looked at in so many places: (...) [m], positive where it touches nothing."""
    paths = np.asarray(paths, np.float64)
    shares = np.arange(parts)[:, None] / parts
    between = paths[..., :-1, None, :] + shares * np.diff(paths, axis=-2)[..., None, :]  # (..., steps - 1, parts, 2)
    ends = distance(paths[..., -1, :], obstacles)
    return np.minimum(distance(between, obstacles).min(axis=(-2, -1), initial=np.inf), ends) - DISC_RADIUS


# Classes


def crossings(path: np.ndarray) -> str:
    """The cuts that a path (steps, 2) [m] crosses, in their order: the block's letter where it goes to the right, the
    small letter to the left."""
    path = np.asarray(path, np.float64)
    (x0, y0), (x1, y1) = path[:-1].T, path[1:].T
    found: list[tuple[float, str]] = []
    for cut in CUTS:
        for step in np.flatnonzero((x0 < cut.x) != (x1 < cut.x)):
            share = (cut.x - x0[step]) / (x1[step] - x0[step])
            if cut.low < y0[step] + share * (y1[step] - y0[step]) < cut.high:
                found.append((step + share, cut.name if x0[step] < cut.x else cut.name.lower()))
    return "".join(letter for _, letter in sorted(found))


def reduced(word: Iterable[str]) -> str:
    """A word without crossings that are taken back at once, the group's normal form."""
    kept: list[str] = []
    for letter in word:
        if kept and kept[-1] == letter.swapcase():
            kept.pop()
        else:
            kept.append(letter)
    return "".join(kept)


def word_of(path: np.ndarray) -> str:
    """The class of a path (steps, 2) [m] as a reduced word, "" where it crosses nothing."""
    return reduced(crossings(path))


def label_of(word: str) -> str:
    """The readable name of a class: "A-c" passes above block A to the right, then above C to the left."""
    return "-".join(word) or BELOW


def word_of_label(label: str) -> str:
    """What `label_of` was made of."""
    return "" if label == BELOW else label.replace("-", "")


def class_of(path: np.ndarray) -> str:
    """The readable name of the class of a path (steps, 2) [m]."""
    return label_of(word_of(path))
