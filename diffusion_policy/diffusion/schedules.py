"""Noise schedules: how much signal and how much noise each level holds, and which levels a sampler visits.

A schedule is two arrays, with `xt = alpha[level] * x0 + sigma[level] * eps`. A new one is a function that makes them
and a line in `SCHEDULES`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETA_MAX = 0.999
"""No level adds more variance (Nichol & Dhariwal 2021, section 3.2)."""


@dataclass(frozen=True)
class Schedule:
    """K noise levels of decreasing signal; level 0 is the least noised one."""

    alpha: Tensor
    """Share of the clean sequence, (K,) float64 on the CPU; it may end at 0, a level without signal."""
    sigma: Tensor
    """Share of the noise, (K,) float64 on the CPU."""
    ends_silent: bool = field(init=False)
    """Whether the last level holds no signal, alpha = 0."""

    def __post_init__(self) -> None:
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) == 0:
            shapes = f"{tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            raise ValueError(f"a schedule needs one alpha and one sigma for each level, (K,) both; got {shapes}")
        if not (torch.isfinite(self.alpha).all() and torch.isfinite(self.sigma).all()):
            raise ValueError("a schedule must be finite; it has NaN or infinity")
        if not (self.alpha.diff() < 0).all():
            level = int((~(self.alpha.diff() < 0)).nonzero()[0]) + 1
            raise ValueError(
                f"a schedule's signal must decrease from level to level; alpha goes from {self.alpha[level - 1]:.6g} "
                f"to {self.alpha[level]:.6g} at level {level}"
            )
        if self.alpha[-1] < 0 or (self.sigma <= 0).any():
            raise ValueError("a schedule's alpha must be at least 0 and its sigma above 0 at every level")
        if not ((self.alpha / self.sigma).diff() < 0).all():
            raise ValueError("a schedule's signal-to-noise ratio, alpha / sigma, must decrease from level to level")
        object.__setattr__(self, "ends_silent", bool(self.alpha[-1] == 0))

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def log_snr(self) -> Tensor:
        """log(alpha² / sigma²), (K,), decreasing; −∞ at a level without signal. DPM-Solver's λ is half of it."""
        return 2 * (self.alpha.log() - self.sigma.log())


def from_betas(betas: Tensor) -> Schedule:
    """The variance-preserving schedule of the variances β added by each level, (K,) float64:
    alpha² = ᾱ = ∏ (1 − β) (Ho et al. 2020, eq. 4). Raises ValueError for a β outside (0, 1)."""
    wrong = betas[~((betas > 0) & (betas < 1))]
    if len(wrong):
        raise ValueError(f"every beta must be above 0 and below 1; got {wrong[0]:g}")
    signal_power = torch.cumprod(1 - betas, dim=0)
    return Schedule(signal_power.sqrt(), (1 - signal_power).sqrt())


def linear(levels: int, beta_start: float | None = None, beta_end: float | None = None) -> Schedule:
    """Evenly spaced β (Ho et al. 2020, section 4): 1e-4 to 0.02 at K = 1000; the default range grows as 1000 / K, so
    that the last level is noise for any K."""
    start, end = _beta_range(levels, beta_start, beta_end)
    return from_betas(torch.linspace(start, end, levels, dtype=torch.float64))


def sigmoid(levels: int, beta_start: float | None = None, beta_end: float | None = None) -> Schedule:
    """β along a sigmoid from −6 to 6 (Xu et al. 2022, GeoDiff, arXiv 2203.02923); its default range is that of
    `linear`."""
    start, end = _beta_range(levels, beta_start, beta_end)
    rise = torch.sigmoid(torch.linspace(-6, 6, levels, dtype=torch.float64))
    return from_betas(start + (end - start) * rise)


def constant(levels: int, beta: float | None = None) -> Schedule:
    """The same β at every level: alpha² = (1 − β)^(level + 1). By default 10 / K, so that the last level is noise."""
    beta = min(10 / levels, BETA_MAX) if beta is None else beta
    return from_betas(torch.full((levels,), beta, dtype=torch.float64))


def cosine(levels: int, offset: float = 0.008) -> Schedule:
    """ᾱ(t) = cos²((t + s) / (1 + s) · π / 2), with β ≤ 0.999 (Nichol & Dhariwal 2021, eq. 17; s = `offset`)."""
    t = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    signal_power = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - signal_power[1:] / signal_power[:-1]).clamp(max=BETA_MAX))


def flow(levels: int) -> Schedule:
    """alpha = 1 − t, sigma = t with t = 1/K, 2/K ... 1: straight lines from data to noise (Liu et al. 2022, rectified
    flow, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747). The last level holds no signal."""
    t = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    return Schedule(1 - t, t)


def _beta_range(levels: int, start: float | None, end: float | None) -> tuple[float, float]:
    """The range that is given; where it is not, that of 1000 levels, scaled, but never beyond BETA_MAX."""
    default_start, default_end = (min(beta * 1000 / levels, BETA_MAX) for beta in (1e-4, 0.02))
    return default_start if start is None else start, default_end if end is None else end


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "sigmoid": sigmoid,
    "constant": constant,
    "flow": flow,
}


def make_schedule(name: str, levels: int, options: Sequence[float] = ()) -> Schedule:
    """A schedule by name; `options` are its numbers after `levels`, in order (β's range, the cosine's offset).

    Raises ValueError for an unknown name, too many options, or numbers that make no schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    takes = list(inspect.signature(SCHEDULES[name]).parameters)[1:]
    if len(options) > len(takes):
        known = ", ".join(takes) or "none"
        raise ValueError(f"the schedule {name} takes the options {known}; got {len(options)} numbers")
    return SCHEDULES[name](levels, *options)


def low_middle_high(schedule: Schedule) -> tuple[int, int, int]:
    """Three levels to look at: a tenth up, half way, and the last."""
    return len(schedule) // 10, len(schedule) // 2, len(schedule) - 1


SPACINGS = ("trailing", "leading", "even", "log-snr")


def choose_levels(
    schedule: Schedule, steps: int, spacing: str = "trailing", with_signal: bool = False, jump_from: float = 0.0
) -> list[int]:
    """`steps` distinct levels, from the noisiest in use to the least noised; each is visited once.

    trailing: the last level first, then in equal strides; leading: 0 last, in equal strides; even: both ends, evenly
    between (Lin et al. 2024, arXiv 2305.08891, table 2); log-snr: both ends, evenly in log-SNR between (Lu et al. 2022,
    DPM-Solver, section 3.4), with the next free level where two of them would coincide. `with_signal` leaves out a last
    level of alpha 0, where noise prediction and log-SNR are undefined; log-snr always does. `jump_from`: the share of
    the levels, from the least noised one, that is left out: the last step jumps over them.

    Raises ValueError for an unknown spacing, and for more steps than there are distinct levels, which it counts.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; choose from {', '.join(SPACINGS)}")
    silent = schedule.ends_silent and (with_signal or spacing == "log-snr")
    lowest = round(jump_from * len(schedule))
    count = len(schedule) - silent - lowest
    if not 1 <= steps <= count:
        which = (" that hold signal" if silent else "") + (f" from {jump_from:g} of them on" if lowest else "")
        raise ValueError(f"sampling steps must be from 1 to the {count} noise levels{which}; got {steps}")
    chosen = _space(schedule.log_snr[lowest : lowest + count], count, steps, spacing)
    return [lowest + level for level in chosen]


def _space(log_snr: Tensor, count: int, steps: int, spacing: str) -> list[int]:
    """Of `count` levels with these log-SNR."""
    if spacing == "trailing":
        return [round(count - i * count / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (count // steps) for i in reversed(range(steps))]
    if spacing == "even":
        return [round(level) for level in torch.linspace(count - 1, 0, steps, dtype=torch.float64).tolist()]
    levels = [count]
    for i, target in enumerate(torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)):
        nearest = int((log_snr - target).abs().argmin())
        levels.append(max(min(nearest, levels[-1] - 1), steps - 1 - i))  # below the last one, with room for the rest
    return levels[1:]


# A compiled graph holds the levels, not how they are found. This is torch.compiler.assume_constant_result, which would
# import the compiler: a second of the start of every program.
choose_levels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
