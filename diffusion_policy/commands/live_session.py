"""One policy in one environment, watched and steered while it runs: what `diffusion-policy live` shows and obeys.

Knows policies, environments and stores. Knows no browser: a frame is a picture and a map of plain values, a command is
such a map.
"""

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.basics.files import plain
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.basics.text import error_line
from diffusion_policy.commands.environment import describe_episodes
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.live_painter import Painter, Picture, paint
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import ChunkingConfig, ConfigError, SampleConfig, with_options
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.diffusion.samplers import Denoise
from diffusion_policy.envs.protocols import as_foreseeing, as_multimodal, as_pictured, repeats_by_seed

ACTOR = "actor"
"""Column of a recorded store: who acted, 0 the policy, 1 a person."""
POLICY, PERSON = 0, 1
ON = np.ones(1, bool)


class Frame(NamedTuple):
    """What is to be seen after a step."""

    state: dict[str, Any]
    picture: bytes
    """JPEG."""


class Paths(NamedTuple):
    """What is drawn over the picture, in the plane, (steps, 2) each."""

    plan: np.ndarray | None
    """That is followed."""
    fan: list[np.ndarray]
    denoising: list[np.ndarray]


NO_PATHS = Paths(None, [], [])
LINGER = 15
"""Control steps for which the end of an episode is seen."""
PAINTERS = 2
"""Processes that draw, one picture each."""


class _Asked(NamedTuple):
    """A look that is not taken yet."""

    drawn: Painter | Picture
    state: dict[str, Any]
    paths: Paths


class LiveSession:
    """Runs in one thread: simulators bear no more."""

    def __init__(
        self,
        loaded: PolicyInEnv,
        sampling: SampleConfig,
        chunking: ChunkingConfig,
        *,
        delay_steps: int = 0,
        action_horizon: int | None = None,
        fan: int = 12,
        seed: int = 0,
        record: Path | None = None,
    ) -> None:
        """`loaded`: its environment makes pictures; `record`: a store to create, or of ours to go on with. Raises
        ConfigError for an environment without pictures, ValueError for a policy that cannot be run so."""
        self._loaded, self._fan, self._action_horizon = loaded, fan, action_horizon
        self._env = loaded.make_env(render_mode="rgb_array")
        if "rgb_array" not in (self._env.metadata.get("render_modes") or ()):
            raise ConfigError(f"{loaded.env_id} makes no pictures (render mode rgb_array), so it cannot be watched")
        number = PAINTERS if repeats_by_seed(loaded.make_env, seed) else 0
        self._painters = deque(Painter(loaded.make_env) for _ in range(number))
        self._asked: deque[_Asked] = deque()
        self._plane, self._task = as_pictured(self._env), as_multimodal(self._env)
        self._sampling, self._chunking, self._delay = sampling, chunking, delay_steps
        self._make_controller()
        self._store = (
            None if record is None else open_record(record, loaded, tuple(self._task.modes if self._task else ()))
        )
        self._recorded = Counter() if self._store is None else _count_modes(self._store)
        self._held: Demonstration | None = None
        """The last episode, which can be undone until the next one has ended."""
        self.running, self.driver, self.recording = True, POLICY, False
        self._hand: np.ndarray | None = None
        """Where the mouse is held, in shares of the picture's width and height; None while no button is pressed."""
        self._size = np.ones(2)  # of the last picture [px]
        self._counts: Counter[str] = Counter()
        self._episodes = self._successes = 0
        self._begin(seed)
        self._full_width = paint(self._env, 1.0).width

    # What is seen

    def look(self, share: float = 1.0) -> Frame | None:
        """How it stands, as `ahead` looks ago, since the pictures are drawn meanwhile; None where there were not so
        many. `share`: of the picture's width and height; less is faster."""
        drawn: Painter | Picture = self._painters[0] if self._painters else paint(self._env, share)
        if isinstance(drawn, Painter):
            drawn.ask(share)
            self._painters.rotate(-1)
        self._asked.append(_Asked(drawn, self._tell(), self._paths))
        return self._take() if len(self._asked) > self.ahead else None

    @property
    def ahead(self) -> int:
        """Pictures that are being drawn while others are asked for."""
        return len(self._painters)

    def _take(self) -> Frame:
        drawn, state, paths = self._asked.popleft()
        try:
            picture = drawn if isinstance(drawn, Picture) else drawn.take()
        except (EOFError, OSError):
            picture = self._draw_here()
        self._size = np.array([picture.width, picture.height])
        draw = self._drawing(picture)
        state |= {
            "size": [picture.width, picture.height],
            "plan": draw(paths.plan),
            "fan": [draw(path) for path in paths.fan],
            "denoising": [draw(path) for path in paths.denoising],
        }
        return Frame(state, picture.jpeg)

    def _draw_here(self) -> Picture:
        """Draw in this process from now on: one that draws has ended, for want of memory, say."""
        for painter in self._painters:
            painter.close()
        self._painters.clear()
        self._asked.clear()
        return paint(self._env, 1.0)

    def _tell(self) -> dict[str, Any]:
        recorded = Counter(self._recorded)
        if self._held is not None:
            recorded[self._held.mode or "none"] += 1
        return plain(
            {
                "seed": self._seed,
                "step": len(self._actions),
                "running": self.running,
                "ended": self._ended,
                "success": self._success,
                "mode": self._mode,
                "driver": self.driver,
                "held": self._hand is not None,
                "can_steer": self._plane is not None and self._action_size == 2,
                "episodes": self._episodes,
                "successes": self._successes,
                "counts": dict(self._counts),
                "latency_ms": self._latency,
                "recording": self.recording,
                "can_record": self._store is not None,
                "recorded": dict(recorded),
                "can_undo": self._held is not None,
                "settings": {
                    "sampler": self._sampling.sampler,
                    "sampling_steps": self._sampling.sampling_steps,
                    "guidance": self._sampling.guidance,
                    "mode": self._sampling.mode,
                    "chunking": self._chunking.chunking,
                    "roll_forward": self._chunking.roll_forward,
                    "delay_steps": self._delay,
                },
                "modes": list(self._loaded.policy.modes),
                "can_guide": bool(self._loaded.policy.config.condition_dropout),
                "can_roll": as_foreseeing(self._env) is not None,
            }
        )

    # What happens

    def advance(self) -> None:
        """One control step; an episode that has ended is seen for a moment, and followed by that of the next seed."""
        if self._ended:
            self._lingered += 1
            if self._lingered < LINGER:
                return
            self._begin(self._seed + 1 if self._seed < MOST_SEED else 0)
            return
        person = self._hand is not None or self.driver == PERSON
        if person:
            action = self._follow_hand()
            self._paths, self._stale = NO_PATHS, True
        else:
            action = self._ask_policy()
        space = self._env.action_space
        self._observations.append(self._observation)
        self._actions.append(np.asarray(action, np.float64).reshape(-1))
        self._actors.append(PERSON if person else POLICY)
        taken = np.asarray(action, space.dtype).reshape(space.shape or ())
        for painter in self._painters:
            painter.step(taken)
        observation, _, terminated, truncated, info = self._env.step(taken)
        self._observation = _copied(observation)
        self._recent.append(self._observation)
        if terminated or truncated:
            self._end(bool(info.get("is_success", False)))

    def release(self) -> None:
        """Nobody holds the mouse any more."""
        self._hand = None

    def obey(self, command: Mapping[str, Any]) -> None:
        """Do what a person asks. Raises ConfigError for what cannot be; then all is as it was."""
        name = command.get("do")
        act = COMMANDS.get(name) if isinstance(name, str) else None
        if act is None:
            raise ConfigError(f"unknown command {name!r:.60}; choose from {', '.join(COMMANDS)}")
        try:
            act(self, command)
        except ConfigError:
            raise
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ConfigError(error_line(error)) from error

    def close(self) -> None:
        """Keep the last episode, and end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._env.close)
            for painter in self._painters:
                stack.callback(painter.close)
            if self._store is not None:
                stack.callback(self._store.close)
            self._keep_held()

    # Commands

    def _run(self, command: Mapping[str, Any]) -> None:
        self.running = bool(command.get("on", True))

    def _step(self, _: Mapping[str, Any]) -> None:
        self.running = False
        self.advance()

    def _reset(self, command: Mapping[str, Any]) -> None:
        seed = command.get("seed", self._seed)
        if type(seed) is not int or not 0 <= seed <= MOST_SEED:
            raise ConfigError(f"a seed is a whole number from 0 to {MOST_SEED}; got {seed!r:.60}")
        self._begin(seed)

    def _set(self, command: Mapping[str, Any]) -> None:
        asked = command.get("settings")
        if not isinstance(asked, dict):
            raise ConfigError("settings must be a map")
        before = self._sampling, self._chunking, self._delay
        controller, stale = self._controller, self._stale
        asked = dict(asked)
        delay = asked.pop("delay_steps", self._delay)
        if type(delay) is not int:
            raise ConfigError(f"delay-steps must be a whole number; got {delay!r:.60}")
        if asked.get("guidance") is not None:
            asked["guidance"] = float(asked["guidance"])
        joining = {name: asked.pop(name) for name in ("chunking", "roll_forward") if name in asked}
        try:
            self._sampling = with_options(replace(self._sampling, mode=None), **{"mode": self._sampling.mode} | asked)
            self._chunking = with_options(self._chunking, **joining)
            self._delay = delay
            self._make_controller()
        except BaseException:
            self._sampling, self._chunking, self._delay = before
            self._controller, self._stale = controller, stale
            raise

    def _drive(self, command: Mapping[str, Any]) -> None:
        driver = {"policy": POLICY, "person": PERSON}.get(str(command.get("who")))
        if driver is None:
            raise ConfigError("who drives is policy or person")
        if driver == PERSON:
            self._require_steering()
        self.driver, self._stale = driver, True

    def _mouse(self, command: Mapping[str, Any]) -> None:
        if not command.get("down"):
            self._hand = None
            return
        self._require_steering()
        place = command.get("x"), command.get("y")
        if not all(isinstance(one, int | float) and -1 <= one <= 2 for one in place):
            raise ConfigError("a place in the picture is x and y, 0 to 1")
        self._hand = np.array(place, np.float64)

    def _record(self, command: Mapping[str, Any]) -> None:
        if self._store is None:
            raise ConfigError("nothing is recorded without --record STORE")
        self.recording = bool(command.get("on", True))
        if self.recording and self._actions:
            self._begin(self._seed)  # an episode is recorded whole

    def _undo(self, _: Mapping[str, Any]) -> None:
        if self._held is None:
            raise ConfigError("there is no episode to undo: the last one can be until the next one has ended")
        self._held = None

    # Parts of them

    def _make_controller(self) -> None:
        """By the settings as they are. Raises ValueError for those that the policy cannot follow."""
        policy = self._loaded.policy
        policy.resolve_sampling(self._sampling)
        chunking = choose_chunking(self._chunking, policy, self._sampling, find_roll(self._env))
        planner = PolicyPlanner(policy, self._sampling)
        self._controller = Controller(
            planner, 1, action_horizon=self._action_horizon, delay_steps=self._delay, chunking=chunking
        )
        self._stale = True
        """Whether the controller does not know what was observed last."""

    def _begin(self, seed: int) -> None:
        self._seed, self._repeat = seed, 0
        self._observation = _copied(self._env.reset(seed=seed)[0])
        for painter in self._painters:
            painter.reset(seed)
        self._recent: deque[Mapping[str, np.ndarray]] = deque(
            [self._observation], self._loaded.policy.config.observation_horizon
        )
        self._observations: list[Mapping[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []
        self._actors: list[int] = []
        self._ended, self._success, self._mode, self._lingered = False, None, None, 0
        self._paths = NO_PATHS
        self._latency: float | None = None
        self._stale = True

    def _end(self, success: bool) -> None:
        self._ended, self._success = True, success
        path = {
            key: np.stack([one[key] for one in [*self._observations, self._observation]]) for key in self._observation
        }
        self._mode = self._task.mode(path) if self._task else None
        self._episodes += 1
        self._successes += success
        self._counts[self._mode or "none"] += success
        if not self.recording:
            return
        self._keep_held()
        data = {key: rows[:-1] for key, rows in path.items()}
        data |= {"action": np.stack(self._actions), ACTOR: np.array(self._actors, np.uint8)[:, None]}
        final = {key: rows[-1] for key, rows in path.items()} | {ACTOR: np.zeros(1, np.uint8)}
        self._held = Demonstration(data, self._seed, self._mode, success, final)

    def _keep_held(self) -> None:
        if self._held is not None and self._store is not None:
            self._store.append([self._held])
            self._recorded[self._held.mode or "none"] += 1
        self._held = None

    def _ask_policy(self) -> np.ndarray:
        if self._stale:
            self._controller.reset(ON, [(self._seed, self._repeat)])
            self._repeat += 1  # after a correction other noise
            for past in list(self._recent)[:-1]:
                self._controller.observe(_row(past), ON)
            self._stale = False
        started = time.perf_counter()
        action = self._controller.act(_row(self._observation))[0]
        if 0 in self._controller.planned:
            self._latency = 1000 * (time.perf_counter() - started)
            self._paths = self._sample_fan(self._led(self._controller.planned[0]))
        return action

    def _sample_fan(self, plan: np.ndarray | None) -> Paths:
        """The plan beside others that might have been made now, and one of them after each denoising step."""
        if plan is None or not self._fan:
            return Paths(plan, [], [])
        policy, seen = self._loaded.policy, []
        bound = 1.0 if policy.choose_clip(self._sampling) == "static" else math.inf

        def watch(denoise: Denoise) -> Denoise:
            def watched(xt: torch.Tensor, level: int) -> torch.Tensor:
                x0 = denoise(xt, level)
                seen.append(x0[:1].clamp(-bound, bound))
                return x0

            return watched

        horizon = policy.config.observation_horizon
        rows = [*[self._recent[0]] * (horizon - len(self._recent)), *self._recent]
        observed = {
            key: torch.as_tensor(np.stack([np.asarray(row[key], np.float64) for row in rows]))[None]
            for key in policy.shapes.observations
        }
        rng = derive_rng("live", self._seed, len(self._actions))
        plans = policy.sample(observed, [rng], self._fan, self._sampling, [watch])[0, :, horizon - 1 :].cpu().numpy()
        steps = [policy.unnormalize(x0, 1)[0, 0, horizon - 1 :].cpu().numpy() for x0 in seen]
        led = [[path for path in map(self._led, some) if path is not None] for some in (plans, steps)]
        return Paths(plan, *led)

    def _led(self, actions: np.ndarray) -> np.ndarray | None:
        """Where actions would lead from here, in the plane, (steps + 1, 2)."""
        if self._plane is None or not np.isfinite(actions).all():
            return None
        return np.asarray(self._plane.planned_path(self._observation, actions))

    def _drawing(self, picture: Picture) -> Callable[[np.ndarray | None], list[list[float]]]:
        """How a path in the plane is drawn into a picture [px]."""
        plane = self._plane
        getattr(self._env.unwrapped, "draw_smaller", lambda _: None)(picture.width / self._full_width)
        return lambda path: [] if path is None or plane is None else np.round(plane.pixels(path), 1).tolist()

    @property
    def _action_size(self) -> int:
        return int(np.prod(self._env.action_space.shape or ()))

    def _require_steering(self) -> None:
        if self._plane is None or self._action_size != 2:
            raise ConfigError("only actions of two numbers in a plane can be steered by mouse")

    def _follow_hand(self) -> np.ndarray:
        """The action that leads to the mouse, as far as the action space goes; without a button, one that stays."""
        assert self._plane is not None
        place = self._led(np.zeros((1, 2)))
        assert place is not None
        columns = []
        for axis in np.eye(2):
            moved = self._led(axis[None])
            assert moved is not None
            columns.append(moved[-1] - place[-1])
        wanted = place[0] if self._hand is None else self._in_plane(self._hand * self._size)
        action = np.linalg.lstsq(np.stack(columns, axis=1), wanted - place[-1], rcond=None)[0]
        space: Any = self._env.action_space
        return np.clip(action, space.low.reshape(-1), space.high.reshape(-1))

    def _in_plane(self, pixel: np.ndarray) -> np.ndarray:
        """The point of the plane at a place in the picture: the inverse of the projection (a homography)."""
        assert self._plane is not None
        scene = self._plane.scene
        corners = np.array([[x, y] for x in scene.x_range for y in scene.y_range])
        seen = np.asarray(self._plane.pixels(corners), np.float64)
        rows = []
        for (x, y), (u, v) in zip(corners, seen, strict=True):
            rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v, -x], [0, 0, 0, u, v, 1, -y * u, -y * v, -y]]
        matrix = np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)
        x, y, w = matrix @ [*pixel, 1]
        low, high = np.sort([scene.x_range, scene.y_range], axis=1).T
        return np.clip([x / w, y / w], low, high)


COMMANDS = {
    "run": LiveSession._run,
    "step": LiveSession._step,
    "reset": LiveSession._reset,
    "set": LiveSession._set,
    "drive": LiveSession._drive,
    "mouse": LiveSession._mouse,
    "record": LiveSession._record,
    "undo": LiveSession._undo,
}
"""What a person can ask for."""


def open_record(path: Path, loaded: PolicyInEnv, modes: tuple[str, ...]) -> EpisodeStore:
    """A new store, or one of this kind to go on with. Raises StoreError for another."""
    if not path.exists():
        return EpisodeStore.create(path, describe_episodes(loaded.env), modes)
    store = EpisodeStore.append_to(path)
    reason = None
    if len(store.episode_ends) and ACTOR not in store.keys:
        reason = f"has no column {ACTOR}, so it is not one that live has made"
    elif store.attributes.get("environment") != plain(describe_episodes(loaded.env)["environment"]):
        reason = "holds episodes of another environment"
    elif tuple(store.modes) != modes:
        reason = "has other modes"
    if reason is not None:
        store.close()
        raise ConfigError(f"{path} {reason}; choose another --record")
    return store


def _count_modes(store: EpisodeStore) -> Counter[str]:
    """Episodes of each mode."""
    return Counter(mode or "none" for mode in store.episode_modes()) if len(store.episode_ends) else Counter()


def _copied(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An environment may go on in the same memory."""
    return {key: np.array(value) for key, value in observation.items()}


def _row(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An observation as a batch of one."""
    return {key: np.asarray(value)[None] for key, value in observation.items()}
