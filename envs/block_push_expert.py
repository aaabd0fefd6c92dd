"""The scripted expert of BlockPush: one order at a time, a function of the present observation alone.

Like the published oracle it goes behind a block, as seen from its target, and pushes it there; then the other block. In
place of the oracle's phases stands a feedback law, so that nothing is hidden from a policy that sees one observation.
"""

import math
from collections.abc import Mapping

import numpy as np

from diffusion_policy.envs.block_push_state import BLOCKS, COMMAND, MODES, TARGETS, block_xy, target_xy

MOVE_STEP = 0.025
"""Longest step on the way to a block [m]."""
PUSH_STEP = 0.012
"""Length of a step while pushing [m]; steps on the way shorten to it as they come near."""
BEHIND = 0.05
"""It goes to so far behind the block's centre before it pushes [m]."""
TOUCHING = 0.035
"""So far behind the block's centre, the rod is about to touch it [m]."""
CLEARANCE = 0.05
"""It passes blocks at this distance from their centres [m]."""
MAX_OFFSET = 0.01
"""The farthest off the block's middle that it pushes, to turn the block [m]."""
THERE = 0.04
"""A block so near to its target is there [m]."""
STILL_THERE = 0.047
"""A block that the rod has left is there up to this distance [m]: less than the task's tolerance."""


class BlockPushExpert:
    """Pushes with steering: where a face of the block does not look to its target, the rod pushes off its middle, which
    turns it. Steps are changes of the commanded position, whose pose counts as the rod's; it keeps no state.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
        block, target = mode.split("-")
        first, goal = BLOCKS.index(block), TARGETS.index(target)
        self._pairs = ((first, goal), (1 - first, 1 - goal))

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next change of the commanded position, (2,) [m]."""
        state = np.asarray(observation["state"], dtype=np.float64)
        rod, blocks, targets = state[COMMAND], block_xy(state), target_xy(state)
        first, goal = self._pairs[0]
        pushed, goal = self._pairs[1] if _is_there(blocks[first], targets[goal], rod) else self._pairs[0]
        way = targets[goal] - blocks[pushed]
        forward = way / np.linalg.norm(way)
        left = np.array([-forward[1], forward[0]])
        ahead, aside = (rod - blocks[pushed]) @ forward, (rod - blocks[pushed]) @ left
        turn = _quarter_turn(math.atan2(way[1], way[0]) - state[3 * pushed + 2])
        off_middle = -np.clip(0.04 * turn, -MAX_OFFSET, MAX_OFFSET) - aside
        if ahead < -0.02 and abs(off_middle) < 0.012 + 0.3 * max(0.0, -ahead - TOUCHING):  # in the funnel behind it
            direction = forward + np.clip(off_middle / 0.012, -1.5, 1.5) * left
            action = PUSH_STEP * direction / np.linalg.norm(direction)
        else:
            action = _approach(rod, blocks[pushed] - BEHIND * forward, blocks)
        return action.astype(np.float32)


def _is_there(block: np.ndarray, target: np.ndarray, rod: np.ndarray) -> bool:
    away = np.linalg.norm(block - target)
    return bool(away < THERE or (away < STILL_THERE and np.linalg.norm(rod - block) > 0.04))


def _quarter_turn(angle: float) -> float:
    """An angle [rad] as what differs from whole quarter turns, -pi/4 to pi/4: a cube looks the same after one."""
    return (angle + math.pi / 4) % (math.pi / 2) - math.pi / 4


def _approach(rod: np.ndarray, goal: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """A step towards a place, around the nearest block that is in the way."""
    way = goal - rod
    distance = float(np.linalg.norm(way))
    if distance < 1e-9:
        return way
    direction = way / distance
    for block in sorted(blocks, key=lambda block: np.linalg.norm(block - rod)):
        if _in_the_way(block - rod, direction, distance):
            direction = _around(block - rod, direction)
            break
    return min(MOVE_STEP, PUSH_STEP + 0.15 * distance) * direction


def _in_the_way(block: np.ndarray, direction: np.ndarray, distance: float) -> bool:
    """Whether a straight way of some length [m] passes too near to a block, which is seen from the rod (2,) [m]."""
    ahead = block @ direction
    aside = abs(block[1] * direction[0] - block[0] * direction[1])
    return bool(0 < ahead <= distance + 0.02 and aside < CLEARANCE - 0.002 and np.linalg.norm(block) <= 0.12)


def _around(block: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The direction nearest to the wanted one that is tangent to the clearance circle around a block; within the circle
    also outwards. The block is seen from the rod, (2,) [m]."""
    radius = float(np.linalg.norm(block))
    outward = -block / radius
    tangent = np.array([-outward[1], outward[0]])
    if tangent @ direction < 0:
        tangent = -tangent
    if radius > CLEARANCE:
        sine = CLEARANCE / radius
        return tangent * sine - outward * math.sqrt(1 - sine**2)
    result = tangent + outward * min(1.0, (CLEARANCE - radius) / 0.02)
    return result / np.linalg.norm(result)
