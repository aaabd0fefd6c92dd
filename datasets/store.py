"""Episodes in a zarr group: flat arrays of one row a step, and `meta/episode_ends` that cuts them into episodes.

The layout is that of the published Push-T data set, which opens as it is (zarr v2 or v3, any fsspec URL). Writing
`meta/episode_ends` last is the commit: rows beyond it belong to no episode and are never read.

Knows arrays and files. Knows no environment and no policy.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.errors import ContainsArrayError, GroupNotFoundError, ZarrUserWarning

FORMAT = "diffusion-policy episodes"
FORMAT_VERSION = 1
ROWS_PER_CHUNK = 4096
"""Steps in one chunk: some dozen episodes, so that many small episodes do not become many small files."""


class StoreError(ValueError):
    """A data set cannot be read or written; the message says what is wrong and where."""


class Demonstration(NamedTuple):
    """One episode as it is stored."""

    data: dict[str, np.ndarray]
    """Each observation key and `action`, (steps, ...)."""
    seed: int
    mode: str | None
    success: bool


class EpisodeStore:
    """A zarr group of episodes. `create` makes one to append to, `open` reads one."""

    def __init__(self, group: zarr.Group, location: str) -> None:
        self._group = group
        self.location = location
        """Path or URL."""

    @classmethod
    def create(cls, path: Path | str, attributes: Mapping[str, Any], modes: Sequence[str]) -> "EpisodeStore":
        """Make an empty store in a new folder; raises StoreError where something already lies there.

        `attributes` (environment id, its arguments, control frequency [Hz], ...) become attributes of the group.
        """
        path = Path(path)
        if path.exists():
            raise StoreError(f"{path} already exists; choose another output or delete it first")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "modes": list(modes), **attributes}
        group = zarr.create_group(path, attributes=header)
        _create_array(group, "meta/episode_ends", np.empty(0, np.int64), fill_value=-1)
        return cls(group, str(path))

    @classmethod
    def open(cls, location: Path | str) -> "EpisodeStore":
        """Open a store to read; raises StoreError when it is missing, or holds no episodes or no such arrays."""
        try:
            group = zarr.open_group(str(location), mode="r")
        except ImportError as error:
            raise StoreError(f"cannot open {location}: {error}") from error
        except (FileNotFoundError, GroupNotFoundError, ContainsArrayError) as error:
            raise StoreError(f"no data set at {location}: there is no zarr group") from error
        store = cls(group, str(location))
        if "meta/episode_ends" not in group or "data" not in group:
            found = ", ".join(_members(group)) or "nothing"
            if "format" in group.attrs:
                raise StoreError(f"{location} holds no episodes yet")
            raise StoreError(
                f"{location} is no data set of episodes: it needs data/ and meta/episode_ends; has {found}"
            )
        ends = store.episode_ends
        if len(ends) == 0:
            raise StoreError(f"{location} holds no episodes")
        if (np.diff(ends, prepend=0) <= 0).any():
            raise StoreError(f"{location}: meta/episode_ends must increase from above 0; got {ends[:10]}...")
        for key in store.keys:
            rows = store._array(f"data/{key}").shape[0]
            if rows < ends[-1]:
                raise StoreError(f"{location}: data/{key} has {rows} rows; meta/episode_ends needs {ends[-1]}")
        return store

    # Reading

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group; empty in stores of other tools."""
        return dict(self._group.attrs)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays of one row a step, sorted."""
        group = self._group.get("data")
        members = _members(group) if isinstance(group, zarr.Group) else {}
        return tuple(name for name, member in members.items() if isinstance(member, zarr.Array))

    @property
    def episode_ends(self) -> np.ndarray:
        """Row after the last of each episode, (episodes,) int64."""
        ends = np.asarray(self._array("meta/episode_ends")[:], dtype=np.int64)
        return ends[: np.max(np.flatnonzero(ends != -1), initial=-1) + 1]  # a trailing -1 was never committed

    def read(self, key: str) -> np.ndarray:
        """All committed rows of one array, (steps, ...); raises StoreError for unknown keys and non-finite values."""
        if key not in self.keys:
            raise StoreError(f"{self.location} has no data/{key}; it has {', '.join(self.keys)}")
        ends = self.episode_ends
        rows = self._read_rows(key, 0, int(ends[-1]))
        if not np.issubdtype(rows.dtype, np.number):
            raise StoreError(f"{self.location}: data/{key} must hold numbers; got {rows.dtype}")
        bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
        if len(bad):
            episode = int(np.searchsorted(ends, bad[0], side="right"))
            raise StoreError(
                f"{self.location}: data/{key} has NaN or infinity in {len(bad)} rows, first in episode {episode} "
                f"(row {bad[0]})"
            )
        return rows

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one step of an array."""
        return tuple(self._array(f"data/{key}").shape[1:])

    def read_meta(self, name: str) -> np.ndarray | None:
        """One value an episode, (episodes,), or None where the store has no such array."""
        path = f"meta/episode_{name}"
        return np.asarray(self._array(path)[: len(self.episode_ends)]) if path in self._group else None

    def episode_modes(self) -> list[str | None]:
        """Each episode's mode label; None where it is unknown."""
        return [self.modes[i] if i >= 0 else None for i in self.mode_indices()]

    @property
    def modes(self) -> tuple[str, ...]:
        """All mode labels that the store knows; empty in stores of other tools."""
        return tuple(self.attributes.get("modes", ()))

    def mode_indices(self) -> np.ndarray:
        """Index of each episode's mode among `modes`, (episodes,) int64; −1 where it is unknown."""
        indices = self.read_meta("mode")
        if indices is None or not np.issubdtype(indices.dtype, np.integer):
            return np.full(len(self.episode_ends), -1)
        return np.where((indices >= 0) & (indices < len(self.modes)), indices, -1)

    def fingerprint(self, observation_keys: Sequence[str]) -> str:
        """SHA-256 of the committed rows of `action` and these keys, and of the episode ends: equal for equal data,
        wherever and however it is stored."""
        ends = self.episode_ends
        digest = hashlib.sha256(ends.tobytes())
        for key in sorted({*observation_keys, "action"}):
            array = self._array(f"data/{key}")
            digest.update(f"{key} {array.dtype.str} {array.shape[1:]}".encode())
            for start in range(0, int(ends[-1]), ROWS_PER_CHUNK):
                digest.update(self._read_rows(key, start, min(start + ROWS_PER_CHUNK, int(ends[-1]))).tobytes())
        return digest.hexdigest()

    # Writing

    def append(self, episodes: Sequence[Demonstration]) -> None:
        """Add episodes: their rows, then what is known of each, then the commit. Raises StoreError, before anything is
        written, for a mode that the store does not know."""
        if not episodes:
            return
        labels = self.attributes["modes"]
        unknown = {episode.mode for episode in episodes} - {*labels, None}
        if unknown:
            raise StoreError(f"{self.location} knows the modes {', '.join(labels)}; got {', '.join(map(str, unknown))}")
        ends = self.episode_ends
        start = int(ends[-1]) if len(ends) else 0
        for key in episodes[0].data:
            self._write(f"data/{key}", start, np.concatenate([episode.data[key] for episode in episodes]))
        modes = [-1 if episode.mode is None else labels.index(episode.mode) for episode in episodes]
        self._write("meta/episode_seed", len(ends), np.array([episode.seed for episode in episodes], np.int64))
        self._write("meta/episode_mode", len(ends), np.array(modes, np.int64))
        self._write("meta/episode_success", len(ends), np.array([episode.success for episode in episodes]))
        lengths = [len(episode.data["action"]) for episode in episodes]
        self._write("meta/episode_ends", len(ends), start + np.cumsum(lengths, dtype=np.int64))

    def _array(self, path: str) -> zarr.Array:
        array = self._group[path]
        if not isinstance(array, zarr.Array):
            raise StoreError(f"{self.location}: {path} must be an array; it is a group")
        return array

    def _read_rows(self, key: str, start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(self._array(f"data/{key}")[start:stop])
        except (ValueError, RuntimeError) as error:  # what zarr's codecs raise
            raise StoreError(f"{self.location}: data/{key} is damaged: {error}") from error

    def _write(self, path: str, start: int, rows: np.ndarray) -> None:
        if path not in self._group:
            _create_array(self._group, path, rows[:0])
        array = self._array(path)
        array.resize((start + len(rows), *array.shape[1:]))
        array[start:] = rows


def _members(group: zarr.Group) -> dict[str, zarr.Array | zarr.Group]:
    """Arrays and groups in a group by name, sorted; silent about the half-written files that a killed writer leaves."""
    with warnings.catch_warnings(action="ignore", category=ZarrUserWarning):
        return dict(sorted(group.members()))


def _create_array(group: zarr.Group, path: str, like: np.ndarray, fill_value: int = 0) -> None:
    group.create_array(
        path,
        shape=like.shape,
        dtype=like.dtype,
        chunks=(ROWS_PER_CHUNK, *like.shape[1:]),
        compressors=[BloscCodec(cname="zstd", clevel=5), Crc32cCodec()],
        fill_value=fill_value,
    )
