"""Encoders: a dict of observations → one conditioning vector."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class StateEncoder(nn.Module):
    """Lays all observed steps of all keys side by side: {key: (B, To, ...)} → (B, cond_dim). It learns nothing."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], observation_horizon: int) -> None:
        """`shapes`: shape of each key at one step."""
        super().__init__()
        self.keys = tuple(sorted(shapes))
        self.cond_dim = observation_horizon * sum(math.prod(shape) for shape in shapes.values())

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([observations[key].flatten(1) for key in self.keys], dim=-1)
