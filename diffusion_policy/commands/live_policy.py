"""The policy of a live session: it acts, loses track while a person acts, and its settings change while it runs.

Knows policies and controllers. Knows no simulator and no recording.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.commands.joining import choose_chunking, find_roll
from diffusion_policy.commands.live_fan import NO_PATHS, Lead, Paths, paths_of, sample_fan
from diffusion_policy.commands.live_sights import LiveSight, see
from diffusion_policy.config import ChunkingConfig, ConfigError, SampleConfig, with_options
from diffusion_policy.control.controller import Controller
from diffusion_policy.control.policy_planner import PolicyPlanner
from diffusion_policy.policy import DiffusionPolicy

ON = np.ones(1, bool)
Observation = Mapping[str, np.ndarray]


class LivePolicy:
    """A policy with its controller, and the paths and images of its last plan."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        env: gymnasium.Env,
        sampling: SampleConfig,
        chunking: ChunkingConfig,
        *,
        delay_steps: int,
        action_horizon: int | None,
        fan: int,
    ) -> None:
        """`env` may foresee; `fan`: plans that are drawn beside the followed one. Raises ValueError for settings that
        the policy cannot follow."""
        self._policy, self._roll, self._fan = policy, find_roll(env), fan
        self._sampling, self._chunking, self._delay = sampling, chunking, delay_steps
        self._action_horizon = action_horizon
        self._controller = self._make_controller()
        self.paths = NO_PATHS
        """Of the plan that is followed."""
        self.sights: tuple[LiveSight, ...] = ()
        """What that was made from, where images are observed."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """The keys of the images that it observes."""
        return self._policy.images

    def begin(self, seed: int, observation: Observation) -> None:
        """Start the episode of a seed."""
        self._seed, self._repeat, self._steps = seed, 0, 0
        self._recent = deque([observation], self._policy.config.observation_horizon)
        self._latency: float | None = None
        self.interrupt()

    def observe(self, observation: Observation) -> None:
        """Hear what was observed after a step, whoever acted in it."""
        self._recent.append(observation)
        self._steps += 1

    def interrupt(self) -> None:
        """Drop the plan: a person acts."""
        self.paths, self.sights = NO_PATHS, ()
        self.forget()

    def forget(self) -> None:
        """Plan anew, with other noise, when it acts next."""
        self._stale = True

    def act(self, lead: Lead) -> np.ndarray:
        """The next action (A,), after a plan where one is due; `lead` says on which paths plans lead."""
        if self._stale:
            self._catch_up()
        started = time.perf_counter()
        action = self._controller.act(_row(self._recent[-1]))[0]
        if 0 in self._controller.planned:
            self._latency = 1000 * (time.perf_counter() - started)
            self.paths = self._draw(self._controller.planned[0], lead)
            self.sights = see(self._policy, self._recent[-1], self._steps)
        return action

    def _catch_up(self) -> None:
        self._controller.reset(ON, [(self._seed, self._repeat)])
        self._repeat += 1  # after a correction other noise
        for past in list(self._recent)[:-1]:
            self._controller.observe(_row(past), ON)
        self._stale = False

    def _draw(self, plan: np.ndarray, lead: Lead) -> Paths:
        path = lead(plan)
        if path is None or not self._fan:
            return Paths(path, [], [])
        rng = derive_rng("live", self._seed, self._steps)
        return paths_of(lead, plan, *sample_fan(self._policy, self._sampling, self._recent, rng, self._fan))

    # Settings

    def change(self, settings: Mapping[str, Any]) -> None:
        """Go on with other settings. Raises ValueError or TypeError for those that cannot be; then all is as it was."""
        asked = dict(settings)
        delay = asked.pop("delay_steps", self._delay)
        if type(delay) is not int:
            raise ConfigError(f"delay-steps must be a whole number; got {delay!r:.60}")
        if asked.get("guidance") is not None:
            asked["guidance"] = float(asked["guidance"])
        joining = {name: asked.pop(name) for name in ("chunking", "roll_forward") if name in asked}
        before = self._sampling, self._chunking, self._delay
        try:
            self._sampling = with_options(replace(self._sampling, mode=None), **{"mode": self._sampling.mode} | asked)
            self._chunking = with_options(self._chunking, **joining)
            self._delay = delay
            self._controller = self._make_controller()
        except BaseException:
            self._sampling, self._chunking, self._delay = before
            raise
        self.forget()

    def _make_controller(self) -> Controller:
        policy = self._policy
        policy.resolve_sampling(self._sampling)
        chunking = choose_chunking(self._chunking, policy, self._sampling, self._roll)
        planner = PolicyPlanner(policy, self._sampling)
        return Controller(planner, 1, action_horizon=self._action_horizon, delay_steps=self._delay, chunking=chunking)

    def tell(self) -> dict[str, Any]:
        """What the page shows of it."""
        return {
            "latency_ms": self._latency,
            "settings": {
                "sampler": self._sampling.sampler,
                "sampling_steps": self._sampling.sampling_steps,
                "guidance": self._sampling.guidance,
                "mode": self._sampling.mode,
                "instruction": self._sampling.instruction,
                "chunking": self._chunking.chunking,
                "roll_forward": self._chunking.roll_forward,
                "delay_steps": self._delay,
            },
            "modes": list(self._policy.modes),
            "instructions": list(self._policy.instructions),
            "can_guide": bool(self._policy.config.condition_dropout),
            "can_roll": self._roll is not None,
        }


def _row(observation: Observation) -> dict[str, np.ndarray]:
    """An observation as a batch of one."""
    return {key: np.asarray(value)[None] for key, value in observation.items()}
