"""The mouse on the picture of a live session: the action that leads the robot to it, or the push that a body gets.

Knows planes and their projection into a picture. Knows no policy.
"""

from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.commands.live_fan import Lead
from diffusion_policy.config import ConfigError
from diffusion_policy.envs.protocols import Grip, Pictured, Push, as_pictured, as_pushable


class Mouse:
    """Where it is held, and what that means in the plane."""

    def __init__(self, env: gymnasium.Env) -> None:
        self._plane, self._pushable, self._space = as_pictured(env), as_pushable(env), env.action_space
        self._hand: np.ndarray | None = None
        """Where the robot shall go, in shares of the picture's width and height; None where no button is pressed."""
        self.pushing: Push | None = None
        """What each step does to a body, None where none is pushed."""

    @property
    def can_steer(self) -> bool:
        """Whether a point of the picture says where the robot shall go."""
        return self._plane is not None and int(np.prod(self._space.shape or ())) == 2

    @property
    def can_push(self) -> bool:
        """Whether there are bodies that can be pushed."""
        return self._pushable is not None

    @property
    def held(self) -> bool:
        """Whether the robot follows it."""
        return self._hand is not None

    def require_steering(self) -> None:
        """Raise ConfigError where the robot cannot follow it."""
        if not self.can_steer:
            raise ConfigError("only actions of two numbers in a plane can be steered by mouse")

    def steer(self, place: np.ndarray) -> None:
        """Let the robot follow it; `place`: in shares of the picture, (2,)."""
        self.require_steering()
        self._hand, self.pushing = place, None

    def push(self, place: np.ndarray, size: np.ndarray) -> None:
        """Lead the body that is held to a place, or take hold of the one there; `place`: in shares of the picture of a
        `size`, (2,) each. Raises ConfigError where there is none."""
        if self._pushable is None:
            raise ConfigError("this task has no bodies that can be pushed by mouse")
        xy = in_plane(self._pushable, place * size)
        grip: Grip | None = self.pushing.grip if self.pushing else self._pushable.grip(xy)
        if grip is None:
            raise ConfigError("there is nothing here that can be pushed")
        self._hand, self.pushing = None, Push(grip, (float(xy[0]), float(xy[1])))

    def release(self) -> None:
        """Nobody holds it any more."""
        self._hand = self.pushing = None

    def let_go(self) -> None:
        """Push nothing any more: the bodies lie elsewhere."""
        self.pushing = None

    def action(self, lead: Lead, size: np.ndarray) -> np.ndarray:
        """The action that leads to it, as far as the action space goes; without a button, one that stays. `size`: of
        the picture, (2,) [px]."""
        assert self._plane is not None
        place = _end(lead, np.zeros(2))
        columns = [_end(lead, axis) - place for axis in np.eye(2)]
        start = lead(np.zeros((1, 2)))
        assert start is not None
        wanted = start[0] if self._hand is None else in_plane(self._plane, self._hand * size)
        action = np.linalg.lstsq(np.stack(columns, axis=1), wanted - place, rcond=None)[0]
        space: Any = self._space
        return np.clip(action, space.low.reshape(-1), space.high.reshape(-1))


def _end(lead: Lead, action: np.ndarray) -> np.ndarray:
    """Where one action (2,) leads, (2,)."""
    path = lead(action[None])
    assert path is not None
    return path[-1]


def in_plane(plane: Pictured, pixel: np.ndarray) -> np.ndarray:
    """The point of the plane, (2,), at a place in the picture (2,) [px]: the inverse of the projection (a
    homography)."""
    scene = plane.scene
    corners = np.array([[x, y] for x in scene.x_range for y in scene.y_range])
    seen = np.asarray(plane.pixels(corners), np.float64)
    rows = []
    for (x, y), (u, v) in zip(corners, seen, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v, -x], [0, 0, 0, u, v, 1, -y * u, -y * v, -y]]
    matrix = np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)
    x, y, w = matrix @ [*pixel, 1]
    low, high = np.sort([scene.x_range, scene.y_range], axis=1).T
    return np.clip([x / w, y / w], low, high)
