"""Samplers: from noise to a clean sequence, level by level.

The loop over the levels exists once, in `Sampler`. A sampler is its formula: a function of the path so far that gives
xt at the next level.

    formula(path) -> xt at the next level

`path.denoise(xt, level) -> x0` hides prediction type, conditioning, guidance and clipping. There is no state and no
hidden random number: noise is drawn beforehand. The noise in xt is always derived from x0, so it stays consistent where
`denoise` clips. Every sampler ends with one step from the last level to the clean sequence (alpha 1, sigma 0), without
noise. An xT with NaN is refused on the CPU; on a GPU, and in a compiled graph, looking would mean waiting.

In the formulas, "next" is the level after a step: the less noised one. λ = log(alpha / sigma), h = λ_next − λ.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.diffusion.schedules import Schedule

Denoise = Callable[[Tensor, int], Tensor]
"""(xt, level) → x0, for all rows at one level."""
Levels = Sequence[int]
Noise = Tensor | None
"""(len(levels), *xT.shape), drawn beforehand; None for a sampler that needs none."""
Hook = Callable[[Tensor, int], Tensor]
"""(xt, i) → xt, called when the i-th of the levels is reached, i ≥ 1: a corrector, inpainting."""


class Step(NamedTuple):
    """The scalars of one sampling step, from a level to the next less noised one; float64 on the CPU, (), so that they
    join tensors of any type on any device without synchronisation."""

    level: int
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor
    h: Tensor
    """λ_next - λ; ∞ in the last step."""
    last: bool


class Path(NamedTuple):
    """What a formula is given: all steps, and what has been on those up to the one to take now."""

    denoise: Denoise
    steps: list[Step]
    noise: Noise
    xts: list[Tensor]
    """xt at each level that was reached, as it was denoised."""
    x0s: list[Tensor]
    """What it was denoised to."""

    @property
    def i(self) -> int:
        """Number of the step to take."""
        return len(self.x0s) - 1

    @property
    def now(self) -> tuple[Step, Tensor, Tensor]:
        """The step to take, xt and x0 at its start."""
        return self.steps[self.i], self.xts[-1], self.x0s[-1]

    @property
    def drawn(self) -> Tensor:
        """The noise of this step, shape of xt."""
        assert self.noise is not None
        return self.noise[self.i]


Formula = Callable[[Path], Tensor]


class Sampler(NamedTuple):
    """A formula and what it needs; called, it runs the loop."""

    formula: Formula
    needs_noise: bool = False
    needs_signal: bool = False
    """Whether it cannot start from a level without signal."""

    def __call__(
        self,
        denoise: Denoise,
        xT: Tensor,
        schedule: Schedule,
        levels: Levels,
        noise: Noise = None,
        hooks: Sequence[Hook] = (),
    ) -> Tensor:
        """The loop over the levels, a decreasing list of distinct ones (`schedules.choose_levels`): from xT at the
        first of them to the clean sequence, shape of xT. Raises ValueError for levels that cannot be, for missing
        noise, and for a first level without signal where the sampler needs some."""
        steps = make_steps(schedule, levels, xT)
        if self.needs_noise and noise is None:
            raise ValueError("this sampler adds noise; give it noise (len(levels), *xT.shape), drawn beforehand")
        if self.needs_signal and schedule.ends_silent and levels[0] == len(schedule) - 1:
            raise ValueError(
                f"level {levels[0]} holds no signal, so its log-SNR is infinite and this solver cannot start there; "
                "start one level lower (choose_levels with_signal=True)"
            )
        path, xt = Path(denoise, steps, noise, [], []), xT
        for i, step in enumerate(steps):
            for hook in hooks if i else ():
                xt = hook(xt, i)
            path.xts.append(xt)
            path.x0s.append(denoise(xt, step.level))
            xt = self.formula(path)
        return xt


def make_steps(schedule: Schedule, levels: Levels, xT: Tensor) -> list[Step]:
    """One step from each level to the next, the last to the clean sequence (alpha 1, sigma 0)."""
    if not levels or any(a <= b for a, b in pairwise([len(schedule), *levels, -1])):
        raise ValueError(f"levels must decrease from at most {len(schedule) - 1} to at least 0; got {list(levels)}")
    on_gpu = xT.device.type != "cpu"  # where looking at numbers would wait for the device
    if not (torch.compiler.is_compiling() or on_gpu or torch.isfinite(xT).all()):
        raise ValueError("cannot denoise: the noised sequence holds NaN or infinity")
    alphas = torch.cat([schedule.alpha[list(levels)], torch.ones(1, dtype=torch.float64)])
    sigmas = torch.cat([schedule.sigma[list(levels)], torch.zeros(1, dtype=torch.float64)])
    hs = (alphas.log() - sigmas.log()).diff()
    last = len(levels) - 1
    return [
        Step(level, alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1], hs[i], i == last)
        for i, level in enumerate(levels)
    ]


def ddim(path: Path, *, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). eta = 0 is deterministic and needs no noise; eta = 1 is
    DDPM with the posterior variance on the same levels."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1; got {eta}")
    step, xt, x0 = path.now
    eps = (xt - step.alpha * x0) / step.sigma
    spread = eta * _posterior_deviation(step)
    xt = step.next_alpha * x0 + (step.next_sigma**2 - spread**2).sqrt() * eps
    return xt + spread * path.drawn if eta > 0 else xt


def ddpm(path: Path, *, large_variance: bool = False, share: Denoise | None = None) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) on any levels: x ~ q(x_next | x_t, x0), eq. 6 and 7. The
    variance is the posterior's, or the forward step's (`large_variance`), or lies between them at `share(xt, level)`,
    which a network has learned (`variance.py`); the last step adds no noise."""
    step, xt, x0 = path.now
    ratio = step.alpha / step.next_alpha  # signal kept by the forward step
    added = added_variance(step.alpha, step.sigma, step.next_alpha, step.next_sigma)
    mean = (ratio * step.next_sigma**2 * xt + step.next_alpha * added * x0) / step.sigma**2
    if step.last:
        return mean
    deviation = added.sqrt() if large_variance else _posterior_deviation(step)
    if share is not None:
        deviation = interpolated_variance(share(xt, step.level), added, deviation**2).sqrt()
    return mean + deviation * path.drawn


def added_variance(alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor) -> Tensor:
    """Variance of q(x_t | x_next), which the forward step adds: β of neighbouring variance-preserving levels."""
    return sigma**2 - (alpha / next_alpha) ** 2 * next_sigma**2


def interpolated_variance(share: Tensor, large: Tensor, small: Tensor) -> Tensor:
    """exp(v log β + (1 − v) log β̃) (Nichol & Dhariwal 2021, eq. 15), with v = `share`."""
    return torch.exp(share * large.log() + (1 - share) * small.log())


def _posterior_deviation(step: Step) -> Tensor:
    """Standard deviation of q(x_next | x_t, x0) (Ho et al. 2020, eq. 7)."""
    added = added_variance(step.alpha, step.sigma, step.next_alpha, step.next_sigma)
    return added.sqrt() * step.next_sigma / step.sigma


def euler(path: Path) -> Tensor:
    """Euler's method on the probability-flow ODE (Song et al. 2021, arXiv 2011.13456, eq. 13; Karras et al. 2022,
    algorithm 1 without the correction), and on the ODE of a flow. On straight lines it equals DDIM with eta = 0."""
    step, xt, x0 = path.now
    return step.next_alpha * x0 + step.next_sigma * (xt - step.alpha * x0) / step.sigma


def flow_scale(alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha + sigma: x / scale is a rectified flow's x, on any schedule; finite without signal too."""
    return alpha + sigma


def karras_scale(alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha: x / scale is x0 + noise (Karras et al. 2022, section 3). It grows beyond measure as the signal ends."""
    return alpha


def heun(path: Path, *, scale: Callable[[Tensor, Tensor], Tensor] = flow_scale) -> Tensor:
    """Heun's second-order method on the same ODE (Karras et al. 2022, arXiv 2206.00364, algorithm 1): Euler's step,
    then half the change of slope that it met. Two denoisings a step, one in the last.

    x / scale moves along straight lines; its slope changes with x0 alone, since Euler's step keeps eps.
    """
    step, _, x0 = path.now
    xt = euler(path)
    if step.last:
        return xt
    x0_change = path.denoise(xt, path.steps[path.i + 1].level) - x0
    ratio = scale(step.next_alpha, step.next_sigma) / scale(step.alpha, step.sigma)
    return xt + ratio * (step.sigma * step.next_alpha / step.next_sigma - step.alpha) * x0_change / 2


def dpm_solver_pp(path: Path, *, order: int = 2) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): 2M (algorithm 2), or `order` = 1 (eq. 8), which equals DDIM.
    The first and the last step are of order 1."""
    step, xt, x0 = path.now
    return _exponential_step(step, xt, x0 + _slope(path, path.i) / 2 if order == 2 else x0)


def dpm_solver_pp_sde(path: Path, *, order: int = 2) -> Tensor:
    """DPM-Solver++ for the diffusion SDE (Lu et al. 2022, arXiv 2211.01095, section 6): SDE-DPM-Solver++(2M), or
    `order` = 1, which equals DDPM with the posterior variance. Noise at every step but the last."""
    step, xt, x0 = path.now
    x0 = x0 + _slope(path, path.i) / 2 if order == 2 else x0
    renewed = -torch.expm1(-2 * step.h)  # share of the noise's variance that is drawn anew
    xt = step.next_sigma / step.sigma * torch.exp(-step.h) * xt + step.next_alpha * renewed * x0
    return xt if step.last else xt + step.next_sigma * renewed.sqrt() * path.drawn


def unipc(path: Path) -> Tensor:
    """UniPC of order 2 with B(h) = e^h − 1 (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8): the step of 2M,
    whose start is corrected first, now that x0 is known there, which costs no further denoising."""
    step, xt, x0 = path.now
    if path.i:
        before = path.steps[path.i - 1]
        xt = xt - before.next_alpha * torch.expm1(-before.h) * _unipc_correction(path)
    return _exponential_step(step, xt, x0 + _slope(path, path.i) / 2)


def _unipc_correction(path: Path) -> Tensor:
    """UniC: by how much the x0 of the step before should have differed, from x0 at its end (eq. 9, two conditions)."""
    i = path.i - 1
    rise, slope = path.x0s[-1] - path.x0s[-2], _slope(path, i)
    if i == 0:
        return rise / 2
    step = path.steps[i]
    renewed = -torch.expm1(-step.h)
    b1 = 1 / renewed - 1 / step.h
    b2 = 1 / renewed - 2 * b1 / step.h
    weight = (b1 - b2) / (1 + path.steps[i - 1].h / step.h)
    return weight * slope + (b1 - weight) * rise - slope / 2


def _exponential_step(step: Step, xt: Tensor, x0: Tensor) -> Tensor:
    """The ODE solved exactly for an x0 that does not change (Lu et al. 2022, arXiv 2211.01095, eq. 8)."""
    return step.next_sigma / step.sigma * xt - step.next_alpha * torch.expm1(-step.h) * x0


def _slope(path: Path, i: int) -> Tensor | float:
    """Change of x0 to expect over the i-th step, from its change over the step before; 0 in the first and the last."""
    if i == 0 or path.steps[i].last:
        return 0.0
    return path.steps[i].h / path.steps[i - 1].h * (path.x0s[i] - path.x0s[i - 1])


def langevin(
    denoise: Denoise,
    schedule: Schedule,
    levels: Levels,
    noise: Tensor,
    size: float = 0.05,
) -> Hook:
    """A corrector that follows the steps of any sampler (predictor–corrector, Song et al. 2021, arXiv 2011.13456,
    algorithms 4 and 5): Langevin steps at the level that was reached, towards the distribution of that level.

    `noise`: (steps at each level, len(levels), *xT.shape), drawn beforehand; `size`: step size δ as a share of sigma²,
    about 2 r² for the paper's signal-to-noise ratio r.
    """

    def correct(xt: Tensor, i: int) -> Tensor:
        sigma = schedule.sigma[levels[i]]
        for row in noise:
            x0 = denoise(xt, levels[i])
            eps = (xt - schedule.alpha[levels[i]] * x0) / sigma
            # x + δ · score + sqrt(2 δ) z with score = −eps / sigma
            xt = xt - size * sigma * eps + (2 * size) ** 0.5 * sigma * row[i]
        return xt

    return correct


SAMPLERS = {
    "ddim": Sampler(ddim),
    "ddpm": Sampler(ddpm, needs_noise=True),
    "ddpm-large": Sampler(partial(ddpm, large_variance=True), needs_noise=True),
    "dpm-solver-1": Sampler(partial(dpm_solver_pp, order=1), needs_signal=True),
    "dpm-solver-2m": Sampler(dpm_solver_pp, needs_signal=True),
    "dpm-solver-sde": Sampler(dpm_solver_pp_sde, needs_noise=True, needs_signal=True),
    "unipc": Sampler(unipc, needs_signal=True),
    "euler": Sampler(euler),
    "heun": Sampler(heun),
}
