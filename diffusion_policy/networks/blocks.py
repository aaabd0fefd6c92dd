"""Building blocks of the temporal U-Net: level embedding, convolution block, residual block with FiLM."""

import math
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks.layers import Conv, Mish


class LevelEmbedding(nn.Module):
    """Sinusoids of the noise level (Vaswani et al. 2017, section 3.5), then a small MLP: (...) → (..., dim)."""

    def __init__(self, dim: int, inputs: int = 1) -> None:
        """`inputs`: numbers that say a level; several stand on an axis of their own, (..., inputs) → (..., dim)."""
        super().__init__()
        self._inputs = inputs
        frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2 - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(inputs * dim, 4 * dim), Mish(), nn.Linear(4 * dim, dim))

    def forward(self, level: Tensor) -> Tensor:
        angles = level[..., None] * self.get_buffer("frequencies")  # (..., dim / 2)
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(sinusoids if self._inputs == 1 else sinusoids.flatten(-2))


class Films(NamedTuple):
    """What noise levels and conditions say to layers that are linear in both, so that their parts add up."""

    of_levels: tuple[Tensor, ...]
    """A layer each: (L, features)."""
    of_cond: tuple[Tensor, ...]
    """A layer each: (B, features)."""

    def at(self, level: int | EllipsisType) -> tuple[Tensor, ...]:
        """The sums for the i-th level and all rows, (B, features) a layer; with `...`, where L = B, for the i-th
        level and the i-th row."""
        return tuple(one[level] + other for one, other in zip(self.of_levels, self.of_cond, strict=True))


class ConvBlock(nn.Sequential):
    """Convolution over time, GroupNorm, Mish: (B, C_in, T) → (B, C_out, T), or as images (see `layers`)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, groups: int) -> None:
        super().__init__(
            Conv(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, channels_out),
            Mish(),
        )


class ResidualBlock(nn.Module):
    """Two convolution blocks with a residual connection; between them the condition scales and shifts each channel
    (FiLM, Perez et al. 2018, arXiv 1709.07871, eq. 2)."""

    def __init__(
        self, channels_in: int, channels_out: int, level_dim: int, cond_dim: int, kernel_size: int, groups: int
    ) -> None:
        super().__init__()
        self.first = ConvBlock(channels_in, channels_out, kernel_size, groups)
        self.film = nn.Sequential(Mish(), nn.Linear(level_dim + cond_dim, 2 * channels_out))
        self.second = ConvBlock(channels_out, channels_out, kernel_size, groups)
        self.skip = Conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self._level_dim = level_dim

    def condition(self, level: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of scale and shift that embedded levels (L, level_dim) and conditions (B, C) give, both after Mish,
        (L, 2 C_out) and (B, 2 C_out): Linear([a; b]) = A a + B b + c, so each is computed once."""
        _, linear = self.film
        assert isinstance(linear, nn.Linear)
        of_level, of_cond = linear.weight.split([self._level_dim, cond.shape[-1]], dim=1)
        return functional.linear(level, of_level), functional.linear(cond, of_cond, linear.bias)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x: (B, C_in, T), film: (B, 2 C_out) → (B, C_out, T); or as images (see `layers`)."""
        scale, shift = film.reshape(*film.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class BlockPair(nn.Module):
    """Two residual blocks, each with its film: (B, C_in, T) → (B, C_out, T)."""

    def __init__(
        self, channels_in: int, channels_out: int, level_dim: int, cond_dim: int, kernel_size: int, groups: int
    ) -> None:
        super().__init__()
        self.first = ResidualBlock(channels_in, channels_out, level_dim, cond_dim, kernel_size, groups)
        self.second = ResidualBlock(channels_out, channels_out, level_dim, cond_dim, kernel_size, groups)

    def forward(self, x: Tensor, first_film: Tensor, second_film: Tensor) -> Tensor:
        return self.second(self.first(x, first_film), second_film)
