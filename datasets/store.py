"""Episodes in a zarr group: flat arrays of one row a step, and `meta/episode_ends` that cuts them into episodes.

The layout is that of the published Push-T dataset, which opens as it is: zarr v2 or v3, a folder, a `.zip`, or any
fsspec URL. Writing `meta/episode_ends` last is the commit: rows beyond it belong to no episode and are never read.
Every file is replaced whole, and is on the disk before the commit, so a writer killed at any moment, or without power,
loses only what it had not committed. `meta/episode_crc32c` holds a checksum of each episode's rows in each array, which
finds what the checksums of chunks do not: whole chunks in the wrong place.

Knows arrays and files. Knows no environment and no policy.
"""

import contextlib
import hashlib
import math
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from diffusion_policy.basics.files import sync_folder
from diffusion_policy.basics.lines import one_line
from diffusion_policy.basics.names import is_label
from diffusion_policy.datasets.attributes import check_attributes, fits
from diffusion_policy.datasets.checksums import RowChecksums, checksum
from diffusion_policy.datasets.durable import DurableFolder, make_parents, sync_tree, unfinished_path
from diffusion_policy.datasets.guard import read_rows, refuse_unsafe, trust
from diffusion_policy.datasets.storage import (
    KEY,
    NAME,
    StoreError,
    create_array,
    drop_consolidated,
    list_names,
    lock,
    open_group,
    refuse_links,
    remove,
    row_bytes,
    rows_beyond,
    say,
    say_names,
    settle,
    unfinished_files,
)

FORMAT = "diffusion-policy episodes"
FORMAT_VERSION = 2
"""2 has checksums of episodes; 1 is read, and goes on without."""
ENDS = "meta/episode_ends"
CHECKSUMS = "meta/episode_crc32c"
"""(episodes, arrays + 1) uint32: a column for each array of data/, sorted by name, and one for what is known of the
episode."""
NO_CHECKSUMS = "is missing, or of other arrays than those in data/: exchanged rows cannot be told"
SEEDS = "None or a whole number from 0 to 2**63 - 1"
BLOCK_BYTES = 2**23
"""About so much is read at a time where a whole array is walked through."""


class Demonstration(NamedTuple):
    """One episode as it is stored. What is None is unknown."""

    data: dict[str, np.ndarray]
    """Each observation key and the action, (steps, ...)."""
    seed: int | None = None
    mode: str | None = None
    success: bool | None = None
    final: dict[str, np.ndarray] | None = None
    """The observation after the last action, by key, without the axis of steps; known of all episodes of a store or of
    none."""


class EpisodeStore:
    """A zarr group of episodes. `create` and `append_to` give one to append to, which no one else can write until it is
    closed; `open` reads one. A context manager."""

    def __init__(
        self, group: zarr.Group, location: str, lock: Callable[[], object] = lambda: None, sync: bool = True
    ) -> None:
        """`lock`: what lets other writers in; `sync`: whether what is appended is put on the disk at once."""
        self.group = group
        """The zarr group, its contents not yet trusted."""
        self._unlock = weakref.finalize(self, lock)
        self._sync = sync
        self._readable: dict[str, zarr.Array] = {}
        self._checked: dict[str, zarr.Array] = {}
        self._written: dict[str, zarr.Array] = {}
        self._expected: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.location = location
        """Path or URL, as it was given."""
        self._folder = Path(location)
        """Where a store to append to lies, wherever the program or a simulator works later."""
        self._opened: os.stat_result | None = None
        """What a store to append to is known by, were it moved."""
        self._interrupted = False
        self.dropped: dict[str, int] = {}
        """Rows of an interrupted append that `append_to` has dropped, by array."""
        self.mended: tuple[str, ...] = ()
        """What else `append_to` has put right, in sentences."""
        self.attributes, self.passed_over = self._read_attributes()
        """Attributes of the group, none in stores of other tools; and names of those by which another tool means
        something else than we do, which are not among them."""
        stored = self._read_ends()
        self._kept = np.diff(stored, prepend=0) != 0
        self._ends = stored[self._kept]

    @classmethod
    def create(
        cls, path: Path | str, attributes: Mapping[str, Any], modes: Sequence[str], sync: bool = True
    ) -> "EpisodeStore":
        """Make an empty store in a new folder; raises StoreError where something already lies there.

        `attributes` (environment id, its arguments, control frequency [Hz], ...) become attributes of the group.
        `sync`: what `append` has committed survives a loss of power; without, it does so some seconds later.
        """
        path = Path(path)
        if path.exists():
            raise StoreError(f"{path} already exists; choose another output or delete it first")
        if path.suffix == ".zip":
            raise StoreError(f"{path} cannot be appended to; make a folder, and a zip of it with: dataset convert")
        own = {"format": FORMAT, "format_version": FORMAT_VERSION, "modes": list(modes)}
        taken = [name for name, value in own.items() if attributes.get(name, value) != value]
        if taken:
            raise StoreError(f"{path}: the attribute {taken[0]} is the store's own; give it another name")
        header = {**own, **attributes}
        check_attributes(header, str(path))
        make_parents(path)
        unfinished = unfinished_path(path)
        try:
            group = zarr.create_group(DurableFolder(unfinished, sync=False), attributes=header)
            group.create_group("data")
            create_array(group, "meta/episode_ends", np.empty(0, np.int64), fill_value=-1)
            if sync:
                sync_tree(unfinished)
            unfinished.rename(path)
        except BaseException:
            remove(unfinished)
            raise
        if sync:
            sync_folder(path.parent)
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
        store = cls(group, str(path), lock(path), sync)
        store._folder, store._opened = path.absolute(), os.stat(path)
        if not store.is_ours:
            raise StoreError(f"{path} was not written by this toolkit; copy it with: dataset convert {path} NEW.zarr")
        store._check()
        beyond = len(store.ends_beyond())
        if beyond:
            raise StoreError(
                f"{path}: {ENDS} {older(beyond)}; nothing was changed; put the newest file back, or mend it with: "
                f"dataset repair {path}"
            )
        if len(store.empty_episodes):
            raise StoreError(f"{path}: {store.remarks()[-1]}; make a copy to append to with: dataset convert")
        if len(store.episode_ends):
            for array in store._layout():
                store._array(array)
            if store.has_checksums and not store.checksums():
                raise StoreError(f"{path}: {CHECKSUMS} {NO_CHECKSUMS}; make a copy to append to with: dataset convert")
        with store._foreign("the metadata"):
            consolidated = drop_consolidated(group)
        if consolidated:
            store.mended = ("dropped a consolidated copy of the metadata, which would not know what is appended",)
        store._drop_uncommitted()
        return store

    @classmethod
    def open(cls, location: Path | str) -> "EpisodeStore":
        """Open a store to read what is committed now. Raises StoreError when it is missing, holds no episodes, or is
        cut into impossible ones; what is wrong with an array is said when it is read."""
        store = cls(open_group(str(location), "r"), str(location))
        store._check()
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
        return tuple(name for name in self.names("data") if name not in self.left_out)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """What lies beside the arrays that can be used, by name, and why it cannot."""
        found = {}
        for name in self.names("data"):
            try:
                self.readable_array(f"data/{name}")
            except StoreError as error:
                found[name] = str(error).removeprefix(one_line(f"{self.location}: data/{name}", 1000)).strip()
        return found

    @property
    def action_key(self) -> str:
        """The key that holds actions, as far as the store says."""
        return self.attributes.get("action_key", "action")

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys that a policy observes: those that the store names, else all but the action."""
        named = self.attributes.get("observation_keys")
        return tuple(named) if named else tuple(key for key in self.keys if key not in self.parts(self.action_key))

    def parts(self, key: str) -> tuple[str, ...]:
        """The arrays of a key: `a+b` means the columns of a and of b side by side, unless an array has that name."""
        return (key,) if "+" not in key or key in self.names("data") else tuple(key.split("+"))

    def columns(self, key: str) -> dict[str, int]:
        """Where the columns of each array of a key begin."""
        sizes = [math.prod(self.shape(part)) for part in self.parts(key)]
        return dict(zip(self.parts(key), np.cumsum([0, *sizes]).tolist(), strict=False))

    @property
    def modes(self) -> tuple[str, ...]:
        """All mode labels that the store knows; empty in stores of other tools."""
        return tuple(self.attributes.get("modes", ()))

    @property
    def episode_ends(self) -> np.ndarray:
        """Row after the last of each episode, (episodes,) int64; episodes without rows are left out."""
        return self._ends

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
        return np.flatnonzero(~self._kept)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one step of a key: of its array, or (columns,) of several. A step that is one number is (1,)."""
        shapes = [self.readable_array(f"data/{part}").shape[1:] or (1,) for part in self.parts(key)]
        return tuple(shapes[0]) if len(shapes) == 1 else (sum(map(math.prod, shapes)),)

    def dtype(self, key: str) -> np.dtype:
        """Type of the numbers of a key."""
        return np.result_type(*(self.readable_array(f"data/{part}").dtype for part in self.parts(key)))

    def chunk_rows(self, key: str) -> int:
        """Rows of a key that are stored together."""
        arrays = [self.readable_array(f"data/{part}") for part in self.parts(key)]
        return max((array.shards or array.chunks)[0] for array in arrays)

    def stored_bytes(self, key: str) -> int | None:
        """Size of the files of a key; None where they cannot be listed."""
        return sum(self.readable_array(f"data/{part}").nbytes_stored() for part in self.parts(key)) or None

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
        if self.passed_over:
            said.append(f"attributes of another meaning are passed over: {say_names(self.passed_over)}")
        rows = max(self.uncommitted().values(), default=0)
        if rows:
            said.append(f"{rows} rows beyond its last complete episode are not read")
        empty = self.empty_episodes
        if len(empty):
            said.append(f"{len(empty)} of {len(self._kept)} episodes have no rows and are left out, first {empty[0]}")
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
        array = self._array(f"data/{part}")
        with self._foreign(f"data/{part}", " is damaged:"):
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
        """One value an episode, (episodes, ...), or None where the store has no such array; -1 where a mode, seed or
        success is unknown."""
        if f"episode_{name}" not in self.names("meta"):
            return None
        array = self._array(f"meta/episode_{name}")
        if name in ("mode", "seed", "success") and (array.ndim != 1 or array.dtype.kind not in "biu"):
            found = f"{array.dtype} of shape {array.shape}"
            raise StoreError(f"{self.location}: meta/episode_{name} must be one row of whole numbers; got {found}")
        with self._foreign(f"meta/episode_{name}", " is damaged:"):
            return read_rows(array, 0, len(self._kept))[self._kept]

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

    def episodes(
        self, indices: Sequence[int] | np.ndarray | None = None, keys: Sequence[str] | None = None
    ) -> Iterator[Demonstration]:
        """The episodes, or those with these indices in the order given, one after the other, with all keys that can be
        used, or these. Raises StoreError where a checksum says that rows are not those that were written."""
        ends = self.episode_ends
        starts = np.concatenate([[0], ends[:-1]])
        modes, checksums = self.episode_modes(), self.checksums()
        seeds, successes = self.read_meta("seed"), self.read_meta("success")
        finals = self.finals() if keys is None else {key: rows for key, rows in self.finals().items() if key in keys}
        keys = self.keys if keys is None else keys
        most_rows = 2 * BLOCK_BYTES // max(1, sum(row_bytes(self.shape(key), self.dtype(key)) for key in keys))
        chosen = np.arange(len(ends)) if indices is None else np.asarray(indices)
        for run in _runs(chosen, ends - starts, most_rows):
            first = int(starts[run[0]])
            rows = {key: self.read_rows(key, first, int(ends[run[-1]])) for key in keys}
            for i in run:
                span = slice(starts[i] - first, ends[i] - first)
                for key in rows.keys() & checksums.keys():
                    self._compare(key, i, checksum(key, i, rows[key][span]), checksums)
                yield Demonstration(
                    {key: array[span] for key, array in rows.items()},
                    None if seeds is None or seeds[i] < 0 else int(seeds[i]),
                    modes[i],
                    None if successes is None or successes[i] < 0 else bool(successes[i]),
                    {key: array[i] for key, array in finals.items()} or None,
                )

    def finals(self) -> dict[str, np.ndarray]:
        """The observation after the last action of each episode, by key, (episodes, ...); empty where it is unknown."""
        names = [name.removeprefix("episode_") for name in self.names("meta") if name.startswith("episode_final_")]
        found = {name.removeprefix("final_"): self.read_meta(name) for name in names}
        return {key: rows if rows.ndim > 1 else rows[:, None] for key, rows in found.items() if rows is not None}

    def checksums(self) -> dict[str, np.ndarray]:
        """The checksum of each episode, (episodes,), by array of data/ and, of what is known of it, by `meta`; empty
        where the store has none, or none that fit its arrays."""
        table = self.read_meta("crc32c") if self.has_checksums else None
        names = [*self.names("data"), "meta"]
        if table is None or table.dtype != np.uint32 or table.shape != (len(self._ends), len(names)):
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
            checking = {part: RowChecksums(part, self._ends) for part in self.parts(key) if part in checksums}
            for start, stop in self.block_spans(key):
                parts = {part: self._read_part(part, start, stop) for part in self.parts(key)}
                for part, check in checking.items():
                    for episode, value in check.add(parts[part]):
                        self._compare(part, episode, value, checksums)
                rows = _side_by_side(list(parts.values()))
                digest.update(np.ascontiguousarray(rows).data)
                on_rows(key, start, rows)
        return digest.hexdigest()

    def uncommitted(self) -> dict[str, int]:
        """Rows beyond the last commit, by array: what an interrupted append, or one under way, has left."""
        committed = {"data": int(self._ends[-1]) if len(self._ends) else 0, "meta": len(self._kept)}
        beyond = {}
        for folder, rows in committed.items():
            for name in self.names(folder):
                with contextlib.suppress(StoreError):  # what cannot be opened is said where it is read
                    array = self.raw_array(f"{folder}/{name}")
                    beyond[f"{folder}/{name}"] = array.shape[0] - rows if array.ndim else 0
        return {path: count for path, count in beyond.items() if count > 0}

    def ends_beyond(self) -> np.ndarray:
        """Ends that a store of ours holds beyond the length that the metadata say, which only an older copy of the
        metadata does: an append writes the length before the ends, and what drops some writes it after."""
        array = self.raw_array(ENDS)
        if not self.is_ours or array.fill_value != -1:
            return np.empty(0, np.int64)
        with self._foreign(ENDS, " is damaged:"):
            beyond = rows_beyond(array)
        beyond = beyond[max(0, self.raw_array(ENDS).shape[0] - array.shape[0]) :]  # someone may have appended meanwhile
        return beyond[: np.max(np.flatnonzero(beyond != -1), initial=-1) + 1]

    # Writing

    def append(self, episodes: Sequence[Demonstration]) -> None:
        """Add episodes: their rows, then what is known of each, then the commit. Raises StoreError, before anything is
        written, for episodes that do not fit the store, and where the store no longer lies where it was opened."""
        if not episodes:
            return
        self._require_in_place()
        columns = [self._columns(episode) for episode in episodes]
        expected = self._expected or self._layout()
        expected = expected or {path: (rows.shape[1:], rows.dtype) for path, rows in columns[0].items()}
        for episode, column in zip(episodes, columns, strict=True):
            found = {path: (rows.shape[1:], rows.dtype) for path, rows in column.items()}
            for path in sorted(found.keys() | expected.keys()):
                if found.get(path) != expected.get(path):
                    needs, has = (_say_layout(layout.get(path)) for layout in (expected, found))
                    raise StoreError(
                        f"{self.location} needs {needs} in {path}; an episode of seed {episode.seed} has {has}"
                    )
        start, count = int(self._ends[-1]) if len(self._ends) else 0, len(self._ends)
        lengths = [len(next(iter(episode.data.values()))) for episode in episodes]
        ends = start + np.cumsum(lengths, dtype=np.int64)
        rows = {path: np.concatenate([column[path] for column in columns]) for path in expected}
        if self.has_checksums:
            both = zip(columns, ends, strict=True)
            rows[CHECKSUMS] = np.array([_checksums(i, *one) for i, one in enumerate(both, count)], np.uint32)
        if self._interrupted:
            self._written.clear()
            self._drop_uncommitted()
        self._checked.clear()
        self._readable.clear()
        self.__dict__.pop("left_out", None)
        self._interrupted = True
        try:
            with ThreadPoolExecutor(len(rows)) as executor:  # a disk takes many files at once in about the time of one
                begins = [start if path.startswith("data/") else count for path in rows]
                list(executor.map(self._write, rows.keys(), begins, rows.values()))
                self._sync_folders(executor, {*rows, "data", "meta", ""})
                self._write("meta/episode_ends", count, ends)
                self._sync_folders(executor, {"meta/episode_ends", "meta"})
        except BaseException:
            settle()
            raise
        self._ends, self._expected = np.concatenate([self._ends, ends]), expected
        self._kept = np.ones(len(self._ends), bool)
        self._interrupted = False

    def _require_in_place(self) -> None:
        """Raise StoreError unless the folder that was opened still lies there: another would be begun in its place."""
        try:
            there = self._opened is None or os.path.samestat(os.stat(self._folder), self._opened)
        except OSError:
            there = False
        if not there:
            raise StoreError(
                f"{self._folder} is no longer the folder that was opened (moved, replaced or deleted), so nothing was "
                "appended; put it back and append again, or open it where it now lies"
            )

    def _columns(self, episode: Demonstration) -> dict[str, np.ndarray]:
        """What an episode adds to each array, (steps or 1, ...); raises StoreError for an episode that cannot be."""
        name = f"{self.location}: an episode of seed {episode.seed}"
        if episode.mode is not None and episode.mode not in self.modes:
            raise StoreError(f"{self.location} knows the modes {', '.join(self.modes)}; got {episode.mode}")
        if not is_seed(episode.seed):
            raise StoreError(f"{name}: a seed is {SEEDS}")
        columns = {f"data/{key}": np.asarray(rows) for key, rows in episode.data.items()}
        lengths = {rows.shape[:1] for rows in columns.values()}
        if len(lengths) != 1 or lengths & {(), (0,)}:
            counts = ", ".join(f"{len(np.atleast_1d(rows))} of {path}" for path, rows in columns.items()) or "no arrays"
            raise StoreError(f"{name} must have as many rows of each array, at least one; got {counts}")
        for key, value in (episode.final or {}).items():
            columns[f"meta/episode_final_{key}"] = np.asarray(value)[None]
        columns = {path: rows if rows.ndim > 1 else rows[:, None] for path, rows in columns.items()}
        for path, rows in columns.items():
            if not KEY.fullmatch(path.partition("/")[2]):
                raise StoreError(f"{name}: a key is made of letters, digits, '_', '-' and '.'; got {path[5:]!r}")
            if rows.dtype.kind not in "biuf" or rows.size == 0 or len(nonfinite_rows(rows)):
                got = "no numbers" if rows.size == 0 else "NaN or infinity" if rows.dtype.kind == "f" else rows.dtype
                raise StoreError(f"{name}: {path} must hold finite numbers; got {got}")
        mode = -1 if episode.mode is None else self.modes.index(episode.mode)
        columns["meta/episode_mode"] = np.array([mode], np.int64)
        columns["meta/episode_seed"] = np.array([-1 if episode.seed is None else episode.seed], np.int64)
        columns["meta/episode_success"] = np.array([-1 if episode.success is None else episode.success], np.int8)
        return columns

    def _layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of one row of each array that an append must add to."""
        paths = [f"{folder}/{name}" for folder in ("data", "meta") for name in self.names(folder)]
        arrays = {path: self.raw_array(path) for path in paths if path not in ("meta/episode_ends", CHECKSUMS)}
        numbers = ("meta/episode_mode", "meta/episode_seed", "meta/episode_success")
        return {
            path: (array.shape[1:] or (() if path in numbers else (1,)), array.dtype) for path, array in arrays.items()
        }

    def _drop_uncommitted(self) -> None:
        """Make the store as if what was never committed had never been written."""
        self.dropped = self.uncommitted()
        if len(self._ends) == 0:  # the first append may have been killed before an array was one
            for folder in [*self._folder.glob("data/*/"), *self._folder.glob("meta/*/")]:
                if folder.is_dir() and folder.name != "episode_ends":
                    shutil.rmtree(folder)
        for path, beyond in self.uncommitted().items():
            array = self._writable_array(path)
            committed, chunk = array.shape[0] - beyond, array.chunks[0]
            array[committed : math.ceil(committed / chunk) * chunk] = array.fill_value  # other rows of the last chunk
            array.resize((committed, *array.shape[1:]))
        for file in unfinished_files(str(self._folder)):
            file.unlink()

    # Zarr

    def _check(self) -> None:
        """Raise StoreError for episodes that cannot be, and for a store that a later version of ours has written."""
        version = self.attributes.get("format_version", 1)
        if self.is_ours and version not in range(1, FORMAT_VERSION + 1):
            known = f"1 to {FORMAT_VERSION}"
            raise StoreError(f"{self.location} has format version {version}; this package reads {known}")
        decreasing = np.flatnonzero(np.diff(self._ends, prepend=0) < 0)
        if len(decreasing):
            i = int(decreasing[0])
            began = int(self._ends[i - 1]) if i else 0
            raise StoreError(
                f"{self.location}: meta/episode_ends must increase; episode {i} would reach from row {began} to before "
                f"{self._ends[i]}, and no one can tell its rows; write the right ends there, or record again"
            )

    def _read_attributes(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Attributes, and names of those by which another tool means something else than we do; in a store of ours
        that is a StoreError."""
        with self._foreign("the attributes"):
            attributes = dict(self.group.attrs)
        if attributes.get("format") == FORMAT:
            check_attributes(attributes, self.location)
        fitting = {name: value for name, value in attributes.items() if fits(name, value)}
        return fitting, tuple(name for name in attributes if name not in fitting)

    def _read_ends(self) -> np.ndarray:
        with self._foreign("meta"):
            there = "meta" in self.group and "meta/episode_ends" in self.group
            found = say_names(self.names(""))
        if not there:
            raise StoreError(
                f"{self.location} is no dataset of episodes: it needs data/ and meta/episode_ends; has {found}"
            )
        array = self.raw_array("meta/episode_ends")
        with self._foreign("meta/episode_ends"):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"must be one row of whole numbers; got {array.shape} of {array.dtype}")
            refuse_unsafe(array, array.shape[0], complete=False)
            ends = read_rows(array, 0, array.shape[0]).astype(np.int64)
        if self.is_ours:  # a killed append can have written the second of two chunks alone
            return ends[: np.argmax(ends == -1)] if (ends == -1).any() else ends
        return ends[: np.max(np.flatnonzero(ends != -1), initial=-1) + 1]

    def _array(self, path: str) -> zarr.Array:
        """An array whose committed rows can be decoded without fear."""
        if path not in self._checked:
            array = self.raw_array(path)
            with self._foreign(path):
                rows = int(self._ends[-1]) if path.startswith("data/") else len(self._ends)
                refuse_unsafe(array, rows, complete=self.is_ours)
            self._checked[path] = array
        return self._checked[path]

    def readable_array(self, path: str) -> zarr.Array:
        """An array of data/ whose form allows to decode all committed rows, though some may be missing or damaged;
        raises StoreError."""
        if path not in self._readable:
            name = path.removeprefix("data/")
            if not is_label(name):
                raise StoreError(f"{self.location}: {path} has no name of one line of at most 200 printable characters")
            array, rows = self.raw_array(path), int(self._ends.max(initial=0))
            with self._foreign(path):
                refuse_unsafe(array, rows, complete=False)
            self._readable[path] = array
        return self._readable[path]

    def raw_array(self, path: str) -> zarr.Array:
        """An array as zarr opens it, its contents not yet trusted; raises StoreError."""
        folder, _, name = path.partition("/")
        with self._foreign(path, " cannot be opened:"):
            array = self.group[path] if NAME.fullmatch(name) and path in self.group else None
        if not isinstance(array, zarr.Array):
            if name in self.names(folder):
                raise StoreError(f"{self.location}: {path} is no array of zarr")
            raise StoreError(f"{self.location} has no {path}; it has {say_names(self.names(folder))}")
        return array

    def names(self, folder: str) -> Sequence[str]:
        """Names in a folder of the store, sorted."""
        names = list_names(self.group, folder)
        if names:
            return names
        attributes = self.attributes  # a place that lists no folders
        known = {
            "data": [*attributes.get("observation_keys", ()), *self.action_key.split("+")],
            "meta": [f"episode_{name}" for name in ("ends", "mode", "seed", "success", "crc32c")],
        }
        with self._foreign(folder):
            return sorted(name for name in known.get(folder, ()) if f"{folder}/{name}" in self.group)

    @contextlib.contextmanager
    def _foreign(self, path: str, what: str = "") -> Iterator[None]:
        """Whatever a stranger's files make zarr raise becomes a StoreError; nothing else does."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            raise StoreError(f"{self.location}: {path}{what} {say(error)}") from error

    def _write(self, path: str, start: int, rows: np.ndarray) -> None:
        if path not in self._written:
            if path not in self.group:
                create_array(self.group, path, rows[:0])
            self._written[path] = self._writable_array(path)
        array = self._written[path]
        array.resize((start + len(rows), *array.shape[1:]))
        array[start:] = rows.reshape(len(rows), *array.shape[1:])

    def _sync_folders(self, executor: Executor, paths: Iterable[str]) -> None:
        """Put on the disk which files there are in some folders of the store."""
        if self._sync:
            list(executor.map(sync_folder, [self._folder / path for path in paths]))

    def _writable_array(self, path: str) -> zarr.Array:
        """An array of which every chunk is written, also one that holds nothing but the fill value: so a chunk that is
        missing is damage."""
        array = self.raw_array(path)
        trust(array)
        return array.with_config({"write_empty_chunks": True})


def _checksums(episode: int, columns: Mapping[str, np.ndarray], end: int) -> list[int]:
    """The checksums of an episode's rows in each array of data/, sorted by name, and of what is known of it."""
    of_rows = [checksum(path[5:], episode, columns[path]) for path in sorted(columns) if path.startswith("data/")]
    return [*of_rows, checksum_of_meta(episode, end, {path: columns[path] for path in columns if path[:5] == "meta/"})]


def checksum_of_meta(episode: int, end: int, known: Mapping[str, np.ndarray]) -> int:
    """The checksum of what is known of an episode, by path of its array, and of where it ends."""
    return checksum("meta", episode, np.array(end, np.int64), *(known[path] for path in sorted(known)))


def is_seed(seed: Any) -> bool:
    """Whether a store can keep a seed."""
    return seed is None or (isinstance(seed, int | np.integer) and bool(0 <= seed < 2**63))


def older(beyond: int) -> str:
    """What metadata of meta/episode_ends that are older than its episodes mean, in words."""
    return f"has metadata older than its episodes (a file put back from a copy?): {beyond} more are stored than it says"


def exchanged(episode: int) -> str:
    """What a checksum says that does not fit, in words."""
    return f"rows of episode {episode} are not those that were written (damage, or exchanged files)"


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The columns of arrays of the same rows, (steps, columns); an array alone stays as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate([rows.reshape(len(rows), -1) for rows in parts], axis=1)


def nonfinite_rows(rows: np.ndarray) -> np.ndarray:
    """Indices of the rows (steps, ...) that hold NaN or infinity."""
    if rows.dtype.kind != "f" or rows.size == 0:
        return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))


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


def _say_layout(layout: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if layout is None else f"{layout[1]} of shape {layout[0]}"
