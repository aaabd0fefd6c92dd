"""Statistics that a normalizer needs, in one pass over blocks of any size: limits, moments, quantiles. Those of images
are of their channels, and exact: a count of each brightness says all.

Knows arrays. Knows no file.
"""

from typing import NamedTuple

import numpy as np

from diffusion_policy.basics.images import as_uint8, is_image
from diffusion_policy.basics.streams import derive_rng

QUANTILES = (0.01, 0.99)
SAMPLE_ROWS = 2**16
"""Quantiles are exact for up to so many rows; of more, they are those of so many rows drawn at random (a rank error of
0.0004 at the outer quantiles)."""
SAMPLE_BYTES = 2**24
BLOCK_NUMBERS = 2**19
"""So many numbers at a time become float64."""
ROUNDED_ULPS = 4
"""A column whose numbers lie within so many units in the last place of their type is constant."""


class Statistics(NamedTuple):
    """Of the columns of one key; arrays of the shape of one row, or (channels,) of images, float64."""

    rows: int
    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    """The quantile 0.01."""
    high: np.ndarray
    """The quantile 0.99."""
    dtype: np.dtype = np.dtype(np.float64)
    """Type in which the rows are stored."""
    image: tuple[int, ...] | None = None
    """Height, width and channels of images, which count as uint8; None for other rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return self.image or self.mean.shape

    @property
    def rounding(self) -> np.ndarray:
        """Half of the widest range that rounding to the stored type could give a constant of this magnitude."""
        exact = self.dtype.kind != "f"
        epsilon = 0.0 if exact else float(np.finfo(self.dtype).eps)
        magnitude = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return np.maximum(ROUNDED_ULPS / 2 * epsilon * magnitude, np.finfo(np.float32).tiny)

    @property
    def constant(self) -> np.ndarray:
        """Which columns are constant but for rounding, bool."""
        return self.maximum / 2 - self.minimum / 2 <= self.rounding


class Measuring:
    """Collects statistics block by block. Moments are combined as by Chan, Golub & LeVeque (1983, eq. 2.1)."""

    def __init__(self, seed: int = 0) -> None:
        """`seed`: of the random rows that quantiles are taken from when there are many."""
        self._dtype: np.dtype | None = None
        self._rng = derive_rng("quantiles", seed)
        self._count = 0
        self.sample = np.empty(0)
        """Rows drawn at random from all, or all while they are few."""
        self._places = np.empty(0)
        self._image: tuple[int, ...] | None = None
        self._pixels = np.empty(0)
        """Of each channel, how many are of each brightness, (channels, 256)."""

    def add(self, rows: np.ndarray) -> None:
        """Take in rows (steps, ...); raises ValueError for what is no real number."""
        rows = as_rows(rows)
        if is_image(rows.shape[1:]):
            self._add_images(rows)
            return
        self._dtype = rows.dtype if self._dtype is None else np.result_type(self._dtype, rows.dtype)
        step = max(1, BLOCK_NUMBERS // max(1, rows[:1].size))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by the normalizer
            for start in range(0, len(rows), step):
                self._add(rows[start : start + step])

    def _add(self, rows: np.ndarray) -> None:
        block = rows.astype(np.float64)
        count, mean = len(block), block.mean(axis=0)
        squares = ((block - mean) ** 2).sum(axis=0)
        if self._count == 0:
            self._minimum, self._maximum = block.min(axis=0), block.max(axis=0)
            self._mean, self._squares, self.sample = mean, squares, rows[:0]
        else:
            self._minimum = np.minimum(self._minimum, block.min(axis=0))
            self._maximum = np.maximum(self._maximum, block.max(axis=0))
            difference, total = mean - self._mean, self._count + count
            self._mean = self._mean + difference * (count / total)
            self._squares = self._squares + squares + difference**2 * (self._count * count / total)
        self._count += count
        self._draw(rows)

    def _add_images(self, images: np.ndarray) -> None:
        """Count the brightness of pixels (steps, H, W, C)."""
        if self._image is None:
            self._image, self._pixels = images.shape[1:], np.zeros((images.shape[3], 256), np.int64)
        self._count += len(images)
        for some in np.array_split(images, max(1, images.size // BLOCK_NUMBERS)):
            pixels = as_uint8(some, "an image")
            for channel, counted in enumerate(self._pixels):
                counted += np.bincount(pixels[..., channel].reshape(-1), minlength=256)

    def _measure_images(self, image: tuple[int, ...]) -> Statistics:
        levels, shares = np.arange(256.0), self._pixels / self._pixels.sum(axis=1, keepdims=True)
        mean = shares @ levels
        there = self._pixels > 0
        high_to_low = there[:, ::-1]
        low, high = ((np.cumsum(shares, axis=1) < share).sum(axis=1).astype(np.float64) for share in QUANTILES)
        return Statistics(
            self._count,
            there.argmax(axis=1).astype(np.float64),
            255.0 - high_to_low.argmax(axis=1),
            mean,
            np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1)),
            low,
            high,
            np.dtype(np.uint8),
            image,
        )

    def _draw(self, rows: np.ndarray) -> None:
        """Keep a uniform sample: every row draws a number, and the rows with the smallest ones stay."""
        most = max(1000, min(SAMPLE_ROWS, SAMPLE_BYTES // max(1, rows[:1].nbytes)))
        places = np.concatenate([self._places, self._rng.random(len(rows))])
        sample = np.concatenate([self.sample, rows])
        if len(sample) > most:
            kept = np.argpartition(places, most)[:most]
            places, sample = places[kept], sample[kept]
        self._places, self.sample = places, sample

    def result(self) -> Statistics:
        """Statistics of all rows so far; raises ValueError when there are none."""
        if self._count and self._image is not None:
            return self._measure_images(self._image)
        if self._count == 0 or self._dtype is None:
            raise ValueError("statistics need at least one row")
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = np.quantile(self.sample.astype(np.float64), QUANTILES, axis=0)
        std = np.sqrt(self._squares / self._count)
        return Statistics(self._count, self._minimum, self._maximum, self._mean, std, low, high, self._dtype)


def as_rows(array: np.ndarray) -> np.ndarray:
    """Rows (steps, ...) of real numbers: where a step is one number, it is a row (1,). Raises ValueError for others."""
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise ValueError(f"rows must be real numbers, a row a step; got {array.dtype} of shape {array.shape}")
    return array if array.ndim > 1 else array[:, None]


def measure(rows: np.ndarray) -> Statistics:
    """Statistics of rows (steps, ...)."""
    measuring = Measuring()
    measuring.add(rows)
    return measuring.result()
