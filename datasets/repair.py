"""Repairs in place what `validate` finds. No episode changes, and a kill at any moment leaves the store as it was or
repaired.

Knows stores. Knows no policy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr

from diffusion_policy.datasets.arrays import ENDS, older
from diffusion_policy.datasets.consolidated import consolidated_is_stale
from diffusion_policy.datasets.durable import remove_leftovers
from diffusion_policy.datasets.guard import trust
from diffusion_policy.datasets.locations import open_group
from diffusion_policy.datasets.storage import (
    StoreError,
    drop_consolidated,
    error_text,
    list_names,
    lock,
    refuse_links,
    unfinished_files,
)
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.validate import Finding, validate


class Repaired(NamedTuple):
    """What was done to a store, and what is still wrong."""

    mended: tuple[str, ...]
    """A sentence each."""
    left: tuple[Finding, ...]
    """Serious findings that cannot be mended in place."""


def repair(path: Path | str) -> Repaired:
    """Mend a store in a folder; raises StoreError where there is none, where it holds no episodes (all of its rows
    would go), and where someone writes to it."""
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"{path} is no folder; a store elsewhere is mended in a copy: dataset convert {path} NEW.zarr")
    lengthened = _lengthen(path)
    store = EpisodeStore.open(path)
    if store.arrays.is_ours and len(store.arrays.empty_episodes) == 0:
        with EpisodeStore.append_to(path) as ours:
            dropped = (f"{array}: dropped {rows} uncommitted rows" for array, rows in ours.dropped.items())
            mended = (*ours.mended, *dropped)
    else:
        refuse_links(path)
        unlock = lock(path, "mend a copy: dataset convert")
        try:
            mended = tuple(_mend(open_group(str(path), "r+"), path))
        except StoreError:
            raise
        except ValueError as error:  # of a file that nobody can read
            raise StoreError(f"{path} cannot be mended: {error_text(error)}") from error
        finally:
            unlock()
    leftovers = (f"{left.name}: dropped what a killed process had begun" for left in remove_leftovers(path))
    return Repaired((*lengthened, *mended, *leftovers), tuple(finding for finding in validate(path) if finding.serious))


def _lengthen(path: Path) -> tuple[str, ...]:
    """Give meta/episode_ends of a store of ours the length of what is stored there, where its metadata are older; says
    what was done. Raises StoreError where the other arrays have not the rows that these episodes need."""
    if not len(EpisodeStore(open_group(str(path), "r"), str(path)).arrays.ends_beyond()):
        return ()
    refuse_links(path)
    unlock = lock(path)
    try:
        group = open_group(str(path), "r+")
        store = EpisodeStore(group, str(path))
        array = _array(group, ENDS)
        beyond = store.arrays.ends_beyond()
        ends = np.concatenate([np.asarray(array[:]), beyond])
        needed = {"data": int(ends[-1]), "meta": len(ends)}
        paths = (f"{folder}/{name}" for folder in needed for name in store.arrays.names(folder))
        short = [
            each for each in paths if each != ENDS and (store.arrays.raw(each).shape or (0,))[0] < needed[each[:4]]
        ]
        if short or (np.diff(ends, prepend=0) <= 0).any():
            why = f"{short[0]} has not their rows" if short else "the ends do not increase"
            raise StoreError(f"{path}: {ENDS} {older(len(beyond))}, and {why}; put all newest files back")
        array.resize((len(ends),))
    finally:
        unlock()
    return (f"{ENDS}: gave it the length of what it holds, {len(beyond)} episodes more than its older metadata said",)


def _mend(group: zarr.Group, path: Path) -> Iterator[str]:
    """Mend a store that another tool wrote, or of ours that another tool changed; says what was done."""
    store = EpisodeStore(group, str(path))
    ends, empty, beyond = _array(group, "meta/episode_ends"), store.arrays.empty_episodes, _tail(store)
    others = [name for name in list_names(group, "meta") if name != "episode_ends"]
    in_one_chunk = ends.shards is None and ends.chunks[0] >= ends.shape[0]
    together = len(empty) > 0 and in_one_chunk and not others
    if consolidated_is_stale(group) or together or beyond:
        copied = drop_consolidated(group)
        if copied or (path / ".zmetadata").is_file():
            (path / ".zmetadata").unlink(missing_ok=True)
            yield "dropped the consolidated copy of the metadata; make it anew with: zarr.consolidate_metadata"
    for file in unfinished_files(str(path)):
        file.unlink()
        yield f"{file.relative_to(path)}: dropped what a killed writer left"
    if together:
        # The last end is repeated while the array keeps its length: so each of the two writes leaves the same episodes.
        rows = np.asarray(ends[:])
        kept = store.episode_ends.astype(rows.dtype)
        ends[:] = np.concatenate([kept, np.full(len(rows) - len(kept), kept[-1])])
        ends.resize((len(kept),))
        yield f"meta/episode_ends: dropped {len(empty)} episodes without rows"
    elif len(empty):
        why = f"{', '.join(others)} would have to change at the same time" if others else "it lies in several files"
        yield f"meta/episode_ends: kept {len(empty)} episodes without rows ({why}): make a copy with: dataset convert"
    for name, rows in beyond.items():
        array = _array(group, name)
        array.resize((array.shape[0] - rows, *array.shape[1:]))
        yield f"{name}: dropped {rows} uncommitted rows"


def _tail(store: EpisodeStore) -> dict[str, int]:
    """Rows beyond the last episode, by array, where all arrays have as many: others may mean something else."""
    beyond = {path: rows for path, rows in store.arrays.uncommitted().items() if path.startswith("data/")}
    whole = len(beyond) == len(store.arrays.names("data")) and len(set(beyond.values())) == 1
    return beyond if whole else {}


def _array(group: zarr.Group, path: str) -> zarr.Array:
    array = group[path]
    assert isinstance(array, zarr.Array)
    trust(array)
    return array
