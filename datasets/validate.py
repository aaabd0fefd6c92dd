"""Every problem of a store, in one pass that reads each chunk once.

Knows stores. Knows no policy.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr

from diffusion_policy.datasets.guard import codec_names, missing_chunks, refuse_unsafe
from diffusion_policy.datasets.storage import list_names, open_group, say
from diffusion_policy.datasets.store import FORMAT, EpisodeStore, StoreError, nonfinite_rows

MOST_FINDINGS = 1000
"""Missing chunks of one array that are listed."""
SHORT = 16
"""Steps of the default window."""


class Finding(NamedTuple):
    """Something about a store."""

    serious: bool
    """Whether it must be mended before anyone trains on it."""
    path: str
    """The array, such as data/state."""
    what: str
    episode: int | None = None
    """First episode that it is about."""
    row: int | None = None
    """First row that it is about."""


def validate(location: Path | str) -> list[Finding]:
    """All findings about a store, in the order of its parts; raises StoreError when it cannot be opened at all."""
    store = EpisodeStore(open_group(str(location), "r"), str(location))
    return list(_findings(store))


def _findings(store: EpisodeStore) -> Iterator[Finding]:
    ends = store.episode_ends
    if len(ends) == 0:
        yield Finding(True, "meta/episode_ends", "holds no episodes")
        for path, rows in store.uncommitted().items():
            yield Finding(False, path, f"has {rows} rows that belong to no episode")
        return
    yield from _check_ends(ends)
    action, keys = store.action_key, store.keys
    named = [*store.attributes.get("observation_keys", ()), action]
    for key in dict.fromkeys(named):
        if key not in keys:
            role = "the actions" if key == action else "an observation"
            yield Finding(True, f"data/{key}", f"should hold {role}, but is not there; there are {', '.join(keys)}")
    for path, rows in store.uncommitted().items():
        yield Finding(False, path, f"has {rows} rows beyond the last complete episode; drop them with: dataset repair")
    unprotected = []
    for key in keys:
        yield from _check_array(store, f"data/{key}", np.maximum.accumulate(ends))
        unprotected += [] if _has_checksum(store, f"data/{key}") else [f"data/{key}"]
    yield from _check_meta(store)
    if unprotected:
        what = "no checksum protects the values: damage that keeps their form cannot be told"
        yield Finding(False, ", ".join(unprotected), what)


def _check_ends(ends: np.ndarray) -> Iterator[Finding]:
    path = "meta/episode_ends"
    starts = np.concatenate([[0], ends[:-1]])
    for episode in np.flatnonzero(ends <= starts):
        what = f"episode {episode} would reach from row {starts[episode]} to before {ends[episode]}"
        yield Finding(True, path, what, int(episode), int(starts[episode]))
    lengths = ends - starts
    short = np.flatnonzero((lengths > 0) & (lengths < SHORT))
    if len(short):
        what = (
            f"{len(short)} of {len(ends)} episodes have fewer than {SHORT} steps, the shortest {lengths[short].min()}"
        )
        yield Finding(False, path, what, int(short[0]), int(starts[short[0]]))


def _check_array(store: EpisodeStore, path: str, ends: np.ndarray) -> Iterator[Finding]:
    """Form, missing chunks, then chunk by chunk damage and numbers that are not finite."""

    def place(row: int) -> tuple[int, int]:
        return int(np.searchsorted(ends, row, side="right")), row

    try:
        array, rows = store.raw_array(path), int(ends[-1])
        refuse_unsafe(array, rows, complete=False)
    except (StoreError, ValueError) as error:
        yield Finding(True, path, str(error))
        return
    chunk_rows = (array.shards or array.chunks)[0]
    if store.attributes.get("format") == FORMAT:
        for chunk in islice(missing_chunks(array, rows), MOST_FINDINGS):
            first = chunk[0] * chunk_rows
            what = (
                f"chunk {array.metadata.encode_chunk_key(chunk)} is missing (rows {first} to {first + chunk_rows - 1})"
            )
            yield Finding(True, path, what, *place(first))
    for first in range(0, rows, chunk_rows):
        stop = min(first + chunk_rows, rows)
        try:
            bad = first + nonfinite_rows(np.asarray(array[first:stop]))
        except Exception as error:  # whatever a damaged file makes zarr raise
            yield Finding(True, path, f"rows {first} to {stop - 1} are damaged: {say(error)}", *place(first))
            continue
        for episode in np.unique(np.searchsorted(ends, bad, side="right")):
            of_episode = bad[np.searchsorted(ends, bad, side="right") == episode]
            what = f"NaN or infinity in {len(of_episode)} rows of episode {episode}, first in row {of_episode[0]}"
            yield Finding(True, path, what, int(episode), int(of_episode[0]))


def _check_meta(store: EpisodeStore) -> Iterator[Finding]:
    """What is known of each episode."""
    known: dict[str, np.ndarray] = {}
    for name in list_names(store.group, "meta"):
        if not name.startswith("episode_") or name == "episode_ends":
            continue
        try:
            rows = store.read_meta(name.removeprefix("episode_"))
        except StoreError as error:
            yield Finding(True, f"meta/{name}", str(error))
            continue
        assert rows is not None
        known[name] = rows
        for episode in nonfinite_rows(rows):
            yield Finding(True, f"meta/{name}", f"NaN or infinity for episode {episode}", int(episode))
    modes = known.get("episode_mode", np.empty(0, int))
    for episode in np.flatnonzero((modes < -1) | (modes >= len(store.modes))) if store.modes else ():
        what = f"episode {episode} has the mode {modes[episode]}; there are {len(store.modes)}"
        yield Finding(True, "meta/episode_mode", what, int(episode))
    seeds, counts = np.unique(store.seeds() if "episode_seed" in known else [], return_counts=True)
    if (counts > 1).any():
        what = (
            f"{(counts > 1).sum()} seeds occur more than once, first {seeds[counts > 1][0]}: the same episodes twice?"
        )
        yield Finding(False, "meta/episode_seed", what)


def _has_checksum(store: EpisodeStore, path: str) -> bool:
    try:
        array: zarr.Array = store.raw_array(path)
    except StoreError:
        return True  # it has worse problems
    return bool({"crc32c", "crc32", "fletcher32"} & set(codec_names(array)))
