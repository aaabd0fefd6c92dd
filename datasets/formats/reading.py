"""What readers of files of unknown origin share: optional libraries, limits of size, errors of one line.

Knows files. Knows no format.
"""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion_policy.basics.files import FileError
from diffusion_policy.datasets.formats.format import Unusable
from diffusion_policy.datasets.storage import StoreError

EPISODE_BYTES = 2**28
"""An episode may always have so many bytes when it is unpacked ..."""
TIMES_STORED = 8
"""... and so many times the bytes of the files that hold all of them."""
PICTURE_BYTES = 2**31
"""All the pictures of an episode may have so many bytes when they are unpacked."""
MOST_COMPRESSED = 1100
"""No filter makes numbers much smaller than that."""


def library(name: str, what: str, extra: str = "formats") -> Any:
    """Import a library that a format needs, which an `extra` brings; raises StoreError where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = f"pip install 'diffusion-policy-toolkit[{extra}]'"
        raise StoreError(f"{what} need {name.split('.')[0]}: {hint} ({error})") from error


def check_sizes(row_bytes: int, lengths: Iterable[int], *paths: Path) -> None:
    """Raise StoreError where an episode, or all of them together, would unpack into more than files of these sizes
    reasonably hold."""
    lengths = [*lengths]
    largest = row_bytes * max(lengths, default=0)
    if largest > most_bytes(*paths):
        raise StoreError(
            f"an episode is too large: {say_too_large(largest, *paths)}; choose fewer arrays (--observation)"
        )
    if row_bytes * sum(lengths) > EPISODE_BYTES + MOST_COMPRESSED * sum(map(stored_bytes, paths)):
        raise StoreError(f"its rows would be {row_bytes * sum(lengths) / 1e9:.1f} GB, more than files of its size hold")


def check_pictures(row_bytes: int, lengths: Iterable[int]) -> None:
    """Raise StoreError where the pictures of an episode, `row_bytes` of a step, take more memory than is given. How
    many bytes a packed picture has says little of its size."""
    largest = row_bytes * max(lengths, default=0)
    if largest > PICTURE_BYTES:
        raise StoreError(
            f"the pictures of an episode would take {largest / 2**20:.0f} MB; at most {PICTURE_BYTES / 2**20:.0f} are "
            "read; choose fewer arrays (--observation)"
        )


def most_bytes(*paths: Path) -> int:
    """Bytes that an episode of these files may unpack into."""
    return max(EPISODE_BYTES, TIMES_STORED * sum(map(stored_bytes, paths)))


def stored_bytes(path: Path) -> int:
    """Bytes of a file that take room on the disk: a sparse file has fewer than it says."""
    found = path.stat()
    blocks = getattr(found, "st_blocks", 0) * 512
    return min(found.st_size, blocks) if blocks else found.st_size


def say_too_large(size: int, *paths: Path) -> str:
    """Why an array or an episode of these files is not read."""
    return f"it unpacks into {size / 2**20:.0f} MB; at most {most_bytes(*paths) / 2**20:.0f} are read of an episode"


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Turn a FileError into a StoreError."""
    try:
        yield
    except FileError as error:
        raise StoreError(str(error)) from error


@contextlib.contextmanager
def store_errors(location: str | Path, description: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged or foreign file into a StoreError of one line that names it."""
    try:
        with file_errors():
            yield
    except Unusable:
        raise
    except StoreError as error:
        if str(location) in str(error):
            raise
        raise StoreError(f"{location}: {error}") from error
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise StoreError(f"{location} cannot be read as {description}: {said[0][:500]}") from error


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a regular file begins with these bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
