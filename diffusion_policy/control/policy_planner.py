"""The planner that samples a diffusion policy."""

import contextlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.config import PlanningPrecision, SampleConfig
from diffusion_policy.policy import DiffusionPolicy

FEW_STEPS = 128
"""Steps of all sequences together up to which a plan is ready sooner with the network laid out for few rows."""

Sample = Callable[[dict[str, Tensor], np.ndarray], Tensor]
"""(raw observations {key: (B, To, ...)}, noise (B, N, draws, T, D)) → raw sequences (B, N, T, A)."""


class PolicyPlanner:
    """A diffusion policy that samples one sequence for each observation."""

    def __init__(
        self, policy: DiffusionPolicy, sampling: SampleConfig | None = None, sample: Sample | None = None
    ) -> None:
        """`sample`: what samples this policy so, by default `EagerSampling`. Raises ValueError where the policy cannot
        be sampled so."""
        config, sampling = policy.config, sampling or SampleConfig()
        self._sample = sample or EagerSampling(policy, sampling)
        self.observation_horizon = config.observation_horizon
        self.steps = config.prediction_horizon - config.observation_horizon + 1
        self.action_horizon = config.action_horizon
        self.observation_shapes = dict(policy.shapes.observations)
        self.action_shape = policy.shapes.action
        self.noise_shape = policy.noise_shape(sampling)

    def plan(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, previous: np.ndarray | None = None
    ) -> np.ndarray:
        """See `Planner.plan`."""
        return self.sample(observations, noise[:, None])[:, 0]

    def sample(self, observations: Mapping[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """N plans for each observation: raw {key: (B, To, ...)}, (B, N, draws, T, D) float32 → raw actions
        (B, N, steps, A)."""
        observed = {key: torch.from_numpy(rows) for key, rows in observations.items()}
        sequences = self._sample(observed, noise)
        return sequences[:, :, self.observation_horizon - 1 :].cpu().numpy()


class EagerSampling:
    """Samples operator by operator, the reference of all other ways. On the CPU few sequences take the network that is
    laid out for them, with the weights of the first such call."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        sampling: SampleConfig,
        precision: PlanningPrecision = "fp32",
        *,
        few_rows: bool = True,
    ) -> None:
        """`precision`: fp32, or bf16 for what the network computes; `few_rows`: False for a network that is to be taken
        as it is."""
        self._policy, self._sampling = policy, sampling
        self._precision: PlanningPrecision = precision
        self._lay_out = few_rows and precision == "fp32" and policy.device.type == "cpu"
        self._for_few: DiffusionPolicy | None = None

    def __call__(self, observations: dict[str, Tensor], noise: np.ndarray) -> Tensor:
        """See `Sample`."""
        with half_precision(self._precision, self._policy.device):
            return self._choose(noise).sample_from(observations, noise, self._sampling)

    def _choose(self, noise: np.ndarray) -> DiffusionPolicy:
        """The policy laid out for so many sequences."""
        rows, steps = noise.shape[0] * noise.shape[1], noise.shape[3]
        if not self._lay_out or rows * steps > FEW_STEPS:
            return self._policy
        self._for_few = self._for_few or self._policy.for_few_rows()
        return self._for_few


def half_precision(precision: PlanningPrecision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 in what the network computes, or nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
