"""The T of Push-T: its shape, where its points lie in a pose, and the poses that are goals.

Knows poses x, y [px] and angle [rad], y downwards. Knows no simulator.
"""

from typing import Any

import numpy as np

SIZE = 512
"""The plane is a square of this width [px]; walls stand 5 px inside its edges."""

KEYPOINTS = np.array(
    [
        (9.26979, 90.04097),
        (-60.98347, -1.18673),
        (60.91276, -1.39336),
        (-0.27050, 25.54363),
        (-14.06493, 122.81585),
        (39.00274, 32.85740),
        (-39.96642, 32.72966),
        (-16.82434, 62.86318),
        (23.54146, -1.70029),
    ]
)
"""The nine keypoints in the block's own frame, (9, 2) [px], found by turning the published `data/keypoint` back by
`data/state`. They agree to 2e-5 px where nothing touches the block; where it overlaps with the agent, the recorded
ones lie up to 2 px ahead (0.03 px in 99 % of all steps): they were taken a moment later, on the block's way out."""

CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)])
"""The block's outline in its own frame, (8, 2) [px]."""
BARS = np.array([[(-60, 0), (60, 30)], [(-15, 0), (15, 120)]])
"""The lower and upper corners of its two bars, (2, 2, 2) [px]."""
FIXED_GOAL = np.array([256.0, 256.0, np.pi / 4])
"""The published goal: where the block's origin shall be [px], and how it shall be turned [rad]."""
GOAL_MARGIN = 120.0
"""No goal's centre of gravity is drawn nearer to an edge of the plane than this [px]: the T reaches 77 px from there,
so that the agent, 30 px wide, can still push it from between it and the wall."""
CENTER_OF_GRAVITY_Y = 45.0
"""The centre of gravity lies at (0, 45) in the block's own frame [px]."""


def place(points: np.ndarray, position: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Where points (n, 2) [px] of the block lie when it is at `position` (..., 2) [px], turned by `angle` (...) [rad]:
    (..., n, 2) [px]."""
    cos, sin = np.cos(angle), np.sin(angle)
    turned_back = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # (..., 2, 2), for row vectors
    return points @ turned_back + position[..., None, :]


def keypoints(state: np.ndarray) -> np.ndarray:
    """Where the nine keypoints of the block lie, (..., 9, 2) [px], in states (..., 5)."""
    state = np.asarray(state)
    return place(KEYPOINTS, state[..., 2:4], state[..., 4])


def draw_goal(random: np.random.Generator) -> np.ndarray:
    """A goal (3,) anywhere in the plane, see GOAL_MARGIN, turned in any way."""
    center, angle = random.uniform(GOAL_MARGIN, SIZE - GOAL_MARGIN, 2), random.uniform(0, 2 * np.pi)
    return np.array([*place(np.array([[0.0, -CENTER_OF_GRAVITY_Y]]), center, angle)[0], angle])


def checked_goal(goal: Any) -> np.ndarray:
    """A goal as an array (3,), its angle in [0, 2 pi); raises ValueError for what is none."""
    try:
        array = np.asarray(goal, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (3,) or not np.isfinite(array).all() or (array[:2] < 0).any() or (array[:2] > SIZE).any():
        raise ValueError(f"a goal is x, y between 0 and {SIZE} [px] and a finite angle [rad]; got {goal!r:.100}")
    return np.array([*array[:2], array[2] % (2 * np.pi)])


def goal_place(goal: np.ndarray) -> tuple[tuple[tuple[float, float], ...], str]:
    """The outline of a goal (3,), as `Scene` takes it."""
    corners = place(CORNERS, goal[:2], goal[2]).tolist()
    return tuple((x, y) for x, y in corners), "lightgreen"
