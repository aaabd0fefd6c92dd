"""Computes from the first bytes of a compressed chunk what it would unpack into.

Knows bytes. Knows neither stores nor arrays.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COMPRESSORS = {"blosc", "gzip", "lz4", "zlib", "zstd"}
ENTRY = 16
"""Bytes of the index of a shard for each of its chunks: offset and size."""
CHECKSUM = 4


class Packing(NamedTuple):
    """How the chunks of an array are packed."""

    compressor: str | None
    chunk_bytes: int
    """Decoded."""
    chunks_in_shard: int | None
    """None without shards."""
    encoded_bytes: int
    """Of a chunk that is unpacked, before its filters are undone."""

    @property
    def file_bytes(self) -> int:
        """Decoded size of what one file holds: a chunk, or a whole shard."""
        return self.chunk_bytes * (self.chunks_in_shard or 1)

    @property
    def most_packed(self) -> int:
        """A chunk takes no more bytes than this, even where its compressor gains nothing."""
        return self.encoded_bytes + self.encoded_bytes // 128 + 4096

    @property
    def most_stored(self) -> int:
        """A file takes no more bytes than this."""
        return self.most_packed + (self.chunks_in_shard or 0) * (self.most_packed + ENTRY) + CHECKSUM


def refuse_bomb(packed: memoryview, packing: Packing) -> None:
    """Raise ValueError when a packed chunk would unpack into more than it should."""
    limit = packing.encoded_bytes + 64  # checksums of filters
    if packing.compressor in ("gzip", "zlib"):
        stream = zlib.decompressobj(wbits=47)  # either
        unpacked = len(stream.decompress(packed, limit + 1))
        if len(stream.unused_data) > CHECKSUM:  # another stream
            raise ValueError("the checksum does not match, or more than one stream was found")
    else:
        unpacked = _unpacked_size(packing.compressor, packed)
    if unpacked > limit:
        raise ValueError(f"a chunk would unpack into {unpacked} bytes or more; it should have {packing.encoded_bytes}")


def chunks_of_shard(shard: memoryview, count: int) -> Iterator[memoryview]:
    """The packed chunks within a shard, as its index says; raises ValueError where it has none."""
    if len(shard) < ENTRY * count + CHECKSUM:
        raise ValueError(f"a shard has {len(shard)} bytes, fewer than its index of {count} chunks")
    index = np.frombuffer(shard[len(shard) - ENTRY * count - CHECKSUM : -CHECKSUM], "<u8")
    for offset, size in index.reshape(-1, 2).tolist():
        if offset != 2**64 - 1:
            yield shard[offset : offset + size]


def _unpacked_size(compressor: str | None, packed: memoryview) -> int:
    """What the header of a packed chunk says; too much where it says nothing."""
    if compressor == "blosc":  # version, version, flags, typesize, nbytes
        return int.from_bytes(packed[4:8], "little")
    if compressor == "lz4":  # numcodecs puts the size first
        return int.from_bytes(packed[:4], "little")
    if compressor == "zstd":
        return sum(_frames(packed))
    return len(packed)


def _frames(packed: memoryview) -> Iterator[int]:
    """What each frame of zstd says that it unpacks into (RFC 8878, 3.1.1); too much where it says nothing. Behind the
    last one, and where a frame is damaged, its decoder says so."""
    while bytes(packed[:4]) == b"\x28\xb5\x2f\xfd" or bytes(packed[1:4]) == b"\x2a\x4d\x18":
        if packed[0] != 0x28:  # to be skipped
            packed = packed[8 + int.from_bytes(packed[4:8], "little") :]
            continue
        if len(packed) < 6:
            return
        flags, single, checksum = packed[4] >> 6, packed[4] >> 5 & 1, packed[4] >> 2 & 1
        if flags == 0 and not single:
            yield 2**64
            return
        start = 5 + (not single) + (0, 1, 2, 4)[packed[4] & 3]
        stop = start + (1, 2, 4, 8)[flags]
        yield int.from_bytes(packed[start:stop], "little") + (256 if flags == 1 else 0)
        packed, last = packed[stop:], False
        while not last and len(packed) >= 3:
            block = int.from_bytes(packed[:3], "little")
            last, kind = bool(block & 1), block >> 1 & 3
            packed = packed[3 + (1 if kind == 1 else block >> 3) :]  # one byte that is repeated
        packed = packed[CHECKSUM * checksum :]
