"""The plane in which a task is solved, described for whoever draws paths in it."""

from typing import NamedTuple


class Scene(NamedTuple):
    """Shapes in the plane [m], seen from above, x to the right and y up."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    circles: tuple[tuple[float, float, float], ...]
    """Obstacles: centre x, centre y, radius."""
    finish_y: float
    """The goal is everything above this line."""
