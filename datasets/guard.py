"""What an array of a stranger's store must be before one of its bytes is decoded: numbers, known codecs, chunks of a
sane size that are there. So nothing is unpickled, and metadata alone cannot make anything large.

Knows zarr arrays. Knows no episodes.
"""

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

CODECS = {"blosc", "bytes", "bz2", "crc32c", "gzip", "lz4", "lzma", "sharding_indexed", "transpose", "zlib", "zstd"}
"""Codecs that turn bytes into bytes or numbers, of zarr v2 and v3; delta and shuffle may stand before them in v2."""
FILTERS = {"crc32", "crc32c", "delta", "fletcher32", "shuffle"}
LARGEST_CHUNK = 2**29
"""Bytes of a decoded chunk; the usual ones have about 2^20."""
LARGEST_GAP = 2**28
"""Bytes that an array may have at most where some of its chunks are left out, which stands for a constant."""


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
    stored_shape = array.shards or array.chunks
    chunk_bytes = math.prod(stored_shape) * array.dtype.itemsize
    if chunk_bytes > LARGEST_CHUNK:
        raise ValueError(f"has chunks of {chunk_bytes / 2**20:.0f} MB; at most {LARGEST_CHUNK / 2**20:.0f} are read")
    size = rows * math.prod(array.shape[1:]) * array.dtype.itemsize
    missing = next(missing_chunks(array, rows), None)
    if missing is not None and (complete or size > LARGEST_GAP):
        raise ValueError(f"is damaged: its chunk {array.metadata.encode_chunk_key(missing)} is missing")


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


def missing_chunks(array: zarr.Array, rows: int) -> Iterator[tuple[int, ...]]:
    """Places in the chunk grid where the first `rows` rows have no stored chunk. Where a store cannot be listed (most
    web servers), only the first and the last place are looked at."""
    store, path = array.store_path.store, array.store_path.path
    stored_shape = array.shards or array.chunks
    grid = [math.ceil(n / size) for n, size in zip((rows, *array.shape[1:]), stored_shape, strict=True)]
    if math.prod(grid) == 0:
        return
    try:
        stored = set(sync(collect_async(store.list_prefix(f"{path}/"))))
    except (NotImplementedError, OSError):
        stored = set()
    flat = range(math.prod(grid)) if stored else {0, math.prod(grid) - 1}
    for index in flat:  # one after the other: an absurd shape has a gap soon, and is not walked to its end
        place = tuple(int(n) for n in np.unravel_index(index, grid))
        key = f"{path}/{array.metadata.encode_chunk_key(place)}"
        if key not in stored and (stored or not sync(store.exists(key))):
            yield place


async def collect_async(items: AsyncIterator[str]) -> list[str]:
    """What an asynchronous iterator yields."""
    return [item async for item in items]
