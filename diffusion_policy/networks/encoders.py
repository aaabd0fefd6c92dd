"""Encoders: the observed steps of one observation key → its features. What all keys give stands side by side in the
condition."""

import math
from typing import NamedTuple

from torch import Tensor, nn


class CondPart(NamedTuple):
    """A part of a condition: rows of as many numbers, side by side."""

    rows: int
    """Such as the observed steps of a key."""
    numbers: int


class StateEncoder(nn.Module):
    """Lays the observed steps of a row of numbers side by side: (B, steps, ...) → (B, steps · numbers). It learns
    nothing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """`shape`: of one step."""
        super().__init__()
        self.numbers = math.prod(shape)
        """Features of one step."""

    def forward(self, observed: Tensor) -> Tensor:
        return observed.flatten(1)
