"""What a state of BlockPush means: places of blocks and targets, success, mode.

Functions of states (..., 16): red block x, y [m], yaw [rad]; blue block likewise; effector x, y; commanded effector x,
y; green target x, y, yaw; yellow target likewise. Knows no simulator.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BLOCKS = ("red", "blue")
"""The cubes, in the order of the observation."""
TARGETS = ("green", "yellow")
"""The square zones, in the order of the observation."""
MODES = tuple(f"{block}-{target}" for block in BLOCKS for target in TARGETS)
"""The block that comes first, then the target in which it ends: `red-green`."""
TOLERANCE = 0.05
"""A block is in a target when their centres are at most this far apart [m]."""
MOVED = 1e-3
"""A block has been reached when it has moved this far [m]."""
FIRST_REWARD = 0.49
FINAL_REWARD = 0.51
NEAR = 0.06
"""A planned path that comes as near as this to a block [m] chooses it."""

COMMAND = slice(8, 10)
EFFECTOR = slice(6, 8)
_BLOCKS = np.array([[0, 1], [3, 4]])
_TARGETS = np.array([[10, 11], [13, 14]])


def block_xy(state: np.ndarray) -> np.ndarray:
    """The blocks' centres in states (..., 16), (..., 2 blocks, 2) [m]."""
    return state[..., _BLOCKS]


def target_xy(state: np.ndarray) -> np.ndarray:
    """The targets' centres in states (..., 16), (..., 2 targets, 2) [m]."""
    return state[..., _TARGETS]


def distances(state: np.ndarray) -> np.ndarray:
    """From each block to each target in states (..., 16), (..., 2 blocks, 2 targets) [m]."""
    apart = state[..., _BLOCKS][..., :, None, :] - state[..., _TARGETS][..., None, :, :]
    return np.sqrt((apart.astype(np.float64) ** 2).sum(axis=-1))


def solved(away: np.ndarray) -> np.ndarray:
    """Whether the blocks are in two different targets, each in the one nearest to it; `distances` -> (...)."""
    nearest = away.argmin(axis=-1)
    return (away.min(axis=-1) <= TOLERANCE).all(axis=-1) & (nearest[..., 0] != nearest[..., 1])


def relative_features(state: np.ndarray) -> np.ndarray:
    """What a policy needs to know without absolute positions; states (..., 16) -> (..., 22).

    0:4 both blocks, 4:6 the measured effector, 6:10 both targets, all minus the commanded effector [m]; 10:14 cosine
    and sine of 4 yaw of each block (a cube looks the same after a quarter turn); 14:22 each block minus each target
    [m], in the order of MODES.
    """
    command = state[..., COMMAND]
    blocks, targets = block_xy(state), target_xy(state)
    yaw = 4 * state[..., [2, 5]]
    turned = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)
    pairs = blocks[..., :, None, :] - targets[..., None, :, :]
    rest = state.shape[:-1]
    parts = [
        (blocks - command[..., None, :]).reshape(*rest, 4),
        state[..., EFFECTOR] - command,
        (targets - command[..., None, :]).reshape(*rest, 4),
        turned.reshape(*rest, 4),
        pairs.reshape(*rest, 8),
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class Progress(NamedTuple):
    """What an episode has achieved so far."""

    started_at: np.ndarray
    """Where the blocks lay at the start, (2 blocks, 2) [m]."""
    steps: int = 0
    rewards: frozenset[float] = frozenset()
    """The different rewards so far."""
    events: Mapping[str, int] = {}
    """The step at which each event was first seen."""

    def after(self, state: np.ndarray, away: np.ndarray) -> tuple["Progress", float]:
        """The progress after a step that led to a state (16,), and the step's reward; `away`: its `distances`."""
        steps, events, reward = self.steps + 1, dict(self.events), 0.0
        for i, (x, y) in enumerate((block_xy(state) - self.started_at).tolist()):
            if math.hypot(x, y) > MOVED:
                events.setdefault(f"REACH_{i}", steps)
        for i, j in np.argwhere(away <= TOLERANCE):
            event = f"TARGET_{i}_{j}"
            if event not in events:
                events[event] = steps
                reward = FIRST_REWARD
        if solved(away):
            reward = FINAL_REWARD
        return Progress(self.started_at, steps, self.rewards | {reward}, events), reward

    @property
    def measures(self) -> dict[str, float]:
        """`score`, the sum of the different rewards; `p1` and `p2`, whether it passes 0.4 and 0.9."""
        score = sum(self.rewards)
        return {"score": score, "p1": float(score > 0.4), "p2": float(score > 0.9)}


def mode_of(states: np.ndarray) -> str | None:
    """The block that came first and its target, from an episode's states (steps + 1, 16); None unless the blocks came
    to lie in two different targets.

    Of the two entries that make the final assignment the earlier counts: a block that only crosses the other target
    does not decide.
    """
    away = distances(states)  # (steps + 1, 2, 2)
    ends = np.flatnonzero(solved(away))
    if len(ends) == 0:
        return None
    inside = away <= TOLERANCE
    assignment = away[ends[-1]].argmin(axis=-1)
    entered = [int(inside[:, i, j].argmax()) for i, j in enumerate(assignment)]
    first = int(np.argmin(entered))
    return f"{BLOCKS[first]}-{TARGETS[assignment[first]]}"


def chosen_block(state: np.ndarray, path: np.ndarray) -> str | None:
    """The block that a planned path (steps, 2) of the commanded position comes nearest to, if nearer than NEAR; None
    elsewhere, and once a block is in a target or being pushed to one."""
    if (distances(state) <= TOLERANCE).any():
        return None
    nearest = np.linalg.norm(path[:, None] - block_xy(state), axis=-1).min(axis=0)
    return BLOCKS[int(nearest.argmin())] if nearest.min() <= NEAR else None
