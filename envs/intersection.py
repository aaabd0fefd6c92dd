"""Intersection: cars meet at a junction, and what one of them intends shows only after two seconds.

The simulation is our own, with unicycles that keep their lanes; what the drivers do stands in `intersection_traffic`.
Here stand the observations, the draws of an episode, and the picture. Knows no learning.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from diffusion_policy.envs.cameras import IMAGE, require_image_size
from diffusion_policy.envs.intersection_picture import JUNCTION, Picture, to_pixels
from diffusion_policy.envs.intersection_traffic import (
    CONTROL_PERIOD,
    EGO_LANE,
    HIDDEN_STEPS,
    LEAST_ACCELERATION,
    LENGTH,
    MODES,
    MOST_ACCELERATION,
    OFFSET,
    OTHER_LANES,
    REACH,
    STOP,
    SUBSTEPS,
    Lane,
    Style,
    classify,
    drive_other,
    ego_expert,
    follow,
    mode_probabilities,
    overlap,
)
from diffusion_policy.envs.scene import Scene
from diffusion_policy.envs.task import Advance, TaskEnv, float_box, path_through, rendering

EPISODE_STEPS = 80
"""Control steps after which Gymnasium's time limit ends an episode."""
MOST_CARS = 4
FARTHEST, FASTEST = 200.0, 40.0
"""No car comes farther [m] or drives faster [m/s]."""


class Traffic(NamedTuple):
    """Who takes part in an episode."""

    lanes: tuple[Lane, ...]
    """Of each car."""
    usual: np.ndarray
    """Desired speeds (cars,) [m/s]."""
    style: Style
    probabilities: np.ndarray
    """Of MODES, (3,)."""
    intention: str
    """Of car 1."""


class SavedState(NamedTuple):
    """All that the future depends on."""

    traffic: Traffic
    s: np.ndarray
    """Places in the lanes, (cars,) [m]."""
    speed: np.ndarray
    """(cars,) [m/s]"""
    steps: int
    crashed: bool


def draw_traffic(rng: np.random.Generator, cars: int, intention: str | None) -> tuple[Traffic, np.ndarray]:
    """Who takes part, and where they begin (cars,) [m]; the intention is drawn last, so that all else is the same
    whatever is asked for."""
    lane = OTHER_LANES[int(rng.integers(len(OTHER_LANES)))]
    eagerness, time_ahead = rng.uniform(-1, 1), rng.uniform(-0.5, 0.7)
    slow, fast = (5.0, 6.0) if lane.turn else (7.5, 10.0)
    speed = (slow + fast) / 2 + eagerness * (fast - slow) / 2
    ego_speed, time = rng.uniform(8.0, 10.5), rng.uniform(3.9, 4.5)
    style = Style(rng.uniform(1.0, 1.8), rng.uniform(6.0, 7.5))
    ego = -(time + time_ahead) * ego_speed
    follower, leader = ego - rng.uniform(14, 20), ego + rng.uniform(32, 40)
    leader_speed = ego_speed + rng.uniform(0, 1)
    probabilities = mode_probabilities(time_ahead, eagerness)
    drawn = MODES[int(np.searchsorted(np.cumsum(probabilities)[:-1], rng.uniform()))]
    usual = np.array([ego_speed, speed, ego_speed, leader_speed])[:cars]
    traffic = Traffic((EGO_LANE, lane, EGO_LANE, EGO_LANE)[:cars], usual, style, probabilities, intention or drawn)
    return traffic, np.array([ego, -time * speed, follower, leader])[:cars]


class IntersectionEnv(TaskEnv):
    """Observation, of `cars` cars side by side, the ego car first: `position` (2 cars,) [m], `velocity` (2 cars,)
    [m/s], `heading` (2 cars,), cosine and sine; `scene` (3 cars,), of each car the way to its line [m], the speed that
    it wants to drive [m/s] and its turn (1 left, -1 right, 0 straight on); and `mode_probabilities` (3,), of the
    intentions `modes` of car 1 in this scene: the truth, by which forecasts are judged, and nothing to be learned from.
    Action: acceleration of the ego car in its lane, (1,) [m/s^2], which no brake takes below standing.

    Car 1 comes from the left or the right; it follows its intention from step 20 on, and until then nothing depends on
    it. Car 2 follows the ego car, car 3 drives in front of it. Success: the ego car or car 1 is in the junction, or
    past it, without a collision. A collision ends the episode; else it takes 80 steps, 8 s. Reward: 1 where success
    begins.

    `reset(options={"intention": ...})` asks for an intention instead of drawing it.
    """

    metadata = rendering(CONTROL_PERIOD) | {"render_modes": ["rgb_array"]}
    modes = MODES
    _unit = "m/s^2"

    def __init__(self, render_mode: str | None = None, *, cars: int = 2, image_size: int | None = 0) -> None:
        """`cars`: 2 to 4; `image_size`: width and height of the image that is observed [px], 0 for none. Raises
        ValueError for others."""
        image_size = require_image_size(image_size)
        if not isinstance(cars, int | np.integer) or isinstance(cars, bool) or not 2 <= cars <= MOST_CARS:
            raise ValueError(f"cars must be 2, 3 or 4; got {cars!r:.60}")
        super().__init__(render_mode)
        self.cars = int(cars)
        far, fast = np.full(2 * cars, FARTHEST), np.full(2 * cars, FASTEST)
        ways = np.tile([FARTHEST, FASTEST, 1], cars)
        spaces: dict[str, gymnasium.Space] = {
            "position": float_box(-far, far),
            "velocity": float_box(-fast, fast),
            "heading": float_box(-np.ones(2 * cars), np.ones(2 * cars)),
            "scene": float_box(-ways, ways),
            "mode_probabilities": float_box(np.zeros(3), np.ones(3)),
        }
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = float_box([LEAST_ACCELERATION], [MOST_ACCELERATION])
        self._simulation = Picture(self._poses)
        traffic, s = draw_traffic(np.random.default_rng(0), self.cars, None)
        self._state = SavedState(traffic, s, traffic.usual.copy(), 0, False)
        self._look_through({IMAGE: lambda: self._simulation.draw(image_size)} if image_size else {}, image_size)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Draw the scene and what car 1 intends, unless `options["intention"]` says it; raises ValueError for an
        intention that is none."""
        super().reset(seed=seed)
        intention = (options or {}).get("intention")
        if intention is not None and intention not in MODES:
            raise ValueError(f"unknown intention {intention!r:.60}; choose from {', '.join(MODES)}")
        traffic, s = draw_traffic(self.np_random, self.cars, intention)
        self._state = SavedState(traffic, s, traffic.usual.copy(), 0, False)
        return self._observation(), {"is_success": False}

    def _advance(self, action: np.ndarray) -> Advance:
        before = self._is_settled()
        pedal = float(np.clip(action[0], LEAST_ACCELERATION, MOST_ACCELERATION))
        traffic, s, speed, steps, crashed = self._state
        for _ in range(SUBSTEPS):
            s, speed = _move(s, speed, self._accelerations(s, speed, pedal), CONTROL_PERIOD / SUBSTEPS)
        s = np.clip(s, -FARTHEST + STOP, FARTHEST - STOP)
        self._state = SavedState(traffic, s, speed, steps + 1, crashed)
        crashed = crashed or overlap(*self._poses())
        self._state = self._state._replace(crashed=crashed)
        success = self._is_settled() and not crashed
        return Advance(
            self._observation(), float(success and not before), crashed, {"is_success": success, "collision": crashed}
        )

    def _accelerations(self, s: np.ndarray, speed: np.ndarray, pedal: float) -> np.ndarray:
        """Of all cars, (cars,) [m/s^2]."""
        traffic, shown = self._state.traffic, self._state.steps >= HIDDEN_STEPS
        lane, usual = traffic.lanes[1], traffic.usual
        mine, theirs = lane.conflict
        merged = [(theirs + s[1] - mine, speed[1])] if lane.turn and s[1] > mine - 1 else []
        others = [(s[i], speed[i]) for i in range(self.cars) if i != 1]
        found = [pedal, 0.0]
        if shown:
            in_front = [(mine + place - theirs, its) for place, its in others if lane.turn and place > 0]
            passed = theirs + (LENGTH if lane.turn else REACH)
            clear = all(place > passed for place, _ in others)
            found[1] = drive_other(traffic.intention, traffic.style, s[1], speed[1], usual[1], clear, in_front)
        seen = (s[1], speed[1], usual[1])
        found += [ego_expert(s[2], speed[2], usual[2], seen, lane, others + merged)] if self.cars > 2 else []
        found += [follow(speed[3], usual[3], s[3], others + merged)] if self.cars > 3 else []
        return np.array(found)

    def _is_settled(self) -> bool:
        """Whether one of the two has settled who goes first: it is in the junction."""
        return bool((self._state.s[:2] > LENGTH).any())

    def _poses(self) -> tuple[np.ndarray, np.ndarray]:
        """Places (cars, 2) and headings (cars,)."""
        poses = [lane.place(s) for lane, s in zip(self._state.traffic.lanes, self._state.s, strict=True)]
        return np.stack([place for place, _ in poses]), np.stack([heading for _, heading in poses])

    def _observation(self) -> dict[str, np.ndarray]:
        places, headings = self._poses()
        ahead = np.stack([np.cos(headings), np.sin(headings)], -1)  # (cars, 2)
        traffic, s, speed, _, _ = self._state
        turns = [lane.turn for lane in traffic.lanes]
        observed = {
            "position": places,
            "velocity": ahead * speed[:, None],
            "heading": ahead,
            "scene": np.stack([-s, traffic.usual, turns], -1),
            "mode_probabilities": traffic.probabilities,
        }
        return {key: rows.astype(np.float32).ravel() for key, rows in observed.items()} | self._images()

    def save_state(self) -> SavedState:
        """All that the future depends on; may be pickled, and restored in another process."""
        return self._state

    def restore_state(self, state: SavedState) -> None:
        """Go back to a saved state."""
        self._state = state

    # What a trajectory means, without a simulator

    def mode(self, observations: Mapping[str, np.ndarray]) -> str | None:
        """What car 1 did (see `intersection_traffic.classify`); None where the episode is too short to tell."""
        path = np.asarray(observations["position"])
        index = int(classify(path.reshape(len(path), -1, 2)))
        return None if index < 0 else MODES[index]

    def path(self, observations: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where the ego car went, (steps, 2) [m]."""
        return np.asarray(observations["position"])[:, :2]

    def planned_path(self, observation: Mapping[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Where accelerations (..., steps, 1) lead the ego car, (..., steps + 1, 2) [m]."""
        speed = np.full(actions.shape[:-2], float(observation["velocity"][1]))
        driven, points = np.zeros_like(speed), []
        for pedal in np.moveaxis(np.clip(actions[..., 0], LEAST_ACCELERATION, MOST_ACCELERATION), -1, 0):
            driven, speed = _move(driven, speed, pedal, CONTROL_PERIOD)
            points.append(driven)
        start = np.asarray(observation["position"], np.float64)[:2]
        return path_through(start, start + np.stack(points, -1)[..., None] * [0, 1])

    @property
    def scene(self) -> Scene:
        """The roads, seen from above, and the line of each lane that leads to the junction."""
        return JUNCTION

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Where points (..., 2) of the plane lie in the picture, (..., 2) [px], column and row."""
        return to_pixels(xy, self._simulation.side)


class IntersectionExpert:
    """Drives the ego car as `intersection_traffic.ego_expert` does, whatever the mode: that is car 1's intention, which
    is not the ego car's to choose."""

    def __init__(self, mode: str | None) -> None:
        if mode is not None and mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; Intersection has {', '.join(MODES)}")

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next acceleration, (1,) [m/s^2]."""
        places, ahead, velocity = (
            np.asarray(observation[key], np.float64).reshape(-1, 2) for key in ("position", "heading", "velocity")
        )
        ways = np.asarray(observation["scene"], np.float64).reshape(-1, 3)
        speed = np.linalg.norm(velocity, axis=-1)
        lane = min(OTHER_LANES, key=lambda one: _distance(one, ways[1], places[1]))
        along = (np.abs(places[:, 0] - OFFSET) < 1.5) & (ahead[:, 1] > 0.7)
        in_front = [(places[i, 1] + STOP, speed[i]) for i in range(1, len(places)) if along[i]]
        other = (-ways[1, 0], speed[1], ways[1, 1])
        return np.array([ego_expert(-ways[0, 0], speed[0], ways[0, 1], other, lane, in_front)], np.float32)


def _move(s: np.ndarray, speed: np.ndarray, pedal: np.ndarray, period: float) -> tuple[np.ndarray, np.ndarray]:
    """Places and speeds after a period of constant acceleration, which ends where a car stands."""
    after = np.maximum(speed + pedal * period, 0)
    return s + (speed + after) / 2 * period, after


def _distance(lane: Lane, ways: np.ndarray, place: np.ndarray) -> float:
    """How far a car is [m] from where it would be in a lane; infinite for a lane that turns otherwise."""
    return float(np.linalg.norm(lane.place(-ways[0])[0] - place)) if lane.turn == int(ways[2]) else math.inf
