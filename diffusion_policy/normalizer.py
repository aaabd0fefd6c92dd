"""Raw numbers ↔ numbers of about one that the network sees; travels inside the checkpoint as buffers."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_policy.datasets.statistics import Statistics

CONSTANT = 1e-4
"""A column whose scale is below this is only shifted, never stretched."""


def limits(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map the smallest and largest value of each column to −1 and 1."""
    return (statistics.minimum + statistics.maximum) / 2, (statistics.maximum - statistics.minimum) / 2


def moments(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that give each column mean 0 and standard deviation 1."""
    return statistics.mean, statistics.std


def quantiles(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map the quantiles 0.01 and 0.99 of each column to −1 and 1: outliers do not stretch it."""
    return (statistics.low + statistics.high) / 2, (statistics.high - statistics.low) / 2


NORMALIZATIONS: dict[str, Callable[[Statistics], tuple[np.ndarray, np.ndarray]]] = {
    "limits": limits,
    "moments": moments,
    "quantiles": quantiles,
}


class Normalizer(nn.Module):
    """Per key: normalized = (x − offset) / scale, column by column; but a column that holds an angle [rad] becomes its
    cosine and its sine, which stand behind the other columns: [others | cosines | sines]. A new one shifts and scales
    nothing until it is fitted or loaded."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], angles: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        """`shapes`: shape of each key at one step; `angles`: columns of a key that hold angles. Raises ValueError for
        columns that a key does not have."""
        super().__init__()
        self.keys = tuple(shapes)
        self._angles = {key: tuple(columns) for key, columns in (angles or {}).items() if columns}
        self._others: dict[str, tuple[int, ...]] = {}
        for key, columns in self._angles.items():
            shape = shapes.get(key, ())
            wrong = [column for column in columns if len(shape) != 1 or not 0 <= column < shape[0]]
            if wrong or len(set(columns)) < len(columns):
                what = f"has the shape {shape} a step" if key in shapes else "is not used"
                raise ValueError(f"angles must name columns of a key, each once; {key} {what}, got {list(columns)}")
            self._others[key] = tuple(column for column in range(shape[0]) if column not in columns)
        self.shapes = {
            key: (shape[0] + len(self._angles[key]),) if key in self._angles else tuple(shape)
            for key, shape in shapes.items()
        }
        """Shape of each key at one step as the network sees it."""
        for key, shape in self.shapes.items():
            self.register_buffer(_buffer(key, "offset"), torch.zeros(shape))
            self.register_buffer(_buffer(key, "scale"), torch.ones(shape))

    def fit(
        self,
        statistics: Mapping[str, Statistics],
        normalization: Callable[[Statistics], tuple[np.ndarray, np.ndarray]] = limits,
    ) -> None:
        """Take offset and scale of every key from its statistics; cosines and sines stay as they are."""
        for key in self.keys:
            offset, scale = (torch.as_tensor(array) for array in normalization(statistics[key]))
            scale = torch.where(scale < CONSTANT, 1.0, scale)
            if key in self._angles:
                others, circle = list(self._others[key]), torch.zeros(2 * len(self._angles[key]))
                offset, scale = torch.cat([offset[others], circle]), torch.cat([scale[others], circle + 1])
            self.get_buffer(_buffer(key, "offset")).copy_(offset)
            self.get_buffer(_buffer(key, "scale")).copy_(scale)

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Raw (..., *shape) → about [−1, 1], (..., *shapes[key])."""
        if key in self._angles:
            angles = x[..., list(self._angles[key])]
            x = torch.cat([x[..., list(self._others[key])], torch.cos(angles), torch.sin(angles)], dim=-1)
        return (x - self.get_buffer(_buffer(key, "offset"))) / self.get_buffer(_buffer(key, "scale"))

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """The inverse of `normalize`; angles come back within [−pi, pi]."""
        x = x * self.get_buffer(_buffer(key, "scale")) + self.get_buffer(_buffer(key, "offset"))
        if key not in self._angles:
            return x
        count = len(self._angles[key])
        others, cosines, sines = x.split([x.shape[-1] - 2 * count, count, count], dim=-1)
        order = np.argsort([*self._others[key], *self._angles[key]]).tolist()
        return torch.cat([others, torch.atan2(sines, cosines)], dim=-1)[..., order]


def _buffer(key: str, what: str) -> str:
    """A buffer's name, in which torch allows no dots."""
    return f"{key.replace('.', '/')}_{what}"
