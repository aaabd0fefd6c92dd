"""npz archives ↔ source: the arrays of a store under the same names, for whatever can read NumPy's own files.

`data/<key>` (one row a step), `meta/episode_ends`, `meta/episode_<name>` (one row an episode: `seed`, `mode` as an
index among the modes, `success`, `final_<key>`) and `meta/attributes`, a text of JSON. Archives of other tools may
leave out `data/` and `meta/` and call the action `actions`. Both ways, rows are streamed: no array of steps is ever
whole in memory, unless it was written in Fortran's order.

Not carried: `meta/episode_<name>` with any other name.
"""

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from diffusion_policy.datasets.convert import Source, foreign, from_header, header, place
from diffusion_policy.datasets.store import Demonstration, StoreError

ENDS = "meta/episode_ends"
HEADER = "meta/attributes"
ROWS_AT_A_TIME = 2**24
"""Bytes."""


class _Names(NamedTuple):
    """Names of an archive's members, without `.npy`."""

    data: dict[str, str]
    """By key."""
    meta: dict[str, str]
    """By name, such as `seed`."""
    ends: str


def read(path: Path) -> Source:
    """The archive as a source; raises StoreError, or what numpy and zipfile raise."""
    with zipfile.ZipFile(path) as archive:
        names = _names(archive)
        text = _whole(archive, HEADER) if f"{HEADER}.npy" in archive.namelist() else None
    known = {"seed", "mode", "success"}
    left_out = [member for name, member in names.meta.items() if name not in known and not name.startswith("final_")]
    if text is None:
        return foreign({}, sorted({*names.data} - {"action"}), _episodes(path, names, ()), left_out)
    if text.ndim or text.dtype.kind != "U":
        raise StoreError(f"{HEADER} must be a text of JSON; got {text.dtype} of {text.shape}")
    head = json.loads(str(text))
    return from_header(head, _episodes(path, names, tuple(head["modes"])), left_out)


def _names(archive: zipfile.ZipFile) -> _Names:
    members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    ends = next((name for name in (ENDS, "episode_ends") if name in members), None)
    if ends is None:
        raise StoreError(f"there is no {ENDS}; the archive has {', '.join(members[:9])}")
    names = _Names({}, {}, ends)
    for name in members:
        if name in (ends, HEADER):
            continue
        plain = name.removeprefix("meta/")
        if plain.startswith("episode_"):
            place(names.meta, plain.removeprefix("episode_"), name)
        else:
            key = name.removeprefix("data/")
            place(names.data, "action" if name == "actions" else key, name)
    return names


def _episodes(path: Path, names: _Names, modes: tuple[str, ...]) -> Iterator[Demonstration]:
    with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as opened:
        ends = _whole(archive, names.ends)
        if ends.ndim != 1 or ends.dtype.kind not in "iu" or (np.diff(ends.astype(np.int64), prepend=0) <= 0).any():
            raise StoreError(f"{names.ends} must be whole numbers that increase from above 0; got {ends[:9]}")
        meta = {name: _whole(archive, member) for name, member in names.meta.items()}
        for name, values in meta.items():
            if values.ndim == 0 or len(values) != len(ends):
                raise StoreError(f"{names.meta[name]} must have {len(ends)} rows, one an episode; got {values.shape}")
        rows = {}
        for key, member in names.data.items():
            file = opened.enter_context(archive.open(f"{member}.npy"))
            rows[key] = _Rows(archive, file, member, int(ends[-1]))
        for i, steps in enumerate(np.diff(ends, prepend=0)):
            data = {key: member.read(int(steps)) for key, member in rows.items()}
            final = {name.removeprefix("final_"): meta[name][i] for name in meta if name.startswith("final_")}
            mode = int(meta["mode"][i]) if "mode" in meta else -1
            yield Demonstration(
                data,
                seed=int(meta["seed"][i]) if "seed" in meta else None,
                mode=modes[mode] if 0 <= mode < len(modes) else None,
                success=bool(meta["success"][i]) if "success" in meta else None,
                final={key: np.asarray(row) for key, row in final.items()} or None,
            )


def _whole(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(f"{member}.npy") as file:
        return np.lib.format.read_array(file)  # refuses objects, which would be unpickled


class _Rows:
    """Reads the rows of one member from first to last."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], member: str, expected: int) -> None:
        self._member = member
        self._whole: np.ndarray | None = None
        self._at = 0
        self._file = file
        version = np.lib.format.read_magic(self._file)
        if version not in ((1, 0), (2, 0)):
            raise StoreError(f"{member} is of version {version} of NumPy's format; known are 1.0 and 2.0")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_fortran_order, self._dtype = read_header(self._file)
        if self._dtype.kind not in "biuf":
            raise StoreError(f"{member} must hold numbers; got {self._dtype}")
        if not shape or shape[0] != expected:
            raise StoreError(f"{member} has {shape[0] if shape else 'no'} rows; the last episode ends at {expected}")
        self._shape = shape[1:]
        if in_fortran_order and len(shape) > 1:
            self._whole = _whole(archive, member)

    def read(self, count: int) -> np.ndarray:
        """The next rows, (count, ...)."""
        self._at += count
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[self._at - count : self._at])
        size = count * math.prod(self._shape) * self._dtype.itemsize
        content = self._file.read(size)
        if len(content) != size or size == 0:
            raise StoreError(f"{self._member} ends before row {self._at}")
        return np.frombuffer(content, self._dtype).reshape(count, *self._shape)


def write(source: Source, path: Path) -> None:
    """Write the archive, uncompressed, as `numpy.savez` does. Rows lie in files beside it until their number is
    known."""
    columns: dict[str, _Column] = {}
    ends: list[int] = []
    meta: dict[str, list[Any]] = {}
    for episode in source.episodes:
        for key, rows in episode.data.items():
            if key not in columns:
                columns[key] = _Column(path.with_name(f"column-{len(columns)}"), rows)
            columns[key].append(rows)
        ends.append((ends[-1] if ends else 0) + len(episode.data[source.action_key]))
        for name, value in _meta(source, episode).items():
            meta.setdefault(name, []).append(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, column in columns.items():
            column.move_to(archive, f"data/{key}.npy", ends[-1])
        for name, values in meta.items():
            if len(values) != len(ends):
                raise StoreError(f"{name} is known of {len(values)} of {len(ends)} episodes; it must be of all or none")
            _add(archive, f"meta/episode_{name}.npy", np.array(values))
        _add(archive, f"{ENDS}.npy", np.array(ends, np.int64))
        _add(archive, f"{HEADER}.npy", np.array(json.dumps(header(source))))


def _meta(source: Source, episode: Demonstration) -> dict[str, Any]:
    """What is known of one episode, by the name of its array."""
    known: dict[str, Any] = {f"final_{key}": last for key, last in (episode.final or {}).items()}
    if episode.seed is not None:
        known["seed"] = np.int64(episode.seed)
    if episode.success is not None:
        known["success"] = np.bool_(episode.success)
    if source.modes:
        known["mode"] = np.int64(-1 if episode.mode is None else source.modes.index(episode.mode))
    return known


class _Column:
    """Rows of one key, in a file until they move into the archive."""

    def __init__(self, path: Path, rows: np.ndarray) -> None:
        self._path = path
        self._like = rows[:0]

    def append(self, rows: np.ndarray) -> None:
        if (rows.shape[1:], rows.dtype) != (self._like.shape[1:], self._like.dtype):
            like = self._like
            raise StoreError(f"rows must stay {like.shape[1:]} of {like.dtype}; got {rows.shape[1:]} of {rows.dtype}")
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(rows).data)

    def move_to(self, archive: zipfile.ZipFile, name: str, count: int) -> None:
        shape = (count, *self._like.shape[1:])
        described = {"descr": self._like.dtype.str, "fortran_order": False, "shape": shape}
        with archive.open(name, "w", force_zip64=True) as member, self._path.open("rb") as file:
            np.lib.format.write_array_header_2_0(member, described)
            while block := file.read(ROWS_AT_A_TIME):
                member.write(block)
        self._path.unlink()


def _add(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    with archive.open(name, "w") as member:
        np.lib.format.write_array(member, values)
