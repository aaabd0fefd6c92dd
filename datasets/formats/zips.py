"""Opens zip archives of unknown origin within bounds.

Knows zips. Knows no format.
"""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from diffusion_policy.basics.files import FileError, open_regular
from diffusion_policy.datasets.formats.reading import starts_with
from diffusion_policy.datasets.locations import refuse_large_directory
from diffusion_policy.datasets.storage import StoreError


@contextlib.contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip to read; raises StoreError where its list of members is absurdly long, or what zipfile raises."""
    with open_regular(path) as file:
        refuse_large_directory(file, str(path))
        with zipfile.ZipFile(file) as archive:
            yield archive


def names_in_zip(path: Path) -> list[str]:
    """Names of the members of a zip; none where it is no zip, or one with too many."""
    if not starts_with(path, b"PK"):
        return []
    try:
        with opened_zip(path) as archive:
            return archive.namelist()
    except (StoreError, FileError, OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []
