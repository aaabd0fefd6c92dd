"""The planner that samples a diffusion policy."""

from collections.abc import Mapping

import numpy as np
import torch

from diffusion_policy.config import SampleConfig
from diffusion_policy.policy import DiffusionPolicy


class PolicyPlanner:
    """A diffusion policy that samples one sequence for each observation."""

    def __init__(self, policy: DiffusionPolicy, sampling: SampleConfig | None = None) -> None:
        """Raises ValueError where the policy cannot be sampled so."""
        config = policy.config
        self._policy, self._sampling = policy, sampling or SampleConfig()
        self.observation_horizon = config.observation_horizon
        self.steps = config.prediction_horizon - config.observation_horizon + 1
        self.action_horizon = config.action_horizon
        self.observation_shapes = dict(policy.shapes.observations)
        self.action_shape = policy.shapes.action
        self.noise_shape = policy.noise_shape(self._sampling)

    def plan(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, previous: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Planner.plan`."""
        observed = {key: torch.from_numpy(rows) for key, rows in observations.items()}
        sequences = self._policy.sample_from(observed, noise[:, None], self._sampling)[:, 0]  # (B, T, A)
        return sequences[:, self.observation_horizon - 1 :].cpu().numpy()
