"""What a stranger's array must be before one of its bytes is decoded: numbers, known codecs, chunks of a sane size that
are there and that do not unpack into more than they should. So nothing is unpickled, and neither metadata nor a small
file can make anything large.

Knows zarr arrays. Knows no episodes.
"""

import math
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

COMPRESSORS = {"blosc", "gzip", "lz4", "zlib", "zstd"}
CODECS = COMPRESSORS | {"bytes", "crc32c", "sharding_indexed", "transpose"}
"""Codecs of zarr v2 and v3 that turn bytes into bytes or numbers ..."""
FILTERS = {"crc32", "crc32c", "delta", "fletcher32", "shuffle"}
"""... and those that may stand before them in v2."""
METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
LARGEST_METADATA = 2**24
"""Bytes."""
LARGEST_CHUNK = 2**29
"""Bytes of a decoded chunk; the usual ones have about 2^20."""
LARGEST_GAP = 2**28
"""Bytes that an array may have at most where some of its chunks are left out, which stands for a constant ..."""
MOST_PLACES = 2**16
"""... and most places in its grid then; most chunks in a shard, too."""


def refuse_unsafe(array: zarr.Array, rows: int, complete: bool) -> None:
    """Raise ValueError, saying what is wrong, unless `rows` rows of the array can be decoded without fear.

    `complete`: every chunk of these rows must be stored, as our own writer does; other tools leave out chunks that
    hold nothing but the fill value.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"must hold numbers; got {array.dtype}")
    unknown = [name for name in codec_names(array) if name not in CODECS | FILTERS]
    if unknown:
        raise ValueError(f"is stored with {', '.join(unknown)}; known codecs are {', '.join(sorted(CODECS))}")
    if array.ndim == 0 or array.shape[0] < rows:
        raise ValueError(f"has {array.shape[0] if array.ndim else 'no'} rows; meta/episode_ends needs {rows}")
    if 0 in array.shape[1:]:
        raise ValueError(f"has rows without numbers, of shape {array.shape[1:]}")
    stored_shape = array.shards or array.chunks
    chunk_bytes = math.prod(stored_shape) * array.dtype.itemsize
    if chunk_bytes > LARGEST_CHUNK:
        raise ValueError(f"has chunks of {chunk_bytes / 2**20:.0f} MB; at most {LARGEST_CHUNK / 2**20:.0f} are read")
    if array.shards and math.prod(array.shards) // math.prod(array.chunks) > MOST_PLACES:
        raise ValueError(f"has shards of more than {MOST_PLACES} chunks")
    missing = next(missing_chunks(array, rows, complete), None)
    size = rows * math.prod(array.shape[1:]) * array.dtype.itemsize
    if missing is not None and (complete or size > LARGEST_GAP or math.prod(_grid(array, rows)) > MOST_PLACES):
        raise ValueError(f"is damaged: its chunk {array.metadata.encode_chunk_key(missing)} is missing")
    trust(array)


def trust(array: zarr.Array) -> None:
    """Let the chunks of an array be read, as far as they unpack into what its metadata say."""
    store = array.store_path.store
    if isinstance(store, GuardedStore):
        store.packings[array.store_path.path] = _packing(array)


def codec_names(array: zarr.Array) -> list[str]:
    """Names of all codecs of an array, those within shards included."""
    if array.metadata.zarr_format == 2:
        codecs = [*(array.metadata.filters or ()), array.metadata.compressor]
        return [str(codec.codec_id) for codec in codecs if codec is not None]
    return list(_names_within(codec.to_dict() for codec in array.metadata.codecs))


def _names_within(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"])
        configuration = codec.get("configuration") or {}
        yield from _names_within([*configuration.get("codecs", ()), *configuration.get("index_codecs", ())])


def _grid(array: zarr.Array, rows: int) -> list[int]:
    """How many stored chunks the first `rows` rows have along each axis."""
    sizes = zip((rows, *array.shape[1:]), array.shards or array.chunks, strict=True)
    return [math.ceil(length / size) for length, size in sizes]


def missing_chunks(array: zarr.Array, rows: int, complete: bool = True) -> Iterator[tuple[int, ...]]:
    """Places in the chunk grid where the first `rows` rows have no stored chunk. Where a store cannot be listed (most
    web servers) each place is asked for, or, unless `complete`, only the first and the last."""
    store, path = array.store_path.store, array.store_path.path
    grid = _grid(array, rows)
    if math.prod(grid) == 0:
        return
    try:
        stored = set(sync(collect_async(store.list_prefix(f"{path}/"))))
    except (NotImplementedError, OSError):
        stored = set()
    flat = range(math.prod(grid)) if stored or complete else {0, math.prod(grid) - 1}
    for index in flat:  # one after the other: an absurd shape has a gap soon, and is not walked to its end
        place = tuple(int(n) for n in np.unravel_index(index, grid))
        key = f"{path}/{array.metadata.encode_chunk_key(place)}"
        if key not in stored and (stored or not sync(store.exists(key))):
            yield place


async def collect_async(items: AsyncIterator[str]) -> list[str]:
    """What an asynchronous iterator yields."""
    return [item async for item in items]


# What a file may unpack into


class Packing(NamedTuple):
    """How the chunks of an array are packed."""

    compressor: str | None
    chunk_bytes: int
    """Decoded."""
    chunks_in_shard: int | None
    """None without shards."""


class GuardedStore(WrapperStore[Any]):
    """Hands on chunks of arrays that have passed `refuse_unsafe`, and none that would unpack into more than a chunk."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.packings: dict[str, Packing] = {}
        """By path of the array."""

    def _with_store(self, store: Any) -> "GuardedStore":
        guarded = GuardedStore(store)
        guarded.packings = self.packings
        return guarded

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The file, or a part of it; raises ValueError for what is not trusted."""
        if key.endswith(METADATA):
            size = await self._store.getsize(key) if await self._store.exists(key) else 0
            if size > LARGEST_METADATA:
                raise ValueError(f"{key} has {size / 2**20:.0f} MB; metadata have at most {LARGEST_METADATA // 2**20}")
            return await self._store.get(key, prototype, byte_range)  # pyright: ignore[reportCallIssue]
        packing = next((packing for path, packing in self.packings.items() if key.startswith(f"{path}/")), None)
        if packing is None:
            raise ValueError(f"{key} belongs to no array that was looked at")
        value = await self._store.get(key, prototype, byte_range)  # pyright: ignore[reportCallIssue]
        if value is not None:
            if packing.chunks_in_shard is None:
                refuse_bomb(memoryview(value.as_numpy_array()), packing)
            elif byte_range is None:
                for chunk in _chunks_of_shard(memoryview(value.as_numpy_array()), packing.chunks_in_shard):
                    refuse_bomb(chunk, packing)
            # else it is the index of a shard, or one of its chunks, of at most the size of the file
        return value


def _packing(array: zarr.Array) -> Packing:
    compressors = [name for name in codec_names(array) if name in COMPRESSORS]
    if len(compressors) > 1:
        raise ValueError(f"is compressed more than once, with {', '.join(compressors)}")
    compressor = compressors[0] if compressors else None
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    if array.shards is None:
        return Packing(compressor, chunk_bytes, None)
    sharding: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]  # pyright: ignore[reportAttributeAccessIssue]
    index = sharding[0].get("configuration", {}) if len(sharding) == 1 else {}
    names = [codec["name"] for codec in index.get("index_codecs", ())]
    if names != ["bytes", "crc32c"] or index.get("index_location", "end") != "end":
        raise ValueError("has shards of an unusual form; only an index at the end, with a crc32c, is read")
    return Packing(compressor, chunk_bytes, math.prod(array.shards) // math.prod(array.chunks))


def _chunks_of_shard(shard: memoryview, count: int) -> Iterator[memoryview]:
    """The packed chunks within a shard, as its index says."""
    index = np.frombuffer(shard[len(shard) - 16 * count - 4 : -4], "<u8")
    for offset, size in index.reshape(-1, 2).tolist():
        if offset != 2**64 - 1:
            yield shard[offset : offset + size]


def refuse_bomb(packed: memoryview, packing: Packing) -> None:
    """Raise ValueError when a packed chunk would unpack into more than its decoded size."""
    limit = packing.chunk_bytes + 64  # checksums of filters
    if packing.compressor in ("gzip", "zlib"):
        stream = zlib.decompressobj(wbits=47)  # either
        unpacked = len(stream.decompress(packed, limit + 1))
        if len(stream.unused_data) > 4:  # more than a checksum: another stream
            raise ValueError("the checksum does not match, or more than one stream was found")
    else:
        unpacked = _unpacked_size(packing.compressor, packed)
    if unpacked > limit:
        raise ValueError(f"a chunk would unpack into {unpacked} bytes or more; it should have {packing.chunk_bytes}")


def _unpacked_size(compressor: str | None, packed: memoryview) -> int:
    """What the header of a packed chunk says; too much where it says nothing."""
    if compressor == "blosc":  # version, version, flags, typesize, nbytes
        return int.from_bytes(packed[4:8], "little")
    if compressor == "lz4":  # numcodecs puts the size first
        return int.from_bytes(packed[:4], "little")
    if compressor == "zstd":  # RFC 8878, 3.1.1.1
        if len(packed) < 6 or bytes(packed[:4]) != b"\x28\xb5\x2f\xfd":
            return 0  # no frame; its decoder says so
        flags, single = packed[4] >> 6, packed[4] >> 5 & 1
        if flags == 0 and not single:
            return 2**64
        start = 5 + (not single) + (0, 1, 2, 4)[packed[4] & 3]
        size = int.from_bytes(packed[start : start + (1, 2, 4, 8)[flags]], "little")
        return size + 256 if flags == 1 else size
    return len(packed)
