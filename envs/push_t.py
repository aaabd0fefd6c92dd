"""Push-T: a round finger pushes a T-shaped block in the plane onto its drawn outline.

The physics, the coverage and the pictures are those of the package gym-pusht (an extra), which is imported when an
environment is made. Here stand the observations, as the published demonstrations name them, the published resets, and
what an episode is worth. A state is [agent x, agent y, block x, block y, block angle], in [px] and [rad], y downwards.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.cameras import IMAGE, require_image_size
from diffusion_policy.envs.protocols import Grip, Push
from diffusion_policy.envs.push_t_block import (
    BARS,
    CENTER_OF_GRAVITY_Y,
    FIXED_GOAL,
    SIZE,
    checked_goal,
    draw_goal,
    goal_place,
    keypoints,
)
from diffusion_policy.envs.scene import Place, Scene
from diffusion_policy.envs.task import Advance, TaskEnv, float_box, path_through, rendering

CONTROL_PERIOD = 0.1
"""[s]"""
EPISODE_STEPS = 300
"""Control steps after which Gymnasium's time limit ends an episode."""
SUCCESS_COVERAGE = 0.95
"""Success is more than this share of the outline covered."""
GOALS = ("fixed", "random")
"""The published goal, or one for each episode."""
AGENT = "agent_pos"
"""Key of the agent's position, beside an image."""
PICTURE_SIZE = 480
"""Width and height of `render`'s picture [px]."""

HAND_SPEED, HAND_FORCE = 200.0, 1e5
"""Of a hand that pushes the block of mass 1, at most [px/s] and [px/s^2]. The engine's damping stops the block at each
of its steps of 0.01 s, so a fifth of this force is what that speed takes."""
HAND_REACH = 10.0
"""A hand grips the block where it lies no farther away than this [px]."""
REACH = 200.0
"""The block's origin cannot be pushed farther than this beyond the plane [px]: the T reaches 121 px from its origin,
the agent's radius is 15 px, and a contact throws the block by 19 px at most."""


def published_start(seed: int) -> np.ndarray:
    """The start that the published protocol draws for a seed, (5,), as it is handed to the simulator.

    So drew Chi et al. (2023), whose test seeds begin at 100000, and gym-pusht up to 0.1.5; later ones draw otherwise.
    """
    random = np.random.RandomState(seed)
    agent = random.randint(50, 450), random.randint(50, 450)
    block = random.randint(100, 400), random.randint(100, 400)
    return np.array([*agent, *block, random.randn() * 2 * np.pi - np.pi])


def start_for(state: np.ndarray) -> np.ndarray:
    """What to hand to the simulator, (5,), so that it begins in `state`, (5,).

    gym-pusht sets the block's position and then its angle, as the published tests do, and a body turns about its
    centre of gravity c, not its origin p: p' = p + c - R c. That shift is taken back here.
    """
    angle = state[4]
    shift = CENTER_OF_GRAVITY_Y * np.array([np.sin(angle), 1 - np.cos(angle)])  # c - R c
    return np.array([*state[:2], *(state[2:4] - shift), angle])


class SavedState(NamedTuple):
    """The way to a state. The engine hides its contacts' impulses and corrections, so that a copy of its bodies would
    go on differently (and pymunk's own copies shift the block); the same way leads to the same state, bit by bit."""

    start: np.ndarray
    """As handed to the simulator, (5,)."""
    actions: tuple[tuple[np.ndarray, Push | None], ...]
    """Since then, each (2,) [px], and how the block was pushed by hand meanwhile."""
    goal: np.ndarray
    """(3,)"""


class PushTEnv(TaskEnv):
    """Observation: `state` (5,), as the module says, the angle in [0, 2 pi), and `keypoint` (9, 2) [px], both as in the
    published dataset; with random goals `goal` (3,), where the block's origin shall be [px] and its angle, as the last
    three numbers of `state` say where it is; where an image is asked for `image`, and `agent_pos` (2,) [px], which the
    published policies from images observe beside it. Action: where the agent shall go, (2,)
    [px], absolute. Reward: clip(coverage / 0.95, 0, 1). The episode ends at success, more than 95 % of the outline
    covered.

    `info["measures"]`: `score`, the highest reward of the episode so far, and `final_coverage`, the present coverage.
    `reset(seed=...)` begins as the published tests do (`published_start`), `reset(options={"state": ...})` in a state
    (5,), exactly; `reset(options={"goal": ...})` wants a goal (3,) that is not drawn.
    """

    metadata = rendering(CONTROL_PERIOD)
    modes = ()
    """Unknown: in how many ways a T can be pushed home is not settled."""
    _unit = "px"

    def __init__(self, render_mode: str | None = None, *, goal: str = "fixed", image_size: int | None = 0) -> None:
        """`goal`: "fixed", the published one, or "random", another for each episode; `image_size`: width and height of
        the image that is observed [px], 0 for none; the published one has 96. Raises ValueError where gym-pusht is not
        installed or cannot be loaded."""
        image_size = require_image_size(image_size)
        if goal not in GOALS:
            raise ValueError(f"unknown goal {goal!r}; choose from {', '.join(GOALS)}")
        super().__init__(render_mode)
        block = np.full(2, -REACH)
        corner = np.full((9, 2), -REACH - 124)  # no keypoint is farther from the block's origin
        spaces: dict[str, gymnasium.Space] = {
            "state": float_box([0, 0, *block, 0], [SIZE, SIZE, *(SIZE - block), 2 * np.pi]),
            "keypoint": float_box(corner, SIZE - corner),
        }
        self._agent_apart = image_size > 0
        if self._agent_apart:
            spaces[AGENT] = float_box([0, 0], [SIZE, SIZE])
        self.goal = goal
        if goal == "random":
            spaces["goal"] = float_box([0, 0, 0], [SIZE, SIZE, 2 * np.pi])
        self.pose_keys = ("state", "goal") if goal == "random" else ("state",)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = gymnasium.spaces.Box(0, SIZE, (2,), np.float32)
        self._simulation = _simulation("human" if self._window else "rgb_array")
        self._start, self._goal = np.zeros(5), FIXED_GOAL
        self._actions: list[tuple[np.ndarray, Push | None]] = []
        self._push: Push | None = None
        self._score = 0.0
        self._look_through({IMAGE: lambda: self._photograph(image_size)} if image_size else {}, image_size)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Put agent and block at rest: in `options["state"]`, or where the published protocol puts them for `seed`
        (without one, for a seed that the environment's own generator draws). A random goal is `options["goal"]`, or
        drawn for `seed`.

        Raises ValueError when the state is not five finite numbers, or agent or block lie outside the plane, for a goal
        that is none, and for one of an environment whose goal is fixed.
        """
        super().reset(seed=seed)
        options = options or {}
        if "state" in options:
            start = start_for(_checked_state(options["state"]))
        else:
            start = published_start(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._begin(start, self._choose_goal(options))
        info = self._info(self._simulation._get_coverage())
        return self._observation(), info

    def _choose_goal(self, options: Mapping[str, Any]) -> np.ndarray:
        if self.goal == "random":
            return checked_goal(options["goal"]) if "goal" in options else draw_goal(self.np_random)
        if "goal" in options:
            raise ValueError("the goal is fixed; make the environment with goal='random' to give one to reset")
        return FIXED_GOAL

    def _advance(self, action: np.ndarray) -> Advance:
        """Lead the agent towards `action`, (2,) [px]; what lies outside the plane is moved to its edge."""
        push, self._push = self._push, None
        coverage = self._lead(np.clip(action, 0, SIZE), push)
        if self._window:
            self._simulation.render()
        info = self._info(coverage)
        return Advance(self._observation(), _reward(coverage), info["is_success"], info)

    def _begin(self, start: np.ndarray, goal: np.ndarray) -> None:
        self._simulation._last_action = None  # else the first picture shows the cross of the last episode
        self._simulation.reset(options={"reset_to_state": start})  # builds all anew, so no trace is left
        self._simulation.goal_pose, self._goal = goal.copy(), goal
        self._start, self._actions, self._score, self._push = start, [], 0.0, None

    def _lead(self, action: np.ndarray, push: Push | None) -> float:
        """One control period; returns the coverage."""
        with contextlib.nullcontext() if push is None else self._holding(push):
            coverage = float(self._simulation.step(action)[-1]["coverage"])
        self._actions.append((action, push))
        self._score = max(self._score, _reward(coverage))
        return coverage

    def _observation(self) -> dict[str, np.ndarray]:
        state = self._simulation.get_obs()
        named = {"state": state.astype(np.float32), "keypoint": keypoints(state).astype(np.float32)}
        wanted = {"goal": self._goal.astype(np.float32)} if self.goal == "random" else {}
        apart = {AGENT: state[:2].astype(np.float32)} if self._agent_apart else {}
        return named | wanted | apart | self._images()

    def _photograph(self, size: int) -> np.ndarray:
        """The published image: agent, block and outline, without the cross that `render` draws at the last action."""
        return self._simulation._get_img(self._simulation._draw(), size, size)

    def _info(self, coverage: float) -> dict[str, Any]:
        # The start's coverage shows after a reset, but the published score is that of the steps alone.
        measures = {"score": max(self._score, _reward(coverage)), "final_coverage": coverage}
        return {"is_success": bool(coverage > SUCCESS_COVERAGE), "measures": measures}

    def save_state(self) -> SavedState:
        """All that the future depends on; may be pickled, and restored in another process."""
        return SavedState(self._start, tuple(self._actions), self._goal)

    def restore_state(self, state: SavedState) -> None:
        """Go back to a saved state; takes as long as the steps that led there."""
        self._begin(state.start, state.goal)
        for action, push in state.actions:
            self._lead(action, push)

    def pose(self, observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put agent and block where `state` (5,) of an observation says, and a random goal where `goal` says, to be
        looked at; raises ValueError for what is no state."""
        state = np.asarray(observation["state"], dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"a state is five finite numbers; got {state}")
        goal = checked_goal(observation["goal"]) if self.goal == "random" else FIXED_GOAL
        self._begin(start_for(state), goal)  # a step of physics follows there, which is taken back here
        simulation = self._simulation
        simulation.agent.position, simulation.block.angle = tuple(state[:2].tolist()), float(state[4])
        simulation.block.position = tuple(state[2:4].tolist())  # after the angle, about which it would turn away
        for body in (simulation.agent, simulation.block):
            simulation.space.reindex_shapes_for_body(body)
        return self._observation()

    # A hand beside the agent

    def grip(self, xy: np.ndarray) -> Grip | None:
        """The point of the block that a hand holds which reaches for a point (2,) [px]."""
        x, y = self._simulation.block.world_to_local(tuple(np.asarray(xy, np.float64).tolist()))
        held = np.clip((x, y), BARS[:, 0], BARS[:, 1])  # (2 bars, 2)
        away = np.linalg.norm(held - (x, y), axis=1)
        nearest = held[away.argmin()].tolist()
        return Grip("block", (nearest[0], nearest[1])) if away.min() <= HAND_REACH else None

    def push(self, push: Push) -> None:
        """Push the block by hand in the next step."""
        self._push = push

    @contextlib.contextmanager
    def _holding(self, push: Push) -> Iterator[None]:
        """A joint that pulls the gripped point of the block to a point of the plane, slower where something is in the
        way."""
        from pymunk.constraints import PivotJoint

        space, block = self._simulation.space, self._simulation.block
        joint = PivotJoint(space.static_body, block, push.xy, push.grip.point)
        joint.max_bias, joint.max_force = HAND_SPEED, HAND_FORCE
        space.add(joint)
        try:
            yield
        finally:
            space.remove(joint)

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """None: the modes are unknown."""
        return None

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where the agent went in the plane of `scene`, (steps, 2) [px]."""
        return np.asarray(observations["state"])[:, :2]

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """From the agent through the targets `actions` (..., steps, 2), (..., steps + 1, 2) [px]."""
        return path_through(observation["state"][:2], actions)

    @property
    def scene(self) -> Scene:
        """The plane with the goal's outline, where that is the same in all episodes; y_range falls because y points
        down."""
        places = (goal_place(FIXED_GOAL),) if self.goal == "fixed" else ()
        return Scene((0, SIZE), (SIZE, 0), places=places, unit="px")

    def places(self, observation: Mapping[str, np.ndarray]) -> tuple[Place, ...]:
        """The outline of the goal of the episode that observes this, where it has one of its own."""
        return (goal_place(np.asarray(observation["goal"], np.float64)),) if self.goal == "random" else ()

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) of the plane lie in the picture, (..., 2) [px], column and row."""
        return np.asarray(xy) * (PICTURE_SIZE / SIZE)


def _reward(coverage: float) -> float:
    return float(np.clip(coverage / SUCCESS_COVERAGE, 0, 1))


def _checked_state(state: Sequence[float] | np.ndarray) -> np.ndarray:
    """As an array (5,); raises ValueError when an episode cannot begin there."""
    try:
        array = np.asarray(state, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (5,) or not np.isfinite(array).all() or (array[:4] < 0).any() or (array[:4] > SIZE).any():
        raise ValueError(
            f"a state is agent x, y and block x, y between 0 and {SIZE} [px] and a finite angle [rad]; got {state}"
        )
    return array


def _simulation(render_mode: str) -> Any:
    """gym-pusht's own environment; raises ValueError where the package is absent or broken."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output
    try:
        with warnings.catch_warnings():
            # pygame imports pkg_resources, and setuptools 67 to 81 warn of that in several categories
            warnings.filterwarnings("ignore", message=".*pkg_resources")
            import gym_pusht.envs
    except ModuleNotFoundError as error:
        raise ValueError("Push-T needs gym-pusht: pip install 'diffusion-policy-toolkit[pusht]'") from error
    except ImportError as error:  # such as OpenCV without libGL
        raise ValueError(f"gym-pusht is installed, but cannot be loaded: {error}") from error
    return gym_pusht.envs.PushTEnv(
        obs_type="state",
        render_mode=render_mode,  # it draws only when asked
        visualization_width=PICTURE_SIZE,
        visualization_height=PICTURE_SIZE,
    )
