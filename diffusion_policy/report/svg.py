"""What the page draws itself, as SVG: paths in the plane of a scene, and the tree of modes.

Knows arrays and counts. Knows no page and no matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

WIDTH = 1000
"""Of a picture of the plane [SVG units]; its points are whole units."""
MOST_POINTS = 120
"""Points of an outline; a longer path is thinned out."""
TREE_WIDTH, LABEL_WIDTH, BANDS, LEAF_HEIGHT, LEAF_GAP = 540, 170, 72, 28, 10
"""Of the tree of modes [SVG units]: all of it, the labels at its right, the bands of all successes (and those of all
demonstrations) side by side, the least height of a leaf, and the gap between the bands of two leaves."""


class SceneLike(Protocol):
    """What is drawn of a scene (`envs.scene.Scene`): the plane that paths are drawn in; y grows upwards, or downwards
    where `y_range` falls."""

    @property
    def x_range(self) -> tuple[float, float]: ...
    @property
    def y_range(self) -> tuple[float, float]: ...
    @property
    def circles(self) -> Sequence[tuple[float, float, float]]: ...
    @property
    def finish_y(self) -> float | None: ...
    @property
    def places(self) -> Sequence[tuple[Sequence[tuple[float, float]], str]]: ...
    @property
    def unit(self) -> str: ...


class Plane:
    """A scene as a picture, WIDTH wide, `height` high, (0, 0) at its top left."""

    def __init__(self, scene: SceneLike) -> None:
        (left, right), (bottom, top) = scene.x_range, scene.y_range
        self.scale = WIDTH / (right - left)
        """SVG units for one unit of the scene."""
        self.height = round(self.scale * abs(top - bottom))
        self._top_left = np.array([left, top])
        self._direction = np.array([1, -1 if top > bottom else 1])

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Points (..., 2) of the scene in the picture, whole units."""
        return np.rint((np.asarray(xy) - self._top_left) * self._direction * self.scale).astype(int)

    def points(self, xy: np.ndarray) -> str:
        """A path (steps, 2) of the scene as `x,y x,y ...`, every step."""
        return " ".join(f"{x},{y}" for x, y in self.pixels(xy))

    def outline(self, xy: np.ndarray) -> str:
        """A path (steps, 2) of the scene as `x,y x,y ...`, thinned out to MOST_POINTS."""
        return self.points(xy[np.unique(np.linspace(0, len(xy) - 1, min(len(xy), MOST_POINTS)).astype(int))])


class Branch(NamedTuple):
    """A node of the tree: modes that begin alike, and the two bands that lead to it from the node before."""

    name: str
    """The last of the words that these modes share."""
    mode: str | None
    """The whole label where only one mode is left."""
    successes: int
    demonstrations: int
    x: float
    y: float
    """Where the bands end: successes above this line, demonstrations below."""
    widths: tuple[float, float]
    """Of the bands of successes and of demonstrations, in proportion to the counts."""
    curves: tuple[str, str]
    """The middle lines of the bands, as SVG paths."""


class Tree(NamedTuple):
    """Modes as ways that part; all of it lies within `width` and `height`."""

    root: Branch
    branches: list[Branch]
    """Level by level, from top to bottom."""
    width: float
    height: float


def mode_tree(modes: Sequence[str], succeeded: Mapping[str, int], demonstrated: Mapping[str, int]) -> Tree | None:
    """The tree of labels like `left-middle`, one word a decision; None where they are not two or more words each, and
    equally many in all of them."""
    labels = [tuple(mode.split("-")) for mode in modes]
    if len(labels) < 2 or len({len(words) for words in labels}) != 1 or len(labels[0]) == 1:
        return None
    layout = _Layout(labels, succeeded, demonstrated)
    root, *branches = [layout.branch(prefix) for prefix in sorted(layout.spans, key=len)]
    return Tree(root, branches, TREE_WIDTH, float(layout.edges[-1]))


class _Layout:
    """Where everything of the tree lies."""

    def __init__(
        self, labels: Sequence[tuple[str, ...]], succeeded: Mapping[str, int], demonstrated: Mapping[str, int]
    ) -> None:
        self.depth = len(labels[0])
        leaves = _beside_their_kin(labels)
        self.spans: dict[tuple[str, ...], tuple[int, int]] = {}
        """First and last leaf, the last exclusive, of every beginning of a label; the empty one is the root."""
        for i, words in enumerate(leaves):
            for level in range(self.depth + 1):
                first, _ = self.spans.get(words[:level], (i, i))
                self.spans[words[:level]] = (first, i + 1)
        self.counts = np.array([[of.get("-".join(words), 0) for of in (succeeded, demonstrated)] for words in leaves])
        self.widths = BANDS * self.counts / np.maximum(1, self.counts.sum(axis=0))
        self.edges = np.cumsum([0, *np.maximum(LEAF_HEIGHT, self.widths.sum(axis=1) + LEAF_GAP)])
        """The top of each leaf, and the bottom of the last."""

    def end(self, prefix: tuple[str, ...]) -> tuple[float, float]:
        """Where the bands to a node end: in the middle of the leaves that it leads to."""
        first, last = self.spans[prefix]
        above, below = self.widths[first:last].sum(axis=0)
        return (
            len(prefix) * (TREE_WIDTH - LABEL_WIDTH) / self.depth,
            (self.edges[first] + self.edges[last] + above - below) / 2,
        )

    def branch(self, prefix: tuple[str, ...]) -> Branch:
        first, last = self.spans[prefix]
        x, y = self.end(prefix)
        above, below = self.widths[first:last].sum(axis=0)
        successes, demonstrations = self.counts[first:last].sum(axis=0)
        return Branch(
            name=prefix[-1] if prefix else "",
            mode="-".join(prefix) if len(prefix) == self.depth else None,
            successes=int(successes),
            demonstrations=int(demonstrations),
            x=round(x, 1),
            y=round(float(y), 1),
            widths=(round(float(above), 1), round(float(below), 1)),
            curves=self._curves(prefix) if prefix else ("", ""),
        )

    def _curves(self, prefix: tuple[str, ...]) -> tuple[str, str]:
        """From the parent's bands, below what its upper children take of them."""
        first, last = self.spans[prefix]
        parent_first, parent_last = self.spans[prefix[:-1]]
        (x0, y0), (x1, y1) = self.end(prefix[:-1]), self.end(prefix)
        taken, own = self.widths[parent_first:first].sum(axis=0), self.widths[first:last].sum(axis=0)
        top = y0 - self.widths[parent_first:parent_last, 0].sum()
        return (
            _curve(x0, top + taken[0] + own[0] / 2, x1, y1 - own[0] / 2),
            _curve(x0, y0 + taken[1] + own[1] / 2, x1, y1 + own[1] / 2),
        )


def _beside_their_kin(labels: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Labels that begin alike side by side, else in the order in which they came."""
    beginnings = [words[:level] for words in labels for level in range(1, len(words) + 1)]
    rank = {beginning: i for i, beginning in reversed(list(enumerate(beginnings)))}
    return sorted(labels, key=lambda words: [rank[words[:level]] for level in range(1, len(words) + 1)])


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (x0 + x1) / 2
    return f"M{x0:.1f},{y0:.1f} C{middle:.1f},{y0:.1f} {middle:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"
