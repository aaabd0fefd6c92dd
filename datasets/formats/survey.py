"""Finds what the episodes of HDF5 files have in common without reading a row; then reads the rows of an episode.

Knows arrays of HDF5. Knows no layout of groups.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.datasets.formats.hdf5 import File
from diffusion_policy.datasets.formats.reading import check_sizes, say_too_large
from diffusion_policy.datasets.storage import StoreError


class Array(NamedTuple):
    """One array of every episode, and why it cannot be used."""

    path: tuple[str, ...]
    """Within an episode's group."""
    shape: tuple[int, ...]
    """Of a row."""
    dtype: np.dtype
    longer: bool
    """Whether every episode has one row more than actions, the last of which belongs to no action."""
    why: str | None


class Survey:
    """What the episodes of a file, or of several, have in common; no rows are read for it."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self.steps: dict[str, int] = {}
        """By episode."""
        self.left_out: dict[str, str] = {}
        self._seen: Counter[str] = Counter()

    def begin(self, episode: str, steps: int) -> None:
        """The following arrays are those of this episode."""
        self.steps[episode] = steps

    def add(
        self,
        file: File,
        key: str,
        path: tuple[str, ...],
        node: Any,
        *,
        longer: bool = False,
        whole: bool = True,
        decoded: tuple[tuple[int, ...], np.dtype] | None = None,
    ) -> None:
        """An array of the episode that was begun last, or why it cannot be used. `longer`: it may have one row more
        than actions. `whole`: it is read at once. `decoded`: shape and type that its rows will have."""
        episode, steps = next(reversed(self.steps.items()))
        why = None if decoded else file.why_not(node)
        shape, dtype, rows = (), np.dtype(float), steps
        if why is None:
            shape, dtype, rows = node.shape[1:], node.dtype, node.shape[0]
            shape, dtype = decoded or (shape, dtype)
            size = rows * math.prod(shape) * dtype.itemsize
            if rows != steps and not (longer and rows == steps + 1):
                why = f"it has {rows} rows; the actions have {steps}"
            elif whole and size > file.most_bytes:
                why = say_too_large(size, file.path)
        known = self.arrays.get(key)
        if known is not None and known.path != path:
            self.left_out["/".join(path)] = f"another array is called {key}"
            return
        self._seen[key] += 1
        if known is None:
            absent = len(self.steps) > 1
            self.arrays[key] = Array(
                path, shape, dtype, rows > steps, _in(episode, "it is not in those before" if absent else why)
            )
        elif known.why is None:
            if why is None and (known.shape, known.dtype) != (shape, dtype):
                why = f"its rows are {shape} of {dtype}; before, they were {known.shape} of {known.dtype}"
            self.arrays[key] = known._replace(longer=known.longer and rows > steps, why=_in(episode, why))

    def refuse_empty(self, what: str, left_out: Mapping[str, str] | None = None) -> None:
        """Raise StoreError where no episode can be used, with the reason of the first that was left out."""
        if not self.steps:
            first, why = next(iter((left_out or self.left_out).items()))
            raise StoreError(f"no {what} can be used; {first}: {why}")

    def whys(self) -> dict[str, str | None]:
        """Why each array cannot be used; None where it can."""
        episodes = len(self.steps)
        lacking = {key: episodes - seen for key, seen in self._seen.items() if seen < episodes}
        absent = {key: f"{count} of {episodes} episodes do not have it" for key, count in lacking.items()}
        return {key: array.why or absent.get(key) for key, array in self.arrays.items()}

    def row_bytes(self, keys: Sequence[str]) -> int:
        """Bytes of a step of these arrays."""
        return sum(math.prod(self.arrays[key].shape) * self.arrays[key].dtype.itemsize for key in keys)

    def check(self, keys: Sequence[str], file: File, lengths: Iterable[int] = ()) -> None:
        """Raise StoreError where an episode of the file, or all of them, would be too large; `lengths`: their steps,
        where they are not those of the survey."""
        check_sizes(self.row_bytes(keys), lengths or self.steps.values(), file.path)

    def read(
        self,
        file: File,
        group: Any,
        episode: str,
        keys: Sequence[str],
        decode: Callable[[str, Any], np.ndarray] | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The rows of these arrays of an episode, and the last row of those that have one more than actions."""
        data, final, steps = {}, {}, self.steps[episode]
        for key in keys:
            array = self.arrays[key]
            node = file.member(group, *array.path)
            if not file.is_array(node):
                raise StoreError(f"{episode}/{'/'.join(array.path)} is no longer there")
            rows = decode(key, node) if decode else file.rows(node)
            if array.longer:
                final[key] = rows[steps]
            data[key] = rows[:steps]
        return data, final


def _in(episode: str, why: str | None) -> str | None:
    return None if why is None else f"{why} ({episode})"
