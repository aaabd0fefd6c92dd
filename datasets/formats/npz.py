"""npz archives ↔ source: the arrays of a store under the same names, for whatever can read NumPy's own files.

`data/<key>` (one row a step), `meta/episode_ends`, `meta/episode_<name>` (one row an episode: `seed`, `mode` as an
index among the modes, `success`, `instruction` as an index among the instructions, `final_<key>`) and
`meta/attributes`, a text of JSON. Archives of other tools may leave out `data/` and `meta/` and call the action
`actions`. Both ways, rows are streamed: no array of steps is ever whole in memory, unless it was written in Fortran's
order.

Not carried, but named: `meta/episode_<name>` with any other name, objects (they would be unpickled), texts, and arrays
of another number of rows.
"""

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from diffusion_policy.basics.files import parse_json
from diffusion_policy.basics.names import are_instructions
from diffusion_policy.datasets.demonstration import Demonstration
from diffusion_policy.datasets.formats.format import Contents, Format, Source, foreign, from_header, header
from diffusion_policy.datasets.formats.reading import check_sizes, most_bytes, say_too_large
from diffusion_policy.datasets.formats.zips import names_in_zip, opened_zip
from diffusion_policy.datasets.storage import StoreError

ENDS = "meta/episode_ends"
HEADER = "meta/attributes"
ROWS_AT_A_TIME = 2**24
"""Bytes."""
TEXT_BYTES = 2**26
KNOWN_BYTES = 2**28
"""Most bytes of an array of one row an episode."""


class _Names(NamedTuple):
    """Names of an archive's members, without `.npy`."""

    data: dict[str, str]
    """By key."""
    meta: dict[str, str]
    """By name, such as `seed`."""
    ends: str
    left_out: dict[str, str]


class _Member(NamedTuple):
    """An array of one row a step."""

    name: str
    shape: tuple[int, ...]
    """Of a row."""
    dtype: np.dtype
    in_fortran_order: bool

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: Path) -> Contents:
    """What is in the archive; raises StoreError, or what numpy and zipfile raise."""
    with opened_zip(path) as archive:
        names = _names(archive)
        ends, remarks = _ends(archive, names.ends)
        members = {key: _member(archive, member, int(ends[-1]), path) for key, member in names.data.items()}
        known, unknown = _known(archive, names.meta, len(ends))
        text = _whole(archive, HEADER, TEXT_BYTES) if f"{HEADER}.npy" in archive.namelist() else None
    arrays = {key: member if isinstance(member, str) else None for key, member in members.items()}
    left_out = names.left_out | unknown
    if text is not None and (text.ndim or text.dtype.kind != "U"):
        raise StoreError(f"{HEADER} must be a text of JSON; got {text.dtype} of {text.shape}")
    head = None if text is None else parse_json(str(text))
    modes = tuple(map(str, head.get("modes", ()))) if isinstance(head, dict) else ()
    instructions = _instructions(head)

    def episodes(keys: Sequence[str]) -> Iterator[Demonstration]:
        found = {key: member for key, member in members.items() if key in keys and not isinstance(member, str)}
        return _episodes(path, found, ends, known, modes, instructions)

    if head is None:
        return foreign({}, sorted({*arrays} - {"action"}), arrays, episodes, left_out, remarks=remarks)
    return from_header(head, arrays, episodes, left_out)


def _instructions(head: Any) -> tuple[str, ...]:
    """All instructions, as what we wrote beside the data names them."""
    attributes = head.get("attributes") if isinstance(head, dict) else None
    texts = attributes.get("instructions", []) if isinstance(attributes, dict) else []
    return tuple(texts) if are_instructions(texts) else ()


def _names(archive: zipfile.ZipFile) -> _Names:
    members = list(dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")))
    ends = next((name for name in (ENDS, "episode_ends") if name in members), None)
    if ends is None:
        raise StoreError(f"there is no {ENDS}; the archive has {', '.join(members[:9])}")
    names = _Names({}, {}, ends, {})
    plural = {"data/action", "action"}.isdisjoint(members)
    for name in members:
        if name in (ends, HEADER):
            continue
        plain = name.removeprefix("meta/")
        key = name.removeprefix("data/")
        key = "action" if key == "actions" and plural else key
        taken, key = (names.meta, plain[8:]) if plain.startswith("episode_") else (names.data, key)
        if key in taken:
            names.left_out[name] = f"another array is called {key}"
        else:
            taken[key] = name
    return names


def _ends(archive: zipfile.ZipFile, member: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Row after the last of each episode, and what is to be said of them."""
    ends = _whole(archive, member, TEXT_BYTES)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or (np.diff(ends.astype(np.int64), prepend=0) < 0).any():
        raise StoreError(f"{member} must be whole numbers that increase from above 0; got {ends[:9]}")
    ends = ends.astype(np.int64)
    if len(ends) == 0 or ends[-1] == 0:
        raise StoreError(f"{member} has no episodes")
    kept = np.unique(ends[ends > 0])
    empty = len(ends) - len(kept)
    if empty:  # and so no array of one row an episode fits
        return kept, (f"{empty} of {len(ends)} episodes have no rows and are left out",)
    return kept, ()


def _known(
    archive: zipfile.ZipFile, members: dict[str, str], episodes: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What is known of each episode, by name, and why other arrays of one row an episode are not carried."""
    known: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for name, member in members.items():
        values = None
        if name in ("seed", "mode", "success", "instruction") or name.startswith("final_"):
            try:
                values = _whole(archive, member, KNOWN_BYTES)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                left_out[member] = f"it cannot be read: {error}"
                continue
        if values is None:
            left_out[member] = "it is unknown what it says of an episode"
        elif values.ndim == 0 or len(values) != episodes:
            left_out[member] = f"it has {len(values) if values.ndim else 'no'} rows; there are {episodes} episodes"
        elif values.dtype.kind not in "biuf" or (
            name in ("seed", "mode", "instruction") and (values.ndim > 1 or values.dtype.kind == "f")
        ):
            left_out[member] = f"it must be whole numbers; it is {values.dtype} of {values.shape}"
        else:
            known[name] = values
    return known, left_out


def _episodes(
    path: Path,
    members: dict[str, _Member],
    ends: np.ndarray,
    known: dict[str, np.ndarray],
    modes: tuple[str, ...],
    instructions: tuple[str, ...],
) -> Iterator[Demonstration]:
    lengths = np.diff(ends, prepend=0)
    check_sizes(sum(member.row_bytes for member in members.values()), lengths.tolist(), path)
    with opened_zip(path) as archive, contextlib.ExitStack() as opened:
        rows = {}
        for key, member in members.items():
            file = opened.enter_context(archive.open(f"{member.name}.npy"))
            rows[key] = _Rows(archive, file, member)
        for i, steps in enumerate(lengths):
            data = {key: member.read(int(steps)) for key, member in rows.items()}
            final = {name.removeprefix("final_"): known[name][i] for name in known if name.startswith("final_")}
            mode, told = (int(known[name][i]) if name in known else -1 for name in ("mode", "instruction"))
            yield Demonstration(
                data,
                seed=int(known["seed"][i]) if "seed" in known and known["seed"][i] >= 0 else None,
                mode=modes[mode] if 0 <= mode < len(modes) else None,
                success=bool(known["success"][i]) if "success" in known else None,
                final={key: np.asarray(row) for key, row in final.items()} or None,
                instruction=instructions[told] if 0 <= told < len(instructions) else None,
            )


def _member(archive: zipfile.ZipFile, name: str, expected: int, path: Path) -> _Member | str:
    """An array, or why it cannot be used."""
    try:
        with _member_file(archive, name) as file:
            shape, in_fortran_order, dtype = _read_header(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return f"it cannot be read: {error}"
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        return f"it must hold numbers; got {dtype}"
    if not shape or shape[0] != expected:
        return f"it has {shape[0] if shape else 'no'} rows; the last episode ends at {expected}"
    if 0 in shape[1:]:
        return "it has rows without numbers"
    member = _Member(name, shape[1:], dtype, in_fortran_order and len(shape) > 1)
    if member.in_fortran_order and member.row_bytes * expected > most_bytes(path):
        return f"it is in Fortran's order, so all of it is read: {say_too_large(member.row_bytes * expected, path)}"
    return member


@contextlib.contextmanager
def _member_file(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """A member; raises StoreError for one that is packed in a way that could unpack without end."""
    if archive.getinfo(f"{name}.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise StoreError(f"{name} is neither stored nor deflated")
    with archive.open(f"{name}.npy") as file:
        yield file


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise StoreError(f"it is of version {version} of NumPy's format; known are 1.0 and 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read_header(file)


def _whole(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """All of an array of at most so many bytes."""
    with _member_file(archive, name) as file:
        shape, _, dtype = _read_header(file)
        if math.prod(shape) * dtype.itemsize > most:
            raise StoreError(f"{name} has {math.prod(shape) * dtype.itemsize} bytes; at most {most} are read")
    with _member_file(archive, name) as file:
        return np.lib.format.read_array(file)  # refuses objects, which would be unpickled


class _Rows:
    """Reads the rows of one member from first to last."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], member: _Member) -> None:
        self._member = member
        self._file = file
        self._at = 0
        _read_header(file)
        self._whole = _whole(archive, member.name, 2**62) if member.in_fortran_order else None

    def read(self, count: int) -> np.ndarray:
        """The next rows, (count, ...)."""
        self._at += count
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[self._at - count : self._at])
        size = count * self._member.row_bytes
        content = self._file.read(size)
        if len(content) != size:
            raise StoreError(f"{self._member.name} ends before row {self._at}")
        return np.frombuffer(content, self._member.dtype).reshape(count, *self._member.shape)


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
    instructions = source.attributes.get("instructions")
    if instructions:
        known["instruction"] = np.int64(-1 if episode.instruction is None else instructions.index(episode.instruction))
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


def _detect(path: Path) -> bool:
    return any(name.endswith(".npy") for name in names_in_zip(path))


FORMAT = Format("npz archive", (".npz",), _detect, read, write)
