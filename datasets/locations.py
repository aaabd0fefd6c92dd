"""Opens the zarr group of a store where it lies: in a folder, in a zip, or behind a URL.

Knows zarr's stores, zips and fsspec. Knows no episodes.
"""

import os
import tempfile
import weakref
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal

import fsspec
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, GroupNotFoundError
from zarr.storage import FsspecStore, ZipStore

from diffusion_policy.basics.files import open_regular
from diffusion_policy.datasets.durable import DurableFolder
from diffusion_policy.datasets.guarded_store import GuardedStore
from diffusion_policy.datasets.storage import StoreError, error_text, list_folder

LARGEST_FETCHED = 2**29
"""Bytes of a zip behind a URL."""
FETCHED_AT_A_TIME = 2**20
LARGEST_DIRECTORY = 2**25
"""Bytes of the list of a zip's members: some 300,000."""


def open_group(location: str, mode: Literal["r", "r+"], sync: bool = True) -> zarr.Group:
    """The zarr group at a path or URL, behind a guard; raises StoreError. `sync`: see `DurableFolder`.

    A consolidated copy of the metadata may have grown stale, so it is used only where a place cannot be listed, as most
    web servers; there it says what the place holds.
    """
    try:
        store, root = _find(location, mode, sync)
        guarded = GuardedStore(store)
        listed = mode == "r+" or list_folder(guarded, root).any
        return zarr.open_group(guarded, mode=mode, path=root, use_consolidated=False if listed else None)
    except ImportError as error:
        raise StoreError(f"cannot open {location}: {error}") from error
    except (FileNotFoundError, GroupNotFoundError, ContainsArrayError, NotADirectoryError) as error:
        hint = "; other formats come in with: dataset convert" if Path(location).exists() else ""
        raise StoreError(f"no dataset at {location}: there is no zarr group{hint}") from error
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"cannot open {location}: {error_text(error)}") from error


def _find(location: str, mode: Literal["r", "r+"], sync: bool) -> tuple[Store, str]:
    """What holds the files of a store, and the folder within."""
    if "::" in location:
        raise StoreError(f"{location} is a chain of file systems (::), which is not read; make a copy, and open that")
    location = location.removeprefix("file://") or location
    if location.endswith(".zip"):
        return _open_zip(location)
    if _on_web(location):
        return _web().WebStore(location), ""
    if "://" in location:
        return FsspecStore.from_url(location, read_only=True), ""
    if not Path(location).is_dir():
        raise FileNotFoundError(location)
    return DurableFolder(Path(location).absolute(), read_only=mode == "r", sync=sync), ""  # wherever one works later


def _on_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _web() -> ModuleType:
    """The module that asks web servers."""
    try:
        from diffusion_policy.datasets import web
    except ImportError as error:
        raise ImportError(f"it needs pip install 'diffusion-policy-toolkit[http]' ({error})") from error
    return web


def _open_zip(location: str) -> tuple[Store, str]:
    """A zip file, in which the store may lie in a folder; a file behind a URL is fetched whole."""
    if "://" in location:
        file = _fetch(location)
        try:
            refuse_large_directory(file, location)
            with zipfile.ZipFile(file) as archive:
                root = _root(archive.namelist())
        except BaseException:
            file.close()
            raise
        store = ZipStore(Path(location), mode="r")
        store.path = file  # pyright: ignore[reportAttributeAccessIssue]  (it has no name; zipfile takes either)
        weakref.finalize(store, file.close)
        return store, root
    if not os.path.lexists(location):
        raise FileNotFoundError(location)
    with open_regular(location) as file:
        refuse_large_directory(file, location)
        with zipfile.ZipFile(file) as archive:
            return ZipStore(Path(location).absolute(), mode="r"), _root(archive.namelist())


def _fetch(url: str) -> BinaryIO:
    """What lies behind a URL, in a temporary file that is gone when it is closed, however the process ends."""
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115  (the caller's)
    try:
        if _on_web(url):
            sync(_web().download(url, file, LARGEST_FETCHED))
        else:
            system, path = fsspec.core.url_to_fs(url)
            size = system.info(path).get("size")
            if size is None or size > LARGEST_FETCHED:
                raise StoreError(f"{url} has {size} bytes; at most {LARGEST_FETCHED} are fetched; make a copy first")
            with system.open(path, "rb") as remote:
                for _ in range(0, size, FETCHED_AT_A_TIME):
                    file.write(remote.read(FETCHED_AT_A_TIME))
    except BaseException:
        file.close()
        raise
    return file


def refuse_large_directory(file: BinaryIO, location: str) -> None:
    """Raise StoreError for a zip whose list of members takes more memory than any store's."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 2**16 - 100))
    tail = file.read()
    at, at64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")  # the record at the end, and that of large files
    size = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if size == 2**32 - 1 and at64 >= 0:
        size = int.from_bytes(tail[at64 + 40 : at64 + 48], "little")
    if size > LARGEST_DIRECTORY:
        raise StoreError(f"{location} has a list of members of {size} bytes; at most {LARGEST_DIRECTORY} are read")
    file.seek(0)


def _root(names: list[str]) -> str:
    """The folder of a zip in which the store lies."""
    for name in names:
        for ends in ("meta/episode_ends/zarr.json", "meta/episode_ends/.zarray"):
            if name == ends or name.endswith(f"/{ends}"):
                return name.removesuffix(ends).rstrip("/")
    return ""
