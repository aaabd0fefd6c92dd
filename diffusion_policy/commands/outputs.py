"""The folder that a program writes into: one that is empty, and that no other process writes into."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffusion_policy.config import ConfigError
from diffusion_policy.datasets.storage import lock


def require_fresh(path: Path) -> None:
    """Raise ConfigError when an output exists and holds anything."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} already holds something; choose another --output or delete it first")


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make an output folder, and keep other processes away from it; raises StoreError where one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    unlock = lock(folder, "choose another --output")
    try:
        yield
    finally:
        unlock()
