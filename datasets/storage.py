"""Where a store lies and how its arrays are laid out: zarr groups in folders, zips and behind URLs; a lock; new arrays.

Knows zarr and files. Knows no episodes.
"""

import math
import os
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, GroupNotFoundError
from zarr.storage import ZipStore

from diffusion_policy.datasets.guard import LARGEST_CHUNK, collect_async

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second writer away
    fcntl = None

CHUNK_BYTES = 2**19
"""Decoded size of a chunk of wide rows: large enough to read fast, small enough to hold several in memory."""
CHUNK_ROWS = 16384
"""Most rows in a chunk: some hundred episodes, so that many small episodes do not become many small files."""
NAME = re.compile(r"[^./\\][^/\\]*")
"""Names that are read: no hidden files, no way out of the store."""


class StoreError(ValueError):
    """A data set cannot be read or written; the message says what is wrong and where."""


def open_group(location: str, mode: Literal["r", "r+"]) -> zarr.Group:
    """The zarr group at a path or URL; raises StoreError."""
    try:
        if location.endswith(".zip"):
            return _open_zip(location)
        if Path(location).is_file():
            raise FileNotFoundError
        return zarr.open_group(location, mode=mode)
    except ImportError as error:
        raise StoreError(f"cannot open {location}: {error}") from error
    except (FileNotFoundError, GroupNotFoundError, ContainsArrayError) as error:
        hint = "; other formats come in with: dataset convert" if Path(location).exists() else ""
        raise StoreError(f"no data set at {location}: there is no zarr group{hint}") from error
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"cannot open {location}: {say(error)}") from error


def _open_zip(location: str) -> zarr.Group:
    """The group in a zip file, which may lie in a folder of it; a file behind a URL is fetched whole."""
    path = fsspec.open_local(f"simplecache::{location}") if "://" in location else location
    with zipfile.ZipFile(str(path)) as archive:
        files = archive.infolist()
    if any(file.file_size > LARGEST_CHUNK for file in files):
        raise StoreError(f"{location} holds a file of more than {LARGEST_CHUNK / 2**20:.0f} MB, which no store has")
    ends = (re.fullmatch(r"(.*?)/?meta/episode_ends/(zarr\.json|\.zarray)", file.filename) for file in files)
    root = next((match[1] for match in ends if match), "")
    return zarr.open_group(ZipStore(str(path), mode="r"), mode="r", path=root)


def lock(path: Path) -> Callable[[], object]:
    """Keep other writers away from a folder until this is called or the process ends; raises StoreError."""
    if fcntl is None:
        return lambda: None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"{path} is being written by another process; wait for it, or collect into another store and join them "
            "with: dataset merge"
        ) from None
    return partial(os.close, descriptor)


def create_array(group: zarr.Group, path: str, like: np.ndarray, fill_value: float | None = None) -> None:
    """An array with a checksum on every chunk, each chunk one file. Rows that were never written are NaN where there is
    a NaN."""
    if fill_value is None:
        fill_value = math.nan if like.dtype.kind == "f" else 0
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes(like.shape[1:], like.dtype))))
    group.create_array(
        path,
        shape=like.shape,
        dtype=like.dtype,
        chunks=(rows, *(max(1, n) for n in like.shape[1:])),
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=[BloscCodec(cname="zstd", clevel=3), Crc32cCodec()],
        fill_value=fill_value,
    )


def list_names(group: zarr.Group, folder: str) -> list[str]:
    """Names of the members of a folder within a group, sorted, whether they can be opened or not; none where the place
    cannot be listed, as on most web servers."""
    try:
        found = sync(collect_async(group.store.list_dir(f"{group.path}/{folder}".strip("/"))))
    except (NotImplementedError, OSError):
        return []
    names = {name.rstrip("/") for name in found}
    return sorted(name for name in names if NAME.fullmatch(name) and name != "zarr.json" and ".partial" not in name)


def row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Size of one row of an array."""
    return math.prod(shape) * dtype.itemsize


def say(error: Exception) -> str:
    """An error of a library, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"
