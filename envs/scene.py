"""The plane of a task, for drawing. Knows shapes. Knows no simulator."""

from typing import NamedTuple

Place = tuple[tuple[tuple[float, float], ...], str]
"""Where something shall be: the corners (x, y) of a polygon, and its colour."""


class Scene(NamedTuple):
    """Shapes in the plane, seen from above, x to the right and y up (down, where `y_range` falls)."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    circles: tuple[tuple[float, float, float], ...] = ()
    """Obstacles: centre x, centre y, radius."""
    finish_y: float | None = None
    """The goal is everything above this line."""
    places: tuple[Place, ...] = ()
    unit: str = "m"
