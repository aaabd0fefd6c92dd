"""The planner that samples a diffusion policy."""

import contextlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.config import PlanningPrecision, SampleConfig
from diffusion_policy.control.planner import Steering
from diffusion_policy.policy import DiffusionPolicy, Given, Wrap

FEW_STEPS = 128
"""Steps of all sequences together up to which a plan is ready sooner with the network laid out for few rows."""


class Sample(Protocol):
    """A way to sample a policy."""

    guides: bool
    """Whether it can be steered by gradients."""

    def __call__(self, observations: dict[str, Tensor], noise: np.ndarray, steering: Steering | None = None) -> Tensor:
        """(raw observations {key: (B, To, ...)}, noise (B, N, draws, T, D)) → raw sequences (B, N, T, A)."""
        ...


class PolicyPlanner:
    """A diffusion policy that samples sequences for each observation."""

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
        self.observation_shapes = dict(policy.watched)
        self.action_shape = policy.shapes.action
        self.noise_shape = policy.noise_shape(sampling)
        self.guides, self.longest_prefix = self._sample.guides, config.max_delay

    def sample(
        self, observations: Mapping[str, np.ndarray], noise: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """See `Planner.sample`; noise is (B, N, draws, T, D)."""
        observed = {key: torch.from_numpy(rows) for key, rows in observations.items()}
        sequences = self._sample(observed, noise, steering)
        return sequences[:, :, self.observation_horizon - 1 :].cpu().numpy()


class EagerSampling:
    """Samples operator by operator, the reference of all other ways. On the CPU few sequences take the network that is
    laid out for them, with the weights of the first such call."""

    guides = True

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

    def __call__(self, observations: dict[str, Tensor], noise: np.ndarray, steering: Steering | None = None) -> Tensor:
        """See `Sample`."""
        policy = self._choose(noise)
        wrap, given = steer(policy, steering, noise.shape[1], observations)
        free = not wrap and not policy.leads
        record = torch.inference_mode() if free else contextlib.nullcontext()  # a tenth faster, but without gradients
        with record, half_precision(self._precision, self._policy.device):
            return policy.sample_from(observations, noise, self._sampling, wrap, given)

    def _choose(self, noise: np.ndarray) -> DiffusionPolicy:
        """The policy laid out for so many sequences."""
        rows, steps = noise.shape[0] * noise.shape[1], noise.shape[3]
        if not self._lay_out or rows * steps > FEW_STEPS:
            return self._policy
        self._for_few = self._for_few or self._policy.for_few_rows()
        return self._for_few


def steer(
    policy: DiffusionPolicy, steering: Steering | None, number: int, observations: dict[str, Tensor]
) -> tuple[list[Wrap], Given | None]:
    """Wrappers of the denoiser, and what it is given, for a steering of `number` sequences for each observation."""
    if steering is None:
        return [], None
    actions, weights = (torch.from_numpy(one) for one in steering.filled())
    sequence, weights = policy.sequences.place(actions, weights, number, observations)
    if steering.strength is None:
        return [], Given(sequence, weights == 1)
    return [policy.guide(sequence, weights, steering.strength, steering.deviation)], None


def half_precision(precision: PlanningPrecision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 in what the network computes, or nothing. Weights are converted once within it."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
