"""One policy in one environment, watched and steered while it runs: what `diffusion-policy live` shows, step by step.

A step asks a person or the policy for an action, takes it in the environment, where a person may push a body
meanwhile, and notes what came of it. The parts
stand in files of their own: the policy with its settings (`live_policy`), the mouse (`live_mouse`), the episode and
its store (`live_recording`), the pictures (`live_pictures`), and what a person can ask for (`live_commands`).
"""

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.bounds import MOST_SEED
from diffusion_policy.basics.files import plain
from diffusion_policy.commands.live_fan import Lead, lead
from diffusion_policy.commands.live_mouse import Mouse
from diffusion_policy.commands.live_painter import step_env
from diffusion_policy.commands.live_pictures import Frame, Pictures
from diffusion_policy.commands.live_policy import LivePolicy
from diffusion_policy.commands.live_recording import ACTOR, PERSON, POLICY, LiveEpisode, Recording, open_record
from diffusion_policy.commands.policy_in_env import PolicyInEnv
from diffusion_policy.config import ChunkingConfig, SampleConfig
from diffusion_policy.datasets.demonstration import PUSHED
from diffusion_policy.envs.protocols import as_multimodal, as_pictured

LINGER = 15
"""Control steps for which the end of an episode is seen."""


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
        self._env = loaded.make_env(render_mode="rgb_array")
        self._plane, self._task = as_pictured(self._env), as_multimodal(self._env)
        self._pictures = Pictures(self._env, loaded.make_env, loaded.env_id, seed)
        self.policy = LivePolicy(
            loaded.policy,
            self._env,
            sampling,
            chunking,
            delay_steps=delay_steps,
            action_horizon=action_horizon,
            fan=fan,
        )
        self.mouse = Mouse(self._env)
        modes = tuple(self._task.modes) if self._task else ()
        marks = (ACTOR, PUSHED) if self.mouse.can_push else (ACTOR,)
        self.recording = Recording(None if record is None else open_record(record, loaded, modes, marks))
        self.running, self.driver = True, POLICY
        self._counts: Counter[str] = Counter()
        self._episodes = self._successes = 0
        self.begin(seed)

    # What happens

    def begin(self, seed: int) -> None:
        """Start the episode of a seed."""
        self.episode = LiveEpisode(seed, self._env.reset(seed=seed)[0])
        self._pictures.begin(seed)
        self.mouse.let_go()
        self.policy.begin(seed, self.episode.observation)

    def advance(self) -> None:
        """One control step; an episode that has ended is seen for a moment, and followed by that of the next seed."""
        if self.episode.ended:
            self._linger()
            return
        actor = PERSON if self.mouse.held else self.driver
        action, push = self._choose_action(actor), self.mouse.pushing
        self.episode.act(action, {ACTOR: actor} | ({PUSHED: push is not None} if self.mouse.can_push else {}))
        space = self._env.action_space
        taken = np.asarray(action, space.dtype).reshape(space.shape or ())
        self._pictures.step(taken, push)
        observation, _, terminated, truncated, info = step_env(self._env, taken, push)
        self.episode.observe(observation)
        self.policy.observe(self.episode.observation)
        if terminated or truncated:
            self._end(bool(info.get("is_success", False)))

    def _choose_action(self, actor: int) -> np.ndarray:
        leading: Lead = partial(lead, self._plane, self.episode.observation)
        if actor == POLICY:
            return self.policy.act(leading)
        action = self.mouse.action(leading, self._pictures.size)
        self.policy.interrupt()
        return action

    def _end(self, success: bool) -> None:
        self.episode.end(success, self._task.mode(self.episode.path()) if self._task else None)
        self._episodes += 1
        self._successes += success
        self._counts[self.episode.mode or "none"] += success
        self.recording.add(self.episode)

    def _linger(self) -> None:
        self.episode.lingered += 1
        if self.episode.lingered >= LINGER:
            self.begin(self.episode.seed + 1 if self.episode.seed < MOST_SEED else 0)

    # What a person does

    def drive(self, driver: int) -> None:
        """Let the policy or a person act. Raises ConfigError where the mouse cannot steer."""
        if driver == PERSON:
            self.mouse.require_steering()
        self.driver = driver
        self.policy.forget()

    def push(self, place: np.ndarray) -> None:
        """Push the body at a place in the picture, in shares of its size, (2,). Raises ConfigError where there is
        none."""
        self.mouse.push(place, self._pictures.size)

    def record(self, on: bool) -> None:
        """Record from the start of an episode, or no more. Raises ConfigError where there is no store."""
        self.recording.switch(on)
        if on and self.episode.actions:
            self.begin(self.episode.seed)  # an episode is recorded whole

    # What is seen

    def look(self, share: float = 1.0) -> Frame | None:
        """How it stands, as `ahead` looks ago, since the pictures are drawn meanwhile; None where there were not so
        many. `share`: of the picture's width and height; less is faster."""
        return self._pictures.look(share, self._tell(), self.policy.paths, self.policy.sights)

    @property
    def ahead(self) -> int:
        """Pictures that are being drawn while others are asked for."""
        return self._pictures.ahead

    def _tell(self) -> dict[str, Any]:
        episode = self.episode
        state = {
            "seed": episode.seed,
            "step": len(episode.actions),
            "running": self.running,
            "ended": episode.ended,
            "success": episode.success,
            "mode": episode.mode,
            "driver": self.driver,
            "held": self.mouse.held,
            "pushing": self.mouse.pushing is not None,
            "can_steer": self.mouse.can_steer,
            "can_push": self.mouse.can_push,
            "episodes": self._episodes,
            "successes": self._successes,
            "counts": dict(self._counts),
        }
        return plain(state | self.policy.tell() | self.recording.tell())

    def close(self) -> None:
        """Keep the last episode, and end."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._env.close)
            stack.callback(self._pictures.close)
            self.recording.close()
