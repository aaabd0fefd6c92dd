"""Experts, modes and success for a few environments of others: examples to start your own from.

An expert is called with a mode's label (None where the task has no modes) and gives `act(observation) -> action`, where
the observation is the flat one that `adapters` makes. It is named on the command line as `module:Class`, functions as
`module:function`; both may lie in a file of the working directory.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# panda-gym (Gallouédec et al. 2021, arXiv 2106.13687): an action of length 1 asks the hand to move 5 cm; 25 a second

STEP = 0.05
"""What one unit of an action asks for [m]."""
GAIN = 1 / STEP
"""The action that covers a distance in one step, if the arm kept up [1/m]."""


class PandaReachExpert:
    """Moves the hand of `panda_gym:PandaReach-v3` straight to its goal; it slows down within 5 cm of it."""

    def __init__(self, mode: str | None = None, speed: float = 0.3) -> None:
        """`mode`: there are none; `speed`: largest length of an action, up to 1."""
        _refuse_mode(mode)
        self._speed = speed

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next displacement, (3,), in units of 5 cm."""
        return _shorten(GAIN * (observation["desired_goal"] - observation["achieved_goal"]), self._speed)


class PandaPushExpert:
    """Pushes the box of `panda_gym:PandaPush-v3` to its goal: over the box to the far side, down, and straight on.

    It keeps no state: where hand, box and goal lie says what comes next. While it pushes, it steers back over the
    line from the box to the goal; when it has slipped off the box, it goes round again.
    """

    def __init__(self, mode: str | None = None, speed: float = 0.6) -> None:
        """`mode`: there are none; `speed`: largest length of an action, up to 1. A faster hand sends the box astray."""
        _refuse_mode(mode)
        self._speed = speed

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next displacement, (3,), in units of 5 cm."""
        hand, box = observation["observation"][:3], observation["achieved_goal"][:2]
        to_goal = observation["desired_goal"][:2] - box
        forward = to_goal / max(np.linalg.norm(to_goal), 1e-9)
        along = (hand[:2] - box) @ forward
        lateral = hand[:2] - box - along * forward
        to_start = box - 0.055 * forward - hand[:2]  # the box is 4 cm wide
        slack = 0.015 + 0.5 * max(0.0, -along - 0.05)  # further back there is more room to steer
        if hand[2] < 0.05 and along < 0 and np.linalg.norm(lateral) < slack:
            move = [*(0.03 * forward - 2 * lateral), 0.02 - hand[2]]
        elif np.linalg.norm(to_start) < 0.02:
            move = [*to_start, 0.02 - hand[2]]
        elif hand[2] < 0.06 and np.linalg.norm(hand[:2] - box) < 0.07:
            move = [*(0.1 * to_start), 0.08 - hand[2]]  # first up, so that it does not drag the box along
        else:
            move = [*to_start, 0.08 - hand[2]]
        return _shorten(GAIN * np.array(move), self._speed)


def _refuse_mode(mode: str | None) -> None:
    if mode is not None:
        raise ValueError(f"this expert knows no modes; got {mode!r}")


def _shorten(action: np.ndarray, length: float) -> np.ndarray:
    """The action, no longer than `length`."""
    return (action * min(1.0, length / max(np.linalg.norm(action), 1e-9))).astype(np.float32)


# Gymnasium's MountainCarContinuous-v0 (Moore 1990): a car too weak for the hill swings up, to either side first

MOUNTAIN_CAR_MODES = ("left", "right")
POWER, GRAVITY = 0.0015, 0.0025
"""Of the car's engine and of the hill, each a change of the velocity in one step."""


class MountainCarExpert:
    """Swings the car up: full force to the mode's side until it moves, then always with the motion.

    Pushing with the motion adds energy, and less force wastes less of the reward: it gets more than 94.
    """

    def __init__(self, mode: str | None, strength: float = 0.5) -> None:
        """`mode`: "left" or "right"; `strength`: the force while it swings, up to 1."""
        if mode not in MOUNTAIN_CAR_MODES:
            raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(MOUNTAIN_CAR_MODES)}")
        self._side = -1.0 if mode == "left" else 1.0
        self._strength = strength

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next force, (1,)."""
        position, velocity = observation["observation"]
        energy = velocity**2 / 2 + GRAVITY / 3 * (np.sin(3 * position) + 1)  # 0 at rest in the valley
        begun = energy > POWER / 10
        return np.array([self._strength * np.sign(velocity) if begun else self._side], np.float32)


def mountain_car_mode(observations: Mapping[str, np.ndarray]) -> str | None:
    """The side to which the car first went by 0.05; None while it has not."""
    moved = observations["observation"][:, 0] - observations["observation"][0, 0]  # (steps + 1,)
    away = moved[np.abs(moved) > 0.05]
    return None if len(away) == 0 else "left" if away[0] < 0 else "right"


def mountain_car_success(observation: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> bool:
    """Whether the car is at the flag; `return>=90` asks for more, that little force was used."""
    return bool(observation["observation"][0] >= 0.45)
