"""A learned variance of the reverse steps (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).

The network says a share v for each number, beside its prediction, and the variance of a step lies at v between the two
fixed ones: log Σ = v log β + (1 − v) log β̃ (eq. 15). It is learned from the variational bound (eq. 16), whose gradient
does not reach the prediction.
"""

import math

import torch
from torch import Tensor, nn

from diffusion_policy.diffusion.samplers import added_variance, interpolated_variance
from diffusion_policy.diffusion.schedules import Schedule

BOUND_WEIGHT = 0.001
"""λ of the hybrid loss L_simple + λ L_vlb."""


class LearnedVariance(nn.Module):
    """The terms of the bound for steps from each level to the one below."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        next_alpha = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha[:-1]])
        next_sigma = torch.cat([torch.zeros(1, dtype=torch.float64), schedule.sigma[:-1]])
        large = added_variance(schedule.alpha, schedule.sigma, next_alpha, next_sigma)
        small = large * next_sigma**2 / schedule.sigma**2
        small[0] = small[1]  # the last step's posterior has no variance; the paper takes its neighbour's
        gain = next_alpha * large / schedule.sigma**2  # of the step's mean with x0
        for name, table in (("large", large), ("small", small), ("gain", gain)):
            self.register_buffer(name, table.float(), persistent=False)  # (K,)

    def hybrid_term(self, share: Tensor, x0: Tensor, predicted_x0: Tensor, level: Tensor) -> Tensor:
        """λ L_vlb for rows at these levels (B,): KL(q(x_next | x_t, x0) ‖ p), at level 0 −log p(x0 | x_0), in nats for
        each number, times λ and the number of levels; (B,). `share` is v, shape of x0."""
        shape = (-1, *[1] * (x0.ndim - 1))
        large, small, gain = (self.get_buffer(name)[level].reshape(shape) for name in ("large", "small", "gain"))
        variance = interpolated_variance(share, large, small)
        apart = (gain * (x0 - predicted_x0.detach())).square()
        divergence = (variance.log() - small.log() + (small + apart) / variance - 1) / 2
        likelihood = (math.log(2 * math.pi) + variance.log() + apart / variance) / 2
        terms = torch.where((level == 0).reshape(shape), likelihood, divergence).flatten(1).mean(dim=1)
        return BOUND_WEIGHT * len(self.get_buffer("large")) * terms
