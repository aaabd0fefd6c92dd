"""What cameras give, frame by frame: limits and means of the channels, frames without a picture, frames that repeat.

Knows images as arrays. Knows no store.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

CONSTANT = 8 / 255
"""A frame shows nothing where the values of each channel lie within so much of the whole range."""
FROZEN_FRAMES = 10
"""A camera has frozen when at least so many frames are the same ..."""
MOVED = 0.05
"""... while a column of the state moves by at least so much of its range."""
BYTES_AT_A_TIME = 2**21


class Run(NamedTuple):
    """Consecutive frames of an episode that are the same."""

    episode: int
    start: int
    stop: int
    """First row, and row after the last."""


class Frames:
    """Collects what is in the frames of one camera, whose rows come block by block."""

    def __init__(self, steps: int, starts: np.ndarray, dtype: np.dtype) -> None:
        """`starts`: first row of each episode, whose frame repeats none."""
        self.blank: np.ndarray = np.zeros(steps, bool)
        """Whether a frame shows nothing, (steps,)."""
        self.repeated: np.ndarray = np.zeros(steps, bool)
        """Whether a frame is the one before it in its episode, (steps,)."""
        self._dtype = dtype
        self._starts = starts
        self._last: tuple[int, np.ndarray] | None = None
        self._spread: np.ndarray = np.full(steps, np.inf)  # largest of the channels; of frames that came
        self._count = 0
        self._sum: np.ndarray = np.zeros(1)
        self.lowest: np.ndarray = np.full(1, np.inf)
        """Of each channel, (channels,)."""
        self.highest: np.ndarray = np.full(1, -np.inf)

    def add(self, first: int, rows: np.ndarray) -> None:
        """Take in frames (steps, height, width, channels) from row `first` on; what is not finite counts as 0."""
        step = max(1, BYTES_AT_A_TIME // max(1, rows[:1].nbytes))
        for start in range(0, len(rows), step):
            self._add(first + start, rows[start : start + step])

    def _add(self, first: int, rows: np.ndarray) -> None:
        if rows.dtype.kind == "f":
            rows = np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
        stop = first + len(rows)
        flat = rows.reshape(*rows.shape[:2], -1)  # first over the height: thirty times as fast as over all pixels
        low, high = (by.reshape(len(rows), *rows.shape[2:]) for by in (flat.min(axis=1), flat.max(axis=1)))
        low, high = low.min(axis=1), high.max(axis=1)  # (frames, channels)
        self._spread[first:stop] = (high.astype(np.float64) - low).max(axis=1)
        self.lowest, self.highest = np.minimum(self.lowest, low.min(axis=0)), np.maximum(self.highest, high.max(axis=0))
        total = flat.sum(axis=1, dtype=np.float64 if rows.dtype.kind == "f" else np.int64)  # (frames, width * channels)
        self._sum = self._sum + total.reshape(-1, rows.shape[-1]).sum(axis=0)
        self._count += rows.size // rows.shape[-1]
        self.repeated[first + 1 : stop] = (rows[1:] == rows[:-1]).all(axis=(1, 2, 3))
        if self._last is not None and self._last[0] == first - 1:
            self.repeated[first] = bool((self._last[1] == rows[0]).all())
        self._last = stop - 1, rows[-1].copy()

    def finish(self) -> None:
        """Say which frames show nothing and which repeat, now that the range of the values is known."""
        self.blank = self._spread <= CONSTANT * self.scale
        self.blank[self._spread == 0] = True
        self.repeated[self._starts] = False

    @property
    def mean(self) -> np.ndarray:
        """Of each channel, (channels,)."""
        return self._sum / max(1, self._count)

    @property
    def scale(self) -> float:
        """What white is: 255 for bytes and for floats beyond 1, else 1; 0 for other whole numbers, such as depths,
        whose range is not known."""
        if self._dtype.kind == "f":
            return 255.0 if (self.highest > 1).any() else 1.0
        return 255.0 if self._dtype == np.uint8 else 0.0

    @property
    def fits(self) -> bool:
        """Whether the values are those of images: floats from 0 to 1 or to 255; whole numbers from 0 on."""
        low, high = float(self.lowest.min()), float(self.highest.max())
        return low >= 0 and (self._dtype.kind != "f" or high <= 255)

    def runs(self, ends: np.ndarray) -> Iterator[Run]:
        """The longest runs of frames that are the same, from FROZEN_FRAMES on; `ends`: of the episodes."""
        edges = np.flatnonzero(np.diff(self.repeated.astype(np.int8), prepend=0, append=0))
        for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            start = first - 1  # the frame that is repeated
            if stop - start >= FROZEN_FRAMES:
                yield Run(int(np.searchsorted(ends, start, side="right")), start, stop)
