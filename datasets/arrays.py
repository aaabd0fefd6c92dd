"""The zarr arrays of a store: which exist, whether they can be decoded safely, and where episodes end.

An exception that a file of unknown origin makes zarr raise becomes a StoreError that names the store and the array.
Knows zarr and files. Knows no observation and no policy.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr

from diffusion_policy.basics.names import is_label
from diffusion_policy.datasets.attributes import check_attributes, fits
from diffusion_policy.datasets.guard import read_rows, refuse_unsafe
from diffusion_policy.datasets.storage import NAME, StoreError, error_text, list_names, rows_beyond, say_names

FORMAT = "diffusion-policy episodes"
FORMAT_VERSION = 2
"""2 has checksums of episodes; 1 is read, and goes on without."""
ENDS = "meta/episode_ends"
CHECKSUMS = "meta/episode_crc32c"
"""(episodes, arrays + 1) uint32: a column for each array of data/, sorted by name, and one for what is known of the
episode."""
INSTRUCTION = "meta/episode_instruction"
"""(episodes,) int64: which of the attribute `instructions`, -1 for none; in stores that have these."""
EMBEDDING = "meta/episode_instruction_embedding"
"""(episodes, E) float32, zeros where there is no instruction; in stores with the attribute `instruction_embedding`."""
ABOUT = ("episode_mode", "episode_seed", "episode_success", "episode_instruction", "episode_instruction_embedding")
"""What meta/ knows of each episode beside the final observations."""
NO_CHECKSUMS = "is missing, or of other arrays than those in data/: exchanged rows cannot be told"


class StoredArrays:
    """The arrays of an open zarr group of episodes, its attributes, and the ends of its episodes as they were read when
    it was opened; whoever appends moves them."""

    def __init__(self, group: zarr.Group, location: str) -> None:
        """Raises StoreError where the group has no episode ends, or attributes of ours that are something else."""
        self.group = group
        """The zarr group, its contents not yet trusted."""
        self.location = location
        """Path or URL, as it was given."""
        self._readable: dict[str, zarr.Array] = {}
        self._trusted: dict[str, zarr.Array] = {}
        self.attributes, self.passed_over = self._read_attributes()
        """Attributes of the group, none in stores of other tools; and names of those by which another tool means
        something else than we do, which are not among them."""
        stored = self._read_ends()
        self.kept: np.ndarray = np.diff(stored, prepend=0) != 0
        """Whether each stored episode has rows, (stored episodes,) bool."""
        self.ends: np.ndarray = stored[self.kept]
        """Row after the last of each episode that has rows, (episodes,) int64."""

    def forget(self) -> None:
        """Look at each array anew: something is appended."""
        self._trusted.clear()
        self._readable.clear()

    @property
    def is_ours(self) -> bool:
        """Whether this toolkit has written it."""
        return self.attributes.get("format") == FORMAT

    @property
    def has_checksums(self) -> bool:
        """Whether checksums of its episodes belong to the store: it is one of ours, and not of the first version."""
        return self.is_ours and self.attributes.get("format_version", 1) != 1

    @property
    def empty_episodes(self) -> np.ndarray:
        """Places in meta/episode_ends of the episodes without rows."""
        return np.flatnonzero(~self.kept)

    @property
    def action_key(self) -> str:
        """The key that holds actions, as far as the store says."""
        return self.attributes.get("action_key", "action")

    def names(self, folder: str) -> Sequence[str]:
        """Names in a folder of the store, sorted."""
        names = list_names(self.group, folder)
        if names:
            return names
        attributes = self.attributes  # a place that lists no folders
        known = {
            "data": [*attributes.get("observation_keys", ()), *self.action_key.split("+")],
            "meta": ["episode_ends", *ABOUT, CHECKSUMS.removeprefix("meta/")],
        }
        with self.foreign(folder):
            return sorted(name for name in known.get(folder, ()) if f"{folder}/{name}" in self.group)

    def raw(self, path: str) -> zarr.Array:
        """An array as zarr opens it, its contents not yet trusted; raises StoreError."""
        folder, _, name = path.partition("/")
        try:
            with self.foreign(path, " cannot be opened:"):
                array = self.group[path] if NAME.fullmatch(name) and path in self.group else None
        except StoreError as error:
            codec = getattr(error.__cause__, "codec_id", None)
            if codec is None:
                raise
            name = str(codec).strip("'")
            what = f"is packed with the codec {name}, which is not read; write it anew with another where that one is"
            raise StoreError(f"{self.location}: {path} {what} installed") from error
        if not isinstance(array, zarr.Array):
            if name in self.names(folder):
                raise StoreError(f"{self.location}: {path} is no array of zarr")
            raise StoreError(f"{self.location} has no {path}; it has {say_names(self.names(folder))}")
        return array

    def readable(self, path: str) -> zarr.Array:
        """An array of data/ whose form allows to decode all committed rows, though some may be missing or damaged;
        raises StoreError."""
        if path not in self._readable:
            name = path.removeprefix("data/")
            if not is_label(name):
                raise StoreError(f"{self.location}: {path} has no name of one line of at most 200 printable characters")
            array, rows = self.raw(path), int(self.ends.max(initial=0))
            with self.foreign(path):
                refuse_unsafe(array, rows, complete=False)
            self._readable[path] = array
        return self._readable[path]

    def trusted(self, path: str) -> zarr.Array:
        """An array whose committed rows can be decoded without fear."""
        if path not in self._trusted:
            array = self.raw(path)
            with self.foreign(path):
                rows = int(self.ends[-1]) if path.startswith("data/") else len(self.ends)
                refuse_unsafe(array, rows, complete=self.is_ours)
            self._trusted[path] = array
        return self._trusted[path]

    def uncommitted(self) -> dict[str, int]:
        """Rows beyond the last commit, by array: what an interrupted append, or one under way, has left."""
        committed = {"data": int(self.ends[-1]) if len(self.ends) else 0, "meta": len(self.kept)}
        beyond = {}
        for folder, rows in committed.items():
            for name in self.names(folder):
                with contextlib.suppress(StoreError):  # what cannot be opened is said where it is read
                    array = self.raw(f"{folder}/{name}")
                    beyond[f"{folder}/{name}"] = array.shape[0] - rows if array.ndim else 0
        return {path: count for path, count in beyond.items() if count > 0}

    def ends_beyond(self) -> np.ndarray:
        """Ends that a store of ours holds beyond the length that the metadata say, which only an older copy of the
        metadata does: an append writes the length before the ends, and what drops some writes it after."""
        array = self.raw(ENDS)
        if not self.is_ours or array.fill_value != -1:
            return np.empty(0, np.int64)
        with self.foreign(ENDS, " is damaged:"):
            beyond = rows_beyond(array)
        beyond = beyond[max(0, self.raw(ENDS).shape[0] - array.shape[0]) :]  # someone may have appended meanwhile
        return beyond[: np.max(np.flatnonzero(beyond != -1), initial=-1) + 1]

    @contextlib.contextmanager
    def foreign(self, path: str, what: str = "") -> Iterator[None]:
        """Turn whatever zarr raises about a file into a StoreError that names the array."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"{self.location}: {path}{what} {error_text(error)}") from error

    def check_episodes(self) -> None:
        """Raise StoreError for episodes that cannot be, and for a store that a later version of ours has written."""
        version = self.attributes.get("format_version", 1)
        if self.is_ours and version not in range(1, FORMAT_VERSION + 1):
            known = f"1 to {FORMAT_VERSION}"
            raise StoreError(f"{self.location} has format version {version}; this package reads {known}")
        decreasing = np.flatnonzero(np.diff(self.ends, prepend=0) < 0)
        if len(decreasing):
            i = int(decreasing[0])
            began = int(self.ends[i - 1]) if i else 0
            raise StoreError(
                f"{self.location}: meta/episode_ends must increase; episode {i} would reach from row {began} to before "
                f"{self.ends[i]}, and no one can tell its rows; write the right ends there, or record again"
            )

    def _read_attributes(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Attributes, and names of those by which another tool means something else than we do; in a store of ours
        that is a StoreError."""
        with self.foreign("the attributes"):
            attributes = dict(self.group.attrs)
        if attributes.get("format") == FORMAT:
            check_attributes(attributes, self.location)
        fitting = {name: value for name, value in attributes.items() if fits(name, value)}
        return fitting, tuple(name for name in attributes if name not in fitting)

    def _read_ends(self) -> np.ndarray:
        with self.foreign("meta"):
            there = "meta" in self.group and "meta/episode_ends" in self.group
            found = say_names(self.names(""))
        if not there:
            raise StoreError(
                f"{self.location} is no dataset of episodes: it needs data/ and meta/episode_ends; has {found}"
            )
        array = self.raw("meta/episode_ends")
        with self.foreign("meta/episode_ends"):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"must be one row of whole numbers; got {array.shape} of {array.dtype}")
            refuse_unsafe(array, array.shape[0], complete=False)
            ends = read_rows(array, 0, array.shape[0]).astype(np.int64)
        if self.is_ours:  # a killed append can have written the second of two chunks alone
            return ends[: np.argmax(ends == -1)] if (ends == -1).any() else ends
        return ends[: np.max(np.flatnonzero(ends != -1), initial=-1) + 1]


def older(beyond: int) -> str:
    """What metadata of meta/episode_ends that are older than its episodes mean, in words."""
    return f"has metadata older than its episodes (a file put back from a copy?): {beyond} more are stored than it says"
