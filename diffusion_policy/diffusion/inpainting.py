"""Numbers of a sequence that are known and stay in place while the rest is denoised: wrappers of a denoiser, and of the
network within it.

Knows tensors. Knows no policy.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_policy.diffusion.samplers import Denoise


class Given(NamedTuple):
    """Steps of a sequence that are known: the network sees them clean, and marked."""

    sequence: Tensor
    """Normalized, (B, T, D)."""
    known: Tensor
    """Which steps, (B, T, 1) bool."""


class Held(NamedTuple):
    """What is inpainted: numbers of a sequence that stand at every level."""

    sequence: Tensor
    """Normalized, (B, T, D)."""
    mask: Tensor
    """Which numbers, (T, D) bool."""


def giving(outputs: Denoise, given: Given | None) -> Denoise:
    """Outputs of a network that takes a sequence with a column of marks: the given steps clean and marked."""

    def network(xt: Tensor, level: int) -> Tensor:
        if given is None:
            return outputs(functional.pad(xt, (0, 1)), level)
        times = len(xt) // len(given.sequence)  # guidance doubles the rows
        sequence, known = (torch.cat([part] * times) for part in given)
        return outputs(torch.cat([torch.where(known, sequence, xt), known.to(xt)], dim=-1), level)

    return network


def holding(outputs: Denoise, held: Held) -> Denoise:
    """Outputs of a network that sees what is inpainted clean."""

    def network(xt: Tensor, level: int) -> Tensor:
        sequence = torch.cat([held.sequence] * (len(xt) // len(held.sequence)))  # guidance doubles the rows
        return outputs(torch.where(held.mask, sequence, xt), level)

    return network


def inpainted(denoise: Denoise, sequence: Tensor, known: Tensor) -> Denoise:
    """x0 with the known steps (B, T, 1) bool of a sequence (B, T, D) in place."""
    return lambda xt, level: torch.where(known, sequence, denoise(xt, level))
