"""Reads HDF5 files of unknown origin within bounds, and writes HDF5 files so that a full disk is one error.

Only hard links are followed, each group once: soft links, external files and virtual arrays lead out of the file. The
unpacked size of rows is known before they are read. Only filters that are part of HDF5 and h5py are used, so that no
plugin is loaded.

Knows h5py. Knows no layout of groups.
"""

import contextlib
import io
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import FileError, refuse_irregular
from diffusion_policy.datasets.formats.reading import (
    MOST_COMPRESSED,
    library,
    most_bytes,
    starts_with,
    stored_bytes,
)
from diffusion_policy.datasets.storage import StoreError

MAGIC = b"\x89HDF\r\n\x1a\n"
FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
PACKING = {1: MOST_COMPRESSED, 32000: 100}
"""Filters that make numbers smaller, and by how much at most."""
MOST_DEPTH = 16
"""Levels of groups."""
MOST_MEMBERS = 2**17
"""Members of a group."""
CHUNK_BYTES = 2**28
"""Most bytes of a decoded chunk."""
TEXT_BYTES = 2**24
"""Most bytes of a text."""


def numbered(names: Iterable[str], prefix: str) -> list[str]:
    """The names that are the prefix and a number, in the order of the numbers."""
    found = {name: int(name[len(prefix) :]) for name in names if re.fullmatch(rf"{prefix}\d+", name)}
    return sorted(found, key=lambda name: found[name])


class File:
    """An open file of unknown origin."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.root = file
        self._h5py = library("h5py", "HDF5 files")
        self._objects_left = 2**12 + stored_bytes(path) // 64
        """A group or an array takes more bytes than that."""
        self.most_bytes = most_bytes(path)
        self._safe: set[int] = set()
        """Addresses of arrays of which each chunk was looked at."""

    def names(self, group: Any) -> list[str]:
        """Names of the members of a group; raises StoreError for absurdly many."""
        if len(group) > MOST_MEMBERS:
            raise StoreError(f"{group.name} has {len(group)} members; at most {MOST_MEMBERS} are read")
        return list(group)

    def member(self, group: Any, *path: str) -> Any:
        """The group or array at a path within a group; None where there is none, a text where it cannot be used."""
        for name in path:
            if not self.is_group(group):
                return None
            links, encoded = group.id.links, name.encode(errors="surrogateescape")
            if name in ("", ".") or not links.exists(encoded):  # `in` would follow a link, into another file if need be
                return None
            if links.get_info(encoded).type != self._h5py.h5l.TYPE_HARD:
                return "it is a link, which may lead out of the file"
            self._objects_left -= 1
            if self._objects_left < 0:
                raise StoreError("it has more groups and arrays than its size has room for")
            try:
                group = group[name]
            except Exception as error:
                return f"it cannot be opened: {_line(error)}"
        return group

    def is_group(self, node: Any) -> bool:
        return isinstance(node, self._h5py.Group)

    def is_array(self, node: Any) -> bool:
        return isinstance(node, self._h5py.Dataset)

    def leaves(self, group: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        """(path, array) of all that lies within a group; in the place of what is no array, why it cannot be used."""
        seen: set[int] = set()
        yield from self._leaves(group, (), seen)

    def _leaves(self, node: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if not self.is_group(node):
            yield path, node if isinstance(node, str) or self.is_array(node) else "it is no array"
            return
        address = self._h5py.h5o.get_info(node.id).addr
        if address in seen or len(path) > MOST_DEPTH:
            yield path, f"it is a group within itself, or more than {MOST_DEPTH} levels deep"
            return
        seen.add(address)
        for name in self.names(node):
            yield from self._leaves(self.member(node, name), (*path, name), seen)

    def attribute(self, node: Any, name: str) -> Any:
        """A single number or text beside a group or array; None where there is no such."""
        if not self._h5py.h5a.exists(node.id, name.encode()):
            return None
        found = self._h5py.h5a.open(node.id, name.encode())
        if found.shape != () or found.get_storage_size() > TEXT_BYTES:
            return None
        value = node.attrs[name]
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        return value.item() if isinstance(value, np.generic) else value

    def text(self, node: Any) -> str:
        """A text that is kept as an array; raises StoreError where it is none, or too long."""
        if not self.is_array(node) or self._lies_elsewhere(node) or node.shape != () or node.dtype.kind not in "OS":
            raise StoreError(f"{getattr(node, 'name', 'it')} must be a text")
        if node.id.get_storage_size() > TEXT_BYTES or self._h5py.check_string_dtype(node.dtype) is None:
            raise StoreError(f"{node.name} must be a text of at most {TEXT_BYTES} bytes")
        value = node[()]
        return value.decode() if isinstance(value, bytes) else str(value)

    def why_not(self, array: Any) -> str | None:
        """Why the rows of an array cannot be read; None where they can."""
        if isinstance(array, str):
            return array
        if self._lies_elsewhere(array):
            return "its numbers lie in another file or array"
        try:
            dtype, shape = array.dtype, array.shape
        except Exception as error:
            return f"its type is unknown: {_line(error)}"
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            return f"it holds no numbers but {'texts or references' if dtype.kind in 'OSUV' else dtype}"
        if not shape or 0 in shape[1:]:
            return "it has no rows of numbers"
        unknown = [FILTERS.get(number, f"filter {number}") for number in self._filters(array) if number not in FILTERS]
        if unknown:
            return f"it is packed with {', '.join(unknown)}; known are {', '.join(FILTERS.values())}"
        if sum(number in PACKING for number in self._filters(array)) > 1:
            return "it is packed twice"
        if array.chunks and math.prod(array.chunks) * dtype.itemsize > CHUNK_BYTES:
            return f"its chunks have more than {CHUNK_BYTES // 2**20} MB"
        return None

    def _lies_elsewhere(self, array: Any) -> bool:
        stored = array.id.get_create_plist()  # before its shape, for which a virtual array would open other files
        return stored.get_layout() == self._h5py.h5d.VIRTUAL or stored.get_external_count() > 0

    def _filters(self, array: Any) -> list[int]:
        stored = array.id.get_create_plist()
        return [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]

    def rows(self, array: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array for which `why_not` has no reason; raises StoreError for chunks that would unpack into more
        than they should."""
        address = self._h5py.h5o.get_info(array.id).addr
        if array.chunks and address not in self._safe:
            self._refuse_bombs(array)
            self._safe.add(address)
        return np.asarray(array[start:stop])

    def _refuse_bombs(self, array: Any) -> None:
        filters = self._filters(array)
        packing = next((number for number in filters if number in PACKING), None)
        size = math.prod(array.chunks) * array.dtype.itemsize
        bombs: list[tuple[int, ...]] = []

        def look(chunk: Any) -> None:
            if chunk.size > size + 2**12 or (packing == 32000 and chunk.size * PACKING[packing] > 2 * CHUNK_BYTES):
                raise StoreError(f"{array.name} has a chunk of {chunk.size} bytes, which should unpack into {size}")
            if packing == 1 and chunk.size * PACKING[packing] > CHUNK_BYTES:
                bombs.append(chunk.chunk_offset)

        array.id.chunk_iter(look)
        for offset in bombs:
            mask, packed = array.id.read_direct_chunk(offset)
            if (
                not mask >> filters.index(1) & 1
                and len(zlib.decompressobj().decompress(packed, size + 2**12 + 1)) > size + 2**12
            ):
                raise StoreError(f"{array.name} has a chunk that unpacks into more than its {size} bytes")


@contextlib.contextmanager
def opened(path: Path, what: str = "HDF5 files") -> Iterator[File]:
    """Open a file to read."""
    h5py = library("h5py", what)
    refuse_irregular(path)
    with h5py.File(path, "r") as file:
        yield File(path, file)


def detector(fits: Callable[[File, list[str]], bool]) -> Callable[[Path], bool]:
    """Whether a path holds an HDF5 file that `fits`, which is asked with the file and the names at its root."""

    def detect(path: Path) -> bool:
        if not starts_with(path, MAGIC):
            return False
        with _one_error(path), opened(path) as file:
            return fits(file, file.names(file.root))

    return detect


def refuse_layout(path: Path, layouts: Sequence[str]) -> None:
    """Raise StoreError for an HDF5 file of no known layout; names those that are read."""
    if not starts_with(path, MAGIC):
        return
    with _one_error(path), opened(path) as file:
        names = file.names(file.root)
    raise StoreError(
        f"{path} is HDF5 of no known layout: read are {', '.join(layouts[:-1])}, and {layouts[-1]}; it has "
        f"{', '.join(names[:9]) or 'nothing'}; from other layouts, write a zarr store or an npz: arrays of one row a "
        "step, and meta/episode_ends"
    )


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (StoreError, FileError):
        raise
    except Exception as error:
        raise StoreError(f"{path} is HDF5 that cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Writing


class Sink(io.RawIOBase):
    """A file that HDF5 writes to and that never fails: once a write has failed, the rest is dropped, and `check` raises
    what it was. Where HDF5 itself is told of a full disk, it breaks down when the interpreter ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the OSError of the first write that failed."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int | None:
        return self._file.readinto(buffer)

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        written = 0
        try:
            while self._error is None and written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
        return self._file.tell() if size is None else size

    def flush(self) -> None:
        """Nothing is held back."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def created(path: Path, what: str) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A new file to write, and a function that raises OSError when the disk is full: to be called often."""
    h5py = library("h5py", what)
    with contextlib.closing(Sink(path)) as sink:
        with h5py.File(sink, "w", track_order=True) as file:
            yield file, sink.check
        sink.check()
