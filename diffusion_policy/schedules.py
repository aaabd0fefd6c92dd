"""Noise schedules: how much signal and how much noise each level holds.

A schedule is two arrays, with `xt = alpha[level] * x0 + sigma[level] * eps`. A new one is a function that makes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """K noise levels of decreasing signal; level 0 is the least noised one."""

    alpha: Tensor
    """Share of the clean sequence, (K,) float64 on the CPU."""
    sigma: Tensor
    """Share of the noise, (K,) float64 on the CPU."""

    def __post_init__(self) -> None:
        if not (self.alpha.diff() < 0).all():
            raise ValueError("a schedule's signal must decrease from level to level")

    def __len__(self) -> int:
        return len(self.alpha)


def from_betas(betas: Tensor) -> Schedule:
    """The variance-preserving schedule of the variances β added by each level, (K,) float64:
    alpha² = ᾱ = ∏ (1 − β) (Ho et al. 2020, eq. 4)."""
    signal_power = torch.cumprod(1 - betas, dim=0)
    return Schedule(signal_power.sqrt(), (1 - signal_power).sqrt())


def linear(levels: int, beta_start: float | None = None, beta_end: float | None = None) -> Schedule:
    """Evenly spaced β (Ho et al. 2020, section 4): 1e-4 to 0.02 at K = 1000; the default range grows as 1000 / K, so
    that the last level is noise for any K."""
    start = 1e-4 * 1000 / levels if beta_start is None else beta_start
    end = 0.02 * 1000 / levels if beta_end is None else beta_end
    return from_betas(torch.linspace(start, end, levels, dtype=torch.float64).clamp(max=0.999))


def cosine(levels: int, offset: float = 0.008) -> Schedule:
    """ᾱ(t) = cos²((t + s) / (1 + s) · π / 2), with β ≤ 0.999 (Nichol & Dhariwal 2021, eq. 17; s = `offset`)."""
    t = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    signal_power = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - signal_power[1:] / signal_power[:-1]).clamp(max=0.999))


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"cosine": cosine, "linear": linear}
