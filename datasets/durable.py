"""Writes files that survive a loss of power: a file is on the disk before it gets its final name.

Knows files, and zarr's store of a folder. Knows no arrays and no episodes.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from diffusion_policy.basics.files import remove, sync, sync_folder

LONG = 7 * 24 * 3600
"""Seconds after which nobody works any more at what has not changed."""


class DurableFolder(LocalStore):
    """A folder of zarr's files. Each is written under a temporary name, put on the disk and then renamed, so that a
    name never stands for half a file; which names there are is put on the disk by `files.sync_folder`."""

    def __init__(self, root: Path | str, *, read_only: bool = False, sync: bool = True) -> None:
        """`sync`: whether files are put on the disk at once, not when the system sees fit."""
        super().__init__(root, read_only=read_only)
        self.sync = sync

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same folder."""
        return type(self)(self.root, read_only=read_only, sync=self.sync)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file, whole or not at all."""
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a file unless it is there: there is one writer."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file, whole or not at all."""
        self._check_writable()
        put(self.root / key, value.as_buffer_like(), self.sync)


def put(path: Path, content: Any, sync: bool) -> None:
    """Write a file under a temporary name (that of zarr's own), put it on the disk if asked to, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_tree(path: Path) -> None:
    """Put a file, or all that a folder holds, on the disk, which takes many files in about the time of one."""
    with ThreadPoolExecutor(16) as executor:
        list(executor.map(_put_on_disk, (path, *(path.rglob("*") if path.is_dir() else ()))))


def _put_on_disk(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        sync(path)


def make_parents(path: Path) -> None:
    """Make the folders above a path, on the disk too."""
    absent = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        sync_folder(folder.parent)


def unfinished_path(path: Path) -> Path:
    """Where a new folder or file is made that is renamed to `path` when it is whole: `.NAME.PLACE.PROCESS` beside it.
    What processes that are gone have left in such places is deleted."""
    remove_leftovers(path)
    return path.with_name(f".{path.name}.{place_of_processes()}.{os.getpid()}")


def remove_leftovers(path: Path) -> list[Path]:
    """Delete what processes that are gone had begun to make in the place of a path; returns what was there. What was
    begun elsewhere (another host, container or start of the system) is gone when it has not changed for a week."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    names = ((left, re.fullmatch(re.escape(f".{path.name}.") + r"([0-9a-f]{8})\.(\d+)", left.name)) for left in beside)
    gone = [left for left, name in names if name and _is_gone(left, name[1], int(name[2]))]
    for left in gone:
        remove(left)
    return gone


def place_of_processes() -> str:
    """Where numbers of processes mean the same, in 8 digits: a host, since it was started, and a container."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _is_gone(left: Path, place: str, process: int) -> bool:
    """Whether nobody works any more at what was begun."""
    if place == place_of_processes():
        return not _runs(process)
    try:
        changed = max(file.lstat().st_mtime for file in (left, *left.rglob("*")))
    except OSError:  # it changes now
        return False
    return time.time() - changed > LONG


def _runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True
