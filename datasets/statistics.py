"""What a normalizer needs to know of rows, in one pass over blocks of any size: limits, moments, quantiles.

Knows arrays. Knows no file.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.streams import derive_rng

QUANTILES = (0.01, 0.99)
SAMPLE_ROWS = 2**16
"""Quantiles are exact for up to so many rows; of more, they are those of so many rows drawn at random (a rank error of
0.0004 at the outer quantiles)."""
SAMPLE_BYTES = 2**24
BLOCK_NUMBERS = 2**19
"""So many numbers at a time become float64."""


class Statistics(NamedTuple):
    """Of the columns of one key; arrays of the shape of one row, float64."""

    rows: int
    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    """The quantile 0.01."""
    high: np.ndarray
    """The quantile 0.99."""


class Summary(NamedTuple):
    """What one pass over a store has found."""

    fingerprint: str
    """Of all rows, see `EpisodeStore.fingerprint`."""
    statistics: dict[str, Statistics]
    """Of the rows of the chosen episodes, by key; the action is `action`."""


class Measuring:
    """Collects statistics block by block. Moments are combined as by Chan, Golub & LeVeque (1983, eq. 2.1)."""

    def __init__(self, seed: int = 0) -> None:
        """`seed`: of the random rows that quantiles are taken from when there are many."""
        self._rng = derive_rng("quantiles", seed)
        self._count = 0
        self.sample = np.empty(0)
        """Rows drawn at random from all, or all while they are few."""
        self._places = np.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Take in rows (steps, ...)."""
        step = max(1, BLOCK_NUMBERS // max(1, rows[:1].size))
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
        if self._count == 0:
            raise ValueError("statistics need at least one row")
        low, high = np.quantile(self.sample.astype(np.float64), QUANTILES, axis=0)
        std = np.sqrt(self._squares / self._count)
        return Statistics(self._count, self._minimum, self._maximum, self._mean, std, low, high)


def measure(rows: np.ndarray) -> Statistics:
    """Statistics of rows (steps, ...)."""
    measuring = Measuring()
    measuring.add(rows)
    return measuring.result()


def summarize(
    store: EpisodeStore, observation_keys: Sequence[str], action_key: str, episodes: Sequence[int] | np.ndarray
) -> Summary:
    """Fingerprint of a store and statistics of some of its episodes, in one pass with bounded memory."""
    keys = {key: key for key in observation_keys} | {action_key: "action"}
    measuring = {name: Measuring() for name in keys.values()}
    ends = store.episode_ends
    chosen = np.zeros(len(ends), bool)
    chosen[episodes] = True

    def add(key: str, start: int, rows: np.ndarray) -> None:
        episode_of = np.searchsorted(ends, np.arange(start, start + len(rows)), side="right")
        used = chosen[episode_of]
        measuring[keys[key]].add(rows if used.all() else rows[used])

    fingerprint = store.fingerprint(observation_keys, action_key, add)
    return Summary(fingerprint, {name: part.result() for name, part in measuring.items()})


def to_json(statistics: Mapping[str, Statistics]) -> dict[str, dict[str, object]]:
    """As a checkpoint stores them."""
    return {
        key: {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in part._asdict().items()
        }
        for key, part in statistics.items()
    }
