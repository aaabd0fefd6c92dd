"""Files that a stranger may have made: JSON and safetensors, read within bounds and never trusted.

Everything is checked before it takes memory: that a file is a regular one, its size, its header; then its SHA-256. What
is wrong is a CheckpointError of one line. Knows neither policies nor what the files mean.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import reprlib
import stat
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

MAX_JSON_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 4 * 2**20
MAX_TENSORS_BYTES = 4 * 2**30
MAX_TENSORS = 4096
"""In a file."""
MAX_DIMENSIONS = 8
"""Axes of a tensor."""
MAX_BRACKETS = 20_000
"""Lists and objects in JSON."""
MAX_DEPTH = 32
"""Levels of nested JSON."""
MAX_ITEMS = 1024
"""Items of a list whose type is known."""

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


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded or written; the message says why, in one line."""

    def __init__(self, message: str) -> None:
        message = " ".join(message.splitlines())
        super().__init__(message if len(message) < 1000 else f"{message[:1000]} ...")


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
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, or what a link to one leads to; raises CheckpointError for anything else, without waiting
    for it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: a device may act on that
            raise CheckpointError(f"{path} is no regular file")
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is no regular file")
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path) -> Any:
    """The JSON of a file; raises CheckpointError when it is too large, too deeply nested, or none."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read")
        content = file.read(size)
    try:
        return _parse(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _parse(content: bytes) -> Any:
    """JSON; raises ValueError or RecursionError where it is none, or too much."""
    brackets = content.count(b"[") + content.count(b"{")  # each becomes an object, which takes more than its byte
    if brackets > MAX_BRACKETS:
        raise ValueError(f"it has {brackets} lists and objects; at most {MAX_BRACKETS} are read")
    tree = json.loads(content.decode())
    _check_depth(tree)
    return tree


def _check_depth(tree: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            _check_depth(item, depth + 1)


T = TypeVar("T")


def from_json(value: Any, hint: type[T], where: str) -> T:
    """A JSON value as what a type hint asks for, through dataclasses and NamedTuples, whose fields must all be there
    and no others. `where` names the value in messages.

    Raises CheckpointError for wrong types; numbers of integers are no booleans and fit 64 bits. What the dataclasses
    themselves refuse is their own ValueError.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return from_json(value, option, where)
            except CheckpointError:
                continue
        raise _wrong(value, hint, where)
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        if type(value) is not dict:
            raise CheckpointError(f"{where} must be a JSON object; got {reprlib.repr(value)}")
        hints = _hints_of(hint)
        missing, unknown = [*(hints.keys() - value.keys())], [*(value.keys() - hints.keys())]
        if missing or unknown:
            problem = f"lacks {min(missing)!r}" if missing else f"has the unknown field {reprlib.repr(min(unknown))}"
            raise CheckpointError(f"{where} {problem}")
        return hint(**{name: from_json(value[name], part, f"{where}, {name}") for name, part in hints.items()})
    result: Any = value
    if origin is dict and type(value) is dict:
        result = {key: from_json(item, arguments[1], f"{where}, {reprlib.repr(key)}") for key, item in value.items()}
    elif origin is tuple and type(value) is list and len(value) <= MAX_ITEMS:
        parts = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(parts) != len(value):
            raise _wrong(value, hint, where)
        result = tuple(from_json(item, part, where) for item, part in zip(value, parts, strict=True))
    elif hint is float and type(value) is int and abs(value) < 2**63:
        result = float(value)
    elif type(value) is not (str if origin is Literal else hint) or (type(value) is int and abs(value) >= 2**63):
        raise _wrong(value, hint, where)
    return result


_hints_of = functools.cache(get_type_hints)


def _wrong(value: Any, hint: Any, where: str) -> CheckpointError:
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    return CheckpointError(f"{where} must be {name}; got {reprlib.repr(value)}")


def describe(path: Path) -> Recorded:
    """SHA-256 and size of a file."""
    with open_regular(path) as file:
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
        tree = _parse(file.read(length))
        if type(tree) is not dict:
            raise ValueError("its header is no JSON object")
        tree.pop("__metadata__", None)
        if len(tree) > MAX_TENSORS:
            raise ValueError(f"it has {len(tree)} tensors; at most {MAX_TENSORS} are read")
        parts = {name: from_json(part, _Entry, reprlib.repr(name)) for name, part in tree.items()}
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
    except (ValueError, RecursionError) as error:
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
    with open_regular(path) as file:
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


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
