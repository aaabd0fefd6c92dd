"""Where a program writes: fresh folders, held against other processes, and paths that stay what they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_policy.config import ConfigError

if TYPE_CHECKING:
    pass

MOST_FILMED = 16
"""Episodes in one video: they are tiles of one picture."""


def anchor(command: object) -> None:
    """Make the paths of a command absolute: a simulator may change the working folder."""
    for option in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        value = getattr(command, option.name)
        if isinstance(value, Path):
            object.__setattr__(command, option.name, value.absolute())


def require_fresh(path: Path) -> None:
    """Raise ConfigError when an output exists and holds anything."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} already holds something; choose another --output or delete it first")


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make an output folder, and keep other processes away from it; raises StoreError where one holds it."""
    from diffusion_policy.datasets.storage import lock

    folder.mkdir(parents=True, exist_ok=True)
    unlock = lock(folder, "choose another --output")
    try:
        yield
    finally:
        unlock()


def require_video(video: Path | None, episodes: int) -> None:
    """Raise ConfigError where so many episodes cannot be filmed into this file."""
    if video is None:
        return
    if episodes > MOST_FILMED:
        raise ConfigError(f"a --video shows at most {MOST_FILMED} episodes; got {episodes}")
    if video.suffix not in (".mp4", ".gif"):
        raise ConfigError(f"--video must end in .mp4 or .gif; got {video}")
    if video.exists():
        raise ConfigError(f"{video} already exists; choose another --video or delete it first")
