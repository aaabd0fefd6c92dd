"""Reads the files of a store of unknown origin within bounds, from a folder, a zip, a web server or any fsspec file
system: only regular files, none larger than allowed, none that would unpack into more than allowed.

Knows zarr's stores. Knows neither arrays nor episodes.
"""

import asyncio
import os
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore, ZipStore

from diffusion_policy.basics.files import MAX_JSON_BYTES, FileError, open_regular, parse_json
from diffusion_policy.datasets.packing import CHECKSUM, ENTRY, Packing, chunks_of_shard, refuse_bomb

METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
ALL_METADATA_BYTES = 4 * MAX_JSON_BYTES
"""Of a store; what it says of an array takes about 2^10."""
ANY_STORE_BYTES = 2**26
"""So much any store may unpack into; more only ..."""
LARGEST_RATIO = 256
"""... as far as its files have at least this part of it (blank pictures of ours have one) ..."""
SMALLEST_FILE = 2**11
"""... where each file counts as so many bytes at least."""
MOST_NAMES = 2**13
"""Names in one folder of arrays."""
MOST_FILES = 2**20
"""Files of one array."""


class Listing(NamedTuple):
    """What a folder holds."""

    any: bool
    """Whether there is anything; False where the place cannot be listed."""
    names: list[str]
    """Of what may be members of a group, sorted."""


class Reading:
    """Files that are read together. When one of them cannot be, the others are given up: zarr would go on."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.over = False

    def join(self) -> None:
        """Called by each task before it reads a file; raises ValueError where that is no longer wanted."""
        if self.over:
            raise ValueError("given up")
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def give_up(self) -> None:
        """Cancel what is still under way."""
        self.over = True
        for task in self.tasks - {asyncio.current_task()}:
            task.cancel()


READING: ContextVar[Reading | None] = ContextVar("READING", default=None)
"""Of the tasks of one read."""


async def gather(array: zarr.AsyncArray[Any], start: int, stop: int) -> np.ndarray:
    """Some rows of an array. When this raises, nothing of it goes on."""
    reading, before = Reading(), asyncio.all_tasks()
    READING.set(reading)
    try:
        return np.asarray(await array.getitem(slice(start, stop)))
    except BaseException:
        reading.give_up()
        begun = asyncio.all_tasks() - before - {asyncio.current_task()}
        if begun:
            await asyncio.wait(begun, timeout=5)
        raise


class GuardedStore(WrapperStore[Any]):
    """Hands on metadata of a sane size, and chunks of arrays that were looked at (`trust`), as far as each unpacks into
    no more than a chunk, and all of them into no more than a store of that size has."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.packings: dict[str, Packing] = {}
        """By path of the array."""
        self.listed: dict[str, Listing] = {}
        """Folders that a reader has asked for."""
        self._sound: dict[str, tuple[int, int]] = {}
        """Hash and size of metadata that have passed."""
        self._metadata_bytes = 0
        self._counted: set[tuple[str, int]] = set()
        self._stored, self._unpacked = 0, 0
        """Bytes of all chunks that were read, each counted once."""

    def _with_store(self, store: Store) -> "GuardedStore":
        guarded = GuardedStore(store)
        guarded.packings = self.packings
        return guarded

    # Reading

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The file, or a part of it; raises ValueError for what is not trusted."""
        if reading := READING.get():
            reading.join()
        if key.rpartition("/")[2] in METADATA:
            content = await self._read(key, None, MAX_JSON_BYTES)
            if content is not None and self._sound.get(key, (0,))[0] != hash(content):
                self._check_metadata(key, content)
        else:
            content = await self._get_chunk(key, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    def _check_metadata(self, key: str, content: bytes) -> None:
        """Raise ValueError for JSON that would take much memory, alone or with what was read before."""
        try:
            parse_json(content)
        except ValueError as error:
            raise ValueError(f"{key} is not JSON that can be read: {error}") from error
        total = self._metadata_bytes + len(content) - self._sound.get(key, (0, 0))[1]
        if total > ALL_METADATA_BYTES:
            raise ValueError(f"{key} is one metadata file too many: more than {ALL_METADATA_BYTES} bytes of them")
        self._sound[key], self._metadata_bytes = (hash(content), len(content)), total

    async def _get_chunk(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        path = key
        while path and path not in self.packings:
            path = path.rpartition("/")[0]
        packing = self.packings.get(path)
        if packing is None:
            raise ValueError(f"{key} belongs to no array that was looked at")
        count = packing.chunks_in_shard
        index = isinstance(byte_range, SuffixByteRequest) and count and byte_range.suffix == ENTRY * count + CHECKSUM
        if isinstance(byte_range, RangeByteRequest):
            if count is None or not 0 <= byte_range.start <= byte_range.end <= byte_range.start + packing.most_packed:
                raise ValueError(f"{key} has no chunk from byte {byte_range.start} to {byte_range.end}")
        elif byte_range is not None and not index:
            raise ValueError(f"{key} is read whole, or a chunk of a shard at a time")
        content = await self._read(key, byte_range, packing.most_stored)
        if index and content is not None:
            return content
        part = byte_range.start if isinstance(byte_range, RangeByteRequest) else -1
        unpacked = packing.chunk_bytes if part >= 0 else packing.file_bytes
        if content is not None and byte_range is None and count is not None:
            chunks = list(chunks_of_shard(memoryview(content), count))  # fewer where it is not yet full
            unpacked = packing.chunk_bytes * len(chunks)
            for chunk in chunks:
                refuse_bomb(chunk, packing)
        elif content is not None:
            refuse_bomb(memoryview(content), packing)
        if self.read_only:  # a writer reads only what it has checked or makes itself
            self._count((key, part), 0 if content is None else self._weigh(key, content), unpacked)
        return content

    def _weigh(self, key: str, content: bytes) -> int:
        """What a file, or a part of it, takes where it lies: less where it has holes or is deflated in its zip."""
        if isinstance(self._store, LocalStore):
            blocks = getattr(os.stat(self._store.root / key), "st_blocks", None)
            taken = len(content) if blocks is None else 512 * blocks
        elif isinstance(self._store, ZipStore):
            taken = _archive(self._store).getinfo(key).compress_size
        else:
            taken = len(content)
        return max(min(len(content), taken), SMALLEST_FILE)

    def _count(self, part: tuple[str, int], stored: int, unpacked: int) -> None:
        """Raise ValueError where all that was read so far unpacks into far more than it has."""
        if part in self._counted:
            return
        stored += self._stored
        if self._unpacked + unpacked > max(ANY_STORE_BYTES, LARGEST_RATIO * stored):
            raise ValueError(
                f"{part[0]} would unpack into {unpacked} bytes, and with what was read before into "
                f"{LARGEST_RATIO} times what is stored; no data do"
            )
        self._counted.add(part)
        self._stored, self._unpacked = stored, self._unpacked + unpacked

    async def _read(self, key: str, byte_range: ByteRequest | None, most_bytes: int) -> bytes | None:
        """Bytes of a file of at most `most_bytes`, or of a part of it; None where there is none."""
        store = self._store
        if isinstance(store, LocalStore):
            try:
                return await asyncio.to_thread(_read_local, store.root, key, byte_range, most_bytes)
            except FileError as error:  # the store is named where this is said
                raise ValueError(str(error).replace(f"{store.root / key}", key)) from error
        if isinstance(store, ZipStore):
            return await asyncio.to_thread(_read_member, store, key, byte_range, most_bytes)
        if isinstance(store, FsspecStore):
            return await _read_remote(store, key, byte_range, most_bytes)
        return await store.read(key, byte_range, most_bytes)  # a web server

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """As `get`, of several files."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def getsize(self, key: str) -> int:
        """Size of a file [bytes], without reading it."""
        if isinstance(self._store, ZipStore):
            return _archive(self._store).getinfo(key).file_size
        return await self._store.getsize(key)

    # Listing

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Names in a folder; raises ValueError where there are more than anyone has."""
        count = 0
        await self._ensure_open()
        async for name in self._store.list_dir(prefix):
            count += 1
            if count > MOST_NAMES:
                raise ValueError(f"has a folder {prefix or '.'} of more than {MOST_NAMES} names")
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Files within a folder, at any depth; raises ValueError where there are more than anyone has."""
        await self._ensure_open()
        if isinstance(self._store, LocalStore):
            found = await asyncio.to_thread(lambda: list(islice(_walk(self._store.root, prefix), MOST_FILES + 1)))
        else:
            found = []
            async for key in self._store.list_prefix(prefix):
                found.append(key)
                if len(found) > MOST_FILES:
                    break
        if len(found) > MOST_FILES:
            raise ValueError(f"has more than {MOST_FILES} files")
        for key in found:
            yield key


def _cut(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """First byte, and number of bytes, of a part of a file."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end - byte_range.start
    if isinstance(byte_range, SuffixByteRequest):
        start = max(0, size - byte_range.suffix)
        return start, size - start
    if isinstance(byte_range, OffsetByteRequest):
        return byte_range.offset, max(0, size - byte_range.offset)
    return 0, size


def _read_local(root: Path, key: str, byte_range: ByteRequest | None, most_bytes: int) -> bytes | None:
    """A regular file. What is none, or a link that leads nowhere, is not taken for a file that is missing."""
    path = root / key
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.name not in METADATA:
            _refuse_irregular_folder(root, path.parent)
        return None
    with open_regular(path, most_bytes) as file:
        start, length = _cut(byte_range, os.fstat(file.fileno()).st_size)
        file.seek(start)
        return file.read(length)


def _refuse_irregular_folder(root: Path, folder: Path) -> None:
    """Raise ValueError where something else lies in the place of a folder, or of one above it."""
    while folder != root and not folder.is_dir():
        if os.path.lexists(folder):
            raise ValueError(f"{folder.relative_to(root)} is no folder")
        folder = folder.parent


def _walk(root: Path, prefix: str) -> Iterator[str]:
    for folder, _, names in os.walk(root / prefix):
        inside = Path(folder).relative_to(root).as_posix()
        yield from (f"{inside}/{name}" for name in names)


def _archive(store: ZipStore) -> zipfile.ZipFile:
    if not store._is_open:
        store._sync_open()
    return store._zf


def _read_member(store: ZipStore, key: str, byte_range: ByteRequest | None, most_bytes: int) -> bytes | None:
    """A file of a zip, whatever the zip says that it unpacks into."""
    archive = _archive(store)
    try:
        member = archive.getinfo(key)
    except KeyError:
        return None
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without end
        raise ValueError(f"{key} is neither stored nor deflated in its zip")
    if member.file_size > most_bytes:
        raise ValueError(f"{key} has {member.file_size} bytes; at most {most_bytes} are read")
    start, length = _cut(byte_range, member.file_size)
    with store._lock, archive.open(member) as file:
        file.seek(start)
        return file.read(length)


async def _read_remote(store: FsspecStore, key: str, byte_range: ByteRequest | None, most_bytes: int) -> bytes | None:
    """A file of a file system of fsspec, which says first how large it is."""
    path = f"{store.path.rstrip('/')}/{key}" if store.path else key
    try:
        found = await store.fs._info(path)
        if found.get("type") != "file" or found.get("size") is None:
            raise ValueError(f"{key} is no file of a known size")
        if found["size"] > most_bytes:
            raise ValueError(f"{key} has {found['size']} bytes; at most {most_bytes} are read")
        start, length = _cut(byte_range, found["size"])
        return bytes(await store.fs._cat_file(path, start=start, end=min(start + length, found["size"])))
    except store.allowed_exceptions:
        return None
