"""What a policy in training does on windows of held-out episodes, always under the same noise."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.config import SampleConfig, TrainConfig
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.diffusion.samplers import SAMPLERS
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import Loss, denoising_loss, derive_generator, draw

VALIDATION_WINDOWS = 2048
"""At most so many windows are looked at, ..."""
SAMPLED_WINDOWS = 64
"""... and actions are sampled for so many of them, ..."""
SAMPLES = 4
"""... so many sequences for each (N) ..."""
SAMPLING_STEPS = 16
"""... in at most so many steps of DDIM."""


class Validation(NamedTuple):
    """What the EMA weights do on held-out windows."""

    loss: float
    """No condition is dropped."""
    action_error: float | None
    """Distance of a sampled action from the demonstrated one, in raw units, a mean over the Ta executed steps and N
    samples; None for a policy that must be told a mode."""
    action_error_best: float | None
    """The same of the best of N samples."""


def make_validation(
    windows: Windows, config: TrainConfig, loss: Loss = denoising_loss
) -> Callable[[DiffusionPolicy], Validation]:
    """A function that measures a policy on these windows."""

    @torch.no_grad()
    def validate(policy: DiffusionPolicy) -> Validation:
        generator = derive_generator("validation", config.seed)
        chosen = torch.randperm(len(windows), generator=generator)[:VALIDATION_WINDOWS]
        sums = []
        for indices in chosen.split(config.batch_size):
            draws = draw(policy, len(indices), generator, drop=False)
            sums.append(loss(policy, windows.gather(indices), draws).sum())
        total = sum(torch.stack(sums).tolist())
        errors = action_errors(policy, windows.gather(chosen[:SAMPLED_WINDOWS]), config.seed)
        mean, best = (None, None) if errors is None else (errors.mean().item(), errors.amin(dim=1).mean().item())
        return Validation(total / len(chosen), mean, best)

    return validate


def action_errors(policy: DiffusionPolicy, batch: Batch, seed: int) -> Tensor | None:
    """Distance of each sampled sequence from the demonstrated one, (B, N); see `Validation`."""
    config = policy.config
    if policy.modes and not config.condition_dropout:
        return None
    generators = [derive_rng("validation samples", seed, row) for row in range(len(batch.actions))]
    sampled = policy.sample(batch.observations, generators, SAMPLES, quick_sampling(policy))  # (B, N, T, A)
    difference = sampled - batch.actions[:, None, :, policy.target.executed]
    for column in policy.shapes.angles.get(policy.target.key, ()):
        difference[..., column] = torch.remainder(difference[..., column] + math.pi, 2 * math.pi) - math.pi
    first = config.observation_horizon - 1
    return difference[:, :, first : first + config.action_horizon].norm(dim=-1).mean(dim=-1)


def quick_sampling(policy: DiffusionPolicy) -> SampleConfig:
    """How actions are sampled while a policy is trained: in 16 steps of DDIM, or as many as it has."""
    return SampleConfig(sampling_steps=min(SAMPLING_STEPS, policy.diffusion.most_steps(SAMPLERS["ddim"])))
