"""Actions that are executed with noise, as by a robot that does not do exactly what it is told."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.datasets.collect import disturb, still_action


class NoisyActions(gymnasium.ActionWrapper):
    """Executes each action with noise, as `collect` does, drawn from the episode's seed."""

    def __init__(self, env: gymnasium.Env, share: float) -> None:
        """`share`: standard deviation of the noise, as a share of the action's length."""
        super().__init__(env)
        self._share = share
        self._rng = derive_rng("action noise")
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See Gymnasium; the noise begins anew where a seed is given."""
        if seed is not None:
            self._rng = derive_rng("action noise", seed)
        self._observation, info = super().reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See Gymnasium."""
        self._observation, reward, terminated, truncated, info = super().step(action)
        return self._observation, reward, terminated, truncated, info

    def action(self, action: np.ndarray) -> np.ndarray:
        """What is executed instead."""
        return disturb(action, self._share, self._rng, still_action(self.env, self._observation))


def make_noisy(make_env: Callable[..., gymnasium.Env], share: float, **options: Any) -> gymnasium.Env:
    """An environment of a factory, with noisy actions."""
    return NoisyActions(make_env(**options), share)
