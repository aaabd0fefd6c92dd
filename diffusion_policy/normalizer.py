"""Raw numbers ↔ numbers of about one that the network sees; travels inside the checkpoint as buffers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_policy.basics.images import is_image
from diffusion_policy.datasets.statistics import Statistics
from diffusion_policy.networks.representation import SIX, from_six, take, to_six

WITHOUT_FLOAT64 = ("mps",)
"""Devices that have no float64; raw numbers are computed in float32 there."""


def limits(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map the smallest and largest value of each column to −1 and 1."""
    half_range = statistics.maximum / 2 - statistics.minimum / 2
    return statistics.minimum + half_range, half_range


def moments(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that give each column mean 0 and standard deviation 1."""
    return statistics.mean, statistics.std


def quantiles(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map the quantiles 0.01 and 0.99 of each column to −1 and 1: outliers do not stretch it."""
    half_range = statistics.high / 2 - statistics.low / 2
    return statistics.low + half_range, half_range


def full_scale(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale that map a pixel's 0 and 255 to −1 and 1."""
    half = np.full_like(statistics.mean, 127.5)
    return half, half


def imagenet(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale by which the channels of ImageNet's images have mean 0 and deviation 1, as the encoders that are
    published for them want it. Raises ValueError for images without three channels."""
    if statistics.mean.shape != (3,):
        raise ValueError(f"imagenet normalizes images of 3 channels; got {statistics.mean.size}")
    return np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


IMAGE_NORMALIZATIONS: dict[str, Callable[[Statistics], tuple[np.ndarray, np.ndarray]]] = {
    "scale": full_scale,
    "channels": moments,
    "imagenet": imagenet,
}
NORMALIZATIONS: dict[str, Callable[[Statistics], tuple[np.ndarray, np.ndarray]]] = {
    "limits": limits,
    "moments": moments,
    "quantiles": quantiles,
}


def is_flat(statistics: Statistics, normalization: Callable[[Statistics], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Which columns vary, but too rarely for this normalization to see it, bool: as a gripper that is closed for 99.5 %
    of the time has one value between its quantiles. They are normalized by their limits."""
    return (normalization(statistics)[1] <= statistics.rounding) & ~statistics.constant


def describe_columns(
    statistics: Mapping[str, Statistics], normalization: Callable[[Statistics], tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    """What is peculiar about columns, a sentence each; none where there is nothing. The keys are called as they are
    here."""
    constant = [name for key, found in statistics.items() for name in _names(key, found.constant)]
    rare = [name for key, found in statistics.items() for name in _names(key, is_flat(found, normalization))]
    said = []
    if constant:
        said.append(f"constant, so that nothing is learned of them: {_some(constant)}")
    if rare:
        said.append(f"varying too rarely for this normalization, and normalized by their limits: {_some(rare)}")
    return said


def _names(key: str, chosen: np.ndarray) -> list[str]:
    """Names of the chosen columns of a key, such as x[3] or x[0,3]."""
    return [f"{key}[{','.join(map(str, column))}]" for column in np.argwhere(chosen)]


def _some(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Normalizer(nn.Module):
    """Per key: normalized = (x − offset) / scale, column by column; but a column that holds an angle [rad] becomes its
    cosine and its sine, and the columns of a rotation become six numbers (see `networks.representation`), which stand
    behind the other columns: [others | cosines | sines | rotations]. A new one shifts and scales nothing until it is
    fitted or loaded.

    An image has one offset and one scale for each channel, and is computed in float32. Of all else, a constant column
    has the scale 0: it is normalized to 0, and what comes back is the constant; and all is computed in float64 (on MPS,
    which has none, in float32), so that small moves at large positions are still there; what the network sees is
    float32.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        angles: Mapping[str, tuple[int, ...]] | None = None,
        rotations: Mapping[str, tuple[tuple[int, ...], ...]] | None = None,
    ) -> None:
        """`shapes`: shape of each key at one step; `angles`: columns of a key that hold angles; `rotations`: columns of
        a key that hold a rotation together. Raises ValueError for columns that a key does not have."""
        super().__init__()
        self.keys, angles, rotations = tuple(shapes), angles or {}, rotations or {}
        self._round = {
            key: _divide(key, shapes.get(key), angles.get(key, ()), rotations.get(key, ()))
            for key in {**angles, **rotations}
            if angles.get(key) or rotations.get(key)
        }
        self.shapes = {
            key: (self._round[key].numbers,) if key in self._round else tuple(shape) for key, shape in shapes.items()
        }
        """Shape of each key at one step as the network sees it."""
        self.images = frozenset(key for key, shape in self.shapes.items() if is_image(shape))
        """The keys that are images."""
        for key, shape in self.shapes.items():
            columns = shape[-1:] if key in self.images else shape
            self.register_buffer(_buffer(key, "offset"), torch.zeros(columns, dtype=torch.float64))
            self.register_buffer(_buffer(key, "scale"), torch.ones(columns, dtype=torch.float64))

    @property
    def precision(self) -> torch.dtype:
        """What raw numbers are computed in."""
        return self.get_buffer(_buffer(self.keys[0], "offset")).dtype

    def fit(
        self,
        statistics: Mapping[str, Statistics],
        normalization: Callable[[Statistics], tuple[np.ndarray, np.ndarray]] = limits,
        of_images: Callable[[Statistics], tuple[np.ndarray, np.ndarray]] = full_scale,
    ) -> None:
        """Take offset and scale of every key from its statistics; cosines and sines stay as they are. Raises ValueError
        for numbers that are not finite, or so large that their range is not."""
        for key in self.keys:
            found = statistics[key]
            if key in self.images:
                for name, numbers in zip(("offset", "scale"), of_images(found), strict=True):
                    self.get_buffer(_buffer(key, name)).copy_(torch.as_tensor(numbers))
                continue
            by_limits = found.constant | is_flat(found, normalization)
            pairs = zip(limits(found), normalization(found), strict=True)
            offset, scale = (torch.as_tensor(np.where(by_limits, of_limits, own)) for of_limits, own in pairs)
            if not (torch.isfinite(offset).all() and torch.isfinite(scale).all()):
                raise ValueError(f"{key} holds NaN, infinity, or numbers too large to be normalized")
            scale[torch.as_tensor(found.constant)] = 0
            if key in self._round:
                others = list(self._round[key].others)
                rest = torch.zeros(self._round[key].numbers - len(others))
                offset, scale = torch.cat([offset[others], rest]), torch.cat([scale[others], rest + 1])
            self.get_buffer(_buffer(key, "offset")).copy_(offset)
            self.get_buffer(_buffer(key, "scale")).copy_(scale)

    def places(self, key: str, columns: Collection[int]) -> list[int]:
        """Which of the numbers that the network sees of a key, a row of numbers, come from these of its columns."""
        if key not in self._round:
            return sorted(columns)
        own = self._round[key]
        of_rotations = [rotation for rotation in own.rotations for _ in range(SIX)]
        owners = [*((column,) for column in (*own.others, *own.angles, *own.angles)), *of_rotations]
        return [place for place, owner in enumerate(owners) if not set(owner).isdisjoint(columns)]

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Raw (..., *shape) of any type → about [−1, 1], (..., *shapes[key]) float32. Of an image, height and width
        may be others."""
        offset, scale = self._numbers(key)
        if key in self.images:
            return (x.float() - offset.float()) / scale.where(scale > 0, torch.inf).float()
        x = x.to(offset)
        if key in self._round:
            columns = self._round[key]
            angles = take(x, columns.angles)
            turned = [to_six(take(x, rotation)) for rotation in columns.rotations]
            x = torch.cat([take(x, columns.others), torch.cos(angles), torch.sin(angles), *turned], dim=-1)
        return ((x - offset) / scale.where(scale > 0, torch.inf)).float()

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """The inverse of `normalize`, float64 (float32 on MPS); angles come back within [−pi, pi]."""
        offset, scale = self._numbers(key)
        x = x.to(offset) * scale + offset
        if key not in self._round:
            return x
        columns = self._round[key]
        count, turned = len(columns.angles), len(columns.rotations)
        others, cosines, sines, *sixes = x.split([len(columns.others), count, count, *[SIX] * turned], dim=-1)
        angles = torch.atan2(sines.float(), cosines.float()).to(x)  # in the network's precision, as runtimes have it
        rotations = [from_six(one, len(own)) for one, own in zip(sixes, columns.rotations, strict=True)]
        return take(torch.cat([others, angles, *rotations], dim=-1), columns.order)

    def _numbers(self, key: str) -> tuple[Tensor, Tensor]:
        """Offset and scale."""
        return self.get_buffer(_buffer(key, "offset")), self.get_buffer(_buffer(key, "scale"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalizer":
        """Move, also to a device without float64."""
        if fn(torch.empty(0)).device.type in WITHOUT_FLOAT64:
            return super()._apply(lambda tensor: fn(tensor.float()), recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The numbers in float64, whatever the device has."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.precision != torch.float64:
            for name in self._buffers:
                destination[prefix + name] = destination[prefix + name].cpu().double()


class _Columns(NamedTuple):
    """Of a key with angles or rotations."""

    others: tuple[int, ...]
    angles: tuple[int, ...]
    rotations: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    """Places in [others | angles | rotations], to have a key's columns as they were."""

    @property
    def numbers(self) -> int:
        """Numbers that the network sees."""
        return len(self.others) + 2 * len(self.angles) + SIX * len(self.rotations)


def _divide(
    key: str, shape: tuple[int, ...] | None, angles: Sequence[int], rotations: Sequence[Sequence[int]]
) -> _Columns:
    """The columns of a key; raises ValueError for those that it does not have, and for one that is two things."""
    what = "is not used" if shape is None else f"has the shape {shape} a step"
    for name, columns in (("angles", angles), *(("a rotation", rotation) for rotation in rotations)):
        wrong = [column for column in columns if shape is None or len(shape) != 1 or not 0 <= column < shape[0]]
        if wrong or len(set(columns)) < len(columns):
            raise ValueError(f"{name} must name columns of a key, each once; {key} {what}, got {list(columns)}")
        if name == "a rotation" and len(columns) not in (3, 4):
            raise ValueError(
                f"a rotation has 3 columns (a rotation vector) or 4 (x, y, z, w); {key} has {len(columns)}"
            )
    taken = [*angles, *(column for rotation in rotations for column in rotation)]
    twice = [column for column in taken if taken.count(column) > 1]
    if twice:
        raise ValueError(f"a column is an angle or part of one rotation; column {twice[0]} of {key} is both or twice")
    assert shape is not None
    others = tuple(column for column in range(shape[0]) if column not in taken)
    order = np.argsort([*others, *taken]).tolist()
    return _Columns(others, tuple(angles), tuple(map(tuple, rotations)), tuple(order))


def _buffer(key: str, what: str) -> str:
    """A buffer's name, in which torch allows no dots."""
    return f"{key.replace('.', '/')}_{what}"
