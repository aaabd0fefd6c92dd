"""What stands before the Panda: a divider on the table and a gate above it; and the ways past them.

Knows numbers. Knows no simulator.
"""

from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """Along the axes of the world."""

    name: str
    center: tuple[float, float, float]
    """[m]"""
    half: tuple[float, float, float]
    """Half the size [m]."""


DIVIDER_X = 0.47
"""Where divider and beam begin, seen from the arm [m]."""
BEAM_Z = 0.66
"""The middle of the beam [m]."""
BOXES = (
    Box("divider", (0.61, 0.0, 0.14), (0.14, 0.02, 0.14)),
    Box("beam", (0.655, 0.0, BEAM_Z), (0.185, 0.02, 0.03)),
    Box("post", (0.86, 0.0, 0.345), (0.02, 0.02, 0.345)),
)
"""They stand in all episodes, between the two sides y > 0 and y < 0."""
ARRAY = np.array([(*box.center, *box.half) for box in BOXES])
"""(3, 6) [m]"""
MODES = ("near", "through", "over")
"""Ways of the tool past the gate: between it and the arm's base, between divider and beam, above the beam."""
OBSTACLE_RADII = (0.04, 0.06, 0.08)
"""Of the balls that can be in the arm's way [m]."""
NO_OBSTACLES = np.zeros((0, 4))


def mode_of(tool: np.ndarray) -> str | None:
    """Where a path of the tool (steps, 3) [m] last crosses the plane of the gate; None where it ends on the side on
    which it began."""
    side = tool[:, 1] > 0
    crossings = np.flatnonzero(side[1:] != side[:-1])
    if len(crossings) == 0 or side[0] == side[-1]:
        return None
    before, after = tool[crossings[-1]], tool[crossings[-1] + 1]
    x, _, z = before + (after - before) * before[1] / (before[1] - after[1])
    if z > BEAM_Z:
        return "over"
    return "near" if x < DIVIDER_X else "through"
