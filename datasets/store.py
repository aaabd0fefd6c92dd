"""Episodes in a zarr group: flat arrays of one row a step, and `meta/episode_ends` that cuts them into episodes.

The layout is that of the published Push-T dataset, which opens as it is: zarr v2 or v3, a folder, a `.zip`, or any
fsspec URL. Writing `meta/episode_ends` last is the commit: rows beyond it belong to no episode and are never read.
Every file is replaced whole, and is on the disk before the commit, so a writer killed at any moment, or without power,
loses only what it had not committed. `meta/episode_crc32c` holds a checksum of each episode's rows in each array, which
finds what the checksums of chunks do not: whole chunks in the wrong place.

Knows arrays and files. Knows no environment and no policy.
"""

import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from diffusion_policy.basics.text import one_line
from diffusion_policy.datasets.appending import Appender, create_folder, refuse_to_append
from diffusion_policy.datasets.arrays import CHECKSUMS, EMBEDDING, NO_CHECKSUMS, StoredArrays
from diffusion_policy.datasets.checksums import RowChecksums, checksum, exchanged
from diffusion_policy.datasets.demonstration import Demonstration, nonfinite_rows
from diffusion_policy.datasets.guard import read_rows
from diffusion_policy.datasets.locations import open_group
from diffusion_policy.datasets.storage import (
    StoreError,
    drop_consolidated,
    lock,
    refuse_links,
    row_bytes,
    say_names,
)

BLOCK_BYTES = 2**23
"""About so much is read at a time where a whole array is walked through."""


class EpisodeStore:
    """A zarr group of episodes. `create` and `append_to` give one to append to, which no one else can write until it is
    closed; `open` reads one. A context manager."""

    def __init__(self, group: zarr.Group, location: str) -> None:
        """Raises StoreError for a group that is no store of episodes."""
        self.arrays = StoredArrays(group, location)
        """As zarr has them."""
        self._appender: Appender | None = None
        self._unlock: Callable[[], object] = lambda: None
        self.dropped: dict[str, int] = {}
        """Rows of an interrupted append that `append_to` has dropped, by array."""
        self.mended: tuple[str, ...] = ()
        """What else `append_to` has put right, in sentences."""

    @classmethod
    def create(
        cls, path: Path | str, attributes: Mapping[str, Any], modes: Sequence[str], sync: bool = True
    ) -> "EpisodeStore":
        """Make an empty store in a new folder; raises StoreError where something already lies there.

        `attributes` (environment id, its arguments, control frequency [Hz], ...) become attributes of the group.
        `sync`: what `append` has committed survives a loss of power; without, it does so some seconds later.
        """
        create_folder(Path(path), attributes, modes, sync)
        return cls.append_to(path, sync)

    @classmethod
    def append_to(cls, path: Path | str, sync: bool = True) -> "EpisodeStore":
        """Open a store of ours to append to, whatever is left of an interrupted append dropped, and a consolidated copy
        of its metadata, which would not know what is appended. Raises StoreError when it is no folder of ours, is
        damaged, or when someone else is writing to it. `sync`: see `create`."""
        path = Path(path)
        if path.suffix == ".zip" or (path / ".zgroup").exists():
            raise StoreError(f"{path} can only be read; make a copy to append to with: dataset convert {path} NEW.zarr")
        group = open_group(str(path), "r+", sync)
        refuse_links(path)
        unlock = lock(path)
        try:
            store = cls(group, str(path))
        except BaseException:
            unlock()
            raise
        store._unlock = weakref.finalize(store, unlock)
        store._appender = Appender(store.arrays, path, sync)
        refuse_to_append(store.arrays)
        if len(store.arrays.empty_episodes):
            raise StoreError(f"{path}: {store.remarks()[-1]}; make a copy to append to with: dataset convert")
        if len(store.episode_ends):
            store._appender.require_sound()
            if store.arrays.has_checksums and not store.checksums():
                raise StoreError(f"{path}: {CHECKSUMS} {NO_CHECKSUMS}; make a copy to append to with: dataset convert")
        with store.arrays.foreign("the metadata"):
            consolidated = drop_consolidated(group)
        if consolidated:
            store.mended = ("dropped a consolidated copy of the metadata, which would not know what is appended",)
        store.dropped = store._appender.drop_uncommitted()
        return store

    @classmethod
    def open(cls, location: Path | str) -> "EpisodeStore":
        """Open a store to read what is committed now. Raises StoreError when it is missing, holds no episodes, or is
        cut into impossible ones; what is wrong with an array is said when it is read."""
        store = cls(open_group(str(location), "r"), str(location))
        store.arrays.check_episodes()
        if len(store.episode_ends) == 0:
            raise StoreError(f"{location} holds no episodes yet")
        return store

    def close(self) -> None:
        """Let other writers in."""
        self._unlock()

    def __enter__(self) -> "EpisodeStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What there is

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays of one row a step that can be used, sorted."""
        return tuple(name for name in self.arrays.names("data") if name not in self.left_out)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """What lies beside the arrays that can be used, by name, and why it cannot."""
        found = {}
        for name in self.arrays.names("data"):
            try:
                self.arrays.readable(f"data/{name}")
            except StoreError as error:
                found[name] = str(error).removeprefix(one_line(f"{self.location}: data/{name}", 1000)).strip()
        return found

    @property
    def location(self) -> str:
        """Path or URL, as it was given."""
        return self.arrays.location

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group that mean what we mean by their names; none in stores of other tools."""
        return self.arrays.attributes

    @property
    def action_key(self) -> str:
        """The key that holds actions, as far as the store says."""
        return self.arrays.action_key

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys that a policy observes: those that the store names, else all but the action."""
        named = self.attributes.get("observation_keys")
        return tuple(named) if named else tuple(key for key in self.keys if key not in self.parts(self.action_key))

    def parts(self, key: str) -> tuple[str, ...]:
        """The arrays of a key: `a+b` means the columns of a and of b side by side, unless an array has that name."""
        return (key,) if "+" not in key or key in self.arrays.names("data") else tuple(key.split("+"))

    def columns(self, key: str) -> dict[str, int]:
        """Where the columns of each array of a key begin."""
        sizes = [math.prod(self.shape(part)) for part in self.parts(key)]
        return dict(zip(self.parts(key), np.cumsum([0, *sizes]).tolist(), strict=False))

    @property
    def modes(self) -> tuple[str, ...]:
        """All mode labels that the store knows; empty in stores of other tools."""
        return tuple(self.attributes.get("modes", ()))

    @property
    def instructions(self) -> tuple[str, ...]:
        """All instructions that the store knows; empty in most stores."""
        return tuple(self.attributes.get("instructions", ()))

    @property
    def episode_ends(self) -> np.ndarray:
        """Row after the last of each episode, (episodes,) int64; episodes without rows are left out."""
        return self.arrays.ends

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one step of a key: of its array, or (columns,) of several. A step that is one number is (1,)."""
        shapes = [self.arrays.readable(f"data/{part}").shape[1:] or (1,) for part in self.parts(key)]
        return tuple(shapes[0]) if len(shapes) == 1 else (sum(map(math.prod, shapes)),)

    def dtype(self, key: str) -> np.dtype:
        """Type of the numbers of a key."""
        return np.result_type(*(self.arrays.readable(f"data/{part}").dtype for part in self.parts(key)))

    def chunk_rows(self, key: str) -> int:
        """Rows of a key that are stored and read together: a file, or a chunk of it where a file is large."""
        arrays = [self.arrays.readable(f"data/{part}") for part in self.parts(key)]
        return max(_read_together(array) for array in arrays)

    def stored_bytes(self, key: str) -> int | None:
        """Size of the files of a key; None where they cannot be listed."""
        return sum(self.arrays.readable(f"data/{part}").nbytes_stored() for part in self.parts(key)) or None

    def remarks(self) -> list[str]:
        """What the store holds that is not read, a sentence each, and why."""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            by_reason.setdefault(why, []).append(f"data/{name}")
        said = [
            f"{names[0]} is left out: it {why}" if len(names) == 1 else f"{say_names(names)} are left out: each {why}"
            for why, names in by_reason.items()
        ]
        return [*said, *self.unread()]

    def unread(self) -> list[str]:
        """What the store holds beside arrays that is not read, a sentence each."""
        said = []
        if self.arrays.passed_over:
            said.append(f"attributes of another meaning are passed over: {say_names(self.arrays.passed_over)}")
        rows = max(self.arrays.uncommitted().values(), default=0)
        if rows:
            said.append(f"{rows} rows beyond its last complete episode are not read")
        empty = self.arrays.empty_episodes
        if len(empty):
            said.append(
                f"{len(empty)} of {len(self.arrays.kept)} episodes have no rows and are left out, first {empty[0]}"
            )
        return said

    # Reading

    def read(self, key: str) -> np.ndarray:
        """All committed rows of one array, (steps, ...); raises StoreError for unknown keys and non-finite values."""
        return self.read_rows(key, 0, int(self.episode_ends[-1]))

    def read_rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Some rows of one array, (stop - start, ...); raises StoreError for unknown keys, damage and non-finite
        values."""
        return _side_by_side([self._read_part(part, start, stop) for part in self.parts(key)])

    def _read_part(self, part: str, start: int, stop: int) -> np.ndarray:
        array = self.arrays.trusted(f"data/{part}")
        with self.arrays.foreign(f"data/{part}", " is damaged:"):
            rows = read_rows(array, start, stop)
        bad = nonfinite_rows(rows)
        if len(bad):
            row = start + int(bad[0])
            episode = int(np.searchsorted(self.episode_ends, row, side="right"))
            raise StoreError(
                f"{self.location}: data/{part} has NaN or infinity in {len(bad)} rows, first in episode {episode} "
                f"(row {row}); name the keys to read without it, or make a copy without it: dataset convert"
            )
        return rows if rows.ndim > 1 else rows[:, None]

    def block_spans(self, key: str) -> Iterator[tuple[int, int]]:
        """First row, and row after the last, of blocks of some whole chunks that are well read at a time."""
        total, chunk_rows = int(self.episode_ends[-1]), self.chunk_rows(key)
        step = chunk_rows * max(1, BLOCK_BYTES // (chunk_rows * row_bytes(self.shape(key), self.dtype(key))))
        for start in range(0, total, step):
            yield start, min(start + step, total)

    def blocks(self, key: str) -> Iterator[tuple[int, np.ndarray]]:
        """All committed rows of one array, block by block: (first row, rows)."""
        for start, stop in self.block_spans(key):
            yield start, self.read_rows(key, start, stop)

    def read_meta(self, name: str) -> np.ndarray | None:
        """One value an episode, (episodes, ...), or None where the store has no such array; -1 where a mode, seed,
        success or instruction is unknown."""
        if f"episode_{name}" not in self.arrays.names("meta"):
            return None
        array = self.arrays.trusted(f"meta/episode_{name}")
        if name in ("mode", "seed", "success", "instruction") and (array.ndim != 1 or array.dtype.kind not in "biu"):
            found = f"{array.dtype} of shape {array.shape}"
            raise StoreError(f"{self.location}: meta/episode_{name} must be one row of whole numbers; got {found}")
        with self.arrays.foreign(f"meta/episode_{name}", " is damaged:"):
            return read_rows(array, 0, len(self.arrays.kept))[self.arrays.kept]

    def seeds(self) -> np.ndarray:
        """The seeds that are known, (at most episodes,) int64."""
        seeds = self.read_meta("seed")
        return np.empty(0, np.int64) if seeds is None else seeds[seeds >= 0].astype(np.int64)

    def mode_indices(self) -> np.ndarray:
        """Index of each episode's mode among `modes`, (episodes,) int64; −1 where it is unknown."""
        indices = self.read_meta("mode")
        if indices is None:
            return np.full(len(self.episode_ends), -1)
        return np.where((indices >= 0) & (indices < len(self.modes)), indices, -1)

    def episode_modes(self) -> list[str | None]:
        """Each episode's mode label; None where it is unknown."""
        return [self.modes[i] if i >= 0 else None for i in self.mode_indices()]

    def instruction_indices(self) -> np.ndarray:
        """Index of each episode's instruction among `instructions`, (episodes,) int64; −1 where it has none."""
        indices = self.read_meta("instruction") if self.instructions else None
        if indices is None:
            return np.full(len(self.episode_ends), -1)
        return np.where((indices >= 0) & (indices < len(self.instructions)), indices, -1)

    def episode_instructions(self) -> list[str | None]:
        """Each episode's instruction; None where it has none."""
        return [self.instructions[i] if i >= 0 else None for i in self.instruction_indices()]

    def instruction_embeddings(self) -> np.ndarray | None:
        """The embedding of each episode's instruction, (episodes, E) float32; zeros where it has none. None where the
        store keeps no embeddings. Raises StoreError for others than the attributes promise."""
        size = self.attributes.get("instruction_embedding", {}).get("size", 0)
        rows = self.read_meta("instruction_embedding") if self.instructions and size else None
        if rows is None:
            return None
        if rows.shape[1:] != (size,) or rows.dtype != np.float32 or not np.isfinite(rows).all():
            found = f"{rows.dtype} of shape {rows.shape}"
            raise StoreError(f"{self.location}: {EMBEDDING} must be finite rows of {size} float32; got {found}")
        return rows

    def episodes(
        self, indices: Sequence[int] | np.ndarray | None = None, keys: Sequence[str] | None = None
    ) -> Iterator[Demonstration]:
        """The episodes, or those with these indices in the order given, one after the other, with all keys that can be
        used, or these. Raises StoreError where a checksum says that rows are not those that were written."""
        ends = self.episode_ends
        starts = np.concatenate([[0], ends[:-1]])
        modes, checksums = self.episode_modes(), self.checksums()
        instructions, embeddings = self.episode_instructions(), self.instruction_embeddings()
        seeds, successes = self.read_meta("seed"), self.read_meta("success")
        finals = [key for key in self.final_keys if keys is None or key in keys]
        keys = self.keys if keys is None else keys
        most_rows = 2 * BLOCK_BYTES // max(1, sum(row_bytes(self.shape(key), self.dtype(key)) for key in keys))
        chosen = np.arange(len(ends)) if indices is None else np.asarray(indices)
        for run in _runs(chosen, ends - starts, most_rows):
            first = int(starts[run[0]])
            rows = {key: self.read_rows(key, first, int(ends[run[-1]])) for key in keys}
            last = {key: self._read_finals(key, int(run[0]), int(run[-1]) + 1) for key in finals}
            for i in run:
                span = slice(starts[i] - first, ends[i] - first)
                for key in rows.keys() & checksums.keys():
                    self._compare(key, i, checksum(key, i, rows[key][span]), checksums)
                yield Demonstration(
                    {key: array[span] for key, array in rows.items()},
                    None if seeds is None or seeds[i] < 0 else int(seeds[i]),
                    modes[i],
                    None if successes is None or successes[i] < 0 else bool(successes[i]),
                    {key: array[i - run[0]] for key, array in last.items()} or None,
                    instructions[i],
                    None if embeddings is None or instructions[i] is None else embeddings[i],
                )

    def finals(self) -> dict[str, np.ndarray]:
        """The observation after the last action of each episode, by key, (episodes, ...); empty where it is unknown."""
        return {key: self._read_finals(key, 0, len(self.episode_ends)) for key in self.final_keys}

    @property
    def final_keys(self) -> tuple[str, ...]:
        """The keys of which the observation after the last action is known."""
        prefix = "episode_final_"
        return tuple(name.removeprefix(prefix) for name in self.arrays.names("meta") if name.startswith(prefix))

    def _read_finals(self, key: str, start: int, stop: int) -> np.ndarray:
        """The observation after the last action of some episodes, (stop - start, ...)."""
        path, places = f"meta/episode_final_{key}", np.flatnonzero(self.arrays.kept)[start:stop]
        array = self.arrays.trusted(path)
        with self.arrays.foreign(path, " is damaged:"):
            rows = read_rows(array, int(places[0]), int(places[-1]) + 1)[places - places[0]]
        return rows if rows.ndim > 1 else rows[:, None]

    def checksums(self) -> dict[str, np.ndarray]:
        """The checksum of each episode, (episodes,), by array of data/ and, of what is known of it, by `meta`; empty
        where the store has none, or none that fit its arrays."""
        table = self.read_meta("crc32c") if self.arrays.has_checksums else None
        names = [*self.arrays.names("data"), "meta"]
        if table is None or table.dtype != np.uint32 or table.shape != (len(self.arrays.ends), len(names)):
            return {}
        return dict(zip(names, table.T, strict=True))

    def _compare(self, key: str, episode: int, value: int, checksums: Mapping[str, np.ndarray]) -> None:
        """Raise StoreError unless an episode's rows are those that were written."""
        if value != checksums[key][episode]:
            raise StoreError(f"{self.location}: data/{key}: {exchanged(episode)}")

    def fingerprint(
        self,
        observation_keys: Sequence[str],
        action_key: str = "action",
        on_rows: Callable[[str, int, np.ndarray], None] = lambda key, start, rows: None,
    ) -> str:
        """SHA-256 of the committed rows of the action and these keys, and of the episode ends: equal for equal data,
        wherever and however it is stored. `on_rows` hears (key, first row, rows) of the same pass. Raises StoreError
        where a checksum says that rows are not those that were written."""
        digest = hashlib.sha256(self.episode_ends.tobytes())
        checksums = self.checksums()
        for key in sorted({*observation_keys, action_key}):
            digest.update(f"{key} {self.dtype(key).str} {self.shape(key)}".encode())
            checking = {part: RowChecksums(part, self.arrays.ends) for part in self.parts(key) if part in checksums}
            for start, stop in self.block_spans(key):
                parts = {part: self._read_part(part, start, stop) for part in self.parts(key)}
                for part, check in checking.items():
                    for episode, value in check.add(parts[part]):
                        self._compare(part, episode, value, checksums)
                rows = _side_by_side(list(parts.values()))
                digest.update(np.ascontiguousarray(rows).data)
                on_rows(key, start, rows)
        return digest.hexdigest()

    # Writing

    def append(self, episodes: Sequence[Demonstration]) -> None:
        """Add episodes: their rows, then what is known of each, then the commit. Raises StoreError, before anything is
        written, for episodes that do not fit the store, and where the store no longer lies where it was opened."""
        if not episodes:
            return
        if self._appender is None:
            raise StoreError(f"{self.location} was opened to read; open it to append with EpisodeStore.append_to")
        self.__dict__.pop("left_out", None)
        self._appender.append(episodes)


def _read_together(array: zarr.Array) -> int:
    """Rows of a file of an array, or of a chunk of it where a file is large."""
    file = array.shards or array.chunks
    return file[0] if math.prod(file) * array.dtype.itemsize <= BLOCK_BYTES else array.chunks[0]


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The columns of arrays of the same rows, (steps, columns); an array alone stays as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate([rows.reshape(len(rows), -1) for rows in parts], axis=1)


def _runs(indices: np.ndarray, lengths: np.ndarray, most_rows: int) -> Iterator[np.ndarray]:
    """Cut indices into runs i, i + 1, ... of at most so many rows, or of one episode."""
    run: list[int] = []
    for i in indices:
        if run and (i != run[-1] + 1 or lengths[run].sum() + lengths[i] > most_rows):
            yield np.array(run)
            run = []
        run.append(int(i))
    if run:
        yield np.array(run)
