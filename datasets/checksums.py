"""Checksums of episodes. They cover the name of the array and the index of the episode, so that they detect exchanged
rows even where every chunk is intact.

Knows bytes. Knows no store.
"""

from collections.abc import Iterator, Mapping

import google_crc32c
import numpy as np


def checksum(name: str, episode: int, *parts: np.ndarray) -> int:
    """CRC-32C (RFC 3720, B.4) of an array's name, the index of an episode, and numbers, in little-endian bytes."""
    value = google_crc32c.value(f"{name} {episode} ".encode())
    for part in parts:
        value = google_crc32c.extend(value, _bytes(part))
    return value


def _bytes(numbers: np.ndarray) -> bytes:
    return np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).tobytes()


class RowChecksums:
    """The checksums of the episodes of one array, whose rows come block by block."""

    def __init__(self, name: str, ends: np.ndarray) -> None:
        """`ends`: row after the last of each episode, (episodes,)."""
        self._name = name
        self._ends = ends
        self._episode = 0
        self._row = 0
        self._value = checksum(name, 0)

    def add(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """Take in the next rows, (steps, ...); yields the episodes that are complete: (index, checksum)."""
        stop = self._row + len(rows)
        while self._row < stop:
            end = int(self._ends[self._episode])
            part = rows[len(rows) - (stop - self._row) :][: end - self._row]
            self._value = google_crc32c.extend(self._value, _bytes(part))
            self._row += len(part)
            if self._row == end:
                yield self._episode, self._value
                self._episode += 1
                self._value = checksum(self._name, self._episode)


def checksums_of_episode(episode: int, columns: Mapping[str, np.ndarray], end: int) -> list[int]:
    """The checksums of an episode's rows in each array of data/, sorted by name, and of what is known of it."""
    of_rows = [checksum(path[5:], episode, columns[path]) for path in sorted(columns) if path.startswith("data/")]
    return [*of_rows, checksum_of_meta(episode, end, {path: columns[path] for path in columns if path[:5] == "meta/"})]


def checksum_of_meta(episode: int, end: int, known: Mapping[str, np.ndarray]) -> int:
    """The checksum of what is known of an episode, by path of its array, and of where it ends."""
    return checksum("meta", episode, np.array(end, np.int64), *(known[path] for path in sorted(known)))


def exchanged(episode: int) -> str:
    """What a checksum says that does not fit, in words."""
    return f"rows of episode {episode} are not those that were written (damage, or exchanged files)"
