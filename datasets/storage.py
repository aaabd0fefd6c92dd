"""Where a store lies and how its arrays are laid out: zarr groups in folders, zips and behind URLs; a lock; new arrays.

Knows zarr and files. Knows no episodes.
"""

import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, GroupNotFoundError
from zarr.storage import FsspecStore, LocalStore, ZipStore

from diffusion_policy.datasets.guard import LARGEST_CHUNK, GuardedStore, collect_async

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second writer away
    fcntl = None

PATIENCE = 20
"""Seconds that a web server may be silent."""
CHUNK_BYTES = 2**19
"""Decoded size of a chunk of wide rows: large enough to read fast, small enough to hold several in memory."""
CHUNK_ROWS = 16384
"""Most rows in a chunk: some hundred episodes, so that many small episodes do not become many small files."""
KEY = re.compile(r"(?!zarr\.json$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""Names that are written."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""Files that zarr had not yet finished."""
NAME = re.compile(r"[^./\\][^/\\]*")
"""Names that are read: no hidden files, no way out of the store."""


class StoreError(ValueError):
    """A data set cannot be read or written; the message says what is wrong and where."""


def open_group(location: str, mode: Literal["r", "r+"]) -> zarr.Group:
    """The zarr group at a path or URL, behind a guard; raises StoreError."""
    try:
        store, root = _find(location, mode)
        return zarr.open_group(GuardedStore(store), mode=mode, path=root)
    except ImportError as error:
        raise StoreError(f"cannot open {location}: {error}") from error
    except (FileNotFoundError, GroupNotFoundError, ContainsArrayError, NotADirectoryError) as error:
        hint = "; other formats come in with: dataset convert" if Path(location).exists() else ""
        raise StoreError(f"no data set at {location}: there is no zarr group{hint}") from error
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"cannot open {location}: {say(error)}") from error


def _find(location: str, mode: Literal["r", "r+"]) -> tuple[Store, str]:
    """What holds the files of a store, and the folder within."""
    if location.endswith(".zip"):
        return _open_zip(location)
    if "://" in location:
        return FsspecStore.from_url(location, storage_options=_options(location), read_only=True), ""
    if not Path(location).is_dir():
        raise FileNotFoundError(location)
    return LocalStore(location, read_only=mode == "r"), ""


def _options(url: str) -> dict[str, Any]:
    """A web server that does not answer is given up after a while."""
    if not url.startswith(("http://", "https://")):
        return {}
    try:
        import aiohttp
    except ImportError as error:
        raise ImportError(f"it needs pip install 'diffusion-policy-toolkit[http]' ({error})") from error
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=PATIENCE, sock_read=PATIENCE)}}


def _open_zip(location: str) -> tuple[Store, str]:
    """A zip file, in which the store may lie in a folder; a file behind a URL is fetched whole."""
    path = location
    if "://" in location:
        protocol = location.partition("://")[0]
        options: Any = {protocol: _options(location)}
        path = str(fsspec.open_local(f"simplecache::{location}", **options))
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    if any(file.file_size > LARGEST_CHUNK for file in files):
        raise StoreError(f"{location} holds a file of more than {LARGEST_CHUNK / 2**20:.0f} MB, which no store has")
    ends = (re.fullmatch(r"(.*?)/?meta/episode_ends/(zarr\.json|\.zarray)", file.filename) for file in files)
    root = next((match[1] for match in ends if match), "")
    return ZipStore(path, mode="r"), root


Unlock = Callable[[], object]


def lock(path: Path, otherwise: str = "collect into another store and join them with: dataset merge") -> Unlock:
    """Keep other writers away from a folder until what is returned is called or the process ends; raises StoreError,
    with advice on what to do `otherwise` than to wait."""
    if fcntl is None:
        return lambda: None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise StoreError(f"{path} cannot be locked, so it cannot be written: {error}") from error
        raise StoreError(f"{path} is being written by another process; wait for it, or {otherwise}") from None
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
    return sorted(name for name in names if NAME.fullmatch(name) and name != "zarr.json" and not TEMPORARY.search(name))


def row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Size of one row of an array."""
    return math.prod(shape) * dtype.itemsize


def say(error: Exception) -> str:
    """An error of a library, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def remove(folder: Path) -> None:
    """Delete what was begun and failed. Threads of zarr may go on writing for a moment, and make it anew."""
    absent = 0
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.02)
