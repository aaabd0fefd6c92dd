"""Checks an array of unknown origin before any of its bytes is decoded: it must hold numbers, use known codecs, and
have chunks that are stored, of limited size, and that do not unpack into more. So nothing is unpickled, and neither
metadata nor a small file can fill the memory.

Knows zarr arrays. Knows no episodes.
"""

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from diffusion_policy.datasets.guarded_store import GuardedStore, gather
from diffusion_policy.datasets.packing import COMPRESSORS, Packing
from diffusion_policy.datasets.shards import lies_in_shards, read_in_shards

CODECS = COMPRESSORS | {"bytes", "crc32c", "sharding_indexed", "transpose"}
"""Codecs of zarr v2 and v3 that turn bytes into bytes or numbers ..."""
FILTERS = {"crc32", "crc32c", "delta", "fletcher32", "shuffle"}
"""... and those that may stand before them in v2."""
LARGEST_CHUNK = 2**28
"""Bytes of a decoded chunk; the usual ones have about 2^20."""
MOST_AXES = 32
"""Axes of an array."""
LARGEST_GAP = 2**28
"""Bytes that an array may have at most where some of its chunks are left out, which stands for a constant ..."""
MOST_PLACES = 2**13
"""... and most places in its grid then."""
MOST_IN_SHARD = 2**14
"""Chunks in a shard: each costs zarr a task, and it reads several shards at once."""
MOST_CHUNKS = 2**20
"""Of an array, those in shards counted ..."""
MOST_TINY_CHUNKS = 2**16
"""... and most where they have on average less than ..."""
TINY_CHUNK = 2**9
"""... so many bytes: each takes zarr some time, however little is in it."""
IMAGE_CHUNK = 2**16
"""Chunks of so many bytes on average, as those of images, may be as many as there are."""


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
    if array.ndim > MOST_AXES:
        raise ValueError(f"has {array.ndim} axes; at most {MOST_AXES} are read")
    if 0 in array.shape[1:]:
        raise ValueError(f"has rows without numbers, of shape {array.shape[1:]}")
    stored_shape = array.shards or array.chunks
    chunk_bytes = math.prod(stored_shape) * array.dtype.itemsize
    if chunk_bytes > LARGEST_CHUNK:
        raise ValueError(f"has chunks of {chunk_bytes / 2**20:.0f} MB; at most {LARGEST_CHUNK / 2**20:.0f} are read")
    if array.shards and math.prod(array.shards) // math.prod(array.chunks) > MOST_IN_SHARD:
        raise ValueError(f"has shards of more than {MOST_IN_SHARD} chunks")
    size = rows * math.prod(array.shape[1:]) * array.dtype.itemsize
    count = math.prod(_grid(array, rows, array.chunks))
    most = MOST_CHUNKS if size >= count * TINY_CHUNK else MOST_TINY_CHUNKS
    if count > most and size < count * IMAGE_CHUNK:
        raise ValueError(f"has {count} chunks of some {size // count} bytes; at most {most} of those are read")
    missing = next(missing_chunks(array, rows, complete), None)
    if missing is not None and (complete or size > LARGEST_GAP or math.prod(_grid(array, rows)) > MOST_PLACES):
        raise ValueError(f"is damaged: its chunk {array.metadata.encode_chunk_key(missing)} is missing")
    trust(array)


def trust(array: zarr.Array) -> None:
    """Let the chunks of an array be read, as far as they unpack into what its metadata say."""
    store = array.store_path.store
    if isinstance(store, GuardedStore):
        store.packings[array.store_path.path] = _packing(array)


def read_rows(array: zarr.Array, start: int, stop: int) -> np.ndarray:
    """Some rows of an array that is trusted, (stop - start, ...); raises what its files make zarr raise, and leaves no
    thread of it at work."""
    return read_in_shards(array, start, stop) if lies_in_shards(array) else sync(gather(array.async_array, start, stop))


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


def _grid(array: zarr.Array, rows: int, chunks: tuple[int, ...] | None = None) -> list[int]:
    """How many stored chunks, or chunks of another shape, the first `rows` rows have along each axis."""
    sizes = zip((rows, *array.shape[1:]), chunks or array.shards or array.chunks, strict=True)
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


def _packing(array: zarr.Array) -> Packing:
    compressors = [name for name in codec_names(array) if name in COMPRESSORS]
    if len(compressors) > 1:
        raise ValueError(f"is compressed more than once, with {', '.join(compressors)}")
    compressor = compressors[0] if compressors else None
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    if array.shards is None:
        return Packing(compressor, chunk_bytes, None, _encoded_bytes(array, chunk_bytes))
    sharding: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]  # pyright: ignore[reportAttributeAccessIssue]
    index = sharding[0].get("configuration", {}) if len(sharding) == 1 else {}
    names = [codec["name"] for codec in index.get("index_codecs", ())]
    if names != ["bytes", "crc32c"] or index.get("index_location", "end") != "end":
        raise ValueError("has shards of an unusual form; only an index at the end, with a crc32c, is read")
    return Packing(compressor, chunk_bytes, math.prod(array.shards) // math.prod(array.chunks), chunk_bytes)


def _encoded_bytes(array: zarr.Array, chunk_bytes: int) -> int:
    """What a chunk has before its filters are undone. Only the differences of one delta may have another size than the
    numbers, since several in a row would grow without bound."""
    filters: Any = (array.metadata.filters or ()) if array.metadata.zarr_format == 2 else ()
    sizes = [(one.astype.itemsize, one.dtype.itemsize) for one in filters if one.codec_id == "delta"]
    sizes = [size for size in sizes if size[0] != size[1]]
    if len(sizes) > 1:
        raise ValueError("has more than one delta that changes the size of its numbers; one is read")
    return chunk_bytes * sizes[0][0] // sizes[0][1] if sizes else chunk_bytes
