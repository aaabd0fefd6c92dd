"""Sampling as one CUDA graph: encoder, loop and normalizer are launched at once, which is most of what a small network
costs on a GPU.

A graph is captured for each number of rows, at its first call; inputs are copied into its own buffers.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.config import ConfigError, PlanningPrecision, SampleConfig
from diffusion_policy.control.planner import Steering
from diffusion_policy.control.policy_planner import half_precision, steer
from diffusion_policy.policy import DiffusionPolicy, Given

WARM_UPS = 3
"""Calls before the capture: libraries choose their kernels and memory in these."""


class _Captured(NamedTuple):
    """A graph and its buffers."""

    graph: torch.cuda.CUDAGraph
    observations: dict[str, Tensor]
    noise: Tensor
    given: Given | None
    sequences: Tensor


class CapturedSampling:
    """Samples as `EagerSampling`, with the same result but for rounding; see `control.policy_planner.Sample`."""

    guides = False

    def __init__(self, policy: DiffusionPolicy, sampling: SampleConfig, precision: PlanningPrecision = "fp32") -> None:
        """Raises ConfigError for a policy that is not on a CUDA device."""
        if policy.device.type != "cuda":
            raise ConfigError(f"--backend graph captures a CUDA graph; this policy is on {policy.device}")
        self._policy, self._sampling = policy, sampling
        self._precision: PlanningPrecision = precision
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    def __call__(self, observations: dict[str, Tensor], noise: np.ndarray, steering: Steering | None = None) -> Tensor:
        """See `Sample`. Raises ValueError for observations that are not finite."""
        for key, rows in observations.items():
            if not torch.isfinite(rows).all():  # on the CPU, before they are sent
                raise ValueError(f"the observation {key} holds NaN or infinity")
        _, given = steer(self._policy, steering, noise.shape[1], observations)
        case = (*noise.shape[:2], given is not None)
        captured = self._graphs.get(case)
        if captured is None:
            captured = self._graphs[case] = self._capture(observations, noise, given)
        for key, buffer in captured.observations.items():
            buffer.copy_(observations[key], non_blocking=True)
        captured.noise.copy_(torch.from_numpy(noise), non_blocking=True)
        for buffer, part in zip(captured.given or (), given or (), strict=True):
            buffer.copy_(part, non_blocking=True)
        captured.graph.replay()
        return captured.sequences.cpu()

    @torch.no_grad()
    def _capture(self, observations: dict[str, Tensor], noise: np.ndarray, given: Given | None) -> _Captured:
        device = self._policy.device
        buffers = {key: observations[key].to(device) for key in self._policy.keys}
        drawn = torch.from_numpy(noise).to(device)

        def sample() -> Tensor:
            with half_precision(self._precision, device):
                return self._policy.sample_on_device(buffers, drawn, self._sampling, given=given)

        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                sample()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sequences = sample()
        return _Captured(graph, buffers, drawn, given, sequences)
