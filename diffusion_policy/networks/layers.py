"""Mish and GroupNorm as torch has them, but faster where a network is trained on the CPU.

There torch's Mish takes three transcendental functions forwards and as many backwards, and its GroupNorm is slow
backwards for few steps: together a fifth of a training step. Elsewhere these are torch's own. Knows no network.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MANY = 2**16
"""Numbers from which on the passes over memory cost more than the calls."""
FEW_STEPS = 8
"""GroupNorm is slow backwards for fewer."""


class Mish(nn.Module):
    """See `mish`."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


def mish(x: Tensor) -> Tensor:
    """x · tanh(log(1 + e^x)) (Misra 2019, arXiv 1908.08681, eq. 1). In a graph that is compiled or exported it has one
    exponential: runtimes have no fast Mish."""
    if torch.compiler.is_compiling():
        return x * _factor(torch.sigmoid(x))
    return _Mish.apply(x) if _learns_on_cpu(x) and x.numel() >= MANY else functional.mish(x)  # pyright: ignore


class GroupNorm(nn.GroupNorm):
    """GroupNorm over (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if x.shape[-1] >= FEW_STEPS or not _learns_on_cpu(x):
            return super().forward(x)
        steps_outside = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return super().forward(steps_outside).squeeze(2)


class _Mish(torch.autograd.Function):
    """Mish whose forward pass computes the derivative too: with t = tanh(log(1 + e^x)) and the sigmoid s, it is
    t + x s (1 - t²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x.float())  # in half precision each operation would round
        t = _factor(s)
        mish = (x * t).to(x.dtype)
        ctx.save_for_backward(s.addcmul_(s, t * t, value=-1).mul_(x).add_(t).to(x.dtype))
        return mish

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


def _learns_on_cpu(x: Tensor) -> bool:
    """Whether gradients pass through x, and torch runs operation by operation on the CPU, in float32 or less."""
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype != torch.float64
        and not torch.compiler.is_compiling()
    )
