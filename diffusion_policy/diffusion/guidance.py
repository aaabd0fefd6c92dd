"""Guidance and clipping: wrappers of a denoiser (`samplers.Denoise`) that return another one.

Two conventions of the guidance weight are about. Here w = 0 is the plain conditional policy; where others write 1 for
that, their weight is 1 + w.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], Tensor]


def classifier_free(denoise: Denoise, weights: Tensor) -> Denoise:
    """eps = (1 + w) · eps_cond − w · eps_uncond (Ho & Salimans 2022, arXiv 2207.12598, eq. 6), in one doubled batch.

    `denoise` takes two copies of xt, (2 B, ...), and conditions the first half only. `weights`: w of each level, (K,).
    """

    def guided(xt: Tensor, level: int) -> Tensor:
        x0_cond, x0_uncond = denoise(torch.cat([xt, xt]), level).chunk(2)
        w = weights[level]
        return (1 + w) * x0_cond - w * x0_uncond  # xt is the same for both, so x0 mixes as eps does

    return guided


def constant(levels: int) -> Tensor:
    """The full weight at every level, (K,)."""
    return torch.ones(levels, dtype=torch.float64)


def falling(levels: int) -> Tensor:
    """The full weight at the noisiest level, where sampling starts, none at the least noised one, (K,)."""
    return torch.linspace(0, 1, levels, dtype=torch.float64)


def rising(levels: int) -> Tensor:
    """No weight at the noisiest level, where sampling starts, the full one at the least noised level, (K,)."""
    return torch.linspace(1, 0, levels, dtype=torch.float64)


def middle(levels: int) -> Tensor:
    """The full weight at the middle three fifths of the levels, none elsewhere, (K,) (Kynkäänniemi et al. 2024, arXiv
    2404.07724)."""
    share = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    return ((share > 0.2) & (share < 0.8)).double()


GUIDANCE_SCHEDULES = {"constant": constant, "falling": falling, "rising": rising, "middle": middle}


def agreeing(
    denoise: Denoise,
    sequence: Tensor,
    weights: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    strength: float,
    deviation: float = 1.0,
) -> Denoise:
    """x0 guided towards a sequence Y (B, T, D) where weights W (B, T, 1) say so:
    x0 + σ min(β, (α² + σ² / s²) / (α σ)) g, with g = J^T [W (Y - x0)] and J the Jacobian of x0 by xt.

    Pseudoinverse guidance (Song et al. 2023, "Pseudoinverse-guided diffusion models"), its weight clipped to β =
    `strength` as in real-time chunking (Black et al. 2025, arXiv 2506.07339, eq. 2 to 4, there for flows). `deviation`
    s: how far normalized actions spread, given the observation; 1 there. `alphas`, `sigmas`: of each level, (K,)."""
    pulls = sigmas * ((alphas**2 + sigmas**2 / deviation**2) / (alphas * sigmas)).clamp(max=strength)

    def guided(xt: Tensor, level: int) -> Tensor:
        with torch.enable_grad():
            xt = xt.detach().requires_grad_()
            x0 = denoise(xt, level)
            (gradient,) = torch.autograd.grad(x0, xt, weights * (sequence - x0.detach()))
        return x0.detach() + pulls[level] * gradient

    return guided


def preferring(
    denoise: Denoise, slope: Callable[[Tensor, int], Tensor], weight: float, alphas: Tensor, sigmas: Tensor
) -> Denoise:
    """x0 + w σ² / α g, with g the gradient by xt of log p(y | xt), `slope`: classifier guidance (Dhariwal & Nichol
    2021, arXiv 2105.05233, algorithm 2: eps - w σ g). `alphas`, `sigmas`: of each level, (K,)."""
    pulls = weight * sigmas**2 / alphas

    def preferred(xt: Tensor, level: int) -> Tensor:
        return denoise(xt, level) + pulls[level].to(xt) * slope(xt, level)

    return preferred


def descending(denoise: Denoise, gradient: Callable[[Tensor], Tensor], weights: Tensor, steps: int = 1) -> Denoise:
    """x0 led down a cost: x0 - w g / max(1, |g|), so often at each level, with g the cost's gradient by x0, (B, T, D),
    and |g| the largest of its steps (B, T). The gradient is that of the predicted x0 and does not pass through the
    network, as the costs of motion planning are followed (Carvalho et al. 2023, arXiv 2308.01557, section IV).
    `weights`: w of each level, (K,), in normalized numbers: no step of a sequence moves farther."""

    def led(xt: Tensor, level: int) -> Tensor:
        x0 = denoise(xt, level)
        for _ in range(steps):
            slope = gradient(x0)
            longest = slope.norm(dim=-1).amax(dim=1).clamp(min=1)[:, None, None]
            x0 = x0 - weights[level].to(x0) * slope / longest
        return x0

    return led


def unclipped(denoise: Denoise) -> Denoise:
    """The denoiser as it is."""
    return denoise


def static_clip(denoise: Denoise) -> Denoise:
    """x0 within [−1, 1], the range of the demonstrations under the normalizer's limits."""
    return lambda xt, level: denoise(xt, level).clamp(-1, 1)


def dynamic_clip(denoise: Denoise, share: float = 0.995) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): each row's x0 is clipped to the
    quantile `share` of its own |x0| where that exceeds 1, and divided by it."""

    def clipped(xt: Tensor, level: int) -> Tensor:
        x0 = denoise(xt, level)
        limit = torch.quantile(x0.flatten(1).abs(), share, dim=1).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return clipped


CLIPS: dict[str, Callable[[Denoise], Denoise]] = {"static": static_clip, "dynamic": dynamic_clip, "none": unclipped}
