"""Files and JSON: reads files of unknown origin within bounds, without waiting; writes ours whole or not at all.

Only regular files, or what a link to one leads to, are opened: devices, pipes, sockets and folders are refused at once.
A file must not be larger than the reader allows; JSON is bounded before it is parsed. An error is a FileError of one
line. Imports nothing of ours, and only the standard library.
"""

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 4 * 2**20
"""A larger JSON file is refused unless its reader says otherwise."""
MAX_BRACKETS = 20_000
"""Lists and objects in JSON; each becomes an object, which takes far more than its byte."""
MAX_COMMAS = 2**19
"""Items in JSON, all together."""
MAX_DEPTH = 32
"""Levels of nested JSON."""
WRITING = ".writing-"
"""The name of a file begins with it until it is whole; after a kill such a file is worth nothing."""


class FileError(ValueError):
    """A file is missing, no regular one, too large, or not what it should be; the message says which, in one line."""

    def __init__(self, message: str) -> None:
        message = " ".join(message.split())
        super().__init__(message if len(message) < 1000 else f"{message[:1000]} ...")


def refuse_irregular(path: Path | str, most_bytes: int | None = None) -> int:
    """Size of a regular file, or of what a link to one leads to [bytes], without opening it. Raises FileError for
    anything else, and for more than `most_bytes`."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return _check(path, found, most_bytes)


@contextmanager
def open_regular(path: Path | str, most_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file, or what a link to one leads to. Raises FileError for anything else, without waiting for it,
    and for more than `most_bytes`."""
    refuse_irregular(path, most_bytes)  # before it is opened: a device may act on that
    try:
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  (closed below)
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        _check(path, os.fstat(file.fileno()), most_bytes)  # it may have been exchanged since
        yield file


def read_bytes(path: Path | str, most_bytes: int) -> bytes:
    """All of a regular file; raises FileError where it is none, or larger."""
    with open_regular(path, most_bytes) as file:
        try:
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error


Pairs = Callable[[list[tuple[str, Any]]], Any]
"""Makes an object of its keys and values."""


def read_json(
    path: Path | str, most_bytes: int = MAX_JSON_BYTES, most_brackets: int = MAX_BRACKETS, pairs: Pairs = dict
) -> Any:
    """The JSON of a regular file; raises FileError when that is too large, too deeply nested, or none."""
    content = read_bytes(path, most_bytes)
    try:
        return parse_json(content, most_brackets, pairs)
    except ValueError as error:
        raise FileError(f"{path} is not JSON that can be read: {error}") from error


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which a key stands once; raises ValueError where it was written twice, as by hand."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return found


def parse_json(content: bytes | str, most_brackets: int = MAX_BRACKETS, pairs: Pairs = dict) -> Any:
    """What JSON says; raises ValueError where it is none, nested too deeply, of too many parts (items grow in number
    with lists and objects), or holds text that no file could hold (half a surrogate pair)."""
    text = content.decode() if isinstance(content, bytes) else content
    brackets = text.count("[") + text.count("{")
    if brackets > most_brackets:
        raise ValueError(f"it has {brackets} lists and objects; at most {most_brackets} are read")
    most_commas = MAX_COMMAS * most_brackets // MAX_BRACKETS
    if text.count(",") > most_commas:
        raise ValueError(f"it has more than {most_commas} items")
    try:
        tree = json.loads(text, object_pairs_hook=None if pairs is dict else pairs)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    _check_depth(tree)
    if "\\ud" in text.lower():
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a surrogate pair, which is no text") from error
    return tree


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, whatever happens meanwhile: under another name, synced, then renamed. Raises
    FileError where it cannot be written (a full disk, say); what was there before is still there then."""
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        temporary.unlink(missing_ok=True)  # what a killed process left
        try:
            with open(temporary, "xb") as file:
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Delete a folder or a file of any kind, never opening one (a pipe would be waited for); what cannot be deleted
    stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where the system can."""
    with contextlib.suppress(OSError):
        sync(folder)


def format_json(tree: Any) -> str:
    """JSON that every reader understands, of our own results: numbers of numpy as plain ones, null for what is not
    finite, text for what JSON has no word for."""
    return json.dumps(plain(tree), indent=2, allow_nan=False) + "\n"


def plain(tree: Any) -> Any:
    """What JSON knows, see `format_json`."""
    if isinstance(tree, Mapping):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(item) for item in tree]
    if hasattr(tree, "tolist"):  # numpy's scalars and arrays
        return plain(tree.tolist())
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else None
    return tree if tree is None or isinstance(tree, bool | int | str) else str(tree)


def _check(path: Path | str, found: os.stat_result, most_bytes: int | None) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is no regular file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise FileError(f"{path} has {found.st_size} bytes; at most {most_bytes} are read")
    return found.st_size


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_depth(tree: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(tree, dict | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            _check_depth(item, depth + 1)
