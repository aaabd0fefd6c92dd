"""A small variational autoencoder of sequences: diffusion then runs on a shorter sequence of fewer numbers.

    sequence (B, T, D) → latent (B, T / stride, channels) → sequence (B, T, D)

Knows tensors. (Kingma & Welling 2014, arXiv 1312.6114; as a space for diffusion Rombach et al. 2022, arXiv 2112.10752.)
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

LEAST_SCALE = 1e-6
"""A channel that varies less than this is not stretched to a deviation of one."""


class Autoencoder(nn.Module):
    """Convolutions in time that halve the sequence, and others that double it again. Latents are standardized: each
    channel has mean 0 and deviation 1 over the data once `fit` has seen them."""

    shift: Tensor
    scale: Tensor

    def __init__(self, numbers: int, channels: int, stride: int, width: int) -> None:
        """`numbers`: D; `stride`: a power of two, by which T is divided."""
        super().__init__()
        self.channels, self.stride = channels, stride
        halvings = stride.bit_length() - 1
        down: list[nn.Module] = [nn.Conv1d(numbers, width, 3, padding=1), nn.Mish()]
        up: list[nn.Module] = [nn.Conv1d(channels, width, 3, padding=1), nn.Mish()]
        for before, after in pairwise([width] * (halvings + 1)):
            down += [nn.Conv1d(before, after, 4, stride=2, padding=1), nn.Mish(), nn.Conv1d(after, after, 3, padding=1)]
            down.append(nn.Mish())
            up += [nn.ConvTranspose1d(before, after, 4, stride=2, padding=1), nn.Mish()]
            up += [nn.Conv1d(after, after, 3, padding=1), nn.Mish()]
        self.down = nn.Sequential(*down, nn.Conv1d(width, 2 * channels, 1))
        self.up = nn.Sequential(*up, nn.Conv1d(width, numbers, 3, padding=1))
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def distribution(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents of sequences (B, T, D), (B, T / stride, channels) each,
        before they are standardized."""
        mean, log_variance = self.down(sequences.transpose(1, 2)).transpose(1, 2).chunk(2, dim=-1)
        return mean, log_variance.clamp(-20, 5)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Sequences (B, T, D) of latents that are not standardized."""
        return self.up(latents.transpose(1, 2)).transpose(1, 2)

    def encode(self, sequences: Tensor) -> Tensor:
        """Sequences (B, T, D) → the means of their latents, standardized, (B, T / stride, channels)."""
        return (self.distribution(sequences)[0] - self.shift) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse, as far as it has been learned, (B, T, D)."""
        return self.decode_raw(latents.to(self.shift) * self.scale + self.shift)

    @torch.no_grad()
    def fit(self, sequences: Tensor) -> None:
        """Standardize the latents of these sequences (B, T, D)."""
        latents = self.distribution(sequences)[0].flatten(0, 1)
        self.shift.copy_(latents.mean(dim=0))
        self.scale.copy_(latents.std(dim=0).clamp(min=LEAST_SCALE))

    def loss(self, sequences: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
        """The squared error of what comes back, and `kl_weight` times the divergence of the latents from a standard
        normal distribution (arXiv 1312.6114, eq. 10), both means over numbers, (B,). `noise`: standard normal, like the
        latents."""
        mean, log_variance = self.distribution(sequences)
        back = self.decode_raw(mean + torch.exp(log_variance / 2) * noise)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return (back - sequences).square().flatten(1).mean(dim=1) + kl_weight * divergence.flatten(1).mean(dim=1)
