"""The temporal U-Net for few and short sequences: each convolution is one matrix product over the steps of all rows.

A convolution of 16 steps is too small for a convolution's own kernels: they rearrange its weights at every call. Laid
out once as a matrix, in the order in which it is read, the weights pass through memory once a call, and that is what a
plan for one robot costs. For many rows the convolutions win. The outputs are the same but for rounding.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from diffusion_policy.networks.blocks import BlockPair, ConvBlock, Films, ResidualBlock
from diffusion_policy.networks.layers import mish
from diffusion_policy.networks.unet import TemporalUnet


class RowsUnet(nn.Module):
    """A `TemporalUnet` as it is now, to denoise with: what is learned later does not reach it. It promises what
    `diffusion.process.Network` says."""

    def __init__(self, unet: TemporalUnet, steps: int) -> None:
        """`steps`: T, of the sequences. Raises ValueError when it is not a multiple of the network's `stride`."""
        super().__init__()
        unet.require_steps(steps)
        self.steps = steps
        self._unet = [unet]  # not a module of this one: it only says what noise levels and conditions mean
        lengths = [steps // 2**i for i in range(len(unet.down))]
        *shallow, deepest = lengths
        self.down = nn.ModuleList(map(_RowsPair, unet.down, lengths))  # pyright: ignore
        self.middle = _RowsPair(unet.middle, deepest)
        self.shorten = nn.ModuleList(map(_RowsConv, unet.shorten, shallow))  # pyright: ignore
        self.lengthen = nn.ModuleList(map(_RowsLengthen, unet.lengthen, reversed(lengths)))  # pyright: ignore
        self.up = nn.ModuleList(map(_RowsPair, unet.up, reversed(shallow)))  # pyright: ignore
        block, conv = unet.out
        self.out = nn.Sequential(_RowsBlock(block, steps), _RowsConv(conv, steps))  # pyright: ignore

    def forward(self, xt: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        """See `TemporalUnet`."""
        return self.denoise(xt, self.condition(level, cond).at(...))

    def condition(self, level: Tensor, cond: Tensor) -> Films:
        """See `TemporalUnet.condition`."""
        return self._unet[0].condition(level, cond)

    def denoise(self, xt: Tensor, films: Sequence[Tensor]) -> Tensor:
        """See `TemporalUnet.denoise`. Raises ValueError for sequences of another length."""
        if xt.shape[1] != self.steps:
            raise ValueError(f"this network is laid out for sequences of {self.steps} steps; got {xt.shape[1]}")
        pairs_of_films = iter(zip(films[::2], films[1::2], strict=True))
        x, skips = xt, []  # (B, T, channels)
        for i, pair in enumerate(self.down):
            x = pair(x, *next(pairs_of_films))
            if i < len(self.shorten):
                skips.append(x)
                x = self.shorten[i](x)
        x = self.middle(x, *next(pairs_of_films))
        for lengthen, pair in zip(self.lengthen, self.up, strict=True):
            x = pair(torch.cat([lengthen(x), skips.pop()], dim=-1), *next(pairs_of_films))
        return self.out(x)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """None: it is not trained."""
        return []


class _Windows(nn.Module):
    """The steps that each step of a convolution's result sees, side by side: (B, T, C) → (B, results, kernel C)."""

    def __init__(self, steps: int, kernel_size: int, stride: int, padding: int) -> None:
        """`steps`: T."""
        super().__init__()
        self.padding = padding
        starts = torch.arange(0, steps + 2 * padding - kernel_size + 1, stride)
        self.results = len(starts)
        self.register_buffer("rows", rearrange(starts[:, None] + torch.arange(kernel_size), "t k -> (t k)"))

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 0, self.padding, self.padding))
        return padded.index_select(1, self.get_buffer("rows")).reshape(len(x), self.results, -1)


class _RowsConv(nn.Module):
    """A convolution over time: (B, T, C_in) → (B, T / stride, C_out)."""

    def __init__(self, conv: nn.Conv1d, steps: int) -> None:
        """`steps`: T."""
        super().__init__()
        assert conv.bias is not None
        assert isinstance(conv.padding, tuple)
        (kernel_size,), (stride,), (padding,) = conv.kernel_size, conv.stride, conv.padding
        self.windows = nn.Identity() if kernel_size == 1 else _Windows(steps, kernel_size, stride, padding)
        weight = rearrange(conv.weight.detach(), "o i k -> o k i").clone(memory_format=torch.contiguous_format)
        self.register_buffer("weight", weight.flatten(1))  # (C_out, kernel C_in)
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.windows(x), self.get_buffer("weight"), self.get_buffer("bias"))


class _RowsLengthen(nn.Module):
    """A transposed convolution that doubles the steps, of kernel 4, stride 2 and padding 1: (B, T, C_in) →
    (B, 2 T, C_out). Each step of the result is a product with two steps of x, the even and the odd ones with their own
    weights."""

    def __init__(self, conv: nn.ConvTranspose1d, steps: int) -> None:
        """`steps`: T."""
        super().__init__()
        assert conv.bias is not None
        assert (conv.kernel_size, conv.stride, conv.padding) == ((4,), (2,), (1,))
        taps = conv.weight.detach().unbind(-1)  # 4 x (C_in, C_out)
        self.windows = _Windows(steps, 2, 1, 1)
        self.register_buffer("even", torch.cat([taps[3], taps[1]]).T.contiguous())  # (C_out, 2 C_in)
        self.register_buffer("odd", torch.cat([taps[2], taps[0]]).T.contiguous())
        self.register_buffer("bias", conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        windows = self.windows(x)  # (B, T + 1, 2 C_in)
        even = functional.linear(windows[:, :-1], self.get_buffer("even"), self.get_buffer("bias"))
        odd = functional.linear(windows[:, 1:], self.get_buffer("odd"), self.get_buffer("bias"))
        return rearrange([even, odd], "two b t c -> b (t two) c")


class _RowsBlock(nn.Module):
    """Convolution over time, GroupNorm, Mish: (B, T, C_in) → (B, T, C_out)."""

    def __init__(self, block: ConvBlock, steps: int) -> None:
        super().__init__()
        conv, norm, _ = block
        assert isinstance(conv, nn.Conv1d)
        assert isinstance(norm, nn.GroupNorm)
        self.conv, self.groups, self.eps = _RowsConv(conv, steps), norm.num_groups, norm.eps
        self.register_buffer("scale", norm.weight.detach().clone())
        self.register_buffer("shift", norm.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.conv(x), "b t c -> b c t")
        x = functional.group_norm(x, self.groups, self.get_buffer("scale"), self.get_buffer("shift"), self.eps)
        return mish(rearrange(x, "b c t -> b t c"))


class _RowsResidual(nn.Module):
    """See `ResidualBlock`: (B, T, C_in) → (B, T, C_out)."""

    def __init__(self, block: ResidualBlock, steps: int) -> None:
        super().__init__()
        self.first, self.second = _RowsBlock(block.first, steps), _RowsBlock(block.second, steps)
        self.skip = _RowsConv(block.skip, steps) if isinstance(block.skip, nn.Conv1d) else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = rearrange(film, "b (two c) -> two b 1 c", two=2)
        return self.second(torch.addcmul(shift, scale, self.first(x))) + self.skip(x)


class _RowsPair(nn.Module):
    """See `BlockPair`."""

    def __init__(self, pair: BlockPair, steps: int) -> None:
        super().__init__()
        self.first, self.second = _RowsResidual(pair.first, steps), _RowsResidual(pair.second, steps)

    def forward(self, x: Tensor, first_film: Tensor, second_film: Tensor) -> Tensor:
        return self.second(self.first(x, first_film), second_film)
