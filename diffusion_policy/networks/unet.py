"""The conditional 1-D U-Net over time (Janner et al. 2022, arXiv 2205.09991; conditioned by FiLM as in Chi et al. 2023,
arXiv 2303.04137, appendix A)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion_policy.networks.blocks import BlockPair, ConvBlock, Films, LevelEmbedding
from diffusion_policy.networks.layers import Conv, ConvTranspose, arrange, mish


class TemporalUnet(nn.Module):
    """(xt (B, T, D), level (B,), cond (B, C)) → (B, T, outputs). T is a multiple of `stride`, 2^(resolutions − 1)."""

    def __init__(
        self,
        target_dim: int,
        cond_dim: int,
        widths: Sequence[int] = (64, 128, 256),
        *,
        kernel_size: int = 5,
        groups: int = 8,
        level_dim: int = 128,
        outputs: int | None = None,
        level_inputs: int = 1,
    ) -> None:
        """`target_dim`: D, numbers of a step of the sequence; `widths`: channels at each resolution; each is half as
        long in time as the one before; `outputs`: numbers predicted for each step, by default D; `level_inputs`:
        numbers that say a level, (B, level_inputs) where there are several."""
        super().__init__()
        self.stride = 2 ** (len(widths) - 1)
        self.embed_level = LevelEmbedding(level_dim, level_inputs)

        def blocks(channels_in: int, channels_out: int) -> BlockPair:
            return BlockPair(channels_in, channels_out, level_dim, cond_dim, kernel_size, groups)

        self.down = nn.ModuleList(blocks(*widths_in_out) for widths_in_out in pairwise((target_dim, *widths)))
        self.shorten = nn.ModuleList(Conv(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = blocks(widths[-1], widths[-1])
        self.lengthen = nn.ModuleList(
            ConvTranspose(deep, shallow, 4, stride=2, padding=1) for shallow, deep in reversed([*pairwise(widths)])
        )
        self.up = nn.ModuleList(blocks(2 * width, width) for width in reversed(widths[:-1]))
        self.out = nn.Sequential(
            ConvBlock(widths[0], widths[0], kernel_size, groups), Conv(widths[0], outputs or target_dim, 1)
        )

    def forward(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        """Raises ValueError when T is not a multiple of `stride`."""
        return self.denoise(xt, self.condition(level, cond).at(...))

    def condition(self, level: Tensor, cond: Tensor) -> Films:
        """Levels (L,) and conditions (B, C) → scale and shift of each residual block."""
        embedded, cond = mish(self.embed_level(level)), mish(cond)  # (L, level_dim), (B, C)
        parts = [block.condition(embedded, cond) for pair in self._pairs() for block in (pair.first, pair.second)]
        return Films(tuple(one for one, _ in parts), tuple(other for _, other in parts))

    def denoise(self, xt: Tensor, films: Sequence[Tensor]) -> Tensor:
        """Sequences (B, T, D) under `films.at` their levels, (B, 2 channels) a block → (B, T, outputs).
        Raises ValueError when T is not a multiple of `stride`."""
        self.require_steps(xt.shape[1])
        pairs_of_films = iter(zip(films[::2], films[1::2], strict=True))
        x = rearrange(xt, "b t d -> b d t")
        x = arrange(x) if self.training else x
        skips = []
        for i, pair in enumerate(self.down):
            x = pair(x, *next(pairs_of_films))
            if i < len(self.shorten):
                skips.append(x)
                x = self.shorten[i](x)
        x = self.middle(x, *next(pairs_of_films))
        for lengthen, pair in zip(self.lengthen, self.up, strict=True):
            x = pair(torch.cat([lengthen(x), skips.pop()], dim=1), *next(pairs_of_films))
        return rearrange(self.out(x).flatten(2), "b d t -> b t d")

    def require_steps(self, steps: int) -> None:
        """Raise ValueError when a prediction horizon is not a multiple of `stride`."""
        if steps % self.stride:
            raise ValueError(f"the prediction horizon must be a multiple of {self.stride}; got {steps}")

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Those without weight decay: none."""
        return []

    def _pairs(self) -> list[BlockPair]:
        """In the order in which a sequence passes them."""
        return [*self.down, self.middle, *self.up]  # pyright: ignore[reportReturnType]
