"""What a policy in training does on windows of held-out episodes, always under the same noise."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.config import SampleConfig, TrainConfig
from diffusion_policy.datasets.windows import Batch, Windows
from diffusion_policy.diffusion.samplers import Levels
from diffusion_policy.networks.sequences import TARGET
from diffusion_policy.policy import DiffusionPolicy
from diffusion_policy.training.losses import Loss, denoising_loss, derive_generator, draw

COMPARED = 8
"""Plans for each observation by which a student is compared with its teacher."""
SAME_END = 0.3
"""Two plans whose ends are nearer, in normalized numbers, have come to the same decision."""
VALIDATION_WINDOWS = 2048
"""At most so many windows are looked at, ..."""
SAMPLED_WINDOWS = 64
"""... and actions are sampled for so many of them, ..."""
SAMPLES = 4
"""... so many sequences for each (N), by DDIM in the usual steps."""


class Validation(NamedTuple):
    """What the EMA weights do on held-out windows."""

    loss: float
    """No condition is dropped."""
    action_error: float | None
    """Distance of a sampled action from the demonstrated one, in raw units, a mean over the Ta executed steps and N
    samples; None for a policy that must be told a mode, and for a classifier."""
    action_error_best: float | None
    """The same of the best of N samples."""
    teacher_agreement: float | None = None
    """Share of a student's plans that end where the teacher's from the same noise end; None without a teacher."""
    teacher_spread: float | None = None
    """Mean distance of two plans for one observation, as a share of that between the teacher's: below 1 where modes are
    lost."""


class Held(Protocol):
    """Held-out data that the loss is measured on, such as `Windows`."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Any:
        """Some rows, as a batch."""
        ...


def make_validation(
    windows: Windows,
    config: TrainConfig,
    loss: Loss = denoising_loss,
    *,
    lessons: Held | None = None,
    teacher: Callable[[Batch, np.ndarray], Tensor] | None = None,
) -> Callable[[DiffusionPolicy], Validation]:
    """A function that measures a policy on these windows; its loss on `lessons`, where it learns from others.
    `teacher`: (batch, noise (B, N, T, D)) → normalized sequences (B N, T, D)."""
    held = lessons or windows
    taught: list[Tensor] = []

    @torch.no_grad()
    def validate(policy: DiffusionPolicy) -> Validation:
        generator = derive_generator("validation", config.seed)
        chosen = torch.randperm(len(held), generator=generator)[:VALIDATION_WINDOWS]
        sums = []
        for indices in chosen.split(config.batch_size):
            draws = draw(policy, len(indices), generator, learning=False)
            sums.append(loss(policy, held.gather(indices), draws).sum())
        total = sum(torch.stack(sums).tolist())
        looked_at = torch.randperm(len(windows), generator=derive_generator("validation", config.seed))
        few = windows.gather(looked_at[:SAMPLED_WINDOWS])
        errors = action_errors(policy, few, config.seed)
        mean, best = (None, None) if errors is None else (errors.mean().item(), errors.amin(dim=1).mean().item())
        beside: tuple[float, ...] = ()
        if teacher is not None:
            noise = _draw_shared(policy, len(few.actions), config.seed)
            if not taught:
                taught.append(teacher(few, noise))
            beside = compare_plans(sample_shared(policy, few, noise), taught[0], COMPARED)
        return Validation(total / len(chosen), mean, best, *beside)

    return validate


def _draw_shared(policy: DiffusionPolicy, rows: int, seed: int) -> np.ndarray:
    """Noise that teacher and student are compared on, (B, N, T, D)."""
    shape = (COMPARED, *policy.sequences.shape)
    return np.stack(
        [derive_rng("validation of a student", seed, row).standard_normal(shape, np.float32) for row in range(rows)]
    )


def sample_shared(policy: DiffusionPolicy, batch: Batch, noise: np.ndarray, levels: Levels | None = None) -> Tensor:
    """What a policy makes of noise (B, N, T, D) that others get too, normalized (B N, T, D); `levels`: of DDIM, by
    default the usual ones."""
    cond = policy.encode(batch.observations, batch.labels).repeat_interleave(noise.shape[1], dim=0)
    start = torch.from_numpy(noise).to(policy.device).flatten(0, 1)[None]
    return policy.denoise_from(start, cond, levels or policy.diffusion.ddim_levels(), SampleConfig())


def compare_plans(plans: Tensor, taught: Tensor, number: int) -> tuple[float, float]:
    """Agreement and spread (see `Validation`) of plans and a teacher's, normalized (B N, T, D) each, with N = `number`
    for one observation."""
    agreement = float(((plans - taught)[:, -1].norm(dim=-1) < SAME_END).float().mean())
    spreads = []
    for some in (plans, taught):
        ends = some[:, -1].unflatten(0, (-1, number))  # (B, N, D)
        spreads.append(float(torch.cdist(ends, ends).mean()))
    return agreement, spreads[0] / max(spreads[1], 1e-9)


def action_errors(policy: DiffusionPolicy, batch: Batch, seed: int) -> Tensor | None:
    """Distance of each sampled sequence from the demonstrated one, (B, N); see `Validation`."""
    config = policy.config
    if config.objective == "autoencoding":
        back = policy.sequences.unnormalize(
            policy.sequences.normalize(batch.actions, batch.observations), 1, batch.observations
        )
        return (back - batch.actions[:, None, :, policy.shapes.executed].to(back)).norm(dim=-1).mean(dim=-1)
    if config.objective == "classifying" or (policy.labels and not config.condition_dropout):
        return None
    generators = [derive_rng("validation samples", seed, row) for row in range(len(batch.actions))]
    sampled = policy.sample(batch.observations, generators, SAMPLES)  # (B, N, T, A)
    difference = sampled - batch.actions[:, None, :, policy.shapes.executed]
    executed = policy.shapes.executed
    for column in policy.shapes.angles.get(TARGET, ()):
        if executed.start <= column < executed.stop:
            turned = difference[..., column - executed.start]
            difference[..., column - executed.start] = torch.remainder(turned + math.pi, 2 * math.pi) - math.pi
    first = config.observation_horizon - 1
    return difference[:, :, first : first + config.action_horizon].norm(dim=-1).mean(dim=-1)
