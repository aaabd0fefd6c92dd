"""An environment as a robot that is controlled in real time: it answers `observe` and takes `act`, and does not wait.

    diffusion-policy run-robot diffusion_policy.envs.simulated_robot:SimulatedRobot \\
        --checkpoint runs/demo/policy --hz 28.6 --output runs/robot

Each action is one step of the simulator, whenever it comes. Knows no policy.
"""

from typing import Any

import numpy as np

from diffusion_policy.envs.adapters import EnvSpec
from diffusion_policy.envs.protocols import as_foreseeing


class SimulatedRobot:
    """An episode of an environment; see `control.realtime.Robot`."""

    def __init__(
        self, env: str = "diffusion_policy/Avoid-v0", env_kwargs: dict[str, Any] | None = None, seed: int = 0
    ) -> None:
        """`env`: Gymnasium id; `env_kwargs`: its arguments; `seed`: of the episode."""
        self._env = EnvSpec(env, env_kwargs or {})()
        self._seed = seed
        foreseeing = as_foreseeing(self._env)
        self.roll_forward = None if foreseeing is None else foreseeing.roll_forward
        """What is expected to be observed after some actions, for --roll-forward; None where it is not known."""
        self._observation: dict[str, np.ndarray] | None = None
        self._ended = False
        self.success: bool | None = None
        """Of the episode; None before its first step."""

    def observe(self) -> dict[str, np.ndarray] | None:
        """What is observed now, {key: (...)}; None once the episode has ended."""
        if self._observation is None:
            self._observation, _ = self._env.reset(seed=self._seed)
        return None if self._ended else self._observation

    def act(self, action: np.ndarray) -> None:
        """One step of the simulator."""
        space = self._env.action_space
        action = np.asarray(action, space.dtype).reshape(space.shape or ())
        self._observation, _, terminated, truncated, info = self._env.step(action)
        self._ended = terminated or truncated
        self.success = bool(info.get("is_success", False))

    def stop(self) -> None:
        """Nothing moves between two steps."""
