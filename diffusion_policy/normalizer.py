"""Scales each key so that the network sees numbers of about one; travels inside the checkpoint as buffers."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

CONSTANT = 1e-4
"""A column whose scale is below this is only shifted, never stretched."""


def limits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map the smallest and largest value of each column to −1 and 1."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    return (low + high) / 2, (high - low) / 2


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that give each column mean 0 and standard deviation 1."""
    return rows.mean(axis=0), rows.std(axis=0)


class Normalizer(nn.Module):
    """Per key: normalized = (x − offset) / scale, column by column. A new one does nothing until it is fitted or
    loaded."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: shape of each key at one step."""
        super().__init__()
        for key, shape in shapes.items():
            self.register_buffer(f"{key}_offset", torch.zeros(shape))
            self.register_buffer(f"{key}_scale", torch.ones(shape))
        self.keys = tuple(shapes)

    def fit(
        self,
        data: Mapping[str, np.ndarray],
        statistics: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = limits,
    ) -> None:
        """Take offset and scale of every key from rows (steps, ...)."""
        for key in self.keys:
            offset, scale = statistics(data[key].astype(np.float64))
            scale = np.where(scale < CONSTANT, 1.0, scale)
            self.get_buffer(f"{key}_offset").copy_(torch.as_tensor(offset))
            self.get_buffer(f"{key}_scale").copy_(torch.as_tensor(scale))

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Raw → about [−1, 1]; (..., *shape)."""
        return (x - self.get_buffer(f"{key}_offset")) / self.get_buffer(f"{key}_scale")

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return x * self.get_buffer(f"{key}_scale") + self.get_buffer(f"{key}_offset")
