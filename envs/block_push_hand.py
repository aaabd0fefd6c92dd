"""A hand that pushes the blocks of BlockPush: a spring of bounded force whose end moves at a bounded speed.

Knows blocks on a table. Knows no robot and no task.
"""

import math
from collections.abc import Callable

import numpy as np

from diffusion_policy.envs.protocols import Grip, Push
from diffusion_policy.envs.simulation import Simulation

SPEED = 0.5
"""Of the hand at most [m/s]."""
FORCE = 0.5
"""Of the hand at most [N]: five times what friction holds a block with, and far less than what the arm pushes with."""
REACH = 0.015
"""A hand grips a block that lies no farther away than this [m]."""


class Hand:
    """Grips and leads cubes of one size that lie on the table."""

    def __init__(self, simulation: Simulation, blocks: tuple[str, ...], size: float) -> None:
        """`size` [m]."""
        self._simulation, self._blocks, self._half = simulation, blocks, size / 2

    def grip(self, xy: np.ndarray) -> Grip | None:
        """The block that is seen at, or next to, a point (2,) of the table [m]."""
        seen = self._simulation.seen_at(np.asarray(xy), self._half)
        found: list[tuple[float, Grip]] = []
        for name in self._blocks:
            *center, yaw = self._simulation.position_and_yaw(name)
            wanted = _turned(seen - center, -yaw)
            held = np.clip(wanted, -self._half, self._half)
            found.append((float(np.linalg.norm(wanted - held)), Grip(name, (float(held[0]), float(held[1])))))
        away, grip = min(found)
        return grip if away <= REACH else None

    def lead(self, push: Push, period: float, steps: int, before_step: Callable[[float], None]) -> None:
        """Simulate a control period [s] in so many steps while a block is pushed; `before_step` hears what is left of
        the period [s]."""
        (name, point), goal = push.grip, self._simulation.seen_at(np.asarray(push.xy), self._half)
        *center, yaw = self._simulation.position_and_yaw(name)
        start = center + _turned(np.asarray(point), yaw)
        way = goal - start
        way *= min(1.0, SPEED * period / max(float(np.linalg.norm(way)), 1e-9))
        with self._simulation.holding(name, (*point, 0.0), FORCE) as lead:
            for step in range(steps):
                before_step(period * (1 - step / steps))
                lead((*(start + way * ((step + 1) / steps)), self._half))
                self._simulation.step()


def _turned(xy: np.ndarray, yaw: float) -> np.ndarray:
    """A vector (2,) turned by an angle [rad]."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, -sin], [sin, cos]]) @ xy
