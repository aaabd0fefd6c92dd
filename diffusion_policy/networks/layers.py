"""Layers of torch, faster where a network is trained on the CPU; elsewhere they are torch's own.

There torch's Mish takes three transcendental functions forwards and as many backwards. Of many sequences with their
channels side by side, (B, C, 1, T) in the order (B, T, C), convolutions and GroupNorm are faster backwards; torch has
that order for images only, so sequences become images of one line. Knows no network.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MANY_NUMBERS = 2**16
"""Of so many on, Mish is more than the calls that it takes."""
MANY_ROWS = 64
"""Of so many sequences on, images are faster."""


def arrange(x: Tensor) -> Tensor:
    """Sequences (B, C, T) to be learned from, as images (B, C, 1, T) where that is faster."""
    if not torch.is_grad_enabled() or x.device.type != "cpu" or len(x) < MANY_ROWS:
        return x
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)


class Conv(nn.Conv1d):
    """Convolution over time, of sequences (B, C, T) or of images (B, C, 1, T)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 3:
            return super().forward(input)
        (stride,), (padding,) = self.stride, self.padding
        return functional.conv2d(input, _as_image(self.weight), self.bias, (1, stride), (0, int(padding)))


class ConvTranspose(nn.ConvTranspose1d):
    """Transposed convolution over time, of sequences (B, C, T) or of images (B, C, 1, T)."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if input.ndim == 3:
            return super().forward(input, output_size)
        (stride,), (padding,) = self.stride, self.padding
        return functional.conv_transpose2d(input, _as_image(self.weight), self.bias, (1, stride), (0, int(padding)))


class Mish(nn.Module):
    """See `mish`."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


def mish(x: Tensor) -> Tensor:
    """x · tanh(log(1 + e^x)) (Misra 2019, arXiv 1908.08681, eq. 1). In a graph that is compiled or exported it has one
    exponential: runtimes have no fast Mish."""
    if torch.compiler.is_compiling():
        return x * _factor(torch.sigmoid(x))
    learns = x.requires_grad and torch.is_grad_enabled()
    if learns and x.device.type == "cpu" and x.dtype != torch.float64 and x.numel() >= MANY_NUMBERS:
        return _Mish.apply(x)  # pyright: ignore[reportReturnType]
    return functional.mish(x)


class _Mish(torch.autograd.Function):
    """Mish whose forward pass computes the derivative too: with t = tanh(log(1 + e^x)) and the sigmoid s, it is
    t + x s (1 - t²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x.float())  # in half precision each operation would round
        t = _factor(s)
        result = (x * t).to(x.dtype)
        ctx.save_for_backward(s.addcmul_(s, t * t, value=-1).mul_(x).add_(t).to(x.dtype))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # as with create_graph
            raise RuntimeError("this Mish has no second derivative; compute it in float64")
        (derivative,) = ctx.saved_tensors
        return grad * derivative


def _factor(s: Tensor) -> Tensor:
    """tanh(log(1 + e^x)) from the sigmoid of x: with q = 1 - (1 - s)² it is q / (2 - q)."""
    q = (2 - s).mul_(s)
    return q.div_(2 - q)


def _as_image(weight: Tensor) -> Tensor:
    """A convolution's weight for images, in their order."""
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
