"""Samplers: plain functions from noise to a clean sequence, all with one signature.

    sampler(denoise, xT, schedule, levels, noise) -> x0

`denoise(xt, level) -> x0` hides prediction type, conditioning and clipping; `levels` comes from `choose_levels`;
`noise` (len(levels), *xT.shape) was drawn beforehand, or is None for a sampler that needs none. There is no
state and no hidden random number. The noise in xt is always derived from x0, so it stays consistent where `denoise`
clips.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.schedules import Schedule

Denoise = Callable[[Tensor, int], Tensor]


def choose_levels(schedule: Schedule, steps: int, spacing: str = "trailing") -> list[int]:
    """`steps` distinct levels, from the noisiest in use to the least noised.

    trailing: K − 1 first, then in equal strides; leading: 0 last, in equal strides; even: both ends, evenly between
    (Lin et al. 2024, arXiv 2305.08891, table 2). Raises ValueError for an unknown spacing or more steps than levels.
    """
    count = len(schedule)
    if not 1 <= steps <= count:
        raise ValueError(f"sampling steps must be from 1 to the {count} noise levels of the policy; got {steps}")
    if spacing == "trailing":
        return [round(count - i * count / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (count // steps) for i in reversed(range(steps))]
    if spacing == "even":
        return [round(level) for level in torch.linspace(count - 1, 0, steps, dtype=torch.float64).tolist()]
    raise ValueError(f"unknown spacing {spacing!r}; choose from trailing, leading, even")


class Step(NamedTuple):
    """The scalars of one sampling step, from a level to the next less noised one; float64 on the CPU, (), so that they
    join tensors of any type on any device without synchronisation."""

    level: int
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor


def _steps(schedule: Schedule, levels: Sequence[int]) -> list[Step]:
    """One step from each level to the next, the last to the clean sequence (alpha 1, sigma 0)."""
    alphas = torch.cat([schedule.alpha[list(levels)], torch.ones(1, dtype=torch.float64)])
    sigmas = torch.cat([schedule.sigma[list(levels)], torch.zeros(1, dtype=torch.float64)])
    return [Step(level, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]) for i, level in enumerate(levels)]


def ddim(
    denoise: Denoise, xT: Tensor, schedule: Schedule, levels: Sequence[int], noise: Tensor | None, *, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). eta = 0 is deterministic and needs no noise; eta = 1 is
    DDPM with the posterior variance on the same levels."""
    xt = xT
    for i, step in enumerate(_steps(schedule, levels)):
        x0 = denoise(xt, step.level)
        eps = (xt - step.alpha * x0) / step.sigma
        spread = eta * _posterior_deviation(step)
        xt = step.next_alpha * x0 + (step.next_sigma**2 - spread**2).sqrt() * eps
        if eta > 0:
            assert noise is not None
            xt = xt + spread * noise[i]
    return xt


def ddpm(
    denoise: Denoise,
    xT: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    noise: Tensor | None,
    *,
    large_variance: bool = False,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any levels: x ~ q(x_next | x_t, x0), eq. 6 and 7. The
    variance is the posterior's, or the forward step's (`large_variance`); the last step adds no noise."""
    assert noise is not None
    xt = xT
    for i, step in enumerate(_steps(schedule, levels)):
        x0 = denoise(xt, step.level)
        ratio = step.alpha / step.next_alpha  # signal kept by the forward step
        added = step.sigma**2 - ratio**2 * step.next_sigma**2  # variance added by the forward step
        mean = (ratio * step.next_sigma**2 * xt + step.next_alpha * added * x0) / step.sigma**2
        deviation = added.sqrt() if large_variance else _posterior_deviation(step)
        xt = mean if i == len(levels) - 1 else mean + deviation * noise[i]
    return xt


def _posterior_deviation(step: Step) -> Tensor:
    """Standard deviation of q(x_next | x_t, x0) (Ho et al. 2020, eq. 7)."""
    added = step.sigma**2 - (step.alpha / step.next_alpha) ** 2 * step.next_sigma**2
    return added.sqrt() * step.next_sigma / step.sigma


class Sampler(NamedTuple):
    """A sampler by name."""

    function: Callable[[Denoise, Tensor, Schedule, Sequence[int], Tensor | None], Tensor]
    needs_noise: bool


SAMPLERS = {"ddim": Sampler(ddim, needs_noise=False), "ddpm": Sampler(ddpm, needs_noise=True)}
