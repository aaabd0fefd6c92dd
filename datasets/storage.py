"""What all that reads or writes a store shares: its errors, its lock, the names in it, new arrays.

Knows zarr and files. Knows no episodes.
"""

import asyncio
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from diffusion_policy.basics.images import is_image
from diffusion_policy.basics.text import one_line
from diffusion_policy.datasets.guard import collect_async
from diffusion_policy.datasets.guarded_store import GuardedStore, Listing, gather

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second writer away
    fcntl = None

CHUNK_BYTES = 2**19
"""Decoded size of a chunk of wide rows: large enough to read fast, small enough to hold several in memory."""
CHUNK_ROWS = 16384
"""Most rows in a chunk: some hundred episodes, so that many small episodes do not become many small files."""
IMAGE_CHUNK_BYTES = 2**17
"""Decoded size of a chunk of images, at least one: four of 96 x 96 in colour. A window of two then decodes five images
on average, and four in a row still pack better than one."""
IMAGE_SHARD_BYTES = 2**23
"""Decoded size of a file of images. An append writes the last file anew, so this bounds what it costs, except ..."""
IMAGE_SHARD_ROWS = 64
"""... that a file has at least so many images, so that a million steps are at most some 16,000 files ..."""
LARGEST_IMAGE_SHARD = 2**26
"""... and that no file is larger than this, one image apart."""
KEY = re.compile(r"(?!zarr\.json$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""Names that are written."""
MOST_BEYOND = 2**24
"""Rows beyond the length of an array that are looked at."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""Files that zarr had not yet finished."""
NAME = re.compile(r"[^./\\][^/\\]*")
"""Names that are read: no hidden files, no way out of the store."""


NAMES_SAID = 20
"""Of the names in a folder."""


class StoreError(ValueError):
    """A dataset cannot be read or written; the message says what is wrong and where, in one printable line whatever
    names and texts a file holds."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message), 1000))


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


def refuse_links(path: Path) -> None:
    """Raise StoreError for a folder that holds links, through which one would write elsewhere."""
    if any(file.is_symlink() for file in path.rglob("*")):
        raise StoreError(f"{path} holds links, which may lead out of it; make a copy with: dataset convert")


def create_array(group: zarr.Group, path: str, like: np.ndarray, fill_value: float | None = None) -> None:
    """An array with a checksum on every chunk, each chunk one file; many chunks of images are one file. Rows that were
    never written are NaN where there is a NaN."""
    if fill_value is None:
        fill_value = math.nan if like.dtype.kind == "f" else 0
    row = like.shape[1:]
    shard_rows = None
    if is_image(row):
        rows, shard_rows = image_rows(row_bytes(row, like.dtype))
        # Of Blosc's codecs lz4hc unpacks images fastest, and blank ones into no more than 255 times their size, which
        # a guard cannot mistake for a bomb. Bit planes, zarr's default for bytes, pack images worse than no shuffle.
        blosc = BloscCodec(cname="lz4hc", clevel=5, shuffle="noshuffle" if like.dtype.itemsize == 1 else "shuffle")
    else:
        rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(1, row_bytes(row, like.dtype))))
        blosc = BloscCodec(cname="zstd", clevel=3)
    group.create_array(
        path,
        shape=like.shape,
        dtype=like.dtype,
        chunks=(rows, *(max(1, n) for n in row)),
        shards=None if shard_rows is None else (shard_rows, *row),
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=[blosc, Crc32cCodec()],
        fill_value=fill_value,
    )


def image_rows(image_bytes: int) -> tuple[int, int]:
    """How many images of so many bytes a chunk holds, and how many a file, which is some whole chunks."""
    rows = max(1, IMAGE_CHUNK_BYTES // image_bytes)
    in_file = min(max(IMAGE_SHARD_ROWS, IMAGE_SHARD_BYTES // image_bytes), max(1, LARGEST_IMAGE_SHARD // image_bytes))
    return rows, rows * max(1, in_file // rows)


def rows_beyond(array: zarr.Array) -> np.ndarray:
    """Rows in the stored chunks of an array that is trusted that lie beyond the length that its metadata say; none
    where the place cannot be listed."""
    store, path = array.store_path.store, array.store_path.path
    try:
        stored = set(sync(collect_async(store.list_prefix(f"{path}/"))))
    except (NotImplementedError, OSError):
        stored = set()
    length, rows = array.shape[0], (array.shards or array.chunks)[0]
    chunk = first = length // rows
    while f"{path}/{array.metadata.encode_chunk_key((chunk,))}" in stored and (chunk + 1 - first) * rows <= MOST_BEYOND:
        chunk += 1
    if chunk == first:
        return np.empty(0, array.dtype)
    return sync(
        gather(zarr.AsyncArray(array.metadata.update_shape((chunk * rows,)), array.store_path), length, chunk * rows)
    )


def drop_consolidated(group: zarr.Group) -> bool:
    """Write the metadata of a group of zarr v3, and of its folders, without a consolidated copy of those within, which
    does not know what is appended; whether there was one."""
    found = False
    for folder in ("", "data", "meta"):
        path = Path(folder) / "zarr.json"
        metadata = sync(group.store.get(path.as_posix(), default_buffer_prototype()))
        if metadata is not None and re.search(rb'"consolidated_metadata"\s*:\s*\{', metadata.to_bytes()):
            inner = zarr.open_group(group.store, path=folder, mode="r+", use_consolidated=False)
            inner.update_attributes({})  # written as it was opened: without
            found = True
    return found


def unfinished_files(location: str) -> list[Path]:
    """Files in a folder that zarr had not finished when its process ended."""
    if "://" in location or not Path(location).is_dir():
        return []
    return sorted(file for file in Path(location).rglob("*.partial") if TEMPORARY.search(file.name))


def list_names(group: zarr.Group, folder: str) -> Sequence[str]:
    """Names of the members of a folder within a group, sorted, whether they can be opened or not. Where the place
    cannot be listed, as most web servers, those of the consolidated copy of its metadata, if there is one."""
    return list_folder(group.store, f"{group.path}/{folder}".strip("/")).names or _consolidated_names(group, folder)


def can_be_listed(group: zarr.Group) -> bool:
    """Whether the place of a group says what it holds."""
    return list_folder(group.store, group.path).any


def list_folder(store: Store, folder: str) -> Listing:
    """What there is in a folder; nothing where the place cannot be listed. A reader asks once."""
    assert isinstance(store, GuardedStore)
    if folder not in store.listed or not store.read_only:
        try:
            names = {name.rstrip("/") for name in sync(collect_async(store.list_dir(folder)))}
        except (NotImplementedError, OSError):
            names = set()
        except ValueError as error:
            raise StoreError(f"the store {error}") from error
        known = (name for name in names if NAME.fullmatch(name) and name != "zarr.json" and not TEMPORARY.search(name))
        store.listed[folder] = Listing(bool(names), sorted(known))
    return store.listed[folder]


def _consolidated_names(group: zarr.Group, folder: str) -> list[str]:
    if group.metadata.consolidated_metadata is None:
        return []
    paths = [path for path, _ in group.members(max_depth=None)]
    inside = [path.removeprefix(f"{folder}/" if folder else "") for path in paths if path.startswith(folder)]
    return [name for name in inside if name and "/" not in name]


def row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Size of one row of an array."""
    return math.prod(shape) * dtype.itemsize


def say_names(names: Sequence[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - NAMES_SAID} more" if len(names) > NAMES_SAID else ""
    return ", ".join(names[:NAMES_SAID]) + more or "nothing"


def error_text(error: Exception) -> str:
    """An error of a library, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__}: {text}"


def settle() -> None:
    """Wait until zarr has done or given up what it began: where one chunk cannot be written, it leaves the others under
    way, and says so at length when the interpreter ends."""

    async def wait() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    sync(wait(), timeout=20)


def remove_begun(folder: Path) -> None:
    """Delete what was begun and failed. Threads of zarr may go on writing for a moment, and make it anew."""
    absent = 0
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.02)
