"""Building blocks of the temporal U-Net: level embedding, convolution block, residual block with FiLM."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


class LevelEmbedding(nn.Module):
    """Sinusoids of the noise level (Vaswani et al. 2017, section 3.5), then a small MLP: (B,) → (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2 - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, level: Tensor) -> Tensor:
        angles = level[:, None] * self.get_buffer("frequencies")  # (B, dim / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ConvBlock(nn.Sequential):
    """Convolution over time, GroupNorm, Mish: (B, C_in, T) → (B, C_out, T)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, groups: int) -> None:
        super().__init__(
            nn.Conv1d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, channels_out),
            nn.Mish(),
        )


class ResidualBlock(nn.Module):
    """Two convolution blocks with a residual connection; between them the condition scales and shifts each channel
    (FiLM, Perez et al. 2018, arXiv 1709.07871, eq. 2)."""

    def __init__(self, channels_in: int, channels_out: int, cond_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels_in, channels_out, kernel_size, groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * channels_out))
        self.second = ConvBlock(channels_out, channels_out, kernel_size, groups)
        self.skip = nn.Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: (B, C_in, T), cond: (B, C) → (B, C_out, T)."""
        scale, shift = rearrange(self.film(cond), "b (two c) -> two b c 1", two=2)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class BlockPair(nn.Module):
    """Two residual blocks: (B, C_in, T), cond (B, C) → (B, C_out, T)."""

    def __init__(self, channels_in: int, channels_out: int, cond_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = ResidualBlock(channels_in, channels_out, cond_dim, kernel_size, groups)
        self.second = ResidualBlock(channels_out, channels_out, cond_dim, kernel_size, groups)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.second(self.first(x, cond), cond)
