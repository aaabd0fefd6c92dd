"""What a denoiser says of data: the variational bound on −log p(x0), in nats and bits per dimension, and the score."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_policy.diffusion.samplers import Denoise, Levels
from diffusion_policy.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Bound:
    """−log p(x0) ≤ prior + Σ terms, for densities (so it can be negative)."""

    prior: Tensor
    """KL(q(xT | x0) ‖ N(0, 1)) [nats], (B,): what the noisiest level still knows of x0."""
    terms: Tensor
    """KL(q(x_next | x_t, x0) ‖ p(x_next | x_t)) [nats], (levels, B), one for each of the levels in their order; the
    last one is -log p(x0 | x at the last level)."""
    dimensions: int
    """Numbers in one x0."""

    @property
    def nats(self) -> Tensor:
        """The bound of each row, (B,)."""
        return self.prior + self.terms.sum(dim=0)

    @property
    def bits_per_dimension(self) -> Tensor:
        """The bound of each row in bits per number of x0, (B,)."""
        return self.nats / (self.dimensions * math.log(2))


def variational_bound(
    denoise: Denoise, x0: Tensor, schedule: Schedule, levels: Levels, noise: Iterable[Tensor]
) -> Bound:
    """The bound of the sampler `ddpm` with the posterior variance on these levels (Ho et al. 2020, eq. 5).

    `noise`: one draw of x0's shape for each term, which may be drawn one after the other. Both Gaussians of a term have
    the same variance, so a term is ½ (SNR_next − SNR) |x0 − denoised|² (Kingma et al. 2021, arXiv 2107.00630, eq. 14).
    The last step's posterior has no variance; it takes (sigma / alpha)², the width of x0 in q(xt | x0).
    """
    alpha, sigma = schedule.alpha[list(levels)], schedule.sigma[list(levels)]  # (levels,)
    snr = (alpha / sigma) ** 2
    dimensions = x0[0].numel()

    def squares(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(dim=1)  # (B,)

    terms = []
    for i, (level, eps) in enumerate(zip(levels, noise, strict=True)):
        error = squares(x0 - denoise(alpha[i] * x0 + sigma[i] * eps, level))
        if i < len(levels) - 1:
            terms.append((snr[i + 1] - snr[i]) / 2 * error)
        else:
            terms.append(snr[i] / 2 * error + dimensions / 2 * torch.log(2 * math.pi / snr[i]))
    excess = sigma[0] ** 2 - 1 - 2 * sigma[0].log()
    prior = (alpha[0] ** 2 * squares(x0) + dimensions * excess) / 2
    return Bound(prior, torch.stack(terms), dimensions)


def score(denoise: Denoise, xt: Tensor, level: int, schedule: Schedule) -> Tensor:
    """∇ log q(xt) = −eps / sigma (Song et al. 2021, arXiv 2011.13456; Vincent 2011), shape of xt."""
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    return (alpha * denoise(xt, level) - xt) / sigma**2
