"""BlockPush: an xArm6 pushes two cubes into two square zones with a rod, in any of four orders.

The geometry, the control rate, the resets and the rewards follow the multimodal block pushing of Florence et al. (2021,
arXiv 2109.00137) as Shafiullah et al. (2022, arXiv 2206.11251) and Chi et al. (2023, arXiv 2303.04137) use it, built
anew on PyBullet. A mode is the block that comes first and the target in which it ends: the other pair follows.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.protocols import TaskEnv
from diffusion_policy.envs.robots import xarm_with_rod
from diffusion_policy.envs.scene import Scene
from diffusion_policy.envs.simulation import Camera, Simulation

BLOCKS = ("red", "blue")
"""The cubes, in the order of the observation."""
TARGETS = ("green", "yellow")
"""The square zones, in the order of the observation."""
MODES = tuple(f"{block}-{target}" for block in BLOCKS for target in TARGETS)
"""The block that comes first, then the target in which it ends: `red-green`."""
ACTIONS = ("delta", "absolute")

WORKSPACE = ((0.15, 0.70), (-0.5, 0.5))
"""The commanded position is clipped to these x and y ranges [m]."""
START_XY = (0.3, -0.4)
"""Where the rod starts [m]."""
MAX_ACTION = 0.1
"""Largest change of the commanded position in one control step, per axis [m]."""
TOOL_Z = 0.06
"""Height of the effector [m]."""
ROD_RADIUS = 0.01
ROD_LENGTH = 0.10
ROD_GAP = 0.008
"""Between the rod's lower end and the table [m]."""
BLOCK_SIZE = 0.04
BLOCK_MASS = 0.01
TABLE_FRICTION = 1.0
TARGET_SIZE = 0.12
TOLERANCE = 0.05
"""A block is in a target when their centres are at most this far apart [m]."""
MOVED = 1e-3
"""A block has been reached when it has moved this far [m]."""
NEAR = 0.06
"""A planned path that comes as near as this to a block [m] chooses it."""
FIRST_REWARD = 0.49
FINAL_REWARD = 0.51

TIME_STEP = 1 / 240
SUBSTEPS = 24
CONTROL_PERIOD = SUBSTEPS * TIME_STEP
"""[s]"""
SETTLE_STEPS = 100
SOLVER_PRECISION = 1e-4
"""Velocities right to 1 cm/s in each of the 24 steps: a third faster, while the rod still follows to 0.2 mm."""

BLOCK_CENTER, BLOCK_SPREAD = (0.4, -0.2), (0.1, 0.15)
BLOCK_YAW = (1.0, math.pi)
BLOCK_DISTANCE = 0.1
"""Resets draw blocks until their x differ by more [m]."""
TARGET_CENTER, TARGET_SPREAD = (0.4, 0.2), (0.005, 0.0075)
TARGET_OFFSET = 0.12
"""The targets' x lie so far to either side of the middle [m]."""
TARGET_YAW = (math.pi - math.pi / 30, math.pi + math.pi / 30)

CAMERA = Camera(target=(0.34, 0.0, 0.05), distance=1.2, yaw=90, pitch=-55)
WIDTH, HEIGHT = 480, 384

COMMAND = slice(8, 10)
EFFECTOR = slice(6, 8)
_BOUNDS = np.array(WORKSPACE).T
_BLOCKS = np.array([[0, 1], [3, 4]])
_TARGETS = np.array([[10, 11], [13, 14]])


class Saved(NamedTuple):
    """The full state of an episode."""

    physics: int
    command: np.ndarray
    started_at: np.ndarray
    target_poses: np.ndarray
    steps: int
    rewards: frozenset[float]
    events: dict[str, int]


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


class BlockPushEnv(TaskEnv):
    """Observation: `state` (16,): red block x, y [m], yaw [rad]; blue block likewise; effector x, y; commanded effector
    x, y; green target x, y, yaw; yellow target likewise (yaw modulo pi); and `relative` (22,), made from it by
    `relative_features`. Action: (2,) [m], the change of the commanded position, or that position itself. Reward: 0.49
    when a block first enters a target; 0.51, and the end, when the blocks are in two different targets.

    `info["measures"]`: `score`, the sum of the different rewards so far; `p1` and `p2`, whether it passes 0.4 and 0.9.
    `info["events"]`: the step at which each of REACH_0, REACH_1, TARGET_0_0, ... (block, target) was first seen.
    """

    metadata = {  # noqa: RUF012  (as Gymnasium declares it)
        "render_modes": ["human", "rgb_array"],
        "render_fps": 1 / CONTROL_PERIOD,
    }

    def __init__(self, action: str = "delta", render_mode: str | None = None) -> None:
        """`action`: "delta" (added to the commanded position) or "absolute" (replaces it)."""
        if action not in ACTIONS:
            raise ValueError(f"unknown action {action!r}; choose from {', '.join(ACTIONS)}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}; choose from human, rgb_array")
        self.action = action
        self.render_mode = render_mode
        self.modes = MODES
        low, high = np.array(WORKSPACE, dtype=np.float32).T
        if action == "delta":
            self.action_space = gymnasium.spaces.Box(-MAX_ACTION, MAX_ACTION, (2,), np.float32)
        else:
            self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        pose_low, pose_high = [-2, -2, 0], [2, 2, math.pi]
        state_low = np.array([*pose_low * 2, -2, -2, *low, *pose_low * 2], np.float32)
        state_high = np.array([*pose_high * 2, 2, 2, *high, *pose_high * 2], np.float32)
        relative_high = np.array([4] * 10 + [1] * 4 + [4] * 8, np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "state": gymnasium.spaces.Box(state_low, state_high, dtype=np.float32),
                "relative": gymnasium.spaces.Box(-relative_high, relative_high, dtype=np.float32),
            }
        )

        self._simulation = Simulation(TIME_STEP, human=render_mode == "human", precision=SOLVER_PRECISION)
        self._build_scene()
        self._arm = xarm_with_rod(self._simulation, ROD_RADIUS, ROD_LENGTH, TOOL_Z - ROD_GAP)
        self._arm.reset((*START_XY, TOOL_Z))
        self._simulation.look_from(CAMERA)
        self._pristine = self._simulation.save()
        self._command = np.array(START_XY)
        self._target_poses = np.zeros((2, 3))
        self._started_at = np.zeros((2, 2))
        self._steps = 0
        self._rewards: frozenset[float] = frozenset()
        self._events: dict[str, int] = {}

    def _build_scene(self) -> None:
        simulation = self._simulation
        (x_low, x_high), (y_low, y_high) = WORKSPACE
        half = ((x_high - x_low) / 2 + 0.05, (y_high - y_low) / 2 + 0.05, 0.01)
        center = ((x_low + x_high) / 2, (y_low + y_high) / 2)
        simulation.add_table(half, center, TABLE_FRICTION, (0.93, 0.93, 0.9, 1))
        for name, color in zip(TARGETS, ((0.35, 0.75, 0.45, 1), (0.95, 0.8, 0.3, 1)), strict=True):
            half = (TARGET_SIZE / 2, TARGET_SIZE / 2, 0.001)
            simulation.add_picture_box(name, half, (*TARGET_CENTER, 0.001), color)
        for i, (name, color) in enumerate(zip(BLOCKS, ((0.85, 0.2, 0.2, 1), (0.2, 0.4, 0.9, 1)), strict=True)):
            simulation.add_box(
                name,
                half_extents=(BLOCK_SIZE / 2,) * 3,
                mass=BLOCK_MASS,
                friction=1.0,
                rolling_friction=0.0001,
                position=(0.3 + 0.2 * i, -0.2, BLOCK_SIZE / 2),
                color=color,
            )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Put the rod at its start, draw poses of blocks and targets, and let the blocks settle."""
        super().reset(seed=seed)
        self._simulation.restore(self._pristine)  # so that no trace of the last episode is left
        self._command = np.array(START_XY)
        for name, (x, y, yaw) in zip(BLOCKS, self._draw_blocks(), strict=True):
            self._simulation.place(name, (x, y, BLOCK_SIZE / 2), yaw)
        self._target_poses = self._draw_targets()
        self._place_targets()
        self._arm.glide_to((*self._command, TOOL_Z), CONTROL_PERIOD)
        self._simulation.step(SETTLE_STEPS)
        self._steps = 0
        self._rewards = frozenset()
        self._events = {}
        state = self._state()
        self._started_at = block_xy(state)
        return self._observation(state), self._info(distances(state))

    def _draw_blocks(self) -> np.ndarray:
        """Poses x, y [m], yaw [rad] of both blocks, (2, 3)."""
        center, spread = np.array(BLOCK_CENTER), np.array(BLOCK_SPREAD)
        while True:
            xy = center + self.np_random.uniform(-spread, spread, (2, 2))
            if abs(xy[0, 0] - xy[1, 0]) > BLOCK_DISTANCE:
                return np.column_stack([xy, self.np_random.uniform(*BLOCK_YAW, 2)])

    def _draw_targets(self) -> np.ndarray:
        """Poses x, y [m], yaw [rad] of both targets, (2, 3): either may be the one with the greater x."""
        side = self.np_random.choice([-1, 1]) * TARGET_OFFSET
        centers = np.array(TARGET_CENTER) + np.array([[side, 0], [-side, 0]])
        spread = np.array(TARGET_SPREAD)
        xy = centers + self.np_random.uniform(-spread, spread, (2, 2))
        return np.column_stack([xy, self.np_random.uniform(*TARGET_YAW, 2)])

    def _place_targets(self) -> None:
        for name, (x, y, yaw) in zip(TARGETS, self._target_poses, strict=True):
            self._simulation.place(name, (x, y, 0.001), yaw)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Send the commanded position by `action`, (2,) [m], and simulate one control period; raises ValueError when
        it is not two finite numbers."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"an action is two finite numbers [m]; got {action}")
        if self.action == "delta":
            action = self._command + np.clip(action, -MAX_ACTION, MAX_ACTION)
        self._command = np.clip(action, *_BOUNDS)
        self._arm.glide_to((*self._command, TOOL_Z), CONTROL_PERIOD)
        self._simulation.step(SUBSTEPS)
        if self.render_mode == "human":
            time.sleep(CONTROL_PERIOD)
        self._steps += 1
        state = self._state()
        away = distances(state)
        reward = self._judge(state, away)
        info = self._info(away)
        return self._observation(state), reward, info["is_success"], False, info

    def _judge(self, state: np.ndarray, away: np.ndarray) -> float:
        """Note the events of this step; returns its reward."""
        for i, (x, y) in enumerate((block_xy(state) - self._started_at).tolist()):
            if math.hypot(x, y) > MOVED:
                self._events.setdefault(f"REACH_{i}", self._steps)
        reward = 0.0
        for i, j in np.argwhere(away <= TOLERANCE):
            event = f"TARGET_{i}_{j}"
            if event not in self._events:
                self._events[event] = self._steps
                reward = FIRST_REWARD
        if solved(away):
            reward = FINAL_REWARD
        self._rewards |= {reward}
        return reward

    def _info(self, away: np.ndarray) -> dict[str, Any]:
        score = sum(self._rewards)
        measures = {"score": score, "p1": float(score > 0.4), "p2": float(score > 0.9)}
        return {"is_success": bool(solved(away)), "measures": measures, "events": dict(self._events)}

    def _state(self) -> np.ndarray:
        """The observation `state`, float32, on which all judgement rests."""
        poses = np.array([self._simulation.position_and_yaw(name) for name in BLOCKS])
        poses = np.concatenate([poses, self._target_poses])
        poses[:, 2] %= math.pi
        effector = self._arm.tool_position[:2]
        return np.concatenate([*poses[:2], effector, self._command, *poses[2:]]).astype(np.float32)

    def _observation(self, state: np.ndarray) -> dict[str, np.ndarray]:
        return {"state": state, "relative": relative_features(state)}

    def save_state(self) -> Saved:
        """The full state of the episode, for `restore_state` of this environment."""
        return Saved(
            self._simulation.save(),
            self._command,
            self._started_at,
            self._target_poses,
            self._steps,
            self._rewards,
            dict(self._events),
        )

    def restore_state(self, saved: Saved) -> None:
        """Return to a saved state; what follows is what followed then."""
        self._simulation.restore(saved.physics)
        self._command = saved.command
        self._started_at = saved.started_at
        self._target_poses = saved.target_poses
        self._place_targets()
        self._steps = saved.steps
        self._rewards = saved.rewards
        self._events = dict(saved.events)

    def render(self) -> np.ndarray | None:
        """A picture (384, 480, 3) uint8 for `rgb_array`; the window of `human` draws itself."""
        if self.render_mode != "rgb_array":
            return None
        return self._simulation.render(CAMERA, WIDTH, HEIGHT)

    def close(self) -> None:
        """Free the simulation; may be called twice."""
        self._simulation.close()

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The block that came first and its target, from an episode's `state` (steps + 1, 16); None unless the blocks
        came to lie in two different targets.

        Of the two entries that make the final assignment the earlier counts: a block that only crosses the other
        target does not decide.
        """
        state = np.asarray(observations["state"])
        away = distances(state)  # (steps + 1, 2, 2)
        ends = np.flatnonzero(solved(away))
        if len(ends) == 0:
            return None
        inside = away <= TOLERANCE
        assignment = away[ends[-1]].argmin(axis=-1)
        entered = [int(inside[:, i, j].argmax()) for i, j in enumerate(assignment)]
        first = int(np.argmin(entered))
        return f"{BLOCKS[first]}-{TARGETS[assignment[first]]}"

    def choice(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> tuple[str, str] | None:
        """Which block planned actions (steps, 2) make the first: the one that they bring the commanded position
        nearest to, if nearer than NEAR; None elsewhere, and once a block is in a target or being pushed to one."""
        state = np.asarray(observation["state"], dtype=np.float64)
        if (distances(state) <= TOLERANCE).any():
            return None
        path = self.planned_path(observation, actions)  # (steps + 1, 2)
        nearest = np.linalg.norm(path[:, None] - block_xy(state), axis=-1).min(axis=0)
        return ("first block", BLOCKS[int(nearest.argmin())]) if nearest.min() <= NEAR else None

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where the effector went in the plane of `scene`, (steps, 2) [m]."""
        return np.asarray(observations["state"])[:, EFFECTOR]

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Where actions (..., steps, 2) would lead the commanded position from one observation on,
        (..., steps + 1, 2) [m]."""
        start = np.broadcast_to(np.asarray(observation["state"])[COMMAND], (*actions.shape[:-2], 1, 2))
        rest = start + np.cumsum(actions, axis=-2) if self.action == "delta" else actions
        return np.concatenate([start, rest], axis=-2)

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) [m] of the table lie in the picture of `render`, (..., 2) [px]: column, row."""
        points = np.concatenate([xy, np.zeros((*np.shape(xy)[:-1], 1))], axis=-1)
        return self._simulation.pixels(CAMERA, points, WIDTH, HEIGHT)

    @property
    def scene(self) -> Scene:
        """The workspace from above; the targets differ from episode to episode."""
        return Scene(*WORKSPACE, circles=(), finish_y=None)
