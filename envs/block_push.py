"""BlockPush: an xArm6 pushes two cubes into two square zones with a rod, in any of four orders.

The geometry, the control rate, the resets and the rewards follow the multimodal block pushing of Florence et al. (2021,
arXiv 2109.00137) as Shafiullah et al. (2022, arXiv 2206.11251) and Chi et al. (2023, arXiv 2303.04137) use it, built
anew on PyBullet. A mode is the block that comes first and the target in which it ends: the other pair follows.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.block_push_hand import Hand
from diffusion_policy.envs.block_push_state import (
    BLOCKS,
    COMMAND,
    EFFECTOR,
    MODES,
    TARGETS,
    Progress,
    block_xy,
    chosen_block,
    distances,
    mode_of,
    relative_features,
    solved,
)
from diffusion_policy.envs.cameras import ImageOptions, Mount, Viewpoint
from diffusion_policy.envs.protocols import Grip, Push
from diffusion_policy.envs.robots import arm_cameras, xarm_with_rod
from diffusion_policy.envs.scene import Scene
from diffusion_policy.envs.simulation import Simulation
from diffusion_policy.envs.task import (
    Advance,
    TaskEnv,
    at_height,
    float_box,
    path_of_changes,
    path_through,
    rendering,
)

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

VIEW = Viewpoint(target=(0.34, 0.0, 0.05), distance=1.2, yaw=90, pitch=-55)
CAMERA = Viewpoint(target=(0.40, 0.0, 0.03), distance=2.0, yaw=90, pitch=-60, field=32)
"""Of the observed image: all of the workspace, the rod before the arm."""
WRIST = Mount(eye=(0.16, 0.0, -0.12), target=(-0.01, 0.0, 0.05), up=(-1.0, 0.0, 0.0), field=80)
"""Of the image from the wrist: the rod in the middle, what lies left and right of it."""

_BOUNDS = np.array(WORKSPACE).T


class Saved(NamedTuple):
    """The full state of an episode."""

    physics: int
    command: np.ndarray
    target_poses: np.ndarray
    progress: Progress


class BlockPushEnv(TaskEnv):
    """Observation: `state` (16,): red block x, y [m], yaw [rad]; blue block likewise; effector x, y; commanded effector
    x, y; green target x, y, yaw; yellow target likewise (yaw modulo pi); `relative` (22,), made from it by
    `relative_features`; and the images that are asked for. Action: (2,) [m], the change of the commanded position, or
    that position itself. Reward: 0.49 when a block first enters a target; 0.51, and the end, when the blocks are in two
    different targets.

    `info["measures"]`: `score`, the sum of the different rewards so far; `p1` and `p2`, whether it passes 0.4 and 0.9.
    `info["events"]`: the step at which each of REACH_0, REACH_1, TARGET_0_0, ... (block, target) was first seen.
    """

    metadata = rendering(CONTROL_PERIOD)
    modes = MODES
    _simulation: Simulation

    def __init__(
        self,
        action: str = "delta",
        render_mode: str | None = None,
        *,
        image_size: int | None = 0,
        wrist_image: bool = False,
        image_renderer: str = "tiny",
    ) -> None:
        """`action`: "delta" (added to the commanded position) or "absolute" (replaces it); of the images, see
        `ImageOptions`."""
        images = ImageOptions.checked(image_size, wrist_image, image_renderer)
        if action not in ACTIONS:
            raise ValueError(f"unknown action {action!r}; choose from {', '.join(ACTIONS)}")
        super().__init__(render_mode)
        self.action = action
        self.action_space = float_box([-MAX_ACTION] * 2, [MAX_ACTION] * 2) if action == "delta" else float_box(*_BOUNDS)
        pose_low, pose_high = [-2, -2, 0], [2, 2, math.pi]
        state_low = [*pose_low * 2, -2, -2, *_BOUNDS[0], *pose_low * 2]
        state_high = [*pose_high * 2, 2, 2, *_BOUNDS[1], *pose_high * 2]
        relative_high = np.array([4] * 10 + [1] * 4 + [4] * 8)
        self.observation_space = gymnasium.spaces.Dict(
            {"state": float_box(state_low, state_high), "relative": float_box(-relative_high, relative_high)}
        )

        self._simulation = Simulation(
            TIME_STEP, VIEW, window=self._window, precision=SOLVER_PRECISION, renderer=images.renderer
        )
        self._build_scene()
        self._arm = xarm_with_rod(self._simulation, ROD_RADIUS, ROD_LENGTH, TOOL_Z - ROD_GAP, coarse=images.size > 0)
        self._look_through(arm_cameras(self._simulation, self._arm, CAMERA, WRIST, images), images.size)
        self._arm.reset((*START_XY, TOOL_Z))
        self._hand = Hand(self._simulation, BLOCKS, BLOCK_SIZE)
        self._push: Push | None = None
        self._pristine = self._simulation.save()
        self._command = np.array(START_XY)
        self._target_poses = np.zeros((2, 3))
        self._progress = Progress(np.zeros((2, 2)))

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
        self._command, self._push = np.array(START_XY), None
        for name, (x, y, yaw) in zip(BLOCKS, self._draw_blocks(), strict=True):
            self._simulation.place(name, (x, y, BLOCK_SIZE / 2), yaw)
        self._target_poses = self._draw_targets()
        self._place_targets()
        self._glide(CONTROL_PERIOD)
        self._simulation.step(SETTLE_STEPS)
        state = self._state()
        self._progress = Progress(block_xy(state))
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

    def _advance(self, action: np.ndarray) -> Advance:
        """Send the commanded position by, or to, `action`, (2,) [m]."""
        if self.action == "delta":
            action = self._command + np.clip(action, -MAX_ACTION, MAX_ACTION)
        self._command = np.clip(action, *_BOUNDS)
        self._simulate()
        state = self._state()
        away = distances(state)
        self._progress, reward = self._progress.after(state, away)
        info = self._info(away)
        return Advance(self._observation(state), reward, info["is_success"], info)

    def _simulate(self) -> None:
        """One control period, in which a block may be pushed by hand."""
        push, self._push = self._push, None
        if push is None:
            self._glide(CONTROL_PERIOD)
            self._simulation.step(SUBSTEPS)
        else:
            self._hand.lead(push, CONTROL_PERIOD, SUBSTEPS, self._glide)

    def _glide(self, duration: float) -> None:
        self._arm.glide_to((*self._command, TOOL_Z), duration)

    def grip(self, xy: np.ndarray) -> Grip | None:
        """The block that a hand holds which reaches for a point (2,) [m] of the table in the picture."""
        return self._hand.grip(xy)

    def push(self, push: Push) -> None:
        """Push a block by hand in the next step."""
        self._push = push

    def _info(self, away: np.ndarray) -> dict[str, Any]:
        progress = self._progress
        return {"is_success": bool(solved(away)), "measures": progress.measures, "events": dict(progress.events)}

    def _state(self) -> np.ndarray:
        """The observation `state`, float32, on which all judgement rests."""
        poses = np.array([self._simulation.position_and_yaw(name) for name in BLOCKS])
        poses = np.concatenate([poses, self._target_poses])
        poses[:, 2] %= math.pi
        effector = self._arm.tool_position[:2]
        return np.concatenate([*poses[:2], effector, self._command, *poses[2:]]).astype(np.float32)

    def _observation(self, state: np.ndarray) -> dict[str, np.ndarray]:
        return {"state": state, "relative": relative_features(state), **self._images()}

    def save_state(self) -> Saved:
        """The full state of the episode, for `restore_state` of this environment."""
        return Saved(self._simulation.save(), self._command, self._target_poses, self._progress)

    def restore_state(self, saved: Saved) -> None:
        """Return to a saved state; what follows is what followed then."""
        self._simulation.restore(saved.physics)
        self._command, self._target_poses, self._progress = saved.command, saved.target_poses, saved.progress
        self._place_targets()

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The block that came first and its target, see `mode_of`."""
        return mode_of(np.asarray(observations["state"]))

    def choice(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> tuple[str, str] | None:
        """Which block planned actions (steps, 2) make the first, see `chosen_block`."""
        state = np.asarray(observation["state"], dtype=np.float64)
        block = chosen_block(state, self.planned_path(observation, actions))
        return None if block is None else ("first block", block)

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where the effector went in the plane of `scene`, (steps, 2) [m]."""
        return np.asarray(observations["state"])[:, EFFECTOR]

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Where actions (..., steps, 2) would lead the commanded position from one observation on,
        (..., steps + 1, 2) [m]."""
        start = np.asarray(observation["state"])[COMMAND]
        return path_of_changes(start, actions) if self.action == "delta" else path_through(start, actions)

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) [m] of the table lie in the picture of `render`, (..., 2) [px]: column, row."""
        return self._simulation.pixels(at_height(xy, 0.0))

    @property
    def scene(self) -> Scene:
        """The workspace from above; the targets differ from episode to episode."""
        return Scene(*WORKSPACE, circles=(), finish_y=None)
