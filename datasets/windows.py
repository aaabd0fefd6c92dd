"""Windows of To observations and T actions, cut from episodes and gathered in batches: from arrays in memory (or on the
GPU), or streamed from a store in shuffled blocks with bounded memory.

Knows arrays and stores. Knows no policy.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion_policy.basics.streams import derive_rng
from diffusion_policy.datasets.demonstration import nonfinite_rows
from diffusion_policy.datasets.statistics import as_rows
from diffusion_policy.datasets.store import EpisodeStore

POOL_BYTES = 2**26
"""Memory of the rows that a stream shuffles at a time; the next ones are read meanwhile into as much again."""
POOL_BLOCKS = 8
"""From so many places of the store at once, so that a batch is mixed."""
INDEX_BYTES = 40
"""What a window costs beside its rows."""


class Shard(NamedTuple):
    """One of the equal parts of a batch: that of a process, or one of several computed one after the other."""

    rank: int = 0
    """Which of them, from 0."""
    world_size: int = 1
    """How many there are."""

    def of(self, rows: int) -> tuple[int, int]:
        """Of so many rows, its first one and the one behind its last."""
        return rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size


WHOLE = Shard()


class Batch(NamedTuple):
    """B windows."""

    observations: dict[str, Tensor]
    """Each key: (B, To, ...), the last one is *now*."""
    actions: Tensor
    """(B, T, A), from the first observed step on."""
    modes: Tensor | None = None
    """Index of the episode's mode, (B,) int64, -1 where it has none; None when the windows know no modes."""
    rows: np.ndarray | None = None
    """Row of the store that is *now* in each window, (B,) int64; of the data, where they come from no store."""

    def part(self, first: int, last: int) -> Batch:
        """Some of the windows."""
        observations = {key: values[first:last] for key, values in self.observations.items()}
        modes = None if self.modes is None else self.modes[first:last]
        return Batch(
            observations, self.actions[first:last], modes, None if self.rows is None else self.rows[first:last]
        )


class Windows:
    """One window for every step of the chosen episodes, with that step as *now*.

    Where a window reaches beyond its episode, the first or last step is repeated (edge padding).
    """

    def __init__(
        self,
        data: Mapping[str, np.ndarray],
        episode_ends: np.ndarray,
        episodes: Sequence[int] | np.ndarray,
        observation_horizon: int,
        prediction_horizon: int,
        *,
        device: torch.device | str = "cpu",
        modes: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        """`data`: `action` and each observation key, (steps, ...); `episodes`: indices of the episodes to use; `modes`:
        index of each episode's mode, (all episodes,), −1 where it has none; `rows`: where in the store each row of the
        data comes from, (steps,). Raises ValueError for data that cannot be cut so, and for NaN and infinity."""
        self._device = torch.device(device)
        held = {key: _hold(key, array, self._device) for key, array in data.items()}
        episode_ends, episodes = np.asarray(episode_ends), np.asarray(episodes)
        _require_episodes(held, episode_ends, episodes)
        starts = np.concatenate([[0], episode_ends[:-1]])
        lengths = (episode_ends - starts)[episodes]
        before = np.cumsum(lengths) - lengths  # windows of the episodes before
        self._now = np.arange(lengths.sum()) + np.repeat(starts[episodes] - before, lengths)  # (windows,) row of *now*
        self._first = np.repeat(starts[episodes], lengths)  # (windows,) first row of its episode
        self._last = np.repeat(episode_ends[episodes] - 1, lengths)  # (windows,) last row of its episode
        self._modes = None if modes is None else np.repeat(modes[episodes].astype(np.int64), lengths)
        self._rows = self._now if rows is None else rows[self._now]
        self._horizons = observation_horizon, prediction_horizon
        self._steps = np.arange(max(self._horizons)) + 1 - observation_horizon  # from now
        self._data = {key: torch.as_tensor(array, device=device) for key, array in held.items()}

    def __len__(self) -> int:
        return len(self._now)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What a batch holds of each window, (To, ...) of each observation key and (T, A) of `action`."""
        To, T = self._horizons
        return {key: (T if key == "action" else To, *array.shape[1:]) for key, array in self._data.items()}

    def rows(self) -> dict[str, np.ndarray]:
        """All rows of the chosen episodes: `action` and each observation key, (windows, ...)."""
        return {key: array.cpu().numpy()[self._now] for key, array in self._data.items()}

    def subset(self, indices: np.ndarray) -> Windows:
        """Some of the windows, on the same data."""
        chosen = copy.copy(self)
        chosen._now, chosen._first, chosen._last = (rows[indices] for rows in (self._now, self._first, self._last))
        chosen._modes = None if self._modes is None else self._modes[indices]
        chosen._rows = self._rows[indices]
        return chosen

    def gather(self, indices: np.ndarray | Tensor) -> Batch:
        """The windows with these indices, (B,) int64 on the CPU."""
        indices = np.asarray(indices)
        now, first, last = (rows[indices, None] for rows in (self._now, self._first, self._last))  # (B, 1) each
        rows = np.minimum(np.maximum(now + self._steps, first), last)  # (B, the longer of To and T)
        observed, predicted = (rows[:, :horizon] for horizon in self._horizons)
        observations = {key: _take(array, observed) for key, array in self._data.items() if key != "action"}
        modes = None if self._modes is None else torch.from_numpy(self._modes[indices]).to(self._device)
        return Batch(observations, _take(self._data["action"], predicted), modes, self._rows[indices])

    def batches(self, batch_size: int, seed: int, first_step: int = 0, shard: Shard = WHOLE) -> Iterator[Batch]:
        """Batches for ever, from the one of step `first_step` on: each pass over the windows in a new order that the
        seed fixes; an incomplete last batch is left out, unless there are fewer windows than `batch_size`. Of each
        batch, the rows of this `shard`."""
        batch_size = min(batch_size, len(self))
        first, stop = shard.of(batch_size)
        number, done = divmod(first_step, len(self) // batch_size)
        while True:
            order = derive_rng("order of windows", seed, number).permutation(len(self))
            for start in range(done * batch_size, len(self) - batch_size + 1, batch_size):
                yield self.gather(order[start + first : start + stop])
            number, done = number + 1, 0


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
        modes: np.ndarray | None = None,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        """`keys`: name of each key of the store in a batch, one of them `action`; the others as in `Windows`."""
        self._store, self._keys, self._device, self._modes = store, keys, device, modes
        self._horizons = observation_horizon, prediction_horizon
        self._ends = store.episode_ends
        self._chosen = np.zeros(len(self._ends), bool)
        self._chosen[episodes] = True
        sizes = {key: _row_bytes(store, key) for key in keys}
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
        return {name: (T if name == "action" else To, *self._store.shape(key)) for key, name in self._keys.items()}

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
            for key, name in self._keys.items():
                data[name][offset : offset + last - first] = self._store.read_rows(key, first, last)
            first_held, last_held = np.searchsorted(self._ends, [first, last - 1], side="right")
            held = np.arange(first_held, last_held + 1)
            ends.append(np.minimum(self._ends[held], last) - first + offset)
            episodes.append(held)
            indices.append(np.flatnonzero(self._usable(start, stop)) + start - first + offset)
        modes = None if self._modes is None else self._modes[np.concatenate(episodes)]
        joined = np.concatenate(ends)
        windows = Windows(
            data, joined, np.arange(len(joined)), *self._horizons, device=self._device, modes=modes, rows=rows
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
    modes: np.ndarray | None,
    memory_bytes: float,
) -> Windows | StreamedWindows:
    """The windows of some episodes of a store: held in memory where they fit, else streamed. Arguments as in
    `StreamedWindows`."""
    horizons = observation_horizon, prediction_horizon
    if memory_needed(store, keys, episodes) > memory_bytes:
        return StreamedWindows(store, keys, episodes, *horizons, device=device, modes=modes)
    return hold_windows(store, keys, episodes, *horizons, device=device, modes=modes)


def hold_windows(
    store: EpisodeStore,
    keys: Mapping[str, str],
    episodes: Sequence[int] | np.ndarray,
    observation_horizon: int,
    prediction_horizon: int,
    *,
    device: torch.device | str = "cpu",
    modes: np.ndarray | None = None,
) -> Windows:
    """The windows of some episodes of a store, in memory. Arguments as in `StreamedWindows`."""
    episodes = np.sort(np.asarray(episodes))
    data, ends = read_episodes(store, keys, episodes)
    modes = None if modes is None else modes[episodes]
    starts, stops = np.concatenate([[0], store.episode_ends[:-1]])[episodes], store.episode_ends[episodes]
    rows = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    return Windows(
        data, ends, np.arange(len(ends)), observation_horizon, prediction_horizon, device=device, modes=modes, rows=rows
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
    for key, name in keys.items():
        filled = 0
        for start, stop in store.block_spans(key):
            if used[start:stop].any():
                wanted = store.read_rows(key, start, stop)[used[start:stop]]
                data[name][filled : filled + len(wanted)] = wanted
                filled += len(wanted)
    return data, np.cumsum(lengths[chosen])


def held_type(dtype: np.dtype) -> np.dtype:
    """The type in which rows of this one are held: float32 where that holds all its numbers exactly, else float64."""
    return np.dtype(np.float32 if np.can_cast(dtype, np.float32) else np.float64)


def _hold(key: str, array: np.ndarray, device: torch.device) -> np.ndarray:
    """An array as it is held, float32 on MPS, which has no float64; raises ValueError for NaN and infinity, and for
    what is no number."""
    rows = as_rows(np.asarray(array))
    bad = nonfinite_rows(rows)
    if len(bad):
        raise ValueError(f"{key} has NaN or infinity in {len(bad)} rows, first in row {bad[0]}")
    return np.ascontiguousarray(rows, np.float32 if device.type == "mps" else held_type(rows.dtype))


def _require_episodes(data: Mapping[str, np.ndarray], episode_ends: np.ndarray, episodes: np.ndarray) -> None:
    """Raise ValueError unless these are the actions and observations of all steps, and these some of the episodes."""
    rows = {key: len(array) for key, array in data.items()}
    if "action" not in rows or len(rows) == 1:
        raise ValueError(f"windows need `action` and at least one observation; got {', '.join(rows) or 'nothing'}")
    rising = episode_ends.ndim == 1 and len(episode_ends) and (np.diff(episode_ends, prepend=0) > 0).all()
    if not rising or min(rows.values()) < episode_ends[-1]:
        raise ValueError(
            f"episode ends must rise from above 0 to at most the number of rows {rows}; got {episode_ends}"
        )
    if not len(episodes) or not np.isin(episodes, np.arange(len(episode_ends))).all():
        raise ValueError(f"windows need some of the {len(episode_ends)} episodes, from 0 on; got {episodes}")


def _row_bytes(store: EpisodeStore, key: str) -> int:
    """Bytes of a row as it is held."""
    return held_type(store.dtype(key)).itemsize * math.prod(store.shape(key))


def _make_room(store: EpisodeStore, keys: Mapping[str, str], rows: int) -> dict[str, np.ndarray]:
    """Empty arrays for so many rows of each key, by its name."""
    return {name: np.empty((rows, *store.shape(key)), held_type(store.dtype(key))) for key, name in keys.items()}


def _take(array: Tensor, rows: np.ndarray) -> Tensor:
    """Rows (B, horizon) of an array (steps, ...) → (B, horizon, ...)."""
    if array.device.type == "cpu":  # NumPy needs a third of torch's time for so few rows
        return torch.from_numpy(array.numpy().take(rows, axis=0))
    return array[torch.from_numpy(rows).to(array.device)]


def _join(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    observations = {key: torch.cat([part.observations[key] for part in parts]) for key in parts[0].observations}
    modes = None if parts[0].modes is None else torch.cat([part.modes for part in parts if part.modes is not None])
    rows = np.concatenate([part.rows for part in parts if part.rows is not None])
    return Batch(observations, torch.cat([part.actions for part in parts]), modes, rows)


def split_episodes(
    count: int, validation_share: float, seed: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training (at most so many) and of validation episodes, each sorted; at least one of each unless the
    share is 0.

    Raises ValueError when there are too few episodes to split.
    """
    held_out = 0 if validation_share == 0 else max(1, round(count * validation_share))
    if held_out >= count:
        raise ValueError(
            f"cannot hold out {validation_share:.0%} of {count} episodes and still train; "
            "take more episodes or a validation share of 0"
        )
    order = np.random.default_rng(seed).permutation(count)  # by no name, so that runs of earlier versions go on
    return np.sort(order[held_out:][:most]), np.sort(order[:held_out])
