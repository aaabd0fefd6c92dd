"""Finds every problem of a store in one pass that reads each chunk once.

Knows stores. Knows no policy.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr

from diffusion_policy.basics.images import is_channels_first, is_image
from diffusion_policy.datasets.arrays import ABOUT, CHECKSUMS, EMBEDDING, ENDS, INSTRUCTION, NO_CHECKSUMS, older
from diffusion_policy.datasets.checksums import RowChecksums, checksum_of_meta, exchanged
from diffusion_policy.datasets.consolidated import consolidated_is_stale
from diffusion_policy.datasets.demonstration import nonfinite_rows
from diffusion_policy.datasets.frames import MOVED, Frames
from diffusion_policy.datasets.guard import codec_names, missing_chunks, read_rows
from diffusion_policy.datasets.locations import open_group
from diffusion_policy.datasets.storage import StoreError, error_text, list_names, unfinished_files
from diffusion_policy.datasets.store import EpisodeStore

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
    yield from _check_files(store)
    ends, beyond = store.episode_ends, len(store.arrays.ends_beyond())
    uncommitted = {} if beyond else store.arrays.uncommitted()
    if beyond:
        yield Finding(True, ENDS, f"{older(beyond)}; put the newest file back, or mend it with: dataset repair")
    if len(ends) == 0:
        yield Finding(True, "meta/episode_ends", "holds no episodes")
        for path, rows in uncommitted.items():
            yield Finding(False, path, f"has {rows} rows that belong to no episode")
        return
    yield from _check_ends(store)
    action, keys = store.action_key, store.keys
    named = [*store.attributes.get("observation_keys", ()), *store.parts(action)]
    for key in dict.fromkeys(named):
        if key not in keys and key not in store.left_out:
            role = "the actions" if key in store.parts(action) else "an observation"
            yield Finding(True, f"data/{key}", f"should hold {role}, but is not there; there are {', '.join(keys)}")
    for path, rows in uncommitted.items():
        yield Finding(False, path, f"has {rows} rows beyond the last complete episode; drop them with: dataset repair")
    for name in store.arrays.passed_over:
        yield Finding(False, name, "is an attribute of another meaning than ours, or no printable text; passed over")
    for key, why in store.left_out.items():
        yield Finding(True, f"data/{key}", f"{why}; it is left out")
    unprotected = []
    for key in keys:
        yield from _check_array(store, key)
        unprotected += [] if _has_checksum(store, f"data/{key}") else [f"data/{key}"]
    yield from _check_meta(store)
    if unprotected:
        what = "no checksum protects the values: damage that keeps their form cannot be told"
        yield Finding(False, ", ".join(unprotected), what)


def _check_files(store: EpisodeStore) -> Iterator[Finding]:
    """What other readers are misled by, and what killed writers have left."""
    stale = consolidated_is_stale(store.arrays.group)
    if stale:
        what = f"the consolidated copy of the metadata is stale ({', '.join(stale[:3])}): other tools read too much or "
        yield Finding(True, "consolidated metadata", what + "too little; drop it with: dataset repair")
    unfinished = unfinished_files(store.location)
    if unfinished:
        what = f"{len(unfinished)} files that a killed writer left; drop them with: dataset repair"
        yield Finding(False, str(unfinished[0].relative_to(store.location)), what)


def _check_ends(store: EpisodeStore) -> Iterator[Finding]:
    path, ends = "meta/episode_ends", store.episode_ends
    starts = np.concatenate([[0], ends[:-1]])
    for place in store.arrays.empty_episodes:
        what = f"episode {place} has no rows and is left out; drop it with: dataset repair"
        yield Finding(False, path, what, int(place))
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


def _increase(ends: np.ndarray) -> bool:
    return bool((np.diff(ends, prepend=0) > 0).all())


def _check_array(store: EpisodeStore, key: str) -> Iterator[Finding]:
    """Missing chunks, then chunk by chunk damage, numbers that are not finite, rows that are not those that were
    written, and what is wrong with frames."""
    ends = np.maximum.accumulate(store.episode_ends)
    path, array, rows = f"data/{key}", store.arrays.readable(f"data/{key}"), int(ends[-1])
    place = partial(_place, ends)
    yield from _check_missing(store, path, array, rows, place)
    written = _written(store).get(key, np.empty(0)) if _increase(store.episode_ends) else ()
    check, whole, others = RowChecksums(key, ends), np.ones(len(ends), bool), []
    frames = _frames(array, ends)
    chunk_rows = store.chunk_rows(key)
    for first in range(0, rows, chunk_rows):
        stop = min(first + chunk_rows, rows)
        try:
            found = read_rows(array, first, stop)
        except Exception as error:  # whatever a damaged file makes zarr raise
            yield Finding(True, path, f"rows {first} to {stop - 1} are damaged: {error_text(error)}", *place(first))
            found = np.zeros((stop - first, *array.shape[1:]), array.dtype)
            whole[place(first)[0] : place(stop - 1)[0] + 1] = False
        else:
            if frames is not None:
                frames.add(first, found)
        bad = first + nonfinite_rows(found)
        for episode in np.unique(np.searchsorted(ends, bad, side="right")):
            of_episode = bad[np.searchsorted(ends, bad, side="right") == episode]
            what = f"NaN or infinity in {len(of_episode)} rows of episode {episode}, first in row {of_episode[0]}"
            yield Finding(True, path, what, int(episode), int(of_episode[0]))
            whole[episode] = False
        for episode, value in check.add(found) if len(written) else ():
            if value != written[episode] and whole[episode]:
                others.append(episode)
    if others:
        what = exchanged(others[0]) + (f"; so of {len(others)} episodes" if len(others) > 1 else "")
        yield Finding(True, path, what, others[0], int(ends[others[0] - 1]) if others[0] else 0)
    if frames is not None:
        yield from _check_frames(store, key, frames, ends)
    elif is_channels_first(array.shape[1:]):
        what = f"rows of shape {array.shape[1:]} have their channels first; images are (height, width, channels): turn "
        yield Finding(True, path, what + "them with numpy.moveaxis(rows, 1, -1), and write them anew")


def _place(ends: np.ndarray, row: int) -> tuple[int, int]:
    return int(np.searchsorted(ends, row, side="right")), row


def _check_missing(
    store: EpisodeStore, path: str, array: zarr.Array, rows: int, place: Callable[[int], tuple[int, int]]
) -> Iterator[Finding]:
    """Files of ours that are not there."""
    file_rows = (array.shards or array.chunks)[0]
    for chunk in islice(missing_chunks(array, rows), MOST_FINDINGS) if store.arrays.is_ours else ():
        first = chunk[0] * file_rows
        what = f"chunk {array.metadata.encode_chunk_key(chunk)} is missing (rows {first} to {first + file_rows - 1})"
        yield Finding(True, path, what, *place(first))


def _frames(array: zarr.Array, ends: np.ndarray) -> Frames | None:
    """What the frames of an array are collected in; None where it holds no images."""
    if not is_image(array.shape[1:]):
        return None
    starts = np.concatenate([[0], ends[:-1]])
    return Frames(int(ends[-1]), starts[starts < ends[-1]], array.dtype)


def _check_frames(store: EpisodeStore, key: str, frames: Frames, ends: np.ndarray) -> Iterator[Finding]:
    """Frames that show nothing, cameras that froze while the state moved, and values that no image has."""
    path = f"data/{key}"
    frames.finish()
    if not frames.fits:
        limits = f"{frames.lowest.min():g} to {frames.highest.max():g}"
        allowed = "floats of images lie from 0 to 1, or from 0 to 255, whole numbers from 0 on"
        yield Finding(True, path, f"holds values from {limits}; {allowed}")
    blank = np.flatnonzero(frames.blank)
    of_blank = np.searchsorted(ends, blank, side="right")
    for episode in np.unique(of_blank):
        rows = blank[of_blank == episode]
        what = f"{len(rows)} frames of episode {episode} show nothing (one colour all over), first in row {rows[0]}"
        yield Finding(True, path, what, int(episode), int(rows[0]))
    frozen: dict[int, list[tuple[int, int]]] = {}
    state = _State(store)
    for run in frames.runs(ends):
        if not frames.blank[run.start : run.stop].all() and state.moves(run.start, run.stop):
            frozen.setdefault(run.episode, []).append((run.start, run.stop))
    for episode, runs in frozen.items():
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        count = f"{sum(stop - start for start, stop in runs)} frames of episode {episode} are frozen"
        what = f"{count} while {state.moved} moves, the longest time rows {start} to {stop - 1}"
        yield Finding(True, path, what, episode, start)


class _State:
    """The columns of a store that are no images, as far as they can be read: does one of them move?"""

    def __init__(self, store: EpisodeStore) -> None:
        self._store = store
        self.moved = ""
        """Which key moved last."""
        self._ranges: dict[str, np.ndarray] = {}
        plain = [key for key in store.keys if len(store.shape(key)) == 1]
        observed = [key for key in plain if key in store.observation_keys]
        for key in observed or [key for key in store.parts(store.action_key) if key in plain]:
            with contextlib.suppress(StoreError):  # said where the key itself is checked
                self._ranges[key] = self._range(key)

    def _range(self, key: str) -> np.ndarray:
        low, high = np.inf, -np.inf
        for _, rows in self._store.blocks(key):
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        return np.asarray(high, np.float64) - low

    def moves(self, start: int, stop: int) -> bool:
        """Whether a column moves by much of its range within some rows."""
        for key, wide in self._ranges.items():
            rows = self._store.read_rows(key, start, stop).astype(np.float64)
            if (np.ptp(rows, axis=0) > MOVED * wide).any():  # never where a column is constant
                self.moved = key
                return True
        return False


def _written(store: EpisodeStore) -> Mapping[str, np.ndarray]:
    """The checksums of episodes, as far as they can be read; what is wrong with them is said with the rest of meta/."""
    try:
        return store.checksums()
    except StoreError:
        return {}


def _check_meta(store: EpisodeStore) -> Iterator[Finding]:
    """What is known of each episode."""
    known: dict[str, np.ndarray] = {}
    inside = list_names(store.arrays.group, "meta")
    names = [name for name in inside if name.startswith("episode_") and name != "episode_ends"]
    for name in names:
        try:
            rows = store.read_meta(name.removeprefix("episode_"))
        except StoreError as error:
            yield Finding(True, f"meta/{name}", str(error))
            continue
        assert rows is not None
        known[name] = rows
        for episode in nonfinite_rows(rows):
            yield Finding(True, f"meta/{name}", f"NaN or infinity for episode {episode}", int(episode))
    if len(known) == len(names) and _increase(store.episode_ends):
        yield from _check_checksums(store, known)
    modes = known.get("episode_mode", np.empty(0, int))
    for episode in np.flatnonzero((modes < -1) | (modes >= len(store.modes))) if store.modes else ():
        what = f"episode {episode} has the mode {modes[episode]}; there are {len(store.modes)}"
        yield Finding(True, "meta/episode_mode", what, int(episode))
    yield from _check_instructions(store, known)
    seeds, counts = np.unique(store.seeds() if "episode_seed" in known else [], return_counts=True)
    if (counts > 1).any():
        what = (
            f"{(counts > 1).sum()} seeds occur more than once, first {seeds[counts > 1][0]}: the same episodes twice?"
        )
        yield Finding(False, "meta/episode_seed", what)


def _check_instructions(store: EpisodeStore, known: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Whether the instructions of episodes are those that the store names, and each text has one embedding."""
    texts, indices = store.instructions, known.get("episode_instruction", np.empty(0, int))
    promised = {INSTRUCTION: bool(texts), EMBEDDING: bool(texts) and "instruction_embedding" in store.attributes}
    for path in (path for path in promised if promised[path] and path.removeprefix("meta/") not in known):
        yield Finding(True, path, "is missing, or unreadable, though the store has instructions; instruct a copy anew")
    for episode in np.flatnonzero((indices < -1) | (indices >= len(texts))) if texts else ():
        what = f"episode {episode} has the instruction {indices[episode]}; there are {len(texts)}"
        yield Finding(True, INSTRUCTION, what, int(episode))
    try:
        embeddings = store.instruction_embeddings()
    except StoreError as error:
        yield Finding(True, EMBEDDING, str(error))
        return
    if embeddings is None or len(indices) != len(embeddings):
        return
    for i, text in enumerate(texts):
        of_text = np.flatnonzero(indices == i)
        other = of_text[(embeddings[of_text] != embeddings[of_text[:1]]).any(axis=1)]
        if len(other):
            what = f"episode {other[0]} has another embedding of {text!r:.100} than episode {of_text[0]}"
            yield Finding(True, EMBEDDING, what, int(other[0]))


def _check_checksums(store: EpisodeStore, known: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    """Whether the checksums of episodes are there, and what is known of episodes is what was written."""
    if not store.arrays.is_ours:
        return
    if not store.arrays.has_checksums:
        what = "format version 1 has no checksums of episodes, so exchanged files cannot be told; a copy has them"
        yield Finding(False, CHECKSUMS, f"{what}: dataset convert")
        return
    checksums = store.checksums()
    if not checksums:
        yield Finding(True, CHECKSUMS, NO_CHECKSUMS)
        return
    written = {f"meta/{name}": known[name] for name in known if name in ABOUT or name.startswith("episode_final_")}
    found = [
        checksum_of_meta(i, int(end), {path: rows[i] for path, rows in written.items()})
        for i, end in enumerate(store.episode_ends)
    ]
    wrong = np.flatnonzero(np.array(found, np.uint32) != checksums["meta"])
    if len(wrong):
        what = f"what is known of {len(wrong)} episodes, first of episode {wrong[0]}, is not what was written"
        yield Finding(True, "meta", what, int(wrong[0]))


def _has_checksum(store: EpisodeStore, path: str) -> bool:
    try:
        array: zarr.Array = store.arrays.raw(path)
    except StoreError:
        return True  # it has worse problems
    return bool({"crc32c", "crc32", "fletcher32"} & set(codec_names(array)))
