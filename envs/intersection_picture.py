"""What Intersection looks like from above. Knows numbers. Knows no environment."""

import math
from collections.abc import Callable

import numpy as np

from diffusion_policy.envs.intersection_traffic import HALF, LENGTH, OFFSET, WIDTH
from diffusion_policy.envs.scene import Scene

X_RANGE, Y_RANGE = (-60.0, 60.0), (-75.0, 45.0)
"""The plane that is drawn [m], a square."""
ROAD = 2 * OFFSET
"""Half of its width [m]."""
PICTURE_SIZE = 480
"""Width and height of `render`'s picture [px]."""
GRASS, ASPHALT, MARK = (222, 229, 214), (120, 128, 138), (240, 240, 240)
COLORS = ((0, 114, 178), (213, 94, 0), (70, 70, 80), (70, 70, 80))
"""Of the cars: the ego car is blue, car 1 is orange."""
ROAD_COLOR, LINE_COLOR = "#7b8794", "#1f2933"
"""Of the scene."""
Corners = tuple[tuple[float, float], ...]


def rectangle(left: float, right: float, bottom: float, top: float) -> Corners:
    """Its corners, from the lower left one on [m]."""
    return (left, bottom), (right, bottom), (right, top), (left, top)


LINES = (
    rectangle(0.0, ROAD, -HALF - 0.5, -HALF),
    rectangle(-ROAD, 0.0, HALF, HALF + 0.5),
    rectangle(HALF, HALF + 0.5, 0.0, ROAD),
    rectangle(-HALF - 0.5, -HALF, -ROAD, 0.0),
)
"""Where the cars of each arm wait."""
ROADS = (
    rectangle(-ROAD, ROAD, *Y_RANGE),
    rectangle(X_RANGE[0], -ROAD, -ROAD, ROAD),
    rectangle(ROAD, X_RANGE[1], -ROAD, ROAD),
)
JUNCTION = Scene(
    X_RANGE,
    Y_RANGE,
    places=(*((corners, ROAD_COLOR) for corners in ROADS), *((corners, LINE_COLOR) for corners in LINES)),
)


def to_pixels(xy: np.ndarray, side: int) -> np.ndarray:
    """Where points (..., 2) of the plane lie in a square picture, (..., 2) [px], column and row."""
    scale = side / (X_RANGE[1] - X_RANGE[0])
    return (np.asarray(xy) - [X_RANGE[0], Y_RANGE[1]]) * [scale, -scale]


class Picture:
    """What `render` draws."""

    def __init__(self, poses: Callable[[], tuple[np.ndarray, np.ndarray]]) -> None:
        """`poses` gives where the cars are, (cars, 2) [m], and their headings, (cars,) [rad]."""
        self._poses = poses
        self.picture_share = 1.0

    @property
    def side(self) -> int:
        """Width and height of the picture [px]."""
        return round(PICTURE_SIZE * self.picture_share)

    def render(self) -> np.ndarray:
        """The picture, (side, side, 3) uint8."""
        return self.draw(self.side)

    def draw(self, side: int) -> np.ndarray:
        """The junction with all cars, (side, side, 3) uint8; no car is smaller than a pixel and a half."""
        scale = (X_RANGE[1] - X_RANGE[0]) / side
        away = (np.arange(side) + 0.5) * scale
        x, y = np.meshgrid(X_RANGE[0] + away, Y_RANGE[1] - away)
        picture = np.full((side, side, 3), GRASS, np.uint8)
        for shapes, color in ((ROADS, ASPHALT), (LINES, MARK)):
            for (left, bottom), _, (right, top), _ in shapes:
                picture[(x > left) & (x < right) & (y > bottom) & (y < top)] = color
        for place, heading, color in zip(*self._poses(), COLORS, strict=False):
            ahead, aside = math.cos(heading), math.sin(heading)
            dx, dy = x - place[0], y - place[1]
            along, across = np.abs(dx * ahead + dy * aside), np.abs(dy * ahead - dx * aside)
            picture[(along < max(LENGTH, 1.5 * scale) / 2) & (across < max(WIDTH, 1.5 * scale) / 2)] = color
        return picture

    def close(self) -> None:
        """Nothing is held."""
