"""safetensors that a stranger may have made, read within bounds and never trusted.

Everything is checked before it takes memory: that a file is a regular one, its size, its header; then its SHA-256. What
is wrong is a CheckpointError of one line. Knows neither policies nor what the files mean.
"""

import dataclasses
import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_policy.basics.files import FileError, open_regular, parse_json
from diffusion_policy.config import decode

MAX_HEADER_BYTES = 4 * 2**20
MAX_TENSORS_BYTES = 4 * 2**30
MAX_TENSORS = 4096
"""In a file."""
MAX_DIMENSIONS = 8
"""Axes of a tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""By their names in safetensors."""


class CheckpointError(FileError):
    """A checkpoint cannot be loaded or written; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a checkpoint says of one of its files."""

    sha256: str
    size: int
    """[bytes]"""


class Spec(NamedTuple):
    """A tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    specs: dict[str, Spec]
    """By name, in the order of their bytes."""
    size: int
    """Bytes before the first number."""


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file of a checkpoint; raises CheckpointError for anything else, and for what cannot be read."""
    try:
        with open_regular(path) as file:
            yield file
    except CheckpointError:
        raise
    except (FileError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        ) from error


def describe(path: Path) -> Recorded:
    """SHA-256 and size of a file; raises CheckpointError."""
    with open_file(path) as file:
        return Recorded(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


def read_header(file: BufferedReader, path: Path) -> Header:
    """What an open safetensors file says of itself, checked against its size: tensors follow each other without gaps
    up to the last byte. Raises CheckpointError."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if total < 8 or not 2 <= length <= total - 8:
            raise ValueError(f"its header would have {length} of {total} bytes")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; at most {MAX_HEADER_BYTES} are read")
        tree = parse_json(file.read(length))
        if type(tree) is not dict:
            raise ValueError("its header is no JSON object")
        tree.pop("__metadata__", None)
        if len(tree) > MAX_TENSORS:
            raise ValueError(f"it has {len(tree)} tensors; at most {MAX_TENSORS} are read")
        parts: dict[str, _Entry] = {name: decode(part, _Entry, reprlib.repr(name)) for name, part in tree.items()}
        end, specs = 0, {}
        for name, part in sorted(parts.items(), key=lambda item: item[1].data_offsets):
            specs[name] = part.spec(name)
            begin, end = end, end + math.prod(part.shape) * specs[name].dtype.itemsize
            if part.data_offsets != (begin, end):
                raise ValueError(f"{reprlib.repr(name)} lies at {part.data_offsets}; its shape needs {(begin, end)}")
        if 8 + length + end != total:
            raise ValueError(f"its tensors end at byte {8 + length + end} of {total}")
        if end > MAX_TENSORS_BYTES:
            raise ValueError(f"its tensors have {end} bytes; at most {MAX_TENSORS_BYTES} are read")
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file that can be read: {error}") from error
    return Header(specs, 8 + length)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def spec(self, name: str) -> Spec:
        if self.dtype not in DTYPES:
            dtype = reprlib.repr(self.dtype)
            raise ValueError(f"{reprlib.repr(name)} is of dtype {dtype}; known are {', '.join(DTYPES)}")
        if len(self.shape) > MAX_DIMENSIONS or any(size < 0 for size in self.shape):
            raise ValueError(f"{reprlib.repr(name)} has the shape {reprlib.repr(self.shape)}")
        return Spec(DTYPES[self.dtype], self.shape)


def read_tensors(
    path: Path, recorded: Recorded, check: Callable[[dict[str, Spec]], None] = lambda _: None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. `check` hears of them before they take any memory.

    Raises CheckpointError when the file is no regular one, too large, or not what was recorded.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size != recorded.size:
            raise _damaged(path)
        header = read_header(file, path)
        check(header.specs)
        file.seek(0)
        digest = hashlib.sha256(file.read(header.size))
        tensors = {}
        for name, spec in header.specs.items():
            tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)
            content = tensors[name].reshape(-1).view(torch.uint8).numpy()
            if file.readinto(content) != len(content):
                raise _damaged(path)
            digest.update(content)
        if digest.hexdigest() != recorded.sha256:
            raise _damaged(path)
    return tensors


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: its size or SHA-256 is not what config.json says")
