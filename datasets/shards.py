"""Reads rows of an array whose chunks lie in shards, as this toolkit writes images, without zarr's task for each chunk,
which takes four times as long: a file is read whole, where much of it is wanted, and unpacked chunk by chunk.

Knows zarr arrays that are trusted. Knows no episodes.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from diffusion_policy.datasets.guarded_store import GuardedStore
from diffusion_policy.datasets.packing import CHECKSUM, ENTRY

CODECS = ["bytes", "blosc", "crc32c"]
"""Within a shard."""
ABSENT = 2**64 - 1
"""In the index, in place of a chunk that was never written."""
SHARE = 0.25
"""Of a file, from which on it is read whole."""


class Span(NamedTuple):
    """The rows of one file that are wanted."""

    file: int
    """Which file, from 0."""
    start: int
    stop: int
    """First row, and row after the last, in the array."""


def read_in_shards(array: zarr.Array, start: int, stop: int) -> np.ndarray:
    """Some rows of an array that is trusted, (stop - start, ...); raises ValueError for what is damaged, and what its
    files make zarr raise."""
    start, stop = max(0, start), min(stop, array.shape[0])
    rows = np.empty((max(0, stop - start), *array.shape[1:]), array.dtype)
    if len(rows):
        for span in _spans(array, start, stop):
            _read_file(array, span, rows[span.start - start : span.stop - start])
    return rows


def lies_in_shards(array: zarr.Array) -> bool:
    """Whether an array is one of those that are read here: chunks of whole rows, packed by Blosc alone."""
    if array.shards is None or array.chunks[1:] != array.shape[1:] or array.shards[1:] != array.shape[1:]:
        return False
    codecs: list[Any] = [codec.to_dict() for codec in array.metadata.codecs]  # pyright: ignore[reportAttributeAccessIssue]
    inner = codecs[0].get("configuration", {}).get("codecs", ()) if len(codecs) == 1 else ()
    little = array.dtype.itemsize == 1 or array.dtype.newbyteorder("<") == array.dtype
    ordered = all((codec.get("configuration") or {}).get("endian", "little") == "little" for codec in inner)
    guarded = isinstance(array.store_path.store, GuardedStore)
    return guarded and little and ordered and [codec["name"] for codec in inner] == CODECS


def _spans(array: zarr.Array, start: int, stop: int) -> Iterator[Span]:
    assert array.shards is not None
    in_file = array.shards[0]
    for file in range(start // in_file, math.ceil(stop / in_file)):
        yield Span(file, max(start, file * in_file), min(stop, (file + 1) * in_file))


def _read_file(array: zarr.Array, span: Span, out: np.ndarray) -> None:
    """Fill in the rows of one file."""
    assert array.shards is not None
    in_chunk, in_file = array.chunks[0], array.shards[0]
    name = array.metadata.encode_chunk_key((span.file, *[0] * (array.ndim - 1)))
    first = span.start - span.file * in_file
    chunks = range(first // in_chunk, math.ceil((first + len(out)) / in_chunk))
    whole = len(chunks) * in_chunk >= SHARE * in_file
    packed = sync(_fetch(array, f"{array.store_path.path}/{name}", chunks, in_file // in_chunk, whole))
    for i, content in zip(chunks, packed, strict=True):
        begin = i * in_chunk - first  # in `out`
        place = out[max(begin, 0) : begin + in_chunk]
        if content is None:
            place[:] = array.fill_value
        else:
            place[:] = _unpack(array, content, name)[max(-begin, 0) :][: len(place)]


async def _fetch(array: zarr.Array, key: str, chunks: range, count: int, whole: bool) -> list[memoryview | None]:
    """The packed chunks of a file that are wanted, None for one that was never written: of the `whole` file, or each by
    itself."""
    store, prototype = array.store_path.store, default_buffer_prototype()
    size = ENTRY * count + CHECKSUM
    content = await store.get(key, prototype, None if whole else SuffixByteRequest(size))
    if content is None:
        return [None] * len(chunks)
    held = memoryview(content.to_bytes())
    places = _index(held, count)[chunks.start : chunks.stop]

    async def fetch(offset: int, length: int) -> memoryview | None:
        if offset == ABSENT:
            return None
        if whole:
            return held[offset : offset + length]
        part = await store.get(key, prototype, RangeByteRequest(offset, offset + length))
        return None if part is None else memoryview(part.to_bytes())

    return [await fetch(offset, length) for offset, length in places]


def _index(shard: memoryview, count: int) -> list[list[int]]:
    """Offset and size of each chunk of a file; raises ValueError where its checksum does not match."""
    index = shard[len(shard) - ENTRY * count - CHECKSUM : -CHECKSUM]
    if google_crc32c.value(bytes(index)) != int.from_bytes(shard[-CHECKSUM:], "little"):
        raise ValueError("the checksum of the index of a shard does not match")
    return np.frombuffer(index, "<u8").reshape(-1, 2).tolist()


def _unpack(array: zarr.Array, packed: memoryview, name: str) -> np.ndarray:
    """The rows of one chunk."""
    if google_crc32c.value(bytes(packed[:-CHECKSUM])) != int.from_bytes(packed[-CHECKSUM:], "little"):
        raise ValueError(f"the checksum of a chunk of {name} does not match")
    rows = np.frombuffer(blosc.decompress(packed[:-CHECKSUM]), array.dtype)
    if rows.size != math.prod(array.chunks):
        raise ValueError(f"a chunk of {name} holds {rows.size} numbers; it should hold {math.prod(array.chunks)}")
    return rows.reshape(array.chunks)
