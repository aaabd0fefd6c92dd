"""Spaces of Gymnasium as Minari writes them in JSON: the spaces within a space, and their rows as observations.

Knows Gymnasium's spaces by name. Knows no files.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from diffusion_policy.basics.names import join_names
from diffusion_policy.datasets.formats.reading import library
from diffusion_policy.datasets.storage import StoreError


class Leaf(NamedTuple):
    """A space within others."""

    key: str
    place: tuple[str, ...]
    """Groups in the file."""
    space: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.space.get("type"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row, as it is observed."""
        if self.kind == "Box":
            return tuple(self.space["shape"])
        return (sum(self._counts()),) if self.kind != "MultiBinary" else (int(np.prod(self.space["n"])),)

    @property
    def is_picture(self) -> bool:
        """Whether Minari packs it as JPEG, unless it is told not to."""
        bounds = _same(self.space.get("low")), _same(self.space.get("high"))
        large = self.kind == "Box" and len(self.shape) in (2, 3) and min(self.shape[:2]) >= 32
        return large and self.space.get("dtype") == "uint8" and bounds == (0, 255)

    def why_not(self) -> str | None:
        """Why it cannot be observed."""
        if self.kind not in ("Box", "Discrete", "MultiDiscrete", "MultiBinary"):
            return f"it is a space of {self.kind}, not of numbers"
        try:
            sizes = self.shape
        except (KeyError, TypeError, ValueError, OverflowError):
            return "its space is damaged"
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes):
            return f"its space has the shape {sizes}"
        return None

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they are observed: one-hot, or 0 and 1; raises StoreError for values that the space does not have."""
        if self.kind == "Box":
            return rows
        flat = rows.reshape(len(rows), -1)
        if self.kind == "MultiBinary":
            return flat.astype(np.float32)
        counts = self._counts()
        values = flat.astype(np.int64) - self._starts()
        if values.shape[1] != len(counts) or (values < 0).any() or (values >= counts).any():
            raise StoreError(f"{self.key} has values that its space, {self.kind}, does not have")
        hot = np.zeros((len(rows), sum(counts)), np.float32)
        np.put_along_axis(hot, values + np.cumsum([0, *counts[:-1]]), 1, axis=1)
        return hot

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Rows as the space has them."""
        if self.kind == "Box":
            return rows.reshape(len(rows), *self.shape)
        if self.kind == "MultiBinary":
            return rows.astype(np.int8).reshape(len(rows), *np.atleast_1d(self.space["n"]))
        parts = np.split(rows, np.cumsum(self._counts())[:-1], axis=1)
        values = np.stack([part.argmax(axis=1) for part in parts], axis=1) + self._starts()
        return (
            values.reshape(len(rows), *np.shape(self.space["nvec"])) if self.kind == "MultiDiscrete" else values[:, 0]
        )

    def _counts(self) -> list[int]:
        counts = np.reshape(self.space["n" if self.kind == "Discrete" else "nvec"], -1)
        return [int(count) for count in counts]

    def _starts(self) -> np.ndarray:
        starts = self.space.get("start", 0)
        return np.broadcast_to(np.reshape(starts, -1).astype(np.int64), (len(self._counts()),))


def leaves_of(space: Any, name: str, path: tuple[str, ...] = (), place: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The spaces within a space; one alone has this name."""
    kind = space.get("type") if isinstance(space, dict) else None
    inner = space.get("subspaces") if kind in ("Dict", "Tuple") else None
    if isinstance(inner, dict):
        for key, part in inner.items():
            yield from leaves_of(part, name, (*path, key), (*place, *key.split("/")))
    elif isinstance(inner, list):
        for i, part in enumerate(inner):
            yield from leaves_of(part, name, (*path, str(i)), (*place, f"_index_{i}"))
    else:
        yield Leaf(join_names(path) or name, place, space if isinstance(space, dict) else {})


def _same(bounds: Any) -> float | None:
    """The number that all of these are; None where they differ."""
    while isinstance(bounds, list) and bounds and all(bound == bounds[0] for bound in bounds):
        bounds = bounds[0]
    return bounds if isinstance(bounds, int | float) else None


def unbounded(rows: np.ndarray) -> dict[str, Any]:
    """The space of all rows of a type and shape."""
    dtype, (low, high) = rows.dtype, (-math.inf, math.inf) if rows.dtype.kind == "f" else (0, 1)
    if dtype.kind in "iu":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return {"type": "Box", "dtype": str(dtype), "shape": [*rows.shape[1:]], "low": low, "high": high}


def to_gymnasium(space: dict[str, Any]) -> Any:
    """The space of Gymnasium that this is."""
    spaces = library("gymnasium", "Minari datasets").spaces
    inner = space.get("subspaces")
    if isinstance(inner, dict):
        return spaces.Dict({name: to_gymnasium(part) for name, part in inner.items()})
    if isinstance(inner, list):
        return spaces.Tuple([to_gymnasium(part) for part in inner])
    if space["type"] == "Discrete":
        return spaces.Discrete(space["n"], start=space.get("start", 0))
    if space["type"] == "MultiDiscrete":
        return spaces.MultiDiscrete(space["nvec"], dtype=space["dtype"], start=space.get("start"))
    if space["type"] == "MultiBinary":
        return spaces.MultiBinary(space["n"])
    dtype, shape = np.dtype(space["dtype"]), tuple(space["shape"])
    infinite = (-math.inf, math.inf) if dtype.kind == "f" else (0, 255 if dtype == np.uint8 else 1)
    given = zip((space.get("low"), space.get("high")), infinite, strict=True)
    low, high = (
        np.broadcast_to(np.asarray(end if bound is None else bound, dtype), shape).copy() for bound, end in given
    )
    return spaces.Box(low, high, shape, dtype.type)
