"""The base of simulated tasks: it checks the render mode and actions, paces steps, renders and closes.

Also formulas on planned paths and spaces that several tasks use. Knows Gymnasium. Knows no simulator and no task.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.scene import Place

WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


class Advance(NamedTuple):
    """What one control period has led to."""

    observation: dict[str, np.ndarray]
    reward: float
    terminated: bool
    info: dict[str, Any]
    """`is_success`, and what else the task says."""


class TaskEnv(gymnasium.Env):
    """The base of all tasks, which keep the whole contract themselves: observations are a flat Dict of Boxes, float32
    but for images, actions a float32 Box (A,) that the task clips itself, every info has `is_success`, and the task is
    Multimodal. No adapter is put around it.

    A task sets `metadata` (see `rendering`), calls `super().__init__(render_mode)`, then sets both spaces and
    `_simulation`, whose window opens if `_window`, and gives its cameras to `_look_through`. It defines `reset`, which
    calls `super().reset(seed=seed)`, and `_advance`; both observe `_images()` too. Here, a step checks its action and
    is paced where a window shows it. Time limits are Gymnasium's: a task never truncates.
    """

    modes: tuple[str, ...] = ()
    """All labels; () where they are not known."""
    _unit = "m"
    """Of the numbers of an action."""
    _simulation: Any
    """Has `render()`, which gives a picture (height, width, 3) uint8, and `close()`, which may be called twice."""

    def __init__(self, render_mode: str | None) -> None:
        """Raises ValueError for an unknown render mode; warns where the window of `human` cannot open."""
        known = self.metadata["render_modes"]
        if render_mode not in (None, *known):
            raise ValueError(f"unknown render_mode {render_mode!r}; choose from {', '.join(known)}")
        self.render_mode = render_mode
        self._window = render_mode == "human" and has_display()
        self._cameras: Mapping[str, Callable[[], np.ndarray]] = {}
        self.looking = True
        """Whether images are drawn; they are black else."""

    def _look_through(self, cameras: Mapping[str, Callable[[], np.ndarray]], size: int) -> None:
        """Observe what cameras see as well, each (size, size, 3) uint8."""
        self._cameras = cameras
        images = {key: gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8) for key in cameras}
        self.observation_space = gymnasium.spaces.Dict({**self.observation_space.spaces, **images})  # pyright: ignore[reportAttributeAccessIssue]

    def _images(self) -> dict[str, np.ndarray]:
        """What the cameras see now."""
        if self.looking:
            return {key: camera() for key, camera in self._cameras.items()}
        shapes = {key: self.observation_space[key].shape for key in self._cameras}  # pyright: ignore[reportIndexIssue]
        return {key: np.zeros(shape, np.uint8) for key, shape in shapes.items()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Act for one control period; raises ValueError for an action that is not finite numbers of the right count."""
        observation, reward, terminated, info = self._advance(self._checked(action))
        if self._window:
            time.sleep(1 / self.metadata["render_fps"])
        return observation, reward, terminated, False, info

    def _advance(self, action: np.ndarray) -> Advance:
        """Simulate one control period under an action (A,) float64: finite, not yet clipped."""
        raise NotImplementedError

    def _checked(self, action: Any) -> np.ndarray:
        action = np.asarray(action, dtype=np.float64)
        (count,) = self.action_space.shape or (0,)
        if action.shape != (count,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {WORDS.get(count, count)} finite numbers [{self._unit}]; got {action}")
        return action

    def render(self) -> np.ndarray | None:
        """A picture (height, width, 3) uint8 for `rgb_array`; the window of `human` draws itself."""
        return self._simulation.render() if self.render_mode == "rgb_array" else None

    def draw_smaller(self, share: float) -> None:
        """Draw this share of a picture's width and height, where that is faster; `pixels` follows."""
        self._simulation.picture_share = share

    def close(self) -> None:
        """Free the simulation; may be called twice."""
        self._simulation.close()


def rendering(control_period: float) -> dict[str, Any]:
    """The `metadata` of a task whose control period is so long [s]."""
    return {"render_modes": ["human", "rgb_array"], "render_fps": 1 / control_period}


def has_display() -> bool:
    """Whether a window can open; warns where it cannot, as a simulator would end the process there."""
    if sys.platform != "linux" or os.environ.get("DISPLAY"):
        return True
    gymnasium.logger.warn("no window: DISPLAY is not set, so render_mode 'human' shows nothing")
    return False


def checked_count(name: str, count: Any, most: int) -> int:
    """A number of things; raises ValueError for what is no whole number from 0 to `most`."""
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not (whole and 0 <= count <= most):
        raise ValueError(f"{name} must be a whole number of 0 to {most}; got {count!r:.60}")
    return int(count)


def float_box(low: Any, high: Any) -> gymnasium.spaces.Box:
    """The space of float32 arrays between bounds of the same shape."""
    low, high = (np.asarray(bound, dtype=np.float32) for bound in (low, high))
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


def path_through(start: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The path from a start (d,) through points (..., steps, d): (..., steps + 1, d)."""
    return np.concatenate([np.broadcast_to(start, (*points.shape[:-2], 1, points.shape[-1])), points], axis=-2)


def path_of_changes(start: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """The path from a start (2,) on which each step adds a change (..., steps, 2): (..., steps + 1, 2)."""
    return path_through(start, start + np.cumsum(changes, axis=-2))


def at_height(xy: np.ndarray, height: float) -> np.ndarray:
    """Points (..., 2) of the plane at a height [m], (..., 3)."""
    return np.concatenate([xy, np.full((*np.shape(xy)[:-1], 1), height)], axis=-1)


def circle(x: float, y: float, radius: float, color: str) -> Place:
    """A disc to be drawn."""
    angles = np.linspace(0, 2 * math.pi, 25)[:-1]
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=-1).tolist()
    return tuple((px, py) for px, py in points), color
