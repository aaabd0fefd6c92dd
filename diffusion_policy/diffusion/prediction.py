"""What the network predicts: its target in training, how its output becomes (x0, eps) in sampling, and what an error of
it weighs.

All sides of a prediction stand together, so that training and sampling cannot disagree. Every formula holds for any
(alpha, sigma), variance preserving or flow; they broadcast against the sequences.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """A prediction type."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x0, eps, alpha, sigma) → what the network should say."""
    decode: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(output, xt, alpha, sigma) → (x0, eps)."""
    eps_gain: Callable[[Tensor, Tensor], Tensor]
    """(alpha, sigma) → |∂ eps / ∂ output|: the error in eps that an error of 1 in the output makes."""
    needs_signal: bool = False
    """Whether `decode` divides by alpha, so that it cannot start from a level without signal."""


def _decode_noise(output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return (xt - sigma * output) / alpha, output


def _decode_sample(output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return output, (xt - alpha * output) / sigma


def _decode_velocity(output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    power = alpha**2 + sigma**2  # 1 where variance is preserved
    return (alpha * xt - sigma * output) / power, (sigma * xt + alpha * output) / power


def _decode_flow(output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    total = alpha + sigma  # 1 on a flow schedule
    return (xt - sigma * output) / total, (xt + alpha * output) / total


PREDICTIONS = {
    "noise": Prediction(  # Ho et al. 2020, eq. 14
        target=lambda x0, eps, alpha, sigma: eps,
        decode=_decode_noise,
        eps_gain=lambda alpha, sigma: torch.ones_like(alpha),
        needs_signal=True,
    ),
    "sample": Prediction(
        target=lambda x0, eps, alpha, sigma: x0,
        decode=_decode_sample,
        eps_gain=lambda alpha, sigma: alpha / sigma,
    ),
    "velocity": Prediction(  # Salimans & Ho 2022, arXiv 2202.00512, appendix D
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        decode=_decode_velocity,
        eps_gain=lambda alpha, sigma: alpha / (alpha**2 + sigma**2),
    ),
    "flow": Prediction(  # dx/dt of rectified flow: Liu et al. 2022, arXiv 2209.03003, eq. 1
        target=lambda x0, eps, alpha, sigma: eps - x0,
        decode=_decode_flow,
        eps_gain=lambda alpha, sigma: alpha / (alpha + sigma),
    ),
}


def loss_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, snr_gamma: float = 0.0) -> Tensor:
    """What the squared error of the network's output weighs at each level; shape of `alpha`.

    γ = 0: 1 everywhere (Ho et al. 2020, section 3.4). γ > 0: min(SNR, γ) for the error in x0, carried over to the
    output (Hang et al. 2023, arXiv 2303.09556, section 3.4), so min(1, γ / SNR) for noise prediction; 5 is usual.
    """
    if snr_gamma == 0:
        return torch.ones_like(alpha)
    snr = (alpha / sigma) ** 2
    return (snr_gamma / snr).clamp(max=1) * prediction.eps_gain(alpha, sigma) ** 2
