"""Appends episodes to a store and commits them: first the rows, then what is known of each episode, then the ends.

Each part is on the disk before the next is written. A writer that is killed loses only what it had not committed;
`drop_uncommitted` removes the rest of an interrupted append.
Knows zarr, arrays and files. Knows no environment and no policy.
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from diffusion_policy.basics.files import sync_folder
from diffusion_policy.basics.names import nearest_instructions
from diffusion_policy.datasets.arrays import (
    CHECKSUMS,
    EMBEDDING,
    ENDS,
    FORMAT,
    FORMAT_VERSION,
    INSTRUCTION,
    StoredArrays,
    older,
)
from diffusion_policy.datasets.attributes import check_attributes
from diffusion_policy.datasets.checksums import checksums_of_episode
from diffusion_policy.datasets.demonstration import SEEDS, Demonstration, is_seed, nonfinite_rows
from diffusion_policy.datasets.durable import DurableFolder, make_parents, sync_tree, unfinished_path
from diffusion_policy.datasets.guard import trust
from diffusion_policy.datasets.storage import (
    KEY,
    StoreError,
    create_array,
    remove_begun,
    settle,
    unfinished_files,
)

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of one row, by path of the array."""


def create_folder(path: Path, attributes: Mapping[str, Any], modes: Sequence[str], sync: bool) -> None:
    """Make an empty store in a new folder; raises StoreError where something already lies there."""
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
        remove_begun(unfinished)
        raise
    if sync:
        sync_folder(path.parent)


def refuse_to_append(arrays: StoredArrays) -> None:
    """Raise StoreError for a store that is not ours, or so damaged that appending would make it worse."""
    path = arrays.location
    if not arrays.is_ours:
        raise StoreError(f"{path} was not written by this toolkit; copy it with: dataset convert {path} NEW.zarr")
    arrays.check_episodes()
    beyond = len(arrays.ends_beyond())
    if beyond:
        raise StoreError(
            f"{path}: {ENDS} {older(beyond)}; nothing was changed; put the newest file back, or mend it with: "
            f"dataset repair {path}"
        )


class Appender:
    """Appends to the arrays of a store of ours, in a folder that no one else can write."""

    def __init__(self, arrays: StoredArrays, path: Path, sync: bool) -> None:
        """`sync`: whether what is appended is put on the disk at once."""
        self._arrays = arrays
        self._folder = path.absolute()
        """Wherever the program or a simulator works later."""
        self._opened = os.stat(path)
        """What the folder is known by, were it moved."""
        self._sync = sync
        self._modes: tuple[str, ...] = tuple(arrays.attributes.get("modes", ()))
        self._instructions: tuple[str, ...] = tuple(arrays.attributes.get("instructions", ()))
        self._embedding_size: int = arrays.attributes.get("instruction_embedding", {}).get("size", 0)
        self._written: dict[str, zarr.Array] = {}
        self._expected: Layout = {}
        self._interrupted = False

    def append(self, episodes: Sequence[Demonstration]) -> None:
        """Add episodes; raises StoreError, before anything is written, for episodes that do not fit the store, and
        where the store no longer lies where it was opened."""
        self._require_in_place()
        columns = [self._columns(episode) for episode in episodes]
        expected = self._require_alike(episodes, columns)
        start, count = int(self._arrays.ends[-1]) if len(self._arrays.ends) else 0, len(self._arrays.ends)
        lengths = [len(next(iter(episode.data.values()))) for episode in episodes]
        ends = start + np.cumsum(lengths, dtype=np.int64)
        rows = {path: np.concatenate([column[path] for column in columns]) for path in expected}
        if self._arrays.has_checksums:
            both = zip(columns, ends, strict=True)
            rows[CHECKSUMS] = np.array([checksums_of_episode(i, *one) for i, one in enumerate(both, count)], np.uint32)
        if self._interrupted:
            self._written.clear()
            self.drop_uncommitted()
        self._arrays.forget()
        self._interrupted = True
        self._write_and_commit(rows, start, count, ends)
        self._arrays.ends, self._expected = np.concatenate([self._arrays.ends, ends]), expected
        self._arrays.kept = np.ones(len(self._arrays.ends), bool)
        self._interrupted = False

    def require_sound(self) -> None:
        """Raise StoreError unless all that is committed is there, as far as that can be told without decoding it."""
        for path in self._layout():
            self._arrays.trusted(path)

    def _require_alike(self, episodes: Sequence[Demonstration], columns: Sequence[Mapping[str, np.ndarray]]) -> Layout:
        """The layout of the store; raises StoreError for an episode of another."""
        expected = self._expected or self._layout()
        expected = expected or {path: (rows.shape[1:], rows.dtype) for path, rows in columns[0].items()}
        for episode, column in zip(episodes, columns, strict=True):
            found = {path: (rows.shape[1:], rows.dtype) for path, rows in column.items()}
            for path in sorted(found.keys() | expected.keys()):
                if found.get(path) != expected.get(path):
                    needs, has = (_say_layout(layout.get(path)) for layout in (expected, found))
                    raise StoreError(
                        f"{self._arrays.location} needs {needs} in {path}; an episode of seed {episode.seed} has {has}"
                    )
        return expected

    def _write_and_commit(self, rows: Mapping[str, np.ndarray], start: int, count: int, ends: np.ndarray) -> None:
        """Write the rows of each array behind the first `start` steps or `count` episodes, and the ends as the last."""
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

    def _columns(self, episode: Demonstration) -> dict[str, np.ndarray]:
        """What an episode adds to each array, (steps or 1, ...); raises StoreError for an episode that cannot be."""
        name = f"{self._arrays.location}: an episode of seed {episode.seed}"
        if episode.mode is not None and episode.mode not in self._modes:
            raise StoreError(f"{self._arrays.location} knows the modes {', '.join(self._modes)}; got {episode.mode}")
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
        columns |= self._columns_of_instruction(episode, name)
        for path, rows in columns.items():
            if not KEY.fullmatch(path.partition("/")[2]):
                raise StoreError(f"{name}: a key is made of letters, digits, '_', '-' and '.'; got {path[5:]!r}")
            if rows.dtype.kind not in "biuf" or rows.size == 0 or len(nonfinite_rows(rows)):
                got = "no numbers" if rows.size == 0 else "NaN or infinity" if rows.dtype.kind == "f" else rows.dtype
                raise StoreError(f"{name}: {path} must hold finite numbers; got {got}")
        mode = -1 if episode.mode is None else self._modes.index(episode.mode)
        columns["meta/episode_mode"] = np.array([mode], np.int64)
        columns["meta/episode_seed"] = np.array([-1 if episode.seed is None else episode.seed], np.int64)
        columns["meta/episode_success"] = np.array([-1 if episode.success is None else episode.success], np.int8)
        return columns

    def _columns_of_instruction(self, episode: Demonstration, name: str) -> dict[str, np.ndarray]:
        """What an episode adds to the arrays of instructions, where the store has these; raises StoreError for an
        instruction, or an embedding, that the store does not know."""
        text, embedding, size = episode.instruction, episode.instruction_embedding, self._embedding_size
        if text is not None and text not in self._instructions:
            near = nearest_instructions(text, self._instructions)
            raise StoreError(f"{self._arrays.location} does not know the instruction {text!r:.200}; {near}")
        if not self._instructions:
            return {}
        index = -1 if text is None else self._instructions.index(text)
        columns: dict[str, np.ndarray] = {INSTRUCTION: np.array([index], np.int64)}
        if text is None:
            embedding = np.zeros(size, np.float32) if size else None
        found = () if embedding is None else np.shape(embedding)
        if found != ((size,) if size else ()):
            needs = f"an embedding of shape ({size},)" if size else "none, since the store keeps no embeddings"
            raise StoreError(f"{name}: its instruction needs {needs}; got {found or 'none'}")
        if embedding is not None:
            columns[EMBEDDING] = np.asarray(embedding, np.float32)[None]
        return columns

    def _layout(self) -> Layout:
        """Shape and type of one row of each array that an append must add to."""
        paths = [f"{folder}/{name}" for folder in ("data", "meta") for name in self._arrays.names(folder)]
        arrays = {path: self._arrays.raw(path) for path in paths if path not in ("meta/episode_ends", CHECKSUMS)}
        numbers = ("meta/episode_mode", "meta/episode_seed", "meta/episode_success", INSTRUCTION)
        return {
            path: (array.shape[1:] or (() if path in numbers else (1,)), array.dtype) for path, array in arrays.items()
        }

    def drop_uncommitted(self) -> dict[str, int]:
        """Make the store as if what was never committed had never been written; returns the rows, by array."""
        dropped = self._arrays.uncommitted()
        if len(self._arrays.ends) == 0:  # the first append may have been killed before an array was one
            for folder in [*self._folder.glob("data/*/"), *self._folder.glob("meta/*/")]:
                if folder.is_dir() and folder.name != "episode_ends":
                    shutil.rmtree(folder)
        for path, beyond in self._arrays.uncommitted().items():
            array = self._writable_array(path)
            committed, chunk, file = array.shape[0] - beyond, array.chunks[0], (array.shards or array.chunks)[0]
            whole = math.ceil(committed / chunk) * chunk
            array[committed:whole] = array.fill_value  # other rows of the last chunk
            rest = array.with_config({"write_empty_chunks": False})
            rest[whole : math.ceil(committed / file) * file] = array.fill_value  # other chunks of the last file
            array.resize((committed, *array.shape[1:]))
        for file in unfinished_files(str(self._folder)):
            file.unlink()
        return dropped

    def _require_in_place(self) -> None:
        """Raise StoreError unless the folder that was opened still lies there: another would be begun in its place."""
        try:
            there = os.path.samestat(os.stat(self._folder), self._opened)
        except OSError:
            there = False
        if not there:
            raise StoreError(
                f"{self._folder} is no longer the folder that was opened (moved, replaced or deleted), so nothing was "
                "appended; put it back and append again, or open it where it now lies"
            )

    def _write(self, path: str, start: int, rows: np.ndarray) -> None:
        if path not in self._written:
            if path not in self._arrays.group:
                create_array(self._arrays.group, path, rows[:0])
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
        array = self._arrays.raw(path)
        trust(array)
        return array.with_config({"write_empty_chunks": True})


def _say_layout(layout: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if layout is None else f"{layout[1]} of shape {layout[0]}"
