"""PandaReach: seven joints lead from one configuration to another, past a gate and past obstacles.

A mode is the way of the tool past the gate (see `panda_scene`). Built on PyBullet: joints are driven with bounded speed
and torque, everything that stands there is solid, and each touch of the arm counts.
"""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.cameras import IMAGE, ImageOptions, Viewpoint
from diffusion_policy.envs.joint_planner import line
from diffusion_policy.envs.panda_model import BALLS, LIMITS, MOVING, ORIGINS, tool_positions
from diffusion_policy.envs.panda_reach_draws import MOST_OBSTACLES, Episode, draw_episode
from diffusion_policy.envs.panda_reach_expert import PERIOD, find_path
from diffusion_policy.envs.panda_scene import ARRAY, BOXES, MODES, NO_OBSTACLES, OBSTACLE_RADII, mode_of
from diffusion_policy.envs.panda_world import MAX_SPEED, PandaWorld, predict_joints
from diffusion_policy.envs.protocols import ArmShape, Verdict
from diffusion_policy.envs.scene import Place, Scene
from diffusion_policy.envs.simulation import Simulation
from diffusion_policy.envs.task import (
    Advance,
    TaskEnv,
    at_height,
    checked_count,
    circle,
    float_box,
    path_through,
    rendering,
)
from diffusion_policy.envs.travelled import Travelled

CONTROL_PERIOD = PERIOD
"""[s]"""
SUBSTEPS = 10
"""Physics steps in a control step: a joint turns by 0.02 rad at most in one."""
EPISODE_STEPS = 120
"""Control steps after which Gymnasium's time limit ends an episode."""
GOAL_ANGLE = 0.06
"""Success is each joint this near to the goal [rad] ..."""
GOAL_SPEED = 0.1
"""... and no faster than this [rad/s]."""
CHECKED = 0.08
"""Plans are judged at joint angles no farther apart than this [rad]."""
GOAL_RADIUS = 0.025
"""Of the mark that is drawn where the tool shall be [m]."""
REACH = np.array([(-0.9, -0.9, -0.3), (0.9, 0.9, 1.3)])
"""Bounds of the tool's position, (2, 3) [m]."""

VIEW = Viewpoint(target=(0.33, 0.0, 0.45), distance=3.0, yaw=115, pitch=-22, field=30)
CAMERA = Viewpoint(target=(0.33, 0.0, 0.45), distance=3.0, yaw=115, pitch=-22, field=31)
"""Of the observed image."""
WORKSPACE = ((-0.2, 0.95), (-0.6, 0.6))
"""The part of the table that is drawn from above: x and y ranges [m]."""


class Saved(NamedTuple):
    """A state that can be returned to."""

    physics: int
    episode: Episode
    travelled: Travelled


class PandaReachEnv(TaskEnv):
    """Observation: `joints` (7,) [rad] and `velocities` (7,) [rad/s]; `goal` (7,), the joint angles to come to [rad];
    `tool` (3,) and `goal_tool` (3,), where the fingertips are and shall be [m]; with obstacles `obstacles` (k, 4), the
    balls x, y, z and radius [m], zeros for none; `image` where it is asked for. Action: the wanted joint angles, (7,)
    [rad], absolute, so that a planned path is executed as it is. Reward: 1 at success, else 0. The episode ends at
    success (at rest at the goal) or where the arm touches table, gate, obstacle or itself.

    `info["measures"]`: `smoothness`, the mean squared acceleration of the joints over the steps [rad^2/s^4];
    `collision`, whether something was touched; at success `path_ratio`, the length of the joints' path to the goal over
    that of the straight line.

    The seed draws start, goal and obstacles; `reset(options={"start": joints, "goal": joints, "obstacles": rows})`
    gives any of them.
    """

    metadata = rendering(CONTROL_PERIOD)
    modes = MODES
    _unit = "rad"
    _simulation: Simulation

    def __init__(
        self,
        obstacles: int = 0,
        render_mode: str | None = None,
        *,
        image_size: int | None = 0,
        image_renderer: str = "tiny",
    ) -> None:
        """`obstacles`: so many balls are in the arm's ways in each episode; of the images, see `ImageOptions`."""
        images = ImageOptions.checked(image_size, renderer=image_renderer)
        self.obstacles = checked_count("obstacles", obstacles, MOST_OBSTACLES)
        super().__init__(render_mode)
        low, high = LIMITS.T
        fast = np.full(7, 2 * MAX_SPEED)
        spaces: dict[str, gymnasium.Space] = {
            "joints": float_box(low, high),
            "velocities": float_box(-fast, fast),
            "goal": float_box(low, high),
            "tool": float_box(*REACH),
            "goal_tool": float_box(*REACH),
        }
        if self.obstacles:
            bounds = (-1.0, -1.0, -1.0, 0.0), (1.0, 1.0, 1.5, max(OBSTACLE_RADII))
            spaces["obstacles"] = float_box(*([row] * self.obstacles for row in bounds))
        self.pose_keys = ("joints", "goal", *(("obstacles",) if self.obstacles else ()))
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = float_box(low, high)

        self._simulation = Simulation(CONTROL_PERIOD / SUBSTEPS, VIEW, window=self._window, renderer=images.renderer)
        self._world = PandaWorld(self._simulation, self.obstacles, coarse=images.size > 0)
        cameras = {IMAGE: lambda: self._simulation.photograph(CAMERA, images.size)} if images.size else {}
        self._look_through(cameras, images.size)
        self._pristine = self._simulation.save()
        rest = np.array([0.0, -0.5, 0.0, -2.3, 0.0, 1.8, 0.785])
        self._begin(Episode(rest, rest, np.zeros((self.obstacles, 4))))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Put the arm at rest at its start. Raises ValueError for a start, a goal or obstacles that cannot be."""
        super().reset(seed=seed)
        self._begin(draw_episode(self.np_random, self.obstacles, options or {}))
        return self._observation(), self._info(success=False)

    def _begin(self, episode: Episode) -> None:
        self._simulation.restore(self._pristine)  # so that no trace of the last episode is left
        self._world.put(episode.start)
        self._stand(episode)
        self._travelled = Travelled(episode.start, np.zeros(7))

    def _stand(self, episode: Episode) -> None:
        """Put goal and obstacles where they are in an episode."""
        self._episode, self._goal_tool = episode, tool_positions(episode.goal)
        self._world.stand(episode.obstacles, self._goal_tool)

    def _advance(self, action: np.ndarray) -> Advance:
        """Lead the joints towards `action`, (7,) [rad]; what lies beyond their limits is moved to these."""
        touched = self._simulate(np.clip(action, *LIMITS.T))
        joints = self._world.joints
        self._travelled = self._travelled.after(joints, touched, CONTROL_PERIOD)
        near = np.abs(joints - self._episode.goal).max() <= GOAL_ANGLE
        slow = np.abs(self._world.velocities).max() <= GOAL_SPEED
        success = bool(near and slow) and not self._travelled.touched
        return Advance(self._observation(), float(success), success or touched, self._info(success))

    def _simulate(self, wanted: np.ndarray) -> bool:
        """Simulate one control period, or until the arm touches something; returns whether it did."""
        self._world.drive(wanted)
        for _ in range(SUBSTEPS):
            self._simulation.step()
            if self._world.was_touched():
                return True
        return self._world.touches_itself()

    def _observation(self) -> dict[str, np.ndarray]:
        joints = self._world.joints
        return {
            "joints": np.clip(joints, *LIMITS.T).astype(np.float32),
            "velocities": np.clip(self._world.velocities, -2 * MAX_SPEED, 2 * MAX_SPEED).astype(np.float32),
            "goal": self._episode.goal.astype(np.float32),
            "tool": np.clip(tool_positions(joints), *REACH).astype(np.float32),
            "goal_tool": np.clip(self._goal_tool, *REACH).astype(np.float32),
            **({"obstacles": self._episode.obstacles.astype(np.float32)} if self.obstacles else {}),
            **self._images(),
        }

    def _info(self, success: bool) -> dict[str, Any]:
        gone = self._travelled
        measures = {"smoothness": gone.smoothness, "collision": float(gone.touched)}
        if success:
            left = float(np.linalg.norm(self._episode.goal - gone.at))
            measures["path_ratio"] = (gone.length + left) / _straight(self._episode.start, self._episode.goal)
        return {"is_success": success, "measures": measures}

    def save_state(self) -> Saved:
        """The full state of the episode, for `restore_state` of this environment."""
        return Saved(self._simulation.save(), self._episode, self._travelled)

    def restore_state(self, saved: Saved) -> None:
        """Return to a saved state; what follows is what followed then."""
        self._world.forget()
        self._stand(saved.episode)
        self._simulation.restore(saved.physics)
        self._travelled = saved.travelled

    def pose(self, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stand as `joints`, `goal` and obstacles of an observation say, at rest, to be looked at."""
        start, goal = (np.asarray(observation[key], np.float64) for key in ("joints", "goal"))
        self._begin(Episode(start, goal, _obstacles_in(observation)))
        return self._observation()

    # What a trajectory means, without this simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """The way of an episode past the gate, from `joints` and `goal` (steps, 7) [rad]; None where it did not come to
        the goal."""
        joints, goal = (np.asarray(observations[key], np.float64) for key in ("joints", "goal"))
        if np.abs(joints[-1] - goal[-1]).max() > GOAL_ANGLE + 1e-6:
            return None
        return mode_of(tool_positions(joints))

    def modes_that_solve(self, observation: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """The modes for which the expert's planner finds a path from what is observed."""
        obstacles = _obstacles_in(observation)
        start, goal = observation["joints"], observation["goal"]
        return tuple(mode for mode in MODES if find_path(start, goal, mode, obstacles) is not None)

    def still_action(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The action under which the arm stays where it is, (7,) [rad]."""
        return np.asarray(observation["joints"])

    def judge(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> list[Verdict]:
        """What comes of plans (N, steps, 7) [rad] that are followed exactly."""
        start, goal = (np.asarray(observation[key], np.float64) for key in ("joints", "goal"))
        obstacles, verdicts = _obstacles_in(observation), []
        for path in path_through(start, np.clip(np.asarray(actions, np.float64), *LIMITS.T)):
            between = np.concatenate([line(a, b, CHECKED)[:-1] for a, b in pairwise(path)])
            comes = bool(np.abs(path[-1] - goal).max() <= GOAL_ANGLE)
            valid = comes and bool(_judge_world().is_free(np.concatenate([between, path[-1:]]), obstacles).all())
            whole = np.concatenate([path, goal[None]])
            length = float(np.linalg.norm(np.diff(whole, axis=0), axis=-1).sum())
            verdicts.append(Verdict(valid, mode_of(tool_positions(whole)), length / _straight(start, goal)))
        return verdicts

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where the tool went, seen from above, (steps, 2) [m]."""
        return np.asarray(observations["tool"])[..., :2]

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Where wanted angles `actions` (..., steps, 7) lead the tool, seen from above, (..., steps + 1, 2) [m]."""
        return tool_positions(path_through(observation["joints"], actions))[..., :2]

    def roll_forward(self, observations: Mapping[str, np.ndarray], actions: np.ndarray) -> dict[str, np.ndarray]:
        """What is expected to be observed, {key: (B, To, ...)}, once actions (B, d, 7) have followed these and nothing
        was in the way. Raises ValueError for images."""
        if IMAGE in observations:
            raise ValueError(f"what a camera will see cannot be foreseen; the policy observes {IMAGE}")
        ahead = {key: np.asarray(rows, np.float64) for key, rows in observations.items()}
        for action in np.moveaxis(np.clip(actions, *LIMITS.T), 1, 0):
            joints, speeds = predict_joints(ahead["joints"][:, -1], action, CONTROL_PERIOD / SUBSTEPS, SUBSTEPS)
            now = {"joints": joints, "velocities": speeds, "tool": tool_positions(joints)}
            rows = {key: now.get(key, kept[:, -1]) for key, kept in ahead.items()}
            ahead = {key: np.concatenate([kept[:, 1:], rows[key][:, None]], axis=1) for key, kept in ahead.items()}
        return {key: rows.astype(observations[key].dtype) for key, rows in ahead.items()}

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) [m] of the table lie in the picture of `render`, (..., 2) [px]: column, row."""
        return self._simulation.pixels(at_height(np.asarray(xy), 0.0))

    @property
    def arm(self) -> ArmShape:
        """The Panda and its gate, see `protocols.Armed`."""
        return ArmShape(ORIGINS, BALLS[MOVING:], ARRAY)

    @property
    def scene(self) -> Scene:
        """The table with its gate from above; goals and obstacles differ from episode to episode."""
        corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        boxes = [
            tuple((box.center[0] + i * box.half[0], box.center[1] + j * box.half[1]) for i, j in corners)
            for box in BOXES
        ]
        return Scene(*WORKSPACE, places=tuple((box, "lightgray") for box in boxes))

    def places(self, observation: Mapping[str, np.ndarray]) -> tuple[Place, ...]:
        """Where the tool shall be and the obstacles of the episode that observes this, seen from above."""
        x, y, _ = np.asarray(observation["goal_tool"], np.float64).tolist()
        balls = [(x, y, radius) for x, y, _, radius in _obstacles_in(observation).tolist() if radius > 0]
        return (circle(x, y, GOAL_RADIUS, "lightgreen"), *(circle(*ball, "indianred") for ball in balls))


def _obstacles_in(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """x, y, z, radius, (k, 4) [m]."""
    return np.asarray(observation.get("obstacles", NO_OBSTACLES), np.float64)


def _straight(start: np.ndarray, goal: np.ndarray) -> float:
    """[rad]"""
    return max(float(np.linalg.norm(goal - start)), GOAL_ANGLE)


@cache
def _judge_world() -> PandaWorld:
    """A world of its own, in which nothing moves: judging leaves no trace in an episode."""
    return PandaWorld(Simulation(CONTROL_PERIOD / SUBSTEPS, VIEW), MOST_OBSTACLES)
