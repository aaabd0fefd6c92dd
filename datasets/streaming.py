"""The windows of a store: held in memory where they fit, else streamed in shuffled blocks with bounded memory.

Knows stores and windows. Knows no policy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from diffusion_policy.basics.images import as_uint8, is_image
from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.datasets.store import EpisodeStore
from diffusion_policy.datasets.windows import WHOLE, Batch, Hindsight, Shard, Windows, held_type

POOL_BYTES = 2**26
"""Memory of the rows that a stream shuffles at a time; the next ones are read meanwhile into as much again."""
POOL_BLOCKS = 8
"""From so many places of the store at once, so that a batch is mixed."""
INDEX_BYTES = 40
"""What a window costs beside its rows."""


class StreamedWindows:
    """The windows of a store that is too large for memory, in nearly random order: blocks of rows come in random order,
    and as many as fit the pool are shuffled together."""

    def __init__(
        self,
        store: EpisodeStore,
        keys: Mapping[str, str],
        episodes: Sequence[int] | np.ndarray,
        observation_horizon: int,
        prediction_horizon: int,
        *,
        device: torch.device | str = "cpu",
        labels: np.ndarray | None = None,
        mark_padding: bool = False,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        """`keys`: by its name in a batch, `action` among them, the key of the store; the others as in `Windows`."""
        self._store, self._keys, self._device, self._labels = store, keys, device, labels
        self._mark_padding = mark_padding
        self._horizons = observation_horizon, prediction_horizon
        self._ends = store.episode_ends
        self._chosen = np.zeros(len(self._ends), bool)
        self._chosen[episodes] = True
        sizes = {key: _row_bytes(store, key) for key in keys.values()}
        aligned = store.chunk_rows(max(sizes, key=lambda key: sizes[key]))  # few chunks are read for two blocks
        block_bytes = aligned * (sum(sizes.values()) + INDEX_BYTES)
        self._block_rows = aligned * max(1, pool_bytes // POOL_BLOCKS // block_bytes)
        self._blocks_together = max(1, pool_bytes // (block_bytes * (self._block_rows // aligned)))
        edges = np.minimum(np.arange(0, int(self._ends[-1]) + self._block_rows, self._block_rows), int(self._ends[-1]))
        lengths = np.diff(self._ends, prepend=0)
        used_before = np.concatenate([[0], np.cumsum(np.where(self._chosen, lengths, 0))])
        at_edges = np.interp(edges, np.concatenate([[0], self._ends]), used_before)  # linear within an episode
        self._windows_in_block = np.diff(np.rint(at_edges).astype(np.int64))

    def __len__(self) -> int:
        return int(self._windows_in_block.sum())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As `Windows.shapes`."""
        To, T = self._horizons
        return {name: (T if name == "action" else To, *self._store.shape(key)) for name, key in self._keys.items()}

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """As `Windows.batches`; only the rows of the pool and of the next one are in memory. Blocks are read whole,
        whatever the shard."""
        batch_size = min(batch_size, len(self))
        number, done = divmod(first_step, len(self) // batch_size)
        while True:
            yield from self._one_pass(batch_size, seed, number, done * batch_size, shard)
            number, done = number + 1, 0

    def _one_pass(self, batch_size: int, seed: int, number: int, skipped: int, shard: Shard) -> Iterator[Batch]:
        """The batches of one pass over the windows, after the first `skipped` windows."""
        first_row, stop_row = shard.of(batch_size)
        blocks = np.flatnonzero(self._windows_in_block)
        order = derive_rng("order of blocks", seed, number).permutation(blocks)
        pools = [order[i : i + self._blocks_together] for i in range(0, len(order), self._blocks_together)]
        first = 0
        while skipped >= (count := int(self._windows_in_block[pools[first]].sum())):
            first, skipped = first + 1, skipped - count
        parts: list[Batch] = []
        missing = batch_size
        with contextlib.closing(self._load_ahead(pools[first:])) as loaded:
            for i, (windows, indices) in enumerate(loaded, start=first):
                shuffled = derive_rng("order in a pool", seed, number, i).permutation(indices)[skipped:]
                skipped = 0
                while len(shuffled):
                    taken, shuffled = np.split(shuffled, [missing])
                    there = batch_size - missing  # rows of the batch before these
                    missing -= len(taken)
                    mine = taken[max(first_row - there, 0) : max(stop_row - there, 0)]
                    if len(mine):
                        parts.append(windows.gather(mine))
                    if missing == 0:
                        yield _join(parts)
                        parts, missing = [], batch_size

    def _load_ahead(self, pools: Iterable[np.ndarray]) -> Generator[tuple[Windows, np.ndarray]]:
        """Each pool's rows as windows, and the indices of those to use; the next pool is read meanwhile."""
        with ThreadPoolExecutor(1) as executor:
            waiting = None
            for blocks in pools:
                coming = executor.submit(self._load, blocks)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()

    def _load(self, blocks: np.ndarray) -> tuple[Windows, np.ndarray]:
        """Rows of some blocks, each with what its windows need before and after it. Every stretch of an episode within
        a block becomes an episode of its own; no window that is used reaches its ends."""
        observation_horizon, longest = self._horizons[0], max(self._horizons)
        total = int(self._ends[-1])
        inner = [(int(b) * self._block_rows, min((int(b) + 1) * self._block_rows, total)) for b in blocks]
        outer = [
            (max(0, start - observation_horizon + 1), min(total, stop + longest - observation_horizon))
            for start, stop in inner
        ]
        offsets = np.cumsum([0, *(stop - start for start, stop in outer)])
        rows = np.concatenate([np.arange(first, last) for first, last in outer])
        data = _make_room(self._store, self._keys, len(rows))
        ends, episodes, indices = [], [], []
        for (start, stop), (first, last), offset in zip(inner, outer, offsets[:-1], strict=True):
            for name, key in self._keys.items():
                data[name][offset : offset + last - first] = _read(self._store, key, first, last)
            first_held, last_held = np.searchsorted(self._ends, [first, last - 1], side="right")
            held = np.arange(first_held, last_held + 1)
            ends.append(np.minimum(self._ends[held], last) - first + offset)
            episodes.append(held)
            indices.append(np.flatnonzero(self._usable(start, stop)) + start - first + offset)
        labels = None if self._labels is None else self._labels[np.concatenate(episodes)]
        joined = np.concatenate(ends)
        windows = Windows(
            data,
            joined,
            np.arange(len(joined)),
            *self._horizons,
            device=self._device,
            labels=labels,
            rows=rows,
            mark_padding=self._mark_padding,
        )
        return windows, np.concatenate(indices)

    def _usable(self, start: int, stop: int) -> np.ndarray:
        """Whether each row belongs to a chosen episode, (stop - start,) bool."""
        return self._chosen[np.searchsorted(self._ends, np.arange(start, stop), side="right")]


def load_windows(
    store: EpisodeStore,
    keys: Mapping[str, str],
    episodes: Sequence[int] | np.ndarray,
    observation_horizon: int,
    prediction_horizon: int,
    *,
    device: torch.device | str,
    labels: np.ndarray | None,
    memory_bytes: float,
    hindsight: Hindsight | None = None,
    mark_padding: bool = False,
) -> Windows | StreamedWindows:
    """The windows of some episodes of a store: held in memory where they fit, else streamed. Arguments as in
    `StreamedWindows` and `Windows`. Raises ValueError for hindsight where they do not fit."""
    horizons, needed = (observation_horizon, prediction_horizon), memory_needed(store, keys.values(), episodes)
    if needed <= memory_bytes:
        return hold_windows(
            store,
            keys,
            episodes,
            *horizons,
            device=device,
            labels=labels,
            hindsight=hindsight,
            mark_padding=mark_padding,
        )
    if hindsight is not None:
        raise ValueError(
            f"hindsight needs whole episodes in memory: {needed / 1e9:.1f} GB, and {memory_bytes / 1e9:g} are allowed; "
            "raise --memory-gb"
        )
    return StreamedWindows(store, keys, episodes, *horizons, device=device, labels=labels, mark_padding=mark_padding)


def hold_windows(
    store: EpisodeStore,
    keys: Mapping[str, str],
    episodes: Sequence[int] | np.ndarray,
    observation_horizon: int,
    prediction_horizon: int,
    *,
    device: torch.device | str = "cpu",
    labels: np.ndarray | None = None,
    hindsight: Hindsight | None = None,
    mark_padding: bool = False,
) -> Windows:
    """The windows of some episodes of a store, in memory. Arguments as in `StreamedWindows` and `Windows`."""
    episodes = np.sort(np.asarray(episodes))
    data, ends = read_episodes(store, keys, episodes)
    labels = None if labels is None else labels[episodes]
    starts, stops = np.concatenate([[0], store.episode_ends[:-1]])[episodes], store.episode_ends[episodes]
    rows = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    horizons = observation_horizon, prediction_horizon
    return Windows(
        data,
        ends,
        np.arange(len(ends)),
        *horizons,
        device=device,
        labels=labels,
        rows=rows,
        hindsight=hindsight,
        mark_padding=mark_padding,
    )


def memory_needed(store: EpisodeStore, keys: Iterable[str], episodes: Sequence[int] | np.ndarray) -> int:
    """Bytes that the windows of some episodes take in memory."""
    rows = int(np.diff(store.episode_ends, prepend=0)[episodes].sum())
    return rows * (sum(_row_bytes(store, key) for key in keys) + INDEX_BYTES)


def episodes_within(
    store: EpisodeStore, keys: Iterable[str], episodes: Sequence[int] | np.ndarray, memory_bytes: float
) -> np.ndarray:
    """The first of some episodes whose windows fit, at least one."""
    rows = np.cumsum(np.diff(store.episode_ends, prepend=0)[episodes])
    needed = rows * (memory_needed(store, keys, [0]) / int(store.episode_ends[0]))
    return np.asarray(episodes)[: max(1, np.count_nonzero(needed <= memory_bytes))]


def read_episodes(
    store: EpisodeStore, keys: Mapping[str, str], episodes: Sequence[int] | np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of some episodes, in the order of the store: {name: (steps, ...)}, float32 or float64 (see `held_type`), and
    where each episode ends among them."""
    ends = store.episode_ends
    lengths = np.diff(ends, prepend=0)
    chosen = np.zeros(len(ends), bool)
    chosen[episodes] = True
    used = np.repeat(chosen, lengths)
    data = _make_room(store, keys, int(used.sum()))
    for name, key in keys.items():
        filled = 0
        for start, stop in store.block_spans(key):
            if used[start:stop].any():
                wanted = _read(store, key, start, stop)[used[start:stop]]
                data[name][filled : filled + len(wanted)] = wanted
                filled += len(wanted)
    return data, np.cumsum(lengths[chosen])


def _row_bytes(store: EpisodeStore, key: str) -> int:
    """Bytes of a row as it is held."""
    return held_type(store.dtype(key), store.shape(key)).itemsize * math.prod(store.shape(key))


def _make_room(store: EpisodeStore, keys: Mapping[str, str], rows: int) -> dict[str, np.ndarray]:
    """Empty arrays for so many rows of each key, by its name."""
    shapes = {name: store.shape(key) for name, key in keys.items()}
    return {
        name: np.empty((rows, *shapes[name]), held_type(store.dtype(key), shapes[name])) for name, key in keys.items()
    }


def _read(store: EpisodeStore, key: str, start: int, stop: int) -> np.ndarray:
    """Rows as they are held."""
    rows = store.read_rows(key, start, stop)
    return as_uint8(rows, f"{store.location}: data/{key}") if is_image(rows.shape[1:]) else rows


def _join(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    observations = {key: torch.cat([part.observations[key] for part in parts]) for key in parts[0].observations}
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    rows = np.concatenate([part.rows for part in parts if part.rows is not None])
    marks = [part.demonstrated for part in parts if part.demonstrated is not None]
    demonstrated = torch.cat(marks) if marks else None
    return Batch(observations, torch.cat([part.actions for part in parts]), labels, rows, demonstrated)
